//! Where closed records go: a worker on the calling thread, or a thread with a worker behind a bounded channel.
//!
//! Moves records and orders, and waits; what is done with them is the worker's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crossbeam_channel::{Receiver, Sender, TrySendError};

use crate::clock::RunClock;
use crate::time::{Dur, Time};
use crate::trace::record::{Closed, Open, Sink};
use crate::trace::stats::Counters;
use crate::trace::worker::{NewlyOpened, Worker};

/// What the telemetry thread is told. Dropping the sender in an order reports that it is carried out.
pub(crate) enum Order {
    Flush(Sender<()>),
    Abandon(Time, Sender<()>),
    Stop { now: Time, timeout: Dur, done: Sender<()> },
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
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.counters.dropped.add(1),
        }
    }
    fn opened(&self, record: Weak<dyn Open>) {
        self.counters.opened.add(1);
        self.newly_opened.push(record);
    }
}

/// How long the telemetry thread lets records gather once they come. To wake a thread takes several times as long as to record a
/// request, so a request should not have to do it.
const GATHER: Dur = Dur::from_millis(5);

/// The telemetry thread: moves records and orders into the worker, waits, repeats. The first record after a pause wakes it; as
/// long as more come it looks for them by itself.
pub(crate) struct LiveThread {
    pub(crate) worker: Worker,
    pub(crate) waiting: Receiver<Box<dyn Closed>>,
    pub(crate) orders: Receiver<Order>,
    pub(crate) clock: RunClock,
    pub(crate) sink: Arc<LiveSink>,
}

impl LiveThread {
    pub(crate) fn run(mut self) {
        let nothing = crossbeam_channel::never();
        // How long to let records gather; `None` waits for the next one.
        let mut pause = None;
        loop {
            let due = self.worker.next_wakeup().since(self.clock.now());
            let (records, wait) = pause.map_or((&self.waiting, due), |pause| (&nothing, due.min(pause)));
            crossbeam_channel::select! {
                recv(records) -> record => if let Ok(record) = record {
                    self.worker.take(&*record);
                    pause = Some(GATHER);
                },
                recv(self.orders) -> order => match order {
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
                    Err(_) => return,
                },
                default(wait.to_std()) => pause = pause.and_then(|_| self.gathered()),
            }
            self.worker.advance(self.clock.now());
        }
    }

    /// Takes what gathered, and says how long to let more gather.
    fn gathered(&mut self) -> Option<Dur> {
        let many = self.waiting.capacity().unwrap_or(1) / 8;
        match self.drain() {
            0 => None,
            // The channel must not fill up during a pause.
            taken if taken > many => Some(Dur::ZERO),
            _ => Some(GATHER),
        }
    }

    /// Takes the records that wait and returns their number.
    fn drain(&mut self) -> usize {
        let mut taken = 0;
        // Bounded, so that busy request threads cannot keep an order waiting for ever.
        while taken < self.waiting.capacity().unwrap_or(1)
            && let Ok(record) = self.waiting.try_recv()
        {
            self.worker.take(&*record);
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
