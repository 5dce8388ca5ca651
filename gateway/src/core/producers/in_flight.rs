//! `inflight-load-producer`: requests and tokens that were sent to an endpoint and are still to be computed there.
//!
//! A request counts with the tokens of its prompt that are not cached where it goes, and with an estimate of its output if that is
//! configured. At its first chunk the prefill is over: the prefill endpoint is free of it, and without an estimate of the output
//! the tokens of the other are too. At its end everything is.

use crate::core::config::InFlightConfig;
use crate::core::pool::{EndpointId, Pool};
use crate::core::scheduler::{Candidate, Decision, View};

/// The producer's configuration; the counts are the endpoints'.
#[derive(Debug)]
pub(crate) struct InFlight {
    config: InFlightConfig,
}

/// Where a request is, and what it counts for there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) endpoint: EndpointId,
    tokens: u64,
    /// The endpoint that prefills it, until that is over.
    prefilling: Option<(EndpointId, u64)>,
    /// The endpoint that was chosen to prefill it.
    pub(crate) prefill: Option<EndpointId>,
}

impl InFlight {
    pub(crate) const fn new(config: InFlightConfig) -> InFlight {
        InFlight { config }
    }

    /// Output tokens that a prompt is expected to bring: prompt * ratio, at most what the caller and the operator allow; 0 if they
    /// are not counted.
    pub(crate) fn output_tokens(&self, prompt_tokens: u32, asked: Option<u32>) -> u32 {
        if !self.config.add_estimated_output_tokens {
            return 0;
        }
        let estimate = (f64::from(prompt_tokens) * self.config.output_ratio).round() as u32;
        estimate.min(asked.unwrap_or(u32::MAX)).min(self.config.max_estimated_output_tokens.unwrap_or(u32::MAX))
    }

    /// Counts a request where it is sent.
    pub(crate) fn place(pool: &mut Pool, decision: &Decision, cost: impl Fn(&Candidate) -> u64) -> Placed {
        let mut count = |candidate: &Candidate| {
            let tokens = cost(candidate);
            let endpoint = pool.get_mut(candidate.id);
            endpoint.in_flight += 1;
            endpoint.in_flight_tokens += tokens;
            tokens
        };
        let tokens = count(&decision.endpoint);
        let prefilling = decision.prefill.as_ref().map(|p| (p.id, count(p)));
        let prefill = decision.prefill.map(|p| p.id);
        Placed { endpoint: decision.endpoint.id, tokens, prefilling, prefill }
    }

    /// What a request counts for at a candidate.
    pub(crate) fn cost(view: &View<'_>, candidate: &Candidate) -> u64 {
        view.uncached_tokens(candidate.matched_blocks) + u64::from(view.output_tokens)
    }

    /// The first chunk of the response came.
    pub(crate) fn first_chunk(&self, pool: &mut Pool, placed: &mut Placed) {
        if let Some((endpoint, tokens)) = placed.prefilling.take() {
            leave(pool, endpoint, tokens);
        }
        if !self.config.add_estimated_output_tokens {
            let tokens = std::mem::take(&mut placed.tokens);
            uncount(pool, placed.endpoint, tokens);
        }
    }

    /// The request is over, or goes elsewhere.
    pub(crate) fn leave(pool: &mut Pool, placed: Placed) {
        leave(pool, placed.endpoint, placed.tokens);
        if let Some((endpoint, tokens)) = placed.prefilling {
            leave(pool, endpoint, tokens);
        }
    }
}

fn leave(pool: &mut Pool, id: EndpointId, tokens: u64) {
    uncount(pool, id, tokens);
    let in_flight = &mut pool.get_mut(id).in_flight;
    *in_flight = in_flight.checked_sub(1).expect("a request leaves an endpoint once");
}

fn uncount(pool: &mut Pool, id: EndpointId, tokens: u64) {
    let in_flight = &mut pool.get_mut(id).in_flight_tokens;
    *in_flight = in_flight.checked_sub(tokens).expect("tokens leave an endpoint once");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::EndpointConfig;
    use crate::core::scheduler::testing::{candidate, view};

    fn decision(endpoint: u32, prefill: Option<u32>) -> Decision {
        let prefill = prefill.map(candidate);
        Decision { endpoint: candidate(endpoint), prefill, cold: false, session_present: false }
    }

    fn counts(pool: &Pool) -> Vec<(u32, u64)> {
        pool.endpoints().iter().map(|e| (e.in_flight, e.in_flight_tokens)).collect()
    }

    fn lives(add: bool, prefill: Option<u32>) -> [Vec<(u32, u64)>; 3] {
        let config = InFlightConfig { add_estimated_output_tokens: add, ..InFlightConfig::default() };
        let in_flight = InFlight::new(config);
        let mut pool = Pool::new((0..2).map(|_| EndpointConfig::new("e", "h", 1)).collect());
        let empty = Pool::default();
        let view = View { prompt_tokens: 100, output_tokens: in_flight.output_tokens(100, Some(60)), ..view(&empty) };
        let mut placed = InFlight::place(&mut pool, &decision(0, prefill), |c| InFlight::cost(&view, c));
        let sent = counts(&pool);
        in_flight.first_chunk(&mut pool, &mut placed);
        let started = counts(&pool);
        InFlight::leave(&mut pool, placed);
        [sent, started, counts(&pool)]
    }

    #[test]
    fn tokens_are_in_flight_until_the_prefill_is_over() {
        let none = || vec![(0, 0), (0, 0)];
        assert_eq!(lives(false, None), [vec![(1, 100), (0, 0)], vec![(1, 0), (0, 0)], none()]);
        assert_eq!(lives(false, Some(1)), [vec![(1, 100), (1, 100)], vec![(1, 0), (0, 0)], none()]);
    }

    #[test]
    fn an_estimate_of_the_output_stays_until_the_end() {
        let none = || vec![(0, 0), (0, 0)];
        assert_eq!(lives(true, None), [vec![(1, 160), (0, 0)], vec![(1, 160), (0, 0)], none()]);
        assert_eq!(lives(true, Some(1)), [vec![(1, 160), (1, 160)], vec![(1, 160), (0, 0)], none()]);
    }

    #[test]
    fn the_output_is_estimated_within_bounds() {
        let check = |ratio, most, asked, expect| {
            let config = InFlightConfig {
                add_estimated_output_tokens: true,
                output_ratio: ratio,
                max_estimated_output_tokens: most,
            };
            assert_eq!(InFlight::new(config).output_tokens(100, asked), expect);
        };
        check(1.5, None, None, 150);
        check(1.5, None, Some(20), 20);
        check(1.5, Some(30), None, 30);
        check(0.0, None, None, 0);
        assert_eq!(InFlight::new(InFlightConfig::default()).output_tokens(100, None), 0);
    }
}
