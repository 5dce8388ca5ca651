//! The gateway as a program of its own: in front of any OpenAI-compatible engines.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use gateway::cli::{OutputArgs, Pushing};
use gateway::core::config::GatewayConfig;
use gateway::epp;
use gateway::server::{Backend, Server, Stats};
use shared::clock::RunClock;
use shared::config::ConfigErrors;
use shared::open_files::OpenFiles;
use shared::rng::Seed;
use shared::time::Dur;
use shared::trace::config::{Layer, MetricsConfig};
use shared::trace::{Policy, Resource, Telemetry, TelemetryConfig, fold_on_panic};

/// An inference gateway in the manner of llm-d: filters, scores and picks an engine for each request, and traces why.
///
/// Telemetry is configured by the OTEL_* variables too; options win over them.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// An engine: its name and base URL, and labels such as llm-d.ai/role=prefill. Repeat for more. Without one the configuration
    /// says where engines are found (discovery).
    #[arg(long = "endpoint", value_name = "NAME=URL[,LABEL=VALUE]")]
    endpoints: Vec<Backend>,
    /// Configuration of the gateway (plugins and weights, time limits, scrape interval), or an EndpointPickerConfig of llm-d.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Leave out what is not supported of an EndpointPickerConfig, and say so, instead of refusing it.
    #[arg(long)]
    allow_unsupported: bool,
    /// Changes one field of the configuration, for example metrics.scrape_interval=100ms. Repeat for more.
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// Share of traces to keep, 0 to 1, where the caller has not decided [default: 0.1].
    #[arg(long, value_name = "RATIO")]
    sampling: Option<f64>,
    /// What is kept beyond that ratio: rules, force, rate_limit and keep, as below `tracing` in a scenario (docs/sampling.md).
    #[arg(long, value_name = "FILE")]
    sampling_policy: Option<PathBuf>,
    /// Detail of traces: 1 lifecycle, 2 decisions, 3 fine [default: 2].
    #[arg(long, value_name = "LEVEL")]
    detail: Option<u8>,
    /// Share of batches of KV events that get a trace of their own, 0 to 1 [default: 0].
    #[arg(long, value_name = "RATIO")]
    kv_events: Option<f64>,
    /// Share of the scrapes of engines that get a trace of their own, 0 to 1.
    #[arg(long, value_name = "RATIO", default_value_t = 0.01)]
    scrapes: f64,
    /// Send traces to this collector: port 4317 means gRPC, others HTTP.
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Write traces to this file, as OTLP JSON lines.
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Turn telemetry off: trace headers pass untouched.
    #[arg(long)]
    no_telemetry: bool,
    /// Name of this instance in traces.
    #[arg(long, value_name = "NAME", default_value = "gateway-0")]
    instance: String,
    /// Seed of the picker's random draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What to log: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: String,
    /// Log a line at level info for every request that is over.
    #[arg(long)]
    access_log: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// How much longer than a request its record stays open, for the end to be noticed.
const GRACE: Dur = Dur::from_secs(60);

fn assignment(text: &str) -> Result<(String, String), String> {
    let (path, value) = text.split_once('=').ok_or("expected PATH=VALUE")?;
    Ok((path.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    options.output.start_log(&options.log)?;
    // Every request in flight is two connections, and a connection is an open file.
    let files = OpenFiles::raise();
    tracing::info!(limit = files.limit, "open files");
    let config = config(&options)?;
    if options.endpoints.is_empty() && config.discovery.is_empty() {
        anyhow::bail!("no engines: expected --endpoint NAME=URL, or discovery in the configuration");
    }
    let clock = RunClock::start();
    let (telemetry, resource, metrics) = telemetry(&options, &config, clock)?;
    fold_on_panic(&telemetry, &["main"]);
    let tracer = telemetry.tracer(resource.clone());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let (stats, pushing) = runtime.block_on(async {
        let server = Server::bind(options.listen, config, options.endpoints, tracer, clock, Seed(options.seed)).await?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), seed = options.seed, addr = %server.local_addr(), "listening");
        let pushing = Pushing::start(&metrics, resource, clock, server.metrics())?;
        Ok::<(Stats, Pushing), anyhow::Error>((server.run(stop_signal()?).await, pushing))
    })?;
    // Whatever still runs is recorded as abandoned below.
    runtime.shutdown_background();
    let telemetry = telemetry.shutdown(clock.now());
    pushing.stop();
    tracing::info!(?stats, ?telemetry, "stopped");
    Ok(())
}

/// The configuration: the file's, or that of an EndpointPickerConfig over the defaults.
fn config(options: &Options) -> anyhow::Result<GatewayConfig> {
    let mut set = options.set.clone();
    for (name, on) in [("allow_unsupported", options.allow_unsupported), ("access_log", options.access_log)] {
        set.extend(on.then(|| (name.to_owned(), "true".to_owned())));
    }
    let own = options.config.as_deref().filter(|path| !epp::is_epp(path));
    let loaded = match own {
        Some(path) => shared::config::load::<GatewayConfig>(path, &set),
        None => shared::config::load_str::<GatewayConfig>("defaults", "{}", &set),
    };
    let mut config = loaded.map_err(told)?.config;
    if own.is_none()
        && let Some(path) = &options.config
    {
        config.epp_config = Some(path.clone());
    }
    let warnings = epp::resolve(&mut config, own).map_err(told)?;
    warnings.iter().for_each(|w| tracing::warn!("{w}"));
    Ok(config)
}

/// What traces are kept for beyond their ratio.
fn policy(options: &Options) -> anyhow::Result<Option<Policy>> {
    let Some(path) = &options.sampling_policy else { return Ok(None) };
    Ok(Some(shared::config::load::<Policy>(path, &[]).map_err(told)?.config))
}

/// These errors come with their own heading.
fn told(errors: ConfigErrors) -> anyhow::Error {
    anyhow::anyhow!("{}", errors.to_string().trim_start_matches("error: "))
}

/// The age at which an open record is given up: later than any request can end.
fn max_open(config: &GatewayConfig) -> Dur {
    TelemetryConfig::default().max_open.max(config.timeouts.total.get() + GRACE)
}

fn telemetry(
    options: &Options,
    gateway: &GatewayConfig,
    clock: RunClock,
) -> anyhow::Result<(Telemetry, Resource, MetricsConfig)> {
    let layer = Layer {
        disabled: options.no_telemetry.then_some(true),
        ratio: options.sampling,
        policy: policy(options)?,
        detail: options.detail,
        kv_events: options.kv_events,
        scrapes: Some(options.scrapes),
        max_open: Some(max_open(gateway)),
        ..options.output.layer(options.otlp.as_deref(), options.trace_file.as_deref())
    };
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &|name| std::env::var(name).ok())?;
    warnings.iter().for_each(|w| tracing::warn!("{w}"));
    if config.exporters.is_empty() && !config.disabled {
        tracing::info!("no exporter: traces are continued but kept nowhere (see --otlp and --trace-file)");
    }
    let name = config.service_name.clone().unwrap_or_else(|| config.naming.service("inference-gateway").to_owned());
    let metrics = config.metrics.clone();
    Ok((Telemetry::live(config, clock)?, Resource::new(name, options.instance.clone()).here(), metrics))
}

/// Ready at the first SIGINT or SIGTERM.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: requests in flight may finish");
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::units::HumanDur;

    #[test]
    fn a_record_outlives_the_longest_request() {
        let mut config = GatewayConfig::default();
        for seconds in [1, 600, 7200] {
            config.timeouts.total = HumanDur::secs(seconds);
            assert!(max_open(&config) >= Dur::from_secs(seconds) + GRACE, "{seconds}");
        }
    }
}
