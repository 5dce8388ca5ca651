//! Counts of the telemetry path: nothing is lost without being counted.
//!
//! Invariants: `records_closed = records_folded + records_dropped + records_failed + records_discarded + records_expired +
//! records_evicted` once the pipeline is shut down, and for each exporter `spans_created = exported + dropped.total()`.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::Serialize;

use crate::metrics::telemetry::EXPORT_BOUNDS;
use crate::metrics::{Distribution, Histogram};
use crate::time::Dur;

/// What became of records, spans and contexts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Records opened: one per sampled request and service.
    pub records_opened: u64,
    /// Records closed by their owner or abandoned.
    pub records_closed: u64,
    /// Records folded into spans.
    pub records_folded: u64,
    /// Closed records lost because the worker's channel was full, or because they closed after shutdown.
    pub records_dropped: u64,
    /// Closed records lost because folding them panicked.
    pub records_failed: u64,
    /// Closed records of candidates that the edge judged not worth keeping.
    pub records_discarded: u64,
    /// Closed records of candidates that were held and not asked for, in their time or before the end.
    pub records_expired: u64,
    /// Closed records of candidates that gave way to others.
    pub records_evicted: u64,
    /// Folded records that nobody finished: deadline, shutdown, panic or crash.
    pub records_abandoned: u64,
    /// Facts that did not fit into their record.
    pub facts_cut: u64,
    /// Spans folded from records.
    pub spans_created: u64,
    /// What each exporter did.
    pub exporters: Vec<ExporterStats>,
    /// `traceparent` and `tracestate` values dropped as malformed.
    pub malformed_contexts: u64,
    /// Traces that started in this process.
    pub traces_started: u64,
    /// Traces that started in this process and are recorded.
    pub traces_sampled: u64,
    /// Traces that started in this process and were kept for what became of their requests.
    pub traces_kept: u64,
    /// Traces of engine steps that were decided on. Like all below, which no request causes, they are not counted above.
    pub own_traces_started: u64,
    /// Of these, recorded.
    pub own_traces_sampled: u64,
    /// Traces of scrapes that are recorded.
    pub scrape_traces_sampled: u64,
    /// Traces of batches of KV events that are recorded.
    pub kv_event_traces_sampled: u64,
}

/// What one exporter did with the spans it was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExporterStats {
    /// Kind and destination, without credentials.
    pub name: String,
    /// Spans accepted by the destination.
    pub exported: u64,
    /// Spans lost, by reason.
    pub dropped: Dropped,
    /// Batches accepted by the destination.
    pub batches: u64,
    /// Bytes sent, compressed if compression is on; absent where the transport does not tell.
    pub bytes: Option<u64>,
    /// The text of the last failure.
    pub last_error: Option<String>,
}

/// Spans lost, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// The exporter was behind and its queue full.
    pub queue_full: u64,
    /// The destination refused, failed or did not answer in time.
    pub export_failed: u64,
    /// The flush timeout ended before the spans were sent.
    pub shutdown: u64,
}

impl Dropped {
    /// All spans lost.
    pub const fn total(&self) -> u64 {
        self.queue_full + self.export_failed + self.shutdown
    }
}

/// A counter that many threads add to; the order of additions never matters.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Ordering::Relaxed);
    }
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts of records and traces.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) opened: Counter,
    pub(crate) closed: Counter,
    pub(crate) folded: Counter,
    pub(crate) dropped: Counter,
    pub(crate) failed: Counter,
    pub(crate) discarded: Counter,
    pub(crate) expired: Counter,
    pub(crate) evicted: Counter,
    pub(crate) abandoned: Counter,
    pub(crate) cut: Counter,
    pub(crate) spans: Counter,
    pub(crate) traces_started: Counter,
    pub(crate) traces_sampled: Counter,
    pub(crate) traces_kept: Counter,
    pub(crate) own_started: Counter,
    pub(crate) own_sampled: Counter,
    pub(crate) scrapes_sampled: Counter,
    pub(crate) kv_events_sampled: Counter,
}

impl Counters {
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            records_opened: self.opened.get(),
            records_closed: self.closed.get(),
            records_folded: self.folded.get(),
            records_dropped: self.dropped.get(),
            records_failed: self.failed.get(),
            records_discarded: self.discarded.get(),
            records_expired: self.expired.get(),
            records_evicted: self.evicted.get(),
            records_abandoned: self.abandoned.get(),
            facts_cut: self.cut.get(),
            spans_created: self.spans.get(),
            exporters: Vec::new(),
            malformed_contexts: 0,
            traces_started: self.traces_started.get(),
            traces_sampled: self.traces_sampled.get(),
            traces_kept: self.traces_kept.get(),
            own_traces_started: self.own_started.get(),
            own_traces_sampled: self.own_sampled.get(),
            scrape_traces_sampled: self.scrapes_sampled.get(),
            kv_event_traces_sampled: self.kv_events_sampled.get(),
        }
    }
}

/// Why an exporter lost spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    QueueFull,
    ExportFailed,
    Shutdown,
}

/// Counts of one exporter.
#[derive(Debug, Default)]
pub(crate) struct ExporterCounters {
    name: String,
    exported: Counter,
    queue_full: Counter,
    export_failed: Counter,
    shutdown: Counter,
    batches: Counter,
    bytes: Counter,
    counts_bytes: bool,
    last_error: Mutex<Option<String>>,
    /// Spans taken and not settled, and the most there may be, where there is a queue.
    queue: OnceLock<(Arc<AtomicUsize>, usize)>,
    /// Times of exports; none before the first.
    durations: OnceLock<Histogram>,
}

impl ExporterCounters {
    pub(crate) fn new(name: String, counts_bytes: bool) -> ExporterCounters {
        ExporterCounters { name, counts_bytes, ..ExporterCounters::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says how many spans wait, and how many may.
    pub(crate) fn set_queue(&self, unsettled: Arc<AtomicUsize>, capacity: usize) {
        let _ = self.queue.set((unsettled, capacity));
    }

    /// Spans that wait, and the most that may.
    pub(crate) fn queue(&self) -> Option<(usize, usize)> {
        self.queue.get().map(|(unsettled, capacity)| (unsettled.load(Ordering::Relaxed), *capacity))
    }

    /// An export took this long.
    pub(crate) fn took(&self, time: Dur) {
        self.durations.get_or_init(|| Histogram::seconds(EXPORT_BOUNDS)).record(time, None);
    }

    pub(crate) fn durations(&self) -> Option<Distribution> {
        self.durations.get().map(Histogram::read)
    }

    pub(crate) fn exported(&self, spans: usize) {
        self.exported.add(spans);
        self.batches.add(1);
    }

    pub(crate) fn sent_bytes(&self, bytes: usize) {
        self.bytes.add(bytes);
    }

    pub(crate) fn lost(&self, why: Loss, spans: usize) {
        match why {
            Loss::QueueFull => self.queue_full.add(spans),
            Loss::ExportFailed => self.export_failed.add(spans),
            Loss::Shutdown => self.shutdown.add(spans),
        }
    }

    pub(crate) fn error(&self, text: impl Into<String>) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.into());
    }

    pub(crate) fn stats(&self) -> ExporterStats {
        ExporterStats {
            name: self.name.clone(),
            exported: self.exported.get(),
            dropped: Dropped {
                queue_full: self.queue_full.get(),
                export_failed: self.export_failed.get(),
                shutdown: self.shutdown.get(),
            },
            batches: self.batches.get(),
            bytes: self.counts_bytes.then(|| self.bytes.get()),
            last_error: self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
