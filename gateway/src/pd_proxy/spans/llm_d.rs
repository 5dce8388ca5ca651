//! The sidecar's facts as the spans of llm-d's routing sidecar, by the names that it has since September 2026.
//!
//! What is known of its traces is kept: `forward_request` is a second server span, `decode` hangs below the `prefill` that has ended,
//! and `true_ttft_ms` is the time until the decode starts. Keys are those of `registry/llm-d.yaml`.

use std::sync::Arc;

use shared::ids::{RequestId, SpanId};
use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fold, Form, Inner, Kind, Val};

use super::{PdFact, call_span_id, close};
use crate::pd_proxy::core::{Leg, Reason, Times};

/// The spans of one request, between facts.
pub struct LlmdFold<D> {
    root: D,
    forward: Option<D>,
    method: &'static str,
    path: Option<Arc<str>>,
    connector: &'static str,
    id: Option<RequestId>,
    target: Option<Arc<str>>,
    /// The prefill or the decode, whichever is under way, and when it began.
    leg: Option<(D, Time)>,
    prefill: Option<SpanId>,
    prefill_ended: Option<Time>,
    decode_began: Option<Time>,
    call: Option<D>,
    answered: Option<u16>,
    drawn: usize,
    latest: Time,
}

impl<D: Draft, S: Form<Draft = D>> Fold<PdFact, S> for LlmdFold<D> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        LlmdFold {
            // Its route is known with its first fact.
            root: cx.outermost("POST", Kind::Server),
            forward: None,
            method: "POST",
            path: None,
            connector: "",
            id: None,
            target: None,
            leg: None,
            prefill: None,
            prefill_ended: None,
            decode_began: None,
            call: None,
            answered: None,
            drawn: 0,
            latest: cx.head.opened,
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &PdFact) {
        self.latest = self.latest.max(at);
        match fact {
            PdFact::Received { method, path, route, connector } => {
                (self.method, self.path, self.connector) = (method, Some(Arc::clone(path)), connector.as_str());
                self.root.rename(server_span(route));
                self.root.set("http.request.method", *method).set("url.path", path).set("http.route", *route);
                let mut forward = self.inner(cx, "forward_request", Kind::Server, self.root.id(), at);
                forward.set("llm_d.pd_proxy.connector", self.connector);
                forward.set("llm_d.pd_proxy.kv_connector", self.connector);
                forward.set("llm_d.pd_proxy.request_path", path);
                forward.set_some("llm_d.openai.api", api(route));
                self.forward = Some(forward);
            }
            PdFact::Planned { id, target, .. } => {
                (self.id, self.target) = (Some(id.clone()), target.clone());
                if let Some(forward) = &mut self.forward {
                    forward.set("llm_d.pd_proxy.disaggregation_used", target.is_some());
                    match target {
                        Some(target) => {
                            forward.set("llm_d.pd_proxy.prefill_target", target);
                            forward.set("llm_d.pd_proxy.prefill_candidates", 1_u32);
                        }
                        None => {
                            forward.set("llm_d.pd_proxy.reason", "no_prefill_header");
                        }
                    }
                }
            }
            PdFact::PrefillStarted => {
                let mut span = self.stage(cx, "prefill", self.above(), at);
                span.set_some("llm_d.pd_proxy.prefill_target", self.target.as_ref());
                self.prefill = Some(span.id());
                self.leg = Some((span, at));
            }
            PdFact::CallStarted { leg, attempt, address, port } => self.call(cx, at, *leg, *attempt, address, *port),
            PdFact::CallHead { status } => {
                self.answered = Some(*status);
                if let Some(call) = &mut self.call {
                    call.set("http.response.status_code", *status);
                    if *status >= 400 {
                        call.error("the response has an error status");
                    }
                }
            }
            PdFact::CallEnded { failure } => {
                if let Some(mut call) = self.call.take() {
                    if let Some((_, description)) = failure.and_then(super::Failure::error) {
                        call.error(description);
                    }
                    close(cx, call, at);
                }
            }
            PdFact::PrefillEnded { status, failure, .. } => {
                self.prefill_ended = Some(at);
                if let Some((mut span, began)) = self.leg.take() {
                    span.set_some("llm_d.pd_proxy.prefill.status_code", *status);
                    span.set("llm_d.pd_proxy.prefill.duration_ms", whole_ms(began, at));
                    if failure.is_some_and(|f| f.error().is_some()) || status.is_some_and(|s| s >= 400) {
                        span.error("prefill request failed");
                    }
                    close(cx, span, at);
                }
                self.answered = None;
            }
            PdFact::DecodeStarted { .. } => {
                self.decode_began = Some(at);
                // Without a prefill elsewhere the request is passed on as it is.
                if let Some(prefill) = self.prefill {
                    let span = self.stage(cx, "decode", prefill, at);
                    self.leg = Some((span, at));
                }
            }
            PdFact::Disconnected => {}
            PdFact::Ended { reason, status, failure, times } => {
                let failed = failure.is_some_and(|f| f.error().is_some()) || self.answered.is_some_and(|s| s >= 400);
                self.ended(cx, at, *reason, failed, times);
                self.root.set_some("http.response.status_code", *status);
                if status.is_some_and(|s| s >= 500) {
                    self.root.error("the response has an error status");
                }
            }
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = self.latest.max(ending.closed);
        let leg = self.leg.take().map(|(span, _)| span);
        for span in [self.call.take(), leg, self.forward.take()].into_iter().flatten() {
            close(cx, span, end);
        }
        if ending.abandoned {
            self.root.error("nobody finished the request");
        }
        close(cx, self.root, end);
    }
}

impl<D: Draft> LlmdFold<D> {
    fn inner<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        kind: Kind,
        parent: SpanId,
        at: Time,
    ) -> D {
        self.drawn += 1;
        let id = cx.head.inner_id(self.drawn - 1);
        cx.inner(Inner { name, kind, parent, id, start: at, end: at })
    }

    fn stage<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, name: &'static str, parent: SpanId, at: Time) -> D {
        let mut span = self.inner(cx, name, Kind::Internal, parent, at);
        span.set("llm_d.pd_proxy.connector", self.connector);
        span.set_some("llm_d.pd_proxy.request_id", self.id.as_ref().map(|id| Val::Text(id.as_str())));
        span
    }

    fn above(&self) -> SpanId {
        self.forward.as_ref().map_or(self.root.id(), D::id)
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
        let parent = self.leg.as_ref().map_or(self.above(), |(span, _)| span.id());
        let (id, kind) = (call_span_id(self.root.id(), leg, attempt), Kind::Client);
        let mut span = cx.inner(Inner { name: "HTTP POST", kind, parent, id, start: at, end: at });
        span.set("http.request.method", self.method).set_some("url.path", self.path.as_ref());
        span.set("server.address", address).set("server.port", port);
        self.call = Some(span);
    }

    fn ended<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, reason: Reason, failed: bool, times: &Times) {
        if let Some((mut decode, began)) = self.leg.take() {
            let opened = cx.head.opened;
            decode.set("llm_d.pd_proxy.decode.duration_ms", whole_ms(began, at));
            decode.set("llm_d.pd_proxy.total_duration_ms", whole_ms(opened, at));
            decode.set_some("llm_d.pd_proxy.true_ttft_ms", self.decode_began.map(|began| whole_ms(opened, began)));
            let prefill = times.prefill.map(|t| t.as_millis_f64().floor());
            decode.set_some("llm_d.pd_proxy.prefill_duration_ms", prefill);
            decode.set("llm_d.pd_proxy.decode_duration_ms", whole_ms(began, at));
            let overhead = self.prefill_ended.map(|ended| whole_ms(ended, began));
            decode.set_some("llm_d.pd_proxy.coordinator_overhead_ms", overhead);
            if failed {
                decode.error("decode request failed");
            }
            close(cx, decode, at);
        }
        if let Some(mut forward) = self.forward.take() {
            if reason == Reason::ForbiddenTarget {
                forward.set("llm_d.pd_proxy.error", "ssrf_protection_denied");
                forward.error("SSRF protection: prefill target not in allowlist");
            }
            close(cx, forward, at);
        }
    }
}

/// Whole milliseconds, cut off, as the sidecar tells them.
fn whole_ms(from: Time, to: Time) -> f64 {
    (to.max(from) - from).as_millis_f64().floor()
}

/// Named after method and route, as otelhttp's handler does.
fn server_span(route: &str) -> &'static str {
    match route {
        "/v1/chat/completions" => "POST /v1/chat/completions",
        "/v1/completions" => "POST /v1/completions",
        _ => "POST",
    }
}

fn api(route: &str) -> Option<&'static str> {
    match route {
        "/v1/chat/completions" => Some("chat_completions"),
        "/v1/completions" => Some("completions"),
        _ => None,
    }
}
