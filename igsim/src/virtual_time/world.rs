//! The world of a virtual run: client, gateway, engines, and the queue of what happens between them.

use std::sync::Arc;

use engine_sim::core::config::{EngineConfig, Tokenizer};
use engine_sim::core::engine::{
    Engine, Input as EngineInput, NewRequest, Output as EngineOutput, PreparedPrompt, RequestKey as EngineKey,
};
use engine_sim::core::facts::{EngineFact, Operation};
use engine_sim::core::filler::output_content;
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::kv_transfer::{KvAsk, KvInput};
use engine_sim::core::sequence::{FinishReason, SamplingParams};
use gateway::core::gateway::{
    Deadlines, Gateway, Input as GatewayInput, Output as GatewayOutput, RequestInfo, RequestKey as GatewayKey,
    SessionKey,
};
use gateway::core::kv_index::events::Batch;
use gateway::core::pool::{EndpointConfig, EndpointMetrics, ScrapeError};
use gateway::core::pools::PoolId;
use gateway::core::prefix_index::PrefixHasher;
use gateway::core::scheduler::explain::EVERY_ENDPOINT;
use gateway::pd_proxy::core::Leg as Side;
use gateway::spans::{Arrived, GatewayFact, proxy_span_id};
use shared::block_hash::ExtraKeys;
use shared::rng::Seed;
use shared::time::{Dur, Stage, Stopwatch, Time};
use shared::tokens::TokenId;
use shared::trace::context::TraceContext;
use shared::trace::{OwnTraces, Resource, Telemetry, Tracer, Trail};

use super::cost::{self, CostWatch};
use super::flight::{Flight, Leg};
use super::judging::{Candidate, End, Kept};
use super::kv_events::Events;
use super::loss::{Limit, Loss, Losses};
use super::membership::Change;
use super::peers::PeerNetwork;
use super::pools::Pools;
use super::prefill::PrefillEvent;
use super::queue::Queue;
use super::sidecar::Sidecars;
use super::{Ended, Observer};
use crate::replay::ReplayError;
use crate::report::{EngineFigures, Failure, FaultFigures, Outcome};
use crate::scenario::{Api, Callers, Hop, Scenario, Tenant};
use crate::workload::{Answer, Plan, PlannedRequest};

/// What happens. Slots name requests in flight, legs their attempts, numbers name engines.
pub(super) enum Event {
    Send(Box<PlannedRequest>),
    AtGateway(usize),
    /// At the sidecar of the engine.
    AtSidecar(Leg),
    AtEngine(Leg),
    InputsReady(Leg),
    /// A sidecar's call to another engine.
    Prefill(Leg, PrefillEvent),
    /// A sidecar has waited long enough for a further call.
    PrefillAgain(Leg),
    /// The caller has closed the connection of an attempt.
    LeftBy(usize, EngineKey),
    Heard {
        engine: usize,
        input: Box<KvInput>,
    },
    Step {
        engine: usize,
        generation: u64,
    },
    /// Engines that join the pool or are drained.
    Membership(usize, Change),
    Scrape(usize),
    Scraped(usize, Result<EndpointMetrics, ScrapeError>),
    /// A batch of KV events is at the gateway.
    KvEvents(usize, Box<Batch>),
    FirstChunk(Leg),
    Answered {
        leg: Leg,
        reason: FinishReason,
    },
    Refused {
        leg: Leg,
        status: u16,
    },
    /// The gateway learns that an attempt was lost.
    Lost {
        leg: Leg,
        loss: Loss,
    },
    /// A core of the gateway wants to be looked at.
    GatewayDue(PoolId),
    /// An attempt has not answered for so long that a second one may be made.
    HedgeDue(Leg),
    /// The head of an answer is at the gateway.
    Head(Leg),
    /// A time limit of the gateway is reached.
    Overdue {
        slot: usize,
        limit: Limit,
    },
    Done {
        slot: usize,
        outcome: Outcome,
    },
    /// Services learn that a trace is kept.
    Kept(Box<Kept>),
}

/// Simultaneous events: first what arrives, so that a step that starts now has it; then the steps; then what the gateway and
/// the client learn of them.
impl Event {
    const fn class(&self) -> u8 {
        match self {
            Event::Send(_) => 0,
            Event::AtGateway(_) => 1,
            Event::AtSidecar(_) | Event::AtEngine(_) => 2,
            Event::InputsReady(_)
            | Event::Prefill(..)
            | Event::PrefillAgain(_)
            | Event::LeftBy(..)
            | Event::Heard { .. } => 3,
            Event::Membership(..) | Event::Scrape(_) => 4,
            Event::Step { .. } => 5,
            Event::Scraped(..) | Event::KvEvents(..) => 6,
            Event::FirstChunk(_) | Event::Head(_) => 7,
            Event::Answered { .. } | Event::Refused { .. } | Event::Lost { .. } => 8,
            Event::GatewayDue(_) => 9,
            Event::HedgeDue(_) | Event::Overdue { .. } => 10,
            Event::Done { .. } => 11,
            Event::Kept(_) => 12,
        }
    }
}

pub(super) struct Machine {
    pub(super) engine: Engine,
    /// What its KV events call its model.
    pub(super) model: Arc<str>,
    pub(super) tracer: Tracer,
    /// Raised whenever the wake-up moves; steps of older generations are stale.
    generation: u64,
    scheduled: Option<Time>,
    /// Whether the gateway knows it and does not drain it.
    pub(super) member: bool,
    /// What its metrics page says while it does not change, and since when it does not.
    pub(super) frozen: Option<(Time, EndpointMetrics)>,
}

/// What one engine is asked for a request.
pub(super) struct Asks {
    pub(super) max_tokens: u32,
    pub(super) arrival: Time,
    pub(super) kv: Option<KvAsk>,
    pub(super) trail: Trail<EngineFact>,
}

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
    outputs: Vec<EngineOutput>,
    pub(super) peers: PeerNetwork,
    pub(super) events: Events,
    pub(super) losses: Losses,
    /// Whether the gateway may make a second attempt beside a first.
    hedges: bool,
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
                let (member, frozen) = (true, None);
                machines.push(Machine { engine, model, tracer, generation: 0, scheduled: None, member, frozen });
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

    /// The request is received, parsed and scheduled.
    fn at_gateway(&mut self, slot: usize) {
        let now = self.now;
        let caller = self.flights[slot].as_ref().and_then(|f| self.callers.context(f.plan.index));
        let api = self.api;
        let started = self.begin(slot, now);
        let trail = self.tracer.open::<GatewayFact>(&started, now);
        trail.note(now, || GatewayFact::Received { method: "POST", path: api.into(), route: Some(api) });
        if let Some(reason) = started.reason {
            trail.note(now, || GatewayFact::Kept(reason));
        }
        if trail.is_recording() && self.tracer.tells_langfuse() {
            trail.note(now, || GatewayFact::Langfuse);
        }
        let tenant = self.flights[slot].as_ref().map(|f| usize::from(f.plan.tenant));
        let tenant = tenant.and_then(|t| self.tenants.get(t)).cloned();
        let (fairness_id, deadlines) = tenant.map_or_else(Default::default, |(name, d, _)| (Some(name), d));
        if deadlines.ttft.is_some() {
            trail.note(now, || GatewayFact::Objectives { ttft: deadlines.ttft, tpot: None });
        }
        self.tokens.clear();
        let mut tokens = std::mem::take(&mut self.tokens);
        let flight = self.flights[slot].as_mut().expect("an event names an open request");
        flight.plan.tokens(&mut tokens);
        if let Some(target) = self.pools.rewrites().target(&flight.model, None, &flight.id) {
            trail.note(now, || GatewayFact::Rewritten { asked: Arc::clone(&flight.model) });
            flight.model = target;
        }
        flight.body_bytes = cost::body_bytes(tokens.len());
        flight.content = output_content(&tokens, None);
        let mut watch = CostWatch(now);
        watch.lap(Stage::Parse { bytes: flight.body_bytes });
        let parsed = watch.0;
        if trail.detail() >= EVERY_ENDPOINT {
            // A body comes in one piece, and there are no headers to read.
            let metadata = flight.plan.objective.is_some() || fairness_id.is_some() || flight.plan.session.is_some();
            trail.note(now, || GatewayFact::HeadersRead { count: None, metadata });
            let arrived = Arrived { chunks: 1, bytes: flight.body_bytes.into() };
            trail.note(parsed, || GatewayFact::BodyRead { arrived, parsed: true });
        }
        let Some(pool) = self.pools.table.of_model(&flight.model) else {
            self.tokens = tokens;
            (flight.started, flight.trail) = (Some(started), trail);
            return self.unknown_model(slot, parsed);
        };
        flight.pool = pool;
        let config = self.pools.config(pool);
        if let Some(priority) = config.priority_of_engines(flight.plan.objective.as_deref()) {
            flight.engine_priority = priority;
        }
        let prefix = &config.prefix;
        let mut hasher = PrefixHasher::with_blocks(&flight.model, None, prefix.max_prefix_tokens, prefix.block_tokens);
        hasher.tokens(tokens.iter().copied());
        let info = RequestInfo {
            key: GatewayKey(slot as u64),
            id: flight.id.clone(),
            model: Arc::clone(&flight.model),
            streaming: flight.plan.streaming,
            size_bytes: flight.body_bytes,
            priority: 0,
            objective: flight.plan.objective.clone(),
            fairness_id,
            session: flight.plan.session.map(|(s, _)| SessionKey(s.0)),
            session_endpoint: None,
            selection: None,
            prompt_tokens_estimate: flight.plan.prompt_tokens,
            max_output_tokens: Some(flight.plan.output_tokens),
            deadlines,
            prefix: hasher.finish(),
            kv: self.events.prompt(self.pools.core(pool), &config.precise_prefix, &flight.model, &tokens),
            trail: trail.clone(),
        };
        flight.candidate = self.tracer.keeps().filter(|_| started.is_candidate()).map(|keep| Candidate::new(keep, now));
        (flight.caller, flight.started) = (caller, Some(started));
        flight.trail = trail;
        self.tokens = tokens;
        self.flight(slot).waits = true;
        self.ask(parsed, GatewayInput::Request(Box::new(info)), &mut watch);
        self.limit_total(slot);
        self.decide_all(watch.0, Some(slot));
    }

    /// Names the prompt's blocks as the chosen engine does, while its tokens are at hand.
    pub(super) fn name_blocks(&mut self, slot: usize) {
        let flight = self.flights[slot].as_mut().expect("an event names an open request");
        if let Some((endpoint, _)) = &flight.endpoint {
            let config = self.machines[endpoint.index()].engine.config();
            let extra = config.adapter(&flight.model).map_or_else(ExtraKeys::default, |(_, extra)| extra);
            let mut prompt = prepare_prompt(&config.cache, &self.tokens, &extra);
            if self.pools.core(flight.pool).reads_kv_events() {
                self.events.keep(&mut prompt, config, &self.tokens, &extra);
            }
            flight.prompt = Some(prompt);
        }
    }

    /// Does what the gateway decided about the request in `slot` at `at`.
    pub(super) fn decide(&mut self, slot: usize, at: Time, decision: GatewayOutput) {
        self.flight(slot).waits = false;
        match decision {
            GatewayOutput::Dispatch { endpoint, prefill, attempt, hedge_after, .. } => {
                let config = self.pools.endpoint(endpoint.index());
                let (name, address, port) = (Arc::clone(&config.name), Arc::clone(&config.address), config.port);
                let leg = self.losses.next_leg(slot);
                let flight = self.flight(slot);
                if let Some(candidate) = &mut flight.candidate {
                    candidate.calls(endpoint.index(), prefill.map(|p| p.index()));
                }
                flight.leg = leg;
                flight.endpoint = Some((endpoint, Arc::clone(&name)));
                (flight.attempts, flight.attempt) = (attempt + 1, attempt);
                flight.prefiller = prefill;
                flight.trail.note(at, || GatewayFact::AttemptStarted { attempt, endpoint: name, address, port });
                self.limit_head(leg, at);
                if let Some(after) = hedge_after {
                    self.push(at + after, Event::HedgeDue(leg));
                }
                let sidecar = self.sidecars.is_before(endpoint.index());
                let event = if sidecar { Event::AtSidecar(leg) } else { Event::AtEngine(leg) };
                self.push(at + self.engine_delay, event);
            }
            GatewayOutput::Stay { .. } => {}
            GatewayOutput::Reject { rejection, .. } => {
                let status = rejection.status();
                let flight = self.flight(slot);
                flight.dropped = rejection.dropped();
                let trail = std::mem::take(&mut flight.trail);
                flight.over(trail, at, End::answered(status));
                self.push(
                    at + self.client_delay,
                    Event::Done { slot, outcome: Outcome::Failed(Failure::Status(status)) },
                );
            }
        }
    }

    /// The engine's front end has the request.
    fn at_engine(&mut self, leg: Leg) {
        let slot = leg.slot;
        if self.is_unreachable(leg) {
            return;
        }
        let (engine, context) = self.route(slot);
        let limit = self.flight(slot).plan.output_tokens;
        let (trail, ready) = self.front_end(slot, engine, context, limit, false);
        let now = self.now;
        let flight = self.flight(slot);
        (flight.body_read, flight.engine_trail) = (now, trail);
        self.push(ready, Event::InputsReady(leg));
    }

    /// An engine's front end reads the request in `slot`, for at most `limit` tokens, perhaps to prefill for another one: its record, and
    /// when the prompt is tokens.
    pub(super) fn front_end(
        &mut self,
        slot: usize,
        engine: usize,
        context: Option<TraceContext>,
        limit: u32,
        prefills: bool,
    ) -> (Trail<EngineFact>, Time) {
        let now = self.now;
        let model = Arc::clone(&self.flight(slot).model);
        let chat = self.scenario.workload.api == Api::Chat;
        let asked = Arc::clone(&model);
        let adapter = self.machines[engine].engine.config().adapter(&asked).is_some();
        let tracer = &self.machines[engine].tracer;
        let started = tracer.begin(context);
        let trail = tracer.open::<EngineFact>(&started, now);
        let generation = if trail.is_recording() { tracer.generation(&asked, prefills) } else { None };
        let flight = self.flight(slot);
        let id = &flight.id;
        trail.note(now, || {
            let request = format!("{}-{id}", if chat { "chatcmpl" } else { "cmpl" });
            let operation = if chat { Operation::Chat } else { Operation::TextCompletion };
            EngineFact::Received { model, request: shared::ids::RequestId::sanitise(&request), operation }
        });
        if adapter {
            let name = Arc::clone(&asked);
            trail.note(now, || EngineFact::Adapter(name));
        }
        if let Some(generation) = generation {
            trail.note(now, || EngineFact::Langfuse(generation));
        }
        let priority = flight.engine_priority;
        trail.note(now, || EngineFact::Asked {
            max_tokens: Some(limit),
            temperature: None,
            top_p: None,
            n: None,
            priority: (priority != 0).then_some(priority),
        });
        let ready = now + cost::process_inputs(flight.plan.prompt_tokens);
        let prompt_tokens = flight.plan.prompt_tokens;
        trail.note(ready, || EngineFact::InputsProcessed { started: now, prompt_tokens, truncated: false });
        (trail, ready)
    }

    /// The engine of a dispatched request and the context that it receives, or its sidecar.
    pub(super) fn route(&mut self, slot: usize) -> (usize, Option<TraceContext>) {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        let (endpoint, _) = flight.endpoint.as_ref().expect("the request was dispatched");
        let engine = endpoint.index();
        if let Some(proxied) = &flight.proxied {
            return (engine, proxied.context(Side::Decode, 0));
        }
        let own = &flight.started.as_ref().expect("the request began").context;
        let sent = own.child(proxy_span_id(own.span_id, flight.attempt));
        (engine, self.tracer.arrives(sent, flight.caller.as_ref(), flight.has_waited))
    }

    /// The prompt is tokens: the engine's core gets the request, and the stream's head goes out.
    fn inputs_ready(&mut self, leg: Leg) {
        let slot = leg.slot;
        if self.is_struck(leg) {
            return;
        }
        let now = self.now;
        let flight = self.flight(slot);
        let (endpoint, _) = flight.endpoint.as_ref().expect("the request was dispatched");
        let engine = endpoint.index();
        let kv = self.kv_ask(slot);
        let flight = self.flight(slot);
        let prompt = flight.prompt.take().expect("the prompt is prepared");
        let (max_tokens, arrival, trail) = (flight.plan.output_tokens, flight.body_read, flight.engine_trail.clone());
        let request = self.new_request(slot, engine, leg, prompt, Asks { max_tokens, arrival, kv, trail });
        self.sidecar_head(slot, now);
        let flight = self.flight(slot);
        flight.taken = Some(now);
        if flight.plan.streaming {
            let head = now + self.way(slot);
            self.flight(slot).head(head);
            self.settle_race(slot, head);
            if self.hedges {
                self.push(head, Event::Head(leg));
            }
        }
        self.machines[engine].engine.handle(now, EngineInput::Add(Box::new(request)));
        self.wake(engine);
    }

    /// The request in `slot` for one of the engines that it is sent to.
    pub(super) fn new_request(
        &mut self,
        slot: usize,
        engine: usize,
        leg: Leg,
        prompt: PreparedPrompt,
        asks: Asks,
    ) -> NewRequest {
        let Asks { max_tokens, arrival, kv, trail } = asks;
        let model = Arc::clone(&self.flight(slot).model);
        let lora = self.machines[engine].engine.config().adapter(&model).map(|(number, _)| number);
        let flight = self.flight(slot);
        let (priority, content) = (flight.engine_priority, flight.content);
        let params = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
        NewRequest { key: leg.key(), prompt, params, priority, arrival, content, lora, kv, trail }
    }

    /// The prompt of the request in `slot` as `engine` names its blocks.
    pub(super) fn prepared(&mut self, slot: usize, engine: usize) -> PreparedPrompt {
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.clear();
        let flight = self.flight(slot);
        flight.plan.tokens(&mut tokens);
        let model = Arc::clone(&flight.model);
        let config = self.machines[engine].engine.config();
        let extra = config.adapter(&model).map_or_else(ExtraKeys::default, |(_, extra)| extra);
        let prompt = prepare_prompt(&config.cache, &tokens, &extra);
        self.tokens = tokens;
        prompt
    }

    /// Puts the engine's next wake-up into the queue, if it moved.
    pub(super) fn wake(&mut self, engine: usize) {
        let machine = &mut self.machines[engine];
        let next = machine.engine.next_wakeup();
        if next == machine.scheduled {
            return;
        }
        machine.scheduled = next;
        machine.generation += 1;
        let generation = machine.generation;
        if let Some(at) = next {
            self.push(at.max(self.now), Event::Step { engine, generation });
        }
    }

    fn step(&mut self, engine: usize, generation: u64) {
        if self.machines[engine].generation != generation {
            return;
        }
        let mut outputs = std::mem::take(&mut self.outputs);
        let machine = &mut self.machines[engine];
        machine.scheduled = None;
        machine.engine.advance(self.now, &mut outputs);
        for output in outputs.drain(..) {
            self.output(output);
        }
        self.outputs = outputs;
        self.tell_peers(engine);
        self.tell_gateway(engine);
        self.wake(engine);
    }

    /// Carries what the engine's KV connector tells other engines.
    fn tell_peers(&mut self, engine: usize) {
        let machine = &mut self.machines[engine];
        for message in self.peers.carry(engine, &mut machine.engine) {
            self.push(message.at, Event::Heard { engine: message.to, input: Box::new(message.input) });
        }
    }

    fn heard(&mut self, engine: usize, mut input: Box<KvInput>) {
        let machine = &mut self.machines[engine];
        self.peers.record(&mut input, &machine.tracer, self.now);
        machine.engine.handle(self.now, EngineInput::Kv(input));
        self.wake(engine);
    }

    fn output(&mut self, output: EngineOutput) {
        let leg = Leg::of(output.key());
        self.bring_forward(leg);
        if self.is_prefill(leg) {
            return self.prefill_output(leg, &output);
        }
        if !self.is_current(leg) {
            return self.left_behind(&output);
        }
        let slot = leg.slot;
        let to_gateway = self.way(slot);
        let to_client = to_gateway + self.client_delay;
        match output {
            EngineOutput::Tokens { at, new_tokens, .. } => {
                let flight = self.flight(slot);
                let first = flight.plan.streaming && flight.output_tokens == 0;
                if first {
                    self.sidecar_passes(slot, at);
                }
                let flight = self.flight(slot);
                flight.streamed(at, to_gateway, to_client, new_tokens);
                if first && self.core_of(slot).reads_first_chunks() {
                    self.push(at + to_gateway, Event::FirstChunk(leg));
                }
            }
            EngineOutput::Finished { at, reason: FinishReason::Error, .. } => self.load_failed(leg, at),
            EngineOutput::Finished { at, reason, stats, .. } => {
                self.sidecar_passes(slot, at);
                self.sidecar_done(slot, at, 200);
                let flight = self.flight(slot);
                if let Some(candidate) = &mut flight.candidate {
                    candidate.preempted |= stats.preemptions > 0;
                }
                flight.cached_tokens = stats.cached_tokens;
                self.settle_race(slot, at + to_gateway);
                self.flight(slot).answered(at, to_gateway, to_client);
                self.push(at + to_gateway, Event::Answered { leg, reason });
            }
            EngineOutput::Rejected { at, reason, .. } => {
                let status = reason.http_status();
                let flight = self.flight(slot);
                let error_type = if status == 503 { "503" } else { "400" };
                flight.engine_trail.note(at, || EngineFact::Failed { error_type, http_status: status });
                std::mem::take(&mut flight.engine_trail).finish(at);
                self.sidecar_done(slot, at, status);
                self.push(at + to_gateway, Event::Refused { leg, status });
            }
            EngineOutput::Broken { at, lost, .. } => self.broken(leg, at, lost),
        }
    }

    /// The first chunk of an answer is at the gateway.
    fn first_chunk(&mut self, slot: usize) {
        let (endpoint, _) = self.flight(slot).endpoint.clone().expect("the request was dispatched");
        self.tell(GatewayInput::FirstChunk { key: GatewayKey(slot as u64), endpoint });
    }

    /// The end of the answer is at the gateway.
    fn answered(&mut self, slot: usize, reason: FinishReason) {
        let now = self.now;
        let flight = self.flight(slot);
        let model = Arc::clone(&flight.model);
        flight.gateway_end(now, reason, model);
        let (prompt_tokens, output_tokens) = (flight.plan.prompt_tokens, flight.output_tokens);
        if self.core_of(slot).reads_usage() {
            self.tell(GatewayInput::Used { key: GatewayKey(slot as u64), prompt_tokens, output_tokens });
        }
        self.tell_status(slot, 200);
        self.leave(slot);
        self.push(now + self.client_delay, Event::Done { slot, outcome: Outcome::Ok });
    }

    /// A refusal of the engine is at the gateway.
    fn refused(&mut self, slot: usize, status: u16) {
        let now = self.now;
        if self.is_retried(slot, status) {
            return;
        }
        self.settle_race(slot, now);
        self.flight(slot).gateway_refusal(now, status);
        self.tell_status(slot, status);
        self.leave(slot);
        self.push(now + self.client_delay, Event::Done { slot, outcome: Outcome::Failed(Failure::Status(status)) });
    }

    /// The gateway's core learns how an engine answered.
    pub(super) fn tell_status(&mut self, slot: usize, status: u16) {
        let (endpoint, _) = self.flight(slot).endpoint.clone().expect("the request was dispatched");
        self.tell(GatewayInput::ResponseStarted { key: GatewayKey(slot as u64), endpoint, status });
    }

    /// The gateway's core forgets the request.
    pub(super) fn leave(&mut self, slot: usize) {
        let (endpoint, _) = self.flight(slot).endpoint.clone().expect("the request was dispatched");
        self.tell(GatewayInput::Finished { key: GatewayKey(slot as u64), endpoint });
        self.flight(slot).leg = Leg::default();
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

    /// The core that has the request in `slot`.
    fn core_of(&self, slot: usize) -> &Gateway {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        self.pools.core(flight.pool)
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
