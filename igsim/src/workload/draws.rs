//! Random numbers by name and key, in any order: what one request draws does not depend on how many were drawn before.
//!
//! A conversation's next turn is planned when the previous one has ended, and in a live run that order varies. Numbers keyed by
//! conversation and turn make the plan the same all the same, and a new kind of draw shifts no other.

use shared::rng::{Seed, mix64};

/// The draws of one concern.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    /// The draws called `name`.
    pub(super) fn new(seed: Seed, name: &str) -> Dice {
        Dice(seed.value(name))
    }

    /// 64 bits for this key and number.
    pub(super) fn bits(self, key: u64, n: u64) -> u64 {
        mix64(mix64(self.0 ^ mix64(key)) ^ n)
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub(super) fn unit(self, key: u64, n: u64) -> f64 {
        (self.bits(key, n) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Draws an index in proportion to weights.
#[derive(Clone, Debug)]
pub(super) struct Weighted(Vec<f64>);

impl Weighted {
    /// Weights that are not negative and not all 0; without any, the index is always 0.
    pub(super) fn new(weights: impl Iterator<Item = f64>) -> Weighted {
        let mut sum = 0.0;
        let cumulate = |w| {
            sum += w;
            sum
        };
        Weighted(weights.map(cumulate).collect())
    }

    /// The index at `u` in `[0, 1)`.
    pub(super) fn at(&self, u: f64) -> usize {
        let total = self.0.last().copied().unwrap_or_default();
        self.0.partition_point(|&sum| sum <= u * total).min(self.0.len().saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_uniform_and_apart() {
        let dice = Dice::new(Seed(1), "a");
        let mut seen = [0u32; 10];
        (0..10_000).for_each(|k| seen[(dice.unit(k / 4, k % 4) * 10.0) as usize] += 1);
        assert!(seen.iter().all(|n| (880..1120).contains(n)), "{seen:?}");
        assert_ne!(dice.bits(1, 2), dice.bits(2, 1));
        assert_ne!(dice.bits(1, 2), Dice::new(Seed(1), "b").bits(1, 2));
        assert_ne!(dice.bits(1, 2), Dice::new(Seed(2), "a").bits(1, 2));
    }

    #[test]
    fn weights_are_kept_and_zero_is_never_drawn() {
        let weighted = Weighted::new([3.0, 0.0, 1.0].into_iter());
        let mut seen = [0; 3];
        (0..4000).for_each(|i| seen[weighted.at(f64::from(i) / 4000.0)] += 1);
        assert_eq!(seen, [3000, 0, 1000]);
    }
}
