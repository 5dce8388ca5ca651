//! Options that the programs of this crate share: where telemetry and logs go, and how they begin and end.

use std::path::Path;

use anyhow::Context;
use clap::Args;
use shared::clock::RunClock;
use shared::log::{self, FORMAT_VARIABLE, LogFormat};
use shared::metrics::{Pusher, Source};
use shared::trace::config::{ExporterChoice, Layer, MetricsConfig, OtlpChoice, Rotation};
use shared::trace::{Naming, Resource, TelemetryError};
use tracing_subscriber::EnvFilter;

/// Where telemetry and logs go.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Push metrics to this collector: port 4317 means gRPC, others HTTP. Repeat for more.
    #[arg(long, value_name = "URL")]
    otlp_metrics: Vec<String>,
    /// Begin a new trace file where one would be larger than this; it grows for ever if not given.
    #[arg(long, value_name = "BYTES", requires = "trace_file")]
    trace_file_max_bytes: Option<u64>,
    /// How many full trace files are kept beside the one that is written.
    #[arg(long, value_name = "N", default_value_t = 5)]
    trace_file_keep: u32,
    /// Whose names spans have: those of llm-d's tracing proposal (proposal, the default), or of llm-d's own components (llm-d).
    #[arg(long, value_name = "NAMING")]
    naming: Option<Naming>,
    /// Let spans say what Langfuse wants to know of generations.
    #[arg(long)]
    langfuse: bool,
    /// Log lines for people (text), or one JSON object a line (json).
    #[arg(long, value_name = "FORMAT", env = FORMAT_VARIABLE, default_value = "text")]
    log_format: LogFormat,
}

impl OutputArgs {
    /// Starts logging what `filter` lets pass.
    ///
    /// # Errors
    /// If the filter is none.
    pub fn start_log(&self, filter: &str) -> anyhow::Result<()> {
        log::init(EnvFilter::try_new(filter).context("--log")?, self.log_format);
        Ok(())
    }

    /// What the command line says about exporters and metrics.
    pub fn layer(&self, otlp: Option<&str>, trace_file: Option<&Path>) -> Layer {
        let file = trace_file.map(|path| match self.trace_file_max_bytes {
            None => ExporterChoice::File(path.to_owned()),
            Some(max_bytes) => {
                let (path, keep) = (path.to_owned(), self.trace_file_keep);
                ExporterChoice::RotatingFile(Rotation { path, max_bytes, keep })
            }
        });
        let otlp = otlp.map(|url| ExporterChoice::Otlp(OtlpChoice::to(url)));
        let exporters: Vec<_> = otlp.into_iter().chain(file).collect();
        let metrics: Vec<_> = self.otlp_metrics.iter().map(OtlpChoice::to).collect();
        Layer {
            exporters: (!exporters.is_empty()).then_some(exporters),
            metrics: (!metrics.is_empty()).then_some(metrics),
            naming: self.naming,
            langfuse: self.langfuse.then_some(true),
            ..Layer::default()
        }
    }
}

/// Pushes metrics while a program runs.
pub struct Pushing(Option<Pusher>);

impl Pushing {
    /// Starts pushing what `source` gives, if the configuration names a collector.
    ///
    /// # Errors
    /// If the configuration cannot be used.
    pub fn start(
        config: &MetricsConfig,
        resource: Resource,
        clock: RunClock,
        source: Source,
    ) -> Result<Pushing, TelemetryError> {
        Pusher::start(config, resource, clock, source).map(Pushing)
    }

    /// Pushes for the last time, and tells what was not taken.
    pub fn stop(self) {
        for lost in self.0.into_iter().flat_map(Pusher::stop).filter(|e| e.dropped.total() > 0) {
            let why = lost.last_error.as_deref().unwrap_or("no reason given");
            tracing::warn!(exporter = lost.name, series = lost.dropped.total(), "metrics were not taken: {why}");
        }
    }
}
