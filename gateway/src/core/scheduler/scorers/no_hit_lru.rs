//! `no-hit-lru-scorer`: a request that no candidate has cached goes where such requests went the longest ago, so that caches fill
//! evenly; a request with any hit scores 0.5 everywhere.
//!
//! Endpoints that never got such a request come first, in the order of the candidates, then the others from the longest ago: 1 -
//! rank / (n - 1), not below 0, and 1 for a single candidate.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Spreads requests without a cached prefix.
#[derive(Debug)]
pub struct NoHitLru;

/// Endpoints remembered, unless `lruSize` says otherwise.
const DEFAULT_SIZE: u32 = 1024;

impl NoHitLru {
    /// From `lruSize`, which is the producer's; `prefixPluginType` and `prefixPluginName` are read and ignored, as in llm-d.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<NoHitLru, PluginError> {
        NoHitLru::size(p).map(|_| NoHitLru)
    }

    /// How many endpoints are remembered; 0 is the default, as in llm-d.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn size(p: &mut Reader<'_>) -> Result<u32, PluginError> {
        p.prefix_producer()?;
        p.ignored("prefixPluginType");
        p.ignored("prefixPluginName");
        let size = p.count_from("lruSize", DEFAULT_SIZE, 0)?;
        Ok(if size == 0 { DEFAULT_SIZE } else { size })
    }
}

impl Scorer for NoHitLru {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        if candidates.iter().any(|c| c.matched_blocks > 0) {
            scores.fill(0.5);
            return;
        }
        if let [only] = scores {
            *only = 1.0;
            return;
        }
        let never = candidates.iter().filter(|c| c.cold_position.is_none()).count();
        let last = (candidates.len().max(2) - 1) as f64;
        let mut unused = 0;
        for (score, c) in scores.iter_mut().zip(candidates) {
            let rank = match c.cold_position {
                Some(position) => never + position as usize,
                None => {
                    unused += 1;
                    unused - 1
                }
            };
            *score = (1.0 - rank as f64 / last).max(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn the_longest_ago_is_best() {
        let pool = Pool::default();
        let cold = |positions: [Option<u32>; 5]| candidates(5, move |i, c| c.cold_position = positions[i]);
        let check = |all, expect| check(&NoHitLru, &view(&pool), all, expect);
        check(cold([None; 5]), [1.0, 0.75, 0.5, 0.25, 0.0]);
        check(cold([Some(0), Some(4), Some(1), Some(2), Some(3)]), [1.0, 0.0, 0.75, 0.5, 0.25]);
        check(cold([Some(1), None, Some(0), None, None]), [0.0, 1.0, 0.25, 0.75, 0.5]);
        // Endpoints that are no candidates have places too.
        check(cold([Some(7), Some(2), None, None, None]), [0.0, 0.0, 1.0, 0.75, 0.5]);
    }

    #[test]
    fn any_hit_makes_all_equal() {
        let pool = Pool::default();
        let all = candidates(3, |i, c| (c.matched_blocks, c.cold_position) = ([0, 1, 0][i], Some(i as u32)));
        check(&NoHitLru, &view(&pool), all, [0.5, 0.5, 0.5]);
    }

    #[test]
    fn a_single_candidate_is_the_best() {
        let pool = Pool::default();
        check(&NoHitLru, &view(&pool), candidates(1, |_, c| c.cold_position = Some(3)), [1.0]);
    }
}
