//! From scenario, command line and environment to the configuration of the telemetry path.

use std::path::PathBuf;

use shared::trace::config::{
    ConfigError, ExporterChoice, ExporterConfig, Layer, OtlpChoice, OtlpEncoding, OtlpProtocol, RecorderKind, Rotation,
};
use shared::trace::exporter::console::ConsoleTarget;
use shared::trace::{SamplerKind, TelemetryConfig};

use crate::scenario::{self, Compression, Exporter, Metrics, Otlp, Tracing};

/// What the command line says about tracing.
#[derive(Clone, Debug, Default)]
pub struct TracingOptions {
    /// Share of traces to record.
    pub ratio: Option<f64>,
    /// OTLP endpoints, besides what the scenario says.
    pub otlp: Vec<String>,
    /// OTLP endpoints of metrics, in place of what the scenario says.
    pub otlp_metrics: Vec<String>,
    /// Detail of the spans.
    pub detail: Option<u8>,
    /// Share of engine steps that get a trace of their own.
    pub engine_steps: Option<f64>,
    /// Share of scrapes that get a trace of their own.
    pub scrapes: Option<f64>,
}

/// Configuration of the telemetry of a run, and the warnings that came up.
#[derive(Debug)]
pub struct Resolved {
    /// For [`shared::trace::Telemetry`].
    pub config: TelemetryConfig,
    /// Environment variables that were ignored.
    pub warnings: Vec<String>,
}

/// Builds the configuration: command line over scenario over environment over defaults. `file` is where the run keeps its
/// traces; they are written there unless the exporters are `none`.
///
/// # Errors
/// If the command line or the scenario has a value that cannot be used.
pub fn resolve(
    options: &TracingOptions,
    tracing: &Tracing,
    metrics: &Metrics,
    file: Option<PathBuf>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Resolved, ConfigError> {
    let TracingOptions { ratio, detail, engine_steps, scrapes, otlp: _, otlp_metrics } = options;
    let pushed: Vec<_> = otlp_metrics.iter().map(OtlpChoice::to).collect();
    let command_line = Layer {
        ratio: *ratio,
        detail: *detail,
        engine_steps: *engine_steps,
        scrapes: *scrapes,
        metrics: (!pushed.is_empty()).then_some(pushed),
        ..Layer::default()
    };
    let layer = scenario_layer(tracing, metrics, env)?;
    let (mut config, warnings) = TelemetryConfig::resolve(&command_line, &layer, env)?;
    if !options.otlp.is_empty() {
        let choices = options.otlp.iter().map(|url| ExporterChoice::Otlp(OtlpChoice::to(url)));
        let only = Layer { exporters: Some(choices.collect()), recorder: Some(config.recorder), ..Layer::default() };
        let (more, _) = TelemetryConfig::resolve(&only, &Layer::default(), env)?;
        config.exporters.extend(more.exporters);
    }
    if let Some(file) = file.filter(|_| !wants_none(tracing, env)) {
        config.exporters.insert(0, file_exporter(tracing, file));
    }
    Ok(Resolved { config, warnings })
}

/// The run's own file, whole unless the scenario asks for files of bounded size.
fn file_exporter(tracing: &Tracing, path: PathBuf) -> ExporterConfig {
    match tracing.rotating_file() {
        None => ExporterConfig::File(path),
        Some(rotating) => {
            let (max_bytes, keep) = (rotating.max_bytes, rotating.keep);
            ExporterConfig::RotatingFile(Rotation { path, max_bytes, keep })
        }
    }
}

/// Whether the user asked for no exporter by name: the scenario, else the environment.
fn wants_none(tracing: &Tracing, env: &dyn Fn(&str) -> Option<String>) -> bool {
    match &tracing.exporters {
        Some(list) => list.contains(&Exporter::None),
        None => env("OTEL_TRACES_EXPORTER").is_some_and(|v| v.trim() == "none"),
    }
}

fn scenario_layer(
    tracing: &Tracing,
    metrics: &Metrics,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Layer, ConfigError> {
    // The file has its place in the folder of the run and is added there.
    let choices = |list: &Vec<Exporter>| list.iter().filter_map(|e| choice(e, env)).collect::<Result<_, _>>();
    let exporters = tracing.exporters.as_ref().map(choices).transpose()?;
    let field = "metrics.otlp[].headers";
    let pushed = |list: &Vec<Otlp>| list.iter().map(|o| otlp_choice(o, field, env)).collect::<Result<_, _>>();
    let pushed = metrics.otlp.as_ref().map(pushed).transpose()?;
    Ok(Layer {
        sampler: tracing.sampler.map(kind),
        ratio: tracing.ratio,
        policy: Some(tracing.policy()),
        recorder: tracing.recorder.map(|r| match r {
            scenario::Recorder::Deferred => RecorderKind::Deferred,
            scenario::Recorder::Eager => RecorderKind::Eager,
        }),
        detail: tracing.detail,
        naming: tracing.naming.map(Into::into),
        engine_steps: tracing.engine_steps,
        kv_events: tracing.kv_events,
        scrapes: tracing.scrapes,
        exporters,
        max_open: tracing.max_open.map(|d| d.0),
        metrics: pushed,
        langfuse: tracing.langfuse,
        prices: tracing.prices.clone(),
        metrics_interval: metrics.interval.map(|d| d.0),
        ..Layer::default()
    })
}

fn choice(exporter: &Exporter, env: &dyn Fn(&str) -> Option<String>) -> Option<Result<ExporterChoice, ConfigError>> {
    match exporter {
        Exporter::File | Exporter::RotatingFile(_) | Exporter::None => None,
        Exporter::Console => Some(Ok(ExporterChoice::Console(ConsoleTarget::Stderr))),
        Exporter::Otlp(otlp) => {
            Some(otlp_choice(otlp, "tracing.exporters[].otlp.headers", env).map(ExporterChoice::Otlp))
        }
    }
}

fn otlp_choice(
    otlp: &Otlp,
    headers: &'static str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<OtlpChoice, ConfigError> {
    let filled = otlp.headers.iter().map(|(name, text)| Ok((name.clone(), filled(headers, name, text, env)?)));
    Ok(OtlpChoice {
        url: Some(otlp.url.clone()),
        protocol: otlp.protocol.map(|p| match p {
            scenario::OtlpProtocol::Grpc => OtlpProtocol::Grpc,
            scenario::OtlpProtocol::HttpProtobuf => OtlpProtocol::HttpProtobuf,
        }),
        encoding: otlp.encoding.map(|e| match e {
            scenario::OtlpEncoding::Sdk => OtlpEncoding::Sdk,
            scenario::OtlpEncoding::Direct => OtlpEncoding::Direct,
        }),
        gzip: otlp.compression.map(|c| c == Compression::Gzip),
        headers: filled.collect::<Result<_, _>>()?,
        ca_file: otlp.ca_file.clone(),
    })
}

/// The value of a header, with what it takes from the environment in its place. Errors name the header and the variable, no value.
fn filled(
    field: &'static str,
    name: &str,
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<String, ConfigError> {
    let (mut out, mut rest, mut taken) = (String::new(), text, false);
    while let Some((before, after)) = rest.split_once("${") {
        let Some((variable, after)) = after.split_once('}') else { break };
        let Some(value) = env(variable) else {
            let allowed = "a variable that is set in the environment is allowed";
            return Err(ConfigError { field, found: format!("{name}: ${{{variable}}}"), allowed });
        };
        out.push_str(before);
        out.push_str(&value);
        (rest, taken) = (after, true);
    }
    if !taken {
        let allowed = "a value with ${NAME} is allowed, which the environment fills";
        return Err(ConfigError { field, found: format!("{name}: a literal"), allowed });
    }
    out.push_str(rest);
    Ok(out)
}

fn kind(sampler: scenario::Sampler) -> SamplerKind {
    match sampler {
        scenario::Sampler::AlwaysOn => SamplerKind::AlwaysOn,
        scenario::Sampler::AlwaysOff => SamplerKind::AlwaysOff,
        scenario::Sampler::TraceIdRatio => SamplerKind::TraceIdRatio,
        scenario::Sampler::ParentBasedAlwaysOn => SamplerKind::ParentBasedAlwaysOn,
        scenario::Sampler::ParentBasedAlwaysOff => SamplerKind::ParentBasedAlwaysOff,
        scenario::Sampler::ParentBasedTraceIdRatio => SamplerKind::ParentBasedTraceIdRatio,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: &TracingOptions, tracing: &Tracing, env: &[(&str, &str)], expect: &[&str]) {
        let lookup = |key: &str| env.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned());
        let file = Some("traces.otlp.jsonl".into());
        let resolved = resolve(options, tracing, &Metrics::default(), file, &lookup).unwrap();
        let kind = |e: &ExporterConfig| match e {
            ExporterConfig::Otlp(otlp) => format!("{} {}", otlp.protocol, otlp.endpoint),
            ExporterConfig::File(path) => path.display().to_string(),
            ExporterConfig::RotatingFile(r) => format!("{} {} {}", r.path.display(), r.max_bytes, r.keep),
            ExporterConfig::Console(_) => "console".to_owned(),
            ExporterConfig::Memory(_) => "memory".to_owned(),
        };
        assert_eq!(resolved.config.exporters.iter().map(kind).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn the_file_is_always_there_unless_nothing_is_wanted() {
        let (none, file) = (TracingOptions::default(), "traces.otlp.jsonl");
        check(&none, &Tracing::default(), &[], &[file]);
        check(&none, &Tracing::default(), &[("OTEL_TRACES_EXPORTER", "none")], &[]);
        check(&none, &Tracing::default(), &[("OTEL_TRACES_EXPORTER", "console")], &[file, "console"]);
        let quiet = Tracing { exporters: Some(vec![Exporter::None]), ..Tracing::default() };
        check(&none, &quiet, &[("OTEL_TRACES_EXPORTER", "console")], &[]);
    }

    #[test]
    fn a_scenario_may_ask_for_files_of_bounded_size() {
        let rotating = scenario::RotatingFile { max_bytes: 1_000, keep: 2 };
        let tracing = Tracing { exporters: Some(vec![Exporter::RotatingFile(rotating)]), ..Tracing::default() };
        check(&TracingOptions::default(), &tracing, &[], &["traces.otlp.jsonl 1000 2"]);
    }

    fn otlp(more: &str) -> Otlp {
        let text = format!(r#"{{"url": "https://h/api", {more}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn headers_take_their_secrets_from_the_environment() {
        let env = |key: &str| (key == "AUTH").then(|| "c2VjcmV0".to_owned());
        let headers = |more: &str| {
            let tracing = Tracing { exporters: Some(vec![Exporter::Otlp(otlp(more))]), ..Tracing::default() };
            let resolved = resolve(&TracingOptions::default(), &tracing, &Metrics::default(), None, &env);
            resolved.map(|r| match &r.config.exporters[..] {
                [ExporterConfig::Otlp(otlp)] => (otlp.headers.clone(), otlp.gzip),
                other => panic!("{other:?}"),
            })
        };
        let (found, gzip) = headers(r#""compression": "gzip", "headers": {"authorization": "Basic ${AUTH}"}"#).unwrap();
        assert_eq!((found, gzip), (vec![("authorization".to_owned(), "Basic c2VjcmV0".to_owned())], true));
        let told = |more: &str| headers(more).unwrap_err().to_string();
        assert_eq!(
            told(r#""headers": {"x-key": "${OTHER}"}"#),
            "tracing.exporters[].otlp.headers: found `x-key: ${OTHER}`, a variable that is set in the environment is allowed"
        );
        let literal = told(r#""headers": {"x-key": "s3cret"}"#);
        assert!(literal.contains("x-key: a literal") && !literal.contains("s3cret"), "{literal}");
    }

    #[test]
    fn metrics_go_nowhere_unless_somebody_asks() {
        let endpoints = |options: &TracingOptions, metrics: &Metrics, env: &[(&str, &str)]| {
            let lookup = |key: &str| env.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned());
            let config = resolve(options, &Tracing::default(), metrics, None, &lookup).unwrap().config.metrics;
            (
                config.otlp.iter().map(|o| o.endpoint.clone()).collect::<Vec<_>>(),
                config.interval.as_nanos() / 1_000_000_000,
            )
        };
        let (none, nothing) = (TracingOptions::default(), Metrics::default());
        assert_eq!(endpoints(&none, &nothing, &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4318")]), (vec![], 60));
        let env = [("OTEL_METRICS_EXPORTER", "otlp"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4318")];
        assert_eq!(endpoints(&none, &nothing, &env).0, ["http://h:4318/v1/metrics"]);
        let asked = Metrics { otlp: Some(vec![otlp("\"headers\": {}")]), interval: Some("5s".parse().unwrap()) };
        assert_eq!(endpoints(&none, &asked, &env), (vec!["https://h/api/v1/metrics".to_owned()], 5));
        let options = TracingOptions { otlp_metrics: vec!["http://127.0.0.1:4317".into()], ..none };
        assert_eq!(endpoints(&options, &asked, &[]).0, ["http://127.0.0.1:4317"]);
    }

    #[test]
    fn the_command_line_adds_endpoints() {
        let options = TracingOptions { otlp: vec!["http://127.0.0.1:4317".into()], ..TracingOptions::default() };
        let tracing = Tracing { exporters: Some(vec![Exporter::Console]), ..Tracing::default() };
        check(&options, &tracing, &[], &["traces.otlp.jsonl", "console", "grpc http://127.0.0.1:4317"]);
    }
}
