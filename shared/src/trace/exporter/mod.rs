//! Destinations of spans. An exporter takes whole batches, counts what it does with every span and never fails its caller.

mod by_sdk;
pub mod console;
pub(crate) mod direct;
pub(crate) mod file;
mod grpc;
pub mod memory;
pub mod otlp;
pub(crate) mod sdk;
mod tls;
pub(crate) mod transport;

use std::sync::Arc;

use bytes::Bytes;

use crate::time::{Anchor, Dur};
use crate::trace::config::{ExporterConfig, TelemetryConfig};
use crate::trace::pipeline::TelemetryError;
use crate::trace::resource::Resource;
use crate::trace::span::Span;
use crate::trace::stats::ExporterCounters;

/// Spans on their way out, shared by all exporters.
#[derive(Debug)]
pub(crate) struct Batch {
    /// How many spans it has.
    pub(crate) len: usize,
    /// The spans; empty if no exporter takes [`Takes::Spans`].
    pub(crate) spans: Vec<Span>,
    /// The same spans, ready to be sent; empty if no exporter takes [`Takes::Requests`].
    pub(crate) request: Bytes,
    /// Indexed by the spans' instance ids.
    pub(crate) resources: Arc<Vec<Arc<Resource>>>,
    pub(crate) anchor: Anchor,
}

/// Called when everything given to an exporter so far is settled; dropping it is the call.
pub(crate) type Settled = crossbeam_channel::Sender<()>;

/// The form of a batch that an exporter works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// Spans as plain data.
    Spans,
    /// An OTLP request.
    Requests,
}

/// A destination of spans.
pub(crate) trait Exporter: Send {
    /// What it takes.
    fn takes(&self) -> Takes {
        Takes::Spans
    }
    /// Takes a batch; every span of it is counted as exported or dropped sooner or later.
    fn export(&mut self, batch: &Arc<Batch>);
    /// Drops `settled` once everything taken so far is exported or dropped.
    fn flush(&mut self, settled: Settled);
    /// Asks for the end: what is not exported within `timeout` is dropped. Does not wait.
    fn stop(&mut self, timeout: Dur);
    /// Waits for the end that [`Exporter::stop`] asked for, not much longer than its timeout.
    fn join(&mut self);
    /// The counts.
    fn counters(&self) -> &Arc<ExporterCounters>;
}

/// Makes the exporters of a configuration; `threads` says whether they may have threads of their own.
pub(crate) fn build(config: &TelemetryConfig, threads: bool) -> Result<Vec<Box<dyn Exporter>>, TelemetryError> {
    config.exporters.iter().map(|e| build_one(e, config, threads)).collect()
}

/// Makes one exporter.
pub(crate) fn build_one(
    exporter: &ExporterConfig,
    config: &TelemetryConfig,
    threads: bool,
) -> Result<Box<dyn Exporter>, TelemetryError> {
    Ok(match exporter {
        ExporterConfig::File(path) => Box::new(file::FileExporter::create(path)?),
        ExporterConfig::RotatingFile(rotation) => Box::new(file::FileExporter::rotating(rotation)?),
        ExporterConfig::Console(target) => Box::new(console::ConsoleExporter::new(target.clone())),
        ExporterConfig::Memory(spans) => Box::new(memory::MemoryExporter::new(spans.clone())),
        ExporterConfig::Otlp(otlp) if threads => Box::new(otlp::OtlpExporter::start(otlp, config)?),
        ExporterConfig::Otlp(otlp) => return Err(TelemetryError::VirtualNetwork(otlp.address())),
    })
}
