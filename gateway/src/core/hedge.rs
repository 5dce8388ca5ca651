//! Hedging: when a request that nobody has answered yet may be sent to a second endpoint. After a fixed time, or after what all but a
//! twentieth of the last answers took to begin.

use std::collections::VecDeque;

use shared::time::Dur;

use crate::core::config::{HedgeAfter, HedgeConfig};

/// So many answers are remembered.
const REMEMBERED: usize = 512;
/// Of fewer answers nothing is concluded.
const ENOUGH: usize = 20;
/// The quantile is computed anew after so many answers.
const RENEWED_EVERY: u32 = 16;

/// When a second attempt is due.
#[derive(Debug)]
pub(crate) struct Hedging {
    after: Option<HedgeAfter>,
    heads: VecDeque<Dur>,
    quantile: Option<Dur>,
    news: u32,
}

impl Hedging {
    /// By the configuration; never without one.
    pub(crate) fn new(config: Option<&HedgeConfig>) -> Hedging {
        Hedging { after: config.map(|c| c.after), heads: VecDeque::new(), quantile: None, news: 0 }
    }

    /// How long an attempt that is made now may take to answer before a second one is made.
    pub(crate) fn after(&self) -> Option<Dur> {
        match self.after? {
            HedgeAfter::Fixed(after) => Some(after.get()),
            HedgeAfter::P95 => self.quantile,
        }
    }

    /// An answer began so long after its request was sent.
    pub(crate) fn answered(&mut self, took: Dur) {
        if self.after != Some(HedgeAfter::P95) {
            return;
        }
        if self.heads.len() == REMEMBERED {
            self.heads.pop_front();
        }
        self.heads.push_back(took);
        self.news += 1;
        if self.heads.len() >= ENOUGH && (self.quantile.is_none() || self.news >= RENEWED_EVERY) {
            self.news = 0;
            let mut sorted: Vec<Dur> = self.heads.iter().copied().collect();
            sorted.sort_unstable();
            // Nearest rank: 95 % of the answers took at most so long.
            self.quantile = sorted.get((sorted.len() * 95).div_ceil(100) - 1).copied();
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::units::HumanDur;

    use super::*;

    fn hedging(after: HedgeAfter) -> Hedging {
        Hedging::new(Some(&HedgeConfig { after }))
    }

    #[test]
    fn a_fixed_time_needs_no_answers() {
        let fixed = hedging(HedgeAfter::Fixed(HumanDur::millis(30)));
        assert_eq!(fixed.after(), Some(Dur::from_millis(30)));
        assert_eq!(Hedging::new(None).after(), None);
    }

    #[test]
    fn the_quantile_is_of_the_last_answers() {
        let mut hedging = hedging(HedgeAfter::P95);
        for ms in 1..=19 {
            hedging.answered(Dur::from_millis(ms));
        }
        assert_eq!(hedging.after(), None, "too few");
        hedging.answered(Dur::from_millis(20));
        assert_eq!(hedging.after(), Some(Dur::from_millis(19)));
        for _ in 0..REMEMBERED {
            hedging.answered(Dur::from_millis(5));
        }
        assert_eq!(hedging.after(), Some(Dur::from_millis(5)), "what was before is forgotten");
    }
}
