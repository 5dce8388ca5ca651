//! One pool of endpoints as the server sees it: its core, who waits for it, who is in it. Pools share nothing but the server.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Stopped, Stopwatch, Time};
use shared::trace::Tracer;
use tokio::task::AbortHandle;

use crate::core::config::GatewayConfig;
use crate::core::gateway::{Gateway, Input};
use crate::core::kv_index::Applied;
use crate::core::kv_index::events::Batch;
use crate::core::pool::{Adapters, Endpoint, EndpointId};
use crate::core::request::RequestKey;
use crate::server::backend::Backend;
use crate::server::kv_events::{Follower, Keeper, Sources};
use crate::server::kv_manager::Manager;
use crate::server::membership::{Membership, Target};
use crate::server::queue::{Answer, Queue};
use crate::server::routing::Routing;
use crate::server::runtime::{ServeError, Upstream};

/// A pool.
pub(crate) struct Pool {
    core: Mutex<Gateway>,
    /// Those who wait for the core, with flow control.
    pub(crate) queue: Option<Queue>,
    /// The gateway's configuration as it is for this pool.
    pub(crate) config: GatewayConfig,
    pub(crate) membership: Membership,
    pub(crate) routing: Routing,
    /// Whether the core wants to know of first chunks.
    pub(crate) reads_first_chunks: bool,
    /// Whether it wants to know what requests were served.
    pub(crate) reads_usage: bool,
    /// Whether it wants to know of LoRA adapters.
    pub(crate) reads_adapters: bool,
    /// Whether it wants prompts named for the index of KV events.
    pub(crate) reads_kv_events: bool,
    kv_sources: Sources,
    /// Who is asked for precise prefixes, where that is a service of its own.
    pub(crate) kv_manager: Option<Manager>,
    pub(crate) clock: RunClock,
    /// Requests that came to it.
    pub(crate) requests: AtomicU64,
}

impl Pool {
    /// A pool of these endpoints.
    pub(crate) fn new(
        config: GatewayConfig,
        endpoints: Vec<Backend>,
        client: &Upstream,
        clock: RunClock,
        seed: Seed,
    ) -> Result<Pool, ServeError> {
        let routing = Routing::new(&config);
        let configs: Vec<_> = endpoints.iter().map(|e| e.config.clone()).collect();
        let membership = Membership::new(&routing, endpoints)?;
        let core = Gateway::new(config.clone(), configs, seed);
        let kv_sources = Sources::new(config.precise_prefix.events_port, &config.upstream);
        Ok(Pool {
            queue: core.has_flow_control().then(Queue::new),
            membership,
            routing,
            reads_first_chunks: core.reads_first_chunks(),
            reads_usage: core.reads_usage(),
            reads_adapters: core.reads_adapters(),
            reads_kv_events: core.reads_kv_events(),
            kv_sources: kv_sources.map_err(ServeError::Tls)?,
            kv_manager: Manager::of(&config.precise_prefix, client).filter(|_| core.reads_kv_events()),
            core: Mutex::new(core),
            config,
            clock,
            requests: AtomicU64::new(0),
        })
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Gateway> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the core what happened where nothing is to be done about it for the one who tells.
    pub(crate) fn tell(&self, now: Time, input: Input) {
        self.tell_locked(self.core(), now, input);
    }

    /// Tells the core what became known of an endpoint, unless its id has another owner by now.
    pub(crate) fn tell_of(&self, id: EndpointId, target: &Arc<Target>, now: Time, input: Input) {
        let core = self.core();
        if self.membership.is(id, target) {
            self.tell_locked(core, now, input);
        }
    }

    fn tell_locked(&self, mut core: MutexGuard<'_, Gateway>, now: Time, input: Input) {
        let mut out = Vec::new();
        core.handle(now, input, &mut Stopped(now), &mut out);
        if let Some(queue) = &self.queue {
            queue.plan(&core);
        }
        drop(core);
        match &self.queue {
            Some(queue) => _ = queue.deliver(out, None),
            None => debug_assert!(out.is_empty(), "an answer that nobody reads: {out:?}"),
        }
    }

    /// Asks the core what to do with a request; `timed` says whether the stages of its decision are recorded.
    pub(crate) fn ask(&self, now: Time, key: RequestKey, input: Input, timed: bool) -> Answer {
        let mut out = Vec::with_capacity(1);
        let (mut live, mut stopped) = (self.clock.stopwatch(), Stopped(now));
        let Some(queue) = &self.queue else {
            let watch: &mut dyn Stopwatch = if timed { &mut live } else { &mut stopped };
            self.core().handle(now, input, watch, &mut out);
            return Answer::Now(out.pop().expect("the core answers a request"));
        };
        let later = queue.enter(key);
        {
            let mut core = self.core();
            // It may be another request that goes, and that one may be recorded.
            core.handle(now, input, &mut live, &mut out);
            queue.plan(&core);
        }
        queue.deliver(out, Some(key)).map_or(Answer::Later(later), Answer::Now)
    }

    /// Tells the core that a caller waits no more.
    pub(crate) fn cancel(&self, now: Time, key: RequestKey) {
        if let Some(queue) = &self.queue {
            queue.leave(key);
        }
        self.tell(now, Input::Cancelled(key));
    }

    /// Lets the core do what is due.
    pub(crate) fn advance(&self) {
        let Some(queue) = &self.queue else { return };
        let mut out = Vec::new();
        let now = self.clock.now();
        self.core().advance(now, &mut self.clock.stopwatch(), &mut out);
        queue.deliver(out, None);
    }

    /// Whether any endpoint may get requests.
    pub(crate) fn is_ready(&self) -> bool {
        self.core().endpoints().iter().any(Endpoint::is_available)
    }

    /// The first model that is known of its members.
    pub(crate) fn first_model(&self) -> Option<Arc<str>> {
        let core = self.core();
        let members = core.endpoints().iter().filter(|e| e.is_member());
        members.map(|e| &e.config.models).find_map(|models| models.first()).cloned()
    }

    /// The LoRA adapters of an endpoint, as the core knows them.
    pub(crate) fn adapters(&self, id: EndpointId) -> Option<Adapters> {
        self.core().endpoints().get(id.index()).map(|e| e.adapters.clone())
    }

    /// Follows the KV events of an endpoint, if the index of them is kept here.
    pub(crate) fn follow(
        self: &Arc<Self>,
        tracer: Arc<Tracer>,
        endpoint: EndpointId,
        backend: &Backend,
    ) -> Option<AbortHandle> {
        let config = &self.config.precise_prefix;
        let here = self.reads_kv_events && config.manager.is_none();
        let follower = here.then(|| Follower {
            keeper: Arc::clone(self) as Arc<dyn Keeper>,
            endpoint,
            backend: backend.clone(),
            sources: self.kv_sources.clone(),
            config: config.clone(),
            tracer,
            clock: self.clock,
        })?;
        Some(tokio::spawn(follower.run()).abort_handle())
    }
}

impl Keeper for Pool {
    fn take(&self, endpoint: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied {
        self.core().kv_events(endpoint, model, batch, after_gap)
    }

    fn next(&self, endpoint: EndpointId) -> u64 {
        self.core().next_kv_batch(endpoint)
    }
}
