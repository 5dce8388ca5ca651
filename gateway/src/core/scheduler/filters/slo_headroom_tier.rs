//! `slo-headroom-tier-filter`: endpoints that are predicted to meet both latency objectives; with a small chance the others, so that
//! they get traffic to recover by. Without any prediction all are kept.

use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps a tier.
#[derive(Debug)]
pub struct SloHeadroomTier {
    epsilon_explore_neg: f64,
}

impl SloHeadroomTier {
    /// From `epsilonExploreNeg`, the chance to choose among those that will miss an objective.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<SloHeadroomTier, PluginError> {
        p.latency_producer()?;
        Ok(SloHeadroomTier { epsilon_explore_neg: p.share("epsilonExploreNeg", 0.01)? })
    }
}

impl Filter for SloHeadroomTier {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, random: &mut Stream) {
        if candidates.len() <= 1 || !candidates.iter().any(|c| view.prediction(c).is_some()) {
            return;
        }
        // What nobody predicts cannot be relied on.
        let meets =
            |c: &Candidate| view.prediction(c).is_some_and(|p| p.ttft_headroom_ms >= 0.0 && p.tpot_headroom_ms >= 0.0);
        let good = candidates.iter().filter(|c| meets(c)).count();
        if good == 0 || good == candidates.len() {
            return;
        }
        let explore = random.unit() < self.epsilon_explore_neg;
        candidates.retain(|c| meets(c) != explore);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::Prediction;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn the_tier_that_meets_its_objectives_is_kept() {
        let pool = Pool::default();
        let headroom = |ttft_headroom_ms, tpot_headroom_ms| {
            Some(Prediction { ttft_ms: 0.0, ttft_headroom_ms, tpot_headroom_ms, dispatched: 0 })
        };
        let check = |epsilon: f64, predictions: [Option<Prediction>; 3], expect: &[u32]| {
            let filter = read(json!({"epsilonExploreNeg": epsilon}), SloHeadroomTier::read).unwrap();
            let view = View { predictions: &predictions, ..view(&pool) };
            assert_eq!(kept(&filter, &view, candidates(3, |_, _| {})), expect, "{predictions:?}");
        };
        let (good, late, slow) = (headroom(0.0, 5.0), headroom(-1.0, 5.0), headroom(5.0, -1.0));
        check(0.0, [good, late, slow], &[0]);
        check(0.0, [good, None, good], &[0, 2]);
        check(1.0, [good, late, None], &[1, 2]);
        check(0.0, [late, slow, None], &[0, 1, 2]);
        check(0.0, [None, None, None], &[0, 1, 2]);
        check(1.0, [good, good, good], &[0, 1, 2]);
    }
}
