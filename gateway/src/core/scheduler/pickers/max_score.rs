//! `max-score-picker`: the highest score; chance decides between equals (llm-d shuffles, then sorts).

use shared::rng::Stream;

use crate::core::scheduler::{Picked, Picker};

/// Takes the best.
#[derive(Debug)]
pub struct MaxScore;

impl Picker for MaxScore {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut equal = scores.iter().enumerate().filter(|&(_, s)| *s == best).map(|(i, _)| i);
        let count = equal.clone().count();
        let nth = if count > 1 { random.below(count) } else { 0 };
        let index = equal.nth(nth).expect("the best score is one of the scores");
        Picked { index, ties: count as u32 - 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scheduler::pickers::testing::{about, shares};
    use shared::rng::Seed;

    #[test]
    fn the_best_is_taken_and_ties_are_shared_evenly() {
        assert_eq!(shares(&MaxScore, [0.5, 0.9, 0.2]), [0, 10_000, 0]);
        let tied = shares(&MaxScore, [0.9, 0.1, 0.9]);
        assert!(about(tied[0], 5000) && tied[1] == 0, "{tied:?}");
        let picked = MaxScore.pick(&[1.0, 1.0, 1.0], &mut Seed(1).stream("pick"));
        assert_eq!(picked.ties, 2);
    }
}
