//! `lora-affinity-scorer`: 1 where the adapter runs, 0.8 where there is room for it, 0.6 where requests for it wait, else 0.

use crate::core::pool::AdapterState;
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints that have the adapter.
#[derive(Debug)]
pub struct LoraAffinity;

impl Scorer for LoraAffinity {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = match c.adapter {
                AdapterState::Running => 1.0,
                AdapterState::Room => 0.8,
                AdapterState::Waiting => 0.6,
                AdapterState::Full => 0.0,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::{Adapters, Pool};
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn having_it_is_best_and_room_is_better_than_waiting() {
        let state = |max, running: &[&str], waiting: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|n| (*n).into()).collect();
            Adapters { max, running: list(running), waiting: list(waiting) }.state("a")
        };
        let states = [
            state(2, &["a", "b"], &["c"]),
            state(3, &["b"], &["c"]),
            state(3, &["b"], &["a"]),
            state(2, &["b"], &["a"]),
            state(2, &["b"], &["c"]),
            state(0, &[], &[]),
        ];
        let pool = Pool::default();
        let all = candidates(6, |i, c| c.adapter = states[i]);
        check(&LoraAffinity, &view(&pool), all, [1.0, 0.8, 0.8, 0.6, 0.0, 0.0]);
    }
}
