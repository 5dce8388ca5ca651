//! The gateway's facts, and the one place where they become spans: names, kinds, parents, attributes, status.
//!
//! The names are those of `registry/gateway.yaml`. Nothing here knows how a fact came about, and no fact holds content.

mod kv_cache;

use std::sync::Arc;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Named, Naming, Val};

use crate::core::scheduler::explain::Given;

pub use self::collect::ScrapeFact;

mod arrival;
mod decision;
mod facts;
mod flow_control;
mod llm_d;

pub use arrival::Arrived;
use decision::{candidate, endpoint_score};
pub use facts::{Failure, GatewayFact, Hindsight, PluginName};
use flow_control::Out;
pub use flow_control::{Dequeued, Hold};
use kv_cache::KvAsked;
pub use kv_cache::{EventsFact, KvScored, ManagerFact, SCORE_PATH};
pub use llm_d::LlmdFold;

/// Keeps the ids of proxy spans, drawn before anything is sent, apart from those of other inner spans.
const PROXY_SPAN_BASE: u64 = 1 << 32;

/// The id of the proxy span of an attempt, counted from 0: what is injected into the request, recorded or not.
pub const fn proxy_span_id(own: SpanId, attempt: u32) -> SpanId {
    own.derive(PROXY_SPAN_BASE + attempt as u64)
}

/// What is injected into an attempt: llm-d's endpoint picker has no span for the call, the proxy's request goes on below its own.
pub const fn sent_span_id(naming: Naming, own: SpanId, attempt: u32) -> SpanId {
    match naming {
        Naming::Proposal => proxy_span_id(own, attempt),
        Naming::LlmD => own,
    }
}

/// Keeps the id of the span of a lookup at a kv-cache-manager apart from those.
const LOOKUP_SPAN: u64 = 1 << 33;

/// The id of the span of a lookup at a kv-cache-manager: what is injected into the request to it.
pub const fn lookup_span_id(own: SpanId) -> SpanId {
    own.derive(LOOKUP_SPAN)
}

/// Longer names and paths are not repeated in spans, in bytes: a record stays within its bound whatever callers and engines send.
pub const MAX_NAME_BYTES: usize = 256;

/// A model name from outside as it may be repeated: as it is, or its hash if it is longer than [`MAX_NAME_BYTES`] or has control
/// characters, as no real name does.
pub fn bounded_name(raw: &Arc<str>) -> Arc<str> {
    if raw.len() <= MAX_NAME_BYTES && !raw.chars().any(char::is_control) {
        Arc::clone(raw)
    } else {
        format!("h-{:032x}", xxhash_rust::xxh3::xxh3_128(raw.as_bytes())).into()
    }
}

/// A path from outside as it may be repeated: as it is, or its route if it is longer than [`MAX_NAME_BYTES`].
pub fn bounded_path(path: &str, route: &'static str) -> Arc<str> {
    if path.len() <= MAX_NAME_BYTES { path.into() } else { route.into() }
}

impl Fact for GatewayFact {
    type Fold<S: Form> = Named<GatewayFold<S::Draft>, LlmdFold<S::Draft>>;

    fn is_final(&self) -> bool {
        matches!(self, GatewayFact::Kept(_))
    }
}

/// Spans under construction. `D` is a span in the form that the recorder asks for.
pub struct GatewayFold<D> {
    root: D,
    director: Option<D>,
    /// The lookup at a kv-cache-manager, until the director starts.
    lookup: Option<KvAsked>,
    schedule: Option<D>,
    decide: Option<D>,
    proxy: Option<D>,
    /// The attempt before it, as long as it is under way, too.
    beside: Option<D>,
    response: Option<D>,
    /// When the stage of the schedule that ends next began.
    stage: Time,
    /// The latest time of any fact: a driver may stamp its last fact after another thread stamped the end of the record.
    latest: Time,
    top_names: Vec<Arc<str>>,
    top_scores: Vec<f64>,
    /// What the filter took out, or the scorer gave, whose span comes next.
    removed: Box<[Arc<str>]>,
    given: Box<[Given]>,
    /// What the picker chose, until the schedule ends.
    selected: Option<Arc<str>>,
    drawn: usize,
    method: &'static str,
    path: Option<Arc<str>>,
    streaming: bool,
    /// Whether Langfuse is told, and of which operation.
    langfuse: bool,
    operation: Option<&'static str>,
    /// The model asked for, if it is sent to another one.
    asked_model: Option<Arc<str>>,
    /// Priority and size of the request.
    asked: (i32, u32),
    flow_control: bool,
    /// How long it was in the queue.
    waited: Dur,
}

impl<S: Form> Fold<GatewayFact, S> for GatewayFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        GatewayFold {
            root: cx.outermost("gateway.request", Kind::Server),
            director: None,
            lookup: None,
            schedule: None,
            decide: None,
            proxy: None,
            beside: None,
            response: None,
            stage: cx.head.opened,
            latest: cx.head.opened,
            top_names: Vec::new(),
            top_scores: Vec::new(),
            removed: Box::default(),
            given: Box::default(),
            selected: None,
            drawn: 0,
            method: "POST",
            path: None,
            streaming: false,
            langfuse: false,
            operation: None,
            asked_model: None,
            asked: (0, 0),
            flow_control: false,
            waited: Dur::ZERO,
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &GatewayFact) {
        self.latest = self.latest.max(at);
        match fact {
            GatewayFact::Received { method, path, route } => self.received(method, path, *route),
            GatewayFact::HeadersRead { count, metadata } => self.headers_read(cx, at, *count, *metadata),
            GatewayFact::BodyRead { arrived, parsed } => self.body_read(cx, at, *arrived, *parsed),
            GatewayFact::Kept(reason) => {
                self.root.set("sampling.reason", reason.name());
            }
            GatewayFact::Langfuse => self.langfuse = true,
            GatewayFact::Rewritten { asked } => self.asked_model = Some(Arc::clone(asked)),
            GatewayFact::Parsed { id, model, size_bytes, priority, streaming } => {
                self.streaming = *streaming;
                self.asked = (*priority, *size_bytes);
                self.root.set("gateway.request.id", Val::Text(id.as_str())).set("gateway.target_model", model);
                let asked = self.asked_model.take();
                self.root
                    .set("gen_ai.request.model", asked.as_ref().unwrap_or(model))
                    .set("gateway.request.size_bytes", *size_bytes);
                self.root.set("gateway.request.priority", *priority).set("gateway.request.streaming", *streaming);
                // Langfuse takes a span with model and usage for a generation; the engine's span is the generation.
                self.root.set("langfuse.observation.type", "span");
                if self.langfuse {
                    let name = format!("{} {model}", self.operation.unwrap_or("request"));
                    self.root.set("langfuse.trace.name", Val::Text(&name));
                }
            }
            GatewayFact::Labels { objective, fairness_id } => {
                self.root.set_some("gateway.objective", objective.as_ref());
                self.root.set_some("gateway.fairness_id", fairness_id.as_ref());
            }
            GatewayFact::Identity { user, session } => {
                self.root.set_some("user.id", user.as_ref()).set_some("session.id", session.as_ref());
            }
            GatewayFact::Pool { name, namespace } => {
                self.root.set("gateway.pool.name", name).set("gateway.pool.namespace", namespace);
            }
            GatewayFact::Objectives { ttft, tpot } => {
                self.root.set_some("gateway.slo.ttft_ms", ttft.map(Dur::as_millis_f64));
                self.root.set_some("gateway.slo.tpot_ms", tpot.map(Dur::as_millis_f64));
            }
            GatewayFact::Directing { flow_control } => {
                (self.flow_control, self.waited) = (*flow_control, Dur::ZERO);
                self.directing(cx, at);
            }
            GatewayFact::Admission { saturation, candidates } => {
                if let Some(director) = &mut self.director {
                    director.set("gateway.saturation", *saturation).set("gateway.candidate_endpoints", *candidates);
                }
            }
            GatewayFact::KvScored(scored) => self.kv_scored(cx, at, scored),
            GatewayFact::KvAsked { started, address, port, status, failure } => {
                let (address, port, status, failure) = (Arc::clone(address), *port, *status, *failure);
                self.lookup = Some(KvAsked { started: *started, ended: at, address, port, status, failure });
            }
            GatewayFact::Enqueued { flow, position, size, ttl } => {
                self.enqueued(cx, at, flow, *position, *size, *ttl);
            }
            GatewayFact::Dequeued { waited, fairness, ordering, result, hold } => {
                let (waited, fairness, ordering, result) = (*waited, *fairness, *ordering, *result);
                self.dequeued(cx, at, &Out { waited, fairness, ordering, result, hold: hold.as_ref() });
            }
            GatewayFact::Scheduling { profile, candidates } => self.scheduling(cx, at, profile, *candidates),
            GatewayFact::Known(known) => {
                if let Some(schedule) = &mut self.schedule {
                    known.iter().for_each(|k| candidate(schedule, at, k));
                }
            }
            GatewayFact::Removed(names) => self.removed.clone_from(names),
            GatewayFact::Given(given) => self.given.clone_from(given),
            GatewayFact::Hindsight(all) => self.hindsight(at, all),
            GatewayFact::Filtered { plugin, before, after } => self.filtered(cx, at, plugin, *before, *after),
            GatewayFact::Scored { plugin, weight, min, max, avg } => {
                let given = std::mem::take(&mut self.given);
                self.staged(cx, "gateway.scheduler.score", at, |s| {
                    given.iter().for_each(|g| endpoint_score(s, at, g));
                    s.set("gateway.scheduler.scorer.name", &plugin.name);
                    s.set("gateway.scheduler.scorer.type", plugin.kind).set("gateway.scheduler.scorer.weight", *weight);
                    s.set("gateway.scheduler.score.min", *min).set("gateway.scheduler.score.max", *max);
                    s.set("gateway.scheduler.score.avg", *avg);
                });
            }
            GatewayFact::Top { endpoint, score } => {
                self.top_names.push(Arc::clone(endpoint));
                self.top_scores.push(*score);
            }
            GatewayFact::Picked { plugin, endpoint, index, ties } => {
                self.picked(cx, at, plugin, *index, *ties);
                self.selected = Some(Arc::clone(endpoint));
            }
            GatewayFact::Scheduled { choice, metrics_age, candidates } => {
                let selected = self.selected.take();
                if let Some(mut s) = self.schedule.take() {
                    s.set("gateway.scheduler.candidates.after_filter", *candidates);
                    s.set_some("gateway.scheduler.metrics_age_ms", metrics_age.map(Dur::as_millis_f64));
                    s.set_some("gateway.scheduler.selected.score", choice.map(|c| c.score));
                    let runner_up = choice.and_then(|c| c.runner_up.map(|r| (r, c.score - r)));
                    s.set_some("gateway.scheduler.runner_up.score", runner_up.map(|(r, _)| r));
                    s.set_some("gateway.scheduler.margin", runner_up.map(|(_, margin)| margin));
                    s.set_some("gateway.scheduler.selected.endpoint", selected.as_ref());
                    close(cx, s, at);
                }
            }
            GatewayFact::PdDecided { started, verdict } => self.decided(cx, *started, at, verdict),
            GatewayFact::PrefillAt { .. } => {}
            GatewayFact::Directed { endpoint, address, prefill } => {
                self.directed(cx, at, endpoint, address, prefill.as_ref());
            }
            GatewayFact::Refused(rejection) => self.refused(cx, at, *rejection),
            GatewayFact::Retry { attempt, failed } => {
                let endpoint = ("gateway.backend.endpoint.name", failed.into());
                self.root.event("gateway.retry", at, &[("gateway.retry.attempt", (*attempt).into()), endpoint]);
            }
            GatewayFact::Hedge { attempt, slow } => {
                let endpoint = ("gateway.backend.endpoint.name", slow.into());
                self.root.event("gateway.hedge", at, &[("gateway.retry.attempt", (*attempt).into()), endpoint]);
            }
            GatewayFact::RetryRefused => {
                self.root.event("gateway.retry_refused", at, &[]);
            }
            GatewayFact::LinkedFrom(caller) => {
                self.root.link(caller, &[]);
            }
            GatewayFact::AttemptStarted { attempt, endpoint, address, port } => {
                self.attempt(cx, at, *attempt, endpoint, address, *port);
            }
            GatewayFact::ResponseHead { status } => self.response_head(cx, at, *status),
            GatewayFact::AttemptEnded { attempt, failure } => self.attempt_ended(cx, at, *attempt, *failure),
            GatewayFact::FirstToken => {
                let ms = at.since(cx.head.opened).as_millis_f64();
                self.root.set("gateway.response.time_to_first_token_ms", ms);
                self.root.event("gateway.first_token", at, &[]);
            }
            GatewayFact::Streamed { chunks, bytes, complete } => {
                if let Some(r) = &mut self.response {
                    r.set("gateway.response.chunks", *chunks).set("gateway.response.total_bytes", *bytes);
                    r.set("gateway.response.complete", *complete);
                }
            }
            GatewayFact::Usage { input, output } => {
                self.root.set("gen_ai.usage.input_tokens", *input).set("gen_ai.usage.output_tokens", *output);
            }
            GatewayFact::FinishReason(reason) => {
                self.root.set("gen_ai.response.finish_reasons", Val::Statics(&[reason]));
            }
            GatewayFact::ResponseModel(model) => {
                self.root.set("gen_ai.response.model", model);
            }
            GatewayFact::ClientDisconnected => {
                self.root.event("gateway.client_disconnected", at, &[]);
            }
            GatewayFact::Ended { status, failure } => self.ended(cx, at, *status, *failure),
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = self.latest.max(ending.closed);
        let attempts = [self.beside.take(), self.proxy.take()];
        let still_open = [self.director.take(), self.schedule.take()].into_iter().chain(attempts);
        let still_open = still_open.chain([self.response.take()]);
        if let Some(decide) = self.decide.take() {
            cx.emit(decide);
        }
        for mut span in still_open.flatten() {
            abandon(&mut span, ending.abandoned);
            close(cx, span, end);
        }
        abandon(&mut self.root, ending.abandoned);
        self.root.set_some("gateway.record.facts_cut", (ending.cut > 0).then_some(ending.cut));
        close(cx, self.root, end);
    }
}

impl<D: Draft> GatewayFold<D> {
    fn received(&mut self, method: &'static str, path: &Arc<str>, route: Option<&'static str>) {
        (self.method, self.path) = (method, Some(Arc::clone(path)));
        self.operation = route.and_then(operation);
        self.root.set("http.request.method", method).set("url.path", path);
        self.root.set_some("http.route", route).set_some("gen_ai.operation.name", self.operation);
    }

    /// The director's work begins with what is asked for it.
    fn directing<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        let asked = self.lookup.take();
        let start = asked.as_ref().map_or(at, |a| a.started.min(at));
        let director = self.inner(cx, "gateway.director.handle_request", self.root.id(), start);
        self.stage = at;
        if let Some(asked) = asked.filter(|_| cx.head.detail >= 2) {
            asked.emit(cx, director.id());
        }
        self.director = Some(director);
    }

    /// The index is kept here: what a kv-cache-manager would tell is told here.
    fn kv_scored<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, scored: &KvScored) {
        let first = self.drawn;
        self.drawn += 3;
        self.stage = self.stage.max(at);
        if cx.head.detail < 2 {
            return;
        }
        let [id, lookup, compute] = [0, 1, 2].map(|n| cx.head.inner_id(first + n));
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let (kind, start, name) = (Kind::Internal, scored.started, "kvcache.manager.get_scores");
        let mut span = cx.inner(Inner { name, kind, parent, id, start, end: at });
        kv_cache::describe(&mut span, &scored.found);
        cx.emit(span);
        kv_cache::stages(cx, id, [lookup, compute], scored, at);
    }

    fn attempt<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        attempt: u32,
        endpoint: &Arc<str>,
        address: &Arc<str>,
        port: u16,
    ) {
        let parent = self.root.id();
        let (id, kind) = (proxy_span_id(parent, attempt), Kind::Client);
        let mut span = cx.inner(Inner { name: "gateway.backend.proxy", kind, parent, id, start: at, end: at });
        span.set("http.request.method", self.method).set_some("url.path", self.path.as_ref());
        span.set("server.address", address).set("server.port", port);
        span.set("gateway.backend.endpoint.name", endpoint);
        span.set_some("http.request.resend_count", (attempt > 0).then_some(attempt));
        if let Some(before) = self.proxy.replace(span)
            && let Some(older) = self.beside.replace(before)
        {
            cx.emit(older);
        }
    }

    fn response_head<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, status: u16) {
        // Of two attempts the other one has ended before.
        if let Some(proxy) = self.proxy.as_mut().or(self.beside.as_mut()) {
            proxy.set("http.response.status_code", status);
            mark(proxy, None, (status >= 400).then_some(status));
        }
        let mut span = self.inner(cx, "gateway.response.process", self.root.id(), at);
        span.set("gateway.response.status_code", status).set("gateway.response.streaming", self.streaming);
        self.response = Some(span);
    }

    fn attempt_ended<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        attempt: u32,
        failure: Option<Failure>,
    ) {
        let id = proxy_span_id(self.root.id(), attempt);
        let found = self.proxy.take_if(|p| p.id() == id).or_else(|| self.beside.take_if(|p| p.id() == id));
        if let Some(mut proxy) = found {
            proxy.set_some("gateway.backend.cancelled", (failure == Some(Failure::Outrun)).then_some(true));
            let status = failure.and_then(Failure::status);
            proxy.set_some("http.response.status_code", status);
            mark(&mut proxy, failure.and_then(Failure::error), status);
            close(cx, proxy, at);
        }
    }

    fn ended<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        status: Option<u16>,
        failure: Option<Failure>,
    ) {
        self.root.set_some("http.response.status_code", status);
        mark(&mut self.root, failure.and_then(Failure::error), status.filter(|s| *s >= 500));
        if let Some(mut response) = self.response.take() {
            mark(&mut response, failure.and_then(Failure::error), None);
            close(cx, response, at);
        }
    }

    /// An internal span that starts at `at`.
    fn inner<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, name: &'static str, parent: SpanId, at: Time) -> D {
        self.drawn += 1;
        let id = cx.head.inner_id(self.drawn - 1);
        cx.inner(Inner { name, kind: Kind::Internal, parent, id, start: at, end: at })
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

/// `gen_ai.operation.name` of a route.
fn operation(route: &'static str) -> Option<&'static str> {
    match route {
        "/v1/chat/completions" => Some("chat"),
        "/v1/completions" => Some("text_completion"),
        _ => None,
    }
}

mod collect;

#[cfg(test)]
mod tests;
