//! Requests that wait in the core for their turn: who is to be told, and when the core has to be looked at.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;
use shared::time::Time;
use tokio::sync::{Notify, oneshot};

use crate::core::gateway::Gateway;
use crate::core::request::{Output, RequestKey};
use crate::server::pool::Pool;

/// What the core says about a request.
pub(crate) enum Answer {
    /// What is to be done.
    Now(Output),
    /// It waits; this says what is to be done then.
    Later(oneshot::Receiver<Output>),
}

/// No time that comes.
const NEVER: u64 = u64::MAX;

/// Those who wait for the core.
#[derive(Debug)]
pub(crate) struct Queue {
    callers: Mutex<FxHashMap<RequestKey, oneshot::Sender<Output>>>,
    /// When [`drive`] looks at the core next, in nanoseconds; changed only while the core is locked.
    planned: AtomicU64,
    sooner: Notify,
}

impl Queue {
    pub(crate) fn new() -> Queue {
        let planned = AtomicU64::new(NEVER);
        Queue { callers: Mutex::default(), planned, sooner: Notify::new() }
    }

    fn callers(&self) -> MutexGuard<'_, FxHashMap<RequestKey, oneshot::Sender<Output>>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a caller in before the core is asked, so that its output cannot come too early.
    pub(crate) fn enter(&self, key: RequestKey) -> oneshot::Receiver<Output> {
        let (sender, receiver) = oneshot::channel();
        self.callers().insert(key, sender);
        receiver
    }

    /// A caller that waits no more.
    pub(crate) fn leave(&self, key: RequestKey) {
        self.callers().remove(&key);
    }

    /// Hands every output to its caller; the one for `own` is returned.
    pub(crate) fn deliver(&self, outputs: Vec<Output>, own: Option<RequestKey>) -> Option<Output> {
        let mut answer = None;
        for output in outputs {
            let caller = self.callers().remove(&output.key());
            if Some(output.key()) == own {
                answer = Some(output);
            } else if let Some(caller) = caller {
                // A caller that is gone tells the core itself.
                let _ = caller.send(output);
            }
        }
        answer
    }

    /// Sees to it that the core is looked at when it wants to be; called while the core is locked.
    pub(crate) fn plan(&self, core: &Gateway) {
        let next = core.next_wakeup().map_or(NEVER, Time::as_nanos);
        if next < self.planned.load(Ordering::Relaxed) {
            self.planned.store(next, Ordering::Relaxed);
            self.sooner.notify_one();
        }
    }
}

/// Looks at the core whenever it wants to be looked at; does nothing without flow control.
pub(crate) async fn drive(pool: Arc<Pool>) {
    let Some(queue) = &pool.queue else { return };
    loop {
        let next = {
            let core = pool.core();
            let next = core.next_wakeup();
            queue.planned.store(next.map_or(NEVER, Time::as_nanos), Ordering::Relaxed);
            next
        };
        match next {
            Some(at) if at <= pool.clock.now() => pool.advance(),
            Some(at) => {
                tokio::select! {
                    () = tokio::time::sleep_until(pool.clock.instant(at).into()) => {}
                    () = queue.sooner.notified() => {}
                }
            }
            None => queue.sooner.notified().await,
        }
    }
}
