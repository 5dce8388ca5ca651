//! `igsim run`.

mod finish;

use std::path::Path;

use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::Telemetry;
use shared::trace::config::{ExporterConfig, OtlpConfig};

use super::{Failure, Format, RunArgs};
use crate::inspect::TRACES_FILE;
use crate::live::running::{HEADERS_VARIABLE, Running};
use crate::live::stack::StackError;
use crate::live::{self, Ended, Own};
use crate::report::{RequestRow, seen_by_the_client};
use crate::run::collect::Collector;
use crate::run::interrupt::Interrupt;
use crate::run::output::{Output, SCENARIO_FILE, print};
use crate::run::progress::Progress;
use crate::run::telemetry::{Resolved, resolve};
use crate::scenario::{self, Mode, Scenario};
use crate::virtual_time::{self, Observer};
use crate::workload::Plan;

/// Who answers the requests.
enum Answering {
    /// The scenario's gateway and engines, in the mode it says.
    Own(Resolved),
    /// A gateway that runs already.
    Running(Running),
}

/// What a driver hands back.
struct Driven {
    ended: Ended,
    answered: Answered,
}

/// What is known of those who answered.
enum Answered {
    /// Gateway and engines of this run.
    Own {
        own: Box<Own>,
        ratio: f64,
        /// Who gets the traces when all is over.
        remote: Vec<OtlpConfig>,
    },
    /// The address of a gateway that ran already.
    Running(String),
}

pub(super) fn run(args: RunArgs) -> Result<(), Failure> {
    let scenario = load(&args)?;
    let wall = RunClock::start();
    let plan = Plan::new(&scenario, Seed(scenario.seed)).map_err(Failure::input)?;
    // Whatever may be wrong with the input, and a gateway that is not there, is known before a folder is made.
    let answering = match &args.gateway {
        None => Answering::Own(telemetry(&args, &scenario)?),
        Some(url) => Answering::Running(running(url, &args, &scenario)?),
    };
    let output = match &args.out {
        Some(dir) => Output::open(dir, args.overwrite),
        None => Output::fresh(Path::new("runs"), &scenario.name, wall.anchor()),
    };
    let output = output.map_err(Failure::input)?;
    output.write(SCENARIO_FILE, &scenario.to_yaml()).map_err(Failure::run)?;
    if args.format == Format::Text {
        print(&headline(&scenario, &answering));
    }
    let progress = Progress::new(expected(&scenario), false);
    let collector = Collector::new(output.rows().map_err(Failure::run)?, progress, wall);
    let driven = match answering {
        Answering::Running(gateway) => run_against(&gateway, &scenario, plan, collector)?,
        Answering::Own(mut telemetry) => {
            place_files(&mut telemetry, &output);
            match scenario.mode {
                Mode::Live => run_live(&scenario, plan, telemetry, collector)?,
                Mode::Virtual => run_virtual(&scenario, plan, telemetry, collector, &output)?,
            }
        }
    };
    finish::finish(&args, &scenario, &output, driven)
}

fn load(args: &RunArgs) -> Result<Scenario, Failure> {
    let mut set = args.overrides.all();
    // Options are overrides with a shorter name: validated with the rest, written down with the rest.
    if let Some(mode) = args.mode {
        let name = if mode == Mode::Live { "live" } else { "virtual" };
        set.push(("mode".to_owned(), name.to_owned()));
    }
    if let Some(seed) = args.seed {
        set.push(("seed".to_owned(), seed.to_string()));
    }
    set.extend(args.tracing.overrides());
    let scenario = scenario::load(&args.scenario, &set)?.config;
    // Warnings are about the scenario's own gateway.
    if args.gateway.is_none() {
        super::warn(&scenario);
    }
    Ok(scenario)
}

/// The gateway at `url`, which answers.
fn running(url: &str, args: &RunArgs, scenario: &Scenario) -> Result<Running, Failure> {
    if scenario.mode == Mode::Virtual {
        let path = args.scenario.display();
        return Err(Failure::input(format!(
            "{path}: mode: found virtual beside --gateway, expected live: a gateway that runs already has a clock of its own\n\
             help: --mode live"
        )));
    }
    let headers = std::env::var(HEADERS_VARIABLE).unwrap_or_default();
    let gateway = Running::new(url, &headers).map_err(|problem| Failure::input(format!("--gateway {problem}")))?;
    if let Some(doubt) = gateway.reach(scenario).map_err(Failure::run)? {
        eprintln!("warning: {doubt}");
    }
    Ok(gateway)
}

fn telemetry(args: &RunArgs, scenario: &Scenario) -> Result<Resolved, Failure> {
    let env = |key: &str| std::env::var(key).ok();
    let options = args.tracing.options();
    let resolved = resolve(&options, &scenario.tracing, &scenario.metrics, Some(TRACES_FILE.into()), &env);
    let resolved = resolved.map_err(Failure::input)?;
    for warning in &resolved.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(resolved)
}

/// Trace files lie in the folder of the run.
fn place_files(telemetry: &mut Resolved, output: &Output) {
    for exporter in &mut telemetry.config.exporters {
        match exporter {
            ExporterConfig::File(path) => *path = output.dir().join(&path),
            ExporterConfig::RotatingFile(rotation) => rotation.path = output.dir().join(&rotation.path),
            ExporterConfig::Otlp(_) | ExporterConfig::Console(_) | ExporterConfig::Memory(_) => {}
        }
    }
}

/// A virtual run writes files only; endpoints get its traces when it is over.
fn split_remote(mut telemetry: Resolved, output: &Output) -> (Resolved, Vec<OtlpConfig>) {
    let mut remote = Vec::new();
    let exporters = &mut telemetry.config.exporters;
    for exporter in std::mem::take(exporters) {
        match exporter {
            ExporterConfig::Otlp(otlp) => remote.push(otlp),
            local @ (ExporterConfig::File(_)
            | ExporterConfig::RotatingFile(_)
            | ExporterConfig::Console(_)
            | ExporterConfig::Memory(_)) => {
                exporters.push(local);
            }
        }
    }
    if !remote.is_empty() && !exporters.iter().any(|e| matches!(e, ExporterConfig::File(_))) {
        exporters.push(ExporterConfig::File(output.path(TRACES_FILE)));
    }
    (telemetry, remote)
}

fn headline(scenario: &Scenario, answering: &Answering) -> String {
    let mode = if scenario.mode == Mode::Live { "live" } else { "virtual" };
    let who = match answering {
        Answering::Own(telemetry) => format!("{}, 1 gateway  {}", fleet(scenario), tracing(telemetry)),
        Answering::Running(gateway) => format!("gateway {}, running already", gateway.url()),
    };
    format!("igsim {}  seed {}  scenario {} ({mode})  {who}\n", env!("CARGO_PKG_VERSION"), scenario.seed, scenario.name,)
}

fn fleet(scenario: &Scenario) -> String {
    let engines = scenario.engines.iter().map(|g| {
        let what = g.url.as_deref().unwrap_or(&g.profile);
        format!("{} x {what}", g.count)
    });
    engines.collect::<Vec<_>>().join(" + ")
}

fn tracing(telemetry: &Resolved) -> String {
    if telemetry.config.disabled {
        return "tracing off".to_owned();
    }
    let exporters: Vec<String> = telemetry
        .config
        .exporters
        .iter()
        .map(|e| match e {
            ExporterConfig::Otlp(otlp) => otlp.address(),
            ExporterConfig::File(_) => "file".to_owned(),
            ExporterConfig::RotatingFile(_) => "rotating file".to_owned(),
            ExporterConfig::Console(_) => "console".to_owned(),
            ExporterConfig::Memory(_) => "memory".to_owned(),
        })
        .collect();
    format!(
        "sampling {} -> {}",
        telemetry.config.sampler.root_ratio(),
        if exporters.is_empty() { "nowhere".to_owned() } else { exporters.join(" + ") }
    )
}

/// How many requests there will be, where that is known.
fn expected(scenario: &Scenario) -> Option<u64> {
    scenario.requests.or_else(|| scenario.trace.as_ref().and_then(|t| t.limit))
}

fn run_live(scenario: &Scenario, plan: Plan, telemetry: Resolved, collector: Collector) -> Result<Driven, Failure> {
    let ratio = telemetry.config.sampler.root_ratio();
    let interrupt = Interrupt::listen();
    let (ended, own) = live::run(scenario, plan, telemetry.config, collector, &interrupt).map_err(stopped)?;
    Ok(Driven { ended, answered: Answered::Own { own: Box::new(own), ratio, remote: Vec::new() } })
}

fn run_against(gateway: &Running, scenario: &Scenario, plan: Plan, collector: Collector) -> Result<Driven, Failure> {
    eprintln!("{}", left_out(scenario));
    let interrupt = Interrupt::listen();
    let ended = live::run_against(gateway, scenario, plan, collector, &interrupt).map_err(stopped)?;
    Ok(Driven { ended, answered: Answered::Running(gateway.url().to_owned()) })
}

/// One line on what of a scenario has no meaning for a gateway that runs already.
fn left_out(scenario: &Scenario) -> String {
    let unseen: Vec<&str> =
        scenario.expectations.keys().map(String::as_str).filter(|path| !seen_by_the_client(path)).collect();
    let unjudged = if unseen.is_empty() { String::new() } else { format!("; not judged: {}", unseen.join(", ")) };
    format!("left out of the scenario: its gateway, engines and their faults, tracing, metrics{unjudged}")
}

fn stopped(error: StackError) -> Failure {
    match error {
        StackError::Replay(_) => Failure::input(error),
        StackError::Telemetry(_)
        | StackError::Gateway(_)
        | StackError::Sidecar(_)
        | StackError::Target(_)
        | StackError::Backend(_)
        | StackError::Bind { .. }
        | StackError::Runtime(_) => Failure::run(error),
    }
}

fn run_virtual(
    scenario: &Scenario,
    plan: Plan,
    telemetry: Resolved,
    collector: Collector,
    output: &Output,
) -> Result<Driven, Failure> {
    struct Watching(Collector, Interrupt);
    impl Observer for Watching {
        fn request(&mut self, row: &RequestRow, gaps: &[Dur]) {
            self.0.request(row, gaps);
        }
        fn go_on(&mut self, _: Time) -> bool {
            !self.1.is_raised()
        }
    }
    let (telemetry, remote) = split_remote(telemetry, output);
    let ratio = telemetry.config.sampler.root_ratio();
    if !telemetry.config.metrics.otlp.is_empty() {
        eprintln!("warning: metrics are pushed by live runs only");
    }
    let seed = Seed(scenario.seed);
    let telemetry = Telemetry::inline(telemetry.config, Anchor::VIRTUAL, seed).map_err(Failure::run)?;
    let mut watching = Watching(collector, Interrupt::listen());
    let ended = virtual_time::run(scenario, plan, seed, &telemetry, &mut watching).map_err(Failure::input)?;
    let stats = telemetry.shutdown(ended.at);
    let Watching(collector, _) = watching;
    let own = Box::new(Own { engines: ended.engines, retries: 0, stats });
    let ended = Ended { interrupted: ended.interrupted, collector };
    Ok(Driven { ended, answered: Answered::Own { own, ratio, remote } })
}
