//! The kv-cache-manager: the index of KV events as a service of its own, over HTTP.
//!
//! It follows the engines and answers which of them hold a prompt. Prompts are named by the keys of their blocks: no text and no
//! token id crosses the wire.

mod access;
mod api;
mod client;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::clock::RunClock;
use shared::trace::Tracer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::core::config::{GatewayConfig, PreciseConfig, UpstreamConfig};
use crate::core::kv_index::events::Batch;
use crate::core::kv_index::{Applied, KvIndex};
use crate::core::pool::EndpointId;
use crate::server::backend::Backend;
use crate::server::kv_events::{Follower, Keeper, Sources};
use crate::server::runtime::ServeError;
pub(crate) use client::Manager;

/// A bound kv-cache-manager.
pub struct KvManager {
    listener: TcpListener,
    local_addr: SocketAddr,
    state: State,
}

/// What all requests share.
struct State {
    index: Mutex<KvIndex>,
    config: PreciseConfig,
    backends: Vec<Backend>,
    tracer: Arc<Tracer>,
    clock: RunClock,
    access_log: bool,
}

impl KvManager {
    /// Binds a manager of the index of these engines. Connections wait until [`KvManager::run`].
    ///
    /// # Errors
    /// If the configuration is not valid, two engines have one name or the address cannot be bound.
    pub async fn bind(
        addr: SocketAddr,
        config: PreciseConfig,
        endpoints: Vec<Backend>,
        tracer: Tracer,
        clock: RunClock,
    ) -> Result<KvManager, ServeError> {
        let whole = GatewayConfig { precise_prefix: config.clone(), ..GatewayConfig::default() };
        let problems = whole.validate();
        if !problems.is_empty() {
            return Err(ServeError::Config(problems));
        }
        for (i, e) in endpoints.iter().enumerate() {
            if endpoints[..i].iter().any(|other| other.config.name == e.config.name) {
                return Err(ServeError::DuplicateName(e.config.name.to_string()));
            }
        }
        let bind = |source| ServeError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let index = Mutex::new(KvIndex::new(&config, endpoints.len()));
        let state = State { index, config, backends: endpoints, tracer: Arc::new(tracer), clock, access_log: false };
        Ok(KvManager { listener, local_addr, state })
    }

    /// Logs a line at level info for every request, if `on`; off by default.
    #[must_use]
    pub fn access_log(mut self, on: bool) -> KvManager {
        self.state.access_log = on;
        self
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `shutdown` is ready.
    ///
    /// # Errors
    /// If no connection can be accepted any more, or TLS towards the engines cannot be set up.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        let sources =
            Sources::new(self.state.config.events_port, &UpstreamConfig::default()).map_err(io::Error::other)?;
        let (state, mut followers) = (Arc::new(self.state), JoinSet::new());
        for (i, backend) in state.backends.iter().enumerate() {
            let follower = Follower {
                keeper: Arc::clone(&state) as Arc<dyn Keeper>,
                endpoint: EndpointId(i as u32),
                backend: backend.clone(),
                sources: sources.clone(),
                config: state.config.clone(),
                tracer: Arc::clone(&state.tracer),
                clock: state.clock,
            };
            followers.spawn(follower.run());
        }
        let router = api::router(state);
        axum::serve(self.listener, router).with_graceful_shutdown(shutdown).await
    }
}

impl State {
    fn index(&self) -> MutexGuard<'_, KvIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keeper for State {
    fn take(&self, endpoint: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied {
        // Without a topic that names it, all engines are taken to serve one model, which then needs no name.
        let model = model.unwrap_or_default();
        if after_gap {
            self.index().resume(endpoint, model, batch);
            return Applied::Taken;
        }
        self.index().apply(endpoint, model, batch)
    }

    fn next(&self, endpoint: EndpointId) -> u64 {
        self.index().next_batch(endpoint)
    }
}

#[cfg(test)]
mod tests;
