//! Runs the lab: regime after regime, round after round, block after block; keeps the raw figures and judges nothing.

use std::path::PathBuf;

use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Time;
use tokio::runtime::Runtime;

use super::awake::Awake;
use super::bench::{self, Amount, Bench, BenchError};
use super::block::{self, BlockError, Measured, Place};
use super::distribution::{Distribution, Distributions};
use super::fleet::{Fleet, FleetError, FleetSpec};
use super::load::{LoadError, Loader};
use super::model::{Arm, Block, Machine, Regime, Run, Setting};
use super::node::child::NodeError;
use super::place::{self, Placement};
use super::plan::RegimePlan;
use super::probe::{MAX_SLOWDOWN, Probe};
use super::receiver::Limits;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;

/// A block with a larger share of stolen time is repeated.
const MAX_STEAL: f64 = 0.01;
/// How often at most: a machine that is always stolen from is measured all the same, and its blocks say so.
const MAX_REPEATS: u32 = 3;
/// The longest time that a span waits for its batch, as a share of a block.
const DELAY_SHARE: f64 = 0.1;
/// Points of a latency distribution in reports.
const POINTS: usize = 400;

/// What to run.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// The program whose hidden command the processes are.
    pub binary: PathBuf,
    /// The fleet and its load.
    pub scenario: Scenario,
    /// The regimes.
    pub plans: Vec<RegimePlan>,
    /// Decides the order of arms; the load follows the scenario's own.
    pub seed: u64,
    /// The command line, for the record.
    pub command: String,
    /// How much of the load is fixed.
    pub amount: Amount,
    /// Share of the median latency by which arms with a real delay are held back.
    pub delay_share: f64,
}

/// What a run leaves behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Blocks and what is needed to read them.
    pub run: Run,
    /// Latencies end to end.
    pub distributions: Distributions,
    /// Whether the user ended it; then it has whole rounds only.
    pub interrupted: bool,
}

/// Why the lab cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A process does not do what it should.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// A load cannot be found.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// A block cannot be measured.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The system does not do what it should.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

impl From<NodeError> for LabError {
    fn from(error: NodeError) -> LabError {
        LabError::Fleet(error.into())
    }
}

impl From<LoadError> for LabError {
    fn from(error: LoadError) -> LabError {
        LabError::Bench(error.into())
    }
}

/// What is told while the lab runs.
pub trait Progress {
    /// A regime begins.
    fn regime(&mut self, setting: &Setting);
    /// A block is done, the last of its regime or not.
    fn block(&mut self, block: &Block, rounds: u32, last: bool);
}

/// Runs everything that `spec` asks for, or as much as the user waits for.
///
/// # Errors
/// If a process fails, or the machine does not allow what is needed.
pub fn run(spec: &LabSpec, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Outcome, LabError> {
    let cpus = place::allowed_cpus()?;
    let clock = RunClock::start();
    let awake = Awake::hold();
    let run = blank(&spec.command, spec.seed, clock, &awake);
    let mut outcome = Outcome { run, distributions: Vec::new(), interrupted: false };
    for plan in &spec.plans {
        if interrupt.is_raised() {
            outcome.interrupted = true;
            break;
        }
        let placement = Placement::of(&cpus, plan.regime);
        place::run_on(&placement.others)?;
        let lab = Lab::new(spec, plan, clock, placement);
        let done = lab.and_then(|mut lab| lab.run(interrupt, Probe::new(cpus.clone()), progress));
        place::run_on(&cpus)?;
        done?.add_to(&mut outcome, plan);
    }
    Ok(outcome)
}

/// A run that begins now and has no blocks yet.
pub(super) fn blank(command: &str, seed: u64, clock: RunClock, awake: &Awake) -> Run {
    Run {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: command.to_owned(),
        seed,
        began: clock.anchor().unix_nanos(Time::ZERO) / 1_000_000_000,
        machine: Machine { awake: awake.is_held(), ..place::machine() },
        settings: Vec::new(),
        blocks: Vec::new(),
    }
}

/// One regime while it runs.
struct Lab<'a> {
    spec: &'a LabSpec,
    plan: &'a RegimePlan,
    clock: RunClock,
    runtime: Runtime,
    fleet: Fleet,
    setting: Setting,
    /// The number of the next block: prompts are salted with it.
    number: u64,
}

/// What one regime came to.
pub(super) struct Done {
    pub(super) setting: Setting,
    pub(super) measured: Vec<Measured>,
    pub(super) interrupted: bool,
}

/// A block during which the hypervisor took next to nothing and no CPU was slow, if there is one to be had; nothing if the user
/// wants the end.
pub(super) fn undisturbed<E>(
    interrupt: &Interrupt,
    probe: &mut Probe,
    mut measure: impl FnMut() -> Result<Measured, E>,
) -> Result<Option<Measured>, E> {
    for repeated in 0.. {
        if interrupt.is_raised() {
            break;
        }
        let before = probe.slowdown();
        let mut measured = measure()?;
        let slow = before.max(probe.slowdown()) > MAX_SLOWDOWN;
        if (measured.block.steal <= MAX_STEAL && !slow) || repeated == MAX_REPEATS {
            measured.block.repeated = repeated;
            return Ok(Some(measured));
        }
    }
    Ok(None)
}

impl<'a> Lab<'a> {
    fn new(spec: &'a LabSpec, plan: &'a RegimePlan, clock: RunClock, place: Placement) -> Result<Lab<'a>, LabError> {
        let schedule_delay_ms = plan.block.as_millis_f64() * DELAY_SHARE;
        let setting = Setting {
            regime: plan.regime,
            requests: 0,
            load: String::new(),
            placement: place.describe(),
            schedule_delay_ms,
            rounds: 0,
            left_out: plan.left_out.iter().map(ToString::to_string).collect(),
        };
        let scenario = bench::fleet_of(plan.regime, &spec.scenario);
        let stored_bytes = match plan.regime {
            Regime::Realistic | Regime::Floor | Regime::FloorUnpinned => Limits::default().storage,
            // Gigabytes a minute: to store them would be the machine's main work.
            Regime::Saturation => 0,
        };
        let binary = spec.binary.clone();
        let fleet = FleetSpec { binary, scenario, placement: place, schedule_delay_ms, stored_bytes };
        let fleet = Fleet::start(&fleet)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Lab { spec, plan, clock, runtime, fleet, setting, number: 0 })
    }

    fn run(&mut self, interrupt: &Interrupt, mut probe: Probe, progress: &mut dyn Progress) -> Result<Done, LabError> {
        let Lab { spec, plan, clock, .. } = *self;
        self.fleet.prepare(&Arm::Off)?;
        let tuned = bench::tune(plan.regime, &self.fleet, &spec.scenario, clock, plan.block, spec.amount);
        let Bench { scenario, pattern, words } = self.runtime.block_on(tuned)?;
        self.setting.requests = pattern.requests();
        self.setting.load = words;
        progress.regime(&self.setting);
        let warm = bench::loader(&self.fleet, &scenario, clock, bench::warm_up(plan.regime))?;
        for arm in self.plan.arms.iter().filter(|arm| !matches!(arm, Arm::Delayed { .. })) {
            self.measure(&warm, Place { arm: arm.clone(), ..self.warm_place() })?;
        }
        let loader = bench::loader(&self.fleet, &scenario, clock, pattern)?;
        let median = self.measure(&loader, self.warm_place())?.block.e2e.p50;
        let order: Vec<_> =
            plan.order(Seed(spec.seed)).into_iter().map(|(r, arm)| (r, self.delayed(arm, median))).collect();
        let mut done = Done { setting: self.setting.clone(), measured: Vec::new(), interrupted: false };
        let blocks = order.len();
        for (place, (round, arm)) in order.into_iter().enumerate() {
            let last = place + 1 == blocks;
            let place = Place { regime: plan.regime, round, place: place as u32, arm, number: 0 };
            let Some(measured) = undisturbed(interrupt, &mut probe, || self.measure(&loader, place.clone()))? else {
                done.interrupted = true;
                break;
            };
            progress.block(&measured.block, plan.rounds, last);
            done.measured.push(measured);
        }
        done.keep_whole_rounds(plan);
        self.count_received(&mut done.measured)?;
        Ok(done)
    }

    fn warm_place(&self) -> Place {
        Place { regime: self.plan.regime, round: 0, place: 0, arm: Arm::Off, number: 0 }
    }

    fn delayed(&self, arm: Arm, median: f64) -> Arm {
        match arm {
            Arm::Delayed { .. } => Arm::Delayed { us: median * self.spec.delay_share },
            Arm::Off | Arm::Control | Arm::Traced { .. } | Arm::Outside { .. } => arm,
        }
    }

    fn measure(&mut self, loader: &Loader, place: Place) -> Result<Measured, LabError> {
        self.number += 1;
        let place = Place { number: self.number, ..place };
        Ok(self.runtime.block_on(block::measure(&mut self.fleet, loader, place))?)
    }

    /// Decodes what the receiver kept and tells each block how many spans came in it.
    fn count_received(&mut self, measured: &mut [Measured]) -> Result<(), LabError> {
        let decoded = self.fleet.decode()?;
        for one in measured {
            one.block.telemetry.receiver_spans = decoded.marks.get(&one.mark).map_or(0, |m| m.spans);
        }
        Ok(())
    }
}

impl Done {
    /// Drops the blocks of a round that did not end.
    pub(super) fn keep_whole_rounds(&mut self, plan: &RegimePlan) {
        let blocks = plan.blocks_per_round();
        let whole = (self.measured.len() / blocks.max(1)) as u32;
        // An `off` block that began the next round stands behind the last whole one, and is its reference.
        let reference = self.measured.get(whole as usize * blocks).is_some_and(|m| m.block.arm == Arm::Off);
        self.measured.truncate(whole as usize * blocks + usize::from(reference && whole > 0));
        if let Some(last) = whole.checked_sub(1) {
            self.measured.iter_mut().for_each(|m| m.block.round = m.block.round.min(last));
        }
        self.setting.rounds = whole;
    }

    /// Adds its blocks, distributions and setting to those of the run.
    pub(super) fn add_to(self, outcome: &mut Outcome, plan: &RegimePlan) {
        let mut arms: Vec<(Arm, Vec<f64>)> = Vec::new();
        for Measured { block, latencies, .. } in self.measured {
            match arms.iter_mut().find(|(arm, _)| *arm == block.arm) {
                Some((_, all)) => all.extend(latencies),
                None => arms.push((block.arm.clone(), latencies)),
            }
            outcome.run.blocks.push(block);
        }
        let regime = plan.regime;
        let distribution = |(arm, micros)| Distribution::of(regime, arm, micros, POINTS);
        outcome.distributions.extend(arms.into_iter().map(distribution));
        outcome.run.settings.push(self.setting);
        outcome.interrupted |= self.interrupted;
    }
}
