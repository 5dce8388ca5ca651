//! What would have become of a request on the other endpoints: only a simulator can know.
//!
//! At the moment of a decision every endpoint's engine is copied, given the request, and run on with no later arrivals until the
//! request has its first token. Requests on their way to an engine are not in its copy. Looked at for sampled requests at the finest
//! detail only: a copy costs as much as the engine's KV cache is large.

use std::sync::Arc;

use engine_sim::core::engine::{Engine, Input, NewRequest, Output, RequestKey, prepare_prompt};
use engine_sim::core::sequence::SamplingParams;
use gateway::core::scheduler::explain::{EVERY_ENDPOINT, MAX_EXPLAINED};
use gateway::spans::{GatewayFact, Hindsight};
use shared::block_hash::ExtraKeys;
use shared::time::Time;
use shared::trace::Trail;

use super::cost;
use super::world::World;

/// The name of the request at a copy; no driver counts so far.
const KEY: RequestKey = RequestKey(u64::MAX);
/// Wake-ups of a copy after which its first token is not waited for any more.
const MOST_WAKE_UPS: u32 = 1_000_000;

impl World<'_> {
    /// Notes what would have become of the request in `slot`, which was sent to an endpoint at `at`. Its tokens are at hand.
    ///
    /// It is a look back at the first choice: nothing is noted of a retry, nor of a request that another engine prefills, whose time
    /// depends on more than one engine.
    pub(super) fn look_back(&mut self, slot: usize, at: Time) {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        let wanted = flight.trail.detail() >= EVERY_ENDPOINT && flight.attempts == 1;
        let Some((chosen, _)) = flight.endpoint.as_ref().filter(|_| wanted) else {
            return;
        };
        let available = self.pools.core(flight.pool).endpoints().iter().enumerate().filter(|(_, e)| e.is_available());
        let all = available.take(MAX_EXPLAINED).map(|(i, endpoint)| {
            let first = self.first_token(&self.machines[i].engine, slot, at);
            let ttft = first.map(|first| (first + self.engine_delay + self.client_delay).since(flight.sent));
            Hindsight { endpoint: Arc::clone(&endpoint.config.name), ttft, chosen: i == chosen.index() }
        });
        let all: Box<[Hindsight]> = all.collect();
        flight.trail.annotate(at, || GatewayFact::Hindsight(all));
    }

    /// When a copy of `engine` would hand over the first token of the request.
    fn first_token(&self, engine: &Engine, slot: usize, at: Time) -> Option<Time> {
        let flight = self.flights[slot].as_ref()?;
        let read = at + self.engine_delay;
        let ready = read + cost::process_inputs(flight.plan.prompt_tokens);
        let (config, mut engine) = (engine.config(), engine.fork());
        let adapter = config.adapter(&flight.model);
        let extra = adapter.as_ref().map_or_else(ExtraKeys::default, |(_, extra)| extra.clone());
        let lora = adapter.map(|(number, _)| number);
        let mut outputs = Vec::new();
        while let Some(next) = engine.next_wakeup().filter(|next| *next <= ready) {
            engine.advance(next, &mut outputs);
        }
        outputs.clear();
        let params =
            SamplingParams { max_tokens: flight.plan.output_tokens, ignore_eos: true, ..SamplingParams::default() };
        let prompt = prepare_prompt(&config.cache, &self.tokens, &extra);
        let (priority, content, trail) = (flight.engine_priority, flight.content, Trail::off());
        let arrival = read;
        let request = NewRequest { key: KEY, prompt, params, priority, arrival, content, lora, kv: None, trail };
        engine.handle(ready, Input::Add(Box::new(request)));
        until_first(&mut engine, &mut outputs)
    }
}

/// Runs `engine` on until the request has its first token, is refused or lost, or nothing happens any more.
fn until_first(engine: &mut Engine, outputs: &mut Vec<Output>) -> Option<Time> {
    for _ in 0..MOST_WAKE_UPS {
        let next = engine.next_wakeup()?;
        engine.advance(next, outputs);
        if let Some(output) = outputs.drain(..).find(|o| o.key() == KEY) {
            return match output {
                Output::Tokens { at, .. } => Some(at),
                Output::Finished { .. } | Output::Rejected { .. } | Output::Broken { .. } => None,
            };
        }
    }
    None
}
