//! The gateway's facts, and the one place where they become spans: names, kinds, parents, attributes, status.
//!
//! The names are those of `registry/gateway.yaml`. Nothing here knows how a fact came about, and no fact holds content.

mod kv_cache;

use std::sync::Arc;

use shared::ids::{RequestId, SpanId};
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, LinkTo, Val};

pub use self::collect::ScrapeFact;

use crate::core::config::{FairnessPolicy, OrderingPolicy};
use crate::core::request::Rejection;
use crate::core::scheduler::explain::{Given, Known};
use crate::core::scheduler::{Choice, Verdict};

mod flow_control;

use flow_control::Out;
pub use flow_control::{Dequeued, Hold};
use kv_cache::KvAsked;
pub use kv_cache::{EventsFact, KvScored, ManagerFact, SCORE_PATH};

/// Keeps the ids of proxy spans, drawn before anything is sent, apart from those of other inner spans.
const PROXY_SPAN_BASE: u64 = 1 << 32;

/// The id of the proxy span of an attempt, counted from 0: what is injected into the request, recorded or not.
pub const fn proxy_span_id(own: SpanId, attempt: u32) -> SpanId {
    own.derive(PROXY_SPAN_BASE + attempt as u64)
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

/// A plugin as spans name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginName {
    /// Its type.
    pub kind: &'static str,
    /// The name it was given, or its type.
    pub name: Arc<str>,
}

impl PluginName {
    /// A plugin of type `kind`, with the name it was given.
    pub fn new(kind: &'static str, name: Option<&str>) -> Arc<PluginName> {
        Arc::new(PluginName { kind, name: name.unwrap_or(kind).into() })
    }
}

/// Why a response was not delivered in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The engine could not be reached.
    Connect,
    /// The engine took too long.
    Timeout,
    /// The engine broke off.
    Reset,
    /// The engine answered with a status that is asked for elsewhere.
    Status(u16),
    /// The caller went away: no error.
    Cancelled,
    /// The gateway stopped before the response was complete.
    Abandoned,
}

impl Failure {
    /// The value of `error.type`, and the description of the status; nothing for what is no error.
    pub const fn error(self) -> Option<(&'static str, &'static str)> {
        match self {
            Failure::Connect => Some(("connection_failed", "the engine could not be reached")),
            Failure::Timeout => Some(("timeout", "the engine took too long")),
            Failure::Reset => Some(("connection_reset", "the engine broke off")),
            // The status says it.
            Failure::Cancelled | Failure::Status(_) => None,
            Failure::Abandoned => Some(("abandoned", "the gateway stopped before the response was complete")),
        }
    }
}

impl Failure {
    /// The status of an engine whose answer is not passed on.
    const fn status(self) -> Option<u16> {
        match self {
            Failure::Status(status) => Some(status),
            Failure::Connect | Failure::Timeout | Failure::Reset | Failure::Cancelled | Failure::Abandoned => None,
        }
    }
}

/// What would have become of a request on one endpoint, found by running a copy of that engine on.
#[derive(Clone, Debug, PartialEq)]
pub struct Hindsight {
    /// The endpoint.
    pub endpoint: Arc<str>,
    /// From the client's sending to its first token; `None` if the endpoint would have refused the request.
    pub ttft: Option<Dur>,
    /// Whether the request was sent there.
    pub chosen: bool,
}

impl Hindsight {
    /// The time to first token on the endpoint that was chosen less the shortest on any; `None` if the chosen one has none.
    pub fn regret(all: &[Hindsight]) -> Option<Dur> {
        let chosen = all.iter().find(|h| h.chosen)?.ttft?;
        let least = all.iter().filter_map(|h| h.ttft).min()?;
        Some(chosen - least)
    }
}

/// What is recorded of a sampled request. The core notes what it decides, the driver what it sends and receives.
#[derive(Clone, Debug)]
pub enum GatewayFact {
    /// Driver: the head of a request was read.
    Received {
        /// The HTTP method.
        method: &'static str,
        /// The path, without the query (see [`bounded_path`]).
        path: Arc<str>,
        /// The route that matched.
        route: Option<&'static str>,
    },
    /// Driver: the request asks for this model and is sent to another one; comes before [`GatewayFact::Parsed`].
    Rewritten {
        /// The model asked for (see [`bounded_name`]).
        asked: Arc<str>,
    },
    /// Core: what the request asks for.
    Parsed {
        /// Its id.
        id: RequestId,
        /// The model it is sent to (see [`bounded_name`]).
        model: Arc<str>,
        /// Size of the body in bytes.
        size_bytes: u32,
        /// Priority, after its objective.
        priority: i32,
        /// Whether the response is streamed.
        streaming: bool,
    },
    /// Core: what the caller says of itself.
    Labels {
        /// Its objective.
        objective: Option<Arc<str>>,
        /// Its flow.
        fairness_id: Option<Arc<str>>,
    },
    /// Driver, before [`GatewayFact::Parsed`]: spans say what Langfuse wants to know.
    Langfuse,
    /// Driver: ids of user and session, only where the operator allows them.
    Identity {
        /// The user.
        user: Option<Arc<str>>,
        /// The session.
        session: Option<Arc<str>>,
    },
    /// Core: the pool.
    Pool {
        /// Its name.
        name: Arc<str>,
        /// Its namespace.
        namespace: Arc<str>,
    },
    /// Driver: how soon the caller wants it.
    Objectives {
        /// Time to first token.
        ttft: Option<Dur>,
        /// Time per output token after the first.
        tpot: Option<Dur>,
    },
    /// Core: the director starts; once more for every retry.
    Directing {
        /// Whether requests may wait in the gateway.
        flow_control: bool,
    },
    /// Core: the request is in the gateway's queue, or found no room there.
    Enqueued {
        /// Its flow.
        flow: Arc<str>,
        /// Requests of its flow that wait already; `None` if there was no room.
        position: Option<u32>,
        /// All requests that wait already.
        size: u32,
        /// How long it may wait; `None` is for ever.
        ttl: Option<Dur>,
    },
    /// Core: the request is out of the queue.
    Dequeued {
        /// How long it waited.
        waited: Dur,
        /// How flows share.
        fairness: FairnessPolicy,
        /// The order inside the flow.
        ordering: OrderingPolicy,
        /// Why it left.
        result: Dequeued,
        /// What held it last, if anything did.
        hold: Option<Hold>,
    },
    /// Core: what admission saw.
    Admission {
        /// Saturation of the pool, 1 is full.
        saturation: f64,
        /// Endpoints in the pool.
        candidates: u32,
    },
    /// Core: the index of KV events was asked.
    KvScored(Box<KvScored>),
    /// Driver: a kv-cache-manager was asked, before the director starts.
    KvAsked {
        /// When.
        started: Time,
        /// Its address.
        address: Arc<str>,
        /// Its port.
        port: u16,
        /// The HTTP status of its answer.
        status: Option<u16>,
        /// Why it did not answer.
        failure: Option<Failure>,
    },
    /// Core: a profile starts.
    Scheduling {
        /// The profile.
        profile: Arc<str>,
        /// Candidates before filtering.
        candidates: u32,
    },
    /// Core, finest detail: what is known of the candidates of the profile that starts.
    Known(Box<[Known]>),
    /// Core, finest detail: which endpoints the filter took out that is done next.
    Removed(Box<[Arc<str>]>),
    /// Core, finest detail: what the scorer that is done next gave every candidate.
    Given(Box<[Given]>),
    /// Driver, virtual time and finest detail: what the time to first token would have been on each endpoint.
    Hindsight(Box<[Hindsight]>),
    /// Core: a filter is done.
    Filtered {
        /// The filter.
        plugin: Arc<PluginName>,
        /// Candidates before it.
        before: u32,
        /// Candidates after it.
        after: u32,
    },
    /// Core: a scorer is done.
    Scored {
        /// The scorer.
        plugin: Arc<PluginName>,
        /// Its weight.
        weight: f64,
        /// The lowest score.
        min: f64,
        /// The highest score.
        max: f64,
        /// The mean score.
        avg: f64,
    },
    /// Core: one of the best endpoints, best first, before the pick.
    Top {
        /// The endpoint.
        endpoint: Arc<str>,
        /// Its weighted score.
        score: f64,
    },
    /// Core: the picker is done.
    Picked {
        /// The picker.
        plugin: Arc<PluginName>,
        /// The chosen endpoint.
        endpoint: Arc<str>,
        /// Place of the chosen candidate.
        index: u32,
        /// Others that were as good.
        ties: u32,
    },
    /// Core: the profile is done.
    Scheduled {
        /// How clear the choice was; `None` if no candidate was left.
        choice: Option<Choice>,
        /// Age of the oldest metrics used.
        metrics_age: Option<Dur>,
        /// Candidates after filtering.
        candidates: u32,
    },
    /// Core: it is decided whether another endpoint prefills.
    PdDecided {
        /// When deciding began.
        started: Time,
        /// What was decided.
        verdict: Verdict,
    },
    /// Core: an endpoint is chosen.
    Directed {
        /// Its name.
        endpoint: Arc<str>,
        /// Its address.
        address: Arc<str>,
        /// The name of the endpoint that is to prefill.
        prefill: Option<Arc<str>>,
    },
    /// Core: the request is refused.
    Refused(Rejection),
    /// Core: another endpoint is tried.
    Retry {
        /// The new attempt, from 1.
        attempt: u32,
        /// The endpoint that failed.
        failed: Arc<str>,
    },
    /// Core: no other endpoint is tried because the retry budget is spent.
    RetryRefused,
    /// Driver: the trace begins here; the caller's own is another one. Boxed, as it is rare and large.
    LinkedFrom(Box<LinkTo>),
    /// Driver: before connecting to an endpoint.
    AttemptStarted {
        /// The attempt, from 0.
        attempt: u32,
        /// The endpoint.
        endpoint: Arc<str>,
        /// Its address.
        address: Arc<str>,
        /// Its port.
        port: u16,
    },
    /// Driver: the head of the engine's response was read.
    ResponseHead {
        /// Its HTTP status.
        status: u16,
    },
    /// Driver: the last byte of an engine's response was read, or the attempt failed.
    AttemptEnded {
        /// The attempt, from 0.
        attempt: u32,
        /// Why it failed.
        failure: Option<Failure>,
    },
    /// Driver: the first token of a streamed response was passed on.
    FirstToken,
    /// Driver: what went through.
    Streamed {
        /// Chunks: server-sent events, or body frames without streaming.
        chunks: u32,
        /// Body bytes.
        bytes: u64,
        /// Whether the response came to its end.
        complete: bool,
    },
    /// Driver: token counts that the engine reported.
    Usage {
        /// Tokens of the prompt.
        input: u32,
        /// Tokens generated.
        output: u32,
    },
    /// Driver: why the engine stopped.
    FinishReason(&'static str),
    /// Driver: the model that answered (see [`bounded_name`]).
    ResponseModel(Arc<str>),
    /// Driver: the caller went away.
    ClientDisconnected,
    /// Driver: the response is over; nothing follows.
    Ended {
        /// The HTTP status sent to the caller; `None` if none was.
        status: Option<u16>,
        /// Why the response was not delivered in full.
        failure: Option<Failure>,
    },
}

impl Fact for GatewayFact {
    type Fold<S: Form> = GatewayFold<S::Draft>;
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
            GatewayFact::Directed { endpoint, address, prefill } => {
                self.directed(cx, at, endpoint, address, prefill.as_ref());
            }
            GatewayFact::Refused(rejection) => self.refused(cx, at, *rejection),
            GatewayFact::Retry { attempt, failed } => {
                let endpoint = ("gateway.backend.endpoint.name", failed.into());
                self.root.event("gateway.retry", at, &[("gateway.retry.attempt", (*attempt).into()), endpoint]);
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
        let still_open = [self.director.take(), self.schedule.take(), self.proxy.take(), self.response.take()];
        if let Some(decide) = self.decide.take() {
            cx.emit(decide);
        }
        for mut span in still_open.into_iter().flatten() {
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

    fn scheduling<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, profile: &Arc<str>, candidates: u32) {
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let mut span = self.inner(cx, "gateway.scheduler.schedule", parent, at);
        span.set("gateway.scheduler.profile", profile).set("gateway.scheduler.policy", "filter-score-pick");
        span.set("gateway.scheduler.candidates.initial", candidates);
        self.schedule = Some(span);
        self.stage = at;
        self.top_names.clear();
        self.top_scores.clear();
    }

    fn filtered<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        plugin: &PluginName,
        before: u32,
        after: u32,
    ) {
        let removed = std::mem::take(&mut self.removed);
        self.staged(cx, "gateway.scheduler.filter", at, |s| {
            for endpoint in &removed {
                s.event("gateway.scheduler.rejected", at, &[(ENDPOINT, endpoint.into())]);
            }
            s.set("gateway.scheduler.filter.name", &plugin.name).set("gateway.scheduler.filter.type", plugin.kind);
            s.set("gateway.scheduler.filter.candidates_in", before);
            s.set("gateway.scheduler.filter.candidates_out", after);
            s.set("gateway.scheduler.filter.rejected_count", before - after);
        });
    }

    fn picked<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, plugin: &PluginName, index: u32, ties: u32) {
        let (names, scores) = (std::mem::take(&mut self.top_names), std::mem::take(&mut self.top_scores));
        self.staged(cx, "gateway.scheduler.pick", at, |s| {
            s.set("gateway.scheduler.picker.type", plugin.kind).set("gateway.scheduler.selected_index", index);
            s.set("gateway.scheduler.picker.ties", ties);
            s.set("gateway.scheduler.picker.top_endpoints", Val::Names(&names));
            s.set("gateway.scheduler.picker.top_scores", Val::F64s(&scores));
        });
    }

    fn hindsight(&mut self, at: Time, all: &[Hindsight]) {
        for Hindsight { endpoint, ttft, chosen } in all {
            let mut attrs = vec![(ENDPOINT, endpoint.into()), ("gateway.hindsight.chosen", (*chosen).into())];
            attrs.extend(ttft.map(|t| ("gateway.hindsight.time_to_first_token_ms", t.as_millis_f64().into())));
            self.root.event("gateway.hindsight", at, &attrs);
        }
        self.root.set_some("gateway.hindsight.regret_ms", Hindsight::regret(all).map(Dur::as_millis_f64));
    }

    /// The span of a decision: it is known later which endpoint prefills.
    fn decided<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, started: Time, at: Time, verdict: &Verdict) {
        self.drawn += 1;
        self.stage = self.stage.max(at);
        if cx.head.detail < 2 {
            return;
        }
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let id = cx.head.inner_id(self.drawn - 1);
        let kind = Kind::Internal;
        let mut s = cx.inner(Inner { name: "gateway.pd.decide", kind, parent, id, start: started.min(at), end: at });
        s.set("gateway.pd.decision", if verdict.disaggregate { "disaggregate" } else { "decode_only" });
        s.set("gateway.pd.reason", verdict.reason);
        s.set_some("gateway.pd.uncached_tokens", verdict.uncached_tokens);
        s.set_some("gateway.pd.threshold_tokens", verdict.threshold_tokens);
        self.decide = Some(s);
    }

    fn directed<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        endpoint: &Arc<str>,
        address: &Arc<str>,
        prefill: Option<&Arc<str>>,
    ) {
        if let Some(mut s) = self.decide.take() {
            s.set_some("gateway.pd.prefill_endpoint.name", prefill);
            cx.emit(s);
        }
        if let Some(mut d) = self.director.take() {
            let result = if self.waited > Dur::ZERO { "queued" } else { "admitted" };
            d.set("gateway.admission.result", result).set("gateway.flow_control.enabled", self.flow_control);
            d.set("gateway.target_endpoint.name", endpoint);
            d.set("gateway.target_endpoint.address", address);
            close(cx, d, at);
        }
    }

    fn refused<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, rejection: Rejection) {
        if let Some(decide) = self.decide.take() {
            cx.emit(decide);
        }
        if let Some(mut d) = self.director.take() {
            d.set("gateway.admission.result", "rejected").set("gateway.admission.reason", rejection.reason());
            d.set("gateway.flow_control.enabled", self.flow_control);
            // It is no error that a caller went away.
            if rejection.status() >= 500 && rejection != Rejection::Cancelled {
                d.fail(rejection.reason(), "no endpoint to send the request to");
            }
            close(cx, d, at);
        }
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
        if let Some(before) = self.proxy.replace(span) {
            cx.emit(before);
        }
    }

    fn response_head<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, status: u16) {
        if let Some(proxy) = &mut self.proxy {
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
        if let Some(mut proxy) = self.proxy.take_if(|p| p.id() == id) {
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

    /// A stage of the schedule, from the end of the stage before it until `at`; of level 2.
    fn staged<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        at: Time,
        fill: impl FnOnce(&mut D),
    ) {
        let start = self.stage;
        self.stage = at.max(start);
        self.drawn += 1;
        if cx.head.detail < 2 {
            return;
        }
        let parent = self.schedule.as_ref().map_or(self.root.id(), D::id);
        let id = cx.head.inner_id(self.drawn - 1);
        let mut span = cx.inner(Inner { name, kind: Kind::Internal, parent, id, start, end: self.stage });
        fill(&mut span);
        cx.emit(span);
    }
}

/// The endpoint that an event is about.
const ENDPOINT: &str = "gateway.backend.endpoint.name";

fn candidate<D: Draft>(schedule: &mut D, at: Time, known: &Known) {
    let mut attrs = vec![
        (ENDPOINT, (&known.endpoint).into()),
        ("gateway.scheduler.candidate.waiting", known.waiting.into()),
        ("gateway.scheduler.candidate.running", known.running.into()),
        ("gateway.scheduler.candidate.kv_usage", known.kv_usage.into()),
        ("gateway.scheduler.candidate.matched_blocks", known.matched_blocks.into()),
        ("gateway.scheduler.candidate.in_flight", known.in_flight.into()),
    ];
    let age = known.metrics_age.map(Dur::as_millis_f64);
    attrs.extend(age.map(|age| ("gateway.scheduler.candidate.metrics_age_ms", age.into())));
    schedule.event("gateway.scheduler.candidate", at, &attrs);
}

fn endpoint_score<D: Draft>(score: &mut D, at: Time, given: &Given) {
    let endpoint = (ENDPOINT, (&given.endpoint).into());
    let (raw, weighted) = (given.raw.into(), given.weighted.into());
    let attrs =
        [endpoint, ("gateway.scheduler.endpoint.score", raw), ("gateway.scheduler.endpoint.weighted", weighted)];
    score.event("gateway.scheduler.endpoint_score", at, &attrs);
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
