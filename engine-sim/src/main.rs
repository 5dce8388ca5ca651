//! One emulated vLLM engine as a process of its own.

mod args;
mod tools;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use args::{FrontendArgs, OutputArgs};
use clap::Parser;
use engine_sim::core::config::{BucketFamily, EngineConfig, HashAlgo, KvEventsConfig, ObservabilityConfig, Policy};
use engine_sim::core::engine::Engine;
use engine_sim::core::faults::{FaultRule, Faults};
use engine_sim::core::kv_transfer::KvTransferConfig;
use engine_sim::core::latency::LatencyProfile;
use engine_sim::profiles;
use engine_sim::server::control::Control;
use engine_sim::server::pacing::{EngineHandle, Pacer};
use engine_sim::server::{Server, ServerConfig};
use shared::clock::RunClock;
use shared::metrics::Pusher;
use shared::open_files::OpenFiles;
use shared::rng::Seed;
use shared::trace::config::{ExporterChoice, Layer, OtlpChoice};
use shared::trace::policy::Hold;
use shared::trace::{Resource, Telemetry, TelemetryConfig, fold_on_panic};

/// A vLLM v1 engine emulator: OpenAI-compatible server, vLLM's scheduler and metrics, latencies of a GPU that is not there.
#[derive(Debug, Parser)]
#[command(
    name = "engine-sim",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Example:
  engine-sim --profile llama-3.1-8b-h100 --port 8100
  curl -s http://127.0.0.1:8100/v1/completions -H 'content-type: application/json' -d '{\"prompt\":\"Hello\",\"max_tokens\":8}'"
)]
struct Cli {
    #[command(subcommand)]
    tool: Option<tools::Tool>,
    /// Latency profile: a built-in name (`engine-sim profiles` lists them) or the path of a .yaml file.
    #[arg(long, default_value = LatencyProfile::DEFAULT_NAME)]
    profile: String,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: std::net::IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Longest request in tokens, prompt and output together.
    #[arg(long)]
    max_model_len: Option<u32>,
    /// Most tokens in one step.
    #[arg(long)]
    max_num_batched_tokens: Option<u32>,
    /// Most requests in one step.
    #[arg(long)]
    max_num_seqs: Option<u32>,
    /// Most prompt tokens of one request in one step while others are there; 0 for no limit.
    #[arg(long)]
    long_prefill_token_threshold: Option<u32>,
    /// Order in which requests are admitted.
    #[arg(long, value_parser = ["fcfs", "priority"], default_value = "fcfs")]
    scheduling_policy: String,
    /// Tokens in a block of the KV cache.
    #[arg(long)]
    block_size: Option<u32>,
    /// Blocks of the KV cache.
    #[arg(long)]
    num_gpu_blocks_override: Option<u32>,
    /// Requests that may be open, waiting or running, before further ones are refused with 503.
    #[arg(long)]
    max_num_queued_reqs: Option<u32>,
    /// How blocks are named; only `sha256_cbor` gives the names that a vLLM with the same setting gives.
    #[arg(long, value_parser = ["chain", "sha256_cbor"], default_value = "chain")]
    prefix_caching_hash_algo: String,
    /// Publish KV events, configured as vLLM's are: JSON with the fields of `kv_events_config` in a scenario.
    #[arg(long, value_name = "JSON", value_parser = kv_events)]
    kv_events_config: Option<KvEventsConfig>,
    /// Other bucket bounds for families of histograms: JSON such as '{"request_latency": [0.01, 0.1, 1]}'.
    #[arg(long, value_name = "JSON", value_parser = buckets)]
    custom_histogram_buckets: Option<Buckets>,
    /// Measure how long KV blocks keep their content.
    #[arg(long)]
    kv_cache_metrics: bool,
    /// Fraction of the blocks that is followed for that.
    #[arg(long, default_value_t = 0.01)]
    kv_cache_metrics_sample: f64,
    /// Turn prefix caching off.
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Schedule a step only when the one before it is complete.
    #[arg(long)]
    no_async_scheduling: bool,
    /// KV connector, as JSON: {"kv_connector":"NixlConnector","kv_role":"kv_producer"}. Its side channel is at
    /// VLLM_NIXL_SIDE_CHANNEL_HOST (127.0.0.1) and _PORT (any free one).
    #[arg(long, value_name = "JSON", value_parser = KvTransferConfig::parse)]
    kv_transfer_config: Option<KvTransferConfig>,
    /// Say in usage how much of the prompt was cached.
    #[arg(long)]
    enable_prompt_tokens_details: bool,
    /// Send spans to this OTLP endpoint; OTEL_* variables are honoured as well.
    #[arg(long, value_name = "URL")]
    otlp_traces_endpoint: Option<String>,
    /// Write spans to this file as OTLP JSON lines.
    #[arg(long, value_name = "PATH")]
    trace_file: Option<std::path::PathBuf>,
    /// Hold what is recorded of requests that the gateway may keep for what becomes of them (64 MiB, 60 s), and take its word for it at
    /// /internal/sampling/keep.
    #[arg(long)]
    hold_candidates: bool,
    /// Detail of the spans: 1 lifecycle, 2 decisions, 3 the parts of executions.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=3))]
    detail: Option<u8>,
    /// vLLM's option for timings of the model's execution: the same as a detail of 3.
    #[arg(long, value_parser = ["model", "worker", "all"], value_delimiter = ',', conflicts_with = "detail")]
    collect_detailed_traces: Vec<String>,
    /// Share of engine steps that get a trace of their own, 0 to 1; none if not given.
    #[arg(long, value_name = "R")]
    engine_steps: Option<f64>,
    /// A fault, as in a scenario, for example '{kind: slow, at: 5s, for: 2s, factor: 3}'; may be repeated. See docs/faults.md.
    #[arg(long, value_name = "RULE", value_parser = fault)]
    fault: Vec<FaultRule>,
    /// Let requests ask for a fault of their own with the header X-Igsim-Fault or X-Return-Error.
    #[arg(long)]
    fault_headers: bool,
    /// A loopback address at which faults can be asked for while the engine runs.
    #[arg(long, value_name = "ADDRESS")]
    control: Option<SocketAddr>,
    /// Seed of what faults draw.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Name of this instance in traces.
    #[arg(long, default_value = "engine-0")]
    instance: String,
    #[command(flatten)]
    frontend: FrontendArgs,
    #[command(flatten)]
    output: OutputArgs,
}

fn kv_events(json: &str) -> Result<KvEventsConfig, String> {
    serde_json::from_str(json).map_err(|e| e.to_string())
}

type Buckets = BTreeMap<BucketFamily, Vec<f64>>;

fn buckets(json: &str) -> Result<Buckets, String> {
    serde_json::from_str(json).map_err(|e| e.to_string())
}

fn fault(text: &str) -> Result<FaultRule, String> {
    shared::config::load_str("--fault", text, &[]).map(|loaded| loaded.config).map_err(|e| e.to_string())
}

/// The engine, with faults if any are wanted.
fn engine(cli: &Cli, config: &EngineConfig, profile: Arc<LatencyProfile>) -> Engine {
    let engine = Engine::new(config.clone(), profile);
    if cli.fault.is_empty() && !cli.fault_headers && cli.control.is_none() {
        return engine;
    }
    let faults = Faults::new(Seed(cli.seed), &cli.instance, &cli.fault);
    engine.with_faults(faults.by_header(cli.fault_headers))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The access log is not written unless it is asked for.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn,access=info".into());
    shared::log::init(filter, cli.output.log_format);
    if let Some(tool) = cli.tool {
        return tool.run();
    }
    // Every stream is a connection, and a connection is an open file.
    let files = OpenFiles::raise();
    tracing::info!(limit = files.limit, "open files");
    let config = match config(&cli) {
        Ok(config) => config,
        Err(problem) => {
            eprintln!("error: {problem:#}");
            return ExitCode::from(2);
        }
    };
    let profile = match profiles::find(&config.profile) {
        Ok(profile) => profile,
        Err(error) => return tools::bad_input(&tools::profile_problem(&error)),
    };
    let problems = config.validate(&profile);
    if !problems.is_empty() {
        problems.iter().for_each(|p| eprintln!("error: {p}"));
        return ExitCode::from(2);
    }
    match serve(&cli, config, profile) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn config(cli: &Cli) -> anyhow::Result<EngineConfig> {
    let mut config = EngineConfig { profile: cli.profile.clone(), ..EngineConfig::default() };
    config.max_model_len = cli.max_model_len.or(config.max_model_len);
    config.max_num_queued_reqs = cli.max_num_queued_reqs;
    let scheduler = &mut config.scheduler;
    scheduler.max_num_batched_tokens = cli.max_num_batched_tokens.unwrap_or(scheduler.max_num_batched_tokens);
    scheduler.max_num_seqs = cli.max_num_seqs.unwrap_or(scheduler.max_num_seqs);
    scheduler.async_scheduling = !cli.no_async_scheduling;
    scheduler.long_prefill_token_threshold =
        cli.long_prefill_token_threshold.unwrap_or(scheduler.long_prefill_token_threshold);
    scheduler.policy = if cli.scheduling_policy == "priority" { Policy::Priority } else { Policy::Fcfs };
    config.cache.block_size = cli.block_size.unwrap_or(config.cache.block_size);
    config.cache.num_gpu_blocks = cli.num_gpu_blocks_override;
    config.cache.enable_prefix_caching = !cli.no_enable_prefix_caching;
    config.cache.prefix_caching_hash_algo =
        if cli.prefix_caching_hash_algo == "chain" { HashAlgo::Chain } else { HashAlgo::Sha256Cbor };
    config.kv_events_config = cli.kv_events_config.clone().unwrap_or_default();
    config.observability = ObservabilityConfig {
        custom_histogram_buckets: cli.custom_histogram_buckets.clone().unwrap_or_default(),
        kv_cache_metrics: cli.kv_cache_metrics,
        kv_cache_metrics_sample: cli.kv_cache_metrics_sample,
    };
    // vLLM's name for it.
    if std::env::var("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES").is_ok_and(|v| v == "0") {
        config.kv_events_config.use_int_block_hashes = false;
    }
    cli.frontend.apply(&mut config);
    config.kv_transfer = cli.kv_transfer_config.clone();
    if let Some(kv) = &mut config.kv_transfer {
        side_channel(kv)?;
    }
    Ok(config)
}

/// vLLM takes the address of the side channel from its environment.
fn side_channel(kv: &mut KvTransferConfig) -> anyhow::Result<()> {
    let extra = &mut kv.kv_connector_extra_config;
    if let Ok(host) = std::env::var("VLLM_NIXL_SIDE_CHANNEL_HOST") {
        extra.side_channel_host = host.parse().with_context(|| {
            format!("VLLM_NIXL_SIDE_CHANNEL_HOST: found {host:?}, expected an address such as 127.0.0.1")
        })?;
    }
    if let Ok(port) = std::env::var("VLLM_NIXL_SIDE_CHANNEL_PORT") {
        extra.side_channel_port = port
            .parse()
            .with_context(|| format!("VLLM_NIXL_SIDE_CHANNEL_PORT: found {port:?}, expected a port in 0..=65535"))?;
    }
    Ok(())
}

fn serve(cli: &Cli, config: EngineConfig, profile: Arc<LatencyProfile>) -> anyhow::Result<()> {
    let clock = RunClock::start();
    let config_of_telemetry = telemetry(cli)?;
    let service = config_of_telemetry.service_name.clone().unwrap_or_else(|| "vllm".to_owned());
    let metrics = config_of_telemetry.metrics.clone();
    let telemetry = Telemetry::live(config_of_telemetry, clock)?;
    fold_on_panic(&telemetry, &["main", "pacing"]);
    let mut resource = Resource::new(service, cli.instance.as_str()).here();
    resource.version = Some(engine_sim::server::VLLM_VERSION.into());
    let tracer = telemetry.tracer(resource.clone());
    let of_tracer = tracer.clone();
    let pusher = Pusher::start(&metrics, resource, clock, Arc::new(move || of_tracer.metrics()))?;
    let pacer = Pacer::start(clock, vec![engine(cli, &config, Arc::clone(&profile))])?;
    let server = ServerConfig {
        model: cli.frontend.model(&profile.model).into(),
        engine: config,
        max_body_bytes: 64 << 20,
        prompt_tokens_details: cli.enable_prompt_tokens_details,
        frontend: cli.frontend.frontend(),
        on_served: None,
    };
    let model = Arc::clone(&server.model);
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let address = SocketAddr::new(cli.host, cli.port);
        let bound = Server::bind(address, server, pacer.engine(0), tracer, clock).await;
        let bound = bound.with_context(|| format!("cannot listen on {address}"))?;
        control(cli, pacer.engine(0), clock).await?;
        println!("engine-sim {} serves {model} on http://{}", env!("CARGO_PKG_VERSION"), bound.local_addr()?);
        bound.run(stop_signal()).await.map_err(anyhow::Error::from)
    })?;
    let stats = telemetry.shutdown(clock.now());
    let pushed = pusher.into_iter().flat_map(Pusher::stop);
    for lost in pushed.filter(|e| e.dropped.total() > 0) {
        let why = lost.last_error.as_deref().unwrap_or("no reason given");
        eprintln!("warning: {}: {} series dropped ({why})", lost.name, lost.dropped.total());
    }
    for exporter in stats.exporters.iter().filter(|e| e.dropped.total() > 0) {
        let why = exporter.last_error.as_deref().unwrap_or("no reason given");
        eprintln!("warning: {}: {} spans dropped ({why})", exporter.name, exporter.dropped.total());
    }
    Ok(())
}

/// Serves the control address, if there is one, until the process ends.
async fn control(cli: &Cli, engine: EngineHandle, clock: RunClock) -> anyhow::Result<()> {
    let Some(address) = cli.control else { return Ok(()) };
    let control = Control::bind(address, vec![(cli.instance.clone(), engine)], clock).await;
    let control = control.with_context(|| format!("cannot take faults at {address}"))?;
    println!("faults of {} at http://{}/faults", cli.instance, control.local_addr()?);
    tokio::spawn(control.run(std::future::pending()));
    Ok(())
}

fn telemetry(cli: &Cli) -> anyhow::Result<TelemetryConfig> {
    let otlp = cli.otlp_traces_endpoint.as_ref().map(|url| ExporterChoice::Otlp(OtlpChoice::to(url)));
    let file = cli.trace_file.as_deref().map(|path| cli.output.file(path));
    let metrics: Vec<_> = cli.output.otlp_metrics.iter().map(OtlpChoice::to).collect();
    let exporters: Vec<_> = otlp.into_iter().chain(file).collect();
    let layer = Layer {
        exporters: (!exporters.is_empty()).then_some(exporters),
        metrics: (!metrics.is_empty()).then_some(metrics),
        naming: cli.output.naming,
        langfuse: cli.output.langfuse.then_some(true),
        prices: cli.output.prices.clone(),
        detail: if cli.collect_detailed_traces.is_empty() { cli.detail } else { Some(3) },
        engine_steps: cli.engine_steps,
        hold: cli.hold_candidates.then(Hold::default),
        ..Layer::default()
    };
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &|key| std::env::var(key).ok())?;
    warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    Ok(config)
}

/// Ctrl-C or SIGTERM.
async fn stop_signal() {
    let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(signal) => signal,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM cannot be caught; Ctrl-C stops the server");
            let _ = tokio::signal::ctrl_c().await;
            return;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
    eprintln!("stopping: open answers are finished first; again to stop at once");
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        // 128 and the number of SIGINT, as shells have it.
        std::process::exit(130);
    });
}
