//! Spans as calls of the SDK, each at the moment its fact is noted, and the SDK's propagation of their context.
//!
//! Events are added when they are noted, in that order: a span of the SDK cannot be changed afterwards.

use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceState, Tracer as _,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::Span;

use super::Service;
use super::sampler::with_ids;
use crate::ids::{SpanId, TraceId};
use crate::time::{Anchor, Time};
use crate::trace::context::TraceContext;
use crate::trace::fold::{Draft, Form, Inner, LinkTo, Pair, Val};
use crate::trace::record::Head;
use crate::trace::span::Kind;

/// Room for attributes in a span that is recorded, so that most spans allocate once for them.
const ATTRIBUTES: usize = 8;

/// The spans of one request in one service.
pub(crate) struct Sdk {
    pub(super) service: Arc<Service>,
    /// The caller's span, if there is one.
    caller: Context,
    /// The outermost span.
    root: SpanContext,
    /// Spans that have children, as parents for the SDK.
    parents: Vec<(SpanId, Context)>,
    /// How many spans were started.
    pub(super) spans: usize,
}

impl Sdk {
    pub(super) fn new(service: Arc<Service>, caller: Context) -> Sdk {
        Sdk { service, caller, root: SpanContext::NONE, parents: Vec::new(), spans: 0 }
    }

    /// The context of the outermost span; not valid before that has started.
    pub(super) fn root(&self) -> &SpanContext {
        &self.root
    }

    /// The place of `id` among the parents.
    fn parent(&mut self, id: SpanId) -> usize {
        if let Some(known) = self.parents.iter().rposition(|(parent, _)| *parent == id) {
            return known;
        }
        let root = &self.root;
        let (trace_id, flags, state) = (root.trace_id(), root.trace_flags(), root.trace_state().clone());
        let context = SpanContext::new(trace_id, otel_span_id(id), flags, false, state);
        self.parents.push((id, Context::new().with_remote_span_context(context)));
        self.parents.len() - 1
    }

    fn draft(&mut self, span: Span, id: SpanId, start: Time, end: Time) -> SdkDraft {
        self.spans += 1;
        SdkDraft { span, id, start, end: end.max(start), anchor: self.service.anchor, failed: false }
    }

    fn builder(&self, name: &'static str, kind: Kind, start: Time) -> SpanBuilder {
        let kind = match kind {
            Kind::Internal => SpanKind::Internal,
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
        };
        SpanBuilder::from_name(name).with_kind(kind).with_start_time(time(self.service.anchor, start))
    }
}

impl Form for Sdk {
    type Draft = SdkDraft;

    fn outermost(&mut self, head: &Head, name: &'static str, kind: Kind) -> SdkDraft {
        let (builder, tracer) = (self.builder(name, kind, head.opened), &self.service.tracer);
        let start = || tracer.build_with_context(builder, &self.caller);
        let span = with_ids(head.trace_id, head.span_id, start);
        self.root = span.span_context().clone();
        self.draft(span, head.span_id, head.opened, head.opened)
    }

    fn inner(&mut self, head: &Head, new: Inner) -> SdkDraft {
        let mut builder = self.builder(new.name, new.kind, new.start);
        if self.root.is_sampled() {
            builder.attributes = Some(Vec::with_capacity(ATTRIBUTES));
        }
        let parent = self.parent(new.parent);
        let (tracer, (_, parent)) = (&self.service.tracer, &self.parents[parent]);
        let span = with_ids(head.trace_id, new.id, || tracer.build_with_context(builder, parent));
        self.draft(span, new.id, new.start, new.end)
    }

    fn emit(&mut self, _: &Head, span: SdkDraft) {
        // Ends it.
        drop(span);
    }
}

/// A span of the SDK that has started. It ends at the time set for it, at the latest when it is dropped: the SDK would take
/// the wall clock.
pub(crate) struct SdkDraft {
    span: Span,
    id: SpanId,
    start: Time,
    end: Time,
    anchor: Anchor,
    failed: bool,
}

impl Drop for SdkDraft {
    fn drop(&mut self) {
        self.span.end_with_timestamp(time(self.anchor, self.end));
    }
}

impl Draft for SdkDraft {
    fn id(&self) -> SpanId {
        self.id
    }
    fn start(&self) -> Time {
        self.start
    }
    fn end(&self) -> Time {
        self.end
    }
    fn set_end(&mut self, end: Time) {
        self.end = end.max(self.start);
    }
    fn rename(&mut self, name: &'static str) {
        if self.span.is_recording() {
            self.span.update_name(name);
        }
    }
    fn put(&mut self, key: &'static str, value: Val<'_>) {
        if self.span.is_recording() {
            self.span.set_attribute(KeyValue::new(key, otel_value(value)));
        }
    }
    fn event(&mut self, name: &'static str, at: Time, attrs: &[Pair<'_>]) -> &mut SdkDraft {
        if self.span.is_recording() {
            self.span.add_event_with_timestamp(name, time(self.anchor, at), key_values(attrs));
        }
        self
    }
    fn link(&mut self, to: &LinkTo, attrs: &[Pair<'_>]) -> &mut SdkDraft {
        if self.span.is_recording() {
            let to = otel_context(to.trace_id, to.span_id, true, false, TraceState::NONE);
            self.span.add_link(to, key_values(attrs));
        }
        self
    }
    fn error(&mut self, description: &'static str) {
        if !std::mem::replace(&mut self.failed, true) {
            self.span.set_status(Status::error(description));
        }
    }
    fn failed(&self) -> bool {
        self.failed
    }
}

/// The caller's span, as the SDK's propagator reads it from headers.
pub(crate) fn extract(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers))
}

/// Writes `context` into headers with the SDK's propagator.
pub(crate) fn inject(context: &TraceContext, headers: &mut HeaderMap) {
    let state = context.tracestate.as_deref().and_then(|s| TraceState::from_str(s).ok()).unwrap_or_default();
    let span = otel_context(context.trace_id, context.span_id, context.sampled, false, state);
    let context = Context::new().with_remote_span_context(span);
    TraceContextPropagator::new().inject_context(&context, &mut HeaderInjector(headers));
}

fn otel_context(trace: TraceId, span: SpanId, sampled: bool, remote: bool, state: TraceState) -> SpanContext {
    let flags = TraceFlags::default().with_sampled(sampled);
    SpanContext::new(opentelemetry::TraceId::from(trace.get()), otel_span_id(span), flags, remote, state)
}

fn otel_span_id(id: SpanId) -> opentelemetry::SpanId {
    opentelemetry::SpanId::from(id.get())
}

fn time(anchor: Anchor, at: Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(anchor.unix_nanos(at))
}

fn key_values(attrs: &[Pair<'_>]) -> Vec<KeyValue> {
    attrs.iter().map(|(key, value)| KeyValue::new(*key, otel_value(*value))).collect()
}

fn otel_value(value: Val<'_>) -> Value {
    match value {
        Val::Static(v) => Value::String(v.into()),
        Val::Text(v) => Value::String(v.to_owned().into()),
        Val::Shared(v) => Value::String(Arc::clone(v).into()),
        Val::Int(v) => Value::I64(v),
        Val::F64(v) => Value::F64(v),
        Val::Bool(v) => Value::Bool(v),
        Val::Statics(v) => Value::Array(Array::String(v.iter().map(|t| StringValue::from(*t)).collect())),
        Val::Names(v) => Value::Array(Array::String(v.iter().map(|t| StringValue::from(Arc::clone(t))).collect())),
        Val::F64s(v) => Value::Array(Array::F64(v.to_vec())),
    }
}
