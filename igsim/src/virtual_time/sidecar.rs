//! Routing sidecars in virtual time: the way of a request through one, driven by the sidecar's own core. It does what the live one does
//! (`gateway/src/pd_proxy/server`); the call to the engine that prefills is in [`super::prefill`].

use std::sync::Arc;

use engine_sim::core::kv_transfer::{KvAsk, RemoteBlocks};
use gateway::pd_proxy::core::{Allowed, Asked, Dance, Failure, Leg as Side, PdProxyConfig, Step};
use gateway::pd_proxy::spans::{PdFact, call_span_id};
use shared::time::{Dur, Time};
use shared::trace::context::TraceContext;
use shared::trace::{Resource, Started, Telemetry, Tracer};

use super::cost;
use super::event::Event;
use super::flight::Leg;
use super::prefill::Prefill;
use super::world::World;
use crate::report::{PdFigures, PdTally};
use crate::scenario::{Hop, Scenario};

/// In front of one engine.
struct Sidecar {
    config: PdProxyConfig,
    tracer: Tracer,
}

/// The sidecars of a run.
pub(super) struct Sidecars {
    /// By engine.
    each: Vec<Option<Sidecar>>,
    /// Who may be asked to prefill.
    pool: Allowed,
    tally: PdTally,
    /// One way between a sidecar and its engine.
    pub(super) local: Dur,
    /// One way between a sidecar and an engine that prefills.
    pub(super) remote: Dur,
}

/// A request at a sidecar.
pub(super) struct Proxied {
    pub(super) dance: Dance,
    started: Started,
    tracer: Tracer,
    /// What came with the request.
    caller: Option<TraceContext>,
    /// The call to an engine that prefills, while it is under way.
    pub(super) prefill: Option<Prefill>,
    /// Where the cache is, once it is known.
    pub(super) remote: Option<Arc<RemoteBlocks>>,
    /// The status of the latest answer to a prefill.
    pub(super) answered: u16,
    /// When the head of the answer is here, until that is noted.
    head: Option<Time>,
}

impl Proxied {
    /// The place in the trace that a call is made with.
    pub(super) fn context(&self, side: Side, attempt: u32) -> Option<TraceContext> {
        let own = &self.started.context;
        let sent = own.child(call_span_id(own.span_id, side, attempt));
        self.tracer.arrives(sent, self.caller.as_ref(), false)
    }
}

/// The engine of a sidecar, as a sidecar in one pod with it calls it: vLLM's port in llm-d's deployments.
const OWN_ENGINE: (&str, u16) = ("localhost", 8200);

impl Sidecars {
    /// Those that the scenario asks for. Engines are named `engine-0`, `engine-1`, ..., and listen at `port`.
    pub(super) fn of(scenario: &Scenario, telemetry: &Telemetry, port: u16) -> Sidecars {
        let (mut each, mut pool) = (Vec::new(), Vec::new());
        for group in &scenario.engines {
            let config = scenario.pd_proxy_of(group);
            let prefills = gateway::core::pool::Role::of(&group.endpoint_labels()).prefills();
            for _ in 0..group.count {
                let i = each.len();
                if prefills {
                    pool.push(format!("engine-{i}:{port}"));
                }
                each.push(config.clone().map(|config| {
                    let resource = Resource::new("pd-proxy", format!("pd-proxy-{i}"));
                    let tracer = scenario.tracer(telemetry, resource, Some(Hop::PdProxy));
                    Sidecar { config, tracer }
                }));
            }
        }
        let pool = Allowed::these(pool.iter().map(String::as_str)).expect("engines have names");
        let network = &scenario.network;
        let (local, remote) = (network.sidecar_engine.get(), network.engine_engine.get());
        Sidecars { each, pool, tally: PdTally::default(), local, remote }
    }

    /// Whether an engine has one.
    pub(super) fn is_before(&self, engine: usize) -> bool {
        self.each[engine].is_some()
    }

    /// The tracer of the one before an engine.
    pub(super) fn tracer(&self, engine: usize) -> Option<&Tracer> {
        self.each[engine].as_ref().map(|sidecar| &sidecar.tracer)
    }

    /// What they did.
    pub(super) fn figures(&self) -> PdFigures {
        self.tally.figures()
    }
}

impl World<'_> {
    /// One way between the gateway and the engine that answers the request in `slot`.
    pub(super) fn way(&self, slot: usize) -> Dur {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        self.engine_delay + if flight.proxied.is_some() { self.sidecars.local } else { Dur::ZERO }
    }

    /// The sidecar has the request.
    pub(super) fn at_sidecar(&mut self, leg: Leg) {
        let (slot, now, api) = (leg.slot, self.now, self.api);
        let (engine, caller) = self.route(slot);
        let prefiller = self.flight(slot).prefiller.map(|id| {
            let config = self.pools.endpoint(id.index());
            format!("{}:{}", config.address, config.port)
        });
        let sidecar = self.sidecars.each[engine].as_ref().expect("requests go to a sidecar where there is one");
        let tracer = sidecar.tracer.clone();
        let started = tracer.begin(caller.clone());
        let trail = sidecar.tracer.open::<PdFact>(&started, now);
        let connector = sidecar.config.connector;
        trail.note(now, || PdFact::Received { method: "POST", path: api.into(), route: api, connector });
        let mut dance = Dance::arrived(now, &sidecar.config, trail);
        let flight = self.flights[slot].as_mut().expect("an event names an open request");
        let (id, size_bytes) = (flight.id.clone(), flight.body_bytes);
        let asked = Asked { id, size_bytes, prefiller: prefiller.as_deref(), readable: true };
        let step = dance.asked(now, &asked, &self.sidecars.pool);
        let (prefill, remote, head) = (None, None, None);
        let proxied = Proxied { dance, started, tracer, caller, prefill, remote, answered: 0, head };
        flight.proxied = Some(Box::new(proxied));
        self.dance_on(leg, now, step);
    }

    /// Does at `at` what the sidecar's core says.
    pub(super) fn dance_on(&mut self, leg: Leg, at: Time, step: Step) {
        let slot = leg.slot;
        match step {
            Step::Prefill { target, attempt } => self.call_prefill(slot, at, &target, attempt),
            Step::BackOff(pause) => self.push(at + pause, Event::PrefillAgain(leg)),
            Step::Decode { transferred } => self.call_decode(leg, at, transferred),
            Step::PassOn => {
                let status = self.proxied(slot).answered;
                self.sidecar_answers(leg, at, status, None);
            }
            Step::Refuse(refusal) => self.sidecar_answers(leg, at, refusal.status(), None),
        }
    }

    /// A pause before a further attempt at a prefill is over.
    pub(super) fn prefill_again(&mut self, leg: Leg) {
        let step = self.proxied(leg.slot).dance.waited();
        self.dance_on(leg, self.now, step);
    }

    fn call_decode(&mut self, leg: Leg, at: Time, transferred: bool) {
        let slot = leg.slot;
        let edited = if transferred { cost::edit_body(self.flight(slot).body_bytes) } else { Dur::ZERO };
        let at = at + edited;
        let (host, port) = OWN_ENGINE;
        let proxied = self.proxied(slot);
        if !transferred {
            proxied.remote = None;
        }
        proxied.dance.call_started(at, Side::Decode, 0, &host.into(), port);
        self.push(at + self.sidecars.local, Event::AtEngine(leg));
    }

    /// What the engine that decodes is asked of its KV connector.
    pub(super) fn kv_ask(&mut self, slot: usize) -> Option<KvAsk> {
        let remote = self.flight(slot).proxied.as_ref()?.remote.as_ref()?;
        Some(KvAsk::Pull(Arc::clone(remote)))
    }

    /// The engine took the request in at `at` and sends the head of a stream.
    pub(super) fn sidecar_head(&mut self, slot: usize, at: Time) {
        let local = self.sidecars.local;
        if let Some(proxied) = &mut self.flight(slot).proxied {
            proxied.head = Some(at + local);
        }
    }

    /// The engine writes some of its answer at `at`.
    pub(super) fn sidecar_passes(&mut self, slot: usize, at: Time) {
        let at = at + self.sidecars.local;
        if let Some(proxied) = &mut self.flight(slot).proxied {
            if let Some(head) = proxied.head.take() {
                proxied.dance.call_head(head, 200);
            }
            proxied.dance.first_byte(at);
        }
    }

    /// The answer of the engine that decodes is all through: an answer that began, or one of this status.
    pub(super) fn sidecar_done(&mut self, slot: usize, at: Time, status: u16) {
        let at = at + self.sidecars.local;
        if let Some(proxied) = &mut self.flight(slot).proxied
            && status != 200
        {
            proxied.dance.call_head(at, status);
        }
        self.end_dance(slot, at, Some(status), None);
    }

    /// The engine that decodes breaks an answer off that began.
    pub(super) fn sidecar_broken(&mut self, slot: usize, at: Time) {
        let at = at + self.sidecars.local;
        self.end_dance(slot, at, Some(200), Some(Failure::Reset));
    }

    /// The engine that decodes is not there or breaks off before its answer: the sidecar answers in its place. Whether there is one.
    pub(super) fn sidecar_refuses(&mut self, leg: Leg, at: Time, failure: Failure) -> bool {
        let proxied = self.flight(leg.slot).proxied.is_some();
        if proxied {
            self.sidecar_answers(leg, at + self.sidecars.local, failure.status(), Some(failure));
        }
        proxied
    }

    /// The sidecar answers with an error at `at`.
    fn sidecar_answers(&mut self, leg: Leg, at: Time, status: u16, failure: Option<Failure>) {
        self.end_dance(leg.slot, at, Some(status), failure);
        self.push(at + self.engine_delay, Event::Refused { leg, status });
    }

    /// The gateway closes the connection to the sidecar, which lets go of whichever engine is at work. How much later the engine that
    /// decodes learns of it, or nothing if that is not the one.
    pub(super) fn leave_sidecar(&mut self, slot: usize) -> Option<Dur> {
        let (now, local) = (self.now, self.sidecars.local);
        let (at, began) = (now + self.engine_delay, self.flight(slot).began(now));
        let Some(proxied) = &mut self.flight(slot).proxied else { return Some(Dur::ZERO) };
        let done = proxied.dance.disconnected(at, began.then_some(200));
        let prefill = proxied.prefill.take();
        let decodes = proxied.dance.leg() == Some(Side::Decode);
        if let Some(done) = done {
            self.sidecars.tally.add(&done);
        }
        if let Some(prefill) = prefill {
            self.leave_prefill(prefill, at);
        }
        decodes.then_some(local)
    }

    fn end_dance(&mut self, slot: usize, at: Time, status: Option<u16>, failure: Option<Failure>) {
        let done = self.flight(slot).proxied.as_mut().and_then(|p| p.dance.ended(at, status, failure));
        if let Some(done) = done {
            self.sidecars.tally.add(&done);
        }
    }

    pub(super) fn proxied(&mut self, slot: usize) -> &mut Proxied {
        self.flight(slot).proxied.as_mut().expect("the request is at a sidecar")
    }

    /// How long a prefill may take, where something can go wrong.
    pub(super) fn prefill_limit(&mut self, slot: usize) -> Option<Dur> {
        let engine = self.engine_of(slot);
        let sidecar = self.sidecars.each[engine].as_ref()?;
        self.losses.watch().then(|| sidecar.config.timeouts.prefill.get())
    }
}
