//! Sources of endpoints that change while the gateway runs: each is read again and again, and the pool follows what it says.
//!
//! A source that cannot be read says nothing: the endpoints stay as they were. Who it names no longer drains.

mod dns;
mod file;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::MissedTickBehavior;

use crate::core::config::DiscoveryConfig;
use crate::server::backend::Backend;
use crate::server::membership::{CannotJoin, Endpoints, First};
use crate::server::runtime::Shared;

use dns::DnsSource;
use file::FileSource;

/// More endpoints of one source than this are a mistake.
const MAX_ENDPOINTS: usize = 10_000;

/// A source, ready to be read.
#[derive(Debug)]
pub(crate) enum Source {
    File(FileSource),
    Dns(Box<DnsSource>),
}

/// What a source said.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// The same as before.
    Nothing,
    /// These endpoints, and no others.
    Endpoints(Vec<Backend>),
}

impl Source {
    /// Prepares a source.
    ///
    /// # Errors
    /// A file that cannot be read, or a name that is none: what is wrong from the start was never right.
    pub(crate) fn new(config: &DiscoveryConfig) -> Result<Source, String> {
        match config {
            DiscoveryConfig::File(file) => FileSource::new(file).map(Source::File),
            DiscoveryConfig::Dns(dns) => DnsSource::new(dns).map(|source| Source::Dns(Box::new(source))),
        }
    }

    async fn read(&mut self) -> Result<Said, String> {
        match self {
            Source::File(file) => file.read().await,
            Source::Dns(dns) => dns.read().await,
        }
    }

    fn name(&self) -> String {
        match self {
            Source::File(file) => format!("file {}", file.path().display()),
            Source::Dns(dns) => format!("dns {}", dns.name()),
        }
    }
}

/// Follows a source until it is aborted; `first` is dropped when the endpoints that it named first are scraped.
pub(crate) async fn follow(shared: Arc<Shared>, mut source: Source, every: std::time::Duration, first: First) {
    let mut follower = Follower { endpoints: Endpoints::of(&shared), own: BTreeMap::new(), taken: Vec::new() };
    let (name, mut first, mut trouble) = (source.name(), Some(first), String::new());
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match source.read().await {
            Ok(said) => {
                trouble.clear();
                follower.follow(said, first.as_ref());
            }
            Err(why) => {
                shared.metrics.discovery_failed.fetch_add(1, Ordering::Relaxed);
                // Once for each kind of trouble, not with every reading.
                if why != trouble {
                    tracing::warn!(source = name, "cannot be read, its endpoints stay as they are: {why}");
                    trouble = why;
                }
            }
        }
        first.take();
    }
}

/// The endpoints that one source brought.
struct Follower {
    endpoints: Endpoints,
    own: BTreeMap<Arc<str>, Backend>,
    /// Those whose names somebody else has: they are tried again.
    taken: Vec<Backend>,
}

impl Follower {
    fn follow(&mut self, said: Said, first: Option<&First>) {
        let wanted = match said {
            Said::Nothing => {
                let waiting = std::mem::take(&mut self.taken);
                return waiting.into_iter().for_each(|b| self.join(b, first));
            }
            Said::Endpoints(list) => list,
        };
        self.taken.clear();
        let wanted: BTreeMap<Arc<str>, Backend> = wanted.into_iter().map(|b| (Arc::clone(&b.config.name), b)).collect();
        // First those that are new, so that the pool is never emptier than it has to be.
        let is_new = |b: &&Backend| !self.own.contains_key(&b.config.name);
        let new: Vec<Backend> = wanted.values().filter(is_new).cloned().collect();
        new.into_iter().for_each(|b| self.join(b, first));
        let gone: Vec<Arc<str>> = self
            .own
            .iter()
            .filter(|(name, b)| wanted.get(*name) != Some(b))
            .map(|(name, _)| Arc::clone(name))
            .collect();
        for name in gone {
            self.own.remove(&name);
            self.endpoints.drain(&name);
            // The same name at another place, or with other labels.
            if let Some(changed) = wanted.get(&name) {
                self.join(changed.clone(), first);
            }
        }
    }

    fn join(&mut self, backend: Backend, first: Option<&First>) {
        match self.endpoints.join_first(backend.clone(), first.cloned()) {
            Ok(()) => {
                self.own.insert(Arc::clone(&backend.config.name), backend);
            }
            Err(error @ CannotJoin::NameTaken(_)) => {
                tracing::debug!(%error, "an endpoint waits for its name");
                self.taken.push(backend);
            }
            // It is told once: another one joins only if its labels change.
            Err(error @ CannotJoin::NoPool(_)) => {
                tracing::warn!(%error, "its labels must be those of a pool's selector");
                self.own.insert(Arc::clone(&backend.config.name), backend);
            }
        }
    }
}
