//! What an arm's block is held against: its two nearest `off` blocks.

use std::collections::BTreeMap;

use super::Statistic;
use crate::overhead::model::Block;

/// The `off` blocks of one regime, by place.
#[derive(Debug)]
pub struct References<'a> {
    off: Vec<&'a Block>,
}

impl<'a> References<'a> {
    /// Of `off` blocks of one regime, in any order; those that answered nothing are no reference.
    pub fn new(off: impl IntoIterator<Item = &'a Block>) -> References<'a> {
        let mut off: Vec<&Block> = off.into_iter().filter(|b| b.answered > 0).collect();
        off.sort_by_key(|b| b.place);
        References { off }
    }

    /// The nearest one before `place` and the nearest one after it, so that a steady drift cancels; at the edges of a run the two nearest
    /// on the one side there is. Nothing where the regime has fewer than two.
    pub fn around(&self, place: u32) -> Option<[&'a Block; 2]> {
        let after = self.off.partition_point(|b| b.place < place);
        let first = after.saturating_sub(1).min(self.off.len().checked_sub(2)?);
        Some([self.off[first], self.off[first + 1]])
    }

    /// Logarithm of the ratio of `block` to the geometric mean of its references.
    ///
    /// The arithmetic mean of two noisy figures has a logarithm that is too high by a quarter of their relative variance, which would make
    /// every arm look cheaper than it is; the geometric mean has no such bias. Nothing where `off` has none of what is counted.
    pub fn log_ratio(&self, statistic: Statistic, block: &Block) -> Option<f64> {
        if !statistic.has_ratio() {
            return None;
        }
        let [a, b] = self.around(block.place)?;
        let of = |block: &Block| statistic.of_reference(block).filter(|v| *v > 0.0).map(f64::ln);
        let own = statistic.of(block).filter(|v| *v > 0.0)?.ln();
        Some(own - (of(a)? + of(b)?) / 2.0)
    }

    /// Difference of `block` from the arithmetic mean of its references, in the unit of the statistic.
    pub fn difference(&self, statistic: Statistic, block: &Block) -> Option<f64> {
        let [a, b] = self.around(block.place)?;
        Some(statistic.of(block)? - (statistic.of_reference(a)? + statistic.of_reference(b)?) / 2.0)
    }
}

/// One value a round: the mean where a round has several blocks of the arm, nothing where it has none.
pub(super) fn by_round<'a>(
    blocks: impl IntoIterator<Item = &'a Block>,
    value: impl Fn(&Block) -> Option<f64>,
) -> BTreeMap<u32, f64> {
    let mut rounds: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for block in blocks {
        if let Some(value) = value(block) {
            let (sum, n) = rounds.entry(block.round).or_default();
            *sum += value;
            *n += 1.0;
        }
    }
    rounds.into_iter().map(|(round, (sum, n))| (round, sum / n)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::synthetic::block;
    use super::*;
    use crate::overhead::model::{Arm, Regime};

    #[test]
    fn references_lie_on_both_sides_where_there_are_sides() {
        let off: Vec<Block> = [1, 4, 5, 9].map(|place| block(Regime::Floor, 0, place, Arm::Off, 100.0)).to_vec();
        let references = References::new(&off);
        let check = |place, expect: [u32; 2]| {
            assert_eq!(references.around(place).unwrap().map(|b| b.place), expect, "around {place}");
        };
        check(0, [1, 4]);
        check(2, [1, 4]);
        check(3, [1, 4]);
        check(6, [5, 9]);
        check(8, [5, 9]);
        check(10, [5, 9]);
        assert!(References::new(&off[..1]).around(2).is_none());
        assert!(References::new(&[]).around(2).is_none());
    }

    #[test]
    fn a_steady_drift_cancels() {
        let grown = |place: u32| 100.0 * 1.01_f64.powi(i32::try_from(place).unwrap());
        let off: Vec<Block> = [0, 2].map(|place| block(Regime::Floor, 0, place, Arm::Off, grown(place))).to_vec();
        let arm = block(Regime::Floor, 0, 1, Arm::Control, grown(1));
        let found = References::new(&off).log_ratio(Statistic::E2eMean, &arm).unwrap();
        assert!(found.abs() < 1e-12, "{found}");
    }
}
