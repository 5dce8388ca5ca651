//! `precise-prefix-cache-scorer`: the weighted match in the index of KV events, stretched from the worst of the endpoints that hold
//! anything to the best: (score - min) / (max - min). All equal is 1; an endpoint that holds nothing is 0 (llm-d's
//! `indexedScoresToNormalizedScoredPods`). So the least of several matches is worth no more than none.

use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints that hold the beginning of the prompt.
#[derive(Debug)]
pub struct PrecisePrefixCache;

impl Scorer for PrecisePrefixCache {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let holding = candidates.iter().filter(|c| c.kv.blocks > 0).map(|c| c.kv.score);
        let (min, max) = holding.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), s| (lo.min(s), hi.max(s)));
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = if c.kv.blocks == 0 {
                0.0
            } else if min == max {
                1.0
            } else {
                (c.kv.score - min) / (max - min)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::kv_index::Match;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn matches_are_stretched_over_those_who_hold_anything() {
        let pool = Pool::default();
        let scores = |held: [(u32, f64); 4], expect| {
            let of = |i: usize| Match { blocks: held[i].0, score: held[i].1 };
            check(&PrecisePrefixCache, &view(&pool), candidates(4, |i, c| c.kv = of(i)), expect);
        };
        scores([(0, 0.0); 4], [0.0; 4]);
        scores([(4, 4.0), (8, 8.0), (0, 0.0), (6, 6.0)], [0.0, 1.0, 0.0, 0.5]);
        scores([(5, 5.0), (0, 0.0), (5, 5.0), (0, 0.0)], [1.0, 0.0, 1.0, 0.0]);
        // Blocks in the host's memory weigh less.
        scores([(10, 8.0), (10, 10.0), (5, 4.0), (0, 0.0)], [2.0 / 3.0, 1.0, 0.0, 0.0]);
    }
}
