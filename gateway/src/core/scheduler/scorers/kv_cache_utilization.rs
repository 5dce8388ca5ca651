//! `kv-cache-utilization-scorer`: 1 - usage of the KV cache.

use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers free caches.
#[derive(Debug)]
pub struct KvCacheUtilization;

impl Scorer for KvCacheUtilization {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = 1.0 - c.kv_usage;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn the_free_part_counts() {
        let pool = Pool::default();
        let all = candidates(3, |i, c| c.kv_usage = [0.0, 0.75, 1.0][i]);
        check(&KvCacheUtilization, &view(&pool), all, [1.0, 0.25, 0.0]);
    }
}
