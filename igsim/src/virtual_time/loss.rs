//! Attempts that come to nothing: an engine that is not there, goes down, breaks a connection or takes too long, and what the gateway
//! makes of it. It does what the live gateway does (`gateway/src/server/proxy.rs`).

use std::collections::BTreeMap;

use engine_sim::core::engine::{Input as EngineInput, Output as EngineOutput, RequestKey as EngineKey};
use engine_sim::core::facts::EngineFact;
use engine_sim::core::faults::{Down, Lost, RequestFault, http_error_type};
use gateway::core::gateway::{Input as GatewayInput, Output as GatewayOutput, RequestKey as GatewayKey};
use gateway::pd_proxy::core::Failure as PdFailure;
use gateway::spans::Failure as Broke;
use shared::time::{Dur, Time};
use shared::trace::Trail;

use super::cost::CostWatch;
use super::event::Event;
use super::flight::Leg;
use super::world::World;
use crate::report::{Failure, Outcome};
use crate::scenario::Scenario;

/// What the gateway sees of an attempt that was lost.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loss {
    /// Nobody listens.
    Refused,
    /// The connection broke.
    Reset,
    /// The stream ends with an error event, as a stream whose engine has died does.
    ErrorEvent,
}

/// A time limit of the gateway.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    /// Until an attempt's answer begins.
    Head(Leg),
    /// Of the request with this number in the plan, all attempts together.
    Total(u64),
}

/// What has to be remembered where attempts can be lost.
pub(super) struct Losses {
    /// Time limits are only looked at where something can go wrong or wait: they cost an event each.
    limits: Option<(Dur, Dur)>,
    legs: u64,
    /// Records of attempts that the gateway gave up and the engine has not let go of yet.
    left: BTreeMap<EngineKey, Trail<EngineFact>>,
}

impl Losses {
    pub(super) fn of(scenario: &Scenario) -> Losses {
        let timeouts = &scenario.gateway.timeouts;
        let faulty = scenario.engines.iter().any(|group| !group.faults.is_empty());
        let pools = scenario.gateway.pool_configs();
        let waits = pools.iter().any(|c| c.flow_control.as_ref().is_some_and(|f| f.enabled));
        let limits = (faulty || waits).then(|| (timeouts.response_head.get(), timeouts.total.get()));
        Losses { limits, legs: 0, left: BTreeMap::new() }
    }

    /// Whether something can go wrong, so that time limits are looked at.
    pub(super) const fn watch(&self) -> bool {
        self.limits.is_some()
    }

    /// Keeps the record of an attempt that was given up until its engine lets go of it.
    pub(super) fn keep(&mut self, key: EngineKey, trail: Trail<EngineFact>) {
        if trail.is_on() {
            self.left.insert(key, trail);
        }
    }

    /// The next attempt of the request in `slot`.
    pub(super) fn next_leg(&mut self, slot: usize) -> Leg {
        self.legs += 1;
        Leg { slot, serial: self.legs }
    }
}

impl World<'_> {
    /// Whether the attempt is the one that its request is at.
    pub(super) fn is_current(&self, leg: Leg) -> bool {
        self.flights.get(leg.slot).and_then(Option::as_ref).is_some_and(|flight| flight.leg == leg)
    }

    /// The request in `slot` may take so long from now on.
    pub(super) fn limit_total(&mut self, slot: usize) {
        if let Some((_, total)) = self.losses.limits {
            let index = self.flight(slot).plan.index;
            self.push(self.now + total, Event::Overdue { slot, limit: Limit::Total(index) });
        }
    }

    /// The answer of an attempt that begins at `at` may take so long to begin.
    pub(super) fn limit_head(&mut self, leg: Leg, at: Time) {
        if let Some((head, _)) = self.losses.limits {
            self.push(at + head, Event::Overdue { slot: leg.slot, limit: Limit::Head(leg) });
        }
    }

    /// Whether nobody listens at the attempt's engine; the gateway learns it one delay later.
    pub(super) fn is_unreachable(&mut self, leg: Leg) -> bool {
        let engine = self.engine_of(leg.slot);
        let down = self.machines[engine].engine.down().is_some();
        if down && !self.sidecar_refuses(leg, self.now, PdFailure::Connect) {
            self.push(self.now + self.engine_delay, Event::Lost { leg, loss: Loss::Refused });
        }
        down
    }

    /// Whether a fault refuses the request before the engine's core has it.
    pub(super) fn is_struck(&mut self, leg: Leg) -> bool {
        let (engine, now) = (self.engine_of(leg.slot), self.now);
        match self.machines[engine].engine.request_fault(now, leg.key(), None) {
            Some(fault @ RequestFault::Status(status)) => {
                let trail = std::mem::take(&mut self.flight(leg.slot).engine_trail);
                trail.note(now, || EngineFact::Fault(fault.kind()));
                trail.note(now, || EngineFact::Failed { error_type: http_error_type(status), http_status: status });
                trail.finish(now);
                self.sidecar_done(leg.slot, now, status);
                self.push(now + self.way(leg.slot), Event::Refused { leg, status });
                true
            }
            Some(RequestFault::Cut { .. }) | None => false,
        }
    }

    /// The engine gave up a request at `at`.
    pub(super) fn broken(&mut self, leg: Leg, at: Time, lost: Lost) {
        let delay = self.way(leg.slot);
        let flight = self.flight(leg.slot);
        std::mem::take(&mut flight.engine_trail).finish(at);
        if !flight.began(at) {
            // It was lost before the head of an answer was written.
            flight.taken = None;
        }
        let event = match (lost, flight.began(at)) {
            (Lost::Down(Down::Core), true) => return self.error_event(leg, at),
            (Lost::Down(Down::Core), false) => {
                self.sidecar_done(leg.slot, at, 500);
                Event::Refused { leg, status: 500 }
            }
            (Lost::Down(Down::Process) | Lost::Cut, false) if self.sidecar_refuses(leg, at, PdFailure::Reset) => return,
            (Lost::Down(Down::Process) | Lost::Cut, _) => {
                self.sidecar_broken(leg.slot, at);
                Event::Lost { leg, loss: Loss::Reset }
            }
        };
        self.push(at + delay, event);
    }

    /// The engine could not load the request's cache from another one, and its policy is to fail.
    pub(super) fn load_failed(&mut self, leg: Leg, at: Time) {
        let delay = self.way(leg.slot);
        let flight = self.flight(leg.slot);
        let trail = std::mem::take(&mut flight.engine_trail);
        trail.note(at, || EngineFact::Failed { error_type: http_error_type(500), http_status: 500 });
        trail.finish(at);
        if flight.began(at) {
            return self.error_event(leg, at);
        }
        self.sidecar_done(leg.slot, at, 500);
        self.push(at + delay, Event::Refused { leg, status: 500 });
    }

    /// The engine ends a stream with an error event at `at`.
    fn error_event(&mut self, leg: Leg, at: Time) {
        self.sidecar_passes(leg.slot, at);
        self.sidecar_done(leg.slot, at, 200);
        self.push(at + self.way(leg.slot), Event::Lost { leg, loss: Loss::ErrorEvent });
    }

    /// The gateway learns that an attempt was lost.
    pub(super) fn lost(&mut self, slot: usize, loss: Loss) {
        let now = self.now;
        let flight = self.flight(slot);
        let begun = flight.began(now);
        match loss {
            Loss::Refused => self.try_again(slot, Broke::Connect),
            Loss::Reset if !begun => self.try_again(slot, Broke::Reset),
            Loss::Reset => self.give_up(slot, Broke::Reset),
            Loss::ErrorEvent => {
                flight.gateway_error_event(now);
                self.leave(slot);
                self.push(now + self.client_delay, Event::Done { slot, outcome: Outcome::Failed(Failure::Protocol) });
            }
        }
    }

    /// No byte of an answer came: the gateway asks its core for another engine.
    fn try_again(&mut self, slot: usize, failure: Broke) {
        let now = self.now;
        let endpoint = self.flight(slot).endpoint.clone().expect("the request was dispatched").0;
        let flight = self.flight(slot);
        flight.start_over();
        flight.attempt_failed(now, failure);
        let mut watch = CostWatch(now);
        self.ask(now, GatewayInput::AttemptFailed { key: GatewayKey(slot as u64), endpoint, failure }, &mut watch);
        if matches!(self.decisions.last(), Some(GatewayOutput::Stay { .. })) {
            self.decisions.clear();
            return self.flight(slot).take_beside();
        }
        if matches!(self.decisions.last(), Some(GatewayOutput::Reject { .. })) {
            self.decisions.clear();
            self.flight(slot).endpoint = None;
            return self.fail(slot, failure);
        }
        self.decide_all(watch.0, None);
    }

    /// Ends a request that its engine has or may have.
    fn give_up(&mut self, slot: usize, failure: Broke) {
        let now = self.now;
        self.abandon(slot);
        self.leave_beside(slot, now, failure);
        let flight = self.flight(slot);
        flight.attempt_failed(now, failure);
        let (endpoint, _) = flight.endpoint.clone().expect("the request was dispatched");
        self.tell(GatewayInput::GivenUp { key: GatewayKey(slot as u64), endpoint, failure });
        self.fail(slot, failure);
    }

    /// The answer of an attempt did not begin in time: it is made elsewhere where the configuration says so.
    fn late(&mut self, slot: usize) {
        if self.scenario.gateway.retry.on_timeout {
            self.abandon(slot);
            self.try_again(slot, Broke::Timeout);
        } else {
            self.give_up(slot, Broke::Timeout);
        }
    }

    /// Whether a refusal with this status is asked for elsewhere, and somebody else was found.
    pub(super) fn is_retried(&mut self, slot: usize, status: u16) -> bool {
        if !self.scenario.gateway.retry.on_status.contains(&status) {
            return false;
        }
        self.try_again(slot, Broke::Status(status));
        true
    }

    /// Ends a request that no engine has any more: with an error, or by breaking off an answer that has begun.
    fn fail(&mut self, slot: usize, failure: Broke) {
        let now = self.now;
        let flight = self.flight(slot);
        let status = match (flight.began(now), failure) {
            (true, _) => 200,
            (false, Broke::Timeout) => 504,
            (false, Broke::Status(status)) => {
                // The engine's own answer is passed on.
                flight.gateway_refusal(now, status);
                flight.leg = Leg::default();
                let outcome = Outcome::Failed(Failure::Status(status));
                return self.push(now + self.client_delay, Event::Done { slot, outcome });
            }
            (false, Broke::Connect | Broke::Reset | Broke::Outrun | Broke::Cancelled | Broke::Abandoned) => 502,
        };
        flight.gateway_failure(now, status, failure);
        flight.leg = Leg::default();
        let seen = if status == 200 { Failure::Disconnected } else { Failure::Status(status) };
        self.push(now + self.client_delay, Event::Done { slot, outcome: Outcome::Failed(seen) });
    }

    /// A time limit is reached, perhaps long after the request it was for ended.
    pub(super) fn overdue(&mut self, slot: usize, limit: Limit) {
        let Some(flight) = self.flights.get(slot).and_then(Option::as_ref) else { return };
        if flight.waits {
            let concerned = matches!(limit, Limit::Total(index) if flight.plan.index == index);
            if concerned {
                self.flight(slot).waits = false;
                self.tell(GatewayInput::Cancelled(GatewayKey(slot as u64)));
                self.fail(slot, Broke::Timeout);
            }
            return;
        }
        // The connection breaks with the answer: what the engine still does is for nobody.
        match limit {
            Limit::Head(leg) if flight.leg == leg && !flight.began(self.now) => self.late(slot),
            Limit::Total(index) if flight.plan.index == index && flight.leg != Leg::default() => {
                self.give_up(slot, Broke::Timeout);
            }
            Limit::Head(_) | Limit::Total(_) => {}
        }
    }

    /// The gateway closes the connection of the current attempt; the engine notices one delay later.
    fn abandon(&mut self, slot: usize) {
        let Some(further) = self.leave_sidecar(slot) else { return };
        let engine = self.engine_of(slot);
        let flight = self.flight(slot);
        let key = flight.leg.key();
        let trail = std::mem::take(&mut flight.engine_trail);
        self.losses.keep(key, trail);
        self.push(self.now + self.engine_delay + further, Event::LeftBy(engine, key));
    }

    /// The engine notices that a caller is gone.
    pub(super) fn left_by(&mut self, engine: usize, key: EngineKey) {
        self.machines[engine].engine.handle(self.now, EngineInput::Abort(key));
        self.wake(engine);
    }

    /// What an engine hands over for an attempt that was given up.
    pub(super) fn left_behind(&mut self, output: &EngineOutput) {
        if output.is_last()
            && let Some(trail) = self.losses.left.remove(&output.key())
        {
            trail.finish(output.at());
        }
    }

    pub(super) fn engine_of(&self, slot: usize) -> usize {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        flight.endpoint.as_ref().expect("the request was dispatched").0.index()
    }
}
