//! `igsim run`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;

use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig};
use shared::trace::{Stats, Telemetry};

use super::{Failure, Format, RunArgs, send};
use crate::inspect::{Style, TRACES_FILE};
use crate::live::{self, stack::StackError};
use crate::report::{EngineFigures, Report, RequestRow, RunFacts, TraceFigures};
use crate::run::collect::Collector;
use crate::run::interrupt::Interrupt;
use crate::run::output::{Output, REPORT_FILE, SCENARIO_FILE, print};
use crate::run::progress::Progress;
use crate::run::telemetry::{Resolved, resolve};
use crate::run::verdict::{Looked, figures};
use crate::scenario::{self, Mode, Scenario};
use crate::virtual_time::{self, Observer};
use crate::workload::Plan;

/// What a driver hands back.
struct Driven {
    engines: EngineFigures,
    retries: u64,
    interrupted: bool,
    collector: Collector,
    stats: Stats,
    ratio: f64,
}

pub(super) fn run(args: RunArgs) -> Result<(), Failure> {
    let scenario = load(&args)?;
    let wall = RunClock::start();
    let plan = Plan::new(&scenario, Seed(scenario.seed)).map_err(Failure::input)?;
    // Whatever may be wrong with the input is known before a folder is made.
    let mut telemetry = telemetry(&args, &scenario)?;
    let output = match &args.out {
        Some(dir) => Output::open(dir, args.overwrite),
        None => Output::fresh(Path::new("runs"), &scenario.name, wall.anchor()),
    };
    let output = output.map_err(Failure::input)?;
    place_files(&mut telemetry, &output);
    output.write(SCENARIO_FILE, &scenario.to_yaml()).map_err(Failure::run)?;
    let text = args.format == Format::Text;
    if text {
        print(&headline(&scenario, &telemetry));
    }
    let (telemetry, remote) = split_remote(telemetry, scenario.mode, &output);
    let progress = Progress::new(expected(&scenario), false);
    let collector = Collector::new(output.rows().map_err(Failure::run)?, progress, wall);
    let driven = match scenario.mode {
        Mode::Live => run_live(&scenario, plan, telemetry, collector)?,
        Mode::Virtual => run_virtual(&scenario, plan, telemetry, collector)?,
    };
    finish(&args, &scenario, &output, driven, &remote)
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
    super::warn(&scenario);
    Ok(scenario)
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
fn split_remote(mut telemetry: Resolved, mode: Mode, output: &Output) -> (Resolved, Vec<OtlpConfig>) {
    let mut remote = Vec::new();
    if mode == Mode::Virtual {
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
    }
    (telemetry, remote)
}

fn headline(scenario: &Scenario, telemetry: &Resolved) -> String {
    let mode = if scenario.mode == Mode::Live { "live" } else { "virtual" };
    let engines: Vec<String> = scenario
        .engines
        .iter()
        .map(|g| {
            let what = g.url.as_deref().unwrap_or(&g.profile);
            format!("{} x {what}", g.count)
        })
        .collect();
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
    let tracing = if telemetry.config.disabled {
        "tracing off".to_owned()
    } else {
        format!(
            "sampling {} -> {}",
            telemetry.config.sampler.root_ratio(),
            if exporters.is_empty() { "nowhere".to_owned() } else { exporters.join(" + ") }
        )
    };
    format!(
        "igsim {}  seed {}  scenario {} ({mode})  {}, 1 gateway  {tracing}\n",
        env!("CARGO_PKG_VERSION"),
        scenario.seed,
        scenario.name,
        engines.join(" + "),
    )
}

/// How many requests there will be, where that is known.
fn expected(scenario: &Scenario) -> Option<u64> {
    scenario.requests.or_else(|| scenario.trace.as_ref().and_then(|t| t.limit))
}

fn run_live(scenario: &Scenario, plan: Plan, telemetry: Resolved, collector: Collector) -> Result<Driven, Failure> {
    let ratio = telemetry.config.sampler.root_ratio();
    let interrupt = Interrupt::listen();
    let ended = live::run(scenario, plan, telemetry.config, collector, &interrupt).map_err(|error| match error {
        StackError::Replay(_) => Failure::input(error),
        StackError::Telemetry(_)
        | StackError::Gateway(_)
        | StackError::Sidecar(_)
        | StackError::Target(_)
        | StackError::Backend(_)
        | StackError::Bind { .. }
        | StackError::Runtime(_) => Failure::run(error),
    })?;
    let live::Ended { engines, retries, interrupted, collector, stats } = ended;
    Ok(Driven { engines, retries, interrupted, collector, stats, ratio })
}

fn run_virtual(scenario: &Scenario, plan: Plan, telemetry: Resolved, collector: Collector) -> Result<Driven, Failure> {
    struct Watching(Collector, Interrupt);
    impl Observer for Watching {
        fn request(&mut self, row: &RequestRow, gaps: &[Dur]) {
            self.0.request(row, gaps);
        }
        fn go_on(&mut self, _: Time) -> bool {
            !self.1.is_raised()
        }
    }
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
    Ok(Driven { engines: ended.engines, retries: 0, interrupted: ended.interrupted, collector, stats, ratio })
}

/// Looks at the traces, writes the report, and prints what the user wants to know.
fn finish(
    args: &RunArgs,
    scenario: &Scenario,
    output: &Output,
    driven: Driven,
    remote: &[OtlpConfig],
) -> Result<(), Failure> {
    let file = output.path(TRACES_FILE);
    // What cannot be read or was not written is told after the report, which is good all the same.
    // Of files of bounded size only the last one is there for sure: no trace can be called incomplete.
    let whole = file.exists() && scenario.tracing.rotating_file().is_none();
    let (looked, unread) = match whole.then(|| Looked::at(&file)).transpose() {
        Ok(looked) => (looked, None),
        Err(error) => (None, Some(error)),
    };
    let (summary, unwritten) = driven.collector.finish();
    let report = summary.finish(RunFacts {
        versions: versions(),
        scenario: scenario.name.clone(),
        mode: if scenario.mode == Mode::Live { "live" } else { "virtual" }.to_owned(),
        seed: scenario.seed,
        interrupted: driven.interrupted,
        tenants: scenario.tenants(),
        endpoints: (0..scenario.engine_count()).map(|i| format!("engine-{i}")).collect(),
        paced: scenario.mode == Mode::Live,
        engines: driven.engines,
        retries: driven.retries,
        traces: TraceFigures {
            by_policy: scenario.tracing.decides_by_policy(),
            ..figures(&driven.stats, driven.ratio, looked.as_ref())
        },
        expectations: scenario.expectations.clone(),
    });
    let json = serde_json::to_string_pretty(&report).map_err(Failure::run)?;
    output.write(REPORT_FILE, &format!("{json}\n")).map_err(Failure::run)?;
    match args.format {
        Format::Json => print(&format!("{json}\n")),
        Format::Text => tell(&report, looked.as_ref(), output),
    }
    if let Some(error) = unwritten {
        return Err(Failure::run(error));
    }
    if let Some(error) = unread {
        return Err(Failure::run(error));
    }
    if let Some(set) = looked.map(Looked::into_set).filter(|_| !remote.is_empty()) {
        let run_id = args.run_id.clone().unwrap_or_else(send::fresh_run_id);
        for endpoint in remote {
            send::deliver(set.clone(), endpoint, &run_id)?;
        }
    }
    if report.expectations.iter().all(|e| e.pass) { Ok(()) } else { Err(Failure::Expectation) }
}

fn tell(report: &Report, looked: Option<&Looked>, output: &Output) {
    print(&report.table());
    let colour = std::env::var_os("NO_COLOR").is_none() && std::io::stdout().is_terminal();
    if let Some(looked) = looked {
        if let Some((line, tree)) = looked.slowest(Style { colour, ..Style::PLAIN }) {
            print(&format!("{line}\n\n{tree}\n"));
        }
        for finding in looked.findings().iter().take(5) {
            print(&format!("finding: {finding}\n"));
        }
    }
    let dir = output.dir().display();
    print(&format!("Written to {dir}/   next: igsim inspect {dir} --slowest 3\n"));
}

fn versions() -> BTreeMap<String, String> {
    BTreeMap::from([
        ("igsim".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("vllm".to_owned(), engine_sim::server::VLLM_VERSION.to_owned()),
    ])
}
