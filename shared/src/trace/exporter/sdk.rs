//! Our spans as the SDK's `SpanData`, in bulk: what any `SpanExporter` of the SDK takes.
//!
//! The SDK does not remove attributes set twice; our records never set one twice.

use std::borrow::Cow;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{Event, Link, SpanContext, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{Array, InstrumentationScope, Key, KeyValue, StringValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::ids::{SpanId, TraceId};
use crate::time::{Anchor, Time};
use crate::trace::otlp_json::SCOPE_NAME;
use crate::trace::resource::Resource;
use crate::trace::span::{self, Attr, Kind, Span, Text, Value};

/// The SDK's form of a resource.
pub(crate) fn resource(resource: &Resource) -> opentelemetry_sdk::Resource {
    opentelemetry_sdk::Resource::builder_empty().with_attributes(resource.attributes().iter().map(key_value)).build()
}

/// The SDK's form of a span.
pub(crate) fn span_data(span: &Span, anchor: Anchor) -> SpanData {
    let mut events = SpanEvents::default();
    events.events = span.events.iter().map(|e| event(e, anchor)).collect();
    let mut links = SpanLinks::default();
    links.links = span.links.iter().map(link).collect();
    let state = span.tracestate.as_deref().map(trace_state).unwrap_or_default();
    SpanData {
        span_context: context(span.trace_id, span.span_id, state),
        parent_span_id: span.parent.map_or(opentelemetry::SpanId::INVALID, span_id),
        parent_span_is_remote: span.parent_is_remote,
        span_kind: match span.kind {
            Kind::Internal => SpanKind::Internal,
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
        },
        name: span.name.clone(),
        start_time: time(anchor, span.start),
        end_time: time(anchor, span.end),
        attributes: span.attrs.iter().map(key_value).collect(),
        dropped_attributes_count: 0,
        events,
        links,
        status: match &span.status {
            span::Status::Unset => Status::Unset,
            span::Status::Error(message) => Status::Error { description: message.clone() },
        },
        instrumentation_scope: InstrumentationScope::builder(SCOPE_NAME)
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

/// The SDK's form of a trace state. It was validated when it came in or made by us; the SDK's own grammar may still be narrower.
pub(crate) fn trace_state(state: &str) -> TraceState {
    TraceState::from_str(state).unwrap_or_default()
}

fn context(trace_id: TraceId, span: SpanId, state: TraceState) -> SpanContext {
    let trace_id = opentelemetry::TraceId::from_bytes(trace_id.get().to_be_bytes());
    SpanContext::new(trace_id, span_id(span), TraceFlags::SAMPLED, false, state)
}

fn span_id(id: SpanId) -> opentelemetry::SpanId {
    opentelemetry::SpanId::from_bytes(id.get().to_be_bytes())
}

fn time(anchor: Anchor, at: Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(anchor.unix_nanos(at))
}

fn event(event: &span::Event, anchor: Anchor) -> Event {
    let attributes = event.attrs.iter().map(key_value).collect();
    Event::new(event.name.clone(), time(anchor, event.at), attributes, 0)
}

fn link(link: &span::Link) -> Link {
    let attributes = link.attrs.iter().map(key_value).collect();
    Link::new(context(link.trace_id, link.span_id, TraceState::default()), attributes, 0)
}

fn key_value((key, value): &Attr) -> KeyValue {
    let key = match key {
        Cow::Borrowed(key) => Key::from_static_str(key),
        Cow::Owned(key) => Key::new(key.clone()),
    };
    let value = match value {
        Value::Str(v) => opentelemetry::Value::String(text(v)),
        Value::Shared(v) => opentelemetry::Value::String(StringValue::from(v.clone())),
        Value::Int(v) => opentelemetry::Value::I64(*v),
        Value::F64(v) => opentelemetry::Value::F64(*v),
        Value::Bool(v) => opentelemetry::Value::Bool(*v),
        Value::StrList(v) => opentelemetry::Value::Array(Array::String(v.iter().map(text).collect())),
        Value::F64List(v) => opentelemetry::Value::Array(Array::F64(v.clone())),
    };
    KeyValue::new(key, value)
}

fn text(text: &Text) -> StringValue {
    match text {
        Cow::Borrowed(text) => StringValue::from(*text),
        Cow::Owned(text) => StringValue::from(text.clone()),
    }
}
