//! Between the world and the gateway's core: what is told, what comes back, and when the core wants to be looked at.

use gateway::core::gateway::{Input, Output};
use shared::time::{Stopped, Time};

use super::cost::CostWatch;
use super::world::{Event, World};

impl World<'_> {
    /// Tells the core what happened where nothing is to be done about it.
    pub(super) fn tell(&mut self, input: Input) {
        self.gateway.handle(self.now, input, &mut Stopped(self.now), &mut self.decisions);
        debug_assert!(self.decisions.is_empty(), "an answer that nobody reads: {:?}", self.decisions);
        self.plan_gateway();
    }

    /// Asks the core at `at`; it has decided when `watch` says so.
    pub(super) fn ask(&mut self, at: Time, input: Input, watch: &mut CostWatch) {
        self.gateway.handle(at, input, watch, &mut self.decisions);
        self.plan_gateway();
    }

    /// The core wanted to be looked at now, unless it has been since.
    pub(super) fn gateway_due(&mut self) {
        if self.gateway_due.take_if(|due| *due <= self.now).is_none() {
            return;
        }
        let mut watch = CostWatch(self.now);
        self.gateway.advance(self.now, &mut watch, &mut self.decisions);
        self.plan_gateway();
        self.decide_all(watch.0, None);
    }

    fn plan_gateway(&mut self) {
        let Some(at) = self.gateway.next_wakeup() else { return };
        let at = at.max(self.now);
        if self.gateway_due.is_none_or(|due| at < due) {
            self.gateway_due = Some(at);
            self.push(at, Event::GatewayDue);
        }
    }

    /// Does what the core decided at `at`; `at_hand` is the request whose tokens are.
    pub(super) fn decide_all(&mut self, at: Time, mut at_hand: Option<usize>) {
        let mut decisions = std::mem::take(&mut self.decisions);
        let asked = at_hand;
        for output in decisions.drain(..) {
            let slot = output.key().0 as usize;
            let flight = self.flight(slot);
            flight.has_waited |= flight.attempts == 0 && asked != Some(slot);
            self.decide(slot, at, output);
            if matches!(output, Output::Dispatch { .. }) {
                if at_hand != Some(slot) {
                    self.fetch_tokens(slot);
                    at_hand = Some(slot);
                }
                self.look_back(slot, at);
                self.name_blocks(slot);
            }
        }
        self.decisions = decisions;
    }

    /// Writes the prompt of a request once more: nobody keeps it while it waits.
    pub(super) fn fetch_tokens(&mut self, slot: usize) {
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.clear();
        self.flight(slot).plan.tokens(&mut tokens);
        self.tokens = tokens;
    }
}
