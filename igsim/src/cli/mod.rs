//! Commands, options and exit codes.
//!
//! Standard output carries results; progress, warnings and errors go to standard error. With `--format json` standard output is
//! one JSON document and nothing else.

mod check;
mod explain;
mod inspect;
mod ladder;
mod overhead;
mod query;
mod run;
mod sampling;
mod send;
mod traces;
mod up;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use shared::config::ConfigErrors;
use shared::log::{FORMAT_VARIABLE, LogFormat};

use crate::run::output::print;
use crate::run::telemetry::TracingOptions;
use crate::scenario::{Mode, Naming, Recorder, Scenario};

/// Inference-gateway simulator: sends requests through an llm-d style gateway to emulated vLLM engines and records the complete
/// OpenTelemetry trace of every sampled request.
#[derive(Debug, Parser)]
#[command(name = "igsim", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log lines for people (text), or one JSON object a line (json).
    #[arg(long, value_name = "FORMAT", env = FORMAT_VARIABLE, default_value = "text", global = true)]
    log_format: LogFormat,
}

const EXAMPLES: &str = "Examples:
  igsim run scenarios/quickstart.yaml
  igsim run scenarios/quickstart.yaml --mode virtual --seed 7
  igsim run scenarios/replay-mooncake.yaml --set trace.path=trace.jsonl
  igsim inspect runs/quickstart-20261120-1842 --slowest 1

Exit codes: 0 good, 1 an expectation of the scenario failed, 2 bad input, 3 could not run.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario and report
    #[command(
        after_help = "Examples:\n  igsim run scenarios/quickstart.yaml --sampling 1.0 --otlp http://127.0.0.1:4317\n  igsim run scenarios/load.yaml --gateway http://127.0.0.1:8080"
    )]
    Run(RunArgs),
    /// Check scenario files without running them
    #[command(after_help = "Example: igsim validate scenarios/*.yaml")]
    Validate {
        /// Scenario files.
        #[arg(required = true)]
        scenarios: Vec<PathBuf>,
        #[command(flatten)]
        overrides: Overrides,
    },
    /// Start a scenario's gateway and engines and keep serving
    #[command(after_help = "Example: igsim up scenarios/quickstart.yaml --otlp http://127.0.0.1:4317")]
    Up(UpArgs),
    /// Print traces of a run as trees
    #[command(after_help = "Example: igsim inspect runs/quickstart-20261120-1842 --slowest 3")]
    Inspect(InspectArgs),
    /// Check traces: shape, times, registry, propagation, sampling, content; exit code 1 with findings
    #[command(
        after_help = "Examples:\n  igsim check runs/quickstart-20261120-1842\n  igsim check traces.otlp.jsonl --canary 'my secret'\n  igsim check http://127.0.0.1:3200 --query '{ resource.service.name = \"inference-gateway\" }'"
    )]
    Check(check::CheckArgs),
    /// Say why requests went where they went: filters, scores, margins, and what another choice would have meant
    #[command(
        after_help = "Examples:\n  igsim run scenarios/quickstart.yaml --mode virtual --sampling 1 --detail 3 --out runs/why\n  igsim explain runs/why\n  igsim explain runs/why --trace 3b1f"
    )]
    Explain(explain::ExplainArgs),
    /// Ask Grafana Tempo a question about traces: what was slow, who waited, what failed
    #[command(
        after_help = "Examples:\n  igsim query --list\n  igsim query slow-requests --set over=1s\n  igsim query preempted --tempo http://127.0.0.1:3200 --start 24h\n  igsim query errors --print"
    )]
    Query(query::QueryArgs),
    /// Send the traces of a finished run to an OTLP endpoint
    #[command(after_help = "Example: igsim send runs/quickstart-20261120-1842 --otlp http://127.0.0.1:4318 --end-now")]
    Send(SendArgs),
    /// Run a workload at one rate after the other under several routing policies, in virtual time
    #[command(after_help = "Example: igsim ladder scenarios/ladders/qwen3-32b-8xh100.ladder.yaml")]
    Ladder(ladder::LadderArgs),
    /// Compare sampling strategies on one run in virtual time: what each keeps, what it misses, what it weighs
    #[command(after_help = "Example: igsim sampling scenarios/keep-on-outcome.yaml")]
    Sampling(sampling::SamplingArgs),
    /// Measure what tracing costs: latency, CPU and bytes with and without it
    #[command(
        after_help = "Examples:\n  igsim overhead\n  igsim overhead --full --out overhead\n  igsim overhead --regime saturation --arms \"off',eager:0.1,deferred:0.1\""
    )]
    Overhead(overhead::OverheadArgs),
    /// A process of the overhead lab, which tells it what to do on standard input
    #[command(hide = true)]
    OverheadNode(overhead::NodeArgs),
    /// Print the JSON Schema of scenario files
    #[command(after_help = "Example: igsim schema > scenario.schema.json")]
    Schema,
}

/// Options shared by commands that read a scenario.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Overrides {
    /// Replace a value of the scenario: a path and a YAML value; may be given several times.
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// Leave out what is not supported of the scenario's EndpointPickerConfig, and say so, instead of refusing it.
    #[arg(long)]
    allow_unsupported: bool,
}

impl Overrides {
    /// All of them, options with names of their own included.
    fn all(&self) -> Vec<(String, String)> {
        let mut all = self.set.clone();
        if self.allow_unsupported {
            all.push(("gateway.allow_unsupported".to_owned(), "true".to_owned()));
        }
        all
    }
}

/// Tells what the user should know of the gateway's configuration.
pub(crate) fn warn(scenario: &Scenario) {
    for warning in &scenario.warnings {
        eprintln!("warning: {warning}");
    }
}

/// Where spans go and which requests are recorded.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TracingArgs {
    /// Share of traces to record, 0 to 1.
    #[arg(long, value_name = "R", value_parser = ratio)]
    sampling: Option<f64>,
    /// Send spans to this OTLP endpoint as well: gRPC where the port is 4317, HTTP otherwise.
    #[arg(long, value_name = "URL")]
    otlp: Vec<String>,
    /// Push the gateway's metrics to this OTLP endpoint (live mode only): gRPC where the port is 4317, HTTP otherwise.
    #[arg(long, value_name = "URL")]
    otlp_metrics: Vec<String>,
    /// Log a line for every request that the gateway is done with (live mode only).
    #[arg(long)]
    access_log: bool,
    /// Detail of the spans: 1 lifecycle, 2 decisions, 3 the parts of executions.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=3))]
    detail: Option<u8>,
    /// Share of engine steps that get a trace of their own, 0 to 1.
    #[arg(long, value_name = "R", value_parser = ratio)]
    engine_steps: Option<f64>,
    /// Share of the gateway's scrapes of its engines that get a trace of their own, 0 to 1.
    #[arg(long, value_name = "R", value_parser = ratio)]
    scrapes: Option<f64>,
    /// Whose names spans have: those of llm-d's tracing proposal, or of llm-d's own components.
    #[arg(long, value_enum)]
    naming: Option<Naming>,
    /// How facts become spans: in the background, or at once by the OpenTelemetry SDK (live mode only).
    #[arg(long, value_enum)]
    recorder: Option<Recorder>,
}

/// Options of `run` about a gateway, engines and traces that it starts itself.
const OF_OWN_GATEWAY: [&str; 10] = [
    "sampling",
    "otlp",
    "otlp_metrics",
    "access_log",
    "detail",
    "engine_steps",
    "scrapes",
    "recorder",
    "naming",
    "run_id",
];

#[derive(Clone, Debug, Args)]
struct RunArgs {
    /// Scenario file.
    scenario: PathBuf,
    /// Run live over HTTP, or in virtual time; the scenario's own mode if not given.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Send the requests to this gateway, or other OpenAI-compatible server, which runs already, and start none. Its traces are its own.
    /// Headers for it, credentials among them, are taken from GATEWAY_HEADERS (NAME=VALUE with commas between).
    #[arg(long, value_name = "URL", conflicts_with_all = OF_OWN_GATEWAY)]
    gateway: Option<String>,
    /// Seed of all random choices; the scenario's own if not given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    tracing: TracingArgs,
    /// Folder for the results; runs/NAME-TIME if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write into a folder that is not empty.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    overrides: Overrides,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Repeat the trace ids of an earlier send of a virtual run.
    #[arg(long, value_name = "ID")]
    run_id: Option<String>,
}

#[derive(Clone, Debug, Args)]
struct UpArgs {
    /// Scenario file; its workload is not sent.
    scenario: PathBuf,
    #[command(flatten)]
    tracing: TracingArgs,
    /// Port of the gateway on loopback; 0 takes a free one. The scenario's own if not given.
    #[arg(long)]
    port: Option<u16>,
    /// Folder for traces.otlp.jsonl; none is written if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Clone, Debug, Args)]
struct InspectArgs {
    /// Folder of a run, or a file of OTLP JSON lines.
    path: PathBuf,
    /// Print the trees of the N slowest traces.
    #[arg(long, value_name = "N", conflicts_with_all = ["errors", "trace"])]
    slowest: Option<usize>,
    /// Print the trees of traces with an error (at most 20).
    #[arg(long, conflicts_with = "trace")]
    errors: bool,
    /// Print the tree of one trace; the start of its id is enough.
    #[arg(long, value_name = "ID")]
    trace: Option<String>,
    /// What to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Debug, Args)]
struct SendArgs {
    /// Folder of a run, or a file of OTLP JSON lines.
    path: PathBuf,
    /// OTLP endpoint, as for `run`.
    #[arg(long, value_name = "URL", required = true)]
    otlp: String,
    /// Shift all times by one offset so that the last span ends now; backends search recent time only.
    #[arg(long)]
    end_now: bool,
    /// Repeat the trace ids of an earlier send; a fresh one is drawn and printed otherwise.
    #[arg(long, value_name = "ID")]
    run_id: Option<String>,
}

/// What goes to standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

/// Why a command did not succeed, and the exit code for it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An expectation of the scenario failed; the report says which.
    Expectation,
    /// Bad input; the text is complete, `error:` included where it is not a configuration error.
    Input(String),
    /// The run could not start or finish.
    Run(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Expectation => 1,
            Failure::Input(_) => 2,
            Failure::Run(_) => 3,
        }
    }

    /// Bad input that is not in a configuration file.
    pub(crate) fn input(text: impl fmt::Display) -> Failure {
        Failure::Input(format!("error: {text}"))
    }

    /// A run that could not be done.
    pub(crate) fn run(text: impl fmt::Display) -> Failure {
        Failure::Run(format!("error: {text}"))
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Failure {
        Failure::Input(errors.to_string())
    }
}

/// Parses the command line, does the work and turns the outcome into an exit code.
pub fn main() -> ExitCode {
    main_with(std::env::args_os())
}

/// As [`main`], with the command line given.
pub fn main_with(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are successes; a usage error is bad input.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    crate::log::init(cli.log_format);
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Expectation => {}
                Failure::Input(text) | Failure::Run(text) => eprintln!("{}", text.trim_end()),
            }
            ExitCode::from(failure.code())
        }
    }
}

fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Validate { scenarios, overrides } => validate(&scenarios, &overrides),
        Command::Up(args) => up::up(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Check(args) => check::run(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Query(args) => query::query(&args),
        Command::Send(args) => send::send(&args),
        Command::Ladder(args) => ladder::run(&args),
        Command::Sampling(args) => sampling::run(&args),
        Command::Overhead(args) => overhead::overhead(args),
        Command::OverheadNode(args) => overhead::node(&args),
        Command::Schema => {
            print(&format!("{:#}\n", crate::scenario::json_schema()));
            Ok(())
        }
    }
}

fn validate(scenarios: &[PathBuf], overrides: &Overrides) -> Result<(), Failure> {
    let mut bad = String::new();
    for path in scenarios {
        match crate::scenario::load(path, &overrides.all()).inspect(|l| warn(&l.config)) {
            Ok(loaded) => print(&format!("{}: good ({})\n", path.display(), loaded.config.name)),
            Err(errors) => bad.push_str(&format!("{errors}\n")),
        }
    }
    if bad.is_empty() { Ok(()) } else { Err(Failure::Input(bad)) }
}

impl TracingArgs {
    /// What is an override of the scenario with a shorter name.
    fn overrides(&self) -> Vec<(String, String)> {
        let recorder = self.recorder.map(|recorder| match recorder {
            Recorder::Deferred => "deferred",
            Recorder::Eager => "eager",
        });
        let naming = self.naming.map(|naming| shared::trace::Naming::from(naming).as_str());
        let all = [
            ("tracing.recorder", recorder),
            ("tracing.naming", naming),
            ("gateway.access_log", self.access_log.then_some("true")),
        ];
        all.into_iter().filter_map(|(path, value)| Some((path.to_owned(), value?.to_owned()))).collect()
    }

    fn options(&self) -> TracingOptions {
        let (ratio, detail) = (self.sampling, self.detail);
        let (engine_steps, scrapes) = (self.engine_steps, self.scrapes);
        let (otlp, otlp_metrics) = (self.otlp.clone(), self.otlp_metrics.clone());
        TracingOptions { ratio, otlp, otlp_metrics, detail, engine_steps, scrapes }
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((path, value)) if !path.is_empty() => Ok((path.to_owned(), value.to_owned())),
        Some(_) | None => Err("expected PATH=VALUE, for example workload.arrivals.rate=20".to_owned()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(r) if (0.0..=1.0).contains(&r) => Ok(r),
        Ok(_) | Err(_) => Err("expected a number from 0 to 1".to_owned()),
    }
}
