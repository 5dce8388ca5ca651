//! The worker's core: folds records, fills batches, sweeps the table of open records.
//!
//! Driven like every core (`take`, `next_wakeup`, `advance`): by the telemetry thread in live runs, by the simulation thread in
//! virtual ones. Reads no clock; `now` is an argument.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::ids::{InstanceId, TraceId};
use crate::time::{Anchor, Dur, Time};
use crate::trace::config::TelemetryConfig;
use crate::trace::exporter::{Batch, Exporter, Settled, Takes};
use crate::trace::held::Held;
use crate::trace::otlp_bytes::Requests;
use crate::trace::record::{Closed, Open, Ticket};
use crate::trace::resource::Resource;
use crate::trace::span::Span;
use crate::trace::stats::Counters;

/// The resources of a process, in the order of their instance ids.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    list: Mutex<Arc<Vec<Arc<Resource>>>>,
    /// Whether the clock of any of them is wrong.
    skewed: AtomicBool,
}

impl Resources {
    /// Adds a resource and returns its index.
    pub(crate) fn add(&self, resource: Resource) -> usize {
        if resource.clock_skew_ns != 0 {
            self.skewed.store(true, Ordering::Relaxed);
        }
        let mut list = self.list();
        Arc::make_mut(&mut list).push(Arc::new(resource));
        list.len() - 1
    }

    /// Where an instance, by its own clock, sees the moment that lies at `anchor`.
    fn anchor_of(&self, instance: InstanceId, anchor: Anchor) -> Anchor {
        if !self.skewed.load(Ordering::Relaxed) {
            return anchor;
        }
        let list = self.list();
        anchor.shifted(list.get(usize::from(instance.0)).map_or(0, |r| r.clock_skew_ns))
    }

    fn list(&self) -> MutexGuard<'_, Arc<Vec<Arc<Resource>>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn snapshot(&self) -> Arc<Vec<Arc<Resource>>> {
        Arc::clone(&self.list())
    }
}

/// The open records of a process: an entry for as long as a record is open, so that memory follows what is in flight.
pub(crate) struct OpenRecords(Mutex<Option<Table>>);

#[derive(Default)]
struct Table {
    entries: Vec<Option<Weak<dyn Open>>>,
    free: Vec<Ticket>,
}

impl Default for OpenRecords {
    fn default() -> Self {
        OpenRecords(Mutex::new(Some(Table::default())))
    }
}

impl OpenRecords {
    /// Adds a record, unless the worker has stopped and nobody would ever take it.
    pub(crate) fn add(&self, record: Weak<dyn Open>) -> Ticket {
        let mut table = self.lock();
        let Some(table) = table.as_mut() else { return Ticket::NONE };
        match table.free.pop() {
            Some(ticket) => {
                table.entries[ticket.index()] = Some(record);
                ticket
            }
            None => {
                table.entries.push(Some(record));
                Ticket::of(table.entries.len() - 1)
            }
        }
    }

    /// Takes out a record that was closed.
    pub(crate) fn remove(&self, ticket: Ticket) {
        let mut table = self.lock();
        if let Some(table) = table.as_mut()
            && table.entries.get_mut(ticket.index()).is_some_and(|e| e.take().is_some())
        {
            table.free.push(ticket);
        }
    }

    /// What is open now. Not to be looked at under the lock: whoever lets go of a record last closes it.
    fn snapshot(&self) -> Vec<Weak<dyn Open>> {
        self.lock().iter().flat_map(|t| &t.entries).flatten().cloned().collect()
    }

    /// What is open now; nothing is added from here on.
    fn close(&self) -> Vec<Weak<dyn Open>> {
        let table = self.lock().take();
        table.into_iter().flat_map(|t| t.entries).flatten().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Table>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of the one telemetry worker of a process.
pub(crate) struct Worker {
    counters: Arc<Counters>,
    resources: Arc<Resources>,
    open: Arc<OpenRecords>,
    exporters: Vec<Box<dyn Exporter>>,
    /// Records of candidates; `None` where none are held.
    held: Option<Held>,
    anchor: Anchor,
    pending: Pending,
    pending_since: Option<Time>,
    next_sweep: Time,
    latest: Time,
    max_batch: usize,
    schedule_delay: Dur,
    max_open: Dur,
    sweep_every: Dur,
}

impl Worker {
    pub(crate) fn new(
        config: &TelemetryConfig,
        anchor: Anchor,
        exporters: Vec<Box<dyn Exporter>>,
        counters: Arc<Counters>,
        resources: Arc<Resources>,
        open: Arc<OpenRecords>,
    ) -> Worker {
        // Often enough that a deadline is met within a tenth.
        let tenth = Dur::from_nanos(config.max_open.as_nanos() / 10);
        let sweep_every = if tenth < Dur::from_secs(1) { tenth.max(Dur::from_millis(1)) } else { Dur::from_secs(1) };
        Worker {
            held: config.hold.map(|hold| Held::new(hold, Arc::clone(&counters))),
            counters,
            resources,
            open,
            pending: Pending::new(&exporters, anchor),
            exporters,
            anchor,
            pending_since: None,
            next_sweep: Time::ZERO + sweep_every,
            latest: Time::ZERO,
            max_batch: config.max_batch.max(1),
            schedule_delay: config.schedule_delay,
            max_open: config.max_open,
            sweep_every,
        }
    }

    /// Holds the record of a candidate; gives back what is to be folded now.
    pub(crate) fn hold(&mut self, record: Box<dyn Closed>) -> Option<Box<dyn Closed>> {
        if !record.is_candidate() {
            return Some(record);
        }
        match &mut self.held {
            Some(held) => held.put(record),
            None => {
                self.counters.expired.add(1);
                None
            }
        }
    }

    /// Folds what the service instance holds of these traces, and will hold.
    pub(crate) fn keep(&mut self, now: Time, instance: InstanceId, traces: &[TraceId]) {
        let records = self.held.as_mut().map(|held| held.keep(now, instance, traces));
        for record in records.into_iter().flatten() {
            self.take(&*record);
        }
    }

    /// The latest time that the worker has heard of.
    pub(crate) fn latest(&self) -> Time {
        self.latest
    }

    /// Folds a closed record and sends off what fills a batch.
    pub(crate) fn take(&mut self, record: &dyn Closed) {
        let before = self.pending.len;
        // A component's bug must not end the telemetry of the others.
        let anchor = self.resources.anchor_of(record.head().instance, self.anchor);
        let pending = &mut self.pending;
        let Ok(spans) = catch_unwind(AssertUnwindSafe(|| pending.add(record, anchor))) else {
            self.pending.roll_back();
            self.counters.failed.add(1);
            return;
        };
        let ending = record.ending();
        self.counters.folded.add(1);
        self.counters.abandoned.add(usize::from(ending.abandoned));
        self.counters.cut.add(ending.cut as usize);
        self.counters.spans.add(spans);
        if before == 0 && spans > 0 {
            self.pending_since = Some(ending.closed);
        }
        while self.pending.len >= self.max_batch {
            self.send(self.max_batch);
            self.pending_since = (self.pending.len > 0).then_some(ending.closed);
        }
    }

    /// When [`Worker::advance`] has something to do next.
    pub(crate) fn next_wakeup(&self) -> Time {
        let due = self.pending_since.map_or(Time::MAX, |t| t.saturating_add(self.schedule_delay));
        let expires = self.held.as_ref().map_or(Time::MAX, Held::next_wakeup);
        due.min(self.next_sweep).min(expires)
    }

    /// Does what is due at `now`.
    pub(crate) fn advance(&mut self, now: Time) {
        self.latest = self.latest.max(now);
        if let Some(held) = &mut self.held {
            held.expire(now);
        }
        if now >= self.next_sweep {
            self.sweep(now);
            self.next_sweep = now.saturating_add(self.sweep_every);
        }
        if self.pending_since.is_some_and(|t| now >= t.saturating_add(self.schedule_delay)) {
            self.send_pending();
        }
    }

    /// Sends off everything folded so far; `settled` is dropped once it is exported or dropped.
    pub(crate) fn flush(&mut self, settled: &Settled) {
        self.send_pending();
        for exporter in &mut self.exporters {
            exporter.flush(settled.clone());
        }
    }

    /// Closes and folds every open record as abandoned.
    pub(crate) fn abandon_all(&mut self, now: Time) {
        for record in self.open.snapshot() {
            self.abandon(&record, now);
        }
    }

    /// Abandons what is open, sends off what is left and stops the exporters, all of them within `timeout`.
    pub(crate) fn stop(&mut self, now: Option<Time>, timeout: Dur) {
        let now = now.unwrap_or(self.latest);
        for record in self.open.close() {
            self.abandon(&record, now);
        }
        if let Some(held) = &mut self.held {
            held.clear();
        }
        self.send_pending();
        self.exporters.iter_mut().for_each(|e| e.stop(timeout));
        self.exporters.iter_mut().for_each(|e| e.join());
    }

    fn sweep(&mut self, now: Time) {
        for record in self.open.snapshot() {
            let opened = record.upgrade().and_then(|r| r.opened());
            if opened.is_some_and(|at| now.since(at) >= self.max_open) {
                self.abandon(&record, now);
            }
        }
    }

    fn abandon(&mut self, record: &Weak<dyn Open>, now: Time) {
        if let Some(closed) = record.upgrade().and_then(|r| r.abandon(now)) {
            self.counters.closed.add(1);
            if let Some(closed) = self.hold(closed) {
                self.take(&*closed);
            }
        }
    }

    fn send_pending(&mut self) {
        self.pending_since = None;
        if self.pending.len > 0 {
            self.send(self.pending.len);
        }
    }

    fn send(&mut self, at_most: usize) {
        let batch = Arc::new(self.pending.take(at_most, self.resources.snapshot(), self.anchor));
        for exporter in &mut self.exporters {
            exporter.export(&batch);
        }
    }
}

/// What is folded and not yet sent, in each form that an exporter takes; as spans if there is none, for counting.
struct Pending {
    len: usize,
    spans: Option<Vec<Span>>,
    requests: Option<Requests>,
}

impl Pending {
    fn new(exporters: &[Box<dyn Exporter>], anchor: Anchor) -> Pending {
        let taken = |form: Takes| exporters.iter().any(|e| e.takes() == form);
        let requests = taken(Takes::Requests).then(|| Requests::new(anchor));
        let spans = (requests.is_none() || taken(Takes::Spans)).then(Vec::new);
        Pending { len: 0, spans, requests }
    }

    /// Folds a record, whose time zero its own clock sees at `anchor`, and returns its number of spans. If that panics, [`Pending::roll_back`] takes back what it left.
    fn add(&mut self, record: &dyn Closed, anchor: Anchor) -> usize {
        let mut added = 0;
        if let Some(spans) = &mut self.spans {
            record.fold(spans);
            added = spans.len() - self.len;
        }
        if let Some(requests) = &mut self.requests {
            requests.set_anchor(anchor);
            added = requests.add(record);
        }
        self.len += added;
        added
    }

    fn roll_back(&mut self) {
        if let Some(spans) = &mut self.spans {
            spans.truncate(self.len);
        }
        if let Some(requests) = &mut self.requests {
            requests.roll_back();
        }
    }

    /// Takes the oldest `at_most` spans; more than those of the last record never stay.
    fn take(&mut self, at_most: usize, resources: Arc<Vec<Arc<Resource>>>, anchor: Anchor) -> Batch {
        let len = at_most.min(self.len);
        self.len -= len;
        let spans = self.spans.as_mut().map(|spans| {
            let rest = spans.split_off(len);
            std::mem::replace(spans, rest)
        });
        let request = self.requests.as_mut().map(|requests| requests.take(len, &resources).bytes);
        Batch { len, spans: spans.unwrap_or_default(), request: request.unwrap_or_default(), resources, anchor }
    }
}
