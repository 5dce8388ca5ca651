//! One request on its way through a virtual run.

use std::sync::Arc;

use engine_sim::core::engine::{PreparedPrompt, RequestKey as EngineKey};
use engine_sim::core::facts::EngineFact;
use engine_sim::core::sequence::FinishReason;
use gateway::core::pool::EndpointId;
use gateway::core::pools::PoolId;
use gateway::spans::{Failure, GatewayFact};
use shared::ids::RequestId;
use shared::time::{Dur, Time};
use shared::tokens::ContentId;
use shared::trace::{Started, TraceContext, Trail};

use super::hedge::Beside;
use super::judging::{Candidate, End};
use super::sidecar::Proxied;
use crate::report::{Outcome, RequestRow};
use crate::workload::PlannedRequest;

/// One attempt of a request: at one engine. Its serial number tells it from what else was in the slot before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Leg {
    pub(super) slot: usize,
    pub(super) serial: u64,
}

/// Bits of an engine's key that hold the slot.
const SLOT_BITS: u32 = 24;

impl Leg {
    /// Its name at the engine.
    pub(super) fn key(self) -> EngineKey {
        let slot = self.slot as u64;
        assert!(slot < 1 << SLOT_BITS, "sixteen million requests open at once are more than the queue of events bears");
        EngineKey(self.serial << SLOT_BITS | slot)
    }

    /// The leg of this name.
    pub(super) fn of(key: EngineKey) -> Leg {
        Leg { slot: (key.0 & ((1 << SLOT_BITS) - 1)) as usize, serial: key.0 >> SLOT_BITS }
    }
}

/// A request between its sending and its end.
pub(super) struct Flight {
    pub(super) leg: Leg,
    /// Whether it waits in the gateway.
    pub(super) waits: bool,
    /// llm-d's name for the reason why the gateway refused it.
    pub(super) dropped: Option<&'static str>,
    /// When the engine of this attempt took it in.
    pub(super) taken: Option<Time>,
    pub(super) plan: PlannedRequest,
    pub(super) id: RequestId,
    /// The model that it is sent to, and the pool that has it.
    pub(super) model: Arc<str>,
    pub(super) pool: PoolId,
    /// Its priority in vLLM's sense: lower is more important.
    pub(super) engine_priority: i32,
    /// The trace that the client sent it with.
    pub(super) caller: Option<TraceContext>,
    /// Whether it waited in the gateway before it was sent on.
    pub(super) has_waited: bool,
    /// At the gateway.
    pub(super) started: Option<Started>,
    pub(super) trail: Trail<GatewayFact>,
    /// What its end is judged by, if it is recorded only for that.
    pub(super) candidate: Option<Box<Candidate>>,
    /// At the engine.
    pub(super) engine_trail: Trail<EngineFact>,
    pub(super) prompt: Option<PreparedPrompt>,
    pub(super) body_bytes: u32,
    /// What the engine answers.
    pub(super) content: ContentId,
    pub(super) endpoint: Option<(EndpointId, Arc<str>)>,
    pub(super) attempts: u32,
    /// The current attempt, and another one beside it.
    pub(super) attempt: u32,
    pub(super) beside: Option<Box<Beside>>,
    /// The endpoint that the gateway wants to prefill it.
    pub(super) prefiller: Option<EndpointId>,
    /// At a sidecar, from its arrival there.
    pub(super) proxied: Option<Box<Proxied>>,
    /// How long engines that prefill had it.
    pub(super) prefill_time: Dur,
    /// When the engine had read the request.
    pub(super) body_read: Time,
    pub(super) sent: Time,
    pub(super) first_token: Option<Time>,
    pub(super) last_token: Option<Time>,
    pub(super) gaps: Vec<Dur>,
    pub(super) output_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) added: Option<Dur>,
    /// Pieces of the answer; when its head comes, until that is noted; whether its first byte was written.
    chunks: u32,
    head: Option<Time>,
    pub(super) first_written: bool,
}

impl Flight {
    pub(super) fn new(plan: PlannedRequest, model: Arc<str>, sent: Time) -> Flight {
        Flight {
            leg: Leg::default(),
            waits: false,
            dropped: None,
            taken: None,
            id: RequestId::sanitise(&format!("req-{}", plan.index)),
            engine_priority: -plan.priority,
            plan,
            model,
            pool: PoolId::default(),
            caller: None,
            has_waited: false,
            started: None,
            trail: Trail::off(),
            candidate: None,
            engine_trail: Trail::off(),
            prompt: None,
            body_bytes: 0,
            content: ContentId(0),
            endpoint: None,
            attempts: 0,
            attempt: 0,
            beside: None,
            prefiller: None,
            proxied: None,
            prefill_time: Dur::ZERO,
            body_read: Time::ZERO,
            sent,
            first_token: None,
            last_token: None,
            gaps: Vec::new(),
            output_tokens: 0,
            cached_tokens: 0,
            added: None,
            chunks: 0,
            head: None,
            first_written: false,
        }
    }

    /// The head of the response will be at the gateway at `at`, unless the engine refuses the request: then it is another one.
    pub(super) fn head(&mut self, at: Time) {
        self.head = Some(at);
    }

    /// The engine did not refuse.
    fn note_head(&mut self) {
        if let Some(at) = self.head.take() {
            self.trail.note(at, || GatewayFact::ResponseHead { status: 200 });
        }
    }

    /// The engine hands tokens to the stream at `at`.
    pub(super) fn streamed(&mut self, at: Time, to_gateway: Dur, to_client: Dur, n: u32) {
        self.output_tokens += n;
        if !self.plan.streaming {
            return;
        }
        self.note_head();
        self.chunks += 1;
        if self.first_token.is_none() {
            self.first_byte(at, to_client);
            self.trail.note(at + to_gateway, || GatewayFact::FirstToken);
        }
        self.token_seen(at + to_client);
    }

    /// The engine writes the first byte of its answer at `at`.
    fn first_byte(&mut self, at: Time, to_client: Dur) {
        if !std::mem::replace(&mut self.first_written, true) {
            self.engine_trail.note(at, || EngineFact::FirstWrite);
            let engine = at.since(self.body_read) + self.prefill_time;
            let client = (at + to_client).since(self.sent);
            self.added = Some(client - engine);
        }
    }

    fn token_seen(&mut self, at: Time) {
        match self.last_token {
            None => self.first_token = Some(at),
            Some(last) => self.gaps.push(at.since(last)),
        }
        self.last_token = Some(at);
    }

    /// The engine has written all of its answer at `at`.
    pub(super) fn answered(&mut self, at: Time, to_gateway: Dur, to_client: Dur) {
        if !self.plan.streaming {
            self.first_byte(at, to_client);
            self.chunks = 1;
            self.token_seen(at + to_client);
            self.head(at + to_gateway);
        }
        self.note_head();
        self.engine_trail.note(at, || EngineFact::LastWrite);
        std::mem::take(&mut self.engine_trail).finish(at);
    }

    /// The gateway has passed the whole answer on at `at`.
    pub(super) fn gateway_end(&mut self, at: Time, reason: FinishReason, model: Arc<str>) {
        let (input, output) = (self.plan.prompt_tokens, self.output_tokens);
        let (chunks, bytes) = (self.chunks, u64::from(output) * shared::tokens::BYTES_PER_TOKEN as u64);
        let attempt = self.attempt;
        let trail = std::mem::take(&mut self.trail);
        trail.note(at, || GatewayFact::ResponseModel(model));
        trail.note(at, || GatewayFact::Usage { input, output });
        trail.note(at, || GatewayFact::FinishReason(reason.as_str()));
        trail.note(at, || GatewayFact::AttemptEnded { attempt, failure: None });
        trail.note(at, || GatewayFact::Streamed { chunks, bytes, complete: true });
        self.over(trail, at, End::answered(200));
    }

    /// The gateway has passed a refusal of the engine on at `at`.
    pub(super) fn gateway_refusal(&mut self, at: Time, status: u16) {
        let attempt = self.attempt;
        let trail = std::mem::take(&mut self.trail);
        trail.note(at, || GatewayFact::ResponseHead { status });
        trail.note(at, || GatewayFact::AttemptEnded { attempt, failure: None });
        trail.note(at, || GatewayFact::Streamed { chunks: 1, bytes: 0, complete: true });
        self.over(trail, at, End::answered(status));
    }

    /// The gateway gives up at `at`: `status` is what the client sees of it, 200 if an answer has begun.
    pub(super) fn gateway_failure(&mut self, at: Time, status: u16, failure: Failure) {
        let chunks = self.chunks;
        let trail = std::mem::take(&mut self.trail);
        if self.began(at) {
            trail.note(at, || GatewayFact::Streamed { chunks, bytes: 0, complete: false });
        }
        self.over(trail, at, End { failure: Some(failure), ..End::answered(status) });
    }

    /// Whether the gateway has had the head of an answer by `at`: an engine that took a stream in sends it at once.
    pub(super) fn began(&self, at: Time) -> bool {
        self.plan.streaming && self.taken.is_some_and(|taken| taken < at)
    }

    /// The gateway knows at `at` that the current attempt comes to nothing, or to nothing more.
    pub(super) fn attempt_failed(&mut self, at: Time, failure: Failure) {
        if self.began(at) {
            self.note_head();
        }
        let attempt = self.attempt;
        self.trail.note(at, || GatewayFact::AttemptEnded { attempt, failure: Some(failure) });
    }

    /// The gateway has passed on a stream that ends with an error event: it reads no events, so that it is as good as any.
    pub(super) fn gateway_error_event(&mut self, at: Time) {
        self.note_head();
        let (attempt, chunks) = (self.attempt, self.chunks + 1);
        let trail = std::mem::take(&mut self.trail);
        trail.note(at, || GatewayFact::AttemptEnded { attempt, failure: None });
        trail.note(at, || GatewayFact::Streamed { chunks, bytes: 0, complete: true });
        self.over(trail, at, End { event: true, ..End::answered(200) });
    }

    /// Forgets an attempt of which the client saw nothing.
    pub(super) fn start_over(&mut self) {
        (self.taken, self.head, self.chunks, self.first_written) = (None, None, 0, false);
        (self.output_tokens, self.cached_tokens, self.added) = (0, 0, None);
        (self.proxied, self.prefill_time) = (None, Dur::ZERO);
    }

    /// The row of a request that ended at `done`.
    pub(super) fn row(&self, done: Time, outcome: Outcome) -> RequestRow {
        let trace = self.started.as_ref().map(|s| &s.context);
        RequestRow {
            index: self.plan.index,
            tenant: self.plan.tenant,
            session: self.plan.session.map(|(s, turn)| (s.0, turn)),
            intended: self.plan.intended,
            sent: self.sent,
            first_token: self.first_token,
            done: Some(done),
            prompt_tokens: self.plan.prompt_tokens,
            output_tokens: self.output_tokens,
            cached_tokens: self.cached_tokens,
            endpoint: self.endpoint.as_ref().map(|(_, name)| Arc::clone(name)),
            attempts: self.attempts,
            outcome,
            dropped: self.dropped.map(Arc::from),
            trace_id: trace.map(|c| c.trace_id),
            sampled: trace.is_some_and(|c| c.sampled),
            added: self.added,
        }
    }
}
