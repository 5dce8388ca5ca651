//! The routing sidecar as a program of its own: in front of one engine that decodes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use gateway::cli::{OutputArgs, Pushing};
use gateway::pd_proxy::core::{Allowed, PdProxyConfig};
use gateway::pd_proxy::server::Server;
use gateway::server::Backend;
use shared::clock::RunClock;
use shared::config::ConfigErrors;
use shared::open_files::OpenFiles;
use shared::time::Dur;
use shared::trace::config::{Layer, MetricsConfig};
use shared::trace::policy::Hold;
use shared::trace::{Resource, Telemetry, TelemetryConfig, fold_on_panic};

/// A routing sidecar in the manner of llm-d's: has another engine prefill first where the gateway says so (x-prefiller-host-port),
/// and then its own engine decode.
///
/// Telemetry is configured by the OTEL_* variables too; options win over them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  pd-proxy --listen 127.0.0.1:8000 --engine http://127.0.0.1:8200 --allow 127.0.0.1:8100"
)]
struct Options {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Address of a page of the sidecar's own metrics (/metrics); none when absent. At the other address that path is the engine's.
    #[arg(long, value_name = "ADDR")]
    metrics_listen: Option<SocketAddr>,
    /// Base URL of the engine that decodes.
    #[arg(long, value_name = "URL")]
    engine: String,
    /// An engine that may be asked to prefill: HOST, at any port, or HOST:PORT. Repeat for more; any other is answered with 403.
    #[arg(long = "allow", value_name = "HOST[:PORT]", required_unless_present = "allow_any")]
    allow: Vec<String>,
    /// Ask whomever the header names: only where nobody but the gateway can send requests here.
    #[arg(long, conflicts_with = "allow")]
    allow_any: bool,
    /// Configuration: retries, time limits, bounds.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Changes one field of the configuration, for example prefill_max_retries=2. Repeat for more.
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// Share of traces to keep, 0 to 1, where the caller has not decided [default: 0.1].
    #[arg(long, value_name = "RATIO")]
    sampling: Option<f64>,
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
    /// Turn telemetry off: trace headers pass untouched.
    #[arg(long)]
    no_telemetry: bool,
    /// Name of this instance in traces.
    #[arg(long, value_name = "NAME", default_value = "pd-proxy-0")]
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

/// How much longer than a request its record stays open, for the end to be noticed.
const GRACE: Dur = Dur::from_secs(60);

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
    OpenFiles::raise();
    let config = config(options)?;
    let engine = Backend::new("engine", &options.engine).context("--engine")?;
    let allowed = allowed(options)?;
    let clock = RunClock::start();
    let (telemetry, resource, metrics) = telemetry(options, &config, clock)?;
    fold_on_panic(&telemetry, &["main"]);
    let tracer = telemetry.tracer(resource.clone());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let pushing = runtime.block_on(async {
        let mut server = Server::bind(options.listen, config, engine, tracer, clock).await?.allowing(allowed);
        if let Some(addr) = options.metrics_listen {
            let (measured, addr) = server.measured(addr).await?;
            tracing::info!(%addr, "metrics");
            server = measured;
        }
        tracing::info!(version = env!("CARGO_PKG_VERSION"), addr = %server.local_addr(), "listening");
        let pushing = Pushing::start(&metrics, resource, clock, server.metrics())?;
        server.run(stop_signal()?).await;
        anyhow::Ok(pushing)
    })?;
    // Whatever still runs is recorded as abandoned below.
    runtime.shutdown_background();
    let telemetry = telemetry.shutdown(clock.now());
    pushing.stop();
    tracing::info!(?telemetry, "stopped");
    Ok(())
}

fn config(options: &Options) -> anyhow::Result<PdProxyConfig> {
    let mut set = options.set.clone();
    set.extend(options.access_log.then(|| ("access_log".to_owned(), "true".to_owned())));
    let loaded = match &options.config {
        Some(path) => shared::config::load::<PdProxyConfig>(path, &set),
        None => shared::config::load_str::<PdProxyConfig>("defaults", "{}", &set),
    };
    // These errors come with their own heading.
    let told = |errors: ConfigErrors| anyhow::anyhow!("{}", errors.to_string().trim_start_matches("error: "));
    Ok(loaded.map_err(told)?.config)
}

fn allowed(options: &Options) -> anyhow::Result<Allowed> {
    if options.allow_any {
        tracing::warn!("--allow-any: whoever can send requests here can have them sent anywhere");
        return Ok(Allowed::Any);
    }
    for entry in &options.allow {
        Allowed::these([entry.as_str()])
            .map_err(|_| anyhow::anyhow!("--allow: found {entry:?}, expected HOST or HOST:PORT"))?;
    }
    Allowed::these(options.allow.iter().map(String::as_str)).context("--allow")
}

fn telemetry(
    options: &Options,
    proxy: &PdProxyConfig,
    clock: RunClock,
) -> anyhow::Result<(Telemetry, Resource, MetricsConfig)> {
    let layer = Layer {
        disabled: options.no_telemetry.then_some(true),
        ratio: options.sampling,
        max_open: Some(TelemetryConfig::default().max_open.max(proxy.timeouts.total.get() + GRACE)),
        hold: options.hold_candidates.then(Hold::default),
        ..options.output.layer(options.otlp.as_deref(), options.trace_file.as_deref())
    };
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &|name| std::env::var(name).ok())?;
    warnings.iter().for_each(|w| tracing::warn!("{w}"));
    let name = config.service_name.clone().unwrap_or_else(|| config.naming.service("pd-proxy").to_owned());
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
