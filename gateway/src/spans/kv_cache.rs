//! The facts of the index of KV events, and their spans: under a request's where the gateway keeps the index, outermost in the
//! kv-cache-manager, and of a trace of their own for batches of events.
//!
//! Names, keys and units are those of `registry/kv-cache-manager.yaml`; the keys are llm-d's. Blocks are counted, never named.

use std::sync::Arc;

use shared::ids::SpanId;
use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Named, Naming};

use super::Failure;
use crate::core::kv_index::{Applied, Found};

/// Where a kv-cache-manager answers.
pub const SCORE_PATH: &str = "/v1/score";

/// How an index was asked, and what it found.
#[derive(Clone, Debug)]
pub struct KvScored {
    /// When the lookup began.
    pub started: Time,
    /// When the blocks were found. The endpoints are rated at the fact's own time.
    pub walked: Time,
    /// What was found.
    pub found: Found,
}

/// Sets what a lookup found.
pub(super) fn describe<D: Draft>(span: &mut D, found: &Found) {
    span.set("llm_d.kv_cache.pod_count", found.endpoints).set("llm_d.kv_cache.block_keys.count", found.keys);
    span.set("llm_d.kv_cache.block_hit_ratio", found.hit_ratio()).set("llm_d.kv_cache.blocks_found", found.found);
    span.set("llm_d.kv_cache.score.max", found.max).set("llm_d.kv_cache.score.avg", found.avg);
}

/// The two stages of a lookup below `parent`, with these ids.
pub(super) fn stages<S: Form>(cx: &mut Cx<'_, S>, parent: SpanId, ids: [SpanId; 2], scored: &KvScored, at: Time) {
    let (kind, found) = (Kind::Internal, &scored.found);
    let (start, end) = (scored.started, scored.walked);
    let mut span = cx.inner(Inner { name: "kvcache.storage.lookup", kind, parent, id: ids[0], start, end });
    span.set("llm_d.kv_cache.index.lookup.block_count", found.keys);
    span.set("llm_d.kv_cache.lookup.cache_hit", found.found > 0);
    span.set("llm_d.kv_cache.lookup.blocks_found", found.found);
    cx.emit(span);
    let (start, end) = (scored.walked, at);
    let mut span = cx.inner(Inner { name: "kvcache.scorer.compute", kind, parent, id: ids[1], start, end });
    span.set("llm_d.kv_cache.scorer.algorithm", "longest_prefix");
    span.set("llm_d.kv_cache.scorer.key_count", found.found);
    span.set("llm_d.kv_cache.scorer.pods_scored", found.scored);
    span.set("llm_d.kv_cache.score.max", found.max).set("llm_d.kv_cache.score.avg", found.avg);
    cx.emit(span);
}

/// A lookup at a kv-cache-manager.
pub(super) struct KvAsked {
    pub(super) started: Time,
    pub(super) ended: Time,
    pub(super) address: Arc<str>,
    pub(super) port: u16,
    pub(super) status: Option<u16>,
    pub(super) failure: Option<Failure>,
}

impl KvAsked {
    pub(super) fn emit<S: Form>(self, cx: &mut Cx<'_, S>, parent: SpanId) {
        let (name, kind, id) = ("gateway.kvcache.lookup", Kind::Client, super::lookup_span_id(cx.head.span_id));
        let mut span = cx.inner(Inner { name, kind, parent, id, start: self.started, end: self.ended });
        span.set("http.request.method", "POST").set("url.path", SCORE_PATH);
        span.set("server.address", &self.address).set("server.port", self.port);
        span.set_some("http.response.status_code", self.status);
        super::mark(&mut span, self.failure.and_then(Failure::error), self.status.filter(|s| *s >= 400));
        cx.emit(span);
    }
}

/// What a kv-cache-manager records of a request to it.
#[derive(Clone, Debug)]
pub enum ManagerFact {
    /// What was asked for.
    Asked {
        /// The model (see [`super::bounded_name`]).
        model: Arc<str>,
    },
    /// The index has answered.
    Scored(Box<KvScored>),
    /// The answer has this status.
    Answered(u16),
}

impl Fact for ManagerFact {
    type Fold<S: Form> = Named<ManagerFold<S::Draft>, LlmdManagerFold<S::Draft>>;
}

/// A lookup's spans under construction.
pub struct ManagerFold<D> {
    root: D,
    latest: Time,
}

impl<S: Form> Fold<ManagerFact, S> for ManagerFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        ManagerFold { root: cx.outermost("kvcache.manager.get_scores", Kind::Server), latest: cx.head.opened }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &ManagerFact) {
        self.latest = self.latest.max(at);
        match fact {
            ManagerFact::Asked { model } => {
                self.root.set("gen_ai.request.model", model).set("langfuse.observation.type", "span");
            }
            ManagerFact::Scored(scored) => {
                describe(&mut self.root, &scored.found);
                if cx.head.detail >= 2 {
                    let ids = [cx.head.inner_id(0), cx.head.inner_id(1)];
                    stages(cx, self.root.id(), ids, scored, at);
                }
            }
            ManagerFact::Answered(status) => {
                self.root.set("http.response.status_code", *status);
                if *status >= 500 {
                    self.root.fail("server_error", "the manager could not answer");
                }
            }
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        super::abandon(&mut self.root, ending.abandoned);
        super::close(cx, self.root, self.latest.max(ending.closed));
    }
}

/// A match of block keys as llm-d's index tells of it, below `parent` with these ids.
pub(super) fn matched<S: Form>(
    cx: &mut Cx<'_, S>,
    parent: SpanId,
    [id, walk]: [SpanId; 2],
    scored: &KvScored,
    at: Time,
    mark: impl Fn(&mut S::Draft),
) {
    let (kind, start, found) = (Kind::Internal, scored.started, &scored.found);
    let mut span = cx.inner(Inner { name: "match_block_keys", kind, parent, id, start, end: at });
    span.set("llm_d.kv_cache.prefix_match.key_count", found.keys);
    span.set("llm_d.kv_cache.prefix_match.pod_filter_count", found.endpoints);
    span.set("llm_d.kv_cache.prefix_match.walked", true);
    span.set("llm_d.kv_cache.prefix_match.pods_matched", found.scored);
    span.set("llm_d.kv_cache.prefix_match.longest_chain", found.found);
    mark(&mut span);
    cx.emit(span);
    let mut span = cx.inner(Inner { name: "index_walk", kind, parent: id, id: walk, start, end: scored.walked });
    span.set("llm_d.kv_cache.index.walk.key_count", found.keys);
    span.set("llm_d.kv_cache.index.walk.keys_present", found.found);
    mark(&mut span);
    cx.emit(span);
}

/// The same with llm-d's names: its indexer as a service of its own.
pub struct LlmdManagerFold<D> {
    root: D,
    latest: Time,
}

impl<S: Form> Fold<ManagerFact, S> for LlmdManagerFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        LlmdManagerFold { root: cx.outermost("score_tokens", Kind::Internal), latest: cx.head.opened }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &ManagerFact) {
        self.latest = self.latest.max(at);
        match fact {
            ManagerFact::Asked { model } => {
                self.root.set("gen_ai.request.model", model);
            }
            ManagerFact::Scored(scored) => {
                let found = &scored.found;
                self.root.set("llm_d.kv_cache.pod_count", found.endpoints);
                self.root.set("llm_d.kv_cache.block_keys.count", found.keys);
                self.root.set("llm_d.kv_cache.block_hit_ratio", found.hit_ratio());
                self.root.set("llm_d.kv_cache.blocks_found", found.found);
                let ids = [cx.head.inner_id(0), cx.head.inner_id(1)];
                matched(cx, self.root.id(), ids, scored, at, |_| {});
            }
            ManagerFact::Answered(status) => {
                if *status >= 400 {
                    self.root.error("the index could not answer");
                }
            }
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        if ending.abandoned {
            self.root.error("nobody finished the request");
        }
        super::close(cx, self.root, self.latest.max(ending.closed));
    }
}

/// What is recorded of a batch of KV events.
#[derive(Clone, Debug)]
pub enum EventsFact {
    /// A batch was handled.
    Handled {
        /// The topic it was published under (see [`super::bounded_name`]).
        topic: Arc<str>,
        /// The endpoint it is of.
        endpoint: Arc<str>,
        /// Its number.
        sequence: u64,
        /// Events in it.
        events: u32,
        /// Blocks named in it.
        blocks: u32,
        /// What became of it.
        applied: Applied,
    },
}

impl Fact for EventsFact {
    type Fold<S: Form> = EventsFold<S::Draft>;

    fn stands_in(naming: Naming) -> bool {
        naming == Naming::Proposal
    }
}

/// The span of a batch under construction.
pub struct EventsFold<D> {
    root: D,
    latest: Time,
}

impl<S: Form> Fold<EventsFact, S> for EventsFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        EventsFold { root: cx.outermost("kvcache.events.process", Kind::Internal), latest: cx.head.opened }
    }

    fn fact(&mut self, _: &mut Cx<'_, S>, at: Time, fact: &EventsFact) {
        self.latest = self.latest.max(at);
        let EventsFact::Handled { topic, endpoint, sequence, events, blocks, applied } = fact;
        let sequence = i64::try_from(*sequence).unwrap_or(i64::MAX);
        self.root.set("llm_d.kv_cache.events.topic", topic).set("llm_d.kv_cache.events.source_endpoint", endpoint);
        self.root.set("llm_d.kv_cache.events.sequence", sequence).set("llm_d.kv_cache.events.event_count", *events);
        self.root.set("llm_d.kv_cache.events.block_count", *blocks);
        let result = match applied {
            Applied::Taken => "taken",
            Applied::Known => "known",
            Applied::Gap { .. } => "gap",
        };
        self.root.set("llm_d.kv_cache.events.result", result);
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        super::abandon(&mut self.root, ending.abandoned);
        super::close(cx, self.root, self.latest.max(ending.closed));
    }
}
