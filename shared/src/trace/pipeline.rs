//! The telemetry of a process: tracers for its service instances, one worker, its exporters.
//!
//! In a live run the worker is a thread behind a bounded channel, and a request never waits for it. In a virtual run folding
//! and writing happen on the calling thread, in the order in which records close, so that the same seed gives the same bytes.
//! There is no global state: whoever owns the [`Telemetry`] hands out [`Tracer`]s.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use http::HeaderMap;

use crate::clock::RunClock;
use crate::ids::{InstanceId, SpanId, TraceId};
use crate::metrics::{self, Family};
use crate::rng::Seed;
use crate::time::{Anchor, Dur, Time};
use crate::trace::config::{ExporterConfig, OtlpEncoding, RecorderKind, TelemetryConfig};
use crate::trace::context::{self, Propagation, TraceContext};
use crate::trace::eager::{self, Eager, Opening, Service};
use crate::trace::edge::{self, Edge, Standing};
use crate::trace::exporter;
use crate::trace::handover::Handover;
use crate::trace::id_source::IdSource;
use crate::trace::langfuse::{Generation, Langfuse};
use crate::trace::naming::Naming;
use crate::trace::own::OwnConfig;
use crate::trace::policy::Reason;
use crate::trace::record::{Fact, Head, Sink, Trail};
use crate::trace::resource::Resource;
use crate::trace::sampler::Sampler;
use crate::trace::sinks::{self, InlineSink, LiveSink, LiveThread, Order, Orders, Pause};
use crate::trace::spares::Spares;
use crate::trace::stats::{Counters, ExporterCounters, Stats};
use crate::trace::worker::{OpenRecords, Resources, Worker};

/// Telemetry that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The trace file cannot be created.
    #[error("cannot create the trace file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// An exporter cannot be built.
    #[error("cannot build the exporter: {0}")]
    Exporter(String),
    /// Virtual runs write files; sending them is a step of its own, which shifts their time to the present.
    #[error("a virtual run cannot export to {0} while it runs: write a trace file and send it afterwards")]
    VirtualNetwork(String),
    /// The SDK's batch processors have threads and a clock of their own.
    #[error("the eager recorder works in real time only: use the deferred one for virtual runs")]
    VirtualEager,
    /// The SDK's exporter encodes its own spans.
    #[error("the direct OTLP encoding is made from records, which the eager recorder does not keep")]
    EagerDirect,
    /// The SDK's samplers know nothing but ids and names.
    #[error(
        "{0} needs the deferred recorder: the eager one leaves sampling to the OpenTelemetry SDK, which decides by trace ids alone"
    )]
    EagerPolicy(&'static str),
    /// The operating system gives no thread.
    #[error("cannot start the telemetry thread: {0}")]
    Thread(std::io::Error),
}

/// The telemetry of a process. Dropping it shuts it down.
pub struct Telemetry {
    shared: Option<Arc<Shared>>,
    driver: Driver,
    exporters: Vec<Arc<ExporterCounters>>,
    flush_timeout: Dur,
    eager: Option<Arc<Eager>>,
}

/// Makes records for one service instance. Cheap to clone.
#[derive(Clone)]
pub struct Tracer {
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) instance: InstanceId,
    /// The SDK's tracer, for the eager recorder.
    pub(super) service: Option<Arc<Service>>,
    /// The same for traces that no request causes.
    pub(super) own: Option<Arc<Service>>,
    /// What becomes of contexts that are sent.
    pub(super) handover: Handover,
}

/// A request that began: its place in a trace, drawn before any span exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Trace id, own outermost span id, sampled flag and trace state: what to inject, or to derive children from.
    pub context: TraceContext,
    /// The caller's span.
    pub parent: Option<SpanId>,
    /// What is decided by now.
    pub standing: Standing,
    /// Why it is recorded, if no ratio and no caller decided.
    pub reason: Option<Reason>,
}

impl Started {
    /// Whether the rules of the edge need to know more of it ([`Tracer::decide`]).
    #[inline]
    pub const fn is_pending(&self) -> bool {
        matches!(self.standing, Standing::Pending { .. })
    }

    /// Whether it is not sampled, and may be kept for what becomes of it.
    #[inline]
    pub const fn is_candidate(&self) -> bool {
        matches!(self.standing, Standing::Candidate)
    }
}

impl Telemetry {
    /// Telemetry of a live run: random ids, a worker thread, deadlines by `clock`.
    ///
    /// # Errors
    /// If an exporter cannot be built or a thread cannot be started; a collector that does not answer is no error.
    pub fn live(config: TelemetryConfig, clock: RunClock) -> Result<Telemetry, TelemetryError> {
        if config.disabled {
            return Ok(Telemetry::off());
        }
        if config.recorder == RecorderKind::Eager
            && let Some(part) = config.policy.needs_records()
        {
            return Err(TelemetryError::EagerPolicy(part));
        }
        let state = State::default();
        let (exporters, eager) = match config.recorder {
            RecorderKind::Deferred => (exporter::build(&config, true)?, None),
            // The worker only looks after requests that nobody finishes.
            RecorderKind::Eager => (Vec::new(), Some(state.eager(&config, clock.anchor())?)),
        };
        let counts = match &eager {
            Some(eager) => eager.exporters(),
            None => exporters.iter().map(|e| Arc::clone(e.counters())).collect(),
        };
        let worker = state.worker(&config, clock.anchor(), exporters);
        let (records, waiting) = crossbeam_channel::bounded(config.channel_capacity.max(1));
        let (control, orders) = sinks::orders();
        let sink = Arc::new(LiveSink {
            records,
            waiting: waiting.clone(),
            orders: control.clone(),
            spares: Spares::default(),
            stopped: AtomicBool::new(false),
            counters: Arc::clone(&state.counters),
            open: Arc::clone(&state.open),
        });
        let pause = Pause::new(config.schedule_delay);
        let thread = LiveThread { worker, waiting, orders, clock, sink: Arc::clone(&sink), pause };
        let spawned = std::thread::Builder::new().name("telemetry".to_owned()).spawn(move || thread.run());
        let thread = Some(spawned.map_err(TelemetryError::Thread)?);
        let own = OwnConfig::of(&config, None);
        let mut shared = state.share(&config, clock.anchor(), IdSource::live(), own, sink.clone());
        shared.exporters.clone_from(&counts);
        let shared = Arc::new(shared);
        let driver = Driver::Live { control, thread, clock, sink };
        Ok(Telemetry { shared: Some(shared), driver, exporters: counts, flush_timeout: config.flush_timeout, eager })
    }

    /// Telemetry of a virtual run: ids from `seed`, everything on the calling thread, in order.
    ///
    /// # Errors
    /// If an exporter cannot be built or needs the network, or the recorder is the eager one.
    pub fn inline(config: TelemetryConfig, anchor: Anchor, seed: Seed) -> Result<Telemetry, TelemetryError> {
        if config.disabled {
            return Ok(Telemetry::off());
        }
        if config.recorder == RecorderKind::Eager {
            return Err(TelemetryError::VirtualEager);
        }
        let exporters = exporter::build(&config, false)?;
        let counts = exporters.iter().map(|e| Arc::clone(e.counters())).collect();
        let state = State::default();
        let worker = state.worker(&config, anchor, exporters);
        let sink = Arc::new(InlineSink {
            worker: Mutex::new(Some(worker)),
            counters: Arc::clone(&state.counters),
            open: Arc::clone(&state.open),
        });
        let ids = IdSource::seeded(seed);
        let own = OwnConfig::of(&config, Some(seed));
        let shared = Arc::new(state.share(&config, anchor, ids, own, sink.clone()));
        let driver = Driver::Inline(sink);
        let flush_timeout = config.flush_timeout;
        Ok(Telemetry { shared: Some(shared), driver, exporters: counts, flush_timeout, eager: None })
    }

    /// No telemetry at all: what `OTEL_SDK_DISABLED` means.
    pub fn off() -> Telemetry {
        let exporters = Vec::new();
        Telemetry { shared: None, driver: Driver::Off, exporters, flush_timeout: Dur::ZERO, eager: None }
    }

    /// Whose names spans have.
    pub fn naming(&self) -> Naming {
        self.shared.as_ref().map_or(Naming::Proposal, |s| s.naming)
    }

    /// A tracer for a service instance.
    ///
    /// # Panics
    /// For more than 65,536 instances.
    pub fn tracer(&self, mut resource: Resource) -> Tracer {
        let Some(shared) = &self.shared else { return Tracer::off() };
        resource.add_missing(&shared.resource_attributes);
        let index = shared.resources.add(resource.clone());
        let instance = u16::try_from(index).map(InstanceId).expect("a process has at most 65,536 service instances");
        let (service, own) = match &self.eager {
            Some(eager) => {
                let (service, batchers) = eager.service(&resource, instance);
                (Some(service), shared.own.wanted().then(|| eager.own_service(&resource, instance, &batchers)))
            }
            None => (None, None),
        };
        Tracer { shared: Some(Arc::clone(shared)), instance, service, own, handover: Handover::Faithful }
    }

    /// Exchanges the sampler: requests that begin from now on are decided by it.
    pub fn set_sampler(&self, sampler: Sampler) {
        if let Some(eager) = &self.eager {
            eager.set_sampler(&sampler);
        }
        if let Some(shared) = &self.shared {
            shared.sampler.store(Arc::new(sampler));
        }
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        let Some(shared) = &self.shared else { return Stats::default() };
        let mut stats = shared.counters.stats();
        stats.malformed_contexts = shared.propagation.malformed();
        stats.exporters = self.exporters.iter().map(|e| e.stats()).collect();
        // Records that slipped into the channel behind the worker's last look.
        if let Driver::Live { sink, .. } = &self.driver
            && sink.stopped.load(Ordering::SeqCst)
        {
            stats.records_dropped += sink.waiting.len() as u64;
        }
        stats
    }

    /// Waits until everything closed so far is exported or dropped; false if `timeout` ends first.
    pub fn flush(&self, timeout: Dur) -> bool {
        if let Some(eager) = &self.eager {
            return eager.flush(timeout);
        }
        let (settled, wait) = crossbeam_channel::bounded(0);
        match &self.driver {
            Driver::Off => return true,
            Driver::Inline(sink) => {
                if let Some(worker) = sink.lock().as_mut() {
                    worker.flush(&settled);
                }
                drop(settled);
            }
            Driver::Live { control, .. } => {
                if !control.send(Order::Flush(settled)) {
                    return true;
                }
            }
        }
        matches!(wait.recv_timeout(timeout.to_std()), Err(crossbeam_channel::RecvTimeoutError::Disconnected))
    }

    /// What a panic hook calls before the process ends: folds all open records as abandoned, flushes, waits at most the flush
    /// timeout. Not needed for a panic that a server survives: a dropped trail closes its own record.
    pub fn on_panic(&self) -> impl Fn() + Send + Sync + 'static {
        let control = match &self.driver {
            Driver::Live { control, clock, .. } => Some((control.clone(), *clock)),
            Driver::Off | Driver::Inline(_) => None,
        };
        let (timeout, eager) = (self.flush_timeout, self.eager.clone());
        move || {
            // The worker cannot wait for itself.
            let is_worker = std::thread::current().name() == Some("telemetry");
            if let (Some((control, clock)), false) = (&control, is_worker) {
                let (settled, wait) = crossbeam_channel::bounded(0);
                if control.send(Order::Abandon(clock.now(), settled)) {
                    let _ = wait.recv_timeout(timeout.to_std());
                }
                if let Some(eager) = &eager {
                    eager.flush(timeout);
                }
            }
        }
    }

    /// Folds records that are still open as abandoned at `now`, flushes within the flush timeout, and stops.
    pub fn shutdown(mut self, now: Time) -> Stats {
        self.stop(Some(now));
        self.stats()
    }

    fn stop(&mut self, now: Option<Time>) {
        let timeout = self.flush_timeout;
        match &mut self.driver {
            Driver::Off => {}
            Driver::Inline(sink) => {
                let worker = sink.lock().take();
                if let Some(mut worker) = worker {
                    worker.stop(now, timeout);
                }
            }
            Driver::Live { control, thread, clock, .. } => {
                let Some(thread) = thread.take() else { return };
                let (done, wait) = crossbeam_channel::bounded(0);
                let now = now.unwrap_or_else(|| clock.now());
                let asked = control.send(Order::Stop { now, timeout, done });
                // The exporters keep to the timeout; the extra second is for folding and writing.
                let finished = asked && wait.recv_timeout((timeout + Dur::from_secs(1)).to_std()).is_err_and(ended);
                if finished {
                    let _ = thread.join();
                }
                if let Some(eager) = &self.eager {
                    eager.stop(timeout);
                }
            }
        }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.stop(None);
    }
}

impl Tracer {
    /// A tracer that records nothing and forwards inbound headers untouched.
    pub const fn off() -> Tracer {
        Tracer { shared: None, instance: InstanceId(0), service: None, own: None, handover: Handover::Faithful }
    }

    /// Whether telemetry is off: then nothing is read from or written to headers.
    #[inline]
    pub const fn disabled(&self) -> bool {
        self.shared.is_none()
    }

    /// Whether spans say what Langfuse wants to know.
    pub fn tells_langfuse(&self) -> bool {
        self.shared.as_ref().is_some_and(|s| s.langfuse.is_some())
    }

    /// How a request for `model` is a generation of Langfuse's, if spans say so; it may only prefill for another engine.
    pub fn generation(&self, model: &str, prefills: bool) -> Option<Box<Generation>> {
        let shared = self.shared.as_ref()?;
        let price = shared.langfuse.as_ref()?.price(model);
        Some(Box::new(Generation { anchor: shared.anchor, price, prefills }))
    }

    /// What the telemetry of this process did so far, as metrics; nothing if it is off.
    pub fn metrics(&self) -> Vec<Family> {
        let Some(shared) = &self.shared else { return Vec::new() };
        metrics::telemetry::families(&shared.counters.stats(), &shared.exporters)
    }

    /// The service instance of this tracer's spans.
    pub const fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Begins a request whose head was read at `now`: reads the caller's context, decides whether the request is recorded, and
    /// opens what follows it. No place in a trace if telemetry is off.
    pub fn start<F: Fact>(&self, headers: &HeaderMap, now: Time) -> (Option<Started>, Trail<F>) {
        let Some(shared) = &self.shared else { return (None, Trail::off()) };
        match &self.service {
            // What is not recorded goes on below whoever called, under the eager recorder as well.
            Some(service) if F::stands_in(shared.naming) => {
                let (started, trail) = shared.start(service, headers, now);
                (Some(started), trail)
            }
            Some(_) => (Some(self.begin(self.extract(headers))), Trail::off()),
            None => {
                let started = self.begin(self.extract(headers));
                let trail = self.open(&started, now);
                (Some(started), trail)
            }
        }
    }

    /// Whose names spans have.
    pub fn naming(&self) -> Naming {
        self.shared.as_ref().map_or(Naming::Proposal, |s| s.naming)
    }

    /// Begins a request: draws its ids and decides whether it is recorded.
    pub fn begin(&self, caller: Option<TraceContext>) -> Started {
        match &self.shared {
            Some(shared) => shared.begin(caller, &shared.sampler.load()),
            None => without_telemetry(caller),
        }
    }

    /// Like [`Tracer::begin`] with a sampler of its own: per-model ratios, traces of scrapes and engine steps.
    pub fn begin_with(&self, caller: Option<TraceContext>, sampler: &Sampler) -> Started {
        match &self.shared {
            Some(shared) => shared.begin(caller, sampler),
            None => without_telemetry(caller),
        }
    }

    /// Whether trace context is read from and written to headers (`OTEL_PROPAGATORS`).
    pub fn propagates(&self) -> bool {
        self.shared.as_ref().is_some_and(|s| s.propagation.trace_context)
    }

    /// The caller's context, if the headers carry a valid one and `OTEL_PROPAGATORS` asks for it.
    pub fn extract(&self, headers: &HeaderMap) -> Option<TraceContext> {
        context::extract(headers, &self.shared.as_ref()?.propagation)
    }

    /// Opens the record of a sampled request at `now`; [`Trail::off`] for an unsampled one.
    ///
    /// # Panics
    /// With the eager recorder, whose requests begin and open in one: [`Tracer::start`].
    pub fn open<F: Fact>(&self, started: &Started, now: Time) -> Trail<F> {
        assert!(self.service.is_none(), "a request of the eager recorder begins with `start`");
        match &self.shared {
            Some(shared) if (started.context.sampled || started.is_candidate()) && F::stands_in(shared.naming) => {
                let context = &started.context;
                let head = Head {
                    trace_id: context.trace_id,
                    span_id: context.span_id,
                    parent: started.parent,
                    tracestate: context.tracestate.clone(),
                    instance: self.instance,
                    opened: now,
                    detail: shared.detail,
                    naming: shared.naming,
                };
                if started.is_candidate() {
                    Trail::open_candidate(head, &shared.sink)
                } else {
                    Trail::open(head, &shared.sink)
                }
            }
            Some(_) | None => Trail::off(),
        }
    }
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tracer({}, {:?})", if self.disabled() { "off" } else { "on" }, self.instance)
    }
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Telemetry({:?})", self.stats())
    }
}

/// What all tracers of a process share.
pub(super) struct Shared {
    pub(super) sampler: ArcSwap<Sampler>,
    /// What is decided where traces begin, beyond the sampler; `None` unless something is asked for.
    pub(super) edge: Option<Box<Edge>>,
    /// Whether records of candidates are held.
    pub(super) holds: bool,
    pub(super) detail: u8,
    pub(super) naming: Naming,
    propagation: Propagation,
    pub(super) ids: IdSource,
    pub(super) own: OwnConfig,
    pub(super) counters: Arc<Counters>,
    /// For metrics; empty in virtual runs.
    exporters: Vec<Arc<ExporterCounters>>,
    langfuse: Option<Arc<Langfuse>>,
    anchor: Anchor,
    resources: Arc<Resources>,
    resource_attributes: Vec<(String, String)>,
    pub(super) sink: Arc<dyn Sink>,
}

impl Shared {
    /// Begins a request of the eager recorder.
    fn start<F: Fact>(&self, service: &Arc<Service>, headers: &HeaderMap, now: Time) -> (Started, Trail<F>) {
        let caller = if self.propagation.trace_context { eager::extract(headers) } else { Default::default() };
        let ids = (self.ids.trace_id(), self.ids.span_id());
        let (started, slot) =
            eager::open::<F>(service, Opening { caller, ids, now, detail: self.detail, naming: self.naming });
        if started.parent.is_none() {
            self.count_trace(started.context.sampled);
        }
        // Nothing is lost with a request that is not recorded.
        if started.context.sampled {
            slot.register(&self.sink);
        }
        (started, Trail::eager(slot))
    }

    pub(super) fn count_trace(&self, sampled: bool) {
        self.counters.traces_started.add(1);
        self.counters.traces_sampled.add(usize::from(sampled));
    }

    pub(super) fn begin(&self, caller: Option<TraceContext>, sampler: &Sampler) -> Started {
        let trace_id = caller.as_ref().map_or_else(|| self.ids.trace_id(), |c| c.trace_id);
        let decision = sampler.sample(caller.as_ref(), trace_id);
        if caller.is_none() {
            self.count_trace(decision.sampled);
        }
        let context = TraceContext {
            trace_id,
            span_id: self.ids.span_id(),
            sampled: decision.sampled,
            random: caller.as_ref().is_some_and(|c| c.random),
            tracestate: decision.tracestate,
        };
        let held = self.holds && !context.sampled && edge::is_marked(context.tracestate.as_ref());
        let standing = if held { Standing::Candidate } else { Standing::Decided };
        Started { context, parent: caller.map(|c| c.span_id), standing, reason: None }
    }
}

/// A context that is never injected: a disabled tracer forwards inbound headers as they are.
pub(super) fn without_telemetry(caller: Option<TraceContext>) -> Started {
    let placeholder = || {
        let ids = (TraceId::new(1), SpanId::new(1));
        let (Some(trace_id), Some(span_id)) = ids else { unreachable!("1 is a valid id") };
        TraceContext { trace_id, span_id, sampled: false, random: false, tracestate: None }
    };
    let parent = caller.as_ref().map(|c| c.span_id);
    let context = caller.unwrap_or_else(placeholder);
    let context = TraceContext { sampled: false, ..context };
    Started { context, parent, standing: Standing::Decided, reason: None }
}

/// The parts that tracers and worker have in common.
#[derive(Default)]
struct State {
    counters: Arc<Counters>,
    resources: Arc<Resources>,
    open: Arc<OpenRecords>,
}

impl State {
    fn eager(&self, config: &TelemetryConfig, anchor: Anchor) -> Result<Arc<Eager>, TelemetryError> {
        let direct = |e: &ExporterConfig| matches!(e, ExporterConfig::Otlp(o) if o.encoding == OtlpEncoding::Direct);
        if config.exporters.iter().any(direct) {
            return Err(TelemetryError::EagerDirect);
        }
        Ok(Arc::new(Eager::new(config, anchor, Arc::clone(&self.counters), &self.resources)?))
    }

    fn worker(&self, config: &TelemetryConfig, anchor: Anchor, exporters: Vec<Box<dyn exporter::Exporter>>) -> Worker {
        let (counters, resources) = (Arc::clone(&self.counters), Arc::clone(&self.resources));
        Worker::new(config, anchor, exporters, counters, resources, Arc::clone(&self.open))
    }

    fn share(
        self,
        config: &TelemetryConfig,
        anchor: Anchor,
        ids: IdSource,
        own: OwnConfig,
        sink: Arc<dyn Sink>,
    ) -> Shared {
        Shared {
            sampler: ArcSwap::from_pointee(config.sampler.clone()),
            edge: Edge::of(&config.policy).map(Box::new),
            holds: config.hold.is_some(),
            detail: config.detail,
            naming: config.naming,
            propagation: Propagation::new(config.trace_context),
            ids,
            own,
            counters: self.counters,
            exporters: Vec::new(),
            langfuse: config.langfuse.clone(),
            anchor,
            resources: self.resources,
            resource_attributes: config.resource_attributes.clone(),
            sink,
        }
    }
}

enum Driver {
    Off,
    Inline(Arc<InlineSink>),
    Live { control: Orders, thread: Option<JoinHandle<()>>, clock: RunClock, sink: Arc<LiveSink> },
}

fn ended(error: crossbeam_channel::RecvTimeoutError) -> bool {
    matches!(error, crossbeam_channel::RecvTimeoutError::Disconnected)
}
