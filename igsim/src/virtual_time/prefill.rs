//! A sidecar's call to the engine that prefills, in virtual time: from its sending to its end at the sidecar.

use std::sync::Arc;

use engine_sim::core::engine::{Input as EngineInput, Output as EngineOutput};
use engine_sim::core::facts::EngineFact;
use engine_sim::core::faults::{Down, Lost, RequestFault, http_error_type};
use engine_sim::core::kv_transfer::{Kept, KvAsk, RemoteBlocks};
use engine_sim::core::sequence::FinishReason;
use gateway::pd_proxy::core::{Failure, Leg as Side, PrefillEnd, Target};
use shared::time::Time;
use shared::trace::Trail;
use shared::trace::context::TraceContext;

use super::cost;
use super::engines::Asks;
use super::event::Event;
use super::flight::Leg;
use super::world::World;
use crate::scenario::Api;

/// A call that is under way.
pub(super) struct Prefill {
    /// Its name at the engine.
    call: Leg,
    engine: usize,
    context: Option<TraceContext>,
    trail: Trail<EngineFact>,
    body_read: Time,
}

/// What happens to a call.
pub(super) enum PrefillEvent {
    /// The engine's front end has it.
    AtEngine,
    /// Its prompt is tokens.
    InputsReady,
    /// It is over, and the sidecar knows; and where the cache is.
    Ended(PrefillEnd, Option<Arc<RemoteBlocks>>),
    /// Its time limit is reached.
    Overdue,
}

impl World<'_> {
    /// Whether the call is under way.
    pub(super) fn is_prefill(&self, call: Leg) -> bool {
        self.under_way(call).is_some()
    }

    fn under_way(&self, call: Leg) -> Option<&Prefill> {
        let proxied = self.flights.get(call.slot)?.as_ref()?.proxied.as_ref()?;
        proxied.prefill.as_ref().filter(|prefill| prefill.call == call)
    }

    /// The sidecar asks the engine at `target` to prefill.
    pub(super) fn call_prefill(&mut self, slot: usize, at: Time, target: &Target, attempt: u32) {
        let found = (0..self.machines.len()).find(|e| *self.pools.endpoint(*e).address == *target.host);
        let engine = found.expect("the gateway names engines that it knows");
        let call = self.losses.next_leg(slot);
        let at = at + cost::edit_body(self.flight(slot).body_bytes);
        let proxied = self.proxied(slot);
        proxied.dance.call_started(at, Side::Prefill, attempt, &target.host, target.port);
        let context = proxied.context(Side::Prefill, attempt);
        proxied.prefill = Some(Prefill { call, engine, context, trail: Trail::off(), body_read: at });
        self.push(at + self.sidecars.remote, Event::Prefill(call, PrefillEvent::AtEngine));
        if let Some(limit) = self.prefill_limit(slot) {
            self.push(at + limit, Event::Prefill(call, PrefillEvent::Overdue));
        }
    }

    /// Something happens to a call that is under way.
    pub(super) fn prefill(&mut self, call: Leg, event: PrefillEvent) {
        match event {
            PrefillEvent::AtEngine => self.prefill_at_engine(call),
            PrefillEvent::InputsReady => self.prefill_inputs_ready(call),
            PrefillEvent::Ended(end, remote) => self.prefill_ended(call, end, remote),
            PrefillEvent::Overdue => {
                let prefill = self.proxied(call.slot).prefill.take().expect("it is under way");
                self.leave_prefill(prefill, self.now);
                self.sidecar_knows(call.slot, PrefillEnd::Failed(Failure::Timeout));
            }
        }
    }

    fn prefill_at_engine(&mut self, call: Leg) {
        let (slot, now) = (call.slot, self.now);
        let prefill = self.proxied(slot).prefill.as_ref().expect("it is under way");
        let (engine, context) = (prefill.engine, prefill.context.clone());
        if self.machines[engine].engine.down().is_some() {
            return self.tell_sidecar(call, now, PrefillEnd::Failed(Failure::Connect), None);
        }
        let (trail, ready) = self.front_end(slot, engine, context, 1, true);
        let prefill = self.proxied(slot).prefill.as_mut().expect("it is under way");
        (prefill.trail, prefill.body_read) = (trail, now);
        self.push(ready, Event::Prefill(call, PrefillEvent::InputsReady));
    }

    fn prefill_inputs_ready(&mut self, call: Leg) {
        let (slot, now) = (call.slot, self.now);
        let prefill = self.proxied(slot).prefill.as_ref().expect("it is under way");
        let (engine, trail, arrival) = (prefill.engine, prefill.trail.clone(), prefill.body_read);
        if let Some(fault @ RequestFault::Status(status)) =
            self.machines[engine].engine.request_fault(now, call.key(), None)
        {
            trail.note(now, || EngineFact::Fault(fault.kind()));
            trail.note(now, || EngineFact::Failed { error_type: http_error_type(status), http_status: status });
            trail.finish(now);
            return self.tell_sidecar(call, now, PrefillEnd::Status(status), None);
        }
        let kind = if self.scenario.workload.api == Api::Chat { "chatcmpl" } else { "cmpl" };
        // vLLM's internal name: the request's id and eight hex digits.
        let kept_as = format!("{kind}-{}-{:08x}", self.flight(slot).id, call.serial);
        let prompt = self.prepared(slot, engine);
        let asks = Asks { max_tokens: 1, arrival, kv: Some(KvAsk::Keep(kept_as.into())), trail };
        let request = self.new_request(slot, engine, call, prompt, asks);
        self.machines[engine].engine.handle(now, EngineInput::Add(Box::new(request)));
        self.wake(engine);
    }

    /// What the engine hands over for a call.
    pub(super) fn prefill_output(&mut self, call: Leg, output: &EngineOutput) {
        let at = output.at();
        let prefill = self.proxied(call.slot).prefill.as_mut().expect("it is under way");
        let engine = prefill.engine;
        if !output.is_last() {
            return;
        }
        let (trail, took) = (std::mem::take(&mut prefill.trail), at.since(prefill.body_read));
        let failed = |status: u16| {
            let error_type = http_error_type(status);
            trail.note(at, || EngineFact::Failed { error_type, http_status: status });
            PrefillEnd::Status(status)
        };
        let (end, remote) = match output {
            EngineOutput::Tokens { .. } => return,
            EngineOutput::Finished { reason: FinishReason::Error, .. } => (failed(500), None),
            EngineOutput::Finished { kept, .. } => {
                trail.note(at, || EngineFact::FirstWrite);
                trail.note(at, || EngineFact::LastWrite);
                let remote = kept.as_deref().map(|kept| self.peers.remote(engine, kept));
                (PrefillEnd::Answered { params: remote.is_some() }, remote)
            }
            EngineOutput::Rejected { reason, .. } => (failed(reason.http_status()), None),
            EngineOutput::Broken { lost: Lost::Down(Down::Core), .. } => (PrefillEnd::Status(500), None),
            EngineOutput::Broken { lost: Lost::Down(Down::Process) | Lost::Cut, .. } => {
                (PrefillEnd::Failed(Failure::Reset), None)
            }
        };
        trail.finish(at);
        let flight = self.flight(call.slot);
        if let (Some(candidate), EngineOutput::Finished { stats, .. }) = (&mut flight.candidate, output) {
            candidate.preempted |= stats.preemptions > 0;
        }
        flight.prefill_time += took;
        self.tell_sidecar(call, at, end, remote);
    }

    /// The sidecar learns one way later how a call ended at `at`.
    fn tell_sidecar(&mut self, call: Leg, at: Time, end: PrefillEnd, remote: Option<Arc<RemoteBlocks>>) {
        self.push(at + self.sidecars.remote, Event::Prefill(call, PrefillEvent::Ended(end, remote)));
    }

    fn prefill_ended(&mut self, call: Leg, end: PrefillEnd, remote: Option<Arc<RemoteBlocks>>) {
        let proxied = self.proxied(call.slot);
        proxied.prefill = None;
        proxied.remote = remote;
        self.sidecar_knows(call.slot, end);
    }

    fn sidecar_knows(&mut self, slot: usize, end: PrefillEnd) {
        let now = self.now;
        let proxied = self.proxied(slot);
        let (status, failure) = match end {
            PrefillEnd::Answered { .. } => (Some(200), None),
            PrefillEnd::Status(status) => (Some(status), None),
            PrefillEnd::Failed(failure) => (None, Some(failure)),
        };
        if let Some(status) = status {
            proxied.answered = status;
            proxied.dance.call_head(now, status);
        }
        proxied.dance.call_ended(now, failure);
        let step = proxied.dance.prefill_ended(now, end);
        let leg = self.flight(slot).leg;
        self.dance_on(leg, now, step);
    }

    /// The sidecar closes the connection of a call at `at`; the engine notices one way later.
    pub(super) fn leave_prefill(&mut self, prefill: Prefill, at: Time) {
        self.losses.keep(prefill.call.key(), prefill.trail);
        self.push(at + self.sidecars.remote, Event::LeftBy(prefill.engine, prefill.call.key()));
    }
}

/// The parameters by which another engine finds what one has kept.
impl super::peers::PeerNetwork {
    fn remote(&self, engine: usize, kept: &Kept) -> Arc<RemoteBlocks> {
        let blocks = u32::try_from(kept.blocks.len()).unwrap_or(u32::MAX);
        Arc::new(RemoteBlocks { peer: self.peer(engine), request: Arc::clone(&kept.request), blocks })
    }
}
