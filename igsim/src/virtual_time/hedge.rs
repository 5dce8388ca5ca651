//! A second attempt beside one that has not answered, as the live gateway makes it (`gateway/src/server/proxy/hedge.rs`).
//!
//! A flight has one current attempt. Of two that are under way, the one that something happens to is brought forward; the other one
//! stands beside it.

use std::sync::Arc;

use engine_sim::core::engine::PreparedPrompt;
use engine_sim::core::facts::EngineFact;
use gateway::core::gateway::{Input as GatewayInput, Output as GatewayOutput, RequestKey as GatewayKey};
use gateway::core::pool::EndpointId;
use gateway::spans::{Failure, GatewayFact};
use shared::time::Time;
use shared::trace::Trail;

use super::cost::CostWatch;
use super::event::Event;
use super::flight::{Flight, Leg};
use super::loss::Limit;
use super::world::World;

/// An attempt beside the current one: what each has of its own.
#[derive(Default)]
pub(super) struct Beside {
    leg: Leg,
    attempt: u32,
    endpoint: Option<(EndpointId, Arc<str>)>,
    taken: Option<Time>,
    engine_trail: Trail<EngineFact>,
    prompt: Option<PreparedPrompt>,
    body_read: Time,
    output_tokens: u32,
    cached_tokens: u32,
}

impl Flight {
    /// Puts what each attempt has of its own in the place of `other`'s.
    fn exchange(&mut self, other: &mut Beside) {
        std::mem::swap(&mut self.leg, &mut other.leg);
        std::mem::swap(&mut self.attempt, &mut other.attempt);
        std::mem::swap(&mut self.endpoint, &mut other.endpoint);
        std::mem::swap(&mut self.taken, &mut other.taken);
        std::mem::swap(&mut self.engine_trail, &mut other.engine_trail);
        std::mem::swap(&mut self.prompt, &mut other.prompt);
        std::mem::swap(&mut self.body_read, &mut other.body_read);
        std::mem::swap(&mut self.output_tokens, &mut other.output_tokens);
        std::mem::swap(&mut self.cached_tokens, &mut other.cached_tokens);
    }

    /// The current attempt goes on beside the next one.
    fn set_aside(&mut self) {
        let mut beside = Box::<Beside>::default();
        self.exchange(&mut beside);
        self.beside = Some(beside);
    }

    /// The attempt beside the current one takes its place.
    pub(super) fn take_beside(&mut self) {
        if let Some(mut beside) = self.beside.take() {
            self.exchange(&mut beside);
        }
    }

    /// Whether an answer has begun, at the engine at least.
    fn is_answering(&self) -> bool {
        self.first_written || self.plan.streaming && self.taken.is_some()
    }
}

impl Event {
    /// The attempt that it says something of.
    pub(super) const fn answer(&self) -> Option<Leg> {
        match self {
            Event::AtSidecar(leg)
            | Event::AtEngine(leg)
            | Event::InputsReady(leg)
            | Event::FirstChunk(leg)
            | Event::Head(leg)
            | Event::Answered { leg, .. }
            | Event::Refused { leg, .. }
            | Event::Lost { leg, .. }
            | Event::Overdue { limit: Limit::Head(leg), .. } => Some(*leg),
            Event::Send(_)
            | Event::AtGateway(_)
            | Event::Prefill(..)
            | Event::PrefillAgain(_)
            | Event::LeftBy(..)
            | Event::Heard { .. }
            | Event::Step { .. }
            | Event::Membership(..)
            | Event::Scrape(_)
            | Event::Scraped(..)
            | Event::KvEvents(..)
            | Event::GatewayDue(_)
            | Event::HedgeDue(_)
            | Event::Overdue { limit: Limit::Total(_), .. }
            | Event::Kept(_)
            | Event::Done { .. } => None,
        }
    }
}

impl World<'_> {
    /// Makes the attempt the current one of its request, if it is the one beside it.
    pub(super) fn bring_forward(&mut self, leg: Leg) {
        let Some(flight) = self.flights.get_mut(leg.slot).and_then(Option::as_mut) else { return };
        if let Some(mut beside) = flight.beside.take_if(|beside| beside.leg == leg) {
            flight.exchange(&mut beside);
            flight.beside = Some(beside);
        }
    }

    /// The current attempt has not answered for some time.
    pub(super) fn hedge(&mut self, slot: usize) {
        let flight = self.flight(slot);
        if flight.beside.is_some() || flight.is_answering() {
            return;
        }
        let (now, key) = (self.now, GatewayKey(slot as u64));
        let mut watch = CostWatch(now);
        self.ask(now, GatewayInput::Late { key }, &mut watch);
        if matches!(self.decisions.last(), Some(GatewayOutput::Dispatch { .. })) {
            self.flight(slot).set_aside();
            self.decide_all(watch.0, None);
        } else {
            self.decisions.clear();
        }
    }

    /// The answer of the current attempt is at the gateway at `at`: another one is cancelled.
    pub(super) fn settle_race(&mut self, slot: usize, at: Time) {
        self.leave_beside(slot, at, Failure::Outrun);
    }

    /// The gateway closes the connection of the attempt beside the current one at `at`; the engine notices one delay later.
    pub(super) fn leave_beside(&mut self, slot: usize, at: Time, failure: Failure) {
        let flight = self.flight(slot);
        let Some(beside) = flight.beside.take() else { return };
        let Beside { leg, attempt, endpoint, engine_trail, .. } = *beside;
        flight.trail.note(at, || GatewayFact::AttemptEnded { attempt, failure: Some(failure) });
        self.losses.keep(leg.key(), engine_trail);
        if let Some((endpoint, _)) = endpoint {
            self.push(at + self.engine_delay, Event::LeftBy(endpoint.index(), leg.key()));
        }
    }
}
