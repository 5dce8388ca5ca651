//! `prefix-cache-affinity-filter`: narrows to the endpoints that have most of the prompt, unless they are too busy.
//!
//! Sticky endpoints are those with matched / total blocks of at least `affinityThreshold`. They are given up when the best time to
//! first token among them is more than `maxTTFTPenaltyMs` above the best of the others. That time is in-flight tokens /
//! `peakPrefillThroughput`, or the predictor's.

use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what has most of the prompt.
#[derive(Debug)]
pub struct PrefixCacheAffinity {
    affinity_threshold: f64,
    exploration_probability: f64,
    max_ttft_penalty_ms: f64,
    source: TtftSource,
}

#[derive(Clone, Copy, Debug)]
enum TtftSource {
    /// Tokens a second that an endpoint prefills.
    PrefillThroughput(f64),
    LatencyPredictor,
}

impl PrefixCacheAffinity {
    /// From llm-d's parameters of the same names as in the module's text, and `explorationProbability`, the chance to keep all.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<PrefixCacheAffinity, PluginError> {
        p.prefix_producer()?;
        p.in_flight_producer()?;
        p.latency_producer()?;
        let max_ttft_penalty_ms = p.number("maxTTFTPenaltyMs", 18_000.0, 0.0, f64::INFINITY)?;
        // Qwen 32B on two H100 with vLLM 0.19, says llm-d.
        let throughput = p.number("peakPrefillThroughput", 15_928.0, 0.0, f64::INFINITY)?;
        let source = match p.word("ttftSource", "prefillThroughput", &["prefillThroughput", "latencyPredictor"])? {
            "latencyPredictor" => TtftSource::LatencyPredictor,
            _ if throughput == 0.0 && max_ttft_penalty_ms > 0.0 => {
                return Err(p.refuse("peakPrefillThroughput", "a number above 0 for ttftSource: prefillThroughput"));
            }
            _ => TtftSource::PrefillThroughput(throughput),
        };
        Ok(PrefixCacheAffinity {
            affinity_threshold: p.number("affinityThreshold", 0.8, f64::NEG_INFINITY, 1.0)?,
            exploration_probability: p.share("explorationProbability", 0.0)?,
            max_ttft_penalty_ms,
            source,
        })
    }

    fn ttft_ms(&self, view: &View<'_>, c: &Candidate) -> f64 {
        match self.source {
            TtftSource::PrefillThroughput(per_second) => c.in_flight_tokens as f64 / per_second * 1000.0,
            TtftSource::LatencyPredictor => view.prediction(c).map_or(f64::MAX, |p| p.ttft_ms),
        }
    }

    /// Whether the sticky endpoints are so busy that another is better in spite of an empty cache.
    fn too_busy(&self, view: &View<'_>, candidates: &[Candidate], sticky: impl Fn(&Candidate) -> bool) -> bool {
        let (mut best_sticky, mut best_other) = (f64::MAX, None);
        for c in candidates {
            let ttft = self.ttft_ms(view, c);
            if sticky(c) {
                best_sticky = ttft.min(best_sticky);
            } else {
                best_other = Some(ttft.min(best_other.unwrap_or(f64::MAX)));
            }
        }
        best_other.is_some_and(|other| best_sticky - other > self.max_ttft_penalty_ms)
    }
}

impl Filter for PrefixCacheAffinity {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, random: &mut Stream) {
        if candidates.len() <= 1 || self.affinity_threshold <= 0.0 {
            return;
        }
        if self.exploration_probability > 0.0 && random.unit() < self.exploration_probability {
            return;
        }
        let sticky = |c: &Candidate| view.matched_share(c) >= self.affinity_threshold;
        let none = !candidates.iter().any(sticky);
        if none || (self.max_ttft_penalty_ms > 0.0 && self.too_busy(view, candidates, sticky)) {
            return;
        }
        candidates.retain(sticky);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::Prediction;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, kept, view};

    fn check(parameters: Value, matched: [u32; 3], tokens: [u64; 3], expect: &[u32]) {
        let pool = Pool::default();
        let filter = read(parameters.clone(), PrefixCacheAffinity::read).unwrap();
        let all = candidates(3, |i, c| (c.matched_blocks, c.in_flight_tokens) = (matched[i], tokens[i]));
        let view = View { prefix_blocks: 10, ..view(&pool) };
        assert_eq!(kept(&filter, &view, all), expect, "{parameters} {matched:?} {tokens:?}");
    }

    #[test]
    fn sticky_endpoints_have_four_fifths() {
        check(json!({}), [8, 7, 10], [0; 3], &[0, 2]);
        check(json!({}), [7, 7, 0], [0; 3], &[0, 1, 2]);
        check(json!({"affinityThreshold": 0.99}), [9, 9, 10], [0; 3], &[2]);
        check(json!({"affinityThreshold": 0}), [0, 0, 10], [0; 3], &[0, 1, 2]);
        check(json!({"explorationProbability": 1}), [0, 0, 10], [0; 3], &[0, 1, 2]);
    }

    #[test]
    fn busy_endpoints_lose_their_stickiness() {
        // 18 s at 15,928 tokens/s are 286,704 tokens.
        check(json!({}), [10, 0, 0], [286_704, 0, 0], &[0]);
        check(json!({}), [10, 0, 0], [286_705, 0, 0], &[0, 1, 2]);
        check(json!({}), [10, 0, 0], [286_705, 2, 2], &[0]);
        check(json!({}), [10, 10, 0], [286_705, 10, 0], &[0, 1]);
        check(json!({"maxTTFTPenaltyMs": 0}), [10, 0, 0], [u64::MAX, 0, 0], &[0]);
        check(json!({"peakPrefillThroughput": 1000, "maxTTFTPenaltyMs": 100}), [10, 0, 0], [101, 0, 0], &[0, 1, 2]);
        // All are sticky: nobody to give way to.
        check(json!({}), [10, 10, 10], [u64::MAX; 3], &[0, 1, 2]);
    }

    #[test]
    fn a_predictor_may_say_how_busy_they_are() {
        let pool = Pool::default();
        let filter = read(json!({"ttftSource": "latencyPredictor"}), PrefixCacheAffinity::read).unwrap();
        let says = |ttft_ms| Some(Prediction { ttft_ms, ttft_headroom_ms: 0.0, tpot_headroom_ms: 0.0, dispatched: 0 });
        let check = |predictions: &[Option<Prediction>], expect: &[u32]| {
            let view = View { prefix_blocks: 10, predictions, ..view(&pool) };
            let all = candidates(2, |i, c| c.matched_blocks = [10, 0][i]);
            assert_eq!(kept(&filter, &view, all), expect, "{predictions:?}");
        };
        check(&[says(18_100.0), says(100.0)], &[0]);
        check(&[says(18_101.0), says(100.0)], &[0, 1]);
        check(&[says(18_101.0), None], &[0]);
        check(&[], &[0]);
    }

    #[test]
    fn parameters_are_checked() {
        for bad in [
            json!({"affinityThreshold": 1.1}),
            json!({"explorationProbability": 2}),
            json!({"ttftSource": "oracle"}),
            json!({"peakPrefillThroughput": 0}),
        ] {
            assert!(read(bad.clone(), PrefixCacheAffinity::read).is_err(), "{bad}");
        }
    }
}
