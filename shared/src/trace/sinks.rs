//! Where closed records go: a worker on the calling thread, or a thread with a worker behind a bounded channel.
//!
//! Moves records and orders, and waits; what is done with them is the worker's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};

use crate::clock::RunClock;
use crate::time::{Dur, Time};
use crate::trace::record::{Closed, Open, Sink};
use crate::trace::stats::Counters;
use crate::trace::worker::{NewlyOpened, Worker};

/// What the telemetry thread is told. Dropping the sender in an order reports that it is carried out.
pub(crate) enum Order {
    /// To take the records that wait before there are too many.
    Look,
    Flush(Sender<()>),
    Abandon(Time, Sender<()>),
    Stop {
        now: Time,
        timeout: Dur,
        done: Sender<()>,
    },
}

/// Folds on the calling thread.
pub(crate) struct InlineSink {
    /// Gone after shutdown.
    pub(crate) worker: Mutex<Option<Worker>>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) newly_opened: Arc<NewlyOpened>,
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
                worker.take(&*record);
                worker.advance(record.ending().closed);
            }
            None => self.counters.dropped.add(1),
        }
    }
    fn opened(&self, record: Weak<dyn Open>) {
        self.counters.opened.add(1);
        self.newly_opened.push(record);
    }
}

/// Hands records to the telemetry thread, or drops and counts them.
pub(crate) struct LiveSink {
    pub(crate) records: Sender<Box<dyn Closed>>,
    pub(crate) waiting: Receiver<Box<dyn Closed>>,
    pub(crate) orders: Sender<Order>,
    pub(crate) stopped: AtomicBool,
    pub(crate) counters: Arc<Counters>,
    pub(crate) newly_opened: Arc<NewlyOpened>,
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
                let _ = self.orders.send(Order::Look);
            }
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.counters.dropped.add(1),
        }
    }
    fn opened(&self, record: Weak<dyn Open>) {
        self.counters.opened.add(1);
        self.newly_opened.push(record);
    }
}

/// The telemetry thread: moves records and orders into the worker, waits, repeats. It looks for records by the clock, and is told
/// to only when the channel is half full: to wake a thread takes several times as long as to record a request, so a request should
/// not have to do it.
pub(crate) struct LiveThread {
    pub(crate) worker: Worker,
    pub(crate) waiting: Receiver<Box<dyn Closed>>,
    pub(crate) orders: Receiver<Order>,
    pub(crate) clock: RunClock,
    pub(crate) sink: Arc<LiveSink>,
    /// The longest time between two looks.
    pub(crate) look_every: Dur,
}

/// How often the telemetry thread looks for records where spans may wait `delay` for their batch: often enough to add a tenth to
/// that, and rarely enough to cost nothing when there are none.
pub(crate) fn look_every(delay: Dur) -> Dur {
    Dur::from_nanos(delay.as_nanos() / 10).clamp(Dur::from_millis(10), Dur::from_millis(100))
}

impl LiveThread {
    pub(crate) fn run(mut self) {
        loop {
            let due = self.worker.next_wakeup().since(self.clock.now());
            match self.orders.recv_timeout(due.min(self.look_every).to_std()) {
                Ok(Order::Look) | Err(RecvTimeoutError::Timeout) => self.drain(),
                Ok(Order::Flush(settled)) => {
                    self.drain();
                    self.worker.flush(&settled);
                }
                Ok(Order::Abandon(now, settled)) => {
                    self.drain();
                    self.worker.abandon_all(now);
                    self.worker.flush(&settled);
                }
                Ok(Order::Stop { now, timeout, done }) => return self.stop(now, timeout, &done),
                // The owner is gone without a shutdown; its drop sends `Stop`, so this is not reached.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.worker.advance(self.clock.now());
        }
    }

    /// Takes the records that wait.
    fn drain(&mut self) {
        // Bounded, so that busy request threads cannot keep an order waiting for ever.
        for _ in 0..self.waiting.capacity().unwrap_or(1) {
            let Ok(record) = self.waiting.try_recv() else { break };
            self.worker.take(&*record);
        }
    }

    fn stop(mut self, now: Time, timeout: Dur, _done: &Sender<()>) {
        self.sink.stopped.store(true, Ordering::SeqCst);
        self.drain();
        self.worker.stop(Some(now), timeout);
    }
}
