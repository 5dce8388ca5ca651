//! Live pacing: one thread drives all engines of the process in real time.
//!
//! Tokio's timers have a floor of one millisecond, which would distort steps of 5 to 30 ms. This thread sleeps to absolute
//! deadlines with a timer slack of one nanosecond and does not spin. It makes no decisions: it merges inputs and timers in
//! time order ([`merge`]), hands out what the engines produce and keeps count of how late it was.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use hdrhistogram::Histogram;
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::trace::{OwnTraces, Trail};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{oneshot, watch};

use super::kv_events::Sink;
use crate::core::engine::{Control, Engine, Input, NewRequest, Output, RejectReason, RequestKey, RequestStats};
use crate::core::facts::EngineFact;
use crate::core::faults::{FaultRule, Lost, RequestFault};
use crate::core::sequence::FinishReason;
use crate::server::condition::{Condition, Doom, Doomed};

/// A step this late counts against the run.
pub const BEHIND: Dur = Dur::from_millis(20);
/// More late steps than this share mean that the machine could not keep up.
pub const BEHIND_SHARE: f64 = 0.01;

/// Drives all engines of a process. Dropping it stops the thread; open requests then end without a last message, as they do if
/// the thread panics.
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
    /// Whether its steps take no time, so that whoever brings a request can do all the work at once. To hand it to the thread and
    /// to be woken by it costs as much as the rest of such a request.
    instant: bool,
}

/// What a request's channel carries. `Finished` and `Rejected` are the last; a channel that ends without one says that the
/// engine is dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The engine took the request in; tokens follow.
    Taken,
    /// So many tokens, and more follow.
    Tokens(u32),
    /// The end.
    Finished {
        /// Tokens handed over together with the end.
        tokens: u32,
        /// Why it ended.
        reason: FinishReason,
        /// What happened to the request.
        stats: Box<RequestStats>,
    },
    /// The request was not taken.
    Rejected(RejectReason),
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

/// Counts how late planned moments were.
#[derive(Debug)]
struct Meter {
    late: Histogram<u64>,
    behind: u64,
}

impl Meter {
    fn new() -> Meter {
        Meter { late: Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds are in range"), behind: 0 }
    }

    fn note(&mut self, late: Dur) {
        self.late.saturating_record(late.as_nanos().max(1));
        self.behind += u64::from(late > BEHIND);
    }

    fn read(&self) -> Lateness {
        let events = self.late.len();
        let at = |q| Dur::from_nanos(if events == 0 { 0 } else { self.late.value_at_quantile(q) });
        let behind_share = self.behind as f64 / events.max(1) as f64;
        Lateness { events, p50: at(0.5), p99: at(0.99), max: Dur::from_nanos(self.late.max()), behind_share }
    }
}

#[derive(Debug)]
struct Inner {
    clock: RunClock,
    engines: Vec<Mutex<Cell>>,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    meter: Mutex<Meter>,
}

#[derive(Debug)]
struct Cell {
    engine: Engine,
    /// Who waits for a request. Iterated never, so its order shows nowhere.
    open: HashMap<RequestKey, Listener>,
    /// Who publishes what happens to the cache.
    kv_events: Option<Sink>,
    /// Who is told when a fault ends a request; empty unless faults are wanted.
    dooms: HashMap<RequestKey, Doom>,
    condition: watch::Sender<Condition>,
    /// Who waits for a pause to be complete.
    pausing: Vec<oneshot::Sender<bool>>,
}

#[derive(Debug)]
enum Listener {
    /// A stream takes what the request produces.
    Stream(UnboundedSender<Delivery>),
    /// The caller is gone; the record stays open until the engine has let go of the request.
    Aborted(Trail<EngineFact>),
}

impl Cell {
    fn new(engine: Engine) -> Cell {
        let condition = watch::Sender::new(Condition::default());
        let (open, dooms) = (HashMap::new(), HashMap::new());
        Cell { engine, open, kv_events: None, dooms, condition, pausing: Vec::new() }
    }

    /// Answers those who wait for a pause, if it is complete.
    fn tell_paused(&mut self) {
        if !self.pausing.is_empty() && !self.engine.is_pausing() {
            for answer in self.pausing.drain(..) {
                let _ = answer.send(true);
            }
        }
    }

    fn send(&mut self, key: RequestKey, at: Time, delivery: Delivery) {
        let last = match &delivery {
            Delivery::Taken | Delivery::Tokens(_) => false,
            Delivery::Finished { .. } | Delivery::Rejected(_) => true,
        };
        if let Some(Listener::Stream(sender)) = self.open.get(&key) {
            // A receiver that is gone has sent an abort, or will.
            let _ = sender.send(delivery);
        }
        if last {
            self.dooms.remove(&key);
            if let Some(Listener::Aborted(trail)) = self.open.remove(&key) {
                trail.finish(at);
            }
        }
    }

    /// A fault ended the request. Its channel ends without a last message, unless its connection is to break: then it stays open,
    /// so that nothing more is written.
    fn lose(&mut self, key: RequestKey, at: Time, lost: Lost) {
        let doom = self.dooms.remove(&key);
        match self.open.remove(&key) {
            Some(Listener::Aborted(trail)) => trail.finish(at),
            Some(Listener::Stream(sender)) => {
                if let Some(doom) = doom.filter(|_| lost.breaks_connection()) {
                    doom.come(sender);
                }
            }
            None => {}
        }
    }

    /// Tells the server what the engine is like, if that changed.
    fn publish(&self) {
        self.condition.send_if_modified(|seen| seen.follow(&self.engine));
    }
}

#[derive(Debug, Default)]
struct Inbox {
    items: Vec<Item>,
    /// Whether something may have become due that the thread does not wait for.
    look: bool,
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
    Inject(Box<FaultRule>),
    ClearFaults,
    Control(Control, oneshot::Sender<bool>),
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
        let cells = engines.into_iter().map(|engine| Mutex::new(Cell::new(engine))).collect();
        let inner = Arc::new(Inner {
            clock,
            engines: cells,
            inbox: Mutex::default(),
            wake: Condvar::new(),
            meter: Mutex::new(Meter::new()),
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
        let instant = lock(&self.inner.engines[index]).engine.profile().is_instant();
        EngineHandle { inner: Arc::clone(&self.inner), index, instant }
    }

    /// How late the thread was so far.
    pub fn lateness(&self) -> Lateness {
        lock(&self.inner.meter).read()
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
        let command = Command::Add(request, sender);
        if self.instant {
            self.do_at_once(at, command);
        } else {
            self.send(at, command);
        }
        receiver
    }

    /// What the thread does with a command, on the caller's.
    fn do_at_once(&self, at: Time, what: Command) {
        let (inner, mut out) = (&self.inner, Vec::new());
        let mut cell = lock(&inner.engines[self.index]);
        if !self.alive() {
            return;
        }
        inner.input(&mut cell, Item { at, engine: self.index, what }, &mut out);
        inner.due(&mut cell.engine, inner.clock.now(), &mut out);
        deliver(&mut cell, &mut out);
        cell.publish();
        cell.tell_paused();
        if cell.engine.next_wakeup().is_some() {
            lock(&inner.inbox).look = true;
            inner.wake.notify_one();
        }
    }

    /// Aborts a request: its blocks are freed and its record is closed.
    pub fn abort(&self, at: Time, key: RequestKey, trail: Trail<EngineFact>) {
        self.send(at, Command::Abort(key, trail));
    }

    /// Asks which fault strikes a request that is about to be added, see [`Engine::request_fault`], and who is to be told when one
    /// breaks its connection. Nobody is if no faults are wanted.
    pub fn strike(
        &self,
        at: Time,
        key: RequestKey,
        asked: Option<RequestFault>,
    ) -> (Option<RequestFault>, Option<Doomed>) {
        let mut cell = lock(&self.inner.engines[self.index]);
        let fault = cell.engine.request_fault(at, key, asked);
        let refused = matches!(fault, Some(RequestFault::Status(_)));
        let doomed = (!refused && cell.engine.faults().is_some()).then(|| {
            let (doom, doomed) = Doom::new();
            cell.dooms.insert(key, doom);
            doomed
        });
        (fault, doomed)
    }

    /// Adds a fault whose times count from `at`; nothing happens if the engine was made without faults. The rule is valid.
    pub fn inject(&self, at: Time, rule: FaultRule) {
        self.send(at, Command::Inject(Box::new(rule)));
    }

    /// Takes every fault back.
    pub fn clear_faults(&self, at: Time) {
        self.send(at, Command::ClearFaults);
    }

    /// What the engine is like, as far as a server has to act on it.
    pub fn condition(&self) -> watch::Receiver<Condition> {
        lock(&self.inner.engines[self.index]).condition.subscribe()
    }

    /// Gives an order. The answer says whether it succeeded; that of a pause or sleep comes when it is complete. The channel ends
    /// without one if the engine is dead.
    pub fn control(&self, at: Time, order: Control) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        self.send(at, Command::Control(order, sender));
        receiver
    }

    /// Looks at the engine between two steps.
    pub fn inspect<R>(&self, look: impl FnOnce(&Engine) -> R) -> R {
        look(&lock(&self.inner.engines[self.index]).engine)
    }

    /// Puts a new engine in the place of this one, so that its cache is empty and its counts are zero. False, and nothing
    /// happens, while requests are open.
    pub fn reset(&self) -> bool {
        let mut cell = lock(&self.inner.engines[self.index]);
        let idle = cell.open.is_empty();
        if idle {
            cell.engine = cell.engine.renewed();
        }
        idle
    }

    /// Hands batches of KV events to `sink` from now on, from the thread that makes them.
    pub fn publish_kv_events(&self, sink: Sink) {
        lock(&self.inner.engines[self.index]).kv_events = Some(sink);
    }

    /// Empties the prefix cache; false, and nothing happens, while a request holds blocks.
    pub fn reset_prefix_cache(&self) -> bool {
        lock(&self.inner.engines[self.index]).engine.reset_prefix_cache()
    }

    /// Records steps scheduled from now on as traces of their own, or none.
    pub fn trace_steps(&self, traces: Option<Arc<OwnTraces>>) {
        lock(&self.inner.engines[self.index]).engine.trace_steps(traces);
    }

    /// Whether the engine still runs. One that does not drops every request, and their channels end.
    pub fn alive(&self) -> bool {
        !lock(&self.inner.inbox).stopped
    }

    fn send(&self, at: Time, what: Command) {
        let mut inbox = lock(&self.inner.inbox);
        if !inbox.stopped {
            inbox.items.push(Item { at, engine: self.index, what });
        }
        drop(inbox);
        self.inner.wake.notify_one();
    }
}

/// Ends every open request when the thread stops or panics: nobody would answer them any more.
struct Epilogue<'a>(&'a Inner);

impl Drop for Epilogue<'_> {
    fn drop(&mut self) {
        let mut inbox = lock(&self.0.inbox);
        inbox.stopped = true;
        let unseen = std::mem::take(&mut inbox.items);
        drop(inbox);
        drop(unseen);
        let now = self.0.clock.now();
        for cell in &self.0.engines {
            let mut cell = lock(cell);
            cell.pausing.clear();
            for (_, listener) in cell.open.drain() {
                // Its caller has left; that the core will not hear of it changes nothing about that.
                if let Listener::Aborted(trail) = listener {
                    trail.finish(now);
                }
            }
        }
    }
}

impl Inner {
    fn run(&self) {
        // Without this the kernel adds 50 us of slack. Where it is refused the run is as late as it is, and says so.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let _epilogue = Epilogue(self);
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
                cell.publish();
                cell.tell_paused();
            }
        }
        self.engines.iter().for_each(|cell| lock(cell).engine.settle());
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
            if !inbox.items.is_empty() || std::mem::take(&mut inbox.look) || left == Some(Dur::ZERO) {
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
                cell.open.insert(key, Listener::Stream(sender));
                let taken = merge(&mut cell.engine, item.at, Input::Add(request), out);
                self.due(&mut cell.engine, taken, out);
                deliver(cell, out);
                // A request that was refused or is complete already has been told so.
                cell.send(key, item.at, Delivery::Taken);
            }
            Command::Abort(key, trail) => match cell.open.get_mut(&key) {
                Some(listener) => {
                    *listener = Listener::Aborted(trail);
                    merge(&mut cell.engine, item.at, Input::Abort(key), out);
                }
                // The engine was done with it; the end of its answer was not written.
                None => trail.finish(self.clock.now()),
            },
            Command::Inject(rule) => {
                cell.engine.inject(item.at, &rule);
            }
            Command::ClearFaults => cell.engine.clear_faults(item.at),
            Command::Control(order, answer) => {
                let pauses = matches!(order, Control::Pause { .. } | Control::Sleep { .. });
                let done = cell.engine.control(item.at, order);
                if pauses {
                    cell.pausing.push(answer);
                } else {
                    // Nobody waits for an answer any more: nothing to do.
                    let _ = answer.send(done);
                }
            }
        }
    }

    /// Lets everything happen that is due at `now`, noting how late each moment is.
    fn due(&self, engine: &mut Engine, now: Time, out: &mut Vec<Output>) {
        while let Some(planned) = engine.next_wakeup().filter(|at| *at <= now) {
            lock(&self.meter).note(self.clock.now().since(planned));
            engine.advance(planned, out);
        }
    }
}

/// The merge rule: what was due before the input arrived happens first; an input handed over late is handled at the core's
/// time, which never goes back; an input that arrives exactly when a step starts is in that step. Returns the time at
/// which the input was handled.
pub fn merge(engine: &mut Engine, arrived: Time, input: Input, out: &mut Vec<Output>) -> Time {
    let at = arrived.max(engine.core_time());
    if let Some(before) = at.as_nanos().checked_sub(1) {
        engine.advance(Time::from_nanos(before), out);
    }
    engine.handle(at, input);
    at
}

/// Sends on what one engine handed over. What a request gets several times in a row comes in one message, so the last tokens and
/// the end arrive together, as they do in vLLM's output.
fn deliver(cell: &mut Cell, out: &mut Vec<Output>) {
    if let Some(sink) = &cell.kv_events {
        sink.take_from(&mut cell.engine);
    }
    let (mut tokens, mut rest) = (0, out.drain(..).peekable());
    while let Some(output) = rest.next() {
        let (key, at) = (output.key(), output.at());
        let delivery = match output {
            Output::Tokens { new_tokens, .. } => {
                tokens += new_tokens;
                if rest.peek().is_some_and(|next| next.key() == key) {
                    continue;
                }
                Delivery::Tokens(std::mem::take(&mut tokens))
            }
            Output::Finished { reason, stats, .. } => {
                Delivery::Finished { tokens: std::mem::take(&mut tokens), reason, stats }
            }
            Output::Rejected { reason, .. } => Delivery::Rejected(reason),
            Output::Broken { lost, .. } => {
                if tokens > 0 {
                    cell.send(key, at, Delivery::Tokens(std::mem::take(&mut tokens)));
                }
                cell.lose(key, at, lost);
                continue;
            }
        };
        cell.send(key, at, delivery);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(moments: &[(u64, Dur)]) -> Lateness {
        let mut meter = Meter::new();
        for (times, late) in moments {
            (0..*times).for_each(|_| meter.note(*late));
        }
        meter.read()
    }

    #[test]
    fn more_than_one_late_moment_in_a_hundred_means_that_the_engine_fell_behind() {
        let (on_time, at_limit, late) = (Dur::from_micros(40), BEHIND, Dur::from_nanos(BEHIND.as_nanos() + 1));
        let check = |moments: &[(u64, Dur)], expect: bool| {
            let lateness = read(moments);
            assert_eq!(lateness.fell_behind(), expect, "{lateness:?}");
        };
        check(&[], false);
        check(&[(99, on_time), (1, late)], false);
        check(&[(98, on_time), (2, late)], true);
        check(&[(100, at_limit)], false);
        check(&[(1, late)], true);
        // An hour is beyond what the histogram holds and still counts.
        check(&[(98, on_time), (2, Dur::from_secs(3600))], true);
    }

    #[test]
    fn lateness_is_read_in_quantiles() {
        assert_eq!(read(&[]), Lateness::default());
        let lateness = read(&[(50, Dur::from_micros(20)), (49, Dur::from_micros(100)), (1, Dur::from_millis(30))]);
        // Three digits are kept.
        let near = |found: Dur, expect: Dur| found.as_nanos().abs_diff(expect.as_nanos()) * 1000 <= expect.as_nanos();
        assert!(near(lateness.p50, Dur::from_micros(20)), "{lateness:?}");
        assert!(near(lateness.p99, Dur::from_micros(100)), "{lateness:?}");
        assert!(near(lateness.max, Dur::from_millis(30)), "{lateness:?}");
        assert_eq!((lateness.events, lateness.behind_share), (100, 0.01));
    }
}
