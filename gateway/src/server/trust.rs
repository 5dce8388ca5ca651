//! What is made of the trace context that a caller sends. One who is not trusted begins no trace and decides no sampling here.

use http::HeaderMap;
use shared::time::Time;
use shared::trace::context::{TRACEPARENT, TRACESTATE};
use shared::trace::{LinkTo, Started, Tracer, Trail};

use crate::core::config::TrustInbound;
use crate::spans::GatewayFact;

/// Begins a request whose head was read at `now`.
pub(crate) fn start(
    trust: TrustInbound,
    tracer: &Tracer,
    headers: &HeaderMap,
    now: Time,
) -> (Option<Started>, Trail<GatewayFact>) {
    match trust {
        TrustInbound::Always => tracer.arrive(headers, true, now),
        TrustInbound::Never => tracer.arrive(headers, false, now),
        TrustInbound::Link => {
            let (started, trail) = tracer.arrive(headers, false, now);
            link(trust, tracer, headers, &trail, now);
            (started, trail)
        }
    }
}

/// Notes the caller's span where that is what is made of it. Its headers are read only where the link is seen.
pub(crate) fn link(trust: TrustInbound, tracer: &Tracer, headers: &HeaderMap, trail: &Trail<GatewayFact>, now: Time) {
    if trust == TrustInbound::Link
        && trail.is_recording()
        && let Some(caller) = tracer.extract(headers)
    {
        let to = LinkTo { trace_id: caller.trace_id, span_id: caller.span_id };
        trail.note(now, || GatewayFact::LinkedFrom(Box::new(to)));
    }
}

/// Takes a context out that engines would believe: it only stays where no other one takes its place, with telemetry off.
pub(crate) fn strip(trust: TrustInbound, headers: &mut HeaderMap) {
    match trust {
        TrustInbound::Always => {}
        TrustInbound::Never | TrustInbound::Link => {
            headers.remove(TRACEPARENT);
            headers.remove(TRACESTATE);
        }
    }
}
