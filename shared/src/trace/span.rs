//! Spans as plain data: what folding makes, exporters send and `inspect` reads back.

use std::borrow::Cow;
use std::sync::Arc;

use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::Time;

/// Text that is mostly static in a process and owned when read from a file.
pub type Text = Cow<'static, str>;

/// Role of a span (OpenTelemetry `SpanKind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Work inside one service.
    Internal,
    /// Answers a remote call.
    Server,
    /// Makes a remote call.
    Client,
}

/// Outcome of a span. Success is `Unset`, never `Ok` (OpenTelemetry leaves `Ok` to the application's owner).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Status {
    /// Nothing went wrong.
    #[default]
    Unset,
    /// Failed; a short fixed description, never content.
    Error(Text),
}

/// An attribute value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text known at compile time or owned by one span.
    Str(Text),
    /// Text shared by many spans: model names, endpoint names, request ids.
    Shared(Arc<str>),
    /// A whole number.
    Int(i64),
    /// A number.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A list of texts.
    StrList(Vec<Text>),
    /// A list of numbers.
    F64List(Vec<f64>),
}

impl Value {
    /// The text of a string value.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(s) => Some(s),
            Value::Shared(s) => Some(s),
            Value::Int(_) | Value::F64(_) | Value::Bool(_) | Value::StrList(_) | Value::F64List(_) => None,
        }
    }
    /// The number of an integer value.
    pub fn as_int(&self) -> Option<i64> {
        if let Value::Int(i) = self { Some(*i) } else { None }
    }
    /// The number of a floating-point or integer value.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F64(f) => Some(*f),
            Value::Int(i) => Some(*i as f64),
            Value::Str(_) | Value::Shared(_) | Value::Bool(_) | Value::StrList(_) | Value::F64List(_) => None,
        }
    }
}

impl From<&'static str> for Value {
    fn from(v: &'static str) -> Value {
        Value::Str(Cow::Borrowed(v))
    }
}
impl From<String> for Value {
    fn from(v: String) -> Value {
        Value::Str(Cow::Owned(v))
    }
}
impl From<Arc<str>> for Value {
    fn from(v: Arc<str>) -> Value {
        Value::Shared(v)
    }
}
impl From<i64> for Value {
    fn from(v: i64) -> Value {
        Value::Int(v)
    }
}
impl From<u64> for Value {
    fn from(v: u64) -> Value {
        Value::Int(i64::try_from(v).unwrap_or(i64::MAX))
    }
}
impl From<u32> for Value {
    fn from(v: u32) -> Value {
        Value::Int(i64::from(v))
    }
}
impl From<u16> for Value {
    fn from(v: u16) -> Value {
        Value::Int(i64::from(v))
    }
}
impl From<i32> for Value {
    fn from(v: i32) -> Value {
        Value::Int(i64::from(v))
    }
}
impl From<f64> for Value {
    fn from(v: f64) -> Value {
        Value::F64(v)
    }
}
impl From<bool> for Value {
    fn from(v: bool) -> Value {
        Value::Bool(v)
    }
}

/// An attribute.
pub type Attr = (Text, Value);

/// Something that happened at one moment of a span.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Name from the registry.
    pub name: Text,
    /// When it happened.
    pub at: Time,
    /// Attributes from the registry.
    pub attrs: Vec<Attr>,
}

/// A reference to a span of another trace, or of another branch of this one.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// The trace pointed to.
    pub trace_id: TraceId,
    /// The span pointed to.
    pub span_id: SpanId,
    /// Attributes from the registry.
    pub attrs: Vec<Attr>,
}

/// A finished span. All spans are of sampled traces.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// Its own id, unique in the trace.
    pub span_id: SpanId,
    /// The parent; `None` makes it a root.
    pub parent: Option<SpanId>,
    /// Whether the parent came in over the wire.
    pub parent_is_remote: bool,
    /// The W3C trace state that travels with the trace.
    pub tracestate: Option<Arc<str>>,
    /// Which service instance it belongs to.
    pub instance: InstanceId,
    /// Name from the registry.
    pub name: Text,
    /// Role.
    pub kind: Kind,
    /// Start.
    pub start: Time,
    /// End, never before the start.
    pub end: Time,
    /// Attributes; no key twice.
    pub attrs: Vec<Attr>,
    /// Events in time order.
    pub events: Vec<Event>,
    /// Links.
    pub links: Vec<Link>,
    /// Outcome.
    pub status: Status,
}

impl Span {
    /// Adds an attribute.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) -> &mut Span {
        self.attrs.push((Cow::Borrowed(key), value.into()));
        self
    }
    /// Adds an attribute if there is a value.
    pub fn set_some(&mut self, key: &'static str, value: Option<impl Into<Value>>) -> &mut Span {
        if let Some(value) = value {
            self.set(key, value);
        }
        self
    }
    /// Adds an event.
    pub fn event(&mut self, name: &'static str, at: Time, attrs: Vec<Attr>) -> &mut Span {
        self.events.push(Event { name: Cow::Borrowed(name), at, attrs });
        self
    }
    /// Marks the span as failed: `error.type` and a short fixed description.
    pub fn fail(&mut self, error_type: impl Into<Value>, description: &'static str) -> &mut Span {
        self.status = Status::Error(Cow::Borrowed(description));
        self.set("error.type", error_type)
    }
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.attrs.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }
}
