//! Sends the plan's requests when they are due, from a thread of its own: a runtime's timers are a millisecond coarse.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::num::NonZeroU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

use shared::clock::RunClock;
use shared::time::{Dur, Time};
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

use super::Finished;
use super::outgoing::{Destination, Writer};
use crate::client::{Client, Observed, Outgoing};
use crate::replay::ReplayError;
use crate::report::Failure;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;
use crate::workload::{Answer, Plan, PlannedRequest};

/// How long a client waits for an answer: longer than the gateway does, whose own timeout answers with 504.
const CLIENT_TIMEOUT: Dur = Dur::from_secs(3600);
/// How long requests may go on after the user asked for the end.
const PATIENCE: Dur = Dur::from_secs(30);
/// How often a sleeping sender looks whether the run is to end.
const LOOK_EVERY: Dur = Dur::from_millis(100);

/// The sender of a run.
pub(super) struct Arrivals {
    ended: Sender<(PlannedRequest, Time, Option<Answer>)>,
    thread: JoinHandle<Result<bool, ReplayError>>,
}

/// A request that is ready to go.
struct Ready {
    plan: PlannedRequest,
    outgoing: Outgoing,
    answer: Answer,
}

struct Loop {
    plan: Plan,
    writer: Writer,
    client: Client,
    clock: RunClock,
    runtime: Handle,
    interrupt: Interrupt,
    /// Told about every end, to know what it sets off.
    ended: Receiver<(PlannedRequest, Time, Option<Answer>)>,
    results: UnboundedSender<Finished>,
    /// What ends set off, by time; the index makes the order one.
    waiting: BinaryHeap<Reverse<(Time, u64)>>,
    set_off: std::collections::BTreeMap<u64, PlannedRequest>,
    open: usize,
    started: Time,
}

impl Arrivals {
    /// Starts sending.
    ///
    /// # Errors
    /// If the system has no thread to give.
    pub(super) fn start(
        scenario: &Scenario,
        plan: Plan,
        to: Destination,
        clock: RunClock,
        interrupt: Interrupt,
        results: UnboundedSender<Finished>,
    ) -> std::io::Result<Arrivals> {
        let (sender, ended) = channel();
        let state = Loop {
            plan,
            writer: Writer::new(scenario, to),
            client: Client::new(clock, CLIENT_TIMEOUT),
            clock,
            runtime: Handle::current(),
            interrupt,
            ended,
            results,
            waiting: BinaryHeap::new(),
            set_off: std::collections::BTreeMap::new(),
            open: 0,
            started: Time::ZERO,
        };
        let thread = std::thread::Builder::new().name("arrivals".into()).spawn(move || state.run())?;
        Ok(Arrivals { ended: sender, thread })
    }

    /// Tells the sender about a request that ended.
    pub(super) fn finished(&self, plan: PlannedRequest, at: Time, answer: Option<Answer>) {
        // A sender that is gone has nothing to set off any more.
        let _ = self.ended.send((plan, at, answer));
    }

    /// Waits for the thread; true if the plan was not done.
    ///
    /// # Panics
    /// If the thread did.
    pub(super) fn finish(self) -> Result<bool, ReplayError> {
        drop(self.ended);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Ends when the user asked for the end some time ago.
async fn patience(interrupt: Interrupt) {
    interrupt.raised().await;
    tokio::time::sleep(PATIENCE.to_std()).await;
}

impl Loop {
    fn run(mut self) -> Result<bool, ReplayError> {
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        self.started = self.clock.now();
        let mut next = self.prepare()?;
        loop {
            if self.interrupt.is_raised() {
                return Ok(true);
            }
            let due = next.as_ref().map(|r| r.plan.intended).into_iter();
            let due = due.chain(self.waiting.peek().map(|Reverse((at, _))| *at)).min();
            if due.is_none() && self.open == 0 {
                return Ok(false);
            }
            if self.sleep(due) {
                continue;
            }
            let own = next.as_ref().is_some_and(|r| Some(r.plan.intended) == due);
            if own {
                let ready = next.take().expect("it is due");
                self.send(ready);
                next = self.prepare()?;
            } else if let Some(Reverse((_, index))) = self.waiting.pop()
                && let Some(plan) = self.set_off.remove(&index)
            {
                let ready = self.ready(plan);
                self.send(ready);
            }
        }
    }

    /// Sleeps until `due` or until a request ends, which is then taken in; true if it is not time yet.
    fn sleep(&mut self, due: Option<Time>) -> bool {
        let left = due.map_or(LOOK_EVERY, |at| at.since(self.clock.now()));
        if left == Dur::ZERO {
            return false;
        }
        match self.ended.recv_timeout(left.to_std().min(LOOK_EVERY.to_std())) {
            Ok((plan, at, answer)) => {
                self.open -= 1;
                // The plan's time starts when the sender does.
                let own = Time::ZERO + at.since(self.started);
                if let Some(mut next) = self.plan.finished(&plan, own, answer) {
                    next.intended += self.started.since(Time::ZERO);
                    self.waiting.push(Reverse((next.intended, next.index)));
                    self.set_off.insert(next.index, next);
                }
                true
            }
            Err(RecvTimeoutError::Timeout) => due.is_none_or(|at| self.clock.now() < at),
            // Whoever took in the ends has given up on the open ones.
            Err(RecvTimeoutError::Disconnected) => {
                self.open = 0;
                self.waiting.clear();
                true
            }
        }
    }

    /// Makes the next request that comes by itself ready before it is due. The plan's time starts when the sender does.
    fn prepare(&mut self) -> Result<Option<Ready>, ReplayError> {
        let Some(mut plan) = self.plan.next_arrival()? else { return Ok(None) };
        plan.intended += self.started.since(Time::ZERO);
        Ok(Some(self.ready(plan)))
    }

    fn ready(&mut self, plan: PlannedRequest) -> Ready {
        let (outgoing, answer) = self.writer.write(&plan);
        Ready { plan, outgoing, answer }
    }

    fn send(&mut self, ready: Ready) {
        let Ready { plan, outgoing, answer } = ready;
        self.open += 1;
        let (client, results) = (self.client.clone(), self.results.clone());
        let (interrupt, clock) = (self.interrupt.clone(), self.clock);
        self.runtime.spawn(async move {
            let sent = clock.now();
            let seen = tokio::select! {
                seen = client.send(outgoing) => seen,
                () = patience(interrupt) => {
                    let failure = Some(Failure::Unfinished);
                    Observed { sent, done: clock.now(), failure, ..Observed::default() }
                }
            };
            // Whoever listened has given up.
            let _ = results.send(Finished { plan, answer, seen });
        });
    }
}
