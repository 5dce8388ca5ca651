//! Between the world and the engines: what their front ends do with a request, what their cores are told, and what they answer.

use std::sync::Arc;

use engine_sim::core::engine::{Engine, Input as EngineInput, NewRequest, Output as EngineOutput, PreparedPrompt};
use engine_sim::core::facts::{EngineFact, Operation};
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::kv_transfer::{KvAsk, KvInput};
use engine_sim::core::sequence::{FinishReason, SamplingParams};
use gateway::core::pool::EndpointMetrics;
use gateway::pd_proxy::core::Leg as Side;
use gateway::spans::sent_span_id;
use shared::block_hash::ExtraKeys;
use shared::time::Time;
use shared::trace::context::TraceContext;
use shared::trace::{Tracer, Trail};

use super::cost;
use super::event::Event;
use super::flight::Leg;
use super::world::World;
use crate::scenario::Api;

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

impl Machine {
    pub(super) fn new(engine: Engine, model: Arc<str>, tracer: Tracer) -> Machine {
        Machine { engine, model, tracer, generation: 0, scheduled: None, member: true, frozen: None }
    }
}

impl World<'_> {
    /// The engine's front end has the request.
    pub(super) fn at_engine(&mut self, leg: Leg) {
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
        let sent = own.child(sent_span_id(self.tracer.naming(), own.span_id, flight.attempt));
        (engine, self.tracer.arrives(sent, flight.caller.as_ref(), flight.has_waited))
    }

    /// The prompt is tokens: the engine's core gets the request, and the stream's head goes out.
    pub(super) fn inputs_ready(&mut self, leg: Leg) {
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

    pub(super) fn step(&mut self, engine: usize, generation: u64) {
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
    pub(super) fn tell_peers(&mut self, engine: usize) {
        let machine = &mut self.machines[engine];
        for message in self.peers.carry(engine, &mut machine.engine) {
            self.push(message.at, Event::Heard { engine: message.to, input: Box::new(message.input) });
        }
    }

    pub(super) fn heard(&mut self, engine: usize, mut input: Box<KvInput>) {
        let machine = &mut self.machines[engine];
        self.peers.record(&mut input, &machine.tracer, self.now);
        machine.engine.handle(self.now, EngineInput::Kv(input));
        self.wake(engine);
    }

    pub(super) fn output(&mut self, output: EngineOutput) {
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
}
