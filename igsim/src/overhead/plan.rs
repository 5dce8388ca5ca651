//! Which arms run, and in which order: rounds of every arm once, `off` blocks never further away than the next block.
//!
//! Pure: the same seed gives the same order. Knows regimes by name and duration only.

use shared::rng::{Seed, Stream};
use shared::time::Dur;

use super::model::{Arm, Health, Path, Regime};

/// Rounds of a run: enough for an interval of its mean (Student's t with 19 degrees of freedom).
pub const ROUNDS: u32 = 20;

/// What one regime runs.
#[derive(Clone, Debug, PartialEq)]
pub struct RegimePlan {
    /// The regime.
    pub regime: Regime,
    /// Its arms, `off` apart, the most important first.
    pub arms: Vec<Arm>,
    /// Arms that were asked for and do not fit, the most important first.
    pub left_out: Vec<Arm>,
    /// Rounds.
    pub rounds: u32,
    /// How long the load of a block lasts.
    pub block: Dur,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The floor only, in about 100 s.
    Quick,
    /// Every regime, in about 30 minutes.
    Full,
}

/// What else is measured, on demand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extras {
    /// Arms with receivers that are slow, refuse, or are absent.
    pub faults: bool,
    /// An arm in which a hundredth of the engines' steps is traced, too.
    pub engine_steps: bool,
    /// An arm with a real delay of this share of the median; the lab fills the delay in when it knows the median.
    pub delay_share: Option<f64>,
    /// The arms to measure in place of the usual ones, if any are named.
    pub arms: Option<Vec<Arm>>,
}

impl RegimePlan {
    /// What `extent` asks for in `regime`.
    pub fn of(regime: Regime, extent: Extent, rounds: u32, extras: &Extras) -> RegimePlan {
        let mut arms = match &extras.arms {
            Some(named) => named.clone(),
            None => usual(regime, extent),
        };
        if extras.faults {
            arms.extend(faulty());
        }
        if extras.engine_steps {
            arms.push(Arm::traced(Path::Direct, 0.1).with_steps(0.01));
        }
        if extras.delay_share.is_some() {
            arms.push(Arm::Delayed { us: 0.0 });
        }
        RegimePlan { regime, arms, left_out: Vec::new(), rounds, block: block(regime, extent) }
    }

    /// Blocks of a round: the arms, and an `off` block for every two of them.
    pub fn blocks_per_round(&self) -> usize {
        self.arms.len() + self.arms.len().div_ceil(2)
    }

    /// How long it takes, about.
    pub fn estimate(&self) -> Dur {
        let blocks = self.blocks_per_round() as f64 * f64::from(self.rounds) + 1.0;
        let start = 4.0 + 3.0 * self.block.as_secs_f64();
        Dur::from_secs_f64(start + (self.block + around(self.regime)).as_secs_f64() * blocks)
    }

    /// The arms in the order in which their blocks run, with their rounds.
    pub fn order(&self, seed: Seed) -> Vec<(u32, Arm)> {
        let mut stream = seed.stream(&format!("overhead/{}", self.regime.name()));
        let mut order = Vec::new();
        for round in 0..self.rounds {
            order.extend(one_round(&self.arms, &mut stream).into_iter().map(|arm| (round, arm)));
        }
        // The last blocks too have an `off` block behind them.
        if let Some(last) = self.rounds.checked_sub(1) {
            order.push((last, Arm::Off));
        }
        order
    }
}

/// Every arm once in random order, an `off` block before every two of them: each has one beside it.
fn one_round(arms: &[Arm], stream: &mut Stream) -> Vec<Arm> {
    let mut shuffled = arms.to_vec();
    for i in (1..shuffled.len()).rev() {
        shuffled.swap(i, stream.below(i + 1));
    }
    let mut order = Vec::with_capacity(arms.len() + arms.len().div_ceil(2));
    for pair in shuffled.chunks(2) {
        order.push(Arm::Off);
        order.extend_from_slice(pair);
    }
    order
}

/// Drops arms until everything fits into `budget`, the least important first, as `KEPT` has it; never the control, never
/// rounds. False if it does not fit all the same.
pub fn fit(plans: &mut [RegimePlan], budget: Dur) -> bool {
    let fits = |plans: &[RegimePlan]| plans.iter().fold(Dur::ZERO, |sum, p| sum + p.estimate()) <= budget;
    for kept in KEPT {
        for (regime, keep) in kept {
            while !fits(plans) {
                let long = plans.iter_mut().find(|p| p.regime == regime && p.arms.len() > keep);
                let Some(plan) = long else { break };
                if let Some(arm) = plan.arms.pop() {
                    plan.left_out.insert(0, arm);
                }
            }
        }
    }
    fits(plans)
}

/// How many arms of each regime are kept, step by step, while a run is too long. A block of `realistic` costs seven of the others,
/// so its further arms go first; `floor-unpinned` decides nothing; ratio 0.01 tells little that 0 and 0.1 do not.
const KEPT: [[(Regime, usize); 4]; 5] = [
    [(Regime::Realistic, 5), (Regime::FloorUnpinned, 6), (Regime::Saturation, 11), (Regime::Floor, 11)],
    [(Regime::Realistic, 4), (Regime::FloorUnpinned, 3), (Regime::Saturation, 11), (Regime::Floor, 11)],
    [(Regime::Realistic, 4), (Regime::FloorUnpinned, 3), (Regime::Saturation, 9), (Regime::Floor, 9)],
    [(Regime::Realistic, 3), (Regime::FloorUnpinned, 2), (Regime::Saturation, 6), (Regime::Floor, 6)],
    [(Regime::Realistic, 2), (Regime::FloorUnpinned, 2), (Regime::Saturation, 2), (Regime::Floor, 2)],
];

/// The arms of a regime, the most important first.
fn usual(regime: Regime, extent: Extent) -> Vec<Arm> {
    use Path::{Deferred, Direct, Eager};
    let traced: &[(Path, f64)] = match (extent, regime) {
        (Extent::Quick, _) => &[(Deferred, 0.1), (Eager, 0.1), (Deferred, 1.0), (Deferred, 0.0)],
        (Extent::Full, Regime::Realistic) => {
            &[(Deferred, 0.1), (Deferred, 1.0), (Eager, 0.1), (Eager, 1.0), (Direct, 1.0), (Direct, 0.1)]
        }
        (Extent::Full, Regime::Floor | Regime::Saturation) => &[
            (Deferred, 0.1),
            (Eager, 0.1),
            (Deferred, 1.0),
            (Eager, 1.0),
            (Deferred, 0.0),
            (Eager, 0.0),
            (Direct, 0.1),
            (Direct, 1.0),
            (Deferred, 0.01),
            (Eager, 0.01),
        ],
        (Extent::Full, Regime::FloorUnpinned) => {
            &[(Deferred, 0.1), (Eager, 0.1), (Deferred, 1.0), (Direct, 0.1), (Direct, 1.0)]
        }
    };
    let traced = traced.iter().map(|(path, ratio)| Arm::traced(*path, *ratio));
    std::iter::once(Arm::Control).chain(traced).collect()
}

/// Lean arms with a receiver that does not do its part.
fn faulty() -> Vec<Arm> {
    let arm = |path, receiver| Arm::Traced { path, ratio: 0.1, receiver, steps: 0.0 };
    let bad = [Health::Slow, Health::Refusing, Health::Absent];
    [Path::Deferred, Path::Direct].into_iter().flat_map(|path| bad.map(|health| arm(path, health))).collect()
}

/// How long the load of a block lasts.
const fn block(regime: Regime, extent: Extent) -> Dur {
    match (extent, regime) {
        (_, Regime::Realistic) => Dur::from_secs(7),
        (Extent::Quick, _) | (Extent::Full, Regime::FloorUnpinned) => Dur::from_millis(500),
        (Extent::Full, Regime::Floor | Regime::Saturation) => Dur::from_secs(1),
    }
}

/// What a block takes beside its load: to reset, drain, flush and read.
const fn around(regime: Regime) -> Dur {
    match regime {
        Regime::Realistic => Dur::from_millis(700),
        Regime::Floor | Regime::FloorUnpinned | Regime::Saturation => Dur::from_millis(100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(regime: Regime, extent: Extent) -> RegimePlan {
        RegimePlan::of(regime, extent, ROUNDS, &Extras::default())
    }

    fn is_off(arm: &Arm) -> bool {
        matches!(arm, Arm::Off)
    }

    #[test]
    fn every_arm_runs_once_a_round_beside_an_off_block() {
        for (regime, extent) in Regime::ALL.into_iter().flat_map(|r| [(r, Extent::Quick), (r, Extent::Full)]) {
            let plan = plan(regime, extent);
            let order = plan.order(Seed(5));
            for round in 0..plan.rounds {
                for arm in &plan.arms {
                    assert_eq!(
                        order.iter().filter(|block| **block == (round, arm.clone())).count(),
                        1,
                        "{arm} {round}"
                    );
                }
            }
            assert_eq!(order.len(), plan.blocks_per_round() * plan.rounds as usize + 1);
            for (i, (_, arm)) in order.iter().enumerate().filter(|(_, (_, arm))| !is_off(arm)) {
                let beside = is_off(&order[i - 1].1) || is_off(&order[i + 1].1);
                assert!(beside, "{regime:?}: {arm} at {i} has no off block beside it");
            }
        }
    }

    #[test]
    fn the_order_follows_from_the_seed_and_differs_between_rounds() {
        let plan = plan(Regime::Floor, Extent::Full);
        assert_eq!(plan.order(Seed(1)), plan.order(Seed(1)));
        assert_ne!(plan.order(Seed(1)), plan.order(Seed(2)));
        let order = plan.order(Seed(1));
        let round = |n| order.iter().filter(move |(r, _)| *r == n).map(|(_, arm)| arm.clone()).collect::<Vec<_>>();
        assert!((1..plan.rounds - 1).any(|n| round(n) != round(0)));
    }

    #[test]
    fn the_quick_run_is_eight_blocks_a_round_and_about_a_hundred_seconds() {
        let plan = plan(Regime::Floor, Extent::Quick);
        assert_eq!(plan.blocks_per_round(), 8);
        let seconds = plan.estimate().as_secs_f64();
        assert!((90.0..110.0).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_small_budget_drops_arms_and_no_rounds() {
        let all = || Regime::ALL.map(|r| plan(r, Extent::Full)).to_vec();
        let check = |minutes: u64, fits: bool| {
            let mut plans = all();
            assert_eq!(fit(&mut plans, Dur::from_secs(60 * minutes)), fits, "{minutes}");
            for (plan, before) in plans.iter().zip(all()) {
                assert_eq!(plan.rounds, ROUNDS);
                let mut together = plan.arms.clone();
                together.extend(plan.left_out.clone());
                assert_eq!(together, before.arms, "what is left out is the least important, and nothing is forgotten");
                assert!(plan.arms.contains(&Arm::Control) && plan.arms.len() >= 2);
            }
            plans.iter().map(|p| p.left_out.len()).sum::<usize>()
        };
        assert_eq!(check(600, true), 0);
        assert!(check(30, true) > 0);
        // Half an hour has room for every ratio of the two paths that are compared, and for both ratios of the lean one.
        let mut plans = all();
        fit(&mut plans, Dur::from_secs(30 * 60));
        assert_eq!(plans.iter().map(|p| p.arms.len()).collect::<Vec<_>>(), [4, 11, 4, 11]);
        assert!(check(15, true) > check(30, true));
        check(5, false);
    }

    #[test]
    fn extras_are_added_to_the_usual_arms_or_to_those_that_are_named() {
        let extras = Extras { faults: true, engine_steps: true, delay_share: Some(0.1), arms: None };
        let plan = RegimePlan::of(Regime::Floor, Extent::Quick, ROUNDS, &extras);
        assert_eq!(plan.arms.len(), 5 + 6 + 1 + 1);
        let named = Extras { arms: Some(vec![Arm::Control, Arm::traced(Path::Direct, 0.5)]), ..Extras::default() };
        assert_eq!(RegimePlan::of(Regime::Floor, Extent::Full, 3, &named).arms.len(), 2);
        let both = Extras { faults: true, ..named };
        assert_eq!(RegimePlan::of(Regime::Realistic, Extent::Quick, 3, &both).arms.len(), 2 + 6);
    }
}
