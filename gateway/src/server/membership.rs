//! Who is in the pool while the server runs: endpoints join and drain, whoever says so.
//!
//! The core gives ids and knows when an endpoint may leave; this keeps what the server has to know of each id, and one scrape loop for
//! each member. An id is given again only when no request is at its endpoint, so what a request looks up stays what it was.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use http::header::HeaderValue;
use shared::metrics::{Def, Family, Key, Kind, Point};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::core::gateway::{EndpointChange, Input};
use crate::core::pool::{Endpoint, EndpointId, Presence};
use crate::server::backend::Backend;
use crate::server::routing::{Labels, Routing};
use crate::server::runtime::{self, ServeError, Shared};
use crate::server::scrape;

/// Told that the first scrape is over by being dropped.
pub(crate) type First = mpsc::Sender<()>;

/// An endpoint as the server sees it.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) backend: Backend,
    /// Its name, for the caller.
    pub(crate) name: Option<HeaderValue>,
    pub(crate) labels: Labels,
    /// Its model cards.
    cards: Mutex<Vec<serde_json::Value>>,
}

/// Endpoints by id, and members by name.
#[derive(Debug)]
pub(crate) struct Membership {
    targets: ArcSwap<Vec<Arc<Target>>>,
    members: Mutex<BTreeMap<Arc<str>, Member>>,
}

#[derive(Debug)]
struct Member {
    id: EndpointId,
    target: Arc<Target>,
    /// `None` until the server runs.
    scraper: Option<AbortHandle>,
    /// Who listens to its KV events, where somebody does.
    follower: Option<AbortHandle>,
}

impl Target {
    fn new(routing: &Routing, backend: Backend) -> Arc<Target> {
        let name = HeaderValue::from_str(&backend.config.name).ok();
        let labels = routing.labels(&backend);
        Arc::new(Target { backend, name, labels, cards: Mutex::default() })
    }

    /// Remembers its model cards.
    pub(crate) fn set_cards(&self, cards: Vec<serde_json::Value>) {
        *self.cards.lock().unwrap_or_else(PoisonError::into_inner) = cards;
    }
}

impl Membership {
    /// The endpoints that a server starts with, which have the ids 0, 1, ...
    pub(crate) fn new(routing: &Routing, backends: Vec<Backend>) -> Result<Membership, ServeError> {
        let (mut targets, mut members) = (Vec::new(), BTreeMap::new());
        for (i, backend) in backends.into_iter().enumerate() {
            let name = Arc::clone(&backend.config.name);
            let target = Target::new(routing, backend);
            targets.push(Arc::clone(&target));
            let member = Member { id: EndpointId(i as u32), target, scraper: None, follower: None };
            if members.insert(Arc::clone(&name), member).is_some() {
                return Err(ServeError::DuplicateName(name.to_string()));
            }
        }
        Ok(Membership { targets: ArcSwap::from_pointee(targets), members: Mutex::new(members) })
    }

    /// The endpoint with this id.
    pub(crate) fn get(&self, id: EndpointId) -> Arc<Target> {
        Arc::clone(&self.targets.load()[id.index()])
    }

    /// Whether `target` still has this id.
    pub(crate) fn is(&self, id: EndpointId, target: &Arc<Target>) -> bool {
        self.targets.load().get(id.index()).is_some_and(|t| Arc::ptr_eq(t, target))
    }

    /// All endpoints by id, those that have left included.
    pub(crate) fn backends(&self) -> Vec<Backend> {
        self.targets.load().iter().map(|target| target.backend.clone()).collect()
    }

    /// The model cards of all members, each model once.
    pub(crate) fn cards(&self) -> Vec<serde_json::Value> {
        let mut all: Vec<serde_json::Value> = Vec::new();
        for member in self.members().values() {
            for card in member.target.cards.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                if !all.iter().any(|c| c.get("id") == card.get("id")) {
                    all.push(card.clone());
                }
            }
        }
        all
    }

    fn set(&self, id: EndpointId, target: &Arc<Target>) {
        let mut targets = Vec::clone(&self.targets.load());
        match targets.get_mut(id.index()) {
            Some(place) => *place = Arc::clone(target),
            None => targets.push(Arc::clone(target)),
        }
        self.targets.store(Arc::new(targets));
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changes the pool of a server while it runs. Cheap to clone; stays valid after the server has ended, without effect.
#[derive(Clone)]
pub struct Endpoints(Arc<Shared>);

/// An endpoint that cannot join.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an endpoint called {0:?} is in the pool already")]
pub struct NameTaken(String);

impl Endpoints {
    pub(crate) fn of(shared: &Arc<Shared>) -> Endpoints {
        Endpoints(Arc::clone(shared))
    }

    /// Adds an endpoint. It gets requests from its first good scrape on, which is made at once.
    ///
    /// # Errors
    /// If one of this name is a member; one that drains has given its name up.
    ///
    /// # Panics
    /// Outside a runtime of tokio.
    pub fn join(&self, backend: Backend) -> Result<(), NameTaken> {
        self.join_first(backend, None)
    }

    /// As [`Endpoints::join`]; `first` is dropped after the first scrape.
    pub(crate) fn join_first(&self, backend: Backend, first: Option<First>) -> Result<(), NameTaken> {
        let shared = &self.0;
        let mut members = shared.membership.members();
        let name = Arc::clone(&backend.config.name);
        if members.contains_key(&name) {
            return Err(NameTaken(name.to_string()));
        }
        let target = Target::new(&shared.routing, backend);
        // Nobody may choose the endpoint before it can be looked up.
        let mut core = shared.core();
        let id = core.join(target.backend.config.clone());
        shared.membership.set(id, &target);
        drop(core);
        let scraper = Some(spawn(shared, id, &target, first));
        let follower = runtime::follow(shared, id, &target.backend);
        tracing::info!(endpoint = &*name, "endpoint joined");
        members.insert(name, Member { id, target, scraper, follower });
        Ok(())
    }

    /// The endpoint gets no new requests and leaves when those that it has are over; false if there is none of this name.
    pub fn drain(&self, name: &str) -> bool {
        let Some(member) = self.0.membership.members().remove(name) else { return false };
        member.scraper.iter().chain(&member.follower).for_each(AbortHandle::abort);
        self.0.tell(self.0.clock.now(), Input::Endpoint(EndpointChange::Draining(member.id)));
        tracing::info!(endpoint = name, "endpoint drains");
        true
    }

    /// Names of the members.
    pub fn names(&self) -> Vec<String> {
        self.0.membership.members().keys().map(ToString::to_string).collect()
    }

    /// Starts to scrape the endpoints that the server began with.
    pub(crate) fn scrape_all(&self, first: &First) {
        for member in self.0.membership.members().values_mut().filter(|m| m.scraper.is_none()) {
            member.scraper = Some(spawn(&self.0, member.id, &member.target, Some(first.clone())));
            member.follower = runtime::follow(&self.0, member.id, &member.target.backend);
        }
    }

    /// Ends all scrape loops, and whoever listens to KV events.
    pub(crate) fn stop_scraping(&self) {
        self.0
            .membership
            .members()
            .values_mut()
            .flat_map(|m| [m.scraper.take(), m.follower.take()])
            .flatten()
            .for_each(|s| s.abort());
    }
}

fn spawn(shared: &Arc<Shared>, id: EndpointId, target: &Arc<Target>, first: Option<First>) -> AbortHandle {
    tokio::spawn(scrape::watch(Arc::clone(shared), id, Arc::clone(target), first)).abort_handle()
}

const ENDPOINTS: Def =
    Def::new(Kind::UpDownCounter, "gateway.endpoints", "{endpoint}", "Endpoints of the pool by state.");
const EJECTIONS: Def = Def::new(
    Kind::Counter,
    "gateway.ejections",
    "{endpoint}",
    "Endpoints left out for failing several times in a row.",
);
const RETRIES_REFUSED: Def =
    Def::new(Kind::Counter, "gateway.retries.refused", "{attempt}", "Attempts not made: the retry budget was spent.");
const STATE: Key = Key::called("gateway.endpoint.state", "state");

/// What the pool looks like.
pub(crate) fn metrics(shared: &Shared) -> Vec<Family> {
    let now = shared.clock.now();
    let core = shared.core();
    let count = |of: &dyn Fn(&Endpoint) -> bool| core.endpoints().iter().filter(|e| of(e)).count();
    let available = count(&|e| e.is_available() && !e.outlier.is_ejected(now));
    let states = [
        ("available", available),
        ("ejected", count(&|e| e.is_member() && e.outlier.is_ejected(now))),
        ("unavailable", count(&|e| e.is_member() && !e.is_available() && !e.outlier.is_ejected(now))),
        ("draining", count(&|e| e.presence == Presence::Draining)),
    ];
    vec![
        ENDPOINTS.family(states.map(|(state, n)| Point::with(STATE, state, n)).into()),
        EJECTIONS.alone(core.ejections()),
        RETRIES_REFUSED.alone(core.retries_refused()),
    ]
}
