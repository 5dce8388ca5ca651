//! Requests that wait in the gateway before they are dispatched: only with flow control.
//!
//! A request that enters may let another one go, whose output comes then; so does a tick. Nothing else dispatches, as in llm-d.

use shared::time::{Stage, Stopwatch, Time};

use super::{Gateway, Open, dispatch};
use crate::core::flow_control::{Entry, Taken};
use crate::core::request::{Output, Rejection, RequestInfo, RequestKey};
use crate::spans::{Dequeued, GatewayFact};

/// Ticks that one call makes up for: a driver that is late does not dispatch a burst.
const MOST_TICKS: u64 = 16;

impl Gateway {
    /// Queues a request, and lets one go if it may.
    pub(super) fn enter(
        &mut self,
        now: Time,
        info: Box<RequestInfo>,
        watch: &mut dyn Stopwatch,
        out: &mut Vec<Output>,
    ) {
        let received = self.director.receive(now, &info);
        let at = watch.lap(Stage::Admit);
        self.expire(at, out);
        let Some(flow) = &mut self.flow else { return };
        let refused = if flow.is_closed() { Err(Rejection::ShuttingDown) } else { received };
        if let Err(rejection) = refused {
            return refuse(at, &info, rejection, out);
        }
        let trail = info.trail.clone();
        let (entry, returned) = flow.enter(at, info);
        trail.note(at, || enqueued(entry));
        match returned {
            Some(info) => refuse(at, &info, Rejection::QueueFull, out),
            None => {
                self.cycle(at, watch, out);
            }
        }
    }

    /// Lets one request go unless the pool is too full; whether one went.
    fn cycle(&mut self, now: Time, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) -> bool {
        let Some(flow) = self.flow.as_mut().filter(|f| f.len() > 0) else { return false };
        let pressure = self.director.pressure(now);
        let Some(taken) = flow.next(now, &pressure) else { return false };
        let info = note_taken(now, taken, Dequeued::Dispatched);
        let key = info.key;
        match self.director.dispatch(now, &info, watch) {
            Err(rejection) => {
                flow.ended(&info);
                out.push(Output::Reject { key, rejection });
            }
            Ok(placed) => {
                self.open.insert(key, Open::new(info, placed, now));
                out.push(dispatch(key, placed, 0, self.hedging.after()));
            }
        }
        self.stir(now);
        true
    }

    /// What is due at `now`: requests that waited too long, and ticks.
    pub(super) fn waited(&mut self, now: Time, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        let Some(flow) = &mut self.flow else { return };
        let ticks = flow.ticks(now).min(MOST_TICKS);
        // What expires now is not dispatched any more.
        self.expire(now, out);
        for _ in 0..ticks {
            if !self.cycle(now, watch, out) {
                break;
            }
        }
        // The pool may be another than the one that the next expiry was planned for.
        self.expire(now, out);
    }

    fn expire(&mut self, now: Time, out: &mut Vec<Output>) {
        let Some(flow) = &mut self.flow else { return };
        while let Some((taken, ready)) = flow.expired(now) {
            let rejection = if ready { Rejection::TtlExpired } else { Rejection::NoEndpointsInTime };
            let info = note_taken(now, taken, Dequeued::Timeout);
            refuse(now, &info, rejection, out);
        }
    }

    /// The caller of a request went away before an answer began.
    pub(super) fn cancelled(&mut self, now: Time, key: RequestKey) {
        if let Some(open) = self.open.remove(&key) {
            std::iter::once(open.placed).chain(open.second).for_each(|place| self.director.leave(place));
            self.ended(now, &open.info);
        } else if let Some(taken) = self.flow.as_mut().and_then(|flow| flow.cancel(now, key)) {
            let info = note_taken(now, taken, Dequeued::Cancelled);
            info.trail.note(now, || GatewayFact::Refused(Rejection::Cancelled));
        }
    }

    /// Nobody waits any more.
    pub(super) fn shut_down(&mut self, now: Time, out: &mut Vec<Output>) {
        while let Some(taken) = self.flow.as_mut().and_then(|flow| flow.close(now)) {
            let info = note_taken(now, taken, Dequeued::ShutDown);
            refuse(now, &info, Rejection::ShuttingDown, out);
        }
    }

    /// A dispatched request is over: there may be room for another one.
    pub(super) fn ended(&mut self, now: Time, info: &RequestInfo) {
        if let Some(flow) = &mut self.flow {
            flow.ended(info);
            flow.stir(now);
        }
    }

    /// Something happened that may let a request go.
    pub(super) fn stir(&mut self, now: Time) {
        if let Some(flow) = &mut self.flow {
            flow.stir(now);
        }
    }
}

fn refuse(at: Time, info: &RequestInfo, rejection: Rejection, out: &mut Vec<Output>) {
    info.trail.note(at, || GatewayFact::Refused(rejection));
    out.push(Output::Reject { key: info.key, rejection });
}

fn enqueued(entry: Entry) -> GatewayFact {
    let Entry { flow, position, size, ttl } = entry;
    GatewayFact::Enqueued { flow, position, size, ttl }
}

fn note_taken(now: Time, taken: Taken, result: Dequeued) -> Box<RequestInfo> {
    let Taken { info, waited, fairness, ordering, hold } = taken;
    info.trail.note(now, || GatewayFact::Dequeued { waited, fairness, ordering, result, hold });
    info
}
