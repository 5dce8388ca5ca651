//! What the blocks of a run say: overheads with intervals, verdicts on what was named in advance, the rest adjusted for its number.
//!
//! Per arm and round, the unit of analysis is the logarithm of the ratio of the arm's block to the mean of its two nearest `off`
//! blocks; rounds are independent, blocks of one round are not. Knows nothing of how blocks are run and prints nothing.

mod pairs;
mod statistic;
#[cfg(test)]
pub(super) mod synthetic;
mod target;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::rng::Seed;

pub use self::pairs::References;
pub use self::statistic::{Statistic, Unit};
pub use self::target::{TARGET, Target, Verdict};
use super::model::{Arm, Block, Cpu, Path, Regime, Run, Telemetry};
use super::stats::{Adjusted, Interval, LEVEL, Moments, RatioOfMeans, bootstrap_t, holm, ratio_of_means};

/// Share of the standard path's CPU overhead that a lean path may have with everything sampled.
pub const SHARE_OF_EAGER: f64 = 1.0 / 3.0;

/// Rounds that the method asks for.
pub const ROUNDS: usize = 20;

/// What the blocks of a run say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Analysis {
    /// The general target, as a share.
    pub target: f64,
    /// Every regime that was run, in the order of reports.
    pub regimes: Vec<RegimeAnalysis>,
    /// The lean paths' CPU overhead as a share of the standard path's: `saturation`, everything sampled.
    pub shares_of_eager: Vec<ShareOfEager>,
}

/// The arms of one regime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegimeAnalysis {
    /// The regime.
    pub regime: Regime,
    /// Rounds of which there are blocks.
    pub rounds: usize,
    /// Blocks repeated because of steal time.
    pub repeated: u64,
    /// The gateway's peak resident memory by the end of the regime, in KiB.
    pub peak_rss_kib: u64,
    /// Every arm, `off` and its control first.
    pub arms: Vec<ArmAnalysis>,
    /// Secondary comparisons among which p-values and intervals are adjusted.
    pub family: usize,
}

/// One arm in one regime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmAnalysis {
    /// The arm.
    pub arm: Arm,
    /// Its blocks.
    pub blocks: usize,
    /// Requests answered in them.
    pub answered: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Means over its blocks, each in its statistic's unit.
    pub levels: BTreeMap<Statistic, f64>,
    /// Mean CPU time per request, in microseconds.
    pub cpu: Cpu,
    /// Sums over its blocks.
    pub telemetry: Telemetry,
    /// Comparisons with `off`; none for `off` itself.
    pub estimates: Vec<Estimate>,
}

/// One statistic of one arm against `off`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The statistic.
    pub statistic: Statistic,
    /// Rounds that contribute.
    pub n: usize,
    /// The relative difference; none where `off` is 0 or fewer than two rounds contribute.
    pub overhead: Option<Relative>,
    /// The difference in the statistic's unit.
    pub difference: Option<Estimated>,
    /// The largest overhead within the 95 % interval of the control arm, of either sign: what two arms that do the same may differ by.
    pub noise_floor: Option<f64>,
    /// Whether the overhead is nearer to 0 than the noise floor.
    pub below_noise_floor: bool,
    /// What is concluded from it.
    pub role: Role,
}

/// A relative difference, as shares: 0.01 is one per cent more than `off`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Relative {
    /// `exp(mean of log ratios) - 1`.
    pub value: f64,
    /// Its 95 % interval by Student's t.
    pub interval: Interval,
    /// Its 95 % interval by bootstrap-t, where there are enough rounds.
    pub bootstrap: Option<Interval>,
    /// Two-sided p-value that it is 0, not adjusted.
    pub p: f64,
}

/// A mean and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimated {
    /// The mean.
    pub value: f64,
    /// Its interval by Student's t.
    pub interval: Interval,
}

/// What a comparison is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Of the control arm: gives the noise floor.
    Control,
    /// Named in advance: judged.
    Primary(Judgement),
    /// Shown, with what Holm's adjustment over the regime's family leaves of it; never judged. None where there is no interval.
    Secondary(Option<Adjustment>),
}

/// A primary statistic against its target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The target.
    pub target: Target,
    /// What the interval says.
    pub verdict: Verdict,
    /// What these blocks could have told from the target, with a probability of 80 % each: overheads up to the lower bound as PASS,
    /// overheads from the upper bound on as FAIL.
    pub could_tell: Option<Interval>,
}

/// A secondary statistic after adjustment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adjustment {
    /// Holm's p-value.
    pub p: f64,
    /// The interval of the overhead that agrees with it.
    pub interval: Interval,
}

/// A lean path's CPU overhead by the standard path's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShareOfEager {
    /// The lean path.
    pub path: Path,
    /// The ratio of the mean overheads in microseconds per request, with Fieller's interval over rounds.
    pub share: RatioOfMeans,
    /// Against [`SHARE_OF_EAGER`]; shown, does not decide.
    pub verdict: Verdict,
}

impl Analysis {
    /// Of a run; `target` is the general one, as a share. The same run gives the same analysis.
    pub fn of(run: &Run, target: f64) -> Analysis {
        let regime = |r: &Regime| RegimeAnalysis::of(run, *r, target);
        Analysis {
            target,
            regimes: Regime::ALL.iter().filter_map(regime).collect(),
            shares_of_eager: [Path::Deferred, Path::Direct].iter().filter_map(|p| ShareOfEager::of(run, *p)).collect(),
        }
    }

    /// Every judged comparison.
    pub fn judged(&self) -> impl Iterator<Item = (Regime, &Arm, &Estimate, Judgement)> {
        self.regimes.iter().flat_map(|r| {
            r.arms.iter().flat_map(|a| {
                a.estimates.iter().filter_map(|e| match e.role {
                    Role::Primary(judgement) => Some((r.regime, &a.arm, e, judgement)),
                    Role::Control | Role::Secondary(_) => None,
                })
            })
        })
    }

    /// Whether a primary statistic of a targeted arm is FAIL: what makes the exit code 1.
    pub fn failed(&self) -> bool {
        self.judged().any(|(_, _, _, j)| j.target.decides && j.verdict == Verdict::Fail)
    }

    /// The comparisons of one regime, where it was run.
    pub fn regime(&self, regime: Regime) -> Option<&RegimeAnalysis> {
        self.regimes.iter().find(|r| r.regime == regime)
    }
}

impl RegimeAnalysis {
    fn of(run: &Run, regime: Regime, target: f64) -> Option<RegimeAnalysis> {
        let blocks: Vec<&Block> = run.blocks.iter().filter(|b| b.regime == regime).collect();
        let references = References::new(blocks.iter().copied().filter(|b| b.arm == Arm::Off));
        let mut rounds: Vec<u32> = blocks.iter().map(|b| b.round).collect();
        rounds.sort_unstable();
        rounds.dedup();
        if rounds.is_empty() {
            return None;
        }
        let mut compared = Vec::new();
        for arm in arms(&blocks) {
            let own: Vec<&Block> = blocks.iter().copied().filter(|b| b.arm == arm).collect();
            let compare = |s: &Statistic| Compared::of(*s, &own, &references, run.seed, target);
            let comparisons: Vec<Compared> = match arm {
                Arm::Off => Vec::new(),
                Arm::Control | Arm::Traced { .. } | Arm::Delayed { .. } | Arm::Outside { .. } => {
                    Statistic::ALL.iter().filter_map(compare).collect()
                }
            };
            compared.push((ArmAnalysis::levels(arm, &own), comparisons));
        }
        note_noise(&mut compared);
        let family = adjust(&mut compared);
        let finish = |(arm, comparisons): (ArmAnalysis, Vec<Compared>)| ArmAnalysis {
            estimates: comparisons.into_iter().map(|c| c.estimate).collect(),
            ..arm
        };
        Some(RegimeAnalysis {
            regime,
            rounds: rounds.len(),
            repeated: blocks.iter().map(|b| u64::from(b.repeated)).sum(),
            peak_rss_kib: blocks.iter().map(|b| b.peak_rss_kib).max().unwrap_or(0),
            arms: compared.into_iter().map(finish).collect(),
            family,
        })
    }

    /// Whether there are fewer rounds than the method asks for.
    pub fn is_short(&self) -> bool {
        self.rounds < ROUNDS
    }

    /// An arm of this regime.
    pub fn arm(&self, arm: &Arm) -> Option<&ArmAnalysis> {
        self.arms.iter().find(|a| a.arm == *arm)
    }
}

impl ArmAnalysis {
    /// The comparison of one statistic.
    pub fn estimate(&self, statistic: Statistic) -> Option<&Estimate> {
        self.estimates.iter().find(|e| e.statistic == statistic)
    }

    /// `value` of the arm's telemetry per answered request.
    pub fn per_request(&self, value: u64) -> f64 {
        if self.answered == 0 { 0.0 } else { value as f64 / self.answered as f64 }
    }

    fn levels(arm: Arm, blocks: &[&Block]) -> ArmAnalysis {
        let level = |s: &Statistic| {
            let values: Vec<f64> = blocks.iter().filter_map(|b| s.of(b)).collect();
            (!values.is_empty()).then(|| (*s, values.iter().sum::<f64>() / values.len() as f64))
        };
        // A block that answered nothing has no CPU per request.
        let answering: Vec<&Cpu> = blocks.iter().filter(|b| b.answered > 0).map(|b| &b.cpu).collect();
        let mean = |f: fn(&Cpu) -> f64| answering.iter().map(|c| f(c)).sum::<f64>() / answering.len().max(1) as f64;
        ArmAnalysis {
            arm,
            blocks: blocks.len(),
            answered: blocks.iter().map(|b| b.answered).sum(),
            failed: blocks.iter().map(|b| b.failed).sum(),
            levels: Statistic::ALL.iter().filter_map(level).collect(),
            cpu: Cpu {
                gateway_request: mean(|c| c.gateway_request),
                gateway_exporter: mean(|c| c.gateway_exporter),
                engine_request: mean(|c| c.engine_request),
                engine_exporter: mean(|c| c.engine_exporter),
                client: mean(|c| c.client),
                receiver: mean(|c| c.receiver),
            },
            telemetry: blocks.iter().fold(Telemetry::default(), |sum, b| sum.plus(&b.telemetry)),
            estimates: Vec::new(),
        }
    }
}

/// An estimate on its way, with the moments that the adjustment needs.
struct Compared {
    estimate: Estimate,
    moments: Option<Moments>,
}

impl Compared {
    fn of(statistic: Statistic, blocks: &[&Block], off: &References<'_>, seed: u64, target: f64) -> Option<Compared> {
        let first = blocks.first()?;
        let values = |f: &dyn Fn(&Block) -> Option<f64>| -> Vec<f64> {
            pairs::by_round(blocks.iter().copied(), f).into_values().collect()
        };
        let logs = values(&|b| off.log_ratio(statistic, b));
        let differences = values(&|b| off.difference(statistic, b));
        let moments = Moments::of(&logs);
        let name = format!("overhead/bootstrap/{}/{}/{}", first.regime.name(), first.arm, statistic.name());
        let relative = |m: Moments| Relative {
            value: m.mean.exp_m1(),
            interval: m.interval(LEVEL).map(f64::exp_m1),
            bootstrap: bootstrap_t(&logs, &mut Seed(seed).stream(&name)).map(|i| i.map(f64::exp_m1)),
            p: m.p_value(),
        };
        let overhead = moments.map(relative);
        let estimated = |m: Moments| Estimated { value: m.mean, interval: m.interval(LEVEL) };
        let estimate = Estimate {
            statistic,
            n: differences.len(),
            overhead,
            difference: Moments::of(&differences).map(estimated),
            noise_floor: None,
            below_noise_floor: false,
            role: role(statistic, first, moments, target),
        };
        (estimate.n > 0).then_some(Compared { estimate, moments })
    }
}

/// What a comparison is for; secondary ones are adjusted later, when the family is known.
fn role(statistic: Statistic, block: &Block, moments: Option<Moments>, general: f64) -> Role {
    match Target::of(block.regime, &block.arm, general) {
        None => Role::Control,
        Some(_) if !statistic.is_primary(block.regime) => Role::Secondary(None),
        Some(target) => {
            let told = |m: Moments| {
                let (at, resolution) = (target.below.ln_1p(), m.resolution());
                Interval { low: (at - resolution).exp_m1(), high: (at + resolution).exp_m1() }
            };
            let interval = moments.map(|m| m.interval(LEVEL).map(f64::exp_m1));
            let verdict = Verdict::of(interval, target.below);
            Role::Primary(Judgement { target, verdict, could_tell: moments.map(told) })
        }
    }
}

/// Tells every estimate the noise floor of its statistic.
fn note_noise(arms: &mut [(ArmAnalysis, Vec<Compared>)]) {
    let control = arms.iter().filter(|(a, _)| a.arm == Arm::Control).flat_map(|(_, c)| c);
    let floors: BTreeMap<Statistic, f64> =
        control.filter_map(|c| Some((c.estimate.statistic, c.estimate.overhead?.interval.reach()))).collect();
    for compared in arms.iter_mut().flat_map(|(_, c)| c) {
        let estimate = &mut compared.estimate;
        estimate.noise_floor = floors.get(&estimate.statistic).copied();
        estimate.below_noise_floor =
            matches!((estimate.overhead, estimate.noise_floor), (Some(o), Some(floor)) if o.value.abs() < floor);
    }
}

/// Adjusts the secondary estimates of a regime; returns how many there are.
fn adjust(arms: &mut [(ArmAnalysis, Vec<Compared>)]) -> usize {
    let mut family: Vec<(&mut Estimate, Moments)> = arms
        .iter_mut()
        .flat_map(|(_, c)| c)
        .filter(|c| matches!(c.estimate.role, Role::Secondary(_)))
        .filter_map(|c| c.moments.map(|m| (&mut c.estimate, m)))
        .collect();
    let adjusted: Vec<Adjusted> = holm(&family.iter().map(|(_, m)| m.p_value()).collect::<Vec<_>>());
    for ((estimate, moments), Adjusted { p, level }) in family.iter_mut().zip(adjusted) {
        let interval = moments.interval(level).map(f64::exp_m1);
        estimate.role = Role::Secondary(Some(Adjustment { p, interval }));
    }
    family.len()
}

impl ShareOfEager {
    fn of(run: &Run, path: Path) -> Option<ShareOfEager> {
        let blocks = || run.blocks.iter().filter(|b| b.regime == Regime::Saturation);
        let references = References::new(blocks().filter(|b| b.arm == Arm::Off));
        let by_round = |path| {
            let arm = Arm::traced(path, 1.0);
            pairs::by_round(blocks().filter(|b| b.arm == arm), |b| references.difference(Statistic::GatewayCpu, b))
        };
        let (lean, eager) = (by_round(path), by_round(Path::Eager));
        let pairs: Vec<(f64, f64)> = lean.iter().filter_map(|(round, l)| Some((*l, *eager.get(round)?))).collect();
        let share = ratio_of_means(&pairs)?;
        Some(ShareOfEager { path, share, verdict: Verdict::of(share.interval, SHARE_OF_EAGER) })
    }
}

/// The arms of blocks, each once, in the order of reports.
fn arms(blocks: &[&Block]) -> Vec<Arm> {
    let mut arms: Vec<Arm> = Vec::new();
    for block in blocks {
        if !arms.contains(&block.arm) {
            arms.push(block.arm.clone());
        }
    }
    arms.sort_by(Arm::report_order);
    arms
}
