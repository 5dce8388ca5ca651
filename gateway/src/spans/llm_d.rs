//! The gateway's facts as the spans of llm-d's endpoint picker, by the names that it has since September 2026.
//!
//! Its topology is another one than the catalogue's: two server spans, one span for a chain of filters, one above the scorers, none
//! for the wait in its queues, for the call of the engine (that is the proxy's beside it) and for retries (the proxy's, too). What is
//! sent on names the `request` span as the parent. Keys are those of `registry/llm-d.yaml`.

use std::sync::Arc;

use shared::ids::{RequestId, SpanId};
use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fold, Form, Inner, Kind, Val};

use super::kv_cache::{KvAsked, KvScored};
use super::{Failure, GatewayFact, lookup_span_id};
use crate::core::request::Rejection;
use crate::core::scheduler::Verdict;

/// Spans of a request under construction. `D` is a span in the form that the recorder asks for.
pub struct LlmdFold<D> {
    root: D,
    latest: Time,
    request: Asked,
    fairness: Option<Arc<str>>,
    namespace: Option<Arc<str>>,
    orchestration: Option<D>,
    /// Whether it is decided where the request goes: what follows is the proxy's matter.
    over: bool,
    lookup: Option<KvAsked>,
    /// When the first profile began, and the one under way.
    profiles_began: Option<Time>,
    profile: Option<Profile<D>>,
    verdict: Option<Verdict>,
    prefill: Option<(Arc<str>, u16)>,
    drawn: usize,
}

/// What most spans say of the request.
#[derive(Default)]
struct Asked {
    id: Option<RequestId>,
    model: Option<Arc<str>>,
    priority: i32,
}

/// A profile under way.
struct Profile<D> {
    span: D,
    /// When the stage began that ends next.
    stage: Time,
    candidates: u32,
    left: u32,
    /// Whether the span of its filters is out.
    filtered: bool,
    scoring: Option<D>,
    scorers: u32,
    top: Vec<(Arc<str>, f64)>,
}

impl<D: Draft, S: Form<Draft = D>> Fold<GatewayFact, S> for LlmdFold<D> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        LlmdFold {
            root: cx.outermost("request", Kind::Server),
            latest: cx.head.opened,
            request: Asked::default(),
            fairness: None,
            namespace: None,
            orchestration: None,
            over: false,
            lookup: None,
            profiles_began: None,
            profile: None,
            verdict: None,
            prefill: None,
            drawn: 0,
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &GatewayFact) {
        self.latest = self.latest.max(at);
        match fact {
            GatewayFact::Parsed { id, model, priority, .. } => {
                self.request = Asked { id: Some(id.clone()), model: Some(Arc::clone(model)), priority: *priority };
            }
            GatewayFact::Labels { fairness_id, .. } => self.fairness.clone_from(fairness_id),
            GatewayFact::Pool { namespace, .. } => self.namespace = Some(Arc::clone(namespace)),
            GatewayFact::Kept(reason) => {
                self.root.set("sampling.reason", reason.name());
            }
            GatewayFact::KvAsked { started, address, port, status, failure } => {
                let (address, port, status, failure) = (Arc::clone(address), *port, *status, *failure);
                self.lookup = Some(KvAsked { started: *started, ended: at, address, port, status, failure });
            }
            GatewayFact::Ended { status, failure } => self.ended(*status, *failure),
            _ if self.over => {}
            GatewayFact::Directing { .. } => self.directing(cx, at),
            GatewayFact::KvScored(scored) => self.produced(cx, at, scored),
            GatewayFact::Scheduling { profile, candidates } => self.scheduling(cx, at, profile, *candidates),
            GatewayFact::Filtered { after, .. } => {
                if let Some(profile) = &mut self.profile {
                    profile.left = *after;
                    profile.stage = at.max(profile.stage);
                }
            }
            GatewayFact::Scored { plugin, weight, max, avg, .. } => {
                self.scored(cx, at, plugin.kind, &plugin.name, [*weight, *max, *avg]);
            }
            GatewayFact::Top { endpoint, score } => {
                if let Some(profile) = &mut self.profile {
                    profile.top.push((Arc::clone(endpoint), *score));
                }
            }
            GatewayFact::Picked { .. } => self.picked(cx, at),
            GatewayFact::Scheduled { .. } => {
                self.end_filters(cx);
                if let Some(profile) = self.profile.take() {
                    profile.close(cx, at);
                }
            }
            GatewayFact::PdDecided { started, verdict } => self.decided(cx, *started, at, *verdict),
            GatewayFact::PrefillAt { address, port } => self.prefill = Some((Arc::clone(address), *port)),
            GatewayFact::Directed { .. } => self.directed(cx, at),
            GatewayFact::Refused(rejection) => self.refused(cx, at, *rejection),
            GatewayFact::Received { .. }
            | GatewayFact::HeadersRead { .. }
            | GatewayFact::BodyRead { .. }
            | GatewayFact::Rewritten { .. }
            | GatewayFact::Langfuse
            | GatewayFact::Identity { .. }
            | GatewayFact::Objectives { .. }
            | GatewayFact::Enqueued { .. }
            | GatewayFact::Dequeued { .. }
            | GatewayFact::Admission { .. }
            | GatewayFact::Known(_)
            | GatewayFact::Removed(_)
            | GatewayFact::Given(_)
            | GatewayFact::Hindsight(_)
            | GatewayFact::Retry { .. }
            | GatewayFact::Hedge { .. }
            | GatewayFact::RetryRefused
            | GatewayFact::LinkedFrom(_)
            | GatewayFact::AttemptStarted { .. }
            | GatewayFact::ResponseHead { .. }
            | GatewayFact::AttemptEnded { .. }
            | GatewayFact::FirstToken
            | GatewayFact::Streamed { .. }
            | GatewayFact::Usage { .. }
            | GatewayFact::FinishReason(_)
            | GatewayFact::ResponseModel(_)
            | GatewayFact::ClientDisconnected => {}
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = self.latest.max(ending.closed);
        if let Some(profile) = self.profile.take() {
            profile.close(cx, end);
        }
        if let Some(orchestration) = self.orchestration.take() {
            super::close(cx, orchestration, end);
        }
        if ending.abandoned {
            self.root.error("nobody finished the request");
        }
        flow(&mut self.root, self.fairness.as_ref());
        super::close(cx, self.root, end);
    }
}

impl<D: Draft> LlmdFold<D> {
    /// A span below `parent`, with what every span of the endpoint picker says.
    fn span<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        kind: Kind,
        parent: SpanId,
        (start, end): (Time, Time),
    ) -> D {
        self.drawn += 1;
        let id = cx.head.inner_id(self.drawn - 1);
        let mut span = cx.inner(Inner { name, kind, parent, id, start, end });
        flow(&mut span, self.fairness.as_ref());
        span
    }

    fn inner<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        parent: SpanId,
        time: (Time, Time),
    ) -> D {
        self.span(cx, name, Kind::Internal, parent, time)
    }

    fn above(&self) -> SpanId {
        self.orchestration.as_ref().map_or(self.root.id(), D::id)
    }

    fn directing<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        let lookup = self.lookup.take();
        let start = lookup.as_ref().map_or(at, |l| l.started.min(at));
        let mut span = self.span(cx, "request_orchestration", Kind::Server, self.root.id(), (start, at));
        span.set_some("target_model", self.request.model.as_ref()).set("request_prio", self.request.priority);
        let parent = span.id();
        self.orchestration = Some(span);
        if let Some(asked) = lookup {
            // A service keeps the index: the producer is what calls it.
            let (name, kind, id) = (PRODUCE, Kind::Internal, lookup_span_id(self.root.id()));
            let mut span = cx.inner(Inner { name, kind, parent, id, start: asked.started, end: asked.ended });
            flow(&mut span, self.fairness.as_ref());
            self.request.describe(&mut span);
            if asked.failure.is_some() || asked.status.is_some_and(|s| s >= 400) {
                span.error("the index could not be asked");
            }
            cx.emit(span);
        }
    }

    /// The index is kept here.
    fn produced<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, scored: &KvScored) {
        let found = &scored.found;
        let mut span = self.inner(cx, PRODUCE, self.above(), (scored.started, at));
        span.set("llm_d.epp.producer.candidate_endpoints", found.endpoints);
        span.set("llm_d.epp.producer.total_blocks", found.keys);
        span.set("llm_d.epp.producer.max_match_blocks", found.found);
        self.request.describe(&mut span);
        let parent = span.id();
        cx.emit(span);
        let ids = [cx.head.inner_id(self.drawn), cx.head.inner_id(self.drawn + 1)];
        self.drawn += 2;
        super::kv_cache::matched(cx, parent, ids, scored, at, |span| flow(span, self.fairness.as_ref()));
    }

    fn scheduling<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, name: &Arc<str>, candidates: u32) {
        self.profiles_began.get_or_insert(at);
        let mut span = self.inner(cx, "run_scheduler_profile", self.above(), (at, at));
        span.set("llm_d.epp.scheduling.profile.name", name);
        let (filtered, scoring, scorers, top) = (false, None, 0, Vec::new());
        self.profile = Some(Profile { span, stage: at, candidates, left: candidates, filtered, scoring, scorers, top });
    }

    /// The span of the chain of filters, once it is known that no further one follows.
    fn end_filters<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>) {
        let Some(profile) = self.profile.as_mut().filter(|p| !p.filtered) else { return };
        profile.filtered = true;
        let (parent, time) = (profile.span.id(), (profile.span.start(), profile.stage));
        let (before, after) = (profile.candidates, profile.left);
        let mut span = self.inner(cx, "filter_endpoints", parent, time);
        span.set("llm_d.epp.filter.candidate_endpoints", before).set("llm_d.epp.filter.filtered_endpoints", after);
        self.request.describe(&mut span);
        cx.emit(span);
    }

    fn scored<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        kind: &'static str,
        name: &Arc<str>,
        [weight, max, avg]: [f64; 3],
    ) {
        self.end_filters(cx);
        let Some(mut profile) = self.profile.take() else { return };
        let (candidates, start) = (profile.left, profile.stage);
        if profile.scoring.is_none() {
            let mut span = self.inner(cx, "scoring", profile.span.id(), (start, start));
            span.set("llm_d.epp.scoring.candidate_endpoints", candidates);
            self.request.describe(&mut span);
            profile.scoring = Some(span);
        }
        let end = at.max(start);
        if let Some(scoring) = &mut profile.scoring {
            scoring.set_end(end);
            let mut span = self.inner(cx, scorer_span(kind), scoring.id(), (start, end));
            span.set("llm_d.epp.scorer.type", kind).set("llm_d.epp.scorer.name", name);
            span.set("llm_d.epp.scorer.weight", weight).set("llm_d.epp.scorer.candidate_endpoints", candidates);
            span.set("llm_d.epp.scorer.score.max", max).set("llm_d.epp.scorer.score.avg", avg);
            span.set("llm_d.epp.scorer.endpoints_scored", candidates);
            cx.emit(span);
        }
        profile.scorers += 1;
        profile.stage = end;
        self.profile = Some(profile);
    }

    fn picked<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        self.end_filters(cx);
        let Some(mut profile) = self.profile.take() else { return };
        profile.end_scoring(cx);
        let (start, end) = (profile.stage, at.max(profile.stage));
        let (top, left) = (std::mem::take(&mut profile.top), profile.left);
        let named = top.iter().map(|(name, _)| match &self.namespace {
            Some(namespace) => format!("{namespace}/{name}").into(),
            None => Arc::clone(name),
        });
        let (names, scores): (Vec<Arc<str>>, Vec<f64>) = named.zip(top.iter().map(|(_, score)| *score)).unzip();
        let mut span = self.inner(cx, "pick_endpoints", profile.span.id(), (start, end));
        span.set("llm_d.epp.picker.candidate_endpoints", left);
        span.set("llm_d.epp.picker.top_endpoints", Val::Names(&names));
        span.set("llm_d.epp.picker.top_scores", Val::F64s(&scores));
        self.request.describe(&mut span);
        cx.emit(span);
        profile.stage = end;
        self.profile = Some(profile);
    }

    /// The profile handler was asked what to run next; it is asked before the first profile, too.
    fn decided<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, started: Time, at: Time, verdict: Verdict) {
        if let (None, Some(began)) = (&self.verdict, self.profiles_began) {
            self.handler(cx, (began, began), "run_decode");
        }
        let next = if verdict.disaggregate { "run_prefill" } else { "complete_decode-only" };
        self.handler(cx, (started.min(at), at), next);
        self.verdict = Some(verdict);
    }

    fn handler<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, time: (Time, Time), decision: &'static str) {
        let mut span = self.inner(cx, "pick_disagg_profile", self.above(), time);
        span.set("llm_d.epp.profile_handler.decision", decision);
        self.request.describe(&mut span);
        cx.emit(span);
    }

    fn directed<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        if let Some(verdict) = self.verdict.take() {
            if verdict.disaggregate {
                self.handler(cx, (at, at), "complete_prefill-decode");
            }
            let prefill = self.prefill.take();
            let mut span = self.inner(cx, "prepare_disaggregation", self.above(), (at, at));
            span.set("llm_d.epp.pd.disaggregation_used", prefill.is_some());
            match &prefill {
                Some((address, port)) => {
                    span.set("llm_d.epp.pd.prefill_pod_address", address);
                    span.set("llm_d.epp.pd.prefill_pod_port", Val::Text(&port.to_string()));
                }
                None => {
                    span.set("llm_d.epp.pd.reason", verdict.reason);
                }
            }
            self.request.describe(&mut span);
            cx.emit(span);
        }
        self.close_orchestration(cx, at);
    }

    fn refused<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, rejection: Rejection) {
        let why = if rejection == Rejection::Cancelled { "the caller went away" } else { "the request was refused" };
        if let Some(orchestration) = &mut self.orchestration {
            orchestration.error(why);
        }
        self.root.error(why);
        self.close_orchestration(cx, at);
    }

    fn close_orchestration<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        self.over = true;
        if let Some(profile) = self.profile.take() {
            profile.close(cx, at);
        }
        if let Some(orchestration) = self.orchestration.take() {
            super::close(cx, orchestration, at);
        }
    }

    /// A response that is none of a model server's with status 200 is an error; a caller that went away is not.
    fn ended(&mut self, status: Option<u16>, failure: Option<Failure>) {
        if status.is_some_and(|s| s != 200) || failure.is_some_and(|f| f.error().is_some()) {
            self.root.error("ModelServerError");
        }
    }
}

impl<D: Draft> Profile<D> {
    fn end_scoring<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>) {
        if let Some(mut scoring) = self.scoring.take() {
            scoring.set("llm_d.epp.scorer.count", self.scorers);
            cx.emit(scoring);
        }
    }

    fn close<S: Form<Draft = D>>(mut self, cx: &mut Cx<'_, S>, at: Time) {
        self.end_scoring(cx);
        super::close(cx, self.span, at);
    }
}

impl Asked {
    fn describe<D: Draft>(&self, span: &mut D) {
        span.set_some("gen_ai.request.model", self.model.as_ref());
        span.set_some("gen_ai.request.id", self.id.as_ref().map(|id| Val::Text(id.as_str())));
    }
}

const PRODUCE: &str = "produce_precise_prefix_cache";

/// Whose share of the pool the request is counted to: on every span of the endpoint picker.
fn flow<D: Draft>(span: &mut D, id: Option<&Arc<str>>) {
    let source = if id.is_some() { "header" } else { "default" };
    span.set("llm_d.epp.fairness.id", id.map_or(Val::Static("default-flow"), Val::Shared));
    span.set("llm_d.epp.fairness.source", source);
}

/// `scorer.` and a scorer's type: names of spans are static.
pub(super) fn scorer_span(kind: &'static str) -> &'static str {
    match kind {
        "queue-scorer" => "scorer.queue-scorer",
        "running-requests-size-scorer" => "scorer.running-requests-size-scorer",
        "kv-cache-utilization-scorer" => "scorer.kv-cache-utilization-scorer",
        "load-aware-scorer" => "scorer.load-aware-scorer",
        "lora-affinity-scorer" => "scorer.lora-affinity-scorer",
        "active-request-scorer" => "scorer.active-request-scorer",
        "token-load-scorer" => "scorer.token-load-scorer",
        "prefix-cache-scorer" => "scorer.prefix-cache-scorer",
        "latency-scorer" => "scorer.latency-scorer",
        "precise-prefix-cache-scorer" => "scorer.precise-prefix-cache-scorer",
        "no-hit-lru-scorer" => "scorer.no-hit-lru-scorer",
        "session-affinity-scorer" => "scorer.session-affinity-scorer",
        "context-length-aware" => "scorer.context-length-aware",
        _ => "scorer",
    }
}
