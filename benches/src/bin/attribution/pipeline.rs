//! One path of telemetry in this process: from recorded facts over OTLP to a receiver on another thread, with the CPU time of
//! each thread that takes part.

use std::collections::BTreeSet;
use std::path::Path as FilePath;
use std::sync::Arc;

use http::HeaderMap;
use igsim::overhead::cpu;
use igsim::overhead::model::Path;
use igsim::overhead::receiver::{Limits, Receiver};
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol, RecorderKind};
use shared::trace::{Fact, Resource, Sampler, Telemetry, TelemetryConfig, Tracer};

/// The longest wait for acknowledgements.
const FLUSH: Dur = Dur::from_secs(10);
/// Longer than any burst takes to record: batches are full ones, but for the last.
const SCHEDULE_DELAY: Dur = Dur::from_secs(1);

/// A path with threads and connections of its own.
pub(crate) struct Pipeline {
    pub(crate) path: Path,
    pub(crate) gateway: Tracer,
    pub(crate) engine: Tracer,
    telemetry: Telemetry,
    receiver: Arc<Receiver>,
    /// Threads that it started.
    threads: BTreeSet<u32>,
}

/// What one burst of traces cost, in nanoseconds of CPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// The thread that records.
    pub(crate) request: f64,
    /// The thread that looks after records: it folds, where the path folds in the background.
    pub(crate) worker: f64,
    /// The SDK's batch processors.
    pub(crate) batches: f64,
    /// The thread that sends, and encodes where the SDK encodes.
    pub(crate) sender: f64,
    /// Export requests.
    pub(crate) requests: f64,
    /// Bytes of their bodies.
    pub(crate) bytes: f64,
    /// Spans acknowledged.
    pub(crate) spans: f64,
}

impl Pipeline {
    /// Starts a path that exports to `receiver`.
    pub(crate) fn start(path: Path, receiver: &Arc<Receiver>, clock: RunClock) -> Result<Pipeline, String> {
        let before = threads()?;
        let telemetry = Telemetry::live(config(path, receiver.traces_url()), clock).map_err(|e| e.to_string())?;
        let gateway = telemetry.tracer(Resource::new("gateway", "gateway-0"));
        let engine = telemetry.tracer(Resource::new("vllm", "engine-0"));
        let threads = threads()?.difference(&before).copied().collect();
        Ok(Pipeline { path, gateway, engine, telemetry, receiver: Arc::clone(receiver), threads })
    }

    /// The cost of `burst`, which records some traces, up to the acknowledgement of its last span.
    pub(crate) fn spend(&self, burst: impl FnOnce(&Pipeline)) -> Result<Spent, String> {
        self.receiver.take();
        let (exported, before) = (self.exported(), readings()?);
        let began = cpu::of_this_thread();
        burst(self);
        let request = (cpu::of_this_thread() - began) as f64;
        if !self.telemetry.flush(FLUSH) {
            return Err(format!("spans of the {} path were not acknowledged", self.path.name()));
        }
        let (after, taken) = (readings()?, self.receiver.take());
        let mut spent = Spent {
            request,
            requests: taken.requests as f64,
            bytes: taken.bytes as f64,
            spans: (self.exported() - exported) as f64,
            ..Spent::default()
        };
        for (id, thread) in after.threads.iter().filter(|(id, _)| self.threads.contains(id)) {
            let nanos = thread.nanos.saturating_sub(before.threads.get(id).map_or(0, |t| t.nanos)) as f64;
            match thread.name.as_str() {
                "telemetry" => spent.worker += nanos,
                "telemetry-otlp" => spent.sender += nanos,
                _ => spent.batches += nanos,
            }
        }
        Ok(spent)
    }

    fn exported(&self) -> u64 {
        self.telemetry.stats().exporters.iter().map(|e| e.exported).sum()
    }
}

/// Records one trace of a service.
pub(crate) fn record<F: Fact + Clone>(tracer: &Tracer, headers: &HeaderMap, facts: &[(Time, F)], end: Time) {
    let opened = facts.first().map_or(Time::ZERO, |(at, _)| *at);
    let (_, trail) = tracer.start::<F>(headers, opened);
    facts.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
    trail.finish(end);
}

fn config(path: Path, endpoint: String) -> TelemetryConfig {
    let (recorder, encoding) = match path {
        Path::Eager => (RecorderKind::Eager, OtlpEncoding::Sdk),
        Path::Deferred => (RecorderKind::Deferred, OtlpEncoding::Sdk),
        Path::Direct => (RecorderKind::Deferred, OtlpEncoding::Direct),
    };
    let defaults = TelemetryConfig::default();
    let protocol = OtlpProtocol::HttpProtobuf;
    let timeout = defaults.export_timeout;
    let otlp = OtlpConfig { endpoint, protocol, headers: Vec::new(), timeout, gzip: false, encoding, ca_file: None };
    let exporters = vec![ExporterConfig::Otlp(otlp)];
    let sampler = Sampler::parent_based_ratio(shared::trace::Ratio::ALL);
    TelemetryConfig { recorder, exporters, sampler, schedule_delay: SCHEDULE_DELAY, ..defaults }
}

/// A receiver on a thread of its own that counts and keeps nothing.
pub(crate) fn receiver() -> Result<Arc<Receiver>, String> {
    let (started, wait) = std::sync::mpsc::channel();
    let serve = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(started.send(Err(error))),
        };
        runtime.block_on(async {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let nothing = Limits { memory: 0, storage: 0 };
            // Whoever asked for it has ended if this cannot be sent.
            let _ = started.send(Receiver::start(address, nothing));
            std::future::pending::<()>().await;
        });
    };
    std::thread::Builder::new().name("receiver".to_owned()).spawn(serve).map_err(|e| e.to_string())?;
    let receiver = wait.recv().map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    Ok(Arc::new(receiver))
}

fn readings() -> Result<cpu::Reading, String> {
    cpu::read(FilePath::new("/proc"), std::process::id(), 0).map_err(|e| e.to_string())
}

fn threads() -> Result<BTreeSet<u32>, String> {
    Ok(readings()?.threads.into_keys().collect())
}
