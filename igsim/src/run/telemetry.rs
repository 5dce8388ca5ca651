//! From scenario, command line and environment to the configuration of the telemetry path.

use std::path::PathBuf;

use shared::trace::config::{
    ConfigError, ExporterChoice, ExporterConfig, Layer, OtlpEncoding, OtlpProtocol, RecorderKind,
};
use shared::trace::exporter::console::ConsoleTarget;
use shared::trace::{SamplerKind, TelemetryConfig};

use crate::scenario::{self, Exporter, Tracing};

/// What the command line says about tracing.
#[derive(Clone, Debug, Default)]
pub struct TracingOptions {
    /// Share of traces to record.
    pub ratio: Option<f64>,
    /// OTLP endpoints, besides what the scenario says.
    pub otlp: Vec<String>,
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
    file: Option<PathBuf>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Resolved, ConfigError> {
    let TracingOptions { ratio, detail, engine_steps, scrapes, otlp: _ } = *options;
    let command_line = Layer { ratio, detail, engine_steps, scrapes, ..Layer::default() };
    let layer = scenario_layer(tracing);
    let (mut config, warnings) = TelemetryConfig::resolve(&command_line, &layer, env)?;
    if !options.otlp.is_empty() {
        let choices = options.otlp.iter().map(|url| ExporterChoice::Otlp {
            url: Some(url.clone()),
            protocol: None,
            encoding: None,
        });
        let only = Layer { exporters: Some(choices.collect()), recorder: Some(config.recorder), ..Layer::default() };
        let (more, _) = TelemetryConfig::resolve(&only, &Layer::default(), env)?;
        config.exporters.extend(more.exporters);
    }
    if let Some(file) = file.filter(|_| !wants_none(tracing, env)) {
        config.exporters.insert(0, ExporterConfig::File(file));
    }
    Ok(Resolved { config, warnings })
}

/// Whether the user asked for no exporter by name: the scenario, else the environment.
fn wants_none(tracing: &Tracing, env: &dyn Fn(&str) -> Option<String>) -> bool {
    match &tracing.exporters {
        Some(list) => list.contains(&Exporter::None),
        None => env("OTEL_TRACES_EXPORTER").is_some_and(|v| v.trim() == "none"),
    }
}

fn scenario_layer(tracing: &Tracing) -> Layer {
    // The file has its place in the folder of the run and is added there.
    let exporters = tracing.exporters.as_ref().map(|list| list.iter().filter_map(choice).collect());
    Layer {
        sampler: tracing.sampler.map(kind),
        ratio: tracing.ratio,
        policy: Some(tracing.policy()),
        recorder: tracing.recorder.map(|r| match r {
            scenario::Recorder::Deferred => RecorderKind::Deferred,
            scenario::Recorder::Eager => RecorderKind::Eager,
        }),
        detail: tracing.detail,
        engine_steps: tracing.engine_steps,
        kv_events: tracing.kv_events,
        scrapes: tracing.scrapes,
        exporters,
        max_open: tracing.max_open.map(|d| d.0),
        ..Layer::default()
    }
}

fn choice(exporter: &Exporter) -> Option<ExporterChoice> {
    match exporter {
        Exporter::File | Exporter::None => None,
        Exporter::Console => Some(ExporterChoice::Console(ConsoleTarget::Stderr)),
        Exporter::Otlp(otlp) => {
            let protocol = otlp.protocol.map(|p| match p {
                scenario::OtlpProtocol::Grpc => OtlpProtocol::Grpc,
                scenario::OtlpProtocol::HttpProtobuf => OtlpProtocol::HttpProtobuf,
            });
            let encoding = otlp.encoding.map(|e| match e {
                scenario::OtlpEncoding::Sdk => OtlpEncoding::Sdk,
                scenario::OtlpEncoding::Direct => OtlpEncoding::Direct,
            });
            Some(ExporterChoice::Otlp { url: Some(otlp.url.clone()), protocol, encoding })
        }
    }
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
        let resolved = resolve(options, tracing, Some("traces.otlp.jsonl".into()), &lookup).unwrap();
        let kind = |e: &ExporterConfig| match e {
            ExporterConfig::Otlp(otlp) => format!("{} {}", otlp.protocol, otlp.endpoint),
            ExporterConfig::File(path) => path.display().to_string(),
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
    fn the_command_line_adds_endpoints() {
        let options = TracingOptions { otlp: vec!["http://127.0.0.1:4317".into()], ..TracingOptions::default() };
        let tracing = Tracing { exporters: Some(vec![Exporter::Console]), ..Tracing::default() };
        check(&options, &tracing, &[], &["traces.otlp.jsonl", "console", "grpc http://127.0.0.1:4317"]);
    }
}
