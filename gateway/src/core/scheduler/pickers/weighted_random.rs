//! `weighted-random-picker`: with a probability proportional to the score.
//!
//! A-Res (Efraimidis and Spirakis 2006): the greatest of U^(1/score), compared here as ln(U)/score. If no score is above 0, all
//! candidates are equal.

use shared::rng::Stream;

use crate::core::scheduler::pickers::Random;
use crate::core::scheduler::{Picked, Picker};

/// Takes any, the better ones more often.
#[derive(Debug)]
pub struct WeightedRandom;

impl Picker for WeightedRandom {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        let mut best: Option<(usize, f64)> = None;
        for (i, &score) in scores.iter().enumerate().filter(|(_, s)| **s > 0.0) {
            let key = (1.0 - random.unit()).ln() / score;
            if best.is_none_or(|(_, k)| key > k) {
                best = Some((i, key));
            }
        }
        best.map_or_else(|| Random.pick(scores, random), |(index, _)| Picked { index, ties: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scheduler::pickers::testing::{about, shares};

    #[test]
    fn scores_are_probabilities() {
        let found = shares(&WeightedRandom, [1.0, 0.0, 3.0]);
        assert!(about(found[0], 2500) && found[1] == 0, "{found:?}");
        let zero = shares(&WeightedRandom, [0.0, 0.0]);
        assert!(about(zero[0], 5000), "{zero:?}");
    }
}
