//! `load-aware-scorer`: 0.5 for an empty queue, falling to 0 at `threshold` waiting requests.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers short queues, whatever the others' are.
#[derive(Debug)]
pub struct LoadAware {
    threshold: f64,
}

impl LoadAware {
    /// From `threshold`; one that is not positive is the default in llm-d, and refused here.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<LoadAware, PluginError> {
        Ok(LoadAware { threshold: f64::from(p.count_from("threshold", 128, 1)?) })
    }
}

impl Scorer for LoadAware {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = 0.5 * (1.0 - f64::from(c.waiting).min(self.threshold) / self.threshold);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn a_half_falls_to_nothing() {
        let pool = Pool::default();
        let all = || candidates(4, |i, c| c.waiting = [0, 64, 128, 999][i]);
        let scorer = |parameters| read(parameters, LoadAware::read).unwrap();
        check(&scorer(json!({})), &view(&pool), all(), [0.5, 0.25, 0.0, 0.0]);
        check(&scorer(json!({"threshold": 256})), &view(&pool), all(), [0.5, 0.375, 0.25, 0.0]);
    }
}
