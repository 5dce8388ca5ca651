//! Where the SDK's batch processors export to: opentelemetry-otlp on a runtime of its own, or the exporters of plain spans.
//!
//! An exporter of the SDK belongs to one service instance; the counts belong to the destination.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanKind, Status};
use opentelemetry::{Array, KeyValue, StringValue};
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::{Anchor, Dur, Time};
use crate::trace::config::{ExporterConfig, OtlpConfig, TelemetryConfig};
use crate::trace::exporter::transport::{Connection, InstanceExporter, Transport};
use crate::trace::exporter::{self, Batch, Exporter};
use crate::trace::pipeline::TelemetryError;
use crate::trace::resource::Resource;
use crate::trace::span::{self, Attr, Kind, Link, Span, Text};
use crate::trace::stats::{ExporterCounters, Loss};
use crate::trace::worker::Resources;

/// A destination of spans, shared by all service instances.
pub(super) struct Destination {
    tally: Arc<Tally>,
    way: Way,
}

enum Way {
    Otlp(Box<Otlp>),
    Plain(Plain),
}

/// A collector.
struct Otlp {
    transport: Transport,
    connection: Connection,
    runtime: Runtime,
    timeout: Dur,
}

/// An exporter of plain spans: file, console, memory.
#[derive(Clone)]
struct Plain {
    exporter: Arc<Mutex<Box<dyn Exporter>>>,
    resources: Arc<Resources>,
    anchor: Anchor,
}

impl Destination {
    pub(super) fn new(
        exporter: &ExporterConfig,
        config: &TelemetryConfig,
        anchor: Anchor,
        resources: Arc<Resources>,
    ) -> Result<Destination, TelemetryError> {
        match exporter {
            ExporterConfig::Otlp(otlp) => Destination::otlp(otlp, config),
            ExporterConfig::File(_)
            | ExporterConfig::RotatingFile(_)
            | ExporterConfig::Console(_)
            | ExporterConfig::Memory(_) => {
                let exporter = exporter::build_one(exporter, config, true)?;
                let tally = Tally::new(Arc::clone(exporter.counters()));
                let exporter = Arc::new(Mutex::new(exporter));
                Ok(Destination { tally, way: Way::Plain(Plain { exporter, resources, anchor }) })
            }
        }
    }

    fn otlp(otlp: &OtlpConfig, config: &TelemetryConfig) -> Result<Destination, TelemetryError> {
        let fail = |why: String| TelemetryError::Exporter(format!("otlp {}: {why}", otlp.address()));
        let timeout = otlp.timeout.min(config.export_timeout);
        let transport = Transport::new(otlp, timeout).map_err(fail)?;
        let name = format!("otlp {} {}", otlp.protocol, otlp.address());
        let tally = Tally::new(Arc::new(ExporterCounters::new(name, transport.counts_bytes())));
        let runtime = Runtime::start().map_err(TelemetryError::Thread)?;
        let connection = {
            let _inside = runtime.handle.enter();
            transport.connect()
        };
        Ok(Destination { tally, way: Way::Otlp(Box::new(Otlp { transport, connection, runtime, timeout })) })
    }

    pub(super) fn counters(&self) -> &Arc<ExporterCounters> {
        &self.tally.counters
    }

    /// The exporter of a service instance.
    pub(super) fn outlet(&self, resource: &Resource, instance: InstanceId) -> Outlet {
        let way = match &self.way {
            Way::Plain(plain) => OutletWay::Plain(plain.clone(), instance),
            Way::Otlp(otlp) => {
                let Otlp { transport, connection, runtime, timeout } = &**otlp;
                let _inside = runtime.handle.enter();
                match transport.exporter(connection, resource, &self.tally.counters) {
                    Ok(exporter) => OutletWay::Otlp(Arc::new(exporter), runtime.handle.clone(), *timeout),
                    Err(why) => OutletWay::Broken(why),
                }
            }
        };
        Outlet { tally: Arc::clone(&self.tally), way }
    }

    /// An exporter that fails.
    pub(super) fn broken(&self, why: String) -> Outlet {
        Outlet { tally: Arc::clone(&self.tally), way: OutletWay::Broken(why) }
    }

    /// Ends the destination: what its exporters still have does not count any more.
    pub(super) fn close(&self, timeout: Dur) {
        *self.tally.over() = true;
        match &self.way {
            Way::Otlp(otlp) => otlp.runtime.stop(),
            Way::Plain(plain) => {
                let mut exporter = plain.exporter.lock().unwrap_or_else(PoisonError::into_inner);
                exporter.stop(timeout);
                exporter.join();
            }
        }
    }

    /// Counts as lost what is missing of `created` spans.
    pub(super) fn account(&self, created: u64, why: Loss) {
        let _over = self.tally.over();
        let stats = self.tally.counters.stats();
        let missing = created.saturating_sub(stats.exported + stats.dropped.total());
        self.tally.counters.lost(why, usize::try_from(missing).unwrap_or(usize::MAX));
    }
}

/// The counts of a destination, which settle once.
#[derive(Debug)]
struct Tally {
    counters: Arc<ExporterCounters>,
    over: Mutex<bool>,
}

impl Tally {
    fn new(counters: Arc<ExporterCounters>) -> Arc<Tally> {
        Arc::new(Tally { counters, over: Mutex::new(false) })
    }

    fn over(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the outcome of an export: how many spans were rejected, or why all failed.
    fn count(&self, spans: usize, outcome: Result<usize, String>) -> OTelSdkResult {
        let over = self.over();
        if *over {
            return Err(OTelSdkError::AlreadyShutdown);
        }
        match outcome {
            Ok(rejected) => {
                let rejected = rejected.min(spans);
                self.counters.exported(spans - rejected);
                self.counters.lost(Loss::ExportFailed, rejected);
                Ok(())
            }
            Err(why) => {
                self.counters.lost(Loss::ExportFailed, spans);
                self.counters.error(why.clone());
                Err(OTelSdkError::InternalFailure(why))
            }
        }
    }
}

/// An exporter for the SDK.
pub(super) struct Outlet {
    tally: Arc<Tally>,
    way: OutletWay,
}

enum OutletWay {
    Otlp(Arc<InstanceExporter>, Handle, Dur),
    Plain(Plain, InstanceId),
    Broken(String),
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Outlet({:?})", self.tally)
    }
}

impl SpanExporter for Outlet {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        match &self.way {
            OutletWay::Otlp(exporter, runtime, timeout) => {
                let (exporter, timeout) = (Arc::clone(exporter), *timeout);
                // The batch processor waits on a thread without a reactor.
                let export = runtime.spawn(async move {
                    match tokio::time::timeout(timeout.to_std(), exporter.export(batch)).await {
                        Ok(outcome) => outcome,
                        Err(_) => Err(exporter.trouble().unwrap_or_else(|| format!("no answer within {timeout}"))),
                    }
                });
                let outcome = export.await.unwrap_or_else(|_| Err("the exporter's thread has ended".to_owned()));
                self.tally.count(spans, outcome)
            }
            OutletWay::Plain(plain, instance) => {
                let over = self.tally.over();
                if *over {
                    return Err(OTelSdkError::AlreadyShutdown);
                }
                plain.export(batch, *instance);
                Ok(())
            }
            OutletWay::Broken(why) => self.tally.count(spans, Err(why.clone())),
        }
    }
}

impl Plain {
    fn export(&self, batch: Vec<SpanData>, instance: InstanceId) {
        let plain = batch.into_iter().filter_map(|data| plain_span(data, instance, self.anchor));
        let spans: Vec<Span> = plain.collect();
        let (len, request) = (spans.len(), bytes::Bytes::new());
        let batch = Batch { len, spans, request, resources: self.resources.snapshot(), anchor: self.anchor };
        self.exporter.lock().unwrap_or_else(PoisonError::into_inner).export(&Arc::new(batch));
    }
}

/// A runtime on a thread of its own.
struct Runtime {
    handle: Handle,
    stop: Mutex<Option<(oneshot::Sender<()>, JoinHandle<()>)>>,
}

impl Runtime {
    fn start() -> std::io::Result<Runtime> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let work = move || {
            // Dropping the sender stops it too.
            let _ = runtime.block_on(stopped);
            // A name lookup that hangs must not hold the thread.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("telemetry-otlp".to_owned()).spawn(work)?;
        Ok(Runtime { handle, stop: Mutex::new(Some((stop, thread))) })
    }

    fn stop(&self) {
        let taken = self.stop.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((stop, thread)) = taken {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

/// A span of the SDK as plain data; `None` if it has no valid ids.
fn plain_span(data: SpanData, instance: InstanceId, anchor: Anchor) -> Option<Span> {
    let state = data.span_context.trace_state().header();
    Some(Span {
        trace_id: trace_id(data.span_context.trace_id())?,
        span_id: span_id(data.span_context.span_id())?,
        parent: span_id(data.parent_span_id),
        parent_is_remote: data.parent_span_is_remote,
        tracestate: (!state.is_empty()).then(|| state.into()),
        instance,
        name: data.name,
        kind: match data.span_kind {
            SpanKind::Server => Kind::Server,
            SpanKind::Client => Kind::Client,
            SpanKind::Internal | SpanKind::Producer | SpanKind::Consumer => Kind::Internal,
        },
        start: since(anchor, data.start_time),
        end: since(anchor, data.end_time),
        attrs: data.attributes.into_iter().filter_map(attr).collect(),
        events: data.events.iter().map(|e| plain_event(e, anchor)).collect(),
        links: data.links.iter().filter_map(plain_link).collect(),
        status: match data.status {
            Status::Error { description } => span::Status::Error(description),
            Status::Unset | Status::Ok => span::Status::Unset,
        },
    })
}

fn plain_event(event: &opentelemetry::trace::Event, anchor: Anchor) -> span::Event {
    let attrs = event.attributes.iter().cloned().filter_map(attr).collect();
    span::Event { name: event.name.clone(), at: since(anchor, event.timestamp), attrs }
}

fn plain_link(link: &opentelemetry::trace::Link) -> Option<Link> {
    let to = &link.span_context;
    let attrs = link.attributes.iter().cloned().filter_map(attr).collect();
    Some(Link { trace_id: trace_id(to.trace_id())?, span_id: span_id(to.span_id())?, attrs })
}

fn trace_id(id: opentelemetry::TraceId) -> Option<TraceId> {
    TraceId::new(u128::from_be_bytes(id.to_bytes()))
}

fn span_id(id: opentelemetry::SpanId) -> Option<SpanId> {
    SpanId::new(u64::from_be_bytes(id.to_bytes()))
}

/// The inverse of [`Anchor::unix_nanos`].
fn since(anchor: Anchor, at: SystemTime) -> Time {
    let unix = at.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
    Time::from_nanos(unix.saturating_sub(anchor.unix_nanos(Time::ZERO)))
}

/// An attribute as plain data; kinds of value that no fold makes are left out.
fn attr(attribute: KeyValue) -> Option<Attr> {
    let text = |v: StringValue| Text::Owned(v.into());
    let value = match attribute.value {
        opentelemetry::Value::String(v) => span::Value::Str(text(v)),
        opentelemetry::Value::I64(v) => span::Value::Int(v),
        opentelemetry::Value::F64(v) => span::Value::F64(v),
        opentelemetry::Value::Bool(v) => span::Value::Bool(v),
        opentelemetry::Value::Array(Array::String(v)) => span::Value::StrList(v.into_iter().map(text).collect()),
        opentelemetry::Value::Array(Array::F64(v)) => span::Value::F64List(v),
        _ => return None,
    };
    Some((Cow::Owned(attribute.key.into()), value))
}
