//! The telemetry of one process of the lab: a pipeline for every path that was asked for, switched while requests are served.
//!
//! A pipeline is made on first use and kept: its connection stays warm, and its counts go on. Of an arm's ratio it gets a sampler.

use std::sync::Arc;

use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol, RecorderKind};
use shared::trace::{Ratio, Resource, Sampler, Telemetry, TelemetryConfig, Tracer, TracerCell};

use super::message::{Counters, Tracing};
use crate::overhead::model::Path;

/// All pipelines of a process.
pub(super) struct Pipelines {
    clock: RunClock,
    spans_to: String,
    schedule_delay: Dur,
    /// Where servers take their tracers from, with the service instance that each one is.
    servers: Vec<(Resource, Arc<TracerCell>)>,
    made: Vec<Pipeline>,
}

struct Pipeline {
    path: Path,
    steps: f64,
    telemetry: Telemetry,
    tracers: Vec<Tracer>,
    /// Whether there may be something to flush.
    used: bool,
}

impl Pipelines {
    pub(super) fn new(
        clock: RunClock,
        spans_to: String,
        schedule_delay_ms: f64,
        servers: Vec<(Resource, Arc<TracerCell>)>,
    ) -> Pipelines {
        let schedule_delay = Dur::from_secs_f64(schedule_delay_ms / 1_000.0);
        Pipelines { clock, spans_to, schedule_delay, servers, made: Vec::new() }
    }

    /// Switches all servers of the process.
    pub(super) fn arm(&mut self, tracing: Option<Tracing>) -> Result<(), String> {
        let tracers = match tracing {
            None => vec![Tracer::off(); self.servers.len()],
            Some(tracing) => {
                let sampler = sampler(tracing.ratio)?;
                let pipeline = self.pipeline(tracing.path, tracing.steps)?;
                pipeline.telemetry.set_sampler(sampler);
                pipeline.used = true;
                pipeline.tracers.clone()
            }
        };
        for ((_, cell), tracer) in self.servers.iter().zip(tracers) {
            cell.store(tracer);
        }
        Ok(())
    }

    /// The tracers of the servers, in their order.
    pub(super) fn tracers(&self) -> impl Iterator<Item = Arc<Tracer>> {
        self.servers.iter().map(|(_, cell)| cell.load())
    }

    /// Exports what every pipeline holds; idle ones are left asleep, so that a block pays for its own spans only.
    pub(super) fn flush(&mut self, timeout: Dur) -> bool {
        let deadline = self.clock.now().saturating_add(timeout);
        let mut settled = true;
        for pipeline in self.made.iter_mut().filter(|p| p.used) {
            let left = deadline.since(self.clock.now());
            // What is not settled is flushed again with the next block.
            pipeline.used = !pipeline.telemetry.flush(left);
            settled &= !pipeline.used;
        }
        settled
    }

    pub(super) fn counters(&self) -> Counters {
        let mut sum = Counters { cpu_nanos: crate::overhead::cpu::of_this_process(), ..Counters::default() };
        for stats in self.made.iter().map(|p| p.telemetry.stats()) {
            sum.records += stats.records_opened;
            sum.records_dropped += stats.records_dropped + stats.records_failed;
            sum.spans += stats.spans_created;
            for exporter in &stats.exporters {
                sum.exported += exporter.exported;
                sum.dropped += exporter.dropped.total();
                sum.batches += exporter.batches;
            }
        }
        sum.allocations = crate::overhead::allocations::so_far();
        sum
    }

    /// Ends every pipeline.
    pub(super) fn shutdown(self, now: Time) {
        for pipeline in self.made {
            pipeline.telemetry.shutdown(now);
        }
    }

    fn pipeline(&mut self, path: Path, steps: f64) -> Result<&mut Pipeline, String> {
        let at = match self.made.iter().position(|p| (p.path, p.steps) == (path, steps)) {
            Some(at) => at,
            None => {
                let telemetry = Telemetry::live(self.config(path, steps)?, self.clock).map_err(|e| e.to_string())?;
                let tracers = self.servers.iter().map(|(resource, _)| telemetry.tracer(resource.clone())).collect();
                self.made.push(Pipeline { path, steps, telemetry, tracers, used: false });
                self.made.len() - 1
            }
        };
        Ok(&mut self.made[at])
    }

    fn config(&self, path: Path, steps: f64) -> Result<TelemetryConfig, String> {
        let (recorder, encoding) = match path {
            Path::Eager => (RecorderKind::Eager, OtlpEncoding::Sdk),
            Path::Deferred => (RecorderKind::Deferred, OtlpEncoding::Sdk),
            Path::Direct => (RecorderKind::Deferred, OtlpEncoding::Direct),
        };
        let defaults = TelemetryConfig::default();
        let otlp = OtlpConfig {
            endpoint: self.spans_to.clone(),
            protocol: OtlpProtocol::HttpProtobuf,
            headers: Vec::new(),
            timeout: defaults.export_timeout,
            gzip: false,
            encoding,
            ca_file: None,
        };
        let exporters = vec![ExporterConfig::Otlp(otlp)];
        let engine_steps = Ratio::new(steps).ok_or_else(|| format!("{steps} is no share of steps"))?;
        Ok(TelemetryConfig { recorder, engine_steps, exporters, schedule_delay: self.schedule_delay, ..defaults })
    }
}

/// What a gateway that starts its traces itself is configured with.
fn sampler(ratio: f64) -> Result<Sampler, String> {
    let ratio = Ratio::new(ratio).ok_or_else(|| format!("{ratio} is no share of traces"))?;
    Ok(Sampler::parent_based_ratio(ratio))
}
