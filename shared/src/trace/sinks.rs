//! Where closed records go: a worker on the calling thread, or a thread with a worker behind a bounded channel.
//!
//! Moves records and orders, and waits; what is done with them is the worker's.

use std::any::{Any, TypeId};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError};

use crate::clock::RunClock;
use crate::ids::{InstanceId, TraceId};
use crate::time::{Dur, Time};
use crate::trace::record::{Closed, Open, Sink, Ticket};
use crate::trace::spares::Spares;
use crate::trace::stats::Counters;
use crate::trace::worker::{OpenRecords, Worker};

/// What the telemetry thread is told. Dropping the sender in an order reports that it is carried out.
pub(crate) enum Order {
    /// To take the records that wait before there are too many.
    Look,
    Flush(Sender<()>),
    Abandon(Time, Sender<()>),
    /// To fold what an instance holds of these traces.
    Keep(InstanceId, Vec<TraceId>),
    Stop {
        now: Time,
        timeout: Dur,
        done: Sender<()>,
    },
}

/// Orders on their way to the telemetry thread, which sleeps between looks. A channel's own wait gives the CPU away several times
/// before it sleeps, and on a busy CPU each time costs two changes of context.
#[derive(Clone)]
pub(crate) struct Orders {
    queue: Sender<Order>,
    thread: Arc<OnceLock<Thread>>,
}

/// The thread's end of [`Orders`].
pub(crate) struct Inbox {
    queue: Receiver<Order>,
    thread: Arc<OnceLock<Thread>>,
}

pub(crate) fn orders() -> (Orders, Inbox) {
    let ((queue, receiver), thread) = (crossbeam_channel::unbounded(), Arc::default());
    (Orders { queue, thread: Arc::clone(&thread) }, Inbox { queue: receiver, thread })
}

impl Orders {
    /// Sends an order; false if nobody is there any more.
    pub(crate) fn send(&self, order: Order) -> bool {
        let sent = self.queue.send(order).is_ok();
        // A thread that is not known yet looks into the queue before it sleeps for the first time.
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
        sent
    }
}

impl Inbox {
    /// The next order, if one comes within about `wait`; to be called by one thread only.
    fn wait(&self, wait: Duration) -> Result<Order, TryRecvError> {
        self.thread.get_or_init(std::thread::current);
        self.queue.try_recv().or_else(|_| {
            std::thread::park_timeout(wait);
            self.queue.try_recv()
        })
    }
}

/// Folds on the calling thread.
pub(crate) struct InlineSink {
    /// Gone after shutdown.
    pub(crate) worker: Mutex<Option<Worker>>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) open: Arc<OpenRecords>,
}

impl InlineSink {
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Option<Worker>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for InlineSink {
    fn accept(&self, record: Box<dyn Closed>) {
        self.counters.closed.add(1);
        match self.lock().as_mut() {
            Some(worker) => {
                let closed = record.ending().closed;
                if let Some(record) = worker.hold(record) {
                    worker.take(&*record);
                }
                worker.advance(closed);
            }
            None => self.counters.dropped.add(1),
        }
    }
    fn judged(&self, record: Box<dyn Closed>, kept: bool) {
        if kept {
            self.counters.traces_kept.add(1);
            return self.accept(record);
        }
        self.counters.closed.add(1);
        self.counters.discarded.add(1);
    }
    fn keep(&self, instance: InstanceId, traces: Vec<TraceId>) {
        if let Some(worker) = self.lock().as_mut() {
            let now = worker.latest();
            worker.keep(now, instance, &traces);
        }
    }
    fn opened(&self, record: Weak<dyn Open>) -> Ticket {
        self.counters.opened.add(1);
        self.open.add(record)
    }
    fn closed(&self, ticket: Ticket) {
        self.open.remove(ticket);
    }
}

/// Hands records to the telemetry thread, or drops and counts them.
pub(crate) struct LiveSink {
    pub(crate) records: Sender<Box<dyn Closed>>,
    pub(crate) waiting: Receiver<Box<dyn Closed>>,
    pub(crate) orders: Orders,
    pub(crate) spares: Spares,
    pub(crate) stopped: AtomicBool,
    pub(crate) counters: Arc<Counters>,
    pub(crate) open: Arc<OpenRecords>,
}

impl Sink for LiveSink {
    fn accept(&self, record: Box<dyn Closed>) {
        self.counters.closed.add(1);
        if self.stopped.load(Ordering::SeqCst) {
            self.counters.dropped.add(1);
            return;
        }
        match self.records.try_send(record) {
            // Reached once by whoever fills the channel up to there, unless the thread takes records meanwhile.
            Ok(()) if self.waiting.len() == self.waiting.capacity().unwrap_or(0) / 2 => {
                self.orders.send(Order::Look);
            }
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.counters.dropped.add(1),
        }
    }
    fn opened(&self, record: Weak<dyn Open>) -> Ticket {
        self.counters.opened.add(1);
        self.open.add(record)
    }
    fn closed(&self, ticket: Ticket) {
        self.open.remove(ticket);
    }
    fn judged(&self, record: Box<dyn Closed>, kept: bool) {
        if kept {
            self.counters.traces_kept.add(1);
            return self.accept(record);
        }
        self.counters.closed.add(1);
        self.counters.discarded.add(1);
        self.spares.keep(record.emptied());
    }
    fn keep(&self, instance: InstanceId, traces: Vec<TraceId>) {
        if !traces.is_empty() {
            self.orders.send(Order::Keep(instance, traces));
        }
    }
    fn spare(&self, kind: TypeId) -> Option<Box<dyn Any + Send>> {
        self.spares.take(kind)
    }
}

/// The telemetry thread: moves records and orders into the worker, waits, repeats. It looks for records by the clock, and is told
/// to only when the channel is half full: to wake a thread takes several times as long as to record a request, so a request should
/// not have to do it.
pub(crate) struct LiveThread {
    pub(crate) worker: Worker,
    pub(crate) waiting: Receiver<Box<dyn Closed>>,
    pub(crate) orders: Inbox,
    pub(crate) clock: RunClock,
    pub(crate) sink: Arc<LiveSink>,
    pub(crate) pause: Pause,
}

/// How long to wait for records: so long that a look finds about as many as are still in the processor's cache, and no longer than
/// adds a tenth to the time that a span may wait for its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pause {
    now: Dur,
    longest: Dur,
}

impl Pause {
    /// Records that a look should find; each has two or three kilobytes.
    const RECORDS: u64 = 32;
    /// At most a thousand looks a second.
    const SHORTEST: Dur = Dur::from_millis(1);

    /// Where spans may wait `delay` for their batch.
    pub(crate) fn new(delay: Dur) -> Pause {
        let longest = Dur::from_nanos(delay.as_nanos() / 10).clamp(Dur::from_millis(10), Dur::from_millis(100));
        Pause { now: longest, longest }
    }

    /// After a look that found so many records: at most half or twice as long as before.
    fn after(self, found: usize) -> Pause {
        let before = self.now.as_nanos();
        let wanted = before * Pause::RECORDS / (found as u64).max(1);
        let now = Dur::from_nanos(wanted.clamp(before / 2, before * 2)).clamp(Pause::SHORTEST, self.longest);
        Pause { now, ..self }
    }
}

impl LiveThread {
    pub(crate) fn run(mut self) {
        loop {
            let due = self.worker.next_wakeup().since(self.clock.now());
            match self.orders.wait(due.min(self.pause.now).to_std()) {
                Ok(Order::Look) | Err(TryRecvError::Empty) => self.pause = self.pause.after(self.drain()),
                Ok(Order::Flush(settled)) => {
                    self.drain();
                    self.worker.flush(&settled);
                }
                Ok(Order::Keep(instance, traces)) => self.worker.keep(self.clock.now(), instance, &traces),
                Ok(Order::Abandon(now, settled)) => {
                    self.drain();
                    self.worker.abandon_all(now);
                    self.worker.flush(&settled);
                }
                Ok(Order::Stop { now, timeout, done }) => return self.stop(now, timeout, &done),
                // The owner is gone without a shutdown; its drop sends `Stop`, so this is not reached.
                Err(TryRecvError::Disconnected) => return,
            }
            self.worker.advance(self.clock.now());
        }
    }

    /// Takes the records that wait and returns their number.
    fn drain(&mut self) -> usize {
        let mut taken = 0;
        // Bounded, so that busy request threads cannot keep an order waiting for ever.
        while taken < self.waiting.capacity().unwrap_or(1)
            && let Ok(record) = self.waiting.try_recv()
        {
            if let Some(record) = self.worker.hold(record) {
                self.worker.take(&*record);
                self.sink.spares.keep(record.emptied());
            }
            taken += 1;
        }
        taken
    }

    fn stop(mut self, now: Time, timeout: Dur, _done: &Sender<()>) {
        self.sink.stopped.store(true, Ordering::SeqCst);
        self.drain();
        self.worker.stop(Some(now), timeout);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_follow_the_rate_of_records() {
        let start = Pause::new(Dur::from_secs(1));
        assert_eq!(start.now, Dur::from_millis(100));
        assert_eq!(start.after(0), start, "never longer than the longest");
        let settle = |per_milli: u64| {
            let look = |p: Pause, _| p.after((p.now.as_nanos() * per_milli / 1_000_000) as usize);
            (0..20).fold(start, look).now
        };
        assert_eq!(settle(0), Dur::from_millis(100));
        assert_eq!(settle(4), Dur::from_millis(8), "32 records");
        assert_eq!(settle(1_000), Dur::from_millis(1));
        assert_eq!(Pause::new(Dur::from_millis(50)).now, Dur::from_millis(10));
    }
}
