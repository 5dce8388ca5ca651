//! The index of KV events as a service of its own: gateways ask it which engines hold a prompt.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use gateway::cli::{OutputArgs, Pushing};
use gateway::core::config::GatewayConfig;
use gateway::epp;
use gateway::server::{Backend, KvManager};
use shared::clock::RunClock;
use shared::config::ConfigErrors;
use shared::metrics::Source;
use shared::trace::config::{Layer, MetricsConfig};
use shared::trace::policy::Hold;
use shared::trace::{Resource, Telemetry, TelemetryConfig, Tracer, fold_on_panic};

/// Follows the KV events of vLLM engines and answers which of them hold a prompt (POST /v1/score).
///
/// Telemetry is configured by the OTEL_* variables too; options win over them.
#[derive(Debug, Parser)]
#[command(name = "kv-cache-manager", version)]
struct Options {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8200")]
    listen: SocketAddr,
    /// An engine: its name, which gateways know it by, and base URL. Repeat for more.
    #[arg(long = "endpoint", value_name = "NAME=URL", required = true)]
    endpoints: Vec<Backend>,
    /// Configuration of a gateway, of which precise_prefix and access_log are read, or an EndpointPickerConfig of llm-d.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Changes one field of the configuration, for example precise_prefix.block_tokens=64. Repeat for more.
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// Share of traces to keep, 0 to 1, where the caller has not decided [default: 0.1].
    #[arg(long, value_name = "RATIO")]
    sampling: Option<f64>,
    /// Share of batches of KV events that get a trace of their own, 0 to 1 [default: 0].
    #[arg(long, value_name = "RATIO")]
    kv_events: Option<f64>,
    /// Send traces to this collector: port 4317 means gRPC, others HTTP.
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Write traces to this file, as OTLP JSON lines.
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Hold what is recorded of requests that the gateway may keep for what becomes of them (64 MiB, 60 s), and take its word for it at
    /// /internal/sampling/keep.
    #[arg(long)]
    hold_candidates: bool,
    /// Name of this instance in traces.
    #[arg(long, value_name = "NAME", default_value = "kv-cache-manager-0")]
    instance: String,
    /// What to log: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: String,
    /// Log a line at level info for every request that is over.
    #[arg(long)]
    access_log: bool,
    #[command(flatten)]
    output: OutputArgs,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (path, value) = text.split_once('=').ok_or("expected PATH=VALUE")?;
    Ok((path.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    options.output.start_log(&options.log)?;
    let config = config(options)?;
    let clock = RunClock::start();
    let (telemetry, resource, metrics) = telemetry(options, clock)?;
    fold_on_panic(&telemetry, &["main"]);
    let tracer = telemetry.tracer(resource.clone());
    let pushing = Pushing::start(&metrics, resource, clock, metrics_of(&tracer))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        let endpoints = options.endpoints.clone();
        let manager = KvManager::bind(options.listen, config.precise_prefix, endpoints, tracer, clock).await?;
        let manager = manager.access_log(config.access_log);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), addr = %manager.local_addr(), "listening");
        anyhow::Ok(manager.run(stop_signal()?).await?)
    })?;
    runtime.shutdown_background();
    let telemetry = telemetry.shutdown(clock.now());
    pushing.stop();
    tracing::info!(?telemetry, "stopped");
    Ok(())
}

fn config(options: &Options) -> anyhow::Result<GatewayConfig> {
    let mut set = options.set.clone();
    set.extend(options.access_log.then(|| ("access_log".to_owned(), "true".to_owned())));
    let own = options.config.as_deref().filter(|path| !epp::is_epp(path));
    let loaded = match own {
        Some(path) => shared::config::load::<GatewayConfig>(path, &set),
        None => shared::config::load_str::<GatewayConfig>("defaults", "{}", &set),
    };
    let mut config = loaded.map_err(told)?.config;
    if own.is_none() {
        config.epp_config = options.config.clone();
    }
    // What a gateway does not support is no concern of its index.
    config.allow_unsupported = true;
    epp::resolve(&mut config, own).map_err(told)?;
    Ok(config)
}

/// These errors come with their own heading.
fn told(errors: ConfigErrors) -> anyhow::Error {
    anyhow::anyhow!("{}", errors.to_string().trim_start_matches("error: "))
}

fn telemetry(options: &Options, clock: RunClock) -> anyhow::Result<(Telemetry, Resource, MetricsConfig)> {
    let layer = Layer {
        ratio: options.sampling,
        kv_events: options.kv_events,
        hold: options.hold_candidates.then(Hold::default),
        ..options.output.layer(options.otlp.as_deref(), options.trace_file.as_deref())
    };
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &|name| std::env::var(name).ok())?;
    warnings.iter().for_each(|w| tracing::warn!("{w}"));
    let name = config.service_name.clone().unwrap_or_else(|| "kv-cache-manager".to_owned());
    let metrics = config.metrics.clone();
    Ok((Telemetry::live(config, clock)?, Resource::new(name, options.instance.clone()).here(), metrics))
}

/// What the telemetry of this process says of itself.
fn metrics_of(tracer: &Tracer) -> Source {
    let tracer = tracer.clone();
    Arc::new(move || tracer.metrics())
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
    })
}
