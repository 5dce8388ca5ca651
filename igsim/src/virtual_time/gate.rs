//! Between the world and the gateway's cores, one for each pool: what is told, what comes back, and when the core wants to be looked at.

use gateway::core::gateway::{EndpointChange, Input, Output, RequestKey};
use gateway::core::pools::PoolId;
use shared::time::{Stopped, Time};

use super::cost::CostWatch;
use super::event::Event;
use super::world::World;

impl World<'_> {
    /// Tells the core that is concerned what happened where nothing is to be done about it.
    pub(super) fn tell(&mut self, input: Input) {
        let pool = self.pool_of(&input);
        self.pools.core_mut(pool).handle(self.now, input, &mut Stopped(self.now), &mut self.decisions);
        debug_assert!(self.decisions.is_empty(), "an answer that nobody reads: {:?}", self.decisions);
        self.plan_gateway(pool);
    }

    /// Asks the core that is concerned at `at`; it has decided when `watch` says so.
    pub(super) fn ask(&mut self, at: Time, input: Input, watch: &mut CostWatch) {
        let pool = self.pool_of(&input);
        self.pools.core_mut(pool).handle(at, input, watch, &mut self.decisions);
        self.plan_gateway(pool);
    }

    /// The pool that an input is for.
    fn pool_of(&self, input: &Input) -> PoolId {
        let of_request = |key: &RequestKey| {
            let flight = self.flights.get(key.0 as usize).and_then(Option::as_ref);
            flight.expect("an input names an open request").pool
        };
        match input {
            Input::Request(info) => of_request(&info.key),
            Input::AttemptFailed { key, .. }
            | Input::Late { key }
            | Input::ResponseStarted { key, .. }
            | Input::FirstChunk { key, .. }
            | Input::Finished { key, .. }
            | Input::GivenUp { key, .. }
            | Input::Used { key, .. }
            | Input::Cancelled(key) => of_request(key),
            Input::Metrics { endpoint, .. } => self.pools.of_engine(endpoint.index()),
            Input::Endpoint(change) => match change {
                EndpointChange::Draining(id)
                | EndpointChange::Restarted(id)
                | EndpointChange::Models(id, _)
                | EndpointChange::Adapters(id, _) => self.pools.of_engine(id.index()),
                EndpointChange::Added(_) => PoolId::default(),
            },
            Input::ShutDown => PoolId::default(),
        }
    }

    /// The core wanted to be looked at now, unless it has been since.
    pub(super) fn gateway_due(&mut self, pool: PoolId) {
        if self.pools.due(pool).take_if(|due| *due <= self.now).is_none() {
            return;
        }
        let mut watch = CostWatch(self.now);
        self.pools.core_mut(pool).advance(self.now, &mut watch, &mut self.decisions);
        self.plan_gateway(pool);
        self.decide_all(watch.0, None);
    }

    fn plan_gateway(&mut self, pool: PoolId) {
        let Some(at) = self.pools.core(pool).next_wakeup() else { return };
        let at = at.max(self.now);
        let due = self.pools.due(pool);
        if due.is_none_or(|due| at < due) {
            *due = Some(at);
            self.push(at, Event::GatewayDue(pool));
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
