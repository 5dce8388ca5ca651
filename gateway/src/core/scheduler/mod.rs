//! Choosing an endpoint: filters, scorers and a picker over a snapshot of candidates, run once or twice by a profile handler.
//!
//! A plugin is a pure function of the snapshot (and of a random stream, where llm-d rolls dice) behind a one-method trait; it sees
//! neither sockets nor other requests. What outlives a request is kept by the producers beside the director.

pub mod deciders;
pub mod explain;
pub mod filters;
mod handlers;
pub mod parameters;
pub mod pickers;
pub(crate) mod precise;
mod profile;
pub mod registry;
pub mod scorers;

use shared::rng::Stream;
use shared::time::Time;

pub use crate::core::scheduler::profile::Choice;

pub(crate) use crate::core::scheduler::handlers::Decision;
pub(crate) use crate::core::scheduler::profile::{Room, Run};

use crate::core::config::GatewayConfig;
use crate::core::kv_index::Match;
use crate::core::pool::{AdapterState, EndpointId, Pool, Role};
use crate::core::scheduler::handlers::Handler;
use crate::core::scheduler::registry::Reads;

/// What is known of one endpoint when a request is scheduled. Without metrics the loads are 0, as in llm-d.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The endpoint.
    pub id: EndpointId,
    /// Requests in its queue.
    pub waiting: u32,
    /// Requests in its batch.
    pub running: u32,
    /// Leading blocks of the prompt that it was sent before.
    pub matched_blocks: u32,
    /// What of the prompt it holds by its own word.
    pub kv: Match,
    /// Used part of its KV cache, 0 to 1.
    pub kv_usage: f64,
    /// Tokens of the requests sent to it that it still has to compute, as the gateway estimates them.
    pub in_flight_tokens: u64,
    /// Requests sent to it and not finished.
    pub in_flight: u32,
    /// Its place among the endpoints that were sent requests without a cached prefix, 0 is the longest ago; `None` is never.
    pub cold_position: Option<u32>,
    /// What it is for.
    pub role: Role,
    /// How it stands to the adapter asked for.
    pub adapter: AdapterState,
    /// Whether it may get new requests.
    pub available: bool,
    /// Whether the request's session is bound to it.
    pub had_session: bool,
}

/// What a latency predictor says of one endpoint and the request, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Time to first token.
    pub ttft_ms: f64,
    /// What the objective for the time to first token leaves, negative if it will be missed.
    pub ttft_headroom_ms: f64,
    /// What the objective for the time per output token leaves, negative if it will be missed.
    pub tpot_headroom_ms: f64,
    /// Requests that the predictor has seen dispatched and not finished.
    pub dispatched: u32,
}

/// What plugins see besides the candidates.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Configuration of the endpoints.
    pub pool: &'a Pool,
    /// The model asked for.
    pub model: &'a str,
    /// Length of the prompt in tokens.
    pub prompt_tokens: u32,
    /// Blocks of the prompt that the prefix index may know.
    pub prefix_blocks: u32,
    /// Tokens in such a block.
    pub block_tokens: u32,
    /// Blocks of the prompt that the index of KV events may know.
    pub kv_blocks: u32,
    /// Tokens in such a block.
    pub kv_block_tokens: u32,
    /// Output tokens that are counted as in flight with the request; 0 unless the in-flight producer estimates them.
    pub output_tokens: u32,
    /// Addresses that the caller allows (`test-epp-endpoint-selection`).
    pub selection: Option<&'a str>,
    /// Predictions by endpoint id; empty where no predictor runs.
    pub predictions: &'a [Option<Prediction>],
}

impl View<'_> {
    /// Tokens of the prompt that an endpoint with so many matched blocks has to compute: what of the indexed blocks is not matched,
    /// and what lies beyond them (llm-d's `inflight-load-producer`).
    pub fn uncached_tokens(&self, matched_blocks: u32) -> u64 {
        let tokens = |blocks: u32| u64::from(blocks) * u64::from(self.block_tokens);
        let indexed = tokens(self.prefix_blocks);
        let beyond = u64::from(self.prompt_tokens).saturating_sub(indexed);
        indexed.saturating_sub(tokens(matched_blocks)) + beyond
    }

    /// Part of the prompt's blocks that is matched, 0 to 1; 0 for a prompt without a block.
    pub fn matched_share(&self, candidate: &Candidate) -> f64 {
        f64::from(candidate.matched_blocks) / f64::from(self.prefix_blocks.max(1))
    }

    /// What the predictor says of a candidate.
    pub fn prediction(&self, candidate: &Candidate) -> Option<&Prediction> {
        self.predictions.get(candidate.id.index())?.as_ref()
    }
}

/// Takes candidates out.
pub trait Filter: Send + Sync {
    /// Removes from `candidates` what must not be used, keeping the order; `random` decides where llm-d rolls dice.
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, random: &mut Stream);
}

/// Rates candidates.
pub trait Scorer: Send + Sync {
    /// Sets `scores[i]` for `candidates[i]`, 0 (worst) to 1 (best); what lies outside is clamped.
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]);
}

/// Chooses one of the candidates by their weighted scores.
pub trait Picker: Send + Sync {
    /// The chosen candidate's place in `scores`, which is not empty, and how many others were as good.
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked;
}

/// Says whether another endpoint does the prefill.
pub trait Decider: Send + Sync {
    /// The verdict on a request whose decode endpoint is `decode`.
    fn decide(&self, view: &View<'_>, decode: &Candidate) -> Verdict;
}

/// A picker's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Place of the chosen candidate.
    pub index: usize,
    /// Other candidates between which and this one only chance decided.
    pub ties: u32,
}

/// A decider's verdict, and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the prefill goes to another endpoint.
    pub disaggregate: bool,
    /// Why, in one word.
    pub reason: &'static str,
    /// Tokens that the decode endpoint would have to compute itself, where that was looked at.
    pub uncached_tokens: Option<u32>,
    /// From how many on it is worth while, where there is such a bound.
    pub threshold_tokens: Option<u32>,
}

/// The most endpoints that are recorded with their scores.
pub const MAX_TOP: usize = 5;

/// The profile handler and room for the work of its profiles.
#[derive(Debug)]
pub(crate) struct Scheduler {
    handler: Handler,
    /// The candidates of the next decision go into it; filters take from them.
    pub(crate) room: Room,
    reads: Reads,
}

impl Scheduler {
    /// A scheduler for a valid configuration; `random` breaks ties.
    pub(crate) fn new(config: &GatewayConfig, random: Stream) -> Scheduler {
        let handler = Handler::new(config);
        let reads = handler.reads();
        Scheduler { handler, room: Room::new(random), reads }
    }

    /// What some plugin reads.
    pub(crate) const fn reads(&self) -> Reads {
        self.reads
    }

    /// Chooses among the candidates in the room, starting at `at`; also returns when it was done.
    pub(crate) fn schedule(&mut self, at: Time, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        self.handler.schedule(at, &mut self.room, run)
    }
}

/// Candidates and views for the tables of plugin tests.
#[cfg(test)]
pub(crate) mod testing {
    use shared::rng::Seed;

    use super::*;

    pub(crate) fn candidate(id: u32) -> Candidate {
        Candidate {
            id: EndpointId(id),
            waiting: 0,
            running: 0,
            matched_blocks: 0,
            kv: Match::default(),
            kv_usage: 0.0,
            in_flight_tokens: 0,
            in_flight: 0,
            cold_position: None,
            role: Role::Unlabelled,
            adapter: AdapterState::Full,
            available: true,
            had_session: false,
        }
    }

    pub(crate) fn candidates(n: u32, change: impl Fn(usize, &mut Candidate)) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = (0..n).map(candidate).collect();
        all.iter_mut().enumerate().for_each(|(i, c)| change(i, c));
        all
    }

    /// A view of a request of which nothing matters.
    pub(crate) fn view(pool: &Pool) -> View<'_> {
        View {
            pool,
            model: "m",
            prompt_tokens: 0,
            prefix_blocks: 0,
            block_tokens: 64,
            kv_blocks: 0,
            kv_block_tokens: 16,
            output_tokens: 0,
            selection: None,
            predictions: &[],
        }
    }

    /// A pool of endpoints with these labels, at 10.0.0.1, 10.0.0.2, ...
    pub(crate) fn pool(labels: &[&[(&str, &str)]]) -> Pool {
        let endpoint = |(i, labels): (usize, &&[(&str, &str)])| {
            let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let config = crate::core::pool::EndpointConfig::new(&format!("e{i}"), &format!("10.0.0.{}", i + 1), 8000);
            config.with_labels(labels)
        };
        Pool::new(labels.iter().enumerate().map(endpoint).collect())
    }

    /// The ids that a filter keeps.
    pub(crate) fn kept(filter: &dyn Filter, view: &View<'_>, mut all: Vec<Candidate>) -> Vec<u32> {
        filter.filter(view, &mut all, &mut Seed(1).stream("filter"));
        all.iter().map(|c| c.id.0).collect()
    }

    /// Checks the scores of candidates against a table.
    pub(crate) fn check<const N: usize>(scorer: &dyn Scorer, view: &View<'_>, all: Vec<Candidate>, expect: [f64; N]) {
        let mut scores = [f64::NAN; N];
        scorer.score(view, &all, &mut scores);
        for (score, expect) in scores.iter().zip(expect) {
            assert!((score - expect).abs() < 1e-12, "{scores:?}, expected {expect:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{candidate, view};
    use super::*;

    #[test]
    fn uncached_tokens_are_what_is_not_matched_and_what_is_not_indexed() {
        let pool = Pool::default();
        let check = |prompt_tokens, prefix_blocks, matched, expect| {
            let view = View { prompt_tokens, prefix_blocks, ..view(&pool) };
            assert_eq!(view.uncached_tokens(matched), expect, "{prompt_tokens} {prefix_blocks} {matched}");
        };
        check(1000, 15, 0, 1000);
        check(1000, 15, 10, 360);
        check(1000, 15, 15, 40);
        // The index covers only the first two blocks.
        check(1000, 2, 2, 872);
        check(10, 0, 0, 10);
    }

    #[test]
    fn a_prompt_without_blocks_has_no_match() {
        let pool = Pool::default();
        assert_eq!(view(&pool).matched_share(&candidate(0)), 0.0);
    }
}
