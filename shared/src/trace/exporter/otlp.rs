//! Spans to a collector: a thread and a bounded queue per exporter, so that a slow or dead collector costs only its own spans.
//!
//! The worker never waits here: a full queue drops the batch and counts it. The thread sends one batch at a time, the service
//! instances of a batch side by side, each export with its retries within the timeout. At the end it has the flush timeout,
//! then it drops and counts what is left, whatever the collector does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::ids::InstanceId;
use crate::time::{Anchor, Dur};
use crate::trace::config::{OtlpConfig, TelemetryConfig};
use crate::trace::exporter::transport::{Connection, InstanceExporter, Transport};
use crate::trace::exporter::{Batch, Exporter, Settled, sdk};
use crate::trace::pipeline::TelemetryError;
use crate::trace::set::TraceSet;
use crate::trace::span::Span;
use crate::trace::stats::{ExporterCounters, ExporterStats, Loss};

/// The most service instances of one exporter: each has an SDK exporter of its own.
pub const MAX_INSTANCES: usize = 64;

/// The worker's end of the queue.
pub(crate) struct OtlpExporter {
    queue: Option<mpsc::UnboundedSender<Message>>,
    /// Spans taken and not yet settled; bounds the queue.
    unsettled: Arc<AtomicUsize>,
    max_queue: usize,
    stop: watch::Sender<Option<Dur>>,
    /// Disconnected when the thread is done.
    done: crossbeam_channel::Receiver<()>,
    thread: Option<JoinHandle<()>>,
    timeout: Dur,
    counters: Arc<ExporterCounters>,
}

enum Message {
    Batch(Arc<Batch>),
    Flush(Settled),
}

impl OtlpExporter {
    pub(crate) fn start(otlp: &OtlpConfig, config: &TelemetryConfig) -> Result<OtlpExporter, TelemetryError> {
        let timeout = otlp.timeout.min(config.export_timeout);
        Self::start_with(otlp, timeout, config.max_queue)
    }

    fn start_with(otlp: &OtlpConfig, timeout: Dur, max_queue: usize) -> Result<OtlpExporter, TelemetryError> {
        let fail = |why: String| TelemetryError::Exporter(format!("otlp {}: {why}", otlp.address()));
        let transport = Transport::new(otlp, timeout).map_err(fail)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(TelemetryError::Thread)?;
        let counters = Arc::new(ExporterCounters::new(
            format!("otlp {} {}", otlp.protocol, otlp.address()),
            transport.counts_bytes(),
        ));
        let (queue, messages) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(None);
        let (finished, done) = crossbeam_channel::bounded(0);
        let unsettled = Arc::new(AtomicUsize::new(0));
        let sender = Sender {
            transport,
            instances: BTreeMap::new(),
            timeout,
            unsettled: Arc::clone(&unsettled),
            counters: Arc::clone(&counters),
        };
        let work = move || {
            runtime.block_on(sender.run(messages, stopped));
            // A name lookup that hangs must not hold the thread.
            runtime.shutdown_background();
            drop(finished);
        };
        let thread = std::thread::Builder::new().name("telemetry-otlp".to_owned()).spawn(work);
        let thread = Some(thread.map_err(TelemetryError::Thread)?);
        Ok(OtlpExporter { queue: Some(queue), unsettled, max_queue, stop, done, thread, timeout: Dur::ZERO, counters })
    }
}

impl Exporter for OtlpExporter {
    fn export(&mut self, batch: &Arc<Batch>) {
        let spans = batch.spans.len();
        let full = self.unsettled.load(Ordering::Acquire) + spans > self.max_queue;
        let Some(queue) = self.queue.as_ref().filter(|_| !full) else {
            self.counters.lost(if full { Loss::QueueFull } else { Loss::Shutdown }, spans);
            return;
        };
        self.unsettled.fetch_add(spans, Ordering::AcqRel);
        if queue.send(Message::Batch(Arc::clone(batch))).is_err() {
            self.unsettled.fetch_sub(spans, Ordering::AcqRel);
            self.counters.lost(Loss::ExportFailed, spans);
            self.counters.error("the exporter's thread has ended");
        }
    }

    fn flush(&mut self, settled: Settled) {
        if let Some(queue) = &self.queue {
            // If the thread is gone there is nothing left to settle, and `settled` is dropped with the message.
            let _ = queue.send(Message::Flush(settled));
        }
    }

    fn stop(&mut self, timeout: Dur) {
        self.timeout = timeout;
        self.queue = None;
        self.stop.send_replace(Some(timeout));
    }

    fn join(&mut self) {
        // A little longer than the thread gives itself.
        let wait = (self.timeout + Dur::from_millis(500)).to_std();
        let ended = matches!(self.done.recv_timeout(wait), Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            let _ = thread.join();
        }
        self.counters.lost(Loss::Shutdown, self.unsettled.swap(0, Ordering::AcqRel));
    }

    fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}

/// The thread's state.
struct Sender {
    transport: Transport,
    instances: BTreeMap<InstanceId, Arc<InstanceExporter>>,
    timeout: Dur,
    unsettled: Arc<AtomicUsize>,
    counters: Arc<ExporterCounters>,
}

impl Sender {
    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>, stop: watch::Receiver<Option<Dur>>) {
        let connection = self.transport.connect();
        let expired = expiry(stop);
        tokio::pin!(expired);
        loop {
            let message = tokio::select! {
                biased;
                () = &mut expired => break,
                message = messages.recv() => message,
            };
            match message {
                None => return,
                Some(Message::Flush(settled)) => drop(settled),
                Some(Message::Batch(batch)) => {
                    let cut_short = tokio::select! {
                        biased;
                        () = &mut expired => true,
                        () = self.export(&batch, &connection) => false,
                    };
                    if cut_short {
                        break;
                    }
                }
            }
        }
        // What is unsettled now, `join` counts as lost at shutdown.
    }

    /// Sends the spans of each service instance; all are settled at the end.
    async fn export(&mut self, batch: &Batch, connection: &Connection) {
        let mut groups: BTreeMap<InstanceId, Vec<&Span>> = BTreeMap::new();
        for span in &batch.spans {
            groups.entry(span.instance).or_default().push(span);
        }
        let mut running = JoinSet::new();
        for (instance, spans) in groups {
            match self.instance(instance, batch, connection) {
                Ok(exporter) => {
                    let data = spans.iter().map(|s| sdk::span_data(s, batch.anchor)).collect();
                    let settle = self.settle(spans.len());
                    running.spawn(export_one(exporter, data, self.timeout, settle));
                }
                Err(why) => self.settle(spans.len()).failed(why),
            }
        }
        // Dropping the set, when the time is up, aborts what is under way.
        while running.join_next().await.is_some() {}
    }

    fn instance(
        &mut self,
        instance: InstanceId,
        batch: &Batch,
        connection: &Connection,
    ) -> Result<Arc<InstanceExporter>, String> {
        if let Some(exporter) = self.instances.get(&instance) {
            return Ok(Arc::clone(exporter));
        }
        if self.instances.len() >= MAX_INSTANCES {
            return Err(format!(
                "more than {MAX_INSTANCES} service instances: use the file exporter and send the file"
            ));
        }
        let resource = batch.resources.get(usize::from(instance.0)).ok_or("a span without a resource")?;
        let exporter = Arc::new(self.transport.exporter(connection, resource, &self.counters)?);
        self.instances.insert(instance, Arc::clone(&exporter));
        Ok(exporter)
    }

    fn settle(&self, spans: usize) -> Settle {
        Settle { spans, unsettled: Arc::clone(&self.unsettled), counters: Arc::clone(&self.counters) }
    }
}

/// Spans whose fate has to be counted.
struct Settle {
    spans: usize,
    unsettled: Arc<AtomicUsize>,
    counters: Arc<ExporterCounters>,
}

impl Settle {
    fn done(self, rejected: usize) {
        let rejected = rejected.min(self.spans);
        self.counters.exported(self.spans - rejected);
        self.counters.lost(Loss::ExportFailed, rejected);
        self.unsettled.fetch_sub(self.spans, Ordering::AcqRel);
    }
    fn failed(self, why: String) {
        self.counters.lost(Loss::ExportFailed, self.spans);
        self.counters.error(why);
        self.unsettled.fetch_sub(self.spans, Ordering::AcqRel);
    }
}

async fn export_one(
    exporter: Arc<InstanceExporter>,
    data: Vec<opentelemetry_sdk::trace::SpanData>,
    timeout: Dur,
    settle: Settle,
) {
    match tokio::time::timeout(timeout.to_std(), exporter.export(data)).await {
        Ok(Ok(rejected)) => settle.done(rejected),
        Ok(Err(why)) => settle.failed(why),
        Err(_) => settle.failed(exporter.trouble().unwrap_or_else(|| format!("no answer within {timeout}"))),
    }
}

/// Ends when the time given with the order to stop is over.
async fn expiry(mut stop: watch::Receiver<Option<Dur>>) {
    let timeout = match stop.wait_for(Option::is_some).await {
        Ok(timeout) => timeout.unwrap_or_default(),
        // The exporter was dropped without `stop`.
        Err(_) => Dur::ZERO,
    };
    tokio::time::sleep(timeout.to_std()).await;
}

/// Sends the spans of a finished run, with its time zero at `anchor`; waits for the collector rather than dropping.
///
/// Backends such as Tempo only find recent traces: choose `anchor` so that the run ends now.
///
/// # Errors
/// If the exporter cannot be built. Spans that the collector does not take are counted, not an error.
pub fn send(set: &TraceSet, otlp: &OtlpConfig, anchor: Anchor) -> Result<ExporterStats, TelemetryError> {
    const BATCH: usize = 2_000;
    let mut exporter = OtlpExporter::start_with(otlp, otlp.timeout, usize::MAX)?;
    let resources = Arc::new(set.resources.iter().cloned().map(Arc::new).collect::<Vec<_>>());
    for spans in set.spans.chunks(BATCH) {
        let batch = Batch { spans: spans.to_vec(), resources: Arc::clone(&resources), anchor };
        exporter.export(&Arc::new(batch));
        let (settled, wait) = crossbeam_channel::bounded(0);
        exporter.flush(settled);
        // Ends when the batch is exported or given up, each of which the export timeout bounds.
        let _ = wait.recv();
    }
    exporter.stop(otlp.timeout);
    exporter.join();
    Ok(exporter.counters.stats())
}
