//! The world of a virtual run: client, gateway, engines, and the queue of what happens between them.

use std::sync::Arc;

use engine_sim::core::config::{EngineConfig, Tokenizer};
use engine_sim::core::engine::{Engine, Output as EngineOutput};
use gateway::core::gateway::{Deadlines, Output as GatewayOutput};
use gateway::core::pool::EndpointConfig;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::tokens::TokenId;
use shared::trace::{OwnTraces, Resource, Telemetry, Tracer};

use super::engines::Machine;
use super::event::Event;
use super::flight::Flight;
use super::kv_events::Events;
use super::loss::Losses;
use super::peers::PeerNetwork;
use super::pools::Pools;
use super::queue::Queue;
use super::sidecar::Sidecars;
use super::{Ended, Observer};
use crate::replay::ReplayError;
use crate::report::{EngineFigures, FaultFigures, Outcome};
use crate::scenario::{Api, Callers, Hop, Scenario, Tenant};
use crate::workload::{Answer, Plan, PlannedRequest};

pub(super) struct World<'a> {
    pub(super) scenario: &'a Scenario,
    plan: Plan,
    queue: Queue<Event>,
    pub(super) sidecars: Sidecars,
    pub(super) pools: Pools,
    pub(super) tracer: Tracer,
    pub(super) scrape_traces: Option<Arc<OwnTraces>>,
    pub(super) machines: Vec<Machine>,
    pub(super) flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    open: usize,
    model: Arc<str>,
    pub(super) api: &'static str,
    pub(super) callers: Callers,
    /// Names of the tenants, how soon they want their requests, and for which model if not for that of all.
    pub(super) tenants: Vec<(Arc<str>, Deadlines, Option<Arc<str>>)>,
    pub(super) client_delay: Dur,
    pub(super) engine_delay: Dur,
    pub(super) scrape_every: Dur,
    pub(super) tokens: Vec<TokenId>,
    pub(super) outputs: Vec<EngineOutput>,
    pub(super) peers: PeerNetwork,
    pub(super) events: Events,
    pub(super) losses: Losses,
    /// Whether the gateway may make a second attempt beside a first.
    pub(super) hedges: bool,
    pub(super) decisions: Vec<GatewayOutput>,
    pub(super) now: Time,
    /// Requests planned and not sent yet.
    planned: usize,
    /// Whether the user asked for the end: nothing is sent any more, what is open goes on to its own.
    stopping: bool,
}

/// Where every engine listens.
const PORT: u16 = 8000;

/// Events between two questions whether to go on.
const ASK_EVERY: u64 = 4096;

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario, plan: Plan, seed: Seed, telemetry: &Telemetry) -> World<'a> {
        let mut machines = Vec::new();
        let mut endpoints = Vec::new();
        let model: Arc<str> = scenario.model().into();
        for group in &scenario.engines {
            // Prompts and answers are tokens of four bytes here.
            let config = EngineConfig { tokenizer: Tokenizer::Bytes, ..group.engine_config() };
            let profile = engine_sim::profiles::find(&config.profile).expect("the scenario is valid");
            for _ in 0..group.count {
                let name = format!("engine-{}", machines.len());
                let mut endpoint = EndpointConfig::new(&name, &name, PORT).with_labels(group.endpoint_labels());
                endpoint.models = scenario.models_of_endpoint(group);
                endpoints.push(endpoint);
                let instance = name.clone();
                let mut resource = Resource::new("vllm", name);
                resource.version = Some(engine_sim::server::VLLM_VERSION.to_owned());
                let tracer = scenario.tracer(telemetry, resource, None);
                let mut engine = Engine::new(config.clone(), Arc::clone(&profile));
                if let Some(faults) = group.faults(seed, &instance, false) {
                    engine = engine.with_faults(faults);
                }
                engine.trace_steps(tracer.engine_steps());
                let model = scenario.model_of_events(group).map_or_else(|| Arc::clone(&model), Arc::from);
                machines.push(Machine::new(engine, model, tracer));
            }
        }
        let own = Resource::new("inference-gateway", "gateway-0");
        let tracer = scenario.tracer(telemetry, own, Some(Hop::Gateway));
        let scrape_traces = tracer.scrapes();
        let peers = PeerNetwork::new(machines.iter().map(|m| &m.engine), scenario.network.engine_engine.get());
        let events = Events::new(&tracer);
        let mut config = scenario.gateway_config();
        // There is nothing to ask over a network that is not there.
        config.ask_nobody();
        World {
            pools: Pools::new(&config, &endpoints, seed),
            tracer,
            scrape_traces,
            machines,
            plan,
            queue: Queue::default(),
            sidecars: Sidecars::of(scenario, telemetry, PORT),
            flights: Vec::new(),
            free: Vec::new(),
            open: 0,
            model,
            api: path_of(scenario.workload.api),
            callers: scenario.callers(),
            tenants: scenario.workload.tenants.iter().map(said).collect(),
            client_delay: scenario.network.client_gateway.get(),
            engine_delay: scenario.network.gateway_engine.get(),
            scrape_every: scenario.gateway.metrics.scrape_interval.get(),
            tokens: Vec::new(),
            outputs: Vec::new(),
            peers,
            events,
            losses: Losses::of(scenario),
            hedges: scenario.gateway.retry.hedge.is_some(),
            decisions: Vec::new(),
            now: Time::ZERO,
            planned: 0,
            stopping: false,
            scenario,
        }
    }

    pub(super) fn run(mut self, observer: &mut dyn Observer) -> Result<Ended, ReplayError> {
        self.first_members();
        self.first_scrapes();
        // Faults have times of their own.
        (0..self.machines.len()).for_each(|engine| self.wake(engine));
        // Closed-loop clients all start at once; of an open loop one request is known ahead.
        while self.pull()? {}
        let mut events = 0u64;
        while self.open + if self.stopping { 0 } else { self.planned } > 0 {
            let Some((at, event)) = self.queue.pop() else { break };
            debug_assert!(at >= self.now, "time goes forward (I3)");
            self.now = at;
            self.happen(event, observer)?;
            events += 1;
            if events.is_multiple_of(ASK_EVERY) && !observer.go_on(at) {
                self.stopping = true;
            }
        }
        self.machines.iter_mut().for_each(|m| m.engine.settle());
        // The gateway ends when it has told everybody what it keeps.
        while let Some((_, event)) = self.queue.pop() {
            if let Event::Kept(kept) = event {
                self.kept(&kept);
            }
        }
        Ok(Ended { engines: self.figures(), at: self.now, interrupted: self.stopping })
    }

    fn happen(&mut self, event: Event, observer: &mut dyn Observer) -> Result<(), ReplayError> {
        if let Some(leg) = event.answer() {
            self.bring_forward(leg);
        }
        match event {
            Event::Send(_) if self.stopping => self.planned -= 1,
            Event::Send(plan) => self.send(*plan)?,
            Event::AtGateway(slot) => self.at_gateway(slot),
            Event::AtSidecar(leg) if self.is_current(leg) => self.at_sidecar(leg),
            Event::Prefill(call, event) if self.is_prefill(call) => self.prefill(call, event),
            Event::PrefillAgain(leg) if self.is_current(leg) => self.prefill_again(leg),
            Event::AtEngine(leg) if self.is_current(leg) => self.at_engine(leg),
            Event::InputsReady(leg) if self.is_current(leg) => self.inputs_ready(leg),
            Event::LeftBy(engine, key) => self.left_by(engine, key),
            Event::Heard { engine, input } => self.heard(engine, input),
            Event::Step { engine, generation } => self.step(engine, generation),
            Event::Membership(engine, change) => self.membership(engine, change),
            Event::Scrape(engine) if self.machines[engine].member => self.scrape(engine),
            Event::Scraped(engine, metrics) if self.machines[engine].member => self.scraped(engine, metrics),
            // Of an engine that is drained.
            Event::Scrape(_) | Event::Scraped(..) => {}
            Event::KvEvents(engine, batch) => self.kv_events(engine, &batch),
            Event::FirstChunk(leg) if self.is_current(leg) => self.first_chunk(leg.slot),
            Event::HedgeDue(leg) if self.is_current(leg) => self.hedge(leg.slot),
            Event::Head(leg) if self.is_current(leg) => self.tell_status(leg.slot, 200),
            Event::Answered { leg, reason } if self.is_current(leg) => self.answered(leg.slot, reason),
            Event::Refused { leg, status } if self.is_current(leg) => self.refused(leg.slot, status),
            Event::Lost { leg, loss } if self.is_current(leg) => self.lost(leg.slot, loss),
            // An attempt that was given up meanwhile.
            Event::AtSidecar(_)
            | Event::AtEngine(_)
            | Event::InputsReady(_)
            | Event::Prefill(..)
            | Event::PrefillAgain(_)
            | Event::FirstChunk(_)
            | Event::HedgeDue(_)
            | Event::Head(_)
            | Event::Answered { .. }
            | Event::Refused { .. }
            | Event::Lost { .. } => {}
            Event::GatewayDue(pool) => self.gateway_due(pool),
            Event::Overdue { slot, limit } => self.overdue(slot, limit),
            Event::Done { slot, outcome } => self.done(slot, outcome, observer),
            Event::Kept(kept) => self.kept(&kept),
        }
        Ok(())
    }

    pub(super) fn push(&mut self, at: Time, event: Event) {
        let class = event.class();
        self.queue.push(at, class, event);
    }

    /// Takes the next request that comes by itself; true while those at the start of a closed loop go on. One is known ahead,
    /// so that a plan of any length needs no memory.
    fn pull(&mut self) -> Result<bool, ReplayError> {
        let Some(request) = self.plan.next_arrival()? else { return Ok(false) };
        let closed_loop = request.client.is_some();
        self.schedule(request);
        Ok(closed_loop)
    }

    fn schedule(&mut self, request: PlannedRequest) {
        self.planned += 1;
        self.push(request.intended.max(self.now), Event::Send(Box::new(request)));
    }

    fn send(&mut self, request: PlannedRequest) -> Result<(), ReplayError> {
        self.planned -= 1;
        let first_of_its_own = request.client.is_none() && request.is_first_turn();
        let own = self.tenants.get(usize::from(request.tenant)).and_then(|(_, _, model)| model.clone());
        let flight = Some(Flight::new(request, own.unwrap_or_else(|| Arc::clone(&self.model)), self.now));
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.flights.push(None);
                self.flights.len() - 1
            }
        };
        self.flights[slot] = flight;
        self.open += 1;
        self.push(self.now + self.client_delay, Event::AtGateway(slot));
        if first_of_its_own {
            self.pull()?;
        }
        Ok(())
    }

    /// The client has the end of its answer.
    fn done(&mut self, slot: usize, outcome: Outcome, observer: &mut dyn Observer) {
        let flight = self.flights[slot].take().expect("an event names an open request");
        self.spread(&flight);
        self.free.push(slot);
        self.open -= 1;
        observer.request(&flight.row(self.now, outcome), &flight.gaps);
        let answer =
            (outcome == Outcome::Ok).then_some(Answer { content: flight.content, tokens: flight.output_tokens });
        if let Some(next) = self.plan.finished(&flight.plan, self.now, answer) {
            self.schedule(next);
        }
    }

    fn figures(&self) -> EngineFigures {
        let engines = self.machines.iter().map(|m| &m.engine);
        EngineFigures {
            preemptions: engines.clone().map(|e| e.metrics().num_preemptions).sum(),
            steps: engines.clone().map(|e| e.metrics().iteration_tokens_total.count()).sum(),
            faults: FaultFigures::of(engines.map(Engine::fault_counts)),
            pd: self.sidecars.figures(),
            ..EngineFigures::default()
        }
    }

    pub(super) fn flight(&mut self, slot: usize) -> &mut Flight {
        self.flights[slot].as_mut().expect("an event names an open request")
    }
}

/// What all requests of a tenant say.
fn said(tenant: &Tenant) -> (Arc<str>, Deadlines, Option<Arc<str>>) {
    (tenant.name.as_str().into(), deadlines(tenant), tenant.model.as_deref().map(Arc::from))
}

fn deadlines(tenant: &Tenant) -> Deadlines {
    Deadlines { ttft: tenant.slo_ttft.map(|d| d.get()), tpot: None, ttl: tenant.queue_ttl.map(|d| d.get()) }
}

/// The route a request goes to.
pub(crate) fn path_of(api: Api) -> &'static str {
    match api {
        Api::Chat => "/v1/chat/completions",
        Api::Completions => "/v1/completions",
    }
}
