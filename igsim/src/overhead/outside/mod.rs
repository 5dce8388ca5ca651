//! The lab in front of a system that is not ours: the same blocks, `off` blocks beside them and statistics; other processes.
//!
//! What differs: nobody there takes orders. A block does not flush, it waits a fixed time for late spans, in every arm; and what
//! became of spans is what the receiver saw.

pub mod file;
mod fill;
mod process;
mod system;
mod tree;

use std::path::PathBuf;

use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Dur;
use tokio::runtime::Runtime;

use super::awake::Awake;
use super::block::{Measured, Place};
use super::lab::{self, Done, Outcome, Progress};
use super::load::LoadError;
use super::model::{Arm, Regime, Setting};
use super::node::child::NodeError;
use super::place::{self, Placement};
use super::plan::{self, RegimePlan};
use super::probe::Probe;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;
use file::OutsideFile;
pub use system::OutsideError;
use system::System;

/// What to run.
#[derive(Clone, Debug)]
pub struct OutsideSpec {
    /// The program whose hidden command the engines and the receiver are.
    pub binary: PathBuf,
    /// The system.
    pub file: OutsideFile,
    /// What our engines are made from; their profile, model and number are the file's.
    pub scenario: Scenario,
    /// Rounds.
    pub rounds: u32,
    /// Decides the order of arms and the text of prompts.
    pub seed: u64,
    /// Arms are left out, the last of the file first, until the run takes no longer.
    pub budget: Option<Dur>,
    /// The command line, for the record.
    pub command: String,
    /// The folder for what the processes say.
    pub logs: PathBuf,
}

impl From<LoadError> for OutsideError {
    fn from(error: LoadError) -> OutsideError {
        OutsideError::Load(error)
    }
}

impl From<NodeError> for OutsideError {
    fn from(error: NodeError) -> OutsideError {
        OutsideError::Node(error)
    }
}

/// Measures the system, for as long as the user waits.
///
/// # Errors
/// If a process fails, is never ready, or answers nothing.
pub fn run(spec: &OutsideSpec, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Outcome, OutsideError> {
    let cpus = place::allowed_cpus()?;
    let clock = RunClock::start();
    let awake = Awake::hold();
    let run = lab::blank(&spec.command, spec.seed, clock, &awake);
    let mut outcome = Outcome { run, distributions: Vec::new(), interrupted: false };
    let placement = Placement::of(&cpus, spec.file.regime());
    place::run_on(&placement.others)?;
    let mut plan = plan_of(spec);
    let bench = Bench::new(spec, clock, &placement, interrupt);
    let done = bench.and_then(|mut bench| bench.run(&mut plan, interrupt, Probe::new(cpus.clone()), progress));
    place::run_on(&cpus)?;
    done?.add_to(&mut outcome, &plan);
    Ok(outcome)
}

/// Every arm but `off`, which the order of blocks brings in; the length of a block is not known yet.
fn plan_of(spec: &OutsideSpec) -> RegimePlan {
    let arms = spec.file.arms.iter().map(file::OutsideArm::arm).filter(|arm| *arm != Arm::Off).collect();
    let (regime, rounds) = (spec.file.regime(), spec.rounds);
    RegimePlan { regime, arms, left_out: Vec::new(), rounds, block: Dur::ZERO }
}

/// The system while it is measured.
struct Bench<'a> {
    spec: &'a OutsideSpec,
    runtime: Runtime,
    system: System,
    setting: Setting,
    /// The number of the next block: prompts are salted with it.
    number: u64,
}

impl<'a> Bench<'a> {
    fn new(
        spec: &'a OutsideSpec,
        clock: RunClock,
        placement: &Placement,
        interrupt: &Interrupt,
    ) -> Result<Bench<'a>, OutsideError> {
        let system = System::start(spec, clock, placement, interrupt)?;
        let switched = if spec.file.starts() { "" } else { "; the system was running and was not placed by the lab" };
        let setting = Setting {
            regime: spec.file.regime(),
            requests: spec.file.requests,
            load: spec.file.words(),
            placement: placement.describe() + switched,
            schedule_delay_ms: spec.file.settle.get().as_millis_f64(),
            rounds: 0,
            left_out: Vec::new(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Bench { spec, runtime, system, setting, number: 0 })
    }

    fn run(
        &mut self,
        plan: &mut RegimePlan,
        interrupt: &Interrupt,
        mut probe: Probe,
        progress: &mut dyn Progress,
    ) -> Result<Done, OutsideError> {
        let arms: Vec<Arm> = self.spec.file.arms.iter().map(file::OutsideArm::arm).collect();
        // Twice: once to touch everything, and once to see how long a block takes and that every arm answers.
        for arm in arms.iter().chain(&arms).filter(|_| !interrupt.is_raised()) {
            let measured = self.measure(&warm_place(plan.regime, arm))?;
            self.system.answers(&measured.block)?;
            plan.block = plan.block.max(Dur::from_secs_f64(measured.block.seconds) + self.spec.file.settle.get());
        }
        if let Some(budget) = self.spec.budget {
            plan::fit(std::slice::from_mut(plan), budget);
        }
        self.setting.left_out = plan.left_out.iter().map(ToString::to_string).collect();
        progress.regime(&self.setting);
        let order = plan.order(Seed(self.spec.seed));
        let mut done = Done { setting: self.setting.clone(), measured: Vec::new(), interrupted: false };
        let blocks = order.len();
        for (place, (round, arm)) in order.into_iter().enumerate() {
            let place = Place { regime: plan.regime, round, place: place as u32, arm, number: 0 };
            let Some(measured) = lab::undisturbed(interrupt, &mut probe, || self.measure(&place))? else {
                done.interrupted = true;
                break;
            };
            progress.block(&measured.block, plan.rounds, place.place as usize + 1 == blocks);
            done.measured.push(measured);
        }
        done.keep_whole_rounds(plan);
        self.system.count_received(&mut done.measured)?;
        Ok(done)
    }

    fn measure(&mut self, place: &Place) -> Result<Measured, OutsideError> {
        self.number += 1;
        let place = Place { number: self.number, ..place.clone() };
        self.runtime.block_on(self.system.measure(place))
    }
}

fn warm_place(regime: Regime, arm: &Arm) -> Place {
    Place { regime, round: 0, place: 0, arm: arm.clone(), number: 0 }
}

#[cfg(test)]
mod tests;
