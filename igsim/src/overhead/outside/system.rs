//! The processes of a run: the system in each of its states, our engines behind it, the receiver beside it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use http::{HeaderMap, Uri};
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Dur;

use super::OutsideSpec;
use super::file::{OutsideArm, OutsideFile};
use super::fill::{self, Places};
use super::process::{self, Process, Program};
use super::tree::{self, Tree};
use crate::overhead::block::{self, Measured, Place};
use crate::overhead::cpu::{self, Reading, Ticks};
use crate::overhead::load::{LoadError, LoadSpec, Loader};
use crate::overhead::model::{Arm, Block, Cpu};
use crate::overhead::node::child::{Node, NodeError};
use crate::overhead::node::message::{Answer, Order, Role, Start};
use crate::overhead::place::{self, Placement};
use crate::overhead::receiver::Taken;
use crate::run::interrupt::Interrupt;
use crate::scenario::EngineGroup;
use crate::virtual_time::world::path_of;

const PROC: &str = "/proc";
/// The longest wait for an answer.
const TIMEOUT: Dur = Dur::from_secs(60);
/// What of a wait is spent looking at the clock, as in the lab's own regimes.
const SPIN: Dur = Dur::from_micros(80);

/// Why a system cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum OutsideError {
    /// One of our own processes does not do what it should.
    #[error(transparent)]
    Node(NodeError),
    /// The load cannot be sent.
    #[error(transparent)]
    Load(LoadError),
    /// The machine does not do what it should.
    #[error("{0}")]
    System(#[from] std::io::Error),
    /// A command cannot be run.
    #[error("`{arm}`: cannot run {command}: {error}")]
    Command {
        /// The arm.
        arm: String,
        /// The command, placeholders filled in.
        command: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// A process ended, or a switch failed.
    #[error("`{arm}`: {command} ended ({status}); all it said is in {log}{said}")]
    Ended {
        /// The arm.
        arm: String,
        /// The command.
        command: String,
        /// How.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The last of it.
        said: String,
    },
    /// It is never ready.
    #[error("`{arm}`: {what} within {seconds:.0} s; all it said is in {log}{said}")]
    NotReady {
        /// The arm.
        arm: String,
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: f64,
        /// Its log.
        log: PathBuf,
        /// The last of it.
        said: String,
    },
    /// It answers nothing that counts.
    #[error("`{arm}`: {failed} of {sent} requests failed before anything was measured; what it said is in {log}{said}")]
    Broken {
        /// The arm.
        arm: String,
        /// How many failed.
        failed: u64,
        /// How many were sent.
        sent: u64,
        /// Its log.
        log: PathBuf,
        /// The last of it.
        said: String,
    },
    /// A placeholder stands for nothing.
    #[error("`{arm}`: found {{{name}}}, which stands for nothing here")]
    Placeholder {
        /// The arm.
        arm: String,
        /// The name in braces.
        name: String,
    },
    /// The process whose CPU is read cannot be found.
    #[error("process: found no process for `{0}`, expected the name of one, or a file with its id")]
    NoProcess(String),
    /// The user does not want to wait.
    #[error("ended before the system was ready")]
    Interrupted,
}

/// Everything that runs. Dropping it ends what the lab started.
pub(super) struct System {
    clock: RunClock,
    file: OutsideFile,
    states: Vec<State>,
    // After the states: what is in front drains first.
    engine: Option<Node>,
    receiver: Node,
}

/// One arm.
struct State {
    arm: Arm,
    name: String,
    url: Uri,
    program: Program,
    /// For arms that are started.
    process: Option<Process>,
    loader: Loader,
}

/// What everything has used so far.
struct Moment {
    system: Tree,
    engine: Reading,
    receiver: Reading,
    client_nanos: u64,
    ticks: Ticks,
}

impl System {
    /// Starts everything, and waits until every arm that is started is ready.
    pub(super) fn start(
        spec: &OutsideSpec,
        clock: RunClock,
        placement: &Placement,
        interrupt: &Interrupt,
    ) -> Result<System, OutsideError> {
        let receiver = Node::start(&spec.binary, Role::Receiver, start_of(spec, placement))?;
        let engine = match spec.file.engines {
            0 => None,
            _ => Some(Node::start(&spec.binary, Role::Engine, start_of(spec, placement))?),
        };
        let receiver_at = receiver.urls().first().map(|url| url.trim_start_matches("http://").to_owned());
        let places = Places {
            ports: None,
            engines: engine.as_ref().map_or_else(Vec::new, |e| e.urls().to_vec()),
            receiver: receiver_at.unwrap_or_default(),
        };
        let mut system = System { clock, file: spec.file.clone(), states: Vec::new(), engine, receiver };
        for (index, arm) in spec.file.arms.iter().enumerate() {
            let ports = if spec.file.starts() { Some(process::free_ports()?) } else { None };
            let log = spec.logs.join(format!("arm-{index}.log"));
            let mut state = state(spec, arm, &Places { ports, ..places.clone() }, log, clock)?;
            if spec.file.starts() {
                place::run_on(&placement.gateway)?;
                let started = state.program.start();
                place::run_on(&placement.others)?;
                state.process = Some(started.map_err(|error| state.cannot(error))?);
                state.await_ready(&spec.file, clock, &|| interrupt.is_raised())?;
            }
            system.states.push(state);
        }
        Ok(system)
    }

    /// Measures one block.
    pub(super) async fn measure(&mut self, place: Place) -> Result<Measured, OutsideError> {
        let index = self.turn(&place.arm)?;
        self.served()?;
        self.take()?;
        let before = self.moment(index)?;
        let samples = self.states[index].loader.run(place.number).await?;
        tokio::time::sleep(self.file.settle.get().to_std()).await;
        let after = self.moment(index)?;
        let (own, taken) = (self.served()?, self.take()?);
        let mut block = block::summarise(&place, &samples, &own);
        block.steal = after.ticks.steal_since(&before.ticks);
        block.cpu = after.cpu_since(&before, block.answered);
        block.peak_rss_kib = after.system.peak_kib(Path::new(PROC));
        block.telemetry.receiver_requests = taken.requests;
        block.telemetry.receiver_bytes = taken.bytes;
        self.states[index].lives()?;
        let latencies = samples.iter().filter(|s| s.ok()).map(|s| s.e2e().as_micros_f64()).collect();
        Ok(Measured { block, mark: taken.mark, latencies })
    }

    /// That most requests of a block before the first round were answered.
    pub(super) fn answers(&self, block: &Block) -> Result<(), OutsideError> {
        let state = self.states.iter().find(|s| s.arm == block.arm);
        match state.filter(|_| block.failed > block.answered) {
            Some(state) => Err(OutsideError::Broken {
                arm: state.name.clone(),
                failed: block.failed,
                sent: block.failed + block.answered,
                log: state.program.log.clone(),
                said: process::tail(&state.program.log),
            }),
            None => Ok(()),
        }
    }

    /// Decodes what the receiver kept and tells each block how many spans came in it: all that is known of them.
    pub(super) fn count_received(&mut self, measured: &mut [Measured]) -> Result<(), OutsideError> {
        let decoded = match self.receiver.ask(&Order::Decode)? {
            Answer::Decoded(decoded) => decoded,
            other => return Err(self.receiver.unexpected(&other).into()),
        };
        for one in measured {
            let spans = decoded.marks.get(&one.mark).map_or(0, |m| m.spans);
            let telemetry = &mut one.block.telemetry;
            (telemetry.spans, telemetry.exported, telemetry.receiver_spans) = (spans, spans, spans);
        }
        Ok(())
    }

    /// Brings the system into the state of `arm`; where in the list it is.
    fn turn(&mut self, arm: &Arm) -> Result<usize, OutsideError> {
        if let Some(engine) = &mut self.engine {
            engine.order(&Order::Reset)?;
        }
        let unknown = || std::io::Error::other(format!("no arm is called `{arm}`"));
        let index = self.states.iter().position(|s| s.arm == *arm).ok_or_else(unknown)?;
        let state = &mut self.states[index];
        state.lives()?;
        if !self.file.starts() {
            state.switch(&self.file, self.clock)?;
        }
        Ok(index)
    }

    /// The processes whose CPU is the system's.
    fn roots(&self, index: usize) -> Result<Vec<u32>, OutsideError> {
        let (Some(name), None) = (&self.file.process, &self.states[index].process) else {
            return Ok(self.states[index].process.iter().map(Process::pid).collect());
        };
        let found = if name.contains('/') {
            let text = std::fs::read_to_string(name).unwrap_or_default();
            text.trim().parse().ok().into_iter().collect()
        } else {
            tree::named(Path::new(PROC), name)?
        };
        if found.is_empty() { Err(OutsideError::NoProcess(name.clone())) } else { Ok(found) }
    }

    fn moment(&mut self, index: usize) -> Result<Moment, OutsideError> {
        let proc = Path::new(PROC);
        let roots = self.roots(index)?;
        let engine = self.engine.as_mut().map(reading).transpose()?.unwrap_or_default();
        let receiver = reading(&mut self.receiver)?;
        self.states[index].lives()?;
        let system = Tree::read(proc, &roots)?;
        Ok(Moment { system, engine, receiver, client_nanos: cpu::of_this_process(), ticks: Ticks::read(proc)? })
    }

    /// How long our engines took to begin each answer; empty if the system keeps the client's request id to itself.
    fn served(&mut self) -> Result<HashMap<String, Dur>, OutsideError> {
        let Some(engine) = &mut self.engine else { return Ok(HashMap::new()) };
        match engine.ask(&Order::Served)? {
            Answer::Served(all) => Ok(all.into_iter().map(|(id, nanos)| (id, Dur::from_nanos(nanos))).collect()),
            other => Err(engine.unexpected(&other).into()),
        }
    }

    fn take(&mut self) -> Result<Taken, OutsideError> {
        match self.receiver.ask(&Order::Take)? {
            Answer::Taken(taken) => Ok(taken),
            other => Err(self.receiver.unexpected(&other).into()),
        }
    }
}

/// What one of our own processes has used so far.
fn reading(node: &mut Node) -> Result<Reading, OutsideError> {
    let counters = node.counters()?;
    Ok(cpu::read(Path::new(PROC), node.pid(), counters.cpu_nanos)?)
}

/// What our own processes are told first. Engines answer at once and record nothing.
fn start_of(spec: &OutsideSpec, placement: &Placement) -> Start {
    let mut scenario = spec.scenario.clone();
    let model = Some(spec.file.model.clone());
    scenario.engines = vec![EngineGroup { model, ..EngineGroup::of(spec.file.engines.max(1), "instant") }];
    Start {
        cpus: placement.others.clone(),
        scenario: Box::new(scenario),
        engines: Vec::new(),
        spans_to: String::new(),
        schedule_delay_ms: spec.file.settle.get().as_millis_f64(),
        stored_bytes: 0,
    }
}

/// An arm with its placeholders filled in; nothing runs yet.
fn state(
    spec: &OutsideSpec,
    arm: &OutsideArm,
    places: &Places,
    log: PathBuf,
    clock: RunClock,
) -> Result<State, OutsideError> {
    let file = &spec.file;
    let bad = |name| OutsideError::Placeholder { arm: arm.name.clone(), name };
    let command = if file.starts() { file.command(arm) } else { arm.switch.clone() };
    let arguments = fill::arguments(&command, places).map_err(bad)?;
    let fill_value = |(key, value): (String, String)| Ok((key, fill::text(&value, places)?));
    let environment = file.environment(arm).into_iter().map(fill_value).collect::<Result<_, _>>().map_err(bad)?;
    let base = fill::text(file.url(arm), places).map_err(bad)?;
    let url = |text: &str| text.parse::<Uri>().map_err(|e| std::io::Error::other(format!("{text}: {e}")));
    let load = LoadSpec {
        uri: url(&format!("{}{}", base.trim_end_matches('/'), path_of(file.api)))?,
        api: file.api,
        model: file.model.clone(),
        headers: HeaderMap::new(),
        pattern: file.pattern(),
        timeout: TIMEOUT,
        spin: SPIN,
        seed: Seed(spec.seed),
    };
    Ok(State {
        arm: arm.arm(),
        name: arm.name.clone(),
        url: url(&base)?,
        program: Program { arguments, environment, log },
        process: None,
        loader: Loader::new(clock, load)?,
    })
}

impl State {
    /// Waits until it answers as a system does that is ready.
    fn await_ready(
        &mut self,
        file: &OutsideFile,
        clock: RunClock,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), OutsideError> {
        let (url, path, contains) = (self.url.clone(), file.ready.as_str(), file.ready_contains.as_deref());
        let bound = file.ready_within.get();
        let mut ended = false;
        let ready = process::poll(clock, bound, || {
            ended = stop() || self.process.as_mut().is_some_and(|p| p.ended().is_some());
            let ready = !ended && process::is_ready(&url, path, contains);
            (ended || ready).then_some(ready)
        });
        self.lives()?;
        if ready {
            return Ok(());
        }
        if ended {
            return Err(OutsideError::Interrupted);
        }
        let with = contains.map_or_else(String::new, |text| format!(" with `{text}` in the answer"));
        Err(self.late(
            format!("GET {}{path} was not answered well{with}", self.url.to_string().trim_end_matches('/')),
            bound,
        ))
    }

    /// Runs the command that brings the system into this state, and waits until it is ready again.
    fn switch(&mut self, file: &OutsideFile, clock: RunClock) -> Result<(), OutsideError> {
        let mut running = self.program.start().map_err(|error| self.cannot(error))?;
        let bound = file.ready_within.get();
        match running.wait(clock, bound) {
            Some(status) if status.success() => running.release(),
            Some(status) => return Err(self.ended(status.to_string())),
            None => return Err(self.late(format!("{} did not end", self.program.words()), bound)),
        }
        self.await_ready(file, clock, &|| false)
    }

    /// That its process has not ended.
    fn lives(&mut self) -> Result<(), OutsideError> {
        match self.process.as_mut().and_then(Process::ended) {
            Some(status) => Err(self.ended(status.to_string())),
            None => Ok(()),
        }
    }

    fn cannot(&self, error: std::io::Error) -> OutsideError {
        OutsideError::Command { arm: self.name.clone(), command: self.program.words(), error }
    }

    fn ended(&self, status: String) -> OutsideError {
        let (arm, log) = (self.name.clone(), self.program.log.clone());
        OutsideError::Ended { arm, command: self.program.words(), status, said: process::tail(&log), log }
    }

    fn late(&self, what: String, bound: Dur) -> OutsideError {
        let (arm, log) = (self.name.clone(), self.program.log.clone());
        OutsideError::NotReady { arm, what, seconds: bound.as_secs_f64(), said: process::tail(&log), log }
    }
}

impl Moment {
    /// CPU time per answered request since `before`, in microseconds.
    fn cpu_since(&self, before: &Moment, answered: u64) -> Cpu {
        let each = |nanos: u64| nanos as f64 / 1_000.0 / answered.max(1) as f64;
        let system = self.system.since(&before.system);
        let engine = cpu::between(&before.engine, &self.engine);
        let receiver = cpu::between(&before.receiver, &self.receiver);
        Cpu {
            gateway_request: each(system.request),
            gateway_exporter: each(system.exporter),
            engine_request: each(engine.request),
            engine_exporter: each(engine.exporter),
            client: each(self.client_nanos.saturating_sub(before.client_nanos)),
            receiver: each(receiver.request + receiver.exporter),
        }
    }
}
