//! Live pacing: one thread drives all engines of the process in real time.
//!
//! Tokio's timers have a floor of one millisecond, which would distort steps of 5 to 30 ms. This thread sleeps to absolute
//! deadlines with a timer slack of one nanosecond and does not spin. It makes no decisions: it merges inputs and timers in
//! time order ([`merge`]), hands out what the engines produce and keeps count of how late it was.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use hdrhistogram::Histogram;
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::trace::Trail;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use crate::core::engine::{Engine, Input, NewRequest, Output, RequestKey};
use crate::core::facts::EngineFact;

/// A step this late counts against the run.
pub const BEHIND: Dur = Dur::from_millis(20);
/// More late steps than this share mean that the machine could not keep up.
pub const BEHIND_SHARE: f64 = 0.01;

/// Drives all engines of a process. Dropping it stops the thread; open requests then end without a last message.
#[derive(Debug)]
pub struct Pacer {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

/// One engine of a [`Pacer`].
#[derive(Clone, Debug)]
pub struct EngineHandle {
    inner: Arc<Inner>,
    index: usize,
}

/// What a request's channel carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The engine took the request in; tokens follow.
    Taken,
    /// What the engine handed over. `Finished` and `Rejected` are the last.
    Output(Output),
}

/// How well the pacing kept its planned times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lateness {
    /// Planned moments reached.
    pub events: u64,
    /// Median lateness.
    pub p50: Dur,
    /// 99th percentile of lateness.
    pub p99: Dur,
    /// Largest lateness.
    pub max: Dur,
    /// Share of moments more than [`BEHIND`] late.
    pub behind_share: f64,
}

impl Lateness {
    /// Whether latency figures of the run cannot be trusted.
    pub fn fell_behind(&self) -> bool {
        self.behind_share > BEHIND_SHARE
    }
}

#[derive(Debug)]
struct Inner {
    clock: RunClock,
    engines: Vec<Mutex<Cell>>,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    lateness: Mutex<Histogram<u64>>,
    behind: AtomicU64,
}

#[derive(Debug)]
struct Cell {
    engine: Engine,
    /// Where to send what a request produces. Iterated never, so its order shows nowhere.
    open: HashMap<RequestKey, UnboundedSender<Delivery>>,
}

#[derive(Debug, Default)]
struct Inbox {
    items: Vec<Item>,
    stopped: bool,
}

#[derive(Debug)]
struct Item {
    at: Time,
    engine: usize,
    what: Command,
}

#[derive(Debug)]
enum Command {
    Add(Box<NewRequest>, UnboundedSender<Delivery>),
    Abort(RequestKey, Trail<EngineFact>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pacer {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has no thread to give.
    pub fn start(clock: RunClock, engines: Vec<Engine>) -> std::io::Result<Pacer> {
        let cells = engines.into_iter().map(|engine| Mutex::new(Cell { engine, open: HashMap::new() })).collect();
        let inner = Arc::new(Inner {
            clock,
            engines: cells,
            inbox: Mutex::default(),
            wake: Condvar::new(),
            lateness: Mutex::new(Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds are in range")),
            behind: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new().name("pacing".into()).spawn({
            let inner = Arc::clone(&inner);
            move || inner.run()
        })?;
        Ok(Pacer { inner, thread: Some(thread) })
    }

    /// The engine with this index, in the order given to [`Pacer::start`].
    pub fn engine(&self, index: usize) -> EngineHandle {
        assert!(index < self.inner.engines.len(), "no engine {index}");
        EngineHandle { inner: Arc::clone(&self.inner), index }
    }

    /// How late the thread was so far.
    pub fn lateness(&self) -> Lateness {
        let histogram = lock(&self.inner.lateness);
        let events = histogram.len();
        let at = |q| Dur::from_nanos(if events == 0 { 0 } else { histogram.value_at_quantile(q) });
        let behind = self.inner.behind.load(Ordering::Relaxed);
        let max = Dur::from_nanos(histogram.max());
        Lateness { events, p50: at(0.5), p99: at(0.99), max, behind_share: behind as f64 / events.max(1) as f64 }
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        lock(&self.inner.inbox).stopped = true;
        self.inner.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has printed itself; stopping is all that is left to do.
            let _ = thread.join();
        }
    }
}

impl EngineHandle {
    /// Hands a request over, stamped with its time of receipt. Its output arrives on the channel, at most one message per
    /// token, so the request's own limit bounds it.
    pub fn add(&self, at: Time, request: Box<NewRequest>) -> UnboundedReceiver<Delivery> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.send(at, Command::Add(request, sender));
        receiver
    }

    /// Aborts a request: its blocks are freed and its record is closed.
    pub fn abort(&self, at: Time, key: RequestKey, trail: Trail<EngineFact>) {
        self.send(at, Command::Abort(key, trail));
    }

    /// Looks at the engine between two steps.
    pub fn inspect<R>(&self, look: impl FnOnce(&Engine) -> R) -> R {
        look(&lock(&self.inner.engines[self.index]).engine)
    }

    fn send(&self, at: Time, what: Command) {
        let mut inbox = lock(&self.inner.inbox);
        inbox.items.push(Item { at, engine: self.index, what });
        drop(inbox);
        self.inner.wake.notify_one();
    }
}

impl Inner {
    fn run(&self) {
        // Without this the kernel adds 50 us of slack. Where it is refused the run is as late as it is, and says so.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let (mut items, mut out) = (Vec::new(), Vec::new());
        while self.wait(&mut items) {
            items.sort_by_key(|item: &Item| (item.engine, item.at));
            let mut rest = items.drain(..).peekable();
            for (index, cell) in self.engines.iter().enumerate() {
                let mut cell = lock(cell);
                while let Some(item) = rest.next_if(|item| item.engine == index) {
                    self.input(&mut cell, item, &mut out);
                }
                let now = self.clock.now();
                self.due(&mut cell.engine, now, &mut out);
                deliver(&mut cell, &mut out);
            }
        }
    }

    /// Sleeps until there is input or something is due; false once stopped.
    fn wait(&self, items: &mut Vec<Item>) -> bool {
        let next = self.engines.iter().filter_map(|cell| lock(cell).engine.next_wakeup()).min();
        let mut inbox = lock(&self.inbox);
        loop {
            if inbox.stopped {
                return false;
            }
            let left = next.map(|at| at.since(self.clock.now()));
            if !inbox.items.is_empty() || left == Some(Dur::ZERO) {
                std::mem::swap(&mut inbox.items, items);
                return true;
            }
            inbox = match left {
                None => self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner),
                Some(left) => self.wake.wait_timeout(inbox, left.to_std()).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    fn input(&self, cell: &mut Cell, item: Item, out: &mut Vec<Output>) {
        let before = item.at.as_nanos().saturating_sub(1);
        self.due(&mut cell.engine, Time::from_nanos(before), out);
        deliver(cell, out);
        match item.what {
            Command::Add(request, sender) => {
                let key = request.key;
                cell.open.insert(key, sender.clone());
                merge(&mut cell.engine, item.at, Input::Add(request), out);
                self.due(&mut cell.engine, item.at, out);
                deliver(cell, out);
                if cell.open.contains_key(&key) {
                    let _ = sender.send(Delivery::Taken);
                }
            }
            Command::Abort(key, trail) => {
                cell.open.remove(&key);
                merge(&mut cell.engine, item.at, Input::Abort(key), out);
                trail.finish(self.clock.now());
            }
        }
    }

    /// Lets everything happen that is due at `now`, noting how late each moment is.
    fn due(&self, engine: &mut Engine, now: Time, out: &mut Vec<Output>) {
        let mut lateness = None;
        while let Some(planned) = engine.next_wakeup().filter(|at| *at <= now) {
            let late = self.clock.now().since(planned);
            let histogram = lateness.get_or_insert_with(|| lock(&self.lateness));
            histogram.saturating_record(late.as_nanos().max(1));
            if late > BEHIND {
                self.behind.fetch_add(1, Ordering::Relaxed);
            }
            engine.advance(planned, out);
        }
    }
}

/// The merge rule: what was due before the input arrived happens first; an input handed over late is handled at the core's
/// time, which never goes back; an input that arrives exactly when a step starts is in that step.
pub fn merge(engine: &mut Engine, arrived: Time, input: Input, out: &mut Vec<Output>) {
    let at = arrived.max(engine.core_time());
    if let Some(before) = at.as_nanos().checked_sub(1) {
        engine.advance(Time::from_nanos(before), out);
    }
    engine.handle(at, input);
}

fn deliver(cell: &mut Cell, out: &mut Vec<Output>) {
    for output in out.drain(..) {
        let key = output.key();
        let last = match &output {
            Output::Tokens { .. } => false,
            Output::Finished { .. } | Output::Rejected { .. } => true,
        };
        if let Some(sender) = cell.open.get(&key) {
            // A receiver that is gone has sent an abort, or will.
            let _ = sender.send(Delivery::Output(output));
            if last {
                cell.open.remove(&key);
            }
        }
    }
}
