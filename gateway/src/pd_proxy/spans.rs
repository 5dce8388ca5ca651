//! The sidecar's facts, and the one place where they become spans: names, kinds, parents, attributes, status.
//!
//! The names are those of `registry/pd-proxy.yaml`. Prefill and decode are siblings below the request, each above the calls that it
//! made. Nothing here knows how a fact came about, and no fact holds content.

mod llm_d;

use std::sync::Arc;

use shared::ids::{RequestId, SpanId};
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Named, Val};

use crate::pd_proxy::core::{Connector, Failure, Leg, Reason, Times};

pub use llm_d::LlmdFold;

/// Keeps the ids of spans of calls, drawn before anything is sent, apart from those of other inner spans.
const CALL_SPAN_BASE: u64 = 1 << 32;
/// The same for calls to the engine that decodes.
const DECODE_SPAN_BASE: u64 = 1 << 33;

/// The id of the span of a call, attempts counted from 0: what is injected into the request, recorded or not.
pub const fn call_span_id(own: SpanId, leg: Leg, attempt: u32) -> SpanId {
    let base = match leg {
        Leg::Prefill => CALL_SPAN_BASE,
        Leg::Decode => DECODE_SPAN_BASE,
    };
    own.derive(base + attempt as u64)
}

/// What is recorded of a sampled request. The core notes all but the first.
#[derive(Clone, Debug, PartialEq)]
pub enum PdFact {
    /// Driver: the head of a request was read.
    Received {
        /// The HTTP method.
        method: &'static str,
        /// The path, without the query.
        path: Arc<str>,
        /// The route that matched.
        route: &'static str,
        /// The connector.
        connector: Connector,
    },
    /// The body is there.
    Planned {
        /// The request's id.
        id: RequestId,
        /// Size of the body in bytes.
        size_bytes: u32,
        /// The engine that was named to prefill.
        target: Option<Arc<str>>,
    },
    /// The prefill starts.
    PrefillStarted,
    /// A call goes out.
    CallStarted {
        /// For what.
        leg: Leg,
        /// 0 for the first attempt.
        attempt: u32,
        /// The engine's address.
        address: Arc<str>,
        /// The engine's port.
        port: u16,
    },
    /// The head of its answer came.
    CallHead {
        /// The status.
        status: u16,
    },
    /// The call is over.
    CallEnded {
        /// What went wrong.
        failure: Option<Failure>,
    },
    /// The prefill is over, all attempts.
    PrefillEnded {
        /// The status of the last answer.
        status: Option<u16>,
        /// Attempts.
        attempts: u32,
        /// What went wrong.
        failure: Option<Failure>,
    },
    /// The decode starts.
    DecodeStarted {
        /// Whether its span hangs below the prefill's, as a fault has it.
        under_prefill: bool,
    },
    /// The caller went away.
    Disconnected,
    /// The request is over.
    Ended {
        /// Where it was prefilled, and why.
        reason: Reason,
        /// The status that the caller got.
        status: Option<u16>,
        /// What went wrong.
        failure: Option<Failure>,
        /// How long the parts took.
        times: Times,
    },
}

impl Fact for PdFact {
    type Fold<S: Form> = Named<PdFold<S::Draft>, LlmdFold<S::Draft>>;

    fn is_final(&self) -> bool {
        match self {
            PdFact::CallEnded { .. } | PdFact::PrefillEnded { .. } | PdFact::Disconnected | PdFact::Ended { .. } => {
                true
            }
            PdFact::Received { .. }
            | PdFact::Planned { .. }
            | PdFact::PrefillStarted
            | PdFact::CallStarted { .. }
            | PdFact::CallHead { .. }
            | PdFact::DecodeStarted { .. } => false,
        }
    }
}

/// The spans of one request, between facts.
pub struct PdFold<D> {
    root: D,
    method: &'static str,
    path: Option<Arc<str>>,
    /// The prefill or the decode, whichever is under way.
    leg: Option<D>,
    /// The span of the prefill.
    prefill: Option<SpanId>,
    call: Option<D>,
    target: Option<Arc<str>>,
    /// The status of the latest answer.
    answered: Option<u16>,
    /// Inner spans whose ids were derived in order.
    drawn: usize,
    latest: Time,
}

impl<D: Draft, S: Form<Draft = D>> Fold<PdFact, S> for PdFold<D> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        PdFold {
            root: cx.outermost("pd_proxy.request", Kind::Server),
            method: "",
            path: None,
            leg: None,
            prefill: None,
            call: None,
            target: None,
            answered: None,
            drawn: 0,
            latest: cx.head.opened,
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &PdFact) {
        self.latest = self.latest.max(at);
        match fact {
            PdFact::Received { method, path, route, connector } => {
                (self.method, self.path) = (method, Some(Arc::clone(path)));
                self.root.set("http.request.method", *method).set("url.path", path).set("http.route", *route);
                self.root.set("pd_proxy.connector", connector.as_str());
            }
            PdFact::Planned { id, size_bytes, target } => {
                self.root.set("pd_proxy.request.id", Val::Text(id.as_str()));
                self.root.set("pd_proxy.request.size_bytes", *size_bytes);
                self.root.set_some("pd_proxy.prefill.target", target.as_ref());
                self.target = target.clone();
            }
            PdFact::PrefillStarted => {
                let mut span = self.inner(cx, "pd_proxy.prefill", self.root.id(), at);
                self.prefill = Some(span.id());
                span.set_some("pd_proxy.prefill.target", self.target.as_ref());
                self.leg = Some(span);
            }
            PdFact::CallStarted { leg, attempt, address, port } => self.call(cx, at, *leg, *attempt, address, *port),
            PdFact::CallHead { status } => {
                self.answered = Some(*status);
                if let Some(call) = &mut self.call {
                    call.set("http.response.status_code", *status);
                    mark(call, None, (*status >= 400).then_some(*status));
                }
            }
            PdFact::CallEnded { failure } => {
                if let Some(mut call) = self.call.take() {
                    mark(&mut call, failure.and_then(Failure::error), None);
                    close(cx, call, at);
                }
            }
            PdFact::PrefillEnded { status, attempts, failure } => {
                if let Some(mut span) = self.leg.take() {
                    span.set("pd_proxy.prefill.attempts", *attempts);
                    span.set_some("pd_proxy.prefill.status_code", *status);
                    mark(&mut span, failure.and_then(Failure::error), status.filter(|s| *s >= 400));
                    close(cx, span, at);
                }
                self.answered = None;
            }
            PdFact::DecodeStarted { under_prefill } => {
                let above = self.prefill.filter(|_| *under_prefill).unwrap_or(self.root.id());
                self.leg = Some(self.inner(cx, "pd_proxy.decode", above, at));
            }
            PdFact::Disconnected => {
                // The caller's span has ended: what is still done here may outlive it.
                self.root.event("pd_proxy.client_disconnected", at, &[]).set("pd_proxy.late", true);
            }
            PdFact::Ended { reason, status, failure, times } => self.ended(cx, at, *reason, *status, *failure, times),
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = self.latest.max(ending.closed);
        for mut span in [self.call.take(), self.leg.take()].into_iter().flatten() {
            abandon(&mut span, ending.abandoned);
            close(cx, span, end);
        }
        abandon(&mut self.root, ending.abandoned);
        self.root.set_some("pd_proxy.record.facts_cut", (ending.cut > 0).then_some(ending.cut));
        close(cx, self.root, end);
    }
}

impl<D: Draft> PdFold<D> {
    /// A part of the request, which starts at `at`.
    fn inner<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, name: &'static str, parent: SpanId, at: Time) -> D {
        self.drawn += 1;
        let id = cx.head.inner_id(self.drawn - 1);
        cx.inner(Inner { name, kind: Kind::Internal, parent, id, start: at, end: at })
    }

    fn call<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        leg: Leg,
        attempt: u32,
        address: &Arc<str>,
        port: u16,
    ) {
        let parent = self.leg.as_ref().map_or(self.root.id(), D::id);
        let (id, kind) = (call_span_id(self.root.id(), leg, attempt), Kind::Client);
        let mut span = cx.inner(Inner { name: "pd_proxy.backend", kind, parent, id, start: at, end: at });
        span.set("http.request.method", self.method).set_some("url.path", self.path.as_ref());
        span.set("server.address", address).set("server.port", port);
        span.set_some("http.request.resend_count", (attempt > 0).then_some(attempt));
        self.call = Some(span);
    }

    fn ended<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        reason: Reason,
        status: Option<u16>,
        failure: Option<Failure>,
        times: &Times,
    ) {
        if let Some(mut decode) = self.leg.take() {
            decode.set_some("pd_proxy.decode.status_code", self.answered);
            mark(&mut decode, failure.and_then(Failure::error), self.answered.filter(|s| *s >= 400));
            close(cx, decode, at);
        }
        let root = &mut self.root;
        let disaggregated = reason.disaggregates() && times.decode.is_some();
        root.set("pd_proxy.disaggregated", disaggregated).set("pd_proxy.reason", reason.as_str());
        let ms = |time: Option<Dur>| time.map(Dur::as_millis_f64);
        root.set("pd_proxy.total_ms", times.total.as_millis_f64());
        root.set_some("pd_proxy.prefill_ms", ms(times.prefill)).set_some("pd_proxy.decode_ms", ms(times.decode));
        root.set_some("pd_proxy.time_to_first_token_ms", ms(times.first_byte));
        root.set_some("pd_proxy.coordination_ms", ms(times.coordination));
        root.set_some("http.response.status_code", status);
        mark(root, failure.and_then(Failure::error), status.filter(|s| *s >= 500));
    }
}

fn close<S: Form>(cx: &mut Cx<'_, S>, mut span: S::Draft, at: Time) {
    span.set_end(at);
    cx.emit(span);
}

/// Sets the status of a span that failed, by what went wrong or else by the HTTP status; the first mark stays.
fn mark<D: Draft>(span: &mut D, error: Option<(&'static str, &'static str)>, status: Option<u16>) {
    if span.failed() {
        return;
    }
    if let Some((kind, description)) = error {
        span.fail(kind, description);
    } else if let Some(status) = status {
        span.fail(Val::Text(&status.to_string()), "the response has an error status");
    }
}

fn abandon<D: Draft>(span: &mut D, abandoned: bool) {
    if abandoned && !span.failed() {
        span.fail("abandoned", "nobody finished the request");
    }
}

#[cfg(test)]
mod tests;
