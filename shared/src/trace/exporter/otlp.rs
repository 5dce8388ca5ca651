//! Spans to a collector: a thread and a bounded queue per exporter, so that a slow or dead collector costs only its own spans.
//!
//! The worker never waits here: a full queue drops the batch and counts it. The thread sends one batch at a time, each export
//! with its retries within the timeout. At the end it has the flush timeout, then it drops and counts what is left, whatever the
//! collector does. What encodes the spans makes no difference to any of this.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::sync::{mpsc, watch};

use crate::clock::RunClock;
use crate::time::{Anchor, Dur};
use crate::trace::config::{OtlpConfig, OtlpEncoding, TelemetryConfig};
use crate::trace::exporter::by_sdk::BySdk;
use crate::trace::exporter::direct::Direct;
use crate::trace::exporter::transport::Transport;
use crate::trace::exporter::{Batch, Exporter, Settled, Takes};
use crate::trace::pipeline::TelemetryError;
use crate::trace::set::TraceSet;
use crate::trace::stats::{ExporterCounters, ExporterStats, Loss};

pub use crate::trace::exporter::by_sdk::MAX_INSTANCES;

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
    takes: Takes,
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
        counters.set_queue(Arc::clone(&unsettled), max_queue);
        let books = Books { unsettled: Arc::clone(&unsettled), counters: Arc::clone(&counters) };
        let takes = match otlp.encoding {
            OtlpEncoding::Sdk => Takes::Spans,
            OtlpEncoding::Direct => Takes::Requests,
        };
        let work = move || {
            runtime.block_on(run(takes, transport, books, messages, stopped));
            // A name lookup that hangs must not hold the thread.
            runtime.shutdown_background();
            drop(finished);
        };
        let thread = std::thread::Builder::new().name("telemetry-otlp".to_owned()).spawn(work);
        let thread = Some(thread.map_err(TelemetryError::Thread)?);
        let (queue, timeout) = (Some(queue), Dur::ZERO);
        Ok(OtlpExporter { queue, unsettled, max_queue, stop, done, thread, timeout, takes, counters })
    }
}

impl Exporter for OtlpExporter {
    fn takes(&self) -> Takes {
        self.takes
    }

    fn export(&mut self, batch: &Arc<Batch>) {
        let spans = batch.len;
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

/// What sends batches, by what encodes them.
enum Sending {
    Sdk(Box<BySdk>),
    Direct(Direct),
}

/// Sends until the queue ends or the time is up; what is unsettled then, `join` counts as lost at shutdown.
async fn run(
    takes: Takes,
    transport: Transport,
    books: Books,
    mut messages: mpsc::UnboundedReceiver<Message>,
    stop: watch::Receiver<Option<Dur>>,
) {
    let (clock, counters) = (RunClock::start(), Arc::clone(&books.counters));
    let mut sending = match takes {
        Takes::Spans => Sending::Sdk(Box::new(BySdk::new(transport, books))),
        Takes::Requests => Sending::Direct(Direct::new(&transport, books)),
    };
    let expired = expiry(stop);
    tokio::pin!(expired);
    loop {
        let message = tokio::select! {
            biased;
            () = &mut expired => return,
            message = messages.recv() => message,
        };
        match message {
            None => return,
            Some(Message::Flush(settled)) => drop(settled),
            Some(Message::Batch(batch)) => {
                let began = clock.now();
                tokio::select! {
                    biased;
                    () = &mut expired => return,
                    () = sending.export(&batch) => counters.took(clock.now().since(began)),
                }
            }
        }
    }
}

impl Sending {
    /// Sends a batch; all of its spans are settled at the end.
    async fn export(&mut self, batch: &Batch) {
        match self {
            Sending::Sdk(sdk) => sdk.export(batch).await,
            Sending::Direct(direct) => direct.export(batch).await,
        }
    }
}

/// Where the fate of spans is entered.
pub(super) struct Books {
    unsettled: Arc<AtomicUsize>,
    pub(super) counters: Arc<ExporterCounters>,
}

impl Books {
    pub(super) fn open(&self, spans: usize) -> Settle {
        Settle { spans, unsettled: Arc::clone(&self.unsettled), counters: Arc::clone(&self.counters) }
    }
}

/// Spans whose fate has to be counted.
pub(super) struct Settle {
    spans: usize,
    unsettled: Arc<AtomicUsize>,
    counters: Arc<ExporterCounters>,
}

impl Settle {
    /// Accepted, but for the spans that the collector says it rejected.
    pub(super) fn done(self, rejected: usize) {
        let rejected = rejected.min(self.spans);
        self.counters.exported(self.spans - rejected);
        self.counters.lost(Loss::ExportFailed, rejected);
        self.unsettled.fetch_sub(self.spans, Ordering::AcqRel);
    }
    pub(super) fn failed(self, why: String) {
        self.counters.lost(Loss::ExportFailed, self.spans);
        self.counters.error(why);
        self.unsettled.fetch_sub(self.spans, Ordering::AcqRel);
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
/// Backends such as Tempo only find recent traces: choose `anchor` so that the run ends now. The SDK encodes the spans, whatever
/// `otlp` says: the records that could be encoded directly are gone.
///
/// # Errors
/// If the exporter cannot be built. Spans that the collector does not take are counted, not an error.
pub fn send(set: &TraceSet, otlp: &OtlpConfig, anchor: Anchor) -> Result<ExporterStats, TelemetryError> {
    const BATCH: usize = 2_000;
    let by_sdk = OtlpConfig { encoding: OtlpEncoding::Sdk, ..otlp.clone() };
    let mut exporter = OtlpExporter::start_with(&by_sdk, otlp.timeout, usize::MAX)?;
    let resources = Arc::new(set.resources.iter().cloned().map(Arc::new).collect::<Vec<_>>());
    for spans in set.spans.chunks(BATCH) {
        let (len, request, resources) = (spans.len(), bytes::Bytes::new(), Arc::clone(&resources));
        let batch = Batch { len, spans: spans.to_vec(), request, resources, anchor };
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
