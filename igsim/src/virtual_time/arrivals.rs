//! At the gateway: a request arrives and is sent on, and what engines answer comes back.

use std::sync::Arc;

use engine_sim::core::filler::output_content;
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::sequence::FinishReason;
use gateway::core::gateway::{
    Gateway, Input as GatewayInput, Output as GatewayOutput, RequestInfo, RequestKey as GatewayKey, SessionKey,
};
use gateway::core::prefix_index::PrefixHasher;
use gateway::core::scheduler::explain::EVERY_ENDPOINT;
use gateway::spans::{Arrived, GatewayFact};
use shared::block_hash::ExtraKeys;
use shared::time::{Stage, Stopwatch, Time};

use super::cost::{self, CostWatch};
use super::event::Event;
use super::flight::Leg;
use super::judging::{Candidate, End};
use super::world::World;
use crate::report::{Failure, Outcome};

impl World<'_> {
    /// The request is received, parsed and scheduled.
    pub(super) fn at_gateway(&mut self, slot: usize) {
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

    /// The first chunk of an answer is at the gateway.
    pub(super) fn first_chunk(&mut self, slot: usize) {
        let (endpoint, _) = self.flight(slot).endpoint.clone().expect("the request was dispatched");
        self.tell(GatewayInput::FirstChunk { key: GatewayKey(slot as u64), endpoint });
    }

    /// The end of the answer is at the gateway.
    pub(super) fn answered(&mut self, slot: usize, reason: FinishReason) {
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
    pub(super) fn refused(&mut self, slot: usize, status: u16) {
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

    /// The core that has the request in `slot`.
    pub(super) fn core_of(&self, slot: usize) -> &Gateway {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        self.pools.core(flight.pool)
    }
}
