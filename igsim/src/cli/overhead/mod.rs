//! `igsim overhead`: what tracing costs.

mod lines;
mod outside;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use shared::clock::RunClock;
use shared::time::Dur;
use shared::units::HumanDur;

use lines::Lines;

use super::{Failure, Format, Overrides};
use crate::overhead::analysis::Analysis;
use crate::overhead::attribution::Attribution;
use crate::overhead::bench::{Amount, IN_FLIGHT};
use crate::overhead::calibrate::Calibration;
use crate::overhead::lab::{self, LabSpec, Outcome};
use crate::overhead::load::MAX_IN_FLIGHT;
use crate::overhead::model::{Arm, Path as TracePath, Regime};
use crate::overhead::node::{self, message::Role};
use crate::overhead::plan::{self, Extent, Extras, RegimePlan};
use crate::overhead::predict::{Fit, Load};
use crate::overhead::record::{self, Recorded, Report};
use crate::overhead::soak::{self, SoakSpec};
use crate::overhead::{html, table};
use crate::run::interrupt::Interrupt;
use crate::run::output::print;
use crate::scenario::Scenario;

/// The fleet that is measured unless another is named.
const SCENARIO: &str = include_str!("../../../../scenarios/overhead.yaml");
/// How long a full run takes unless a budget is given.
const FULL: Dur = Dur::from_secs(30 * 60);

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct OverheadArgs {
    #[command(subcommand)]
    command: Option<OverheadCommand>,
    #[command(flatten)]
    measure: MeasureArgs,
}

#[derive(Debug, Subcommand)]
enum OverheadCommand {
    /// Analyse a finished run again
    #[command(after_help = "Example: igsim overhead report runs/overhead-20261120-1842")]
    Report {
        /// Folder of the run, or its run.json.gz.
        run: PathBuf,
        /// Largest overhead to be called good.
        #[arg(long, value_name = "SHARE", default_value = "5%", value_parser = share)]
        target: f64,
        /// Write report.json and report.html here; nothing is written if not given.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// What to print on standard output.
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Show how often the statistics are right, from the off blocks of a finished run
    #[command(after_help = "Example: igsim overhead calibrate runs/overhead-20261120-1842")]
    Calibrate {
        /// Folder of the run, or its run.json.gz.
        run: PathBuf,
        /// Seed of the relabellings.
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// What to print on standard output.
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Fit what tracing costs to a finished run, for predictions
    #[command(after_help = "Example: igsim overhead fit runs/overhead-20261120-1842 > fit.json")]
    Fit {
        /// Folder of the run, or its run.json.gz or report.json.
        run: PathBuf,
        /// What attributes cost, as the program `attribution` of the benches measured it on the same machine.
        #[arg(long, value_name = "FILE")]
        attribution: Option<PathBuf>,
    },
    /// Say what tracing would cost under another load
    #[command(after_help = "Example: igsim overhead predict --from fit.json --spans 24 --ratio 0.1 --rps 1000")]
    Predict(PredictArgs),
    /// Send short requests for minutes: does anything fail, grow or get lost?
    #[command(after_help = "Example: igsim overhead soak --rate 1000 --duration 10m --sampling 0.1")]
    Soak(SoakArgs),
    /// Measure a gateway or engine that is not ours, described in a file
    #[command(after_help = "Example: igsim overhead outside scenarios/outside/smg.yaml")]
    Outside(outside::OutsideArgs),
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// A fit, or a finished run to fit.
    #[arg(long, value_name = "PATH")]
    from: PathBuf,
    /// Spans of a sampled request, all services together: 1 or more.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    spans: f64,
    /// Attributes of a span; as in the run of the fit if not given.
    #[arg(long, value_name = "N", value_parser = none_or_more)]
    attributes: Option<f64>,
    /// Share of traces kept, 0 to 1.
    #[arg(long, value_name = "R", value_parser = super::ratio)]
    ratio: f64,
    /// Requests per second.
    #[arg(long, value_name = "Q", value_parser = positive)]
    rps: f64,
    /// How spans are recorded and encoded.
    #[arg(long, value_enum, default_value_t = TracePath::Deferred)]
    path: TracePath,
    /// By how much stored spans are smaller than on the wire.
    #[arg(long, value_name = "N", default_value_t = 1.0, value_parser = positive)]
    compression: f64,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Args)]
struct SoakArgs {
    /// Scenario file: the fleet, whose engines answer at once here. A small built-in one if not given.
    scenario: Option<PathBuf>,
    /// Requests per second, at random intervals.
    #[arg(long, value_name = "N", default_value_t = 1_000.0, value_parser = rate)]
    rate: f64,
    /// How long.
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    duration: HumanDur,
    /// Share of traces to record, 0 to 1.
    #[arg(long, value_name = "R", default_value_t = 0.1, value_parser = super::ratio)]
    sampling: f64,
    /// How spans are recorded and encoded.
    #[arg(long, value_enum, default_value_t = TracePath::Deferred)]
    path: TracePath,
    /// Seed of arrivals and prompts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    overrides: Overrides,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Args)]
struct MeasureArgs {
    /// Scenario file: the fleet, and the load of the realistic regime. A small built-in one if not given.
    scenario: Option<PathBuf>,
    /// The floor only, in about 100 s; this is the default.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every regime, in about 30 minutes.
    #[arg(long)]
    full: bool,
    /// Leave out arms, the least important first, until the run takes no longer. Rounds are never left out.
    #[arg(long, value_name = "DURATION")]
    budget: Option<HumanDur>,
    /// Measure this regime only; may be given several times.
    #[arg(long, value_enum, value_name = "REGIME")]
    regime: Vec<Regime>,
    /// Measure these arms: off' (the control), or PATH:RATIO with eager, deferred or direct, separated by commas.
    #[arg(long, value_name = "ARMS", value_delimiter = ',', value_parser = arm)]
    arms: Vec<Arm>,
    /// Measure the lean paths with a slow, a refusing and an absent receiver too.
    #[arg(long)]
    faults: bool,
    /// Also measure an arm in which a hundredth of the engines' steps is traced.
    #[arg(long)]
    engine_steps: bool,
    /// Add an arm whose answers are really held back by this share of the median latency: shows that the lab sees it.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    delay: Option<f64>,
    /// Requests in flight in the saturation regime.
    #[arg(long, value_name = "N", default_value_t = IN_FLIGHT, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_IN_FLIGHT)))]
    in_flight: u32,
    /// Largest overhead to be called good.
    #[arg(long, value_name = "SHARE", default_value = "5%", value_parser = share)]
    target: f64,
    /// Folder for the results; runs/overhead-TIME if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seed of the order of arms.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    overrides: Overrides,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Rounds instead of 20: too few for intervals, enough to see whether everything works.
    #[arg(long, value_name = "N", hide = true, default_value_t = plan::ROUNDS, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Requests of a block, instead of as many as fill its time.
    #[arg(long, value_name = "N", hide = true, value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
}

/// A process of the lab.
#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// Which one.
    #[arg(value_enum)]
    role: Role,
}

pub(super) fn node(args: &NodeArgs) -> Result<(), Failure> {
    node::main(args.role).map_err(Failure::run)
}

pub(super) fn overhead(args: OverheadArgs) -> Result<(), Failure> {
    match args.command {
        None => measure(&args.measure),
        Some(OverheadCommand::Report { run, target, out, format }) => {
            let recorded = record::read(&run).map_err(Failure::input)?;
            conclude(&recorded, target, out.as_deref(), format)
        }
        Some(OverheadCommand::Calibrate { run, seed, format }) => calibrate(&run, seed, format),
        Some(OverheadCommand::Fit { run, attribution }) => fit(&run, attribution.as_deref()),
        Some(OverheadCommand::Predict(args)) => predict(&args),
        Some(OverheadCommand::Soak(args)) => soak(&args),
        Some(OverheadCommand::Outside(args)) => outside::run(&args),
    }
}

fn fit(run: &Path, attribution: Option<&Path>) -> Result<(), Failure> {
    let recorded = record::read(run).map_err(Failure::input)?;
    let attribution = attribution.map(Attribution::read).transpose().map_err(Failure::input)?;
    let attributes = attribution.map(|a| a.attributes()).unwrap_or_default();
    print(&json(&Fit::of(&recorded.run, &attributes).map_err(Failure::input)?)?);
    Ok(())
}

fn calibrate(run: &Path, seed: u64, format: Format) -> Result<(), Failure> {
    let recorded = record::read(run).map_err(Failure::input)?;
    let calibration = Calibration::of(&recorded.run, seed);
    match format {
        Format::Text => print(&calibration.text()),
        Format::Json => print(&json(&calibration)?),
    }
    if calibration.holds() { Ok(()) } else { Err(Failure::Expectation) }
}

fn measure(args: &MeasureArgs) -> Result<(), Failure> {
    let scenario = scenario(args.scenario.as_deref(), &args.overrides)?;
    let (plans, note) = plans(args);
    let spec = LabSpec {
        binary: itself()?,
        scenario,
        plans,
        seed: args.seed,
        command: command_line(),
        amount: Amount { requests: args.requests, in_flight: args.in_flight },
        delay_share: args.delay.unwrap_or(0.0),
    };
    let out = folder(args.out.as_deref())?;
    eprintln!("{note}");
    let interrupt = Interrupt::listen();
    let outcome = lab::run(&spec, &interrupt, &mut Lines::new()).map_err(Failure::run)?;
    finish(outcome, args.target, &out, args.format)
}

/// As it was given, but for the program's place.
fn command_line() -> String {
    std::env::args().skip(1).fold("igsim".to_owned(), |line, arg| line + " " + &arg)
}

/// Writes down what was measured, and says what it says.
fn finish(outcome: Outcome, target: f64, out: &Path, format: Format) -> Result<(), Failure> {
    let Outcome { run, distributions, interrupted } = outcome;
    if run.blocks.is_empty() {
        return Err(Failure::run("ended before the first round was done: nothing is known"));
    }
    let recorded = Recorded { run, distributions };
    record::write_run(out, &recorded).map_err(Failure::run)?;
    let concluded = conclude(&recorded, target, Some(out), format);
    if interrupted {
        eprintln!("ended early: these are the whole rounds that were done");
    }
    eprintln!("results in {}", out.display());
    concluded
}

fn predict(args: &PredictArgs) -> Result<(), Failure> {
    let PredictArgs { from, spans, attributes, ratio, rps, path, compression, format } = args;
    let fit = match record::read_fit(from) {
        Some(fit) => fit,
        None => Fit::of(&record::read(from).map_err(Failure::input)?.run, &BTreeMap::new()).map_err(Failure::input)?,
    };
    let load = Load { spans: *spans, attributes: *attributes, ratio: *ratio, rps: *rps, compression: *compression };
    let prediction = fit.predict(*path, load).map_err(Failure::input)?;
    match format {
        Format::Text => print(&prediction.text(&fit)),
        Format::Json => print(&json(&prediction)?),
    }
    Ok(())
}

fn soak(args: &SoakArgs) -> Result<(), Failure> {
    let spec = SoakSpec {
        binary: itself()?,
        scenario: scenario(args.scenario.as_deref(), &args.overrides)?,
        rate: args.rate,
        duration: args.duration.get(),
        path: args.path,
        ratio: args.sampling,
        seed: args.seed,
    };
    let interrupt = Interrupt::listen();
    let mut lines = Lines::new();
    let report = soak::run(&spec, &interrupt, &mut |glance| lines.glance(&glance)).map_err(Failure::run)?;
    match args.format {
        Format::Text => print(&format!("{report}\n")),
        Format::Json => print(&json(&report)?),
    }
    if report.problems().is_empty() { Ok(()) } else { Err(Failure::Expectation) }
}

/// The program whose hidden command the processes of the lab are.
fn itself() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|e| Failure::run(format!("cannot find igsim itself: {e}")))
}

fn scenario(path: Option<&Path>, overrides: &Overrides) -> Result<Scenario, Failure> {
    let set = &overrides.all();
    let loaded = match path {
        Some(path) => crate::scenario::load(path, set)?,
        None => shared::config::load_str::<Scenario>("scenarios/overhead.yaml", SCENARIO, set)?,
    };
    let scenario = loaded.config;
    super::warn(&scenario);
    if scenario.trace.is_some() {
        return Err(Failure::input(
            "the lab sends the same load in every block: a scenario with a trace has none to repeat",
        ));
    }
    if let Some(url) = scenario.engines.iter().find_map(|g| g.url.as_ref()) {
        return Err(Failure::input(format!("the engine at {url} is not ours: the lab measures simulated engines")));
    }
    Ok(scenario)
}

/// What is measured, and what is told about it in advance.
fn plans(args: &MeasureArgs) -> (Vec<RegimePlan>, String) {
    let extent = if args.full { Extent::Full } else { Extent::Quick };
    let regimes: &[Regime] = match (&args.regime[..], extent) {
        ([], Extent::Quick) => &[Regime::Floor],
        ([], Extent::Full) => &Regime::ALL,
        (named, _) => named,
    };
    let arms = (!args.arms.is_empty()).then(|| args.arms.clone());
    let extras = Extras { faults: args.faults, engine_steps: args.engine_steps, delay_share: args.delay, arms };
    let mut plans: Vec<_> = regimes.iter().map(|r| RegimePlan::of(*r, extent, args.rounds, &extras)).collect();
    let budget = args.budget.map(|b| b.get()).or_else(|| (args.full && args.regime.is_empty()).then_some(FULL));
    let fits = budget.is_none_or(|budget| plan::fit(&mut plans, budget));
    let total: f64 = plans.iter().map(|p| p.estimate().as_secs_f64()).sum();
    let mut note =
        format!("igsim {}  overhead of tracing  seed {}  about {:.0} s", env!("CARGO_PKG_VERSION"), args.seed, total);
    for plan in plans.iter().filter(|p| !p.left_out.is_empty()) {
        let names: Vec<String> = plan.left_out.iter().map(ToString::to_string).collect();
        note.push_str(&format!("\nleft out of {} for lack of time: {}", plan.regime.name(), names.join(", ")));
    }
    if !fits {
        note.push_str("\nwhat is left takes longer than the budget all the same: rounds are not left out");
    }
    (plans, note)
}

/// The folder of the results, which does not hold anything yet.
fn folder(out: Option<&Path>) -> Result<PathBuf, Failure> {
    match out {
        Some(dir) => {
            record::prepare(dir).map_err(Failure::input)?;
            Ok(dir.to_path_buf())
        }
        None => {
            let fresh = crate::run::output::Output::fresh(Path::new("runs"), "overhead", RunClock::start().anchor());
            Ok(fresh.map_err(Failure::input)?.dir().to_path_buf())
        }
    }
}

/// Analyses, prints, writes; a failed target is an exit code.
fn conclude(recorded: &Recorded, target: f64, out: Option<&Path>, format: Format) -> Result<(), Failure> {
    let Recorded { run, distributions } = recorded;
    let analysis = Analysis::of(run, target);
    let report = Report { run, analysis: &analysis };
    match format {
        Format::Text => print(&table::text(run, &analysis)),
        Format::Json => print(&json(&report)?),
    }
    if let Some(dir) = out {
        let page = html::page(run, &analysis, distributions);
        record::write_report(dir, &report, &page).map_err(Failure::run)?;
    }
    if analysis.failed() { Err(Failure::Expectation) } else { Ok(()) }
}

fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(Failure::run)
}

fn at_least_one(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n >= 1.0 && n.is_finite() => Ok(n),
        Ok(_) | Err(_) => Err("expected a number of at least 1".to_owned()),
    }
}

fn none_or_more(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n >= 0.0 && n.is_finite() => Ok(n),
        Ok(_) | Err(_) => Err("expected a number of at least 0".to_owned()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok(n),
        Ok(_) | Err(_) => Err("expected a number above 0".to_owned()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 100_000.0 => Ok(rate),
        Ok(_) | Err(_) => Err("expected requests per second, above 0 and at most 100000".to_owned()),
    }
}

/// `5%` or `0.05`.
fn share(text: &str) -> Result<f64, String> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(percent) => (percent, 100.0),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(value) if value > 0.0 && value / scale < 10.0 => Ok(value / scale),
        Ok(_) | Err(_) => Err("expected a share such as 5% or 0.05".to_owned()),
    }
}

/// `off'`, `control`, `eager:0.1`, or with a share of engine steps `direct:0.1:0.01`.
fn arm(text: &str) -> Result<Arm, String> {
    const ALLOWED: &str = "expected off', PATH:RATIO or PATH:RATIO:STEPS, for example deferred:0.1";
    if matches!(text, "off'" | "control") {
        return Ok(Arm::Control);
    }
    let (path, shares) = text.split_once(':').ok_or(ALLOWED)?;
    let path = TracePath::ALL.into_iter().find(|p| p.name() == path).ok_or(ALLOWED)?;
    let (ratio, steps) = shares.split_once(':').unwrap_or((shares, "0"));
    Ok(Arm::traced(path, super::ratio(ratio)?).with_steps(super::ratio(steps)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_arms_are_read_as_people_write_them() {
        for (text, expect) in [("5%", Some(0.05)), ("0.05", Some(0.05)), ("1.5 %", Some(0.015))] {
            assert_eq!(share(text).ok(), expect, "{text}");
        }
        for bad in ["", "-1%", "0", "abc", "NaN", "2000%"] {
            assert!(share(bad).is_err(), "{bad}");
        }
        assert_eq!(arm("eager:0.1"), Ok(Arm::traced(TracePath::Eager, 0.1)));
        assert_eq!(arm("direct:0.1:0.01"), Ok(Arm::traced(TracePath::Direct, 0.1).with_steps(0.01)));
        assert_eq!(arm("off'"), Ok(Arm::Control));
        for bad in ["eager", "lazy:0.1", "direct:2", "off"] {
            assert!(arm(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_built_in_scenario_is_valid() {
        shared::config::load_str::<Scenario>("overhead", SCENARIO, &[]).unwrap();
    }
}
