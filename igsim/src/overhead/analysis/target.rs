//! Which arm must stay below what, and what an interval says of it.

use serde::{Deserialize, Serialize};

use crate::overhead::model::{Arm, Health, Path, Regime};
use crate::overhead::stats::Interval;

/// Target of primary statistics where nothing else is said.
pub const TARGET: f64 = 0.05;

/// Target at ratio 0 in `floor`: what a gateway pays that records nothing.
const UNSAMPLED: f64 = 0.015;

/// Target at ratio 1 in `saturation`, where every span is paid for and nothing else happens.
const EVERYTHING: f64 = 0.25;

/// What a statistic of an arm is held to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The overhead to stay below, as a share.
    pub below: f64,
    /// Whether missing it fails the run; otherwise it is shown for comparison only.
    pub decides: bool,
}

impl Target {
    /// Of an arm in a regime; `general` is the target where the method names none of its own. `off` and its control
    /// have none.
    ///
    /// The lean paths decide: everywhere up to ratio 0.1, and at 1.0 in `realistic` and `saturation`; with a receiver
    /// that is slow, refuses or is absent, their latencies only. The standard path is reported whatever the verdict.
    pub fn of(regime: Regime, arm: &Arm, general: f64) -> Option<Target> {
        let shown = Target { below: general, decides: false };
        let (path, ratio, receiver) = match arm {
            Arm::Off | Arm::Control => return None,
            Arm::Delayed { .. } | Arm::Outside { .. } => return Some(shown),
            // What steps cost is shown beside the arm without them.
            Arm::Traced { steps, .. } if *steps > 0.0 => return Some(shown),
            Arm::Traced { path, ratio, receiver, steps: _ } => (*path, *ratio, *receiver),
        };
        let below = match regime {
            Regime::Floor if ratio == 0.0 => UNSAMPLED,
            Regime::Saturation if ratio == 1.0 => EVERYTHING,
            Regime::Realistic | Regime::Floor | Regime::FloorUnpinned | Regime::Saturation => general,
        };
        let regime_decides = match regime {
            Regime::Realistic => ratio <= 0.1 || ratio == 1.0,
            Regime::Floor => ratio <= 0.1,
            Regime::FloorUnpinned => false,
            Regime::Saturation => (ratio <= 0.1 || ratio == 1.0) && receiver == Health::Healthy,
        };
        let lean = match path {
            Path::Eager => false,
            Path::Deferred | Path::Direct => true,
        };
        Some(Target { below, decides: lean && regime_decides })
    }
}

/// What an interval says of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// The upper bound is below the target.
    Pass,
    /// The lower bound is above the target.
    Fail,
    /// The target lies within the interval, or there is no interval.
    Inconclusive,
}

impl Verdict {
    /// Of an interval of the overhead.
    pub fn of(interval: Option<Interval>, below: f64) -> Verdict {
        match interval {
            Some(i) if i.high < below => Verdict::Pass,
            Some(i) if i.low > below => Verdict::Fail,
            Some(_) | None => Verdict::Inconclusive,
        }
    }

    /// As printed.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "PASS",
            Verdict::Fail => "FAIL",
            Verdict::Inconclusive => "INCONCLUSIVE",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_the_method() {
        let check = |regime, arm: Arm, below: f64, decides: bool| {
            assert_eq!(Target::of(regime, &arm, TARGET), Some(Target { below, decides }), "{} {arm}", regime.name());
        };
        use Regime::{Floor, FloorUnpinned, Realistic, Saturation};
        for path in [Path::Deferred, Path::Direct] {
            check(Realistic, Arm::traced(path, 0.1), 0.05, true);
            check(Realistic, Arm::traced(path, 1.0), 0.05, true);
            check(Floor, Arm::traced(path, 0.0), 0.015, true);
            check(Floor, Arm::traced(path, 0.01), 0.05, true);
            check(Floor, Arm::traced(path, 0.1), 0.05, true);
            check(Floor, Arm::traced(path, 1.0), 0.05, false);
            check(FloorUnpinned, Arm::traced(path, 0.1), 0.05, false);
            check(Saturation, Arm::traced(path, 0.0), 0.05, true);
            check(Saturation, Arm::traced(path, 0.1), 0.05, true);
            check(Saturation, Arm::traced(path, 0.5), 0.05, false);
            check(Saturation, Arm::traced(path, 1.0), 0.25, true);
            for receiver in [Health::Slow, Health::Refusing, Health::Absent] {
                check(Floor, Arm::Traced { path, ratio: 0.1, receiver, steps: 0.0 }, 0.05, true);
                check(Realistic, Arm::Traced { path, ratio: 1.0, receiver, steps: 0.0 }, 0.05, true);
                check(Saturation, Arm::Traced { path, ratio: 0.1, receiver, steps: 0.0 }, 0.05, false);
            }
        }
        check(Floor, Arm::traced(Path::Eager, 0.1), 0.05, false);
        check(Saturation, Arm::traced(Path::Direct, 0.1).with_steps(0.01), 0.05, false);
        check(Floor, Arm::Delayed { us: 15.0 }, 0.05, false);
        check(Saturation, Arm::Outside { name: "smg".to_owned() }, 0.05, false);
        assert_eq!(Target::of(Floor, &Arm::Off, TARGET), None);
        assert_eq!(Target::of(Floor, &Arm::Control, TARGET), None);
    }

    #[test]
    fn a_verdict_needs_the_whole_interval() {
        let check = |low, high, expect| assert_eq!(Verdict::of(Some(Interval { low, high }), 0.05), expect);
        check(-0.01, 0.049, Verdict::Pass);
        check(0.051, 0.2, Verdict::Fail);
        check(0.04, 0.06, Verdict::Inconclusive);
        check(0.0, 0.05, Verdict::Inconclusive);
        check(0.05, 0.1, Verdict::Inconclusive);
        assert_eq!(Verdict::of(None, 0.05), Verdict::Inconclusive);
    }
}
