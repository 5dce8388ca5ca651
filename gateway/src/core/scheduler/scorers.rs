//! Scorers, with the formulas of llm-d's plugins of the same names (llm-d-router `pkg/epp/scheduling`, August 2026).

use crate::core::prefix_index::BLOCK_TOKENS;
use crate::core::scheduler::{Candidate, Scorer, View};

/// `queue-scorer`: (max - waiting) / (max - min) over the candidates; all equal gives 1.
#[derive(Debug)]
pub struct Queue;

impl Scorer for Queue {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        fewest_first(candidates, scores, |c| c.waiting);
    }
}

/// `running-requests-size-scorer`: (max - running) / (max - min) over the candidates; all equal gives 1.
#[derive(Debug)]
pub struct RunningRequests;

impl Scorer for RunningRequests {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        fewest_first(candidates, scores, |c| c.running);
    }
}

/// `kv-cache-utilization-scorer`: 1 - usage.
#[derive(Debug)]
pub struct KvCacheUtilization;

impl Scorer for KvCacheUtilization {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = 1.0 - c.kv_usage;
        }
    }
}

/// `load-aware-scorer`: 0.5 for an empty queue, falling to 0 at `threshold` waiting requests.
#[derive(Debug)]
pub struct LoadAware {
    /// Waiting requests at which the score is 0; llm-d's default is 128.
    pub threshold: u32,
}

impl Scorer for LoadAware {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            let load = f64::from(c.waiting.min(self.threshold)) / f64::from(self.threshold);
            *score = 0.5 * (1.0 - load);
        }
    }
}

/// `prefix-cache-scorer`: (1 - w) * matched / total + w * min(1, matched tokens / 8192)^2.
#[derive(Debug)]
pub struct PrefixCache {
    /// w, the weight of the absolute length of the match; llm-d's default is 0.
    pub match_length_weight: f64,
}

impl Scorer for PrefixCache {
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let w = self.match_length_weight;
        let total = f64::from(view.prefix_blocks.max(1));
        for (score, c) in scores.iter_mut().zip(candidates) {
            let tokens = f64::from(c.matched_blocks) * BLOCK_TOKENS as f64;
            let length = (tokens / 8192.0).min(1.0);
            *score = (1.0 - w) * f64::from(c.matched_blocks) / total + w * length * length;
        }
    }
}

/// `session-affinity-scorer`: 1 for the endpoint that served the session last, else 0.
#[derive(Debug)]
pub struct SessionAffinity;

impl Scorer for SessionAffinity {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = f64::from(u8::from(c.had_session));
        }
    }
}

fn fewest_first(candidates: &[Candidate], scores: &mut [f64], load: impl Fn(&Candidate) -> u32) {
    let (min, max) = candidates.iter().map(&load).fold((u32::MAX, 0), |(lo, hi), n| (lo.min(n), hi.max(n)));
    if max <= min {
        scores.fill(1.0);
        return;
    }
    let span = f64::from(max - min);
    for (score, c) in scores.iter_mut().zip(candidates) {
        *score = f64::from(max - load(c)) / span;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::candidates;

    fn check<const N: usize>(scorer: &dyn Scorer, prefix_blocks: u32, all: Vec<Candidate>, expect: [f64; N]) {
        let mut scores = [f64::NAN; N];
        scorer.score(&View { pool: &Pool::default(), prefix_blocks }, &all, &mut scores);
        for (score, expect) in scores.iter().zip(expect) {
            assert!((score - expect).abs() < 1e-12, "{scores:?}, expected {expect:?}");
        }
    }

    #[test]
    fn queue() {
        let waiting = |n: [u32; 3]| candidates(3, move |i, c| c.waiting = n[i]);
        check(&Queue, 0, waiting([0, 5, 10]), [1.0, 0.5, 0.0]);
        check(&Queue, 0, waiting([7, 3, 3]), [0.0, 1.0, 1.0]);
        check(&Queue, 0, waiting([4, 4, 4]), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn running_requests() {
        let running = |n: [u32; 3]| candidates(3, move |i, c| c.running = n[i]);
        check(&RunningRequests, 0, running([2, 4, 10]), [1.0, 0.75, 0.0]);
        check(&RunningRequests, 0, running([0, 0, 0]), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn kv_cache_utilization() {
        check(&KvCacheUtilization, 0, candidates(2, |i, c| c.kv_usage = [0.0, 0.75][i]), [1.0, 0.25]);
    }

    #[test]
    fn load_aware() {
        let all = candidates(4, |i, c| c.waiting = [0, 64, 128, 999][i]);
        check(&LoadAware { threshold: 128 }, 0, all, [0.5, 0.25, 0.0, 0.0]);
    }

    #[test]
    fn prefix_cache() {
        let all = || candidates(3, |i, c| c.matched_blocks = [0, 32, 128][i]);
        check(&PrefixCache { match_length_weight: 0.0 }, 128, all(), [0.0, 0.25, 1.0]);
        // 32 blocks are 2048 tokens, a quarter of 8192.
        check(&PrefixCache { match_length_weight: 1.0 }, 128, all(), [0.0, 0.0625, 1.0]);
        check(&PrefixCache { match_length_weight: 0.5 }, 128, all(), [0.0, 0.15625, 1.0]);
        check(&PrefixCache { match_length_weight: 0.0 }, 0, candidates(2, |_, _| {}), [0.0, 0.0]);
    }

    #[test]
    fn session_affinity() {
        check(&SessionAffinity, 0, candidates(3, |i, c| c.had_session = i == 1), [0.0, 1.0, 0.0]);
    }
}
