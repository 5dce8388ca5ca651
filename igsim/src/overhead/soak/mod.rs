//! The soak: one load for minutes, and whether anything fails, grows or gets lost.
//!
//! The same processes as in the lab, not pinned, engines that answer at once, Poisson arrivals. Judged are errors, the rate, and
//! that every sampled trace is whole at the receiver; memory is reported with its growth.

mod report;
mod slope;
mod tally;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use http::HeaderMap;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Dur, Time};

use super::bench;
use super::cpu::{self, Ticks};
use super::fleet::{Fleet, FleetError, FleetSpec, Moment};
use super::load::{Lengths, LoadError, LoadSpec, Loader, Pattern};
use super::model::{Arm, Path, Regime};
use super::node::child::NodeError;
use super::place::{self, Placement};
use super::receiver::Limits;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;
use crate::virtual_time::world::path_of;

pub use report::{Memory, Received, Requests, SoakReport, Spans};
pub use slope::Slope;
use tally::Tally;

/// Prompt and answer of a request: short, because what is tested is the number of requests and traces. Prompts are long enough
/// that a thousand a second fill the gateway's index of prefixes (31,250 blocks of 64 tokens an engine) in the warm-up: four
/// blocks a request fill those of four engines in half a minute.
const LENGTHS: Lengths = Lengths { prompt: 256, output: 8 };
/// The longest wait for an answer.
const TIMEOUT: Dur = Dur::from_secs(30);
/// The longest wait for the acknowledgement of the last spans.
const FLUSH: Dur = Dur::from_secs(30);
/// The longest time that a span waits for its batch, in milliseconds: the default of the product.
const SCHEDULE_DELAY_MS: f64 = 1_000.0;
/// How often memory is looked at.
const EVERY: Dur = Dur::from_secs(1);

/// What to run.
#[derive(Clone, Debug)]
pub struct SoakSpec {
    /// The program whose hidden command the processes are.
    pub binary: PathBuf,
    /// The fleet; its engines answer at once here.
    pub scenario: Scenario,
    /// Requests per second.
    pub rate: f64,
    /// How long.
    pub duration: Dur,
    /// Recorder and encoder.
    pub path: Path,
    /// Share of traces kept, 0 to 1.
    pub ratio: f64,
    /// Seed of arrivals and prompts.
    pub seed: u64,
}

/// How it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Since the start.
    pub elapsed: Dur,
    /// Requests that ended.
    pub ended: u64,
    /// Of these, requests that failed.
    pub failed: u64,
    /// The gateway's resident memory in KiB.
    pub gateway_kib: u64,
    /// The engines' resident memory in KiB.
    pub engine_kib: u64,
}

/// Why a soak cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SoakError {
    /// A process does not do what it should.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The load cannot be sent.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The system does not do what it should.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

impl From<NodeError> for SoakError {
    fn from(error: NodeError) -> SoakError {
        SoakError::Fleet(error.into())
    }
}

/// Runs a soak to its end, or until the user wants it to end; `tell` is called every second.
///
/// # Errors
/// If a process fails or the load cannot be sent. What goes wrong with requests or spans is in the report.
///
/// # Panics
/// If the load thread did.
pub fn run(spec: &SoakSpec, interrupt: &Interrupt, tell: &mut dyn FnMut(Glance)) -> Result<SoakReport, SoakError> {
    let clock = RunClock::start();
    let scenario = bench::fleet_of(Regime::Saturation, &spec.scenario);
    let mut fleet = Fleet::start(&FleetSpec {
        binary: spec.binary.clone(),
        scenario: scenario.clone(),
        placement: Placement::anywhere(&place::allowed_cpus()?),
        schedule_delay_ms: SCHEDULE_DELAY_MS,
        stored_bytes: Limits::default().storage,
    })?;
    let loader = Loader::new(clock, load(spec, &scenario, &fleet))?;
    fleet.prepare(&Arm::traced(spec.path, spec.ratio))?;
    let before = fleet.moment()?;
    let mut soak = Soak { fleet, clock, tally: Mutex::default(), memory: Series::default(), not_kept: 0 };
    soak.watch(&loader, interrupt, tell)?;
    soak.settle(spec, &before, interrupt.is_raised())
}

fn load(spec: &SoakSpec, scenario: &Scenario, fleet: &Fleet) -> LoadSpec {
    let api = scenario.workload.api;
    let requests = (spec.rate * spec.duration.as_secs_f64()).round() as u64;
    LoadSpec {
        uri: fleet.uri(path_of(api)),
        api,
        model: scenario.model(),
        headers: HeaderMap::new(),
        pattern: Pattern::Poisson { per_second: spec.rate, requests, lengths: LENGTHS },
        timeout: TIMEOUT,
        spin: Dur::ZERO,
        seed: Seed(spec.seed),
    }
}

/// A soak while it runs.
struct Soak {
    fleet: Fleet,
    clock: RunClock,
    tally: Mutex<Tally>,
    memory: Series,
    not_kept: u64,
}

/// Seconds since the start and KiB.
#[derive(Debug, Default)]
struct Series {
    gateway: Vec<(f64, u64)>,
    engine: Vec<(f64, u64)>,
}

/// Ends the load when whoever watches it leaves, for whatever reason.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Soak {
    /// Sends the load and looks at memory meanwhile.
    fn watch(&mut self, loader: &Loader, interrupt: &Interrupt, tell: &mut dyn FnMut(Glance)) -> Result<(), SoakError> {
        let (stop, tally) = (AtomicBool::new(false), std::mem::take(&mut self.tally));
        let (done, ended) = channel::<()>();
        let watched = std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            let sending = || {
                // Dropped when the thread ends, also by a panic: that is what says so.
                let _done = done;
                loader.stream(0, &stop, &mut |sample| lock(&tally).add(&sample));
            };
            std::thread::Builder::new().name("load".to_owned()).spawn_scoped(scope, sending)?;
            self.look_on(&tally, &ended, interrupt, tell)
        });
        self.tally = tally;
        watched
    }

    /// Looks every second until the load has ended or the user wants the end.
    fn look_on(
        &mut self,
        tally: &Mutex<Tally>,
        ended: &Receiver<()>,
        interrupt: &Interrupt,
        tell: &mut dyn FnMut(Glance),
    ) -> Result<(), SoakError> {
        let start = self.clock.now();
        let mut next = start;
        while !interrupt.is_raised() {
            self.look(tally, start, tell)?;
            next += EVERY;
            match ended.recv_timeout(next.since(self.clock.now()).to_std()) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(())
    }

    fn look(&mut self, tally: &Mutex<Tally>, start: Time, tell: &mut dyn FnMut(Glance)) -> Result<(), SoakError> {
        let (gateway, engine) = self.fleet.pids();
        let proc = std::path::Path::new("/proc");
        let (gateway_kib, engine_kib) = (cpu::rss_kib(proc, gateway)?, cpu::rss_kib(proc, engine)?);
        let elapsed = self.clock.now().since(start);
        self.memory.gateway.push((elapsed.as_secs_f64(), gateway_kib));
        self.memory.engine.push((elapsed.as_secs_f64(), engine_kib));
        // What the lab itself collects in these processes must not grow with the time.
        self.fleet.served()?;
        self.not_kept += self.fleet.take()?.not_kept;
        let (ended, failed) = lock(tally).ended();
        tell(Glance { elapsed, ended, failed, gateway_kib, engine_kib });
        Ok(())
    }

    /// Waits for the last spans and puts everything together.
    fn settle(mut self, spec: &SoakSpec, before: &Moment, interrupted: bool) -> Result<SoakReport, SoakError> {
        let settled = self.fleet.flush(FLUSH)?;
        let after = self.fleet.moment()?;
        self.not_kept += self.fleet.take()?.not_kept;
        let marked = self.fleet.decode()?.total();
        let tally = self.tally.into_inner().unwrap_or_else(PoisonError::into_inner);
        let peak = |pid| cpu::peak_rss_kib(std::path::Path::new("/proc"), pid);
        let (gateway, engine) = self.fleet.pids();
        Ok(SoakReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: place::machine(),
            path: spec.path,
            ratio: spec.ratio,
            seed: spec.seed,
            rate: spec.rate,
            duration: spec.duration.as_secs_f64(),
            interrupted,
            steal: steal(&before.ticks, &after.ticks),
            requests: tally.requests(),
            spans: Spans::of(before, &after, settled),
            received: Received { marked, not_kept: self.not_kept },
            memory: vec![
                Memory::of("gateway", &self.memory.gateway, peak(gateway)?),
                Memory::of("engines", &self.memory.engine, peak(engine)?),
            ],
        })
    }
}

fn steal(before: &Ticks, after: &Ticks) -> f64 {
    after.steal_since(before)
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}
