//! Telemetry configuration: built once from layers, command line over scenario file over environment over defaults.
//!
//! A wrong value on the command line or in a file is an error; a wrong environment variable is a warning and the default is
//! used, as the OpenTelemetry specification asks. The variables themselves are read in `env.rs`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::ConfigErrors;
use crate::time::Dur;
use crate::trace::env::EnvLayer;
use crate::trace::exporter::console::ConsoleTarget;
use crate::trace::exporter::memory::MemorySpans;
use crate::trace::langfuse::Langfuse;
use crate::trace::naming::Naming;
use crate::trace::otlp_url::{OtlpUrl, OtlpUrlError, redacted};
use crate::trace::policy::{Hold, Keep, Policy};
use crate::trace::sampler::{Ratio, Sampler, SamplerKind};

/// The share of traces kept unless something else is asked for; that of llm-d's router. A ratio sampler that the environment
/// names without a ratio keeps every trace instead, as the OpenTelemetry specification says.
pub const DEFAULT_RATIO: f64 = 0.1;

/// How telemetry behaves in one process.
#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    /// No ids, no parsing, no records: inbound headers are forwarded untouched (`OTEL_SDK_DISABLED`).
    pub disabled: bool,
    /// Decides which traces are recorded.
    pub sampler: Sampler,
    /// What the edge does beyond its sampler.
    pub policy: Policy,
    /// How much is held of candidates that an edge may keep; `None` believes nobody who says that there are any.
    pub hold: Option<Hold>,
    /// How much a record is folded into: 1 lifecycle, 2 decisions, 3 fine.
    pub detail: u8,
    /// Whose names spans have.
    pub naming: Naming,
    /// Share of engine steps that get a trace of their own, whatever becomes of the requests in them; none unless asked for.
    pub engine_steps: Ratio,
    /// Share of batches of KV events that get a trace of their own where they are taken into an index; none unless asked for.
    pub kv_events: Ratio,
    /// Share of the gateway's scrapes of its endpoints that get a trace of their own; none unless asked for.
    pub scrapes: Ratio,
    /// How facts become spans.
    pub recorder: RecorderKind,
    /// Where spans go; none means that they are folded and counted only.
    pub exporters: Vec<ExporterConfig>,
    /// Records that may wait for the worker; further ones are dropped and counted.
    pub channel_capacity: usize,
    /// The longest time a span waits for its batch to fill.
    pub schedule_delay: Dur,
    /// The most spans in one batch.
    pub max_batch: usize,
    /// The most spans that wait for one network exporter; further batches are dropped and counted.
    pub max_queue: usize,
    /// The longest time for one export, with its retries.
    pub export_timeout: Dur,
    /// The age at which an open record is given up and folded as abandoned.
    pub max_open: Dur,
    /// The longest time that shutdown waits for exporters.
    pub flush_timeout: Dur,
    /// Whether W3C trace context is read and written (`OTEL_PROPAGATORS`).
    pub trace_context: bool,
    /// `OTEL_SERVICE_NAME`: for a process of one service, which passes it to its [`super::Resource`].
    pub service_name: Option<String>,
    /// Attributes added to every resource that does not set them itself.
    pub resource_attributes: Vec<(String, String)>,
    /// Where metrics are pushed to; nowhere unless asked for.
    pub metrics: MetricsConfig,
    /// What spans say to Langfuse; nothing unless asked for.
    pub langfuse: Option<Arc<Langfuse>>,
}

/// How metrics are pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Collectors; none means that metrics are only there to be read.
    pub otlp: Vec<OtlpConfig>,
    /// Time between two pushes (`OTEL_METRIC_EXPORT_INTERVAL`).
    pub interval: Dur,
    /// The longest time that the last push may take.
    pub flush_timeout: Dur,
    /// Attributes added to a resource that does not set them itself.
    pub resource_attributes: Vec<(String, String)>,
}

impl Default for MetricsConfig {
    fn default() -> MetricsConfig {
        let (interval, flush_timeout) = (DEFAULT_METRICS_INTERVAL, Dur::from_secs(5));
        MetricsConfig { otlp: Vec::new(), interval, flush_timeout, resource_attributes: Vec::new() }
    }
}

/// Time between two pushes of metrics unless something else is asked for, OpenTelemetry's default.
pub const DEFAULT_METRICS_INTERVAL: Dur = Dur::from_secs(60);

impl Default for TelemetryConfig {
    fn default() -> TelemetryConfig {
        TelemetryConfig {
            disabled: false,
            sampler: SamplerKind::ParentBasedTraceIdRatio.with(default_ratio()),
            policy: Policy::default(),
            hold: None,
            detail: 2,
            naming: Naming::Proposal,
            engine_steps: Ratio::NONE,
            kv_events: Ratio::NONE,
            scrapes: Ratio::NONE,
            recorder: RecorderKind::Deferred,
            exporters: Vec::new(),
            channel_capacity: 8_192,
            schedule_delay: Dur::from_secs(1),
            max_batch: 512,
            max_queue: 16_384,
            export_timeout: Dur::from_secs(10),
            max_open: Dur::from_secs(600),
            flush_timeout: Dur::from_secs(5),
            trace_context: true,
            service_name: None,
            resource_attributes: Vec::new(),
            metrics: MetricsConfig::default(),
            langfuse: None,
        }
    }
}

/// How facts become spans: the same spans, at different cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecorderKind {
    /// Kept in a record, folded in the background when the request ends.
    #[default]
    Deferred,
    /// Each fact at once as calls of the OpenTelemetry SDK, as most instrumented programs do it.
    Eager,
}

/// How spans become bytes for a collector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OtlpEncoding {
    /// By opentelemetry-otlp, from the SDK's own span data.
    #[default]
    Sdk,
    /// Straight from the record. Only with [`RecorderKind::Deferred`].
    Direct,
}

/// A destination of spans.
#[derive(Clone, Debug)]
pub enum ExporterConfig {
    /// A collector or backend.
    Otlp(OtlpConfig),
    /// A file of OTLP JSON lines, replaced if it exists.
    File(PathBuf),
    /// The same, in files of bounded size.
    RotatingFile(Rotation),
    /// Trees for people.
    Console(ConsoleTarget),
    /// Kept in memory, for tests and reports.
    Memory(MemorySpans),
}

/// A file that is put aside when it is full: `traces.jsonl` becomes `traces.jsonl.1`, that one `traces.jsonl.2`, and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// The file that is written to.
    pub path: PathBuf,
    /// The most bytes of a file; a single batch that is larger has a file of its own.
    pub max_bytes: u64,
    /// How many full files are kept beside it.
    pub keep: u32,
}

/// How to reach a collector. Its `Debug` form shows no credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct OtlpConfig {
    /// The whole URL for HTTP (with `/v1/traces`), scheme and authority for gRPC. May hold a key in its query: to show it, use
    /// [`OtlpConfig::address`].
    pub endpoint: String,
    /// Transport and encoding.
    pub protocol: OtlpProtocol,
    /// Headers (HTTP) or metadata (gRPC) of every request, for example for authentication.
    pub headers: Vec<(String, String)>,
    /// The longest time for one batch, with its retries.
    pub timeout: Dur,
    /// Whether bodies are compressed with gzip.
    pub gzip: bool,
    /// What encodes the spans.
    pub encoding: OtlpEncoding,
    /// PEM file with the only certificate authorities to believe; those of the web if `None`.
    pub ca_file: Option<PathBuf>,
}

/// What is sent to a collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Metrics.
    Metrics,
}

impl Signal {
    /// What OTLP over HTTP appends to the address of a collector (OTLP specification, "OTLP/HTTP Request").
    pub const fn path(self) -> &'static str {
        match self {
            Signal::Traces => "/v1/traces",
            Signal::Metrics => "/v1/metrics",
        }
    }

    /// The method that takes it over gRPC.
    pub(crate) const fn grpc_method(self) -> &'static str {
        match self {
            Signal::Traces => "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            Signal::Metrics => "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
        }
    }

    /// Its word in the names of environment variables.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Signal::Traces => "TRACES",
            Signal::Metrics => "METRICS",
        }
    }
}

impl OtlpConfig {
    /// The endpoint as people may see it: scheme, host, port and path.
    pub fn address(&self) -> String {
        redacted(&self.endpoint)
    }
}

impl fmt::Debug for OtlpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OtlpConfig { endpoint: _, protocol, headers, timeout, gzip, encoding, ca_file } = self;
        let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
        let mut debug = f.debug_struct("OtlpConfig");
        debug.field("address", &self.address()).field("protocol", protocol).field("headers", &names);
        debug.field("timeout", timeout).field("gzip", gzip).field("encoding", encoding);
        ca_file.iter().for_each(|path| _ = debug.field("ca_file", path));
        debug.finish()
    }
}

/// OTLP transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// `grpc`
    Grpc,
    /// `http/protobuf`
    HttpProtobuf,
}

impl fmt::Display for OtlpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OtlpProtocol::Grpc => "grpc",
            OtlpProtocol::HttpProtobuf => "http/protobuf",
        })
    }
}

/// What a command line or a file says; `None` leaves the choice to the layer below.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    /// Turns telemetry off or on.
    pub disabled: Option<bool>,
    /// The kind of sampler.
    pub sampler: Option<SamplerKind>,
    /// The ratio of a ratio sampler; alone it means `parentbased_traceidratio`.
    pub ratio: Option<f64>,
    /// What the edge does beyond its sampler; what it keeps later is held in this process too.
    pub policy: Option<Policy>,
    /// Whether to hold what another process's edge may keep.
    pub hold: Option<Hold>,
    /// How facts become spans.
    pub recorder: Option<RecorderKind>,
    /// The detail level, 1 to 3.
    pub detail: Option<u8>,
    /// Whose names spans have.
    pub naming: Option<Naming>,
    /// Share of engine steps that get a trace of their own.
    pub engine_steps: Option<f64>,
    /// Share of batches of KV events that get a trace of their own.
    pub kv_events: Option<f64>,
    /// Share of scrapes that get a trace of their own.
    pub scrapes: Option<f64>,
    /// Where spans go; replaces all exporters of the layers below.
    pub exporters: Option<Vec<ExporterChoice>>,
    /// The longest time a span waits for its batch to fill.
    pub schedule_delay: Option<Dur>,
    /// The age at which an open record is given up.
    pub max_open: Option<Dur>,
    /// The longest time that shutdown waits for exporters.
    pub flush_timeout: Option<Dur>,
    /// Where metrics are pushed to; replaces the endpoints of the layers below.
    pub metrics: Option<Vec<OtlpChoice>>,
    /// Time between two pushes of metrics.
    pub metrics_interval: Option<Dur>,
    /// Whether spans say what Langfuse wants to know.
    pub langfuse: Option<bool>,
    /// A table of prices for that.
    pub prices: Option<PathBuf>,
}

/// An OTLP endpoint as a user asks for it; what is left open comes from the environment. Its `Debug` form shows no credentials.
#[derive(Clone, Default)]
pub struct OtlpChoice {
    /// The endpoint: `http://host:4318`, `https://host/path`, `http://host:4317` (gRPC by its port). `None` takes
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` or the default of the protocol.
    pub url: Option<String>,
    /// The protocol; `None` takes `OTEL_EXPORTER_OTLP_PROTOCOL`, else derives it from the port.
    pub protocol: Option<OtlpProtocol>,
    /// What encodes the spans; `None` takes the cheapest that the recorder has: direct for records, the SDK's for its own spans.
    pub encoding: Option<OtlpEncoding>,
    /// Whether bodies are compressed; `None` takes `OTEL_EXPORTER_OTLP_COMPRESSION`.
    pub gzip: Option<bool>,
    /// Headers beside those of `OTEL_EXPORTER_OTLP_HEADERS`, in place of those of the same name.
    pub headers: Vec<(String, String)>,
    /// Certificate authorities; `None` takes `OTEL_EXPORTER_OTLP_CERTIFICATE`.
    pub ca_file: Option<PathBuf>,
}

impl OtlpChoice {
    /// An endpoint, with everything else left open.
    pub fn to(url: impl Into<String>) -> OtlpChoice {
        OtlpChoice { url: Some(url.into()), ..OtlpChoice::default() }
    }
}

impl fmt::Debug for OtlpChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OtlpChoice({})", self.url.as_deref().map(redacted).unwrap_or_default())
    }
}

/// An exporter as a user asks for it.
#[derive(Clone, Debug)]
pub enum ExporterChoice {
    /// A collector or backend.
    Otlp(OtlpChoice),
    /// A file of OTLP JSON lines.
    File(PathBuf),
    /// The same, in files of bounded size.
    RotatingFile(Rotation),
    /// Trees for people.
    Console(ConsoleTarget),
    /// Kept in memory.
    Memory(MemorySpans),
}

/// A value on the command line or in a file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: found `{found}`, {allowed}")]
pub struct ConfigError {
    /// The field, for example `tracing.ratio`.
    pub field: &'static str,
    /// What was found, without credentials.
    pub found: String,
    /// What is allowed.
    pub allowed: &'static str,
}

impl TelemetryConfig {
    /// Builds the configuration from its layers; `env` is usually `&|k| std::env::var(k).ok()`.
    ///
    /// Returns warnings about environment variables that were ignored. Fails on a value that the user gave in `command_line`
    /// or `file`.
    pub fn resolve(
        command_line: &Layer,
        file: &Layer,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(TelemetryConfig, Vec<String>), ConfigError> {
        let mut warnings = Vec::new();
        let env = EnvLayer::read(env, &mut warnings);
        let layers = [command_line, file];
        let first = |pick: fn(&Layer) -> Option<Dur>| layers.iter().find_map(|l| pick(l));
        let defaults = TelemetryConfig::default();
        let export_timeout = env.export_timeout.unwrap_or(defaults.export_timeout);
        let choices = layers.iter().find_map(|l| l.exporters.clone()).or_else(|| env.exporters.clone());
        let recorder = layers.iter().find_map(|l| l.recorder).unwrap_or(defaults.recorder);
        let exporters = choices.unwrap_or_default().into_iter().map(|c| exporter(c, recorder, &env));
        let exporters = exporters.collect::<Result<_, _>>()?;
        let policy = layers.iter().find_map(|l| l.policy.clone()).unwrap_or_default();
        let max_queue = env.max_queue.unwrap_or(defaults.max_queue);
        let config = TelemetryConfig {
            disabled: layers.iter().find_map(|l| l.disabled).or(env.disabled).unwrap_or(defaults.disabled),
            sampler: sampler(&layers, &env, policy.rate_limit.is_some())?,
            hold: layers.iter().find_map(|l| l.hold).or_else(|| policy.keep.as_ref().map(Keep::hold)),
            policy,
            detail: detail(&layers)?.unwrap_or(defaults.detail),
            naming: layers.iter().find_map(|l| l.naming).unwrap_or(defaults.naming),
            engine_steps: share(&layers, "tracing.engine_steps", |l| l.engine_steps)?.unwrap_or(defaults.engine_steps),
            kv_events: share(&layers, "tracing.kv_events", |l| l.kv_events)?.unwrap_or(defaults.kv_events),
            scrapes: share(&layers, "tracing.scrapes", |l| l.scrapes)?.unwrap_or(defaults.scrapes),
            recorder,
            exporters,
            schedule_delay: first(|l| l.schedule_delay).or(env.schedule_delay).unwrap_or(defaults.schedule_delay),
            max_batch: env.max_batch.unwrap_or(defaults.max_batch).min(max_queue),
            max_queue,
            export_timeout,
            max_open: first(|l| l.max_open).unwrap_or(defaults.max_open),
            flush_timeout: first(|l| l.flush_timeout).unwrap_or(defaults.flush_timeout),
            metrics: metrics(&layers, &env)?,
            langfuse: langfuse(&layers)?,
            trace_context: env.trace_context.unwrap_or(defaults.trace_context),
            service_name: env.service_name,
            resource_attributes: env.resource_attributes,
            channel_capacity: defaults.channel_capacity,
        };
        Ok((config, warnings))
    }
}

fn default_ratio() -> Ratio {
    Ratio::new(DEFAULT_RATIO).unwrap_or_else(|| unreachable!("the default ratio lies in 0..=1"))
}

/// The highest layer that names a kind or a ratio decides the kind; a kind without a ratio takes that of a layer below, else the
/// default of the layer that named the kind.
fn sampler(layers: &[&Layer], env: &EnvLayer, limited: bool) -> Result<Sampler, ConfigError> {
    let mut kind = None;
    let mut ratio = None;
    for layer in layers {
        if kind.is_none() && (layer.sampler.is_some() || layer.ratio.is_some()) {
            kind = Some(layer.sampler.unwrap_or(SamplerKind::ParentBasedTraceIdRatio));
        }
        if let (None, Some(p)) = (&ratio, layer.ratio) {
            let allowed = "a number from 0 to 1 is allowed";
            ratio = Some(Ratio::new(p).ok_or(ConfigError { field: "tracing.ratio", found: p.to_string(), allowed })?);
        }
    }
    // A limit of traces in a second is a limit of all of them unless a ratio is named too.
    let default = if kind.is_none() && (env.sampler.is_some() || limited) { Ratio::ALL } else { default_ratio() };
    let kind = kind.or(env.sampler).unwrap_or(SamplerKind::ParentBasedTraceIdRatio);
    Ok(kind.with(ratio.or_else(|| env.ratio.clone()).unwrap_or(default)))
}

fn detail(layers: &[&Layer]) -> Result<Option<u8>, ConfigError> {
    match layers.iter().find_map(|l| l.detail) {
        Some(level) if !(1..=3).contains(&level) => {
            let allowed = "1 (lifecycle), 2 (decisions) and 3 (fine) are allowed";
            Err(ConfigError { field: "tracing.detail", found: level.to_string(), allowed })
        }
        level => Ok(level),
    }
}

fn share(
    layers: &[&Layer],
    field: &'static str,
    pick: fn(&Layer) -> Option<f64>,
) -> Result<Option<Ratio>, ConfigError> {
    let Some(share) = layers.iter().find_map(|l| pick(l)) else { return Ok(None) };
    let wrong = || ConfigError { field, found: share.to_string(), allowed: "a number from 0 to 1 is allowed" };
    Ratio::new(share).ok_or_else(wrong).map(Some)
}

/// What the layers say about Langfuse; a table of prices alone asks for it too.
fn langfuse(layers: &[&Layer]) -> Result<Option<Arc<Langfuse>>, ConfigError> {
    let prices = layers.iter().find_map(|l| l.prices.as_deref());
    if !layers.iter().find_map(|l| l.langfuse).unwrap_or(prices.is_some()) {
        return Ok(None);
    }
    let Some(path) = prices else { return Ok(Some(Arc::new(Langfuse::new()))) };
    let told = |errors: ConfigErrors| {
        let found = errors.to_string().trim_start_matches("error: ").to_owned();
        ConfigError { field: "tracing.prices", found, allowed: "a table of prices is allowed (docs/langfuse.md)" }
    };
    Langfuse::with_prices(path).map(|l| Some(Arc::new(l))).map_err(told)
}

/// What the layers and the environment say about pushing metrics.
fn metrics(layers: &[&Layer], env: &EnvLayer) -> Result<MetricsConfig, ConfigError> {
    let defaults = MetricsConfig::default();
    let choices = layers.iter().find_map(|l| l.metrics.clone()).or_else(|| env.metrics.clone()).unwrap_or_default();
    let otlp = choices.into_iter().map(|choice| env.metrics_otlp.choose(choice, Signal::Metrics));
    let interval = layers.iter().find_map(|l| l.metrics_interval).or(env.metrics_interval);
    Ok(MetricsConfig {
        otlp: otlp.collect::<Result<_, _>>()?,
        interval: interval.unwrap_or(defaults.interval),
        flush_timeout: layers.iter().find_map(|l| l.flush_timeout).unwrap_or(defaults.flush_timeout),
        resource_attributes: env.resource_attributes.clone(),
    })
}

fn exporter(choice: ExporterChoice, recorder: RecorderKind, env: &EnvLayer) -> Result<ExporterConfig, ConfigError> {
    Ok(match choice {
        ExporterChoice::File(path) => ExporterConfig::File(path),
        ExporterChoice::RotatingFile(rotation) => ExporterConfig::RotatingFile(rotation),
        ExporterChoice::Console(target) => ExporterConfig::Console(target),
        ExporterChoice::Memory(spans) => ExporterConfig::Memory(spans),
        ExporterChoice::Otlp(choice) => {
            let encoding = choice.encoding.unwrap_or(match recorder {
                RecorderKind::Deferred => OtlpEncoding::Direct,
                RecorderKind::Eager => OtlpEncoding::Sdk,
            });
            ExporterConfig::Otlp(OtlpConfig { encoding, ..env.otlp.choose(choice, Signal::Traces)? })
        }
    })
}

/// Endpoint and protocol of an OTLP URL that a user typed.
///
/// Without a protocol, port 4317 means gRPC and everything else HTTP. For HTTP the signal's path (`/v1/traces`) is appended to a URL
/// that does not end with it already, so that a collector's base address is enough.
///
/// # Errors
/// If `url` is no http or https URL with a host, or has a user name or password.
pub fn otlp_endpoint(
    url: &str,
    protocol: Option<OtlpProtocol>,
    signal: Signal,
) -> Result<(String, OtlpProtocol), ConfigError> {
    let wrong = |why: OtlpUrlError| ConfigError { field: "otlp", found: redacted(url), allowed: why.allowed() };
    let url = OtlpUrl::parse(url).map_err(wrong)?;
    let protocol = protocol.unwrap_or_else(|| url.protocol_of_port());
    let endpoint = match protocol {
        OtlpProtocol::HttpProtobuf if !url.names(signal) => url.for_signal(signal),
        OtlpProtocol::HttpProtobuf | OtlpProtocol::Grpc => url.base(),
    };
    Ok((endpoint, protocol))
}
