//! Whether the lab's verdicts mean what they say, tried on blocks that a run has recorded with tracing off.
//!
//! In each round three neighbouring `off` blocks are drawn at random, and of these one that plays an arm; the other two are its
//! references. Its true overhead is 0, or a factor that is put on. This is repeated 1,000 times; how often the interval holds the truth and
//! how often a verdict is wrong are counted.
//!
//! The references come from the pseudo-arm's own round and from the same three blocks, for two reasons that simulation shows. Nearest
//! blocks across rounds are often shared by two rounds: their log ratios then correlate, and with three `off` blocks a round the interval
//! covers 93 % where it should cover 95 %. And only if each of the three can be the arm do the log ratios of all relabellings add up
//! to nothing; otherwise the chance of wrong verdicts is that of one run's accidents. A run's own arms have `off` blocks next to them on both
//! sides and share few references, so they do no worse; their references are nearer, so that slow noise cancels better than here.
//! Where a run has few arms and so fewer than three `off` blocks a round, three that follow each other stand for a round; these are fewer
//! than the run's rounds, so its power is better than what is shown. Relabellings of one run are not independent of each other: the counts tell of this run's noise, and the coverage of the intervals in
//! general is established by simulation in the tests of the statistics.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use shared::rng::{Seed, Stream};

use super::analysis::{References, Statistic, TARGET, Verdict};
use super::model::{Arm, Block, Regime, Run};
use super::stats::{Interval, LEVEL, Moments};

/// How often blocks are relabelled.
pub const RELABELLINGS: usize = 1_000;

/// Fewer rounds calibrate nothing.
const FEWEST_ROUNDS: usize = 5;

/// What relabelling the `off` blocks of a run shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Relabellings of each regime.
    pub relabellings: usize,
    /// The target of the verdicts, as a share.
    pub target: f64,
    /// One row for each regime and primary statistic.
    pub rows: Vec<Row>,
    /// Regimes whose `off` blocks are too few, and why.
    pub left_out: Vec<String>,
}

/// The counts of one primary statistic, as shares of relabellings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The regime.
    pub regime: Regime,
    /// The statistic.
    pub statistic: Statistic,
    /// Rounds, or threes of `off` blocks that stand for them.
    pub rounds: usize,
    /// Each requirement, in the order of the method.
    pub checks: Vec<Check>,
}

/// One requirement and what was found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What is counted.
    pub count: Count,
    /// How often it was the case, as a share.
    pub found: f64,
    /// Within which it must lie.
    pub bounds: Interval,
    /// Whether it does.
    pub holds: bool,
}

/// What a requirement counts over relabellings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// The 95 % interval contains 0 where nothing is put on.
    Coverage,
    /// FAIL where nothing is put on.
    FalseFail,
    /// FAIL where 2 % is put on.
    FailAt2,
    /// PASS where 5 % is put on, which is the target itself.
    PassAt5,
    /// FAIL where 10 % is put on.
    FailAt10,
}

impl Count {
    /// Every requirement, in the order of the method.
    pub const ALL: [Count; 5] = [Count::Coverage, Count::FalseFail, Count::FailAt2, Count::PassAt5, Count::FailAt10];

    /// The column's title.
    const fn title(self) -> &'static str {
        match self {
            Count::Coverage => "0 in interval",
            Count::FalseFail => "FAIL at 0 %",
            Count::FailAt2 => "FAIL at +2 %",
            Count::PassAt5 => "PASS at +5 %",
            Count::FailAt10 => "FAIL at +10 %",
        }
    }

    /// The bounds in words.
    const fn required(self) -> &'static str {
        match self {
            Count::Coverage => "92-98 %",
            Count::FalseFail | Count::FailAt2 => "below 1 %",
            Count::PassAt5 => "at most 4 %",
            Count::FailAt10 => "at least 80 %",
        }
    }

    /// The factor put on the pseudo-arm.
    const fn factor(self) -> f64 {
        match self {
            Count::Coverage | Count::FalseFail => 1.0,
            Count::FailAt2 => 1.02,
            Count::PassAt5 => 1.05,
            Count::FailAt10 => 1.10,
        }
    }

    const fn bounds(self) -> Interval {
        match self {
            Count::Coverage => Interval { low: 0.92, high: 0.98 },
            // "Below 1 %" of 1,000 is 9 at most.
            Count::FalseFail | Count::FailAt2 => Interval { low: 0.0, high: 0.009_5 },
            Count::PassAt5 => Interval { low: 0.0, high: 0.04 },
            Count::FailAt10 => Interval { low: 0.80, high: 1.0 },
        }
    }

    /// Whether the case is given in an interval of log ratios.
    fn is_case(self, log: Interval) -> bool {
        let verdict = Verdict::of(Some(log.map(f64::exp_m1)), TARGET);
        match self {
            Count::Coverage => log.contains(0.0),
            Count::PassAt5 => verdict == Verdict::Pass,
            Count::FalseFail | Count::FailAt2 | Count::FailAt10 => verdict == Verdict::Fail,
        }
    }
}

impl Calibration {
    /// From the `off` blocks of a run, with random choices of `seed`.
    pub fn of(run: &Run, seed: u64) -> Calibration {
        let (mut rows, mut left_out) = (Vec::new(), Vec::new());
        for regime in Regime::ALL {
            let off: Vec<&Block> =
                run.blocks.iter().filter(|b| b.regime == regime && b.arm == Arm::Off && b.answered > 0).collect();
            if off.is_empty() || Statistic::primary(regime).is_empty() {
                continue;
            }
            match Rounds::of(&off) {
                Ok(rounds) => rows.extend(rounds.rows(regime, seed)),
                Err(why) => left_out.push(format!("{}: {why}", regime.name())),
            }
        }
        Calibration { relabellings: RELABELLINGS, target: TARGET, rows, left_out }
    }

    /// Whether every bound holds, and something was calibrated.
    pub fn holds(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().flat_map(|r| &r.checks).all(|c| c.holds)
    }

    /// The table, lines ended.
    pub fn text(&self) -> String {
        let mut out = format!(
            "calibration  {} relabellings of the off blocks, verdicts against {} %\n",
            self.relabellings,
            self.target * 100.0
        );
        let columns =
            |f: fn(Count) -> &'static str| Count::ALL.iter().map(|c| format!("  {:>15}", f(*c))).collect::<String>();
        // Writing to a String does not fail.
        let _ = writeln!(out, "{:<26}{:>6}{}", "", "rounds", columns(Count::title));
        let _ = writeln!(out, "{:<26}{:>6}{}", "required", "", columns(Count::required));
        for row in &self.rows {
            let name = format!("{} {}", row.regime.name(), row.statistic.name());
            let _ = write!(out, "{name:<26}{:>6}", row.rounds);
            for check in &row.checks {
                let found = format!("{:.1} % {}", check.found * 100.0, if check.holds { "ok" } else { "NO" });
                let _ = write!(out, "  {found:>15}");
            }
            out.push('\n');
        }
        for line in &self.left_out {
            let _ = writeln!(out, "left out  {line}");
        }
        let conclusion = match (self.rows.is_empty(), self.holds()) {
            (true, _) => "nothing to calibrate",
            (false, true) => "every bound holds",
            (false, false) => "NOT every bound holds: verdicts of this run do not mean what they say",
        };
        let _ = writeln!(out, "{conclusion}");
        out
    }
}

/// The `off` blocks of one regime, three or more in each round.
struct Rounds<'a>(Vec<Vec<&'a Block>>);

impl<'a> Rounds<'a> {
    fn of(off: &[&'a Block]) -> Result<Rounds<'a>, String> {
        let mut all = off.to_vec();
        all.sort_by_key(|b| b.place);
        let mut by_round: BTreeMap<u32, Vec<&Block>> = BTreeMap::new();
        all.iter().for_each(|b| by_round.entry(b.round).or_default().push(b));
        let mut rounds: Vec<Vec<&Block>> = by_round.into_values().filter(|blocks| blocks.len() >= 3).collect();
        if rounds.len() < FEWEST_ROUNDS {
            rounds = all.chunks_exact(3).map(<[&Block]>::to_vec).collect();
        }
        if rounds.len() < FEWEST_ROUNDS {
            let n = all.len();
            return Err(format!("{n} off blocks are too few, {} are needed at least", 3 * FEWEST_ROUNDS));
        }
        Ok(Rounds(rounds))
    }

    fn rows(&self, regime: Regime, seed: u64) -> Vec<Row> {
        let mut stream = Seed(seed).stream(&format!("overhead/calibrate/{}", regime.name()));
        let labels: Vec<Vec<Label<'_>>> = (0..RELABELLINGS).map(|_| self.relabel(&mut stream)).collect();
        let row = |statistic: &Statistic| {
            let moments: Vec<Moments> = labels.iter().filter_map(|label| moments(*statistic, label)).collect();
            Row {
                regime,
                statistic: *statistic,
                rounds: moments.iter().map(|m| m.n).max().unwrap_or(0),
                checks: checks(&moments),
            }
        };
        Statistic::primary(regime).iter().map(row).collect()
    }

    fn relabel(&self, stream: &mut Stream) -> Vec<Label<'_>> {
        let label = |blocks: &Vec<&'a Block>| {
            let first = stream.below(blocks.len() - 2);
            let mut three = [blocks[first], blocks[first + 1], blocks[first + 2]];
            three.swap(0, stream.below(3));
            let [arm, references @ ..] = three;
            Label { arm, references }
        };
        self.0.iter().map(label).collect()
    }
}

/// One round's pseudo-arm and its references.
struct Label<'a> {
    arm: &'a Block,
    references: [&'a Block; 2],
}

/// Of the pseudo-arm's log ratios.
fn moments(statistic: Statistic, labels: &[Label<'_>]) -> Option<Moments> {
    let log_ratio = |l: &Label<'_>| References::new(l.references).log_ratio(statistic, l.arm);
    Moments::of(&labels.iter().filter_map(log_ratio).collect::<Vec<_>>())
}

fn checks(moments: &[Moments]) -> Vec<Check> {
    let intervals: Vec<Interval> = moments.iter().map(|m| m.interval(LEVEL)).collect();
    Count::ALL.iter().map(|count| check(*count, &intervals)).collect()
}

fn check(count: Count, intervals: &[Interval]) -> Check {
    let shift = count.factor().ln();
    let is_case = |i: &&Interval| count.is_case(i.map(|bound| bound + shift));
    let found = intervals.iter().filter(is_case).count() as f64 / intervals.len().max(1) as f64;
    let bounds = count.bounds();
    Check { count, found, bounds, holds: !intervals.is_empty() && bounds.contains(found) }
}

#[cfg(test)]
mod tests {
    use super::super::analysis::synthetic::{Noise, run};
    use super::*;

    fn calibrated(arms: u32, noise: &Noise, seed: u64) -> Calibration {
        let arms: Vec<Arm> = (0..arms).map(|i| Arm::Delayed { us: f64::from(i) }).collect();
        Calibration::of(&run(Regime::Saturation, 20, &arms, noise, seed, |_| 1.0), seed)
    }

    #[test]
    fn blocks_with_little_noise_and_drift_calibrate() {
        let noise = Noise { sd: 0.03, drift: 0.3 };
        let found = calibrated(5, &noise, 1);
        insta::assert_snapshot!(found.text(), @r"
        calibration  1000 relabellings of the off blocks, verdicts against 5 %
                                  rounds    0 in interval      FAIL at 0 %     FAIL at +2 %     PASS at +5 %    FAIL at +10 %
        required                                  92-98 %        below 1 %        below 1 %      at most 4 %    at least 80 %
        saturation gateway CPU        20        93.9 % ok         0.0 % ok         0.0 % ok         3.7 % ok        99.9 % ok
        every bound holds
        ");
        assert!(found.holds());
        assert_eq!(calibrated(5, &noise, 1), found);
    }

    /// Two, three, four and six `off` blocks a round: the bounds hold in nearly all runs, and intervals hold the truth as often as they say.
    #[test]
    fn the_number_of_off_blocks_does_not_bias_the_counts() {
        for arms in [3, 5, 7, 11] {
            let found: Vec<Calibration> =
                (0..20).map(|seed| calibrated(arms, &Noise { sd: 0.02, drift: 0.2 }, seed)).collect();
            let coverage = found.iter().map(|c| c.rows[0].checks[0].found).sum::<f64>() / 20.0;
            assert!((0.945..=0.955).contains(&coverage), "{arms} arms: {coverage}");
            assert!(found.iter().filter(|c| c.holds()).count() >= 17, "{arms} arms");
        }
    }

    #[test]
    fn noise_that_hides_ten_per_cent_is_found_out() {
        let found = calibrated(5, &Noise { sd: 0.2, drift: 0.0 }, 2);
        assert!(!found.holds());
        assert!(found.text().contains("NOT every bound holds"));
        let power = found.rows[0].checks.iter().find(|c| c.count == Count::FailAt10).unwrap();
        assert!(!power.holds && power.found < 0.5, "{power:?}");
    }

    #[test]
    fn too_few_rounds_calibrate_nothing() {
        let run = run(Regime::Saturation, 3, &[Arm::Control], &Noise { sd: 0.02, drift: 0.0 }, 3, |_| 1.0);
        let found = Calibration::of(&run, 1);
        insta::assert_snapshot!(found.text(), @r"
        calibration  1000 relabellings of the off blocks, verdicts against 5 %
                                  rounds    0 in interval      FAIL at 0 %     FAIL at +2 %     PASS at +5 %    FAIL at +10 %
        required                                  92-98 %        below 1 %        below 1 %      at most 4 %    at least 80 %
        left out  saturation: 4 off blocks are too few, 15 are needed at least
        nothing to calibrate
        ");
        assert!(!found.holds());
    }
}
