//! Plugins that read matches of the index of KV events instead of the approximate one's, because their parameter
//! `prefixMatchInfoProducerName` is `precise-prefix-cache-producer`. They do not know: what they see is exchanged before they run.

use shared::rng::Stream;

use crate::core::config::Parameters;
use crate::core::scheduler::parameters::{PRECISE_PRODUCER, PREFIX_PRODUCER_NAME};
use crate::core::scheduler::{Candidate, Decider, Filter, Scorer, Verdict, View};

/// A plugin that sees precise matches.
pub(super) struct Precise<T: ?Sized>(pub(super) Box<T>);

/// Whether a plugin's parameters ask for them.
pub(crate) fn asked(parameters: &Parameters) -> bool {
    parameters.get(PREFIX_PRODUCER_NAME).and_then(serde_json::Value::as_str) == Some(PRECISE_PRODUCER)
}

/// The view with the precise index in the place of the approximate one.
pub(crate) fn view<'a>(view: &View<'a>) -> View<'a> {
    View { prefix_blocks: view.kv_blocks, block_tokens: view.kv_block_tokens, ..*view }
}

/// A candidate with its precise match; llm-d publishes its weighted score as a whole number of blocks.
pub(crate) fn candidate(c: &Candidate) -> Candidate {
    Candidate { matched_blocks: c.kv.score as u32, ..*c }
}

impl Scorer for Precise<dyn Scorer> {
    fn score(&self, seen: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let all: Vec<Candidate> = candidates.iter().map(candidate).collect();
        self.0.score(&view(seen), &all, scores);
    }
}

impl Filter for Precise<dyn Filter> {
    fn filter(&self, seen: &View<'_>, candidates: &mut Vec<Candidate>, random: &mut Stream) {
        let mut all: Vec<Candidate> = candidates.iter().map(candidate).collect();
        self.0.filter(&view(seen), &mut all, random);
        // Filters keep the order.
        let mut kept = all.iter().map(|c| c.id).peekable();
        candidates.retain(|c| kept.next_if_eq(&c.id).is_some());
    }
}

impl Decider for Precise<dyn Decider> {
    fn decide(&self, seen: &View<'_>, decode: &Candidate) -> Verdict {
        self.0.decide(&view(seen), &candidate(decode))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::kv_index::Match;
    use crate::core::pool::Pool;
    use crate::core::scheduler::registry::{self, Reads};
    use crate::core::scheduler::testing::{candidates, check, kept, view as plain_view};

    fn parameters(producer: &str) -> Parameters {
        serde_json::from_value(json!({ PREFIX_PRODUCER_NAME: producer })).unwrap()
    }

    /// Candidates of which the approximate index says the opposite of the precise one.
    fn all() -> Vec<Candidate> {
        candidates(3, |i, c| {
            c.matched_blocks = [10, 5, 0][i];
            c.kv = Match { blocks: [0, 20, 40][i], score: [0.0, 16.5, 40.0][i] };
        })
    }

    #[test]
    fn the_parameter_says_which_index_is_read() {
        let pool = Pool::default();
        let view = View { prefix_blocks: 10, kv_blocks: 40, kv_block_tokens: 16, ..plain_view(&pool) };
        let scorer = |producer| registry::scorer("prefix-cache-scorer", &parameters(producer)).unwrap();
        let approximate = scorer("approx-prefix-cache-producer");
        assert_eq!((approximate.reads.contains(Reads::PREFIX), approximate.reads.contains(Reads::KV)), (true, false));
        check(&*approximate.plugin, &view, all(), [1.0, 0.5, 0.0]);
        let precise = scorer(PRECISE_PRODUCER);
        assert_eq!((precise.reads.contains(Reads::PREFIX), precise.reads.contains(Reads::KV)), (false, true));
        check(&*precise.plugin, &view, all(), [0.0, 0.4, 1.0]);
    }

    #[test]
    fn filters_see_precise_matches_and_leave_candidates_as_they_were() {
        let pool = Pool::default();
        let view = View { prefix_blocks: 10, kv_blocks: 40, kv_block_tokens: 16, ..plain_view(&pool) };
        let filter = registry::filter("prefix-cache-affinity-filter", &parameters(PRECISE_PRODUCER)).unwrap();
        assert_eq!(kept(&*filter.plugin, &view, all()), [2]);
        let mut left = all();
        filter.plugin.filter(&view, &mut left, &mut shared::rng::Seed(1).stream("filter"));
        assert_eq!(left[0].matched_blocks, 0, "what the approximate index says of it");
    }

    #[test]
    fn deciders_see_precise_matches() {
        let pool = Pool::default();
        let view =
            View { prompt_tokens: 640, prefix_blocks: 10, kv_blocks: 40, kv_block_tokens: 16, ..plain_view(&pool) };
        let mut given = parameters(PRECISE_PRODUCER);
        given.insert("nonCachedTokens".to_owned(), json!(64));
        let decider = registry::decider("prefix-based-pd-decider", &given).unwrap();
        let uncached = |i: usize| decider.plugin.decide(&view, &all()[i]).uncached_tokens;
        assert_eq!([0, 1, 2].map(uncached), [Some(640), Some(384), Some(0)]);
    }
}
