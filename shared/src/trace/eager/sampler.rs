//! The SDK's samplers with a ratio that can be changed while requests are served, and span ids that are known beforehand.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use opentelemetry::trace::{Link, SpanKind};
use opentelemetry::{Context, KeyValue, SpanId, TraceId};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SamplingResult, ShouldSample};

use crate::ids;
use crate::trace::sampler::Sampler;

/// What the samplers of a process go by.
#[derive(Debug)]
pub(super) struct Switch {
    parent_based: AtomicBool,
    /// The bits of the ratio.
    ratio: AtomicU64,
}

impl Switch {
    pub(super) fn new(sampler: &Sampler) -> Switch {
        let switch = Switch { parent_based: AtomicBool::new(true), ratio: AtomicU64::new(0) };
        switch.set(sampler);
        switch
    }

    pub(super) fn set(&self, sampler: &Sampler) {
        self.parent_based.store(sampler.parent_based, Ordering::Relaxed);
        self.ratio.store(sampler.root_ratio().to_bits(), Ordering::Relaxed);
    }
}

/// `TraceIdRatioBased` with the switch's ratio; 1 and 0 stand for always on and always off.
#[derive(Clone, Debug)]
struct LiveRatio(Arc<Switch>);

impl ShouldSample for LiveRatio {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let ratio = f64::from_bits(self.0.ratio.load(Ordering::Relaxed));
        let sampler = opentelemetry_sdk::trace::Sampler::TraceIdRatioBased(ratio);
        sampler.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

/// The SDK's `ParentBased` over that ratio, or the ratio alone.
#[derive(Clone, Debug)]
pub(super) struct LiveSampler {
    ratio: LiveRatio,
    parent_based: opentelemetry_sdk::trace::Sampler,
}

impl LiveSampler {
    pub(super) fn new(switch: Arc<Switch>) -> LiveSampler {
        let ratio = LiveRatio(switch);
        let parent_based = opentelemetry_sdk::trace::Sampler::ParentBased(Box::new(ratio.clone()));
        LiveSampler { ratio, parent_based }
    }
}

impl ShouldSample for LiveSampler {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        // A request keeps the decision of its outermost span, so its inner spans never ask a ratio that changed meanwhile.
        use opentelemetry::trace::TraceContextExt as _;
        let inner = || parent.is_some_and(|cx| cx.has_active_span() && !cx.span().span_context().is_remote());
        if self.ratio.0.parent_based.load(Ordering::Relaxed) || inner() {
            self.parent_based.should_sample(parent, trace_id, name, kind, attributes, links)
        } else {
            self.ratio.should_sample(parent, trace_id, name, kind, attributes, links)
        }
    }
}

thread_local! {
    /// Ids of the span that this thread starts next.
    static NEXT: Cell<Option<(ids::TraceId, ids::SpanId)>> = const { Cell::new(None) };
}

/// Hands out the ids that [`with_ids`] has set, so that both recorders know a span's id before it exists.
#[derive(Debug, Default)]
pub(super) struct PresetIds(RandomIdGenerator);

/// Runs `start`, in which a span starts, so that the span has these ids; the trace id counts only for the root of a trace.
pub(super) fn with_ids<R>(trace: ids::TraceId, span: ids::SpanId, start: impl FnOnce() -> R) -> R {
    NEXT.set(Some((trace, span)));
    let started = start();
    NEXT.set(None);
    started
}

impl IdGenerator for PresetIds {
    fn new_trace_id(&self) -> TraceId {
        NEXT.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| TraceId::from(trace.get()))
    }
    fn new_span_id(&self) -> SpanId {
        NEXT.get().map_or_else(|| self.0.new_span_id(), |(_, span)| SpanId::from(span.get()))
    }
}
