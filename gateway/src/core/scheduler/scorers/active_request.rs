//! `active-request-scorer`: by the requests in flight that the gateway counts. At most `idleThreshold` give 1; the others
//! (max - n) / max * `maxBusyScore`.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints with few requests in flight.
#[derive(Debug)]
pub struct ActiveRequest {
    idle_threshold: u32,
    max_busy_score: f64,
}

impl ActiveRequest {
    /// From `idleThreshold` and `maxBusyScore`; `requestTimeout` is read and ignored, as in llm-d.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<ActiveRequest, PluginError> {
        p.in_flight_producer()?;
        p.ignored("requestTimeout");
        Ok(ActiveRequest {
            idle_threshold: p.count_from("idleThreshold", 0, 0)?,
            max_busy_score: p.share("maxBusyScore", 1.0)?,
        })
    }
}

impl Scorer for ActiveRequest {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let max = candidates.iter().map(|c| c.in_flight).max().unwrap_or(0);
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = if c.in_flight <= self.idle_threshold {
                1.0
            } else {
                f64::from(max - c.in_flight) / f64::from(max) * self.max_busy_score
            };
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
    fn the_idle_are_best_and_the_busiest_gets_nothing() {
        let pool = Pool::default();
        let all = || candidates(4, |i, c| c.in_flight = [0, 2, 4, 8][i]);
        let scorer = |parameters| read(parameters, ActiveRequest::read).unwrap();
        check(&scorer(json!({})), &view(&pool), all(), [1.0, 0.75, 0.5, 0.0]);
        check(&scorer(json!({"idleThreshold": 2})), &view(&pool), all(), [1.0, 1.0, 0.5, 0.0]);
        check(&scorer(json!({"maxBusyScore": 0.5})), &view(&pool), all(), [1.0, 0.375, 0.25, 0.0]);
        check(&scorer(json!({})), &view(&pool), candidates(2, |_, c| c.in_flight = 3), [0.0, 0.0]);
    }
}
