//! Spans to OTLP JSON, without building a tree of values first.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::ids::InstanceId;
use crate::time::{Anchor, Time};
use crate::trace::resource::Resource;
use crate::trace::span::{Attr, Event, Kind, Link, Span, Status, Value};

/// The instrumentation scope of every span of this project.
pub const SCOPE_NAME: &str = "igsim";
/// Flags of a span: sampled, and whether the parent is remote is known (OTLP `SpanFlags`).
pub(crate) const SAMPLED: u32 = 0x01;
pub(crate) const HAS_IS_REMOTE: u32 = 0x100;
pub(crate) const IS_REMOTE: u32 = 0x200;

/// Appends `spans` to `out` as one line, grouped by service instance; `resources` is indexed by instance id.
///
/// # Errors
/// If a value cannot be written as JSON, which no value of a [`Span`] does.
pub fn write(
    spans: &[Span],
    resources: &[Arc<Resource>],
    anchor: Anchor,
    out: &mut Vec<u8>,
) -> Result<(), serde_json::Error> {
    let mut groups: BTreeMap<InstanceId, Vec<&Span>> = BTreeMap::new();
    for span in spans {
        groups.entry(span.instance).or_default().push(span);
    }
    let groups: Vec<_> = groups
        .into_iter()
        .map(|(instance, spans)| {
            let resource = resources.get(usize::from(instance.0));
            let attrs = resource.map(|r| r.attributes()).unwrap_or_default();
            let anchor = anchor.shifted(resource.map_or(0, |r| r.clock_skew_ns));
            ResourceSpans { attrs, spans, anchor }
        })
        .collect();
    serde_json::to_writer(&mut *out, &One("resourceSpans", &groups))?;
    out.push(b'\n');
    Ok(())
}

/// An object with one member.
struct One<'a, T: ?Sized>(&'static str, &'a T);

impl<T: Serialize + ?Sized> Serialize for One<'_, T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(1))?;
        map.serialize_entry(self.0, self.1)?;
        map.end()
    }
}

/// A value written as the text that it displays.
struct Shown<T>(T);

impl<T: Display> Serialize for Shown<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&self.0)
    }
}

struct ResourceSpans<'a> {
    attrs: Vec<Attr>,
    spans: Vec<&'a Span>,
    anchor: Anchor,
}

impl Serialize for ResourceSpans<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(2))?;
        map.serialize_entry("resource", &One("attributes", &Attrs(&self.attrs)))?;
        map.serialize_entry("scopeSpans", &[ScopeSpans(&self.spans, self.anchor)])?;
        map.end()
    }
}

struct ScopeSpans<'a>(&'a [&'a Span], Anchor);

impl Serialize for ScopeSpans<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(2))?;
        map.serialize_entry("scope", &Scope)?;
        let spans: Vec<_> = self.0.iter().map(|span| SpanOut(span, self.1)).collect();
        map.serialize_entry("spans", &spans)?;
        map.end()
    }
}

struct Scope;

impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(2))?;
        map.serialize_entry("name", SCOPE_NAME)?;
        map.serialize_entry("version", env!("CARGO_PKG_VERSION"))?;
        map.end()
    }
}

struct SpanOut<'a>(&'a Span, Anchor);

impl Serialize for SpanOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let (span, anchor) = (self.0, self.1);
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("traceId", &Shown(span.trace_id))?;
        map.serialize_entry("spanId", &Shown(span.span_id))?;
        if let Some(state) = &span.tracestate {
            map.serialize_entry("traceState", state)?;
        }
        match span.parent {
            Some(parent) => map.serialize_entry("parentSpanId", &Shown(parent))?,
            None => map.serialize_entry("parentSpanId", "")?,
        }
        let remote = if span.parent_is_remote { IS_REMOTE } else { 0 };
        map.serialize_entry("flags", &(SAMPLED | HAS_IS_REMOTE | remote))?;
        map.serialize_entry("name", &span.name)?;
        map.serialize_entry("kind", &kind_number(span.kind))?;
        map.serialize_entry("startTimeUnixNano", &nanos(anchor, span.start))?;
        map.serialize_entry("endTimeUnixNano", &nanos(anchor, span.end))?;
        if !span.attrs.is_empty() {
            map.serialize_entry("attributes", &Attrs(&span.attrs))?;
        }
        if !span.events.is_empty() {
            let events: Vec<_> = span.events.iter().map(|e| EventOut(e, anchor)).collect();
            map.serialize_entry("events", &events)?;
        }
        if !span.links.is_empty() {
            let links: Vec<_> = span.links.iter().map(LinkOut).collect();
            map.serialize_entry("links", &links)?;
        }
        map.serialize_entry("status", &StatusOut(&span.status))?;
        map.end()
    }
}

fn nanos(anchor: Anchor, at: Time) -> Shown<u64> {
    Shown(anchor.unix_nanos(at))
}

/// The number of a kind in OTLP's `SpanKind`.
pub(crate) const fn kind_number(kind: Kind) -> u8 {
    match kind {
        Kind::Internal => 1,
        Kind::Server => 2,
        Kind::Client => 3,
    }
}

struct EventOut<'a>(&'a Event, Anchor);

impl Serialize for EventOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("timeUnixNano", &nanos(self.1, self.0.at))?;
        map.serialize_entry("name", &self.0.name)?;
        if !self.0.attrs.is_empty() {
            map.serialize_entry("attributes", &Attrs(&self.0.attrs))?;
        }
        map.end()
    }
}

struct LinkOut<'a>(&'a Link);

impl Serialize for LinkOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("traceId", &Shown(self.0.trace_id))?;
        map.serialize_entry("spanId", &Shown(self.0.span_id))?;
        if !self.0.attrs.is_empty() {
            map.serialize_entry("attributes", &Attrs(&self.0.attrs))?;
        }
        map.serialize_entry("flags", &(SAMPLED | HAS_IS_REMOTE))?;
        map.end()
    }
}

struct StatusOut<'a>(&'a Status);

impl Serialize for StatusOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        match self.0 {
            Status::Unset => {}
            Status::Error(message) => {
                map.serialize_entry("message", message)?;
                map.serialize_entry("code", &2)?;
            }
        }
        map.end()
    }
}

struct Attrs<'a>(&'a [Attr]);

impl Serialize for Attrs<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.0.iter().map(AttrOut))
    }
}

struct AttrOut<'a>(&'a Attr);

impl Serialize for AttrOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(2))?;
        map.serialize_entry("key", &self.0.0)?;
        map.serialize_entry("value", &ValueOut(&self.0.1))?;
        map.end()
    }
}

struct ValueOut<'a>(&'a Value);

impl Serialize for ValueOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Str(v) => One("stringValue", v).serialize(s),
            Value::Shared(v) => One("stringValue", v).serialize(s),
            Value::Int(v) => One("intValue", &Shown(v)).serialize(s),
            Value::F64(v) => One("doubleValue", &Double(*v)).serialize(s),
            Value::Bool(v) => One("boolValue", v).serialize(s),
            Value::StrList(v) => {
                let values: Vec<_> = v.iter().map(|v| One("stringValue", v)).collect();
                One("arrayValue", &One("values", &values)).serialize(s)
            }
            Value::F64List(v) => {
                let doubles: Vec<_> = v.iter().map(|v| Double(*v)).collect();
                let values: Vec<_> = doubles.iter().map(|v| One("doubleValue", v)).collect();
                One("arrayValue", &One("values", &values)).serialize(s)
            }
        }
    }
}

/// A double; JSON has no NaN and no infinities, protobuf's JSON mapping writes them as text.
struct Double(f64);

impl Serialize for Double {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            v if v.is_finite() => s.serialize_f64(v),
            v if v.is_nan() => s.serialize_str("NaN"),
            v if v > 0.0 => s.serialize_str("Infinity"),
            _ => s.serialize_str("-Infinity"),
        }
    }
}
