//! `random-picker`: any candidate, whatever its score.

use shared::rng::Stream;

use crate::core::scheduler::{Picked, Picker};

/// Takes any.
#[derive(Debug)]
pub struct Random;

impl Picker for Random {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        Picked { index: random.below(scores.len()), ties: scores.len() as u32 - 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scheduler::pickers::testing::{about, shares};

    #[test]
    fn scores_do_not_matter() {
        let found = shares(&Random, [0.0, 9.0]);
        assert!(about(found[0], 5000), "{found:?}");
    }
}
