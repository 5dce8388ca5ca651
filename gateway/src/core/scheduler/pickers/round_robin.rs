//! `round-robin-picker`: one candidate after the other, whatever their scores. Not llm-d's: what every comparison of policies begins
//! with.

use std::sync::atomic::{AtomicUsize, Ordering};

use shared::rng::Stream;

use crate::core::scheduler::{Picked, Picker};

/// Takes turns.
#[derive(Debug, Default)]
pub struct RoundRobin {
    /// Requests that were picked for so far.
    turn: AtomicUsize,
}

impl Picker for RoundRobin {
    fn pick(&self, scores: &[f64], _: &mut Stream) -> Picked {
        let index = self.turn.fetch_add(1, Ordering::Relaxed) % scores.len();
        Picked { index, ties: scores.len() as u32 - 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::rng::Seed;

    #[test]
    fn everyone_has_a_turn() {
        let picker = RoundRobin::default();
        let mut random = Seed(1).stream("pick");
        let turns: Vec<usize> = (0..7).map(|_| picker.pick(&[0.9, 0.1, 0.5], &mut random).index).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(picker.pick(&[0.0], &mut random), Picked { index: 0, ties: 0 });
    }
}
