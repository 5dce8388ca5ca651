//! How a service hands its place in a trace on to whom it calls: faithfully, or with a fault that is met in the field.
//!
//! What a hop does wrong shows only in what arrives, so that a fault strikes what is sent and nothing else. Which requests it
//! strikes follows from their trace ids: every hop and every run agree.

use http::HeaderMap;

use crate::ids::TraceId;
use crate::rng::mix64;
use crate::trace::context::{self, TRACEPARENT, TRACESTATE, TraceContext};
use crate::trace::eager;
use crate::trace::pipeline::Tracer;

/// What becomes of a context on its way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Handover {
    /// It is sent.
    #[default]
    Faithful,
    /// A fault strikes some of them.
    Faulty {
        /// Which.
        fault: HandoverFault,
        /// Of 2^64 hashes of trace ids, the number that are struck; all with the largest.
        below: u64,
    },
}

/// What a hop does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverFault {
    /// Nothing is sent.
    Dropped,
    /// It is sent as not sampled.
    Unsampled,
    /// The caller's own context is sent after it, and the receiver takes the last one.
    Stale,
    /// Nothing is sent for a request that waited: whoever took it out of the queue did not have its context.
    LostInQueue,
}

/// What travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// The service's own context.
    Own,
    /// The same, as not sampled.
    Unsampled,
    /// Whatever the caller sent.
    Inbound,
    /// Nothing.
    Nothing,
}

impl Handover {
    /// A fault that strikes the share `share` of all traces, 0 to 1.
    pub fn faulty(fault: HandoverFault, share: f64) -> Handover {
        // A conversion from floating point is cut at the largest integer.
        Handover::Faulty { fault, below: (share * u64::MAX as f64) as u64 }
    }

    /// Whether the fault strikes a trace.
    pub fn strikes(self, trace_id: TraceId) -> bool {
        let id = trace_id.get();
        match self {
            Handover::Faithful => false,
            Handover::Faulty { below, .. } => mix64(id as u64 ^ (id >> 64) as u64) <= below,
        }
    }

    /// What travels of `trace_id`, whose request waited in a queue or did not.
    fn sent(self, trace_id: TraceId, waited: bool) -> Sent {
        let Handover::Faulty { fault, .. } = self else { return Sent::Own };
        if !self.strikes(trace_id) {
            return Sent::Own;
        }
        match fault {
            HandoverFault::Dropped => Sent::Nothing,
            HandoverFault::Unsampled => Sent::Unsampled,
            HandoverFault::Stale => Sent::Inbound,
            HandoverFault::LostInQueue if waited => Sent::Nothing,
            HandoverFault::LostInQueue => Sent::Own,
        }
    }

    /// What arrives of `own` at whoever is called; `inbound` is what the caller sent.
    fn arrives(self, own: TraceContext, inbound: Option<&TraceContext>, waited: bool) -> Option<TraceContext> {
        match self.sent(own.trace_id, waited) {
            Sent::Own => Some(own),
            Sent::Unsampled => Some(TraceContext { sampled: false, ..own }),
            Sent::Inbound => inbound.cloned(),
            Sent::Nothing => None,
        }
    }
}

impl Tracer {
    /// The same tracer, whose service hands contexts on like this: for runs that show what a fault does.
    #[must_use]
    pub fn handing_on(mut self, handover: Handover) -> Tracer {
        self.handover = handover;
        self
    }

    /// Writes `context` into `headers`, which have what the caller sent, unless telemetry or the propagator is off.
    pub fn inject(&self, context: &TraceContext, headers: &mut HeaderMap) {
        self.inject_after(context, headers, false);
    }

    /// As [`Tracer::inject`], for a request that waited in a queue before it is sent, or did not.
    pub fn inject_after(&self, context: &TraceContext, headers: &mut HeaderMap, waited: bool) {
        if !self.propagates() {
            return;
        }
        if self.handover != Handover::Faithful {
            return self.inject_badly(context, headers, waited);
        }
        self.write(context, headers);
    }

    fn write(&self, context: &TraceContext, headers: &mut HeaderMap) {
        match self.service {
            Some(_) => eager::inject(context, headers),
            None => context::inject(context, headers),
        }
    }

    #[cold]
    fn inject_badly(&self, context: &TraceContext, headers: &mut HeaderMap, waited: bool) {
        match self.handover.sent(context.trace_id, waited) {
            Sent::Own => self.write(context, headers),
            Sent::Unsampled => self.write(&TraceContext { sampled: false, ..context.clone() }, headers),
            Sent::Inbound => {}
            Sent::Nothing => remove(headers),
        }
    }

    /// What arrives where [`Tracer::inject_after`] writes `own` into headers that have `inbound`: for drivers without headers.
    pub fn arrives(&self, own: TraceContext, inbound: Option<&TraceContext>, waited: bool) -> Option<TraceContext> {
        if self.disabled() { inbound.cloned() } else { self.handover.arrives(own, inbound, waited) }
    }
}

/// Takes a context out of headers.
fn remove(headers: &mut HeaderMap) {
    headers.remove(TRACEPARENT);
    headers.remove(TRACESTATE);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SpanId;

    fn context(trace: u128, span: u64) -> TraceContext {
        let (trace_id, span_id) = (TraceId::new(trace).unwrap(), SpanId::new(span).unwrap());
        TraceContext { trace_id, span_id, sampled: true, random: false, tracestate: None }
    }

    #[test]
    fn a_fault_strikes_what_is_sent() {
        let (own, inbound) = (context(7, 2), context(7, 1));
        let check = |fault, waited, expect: Option<TraceContext>| {
            let handover = Handover::faulty(fault, 1.0);
            assert_eq!(handover.arrives(own.clone(), Some(&inbound), waited), expect, "{fault:?}");
        };
        check(HandoverFault::Dropped, false, None);
        check(HandoverFault::Unsampled, false, Some(TraceContext { sampled: false, ..own.clone() }));
        check(HandoverFault::Stale, false, Some(inbound.clone()));
        check(HandoverFault::LostInQueue, false, Some(own.clone()));
        check(HandoverFault::LostInQueue, true, None);
        assert_eq!(Handover::Faithful.arrives(own.clone(), None, true), Some(own));
    }

    #[test]
    fn a_share_of_traces_is_struck_always_the_same() {
        let handover = Handover::faulty(HandoverFault::Dropped, 0.25);
        let struck = |id: &u128| handover.arrives(context(*id, 1), None, false).is_none();
        let first: Vec<u128> = (1..=2000).filter(struck).collect();
        // 99.9 % of the binomial distribution.
        assert!((436..=564).contains(&first.len()), "{}", first.len());
        assert_eq!(first, (1..=2000).filter(struck).collect::<Vec<_>>());
        let none = Handover::faulty(HandoverFault::Dropped, 0.0);
        assert!((1..=2000).all(|id| none.arrives(context(id, 1), None, false).is_some()));
    }
}
