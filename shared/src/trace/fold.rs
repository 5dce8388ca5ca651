//! Folding: how a component's facts become spans, in whatever form a recorder keeps them.
//!
//! A component writes its fold once, over any [`Form`]: spans as plain data, calls of an SDK, or bytes for a collector. Names,
//! attributes, parents and status are set there and nowhere else, so all forms agree. Nothing in here reads a clock.

use std::borrow::Cow;
use std::sync::Arc;

use crate::ids::SpanId;
use crate::time::Time;
use crate::trace::record::{Ending, Fact, Head, Record};
use crate::trace::span::{Attr, Event, Kind, Link, Span, Status, Text, Value};

/// An attribute value as a fold gives it: borrowed, so that a form that only encodes it copies nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Val<'a> {
    /// Text known at compile time.
    Static(&'static str),
    /// Text of this record only.
    Text(&'a str),
    /// Text shared by many records: model names, endpoint names.
    Shared(&'a Arc<str>),
    /// A whole number.
    Int(i64),
    /// A number.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A list of texts known at compile time.
    Statics(&'a [&'static str]),
    /// A list of shared texts.
    Names(&'a [Arc<str>]),
    /// A list of numbers.
    F64s(&'a [f64]),
}

/// An attribute as a fold gives it.
pub type Pair<'a> = (&'static str, Val<'a>);

/// A span under construction.
pub trait Draft: Sized {
    /// Its id: what children name as their parent.
    fn id(&self) -> SpanId;
    /// Its start.
    fn start(&self) -> Time;
    /// Its end so far.
    fn end(&self) -> Time;
    /// Moves its end; a span never ends before it starts.
    fn set_end(&mut self, end: Time);
    /// Gives it another name: for an outermost span whose name only its first facts tell.
    fn rename(&mut self, name: &'static str);
    /// Adds an attribute; a fold sets no key twice.
    fn put(&mut self, key: &'static str, value: Val<'_>);
    /// Adds an event; a form that can puts events in order and within the span when the span is emitted.
    fn event(&mut self, name: &'static str, at: Time, attrs: &[Pair<'_>]) -> &mut Self;
    /// Adds a link to a span.
    fn link(&mut self, to: &LinkTo, attrs: &[Pair<'_>]) -> &mut Self;
    /// Sets the status to an error with a short fixed description; the first one stands.
    fn error(&mut self, description: &'static str);
    /// Whether the status is an error.
    fn failed(&self) -> bool;

    /// Adds an attribute.
    fn set<'v>(&mut self, key: &'static str, value: impl Into<Val<'v>>) -> &mut Self {
        self.put(key, value.into());
        self
    }
    /// Adds an attribute if there is a value.
    fn set_some<'v>(&mut self, key: &'static str, value: Option<impl Into<Val<'v>>>) -> &mut Self {
        if let Some(value) = value {
            self.put(key, value.into());
        }
        self
    }
    /// Marks the span as failed: `error.type` and a short fixed description.
    fn fail<'v>(&mut self, error_type: impl Into<Val<'v>>, description: &'static str) -> &mut Self {
        self.error(description);
        self.set("error.type", error_type)
    }
}

/// The far end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTo {
    /// The trace pointed to.
    pub trace_id: crate::ids::TraceId,
    /// The span pointed to.
    pub span_id: SpanId,
}

/// A form that spans may take.
pub trait Form {
    /// A span under construction in this form.
    type Draft: Draft + Send + 'static;

    /// Starts the service's outermost span, under the caller's span, when the record was opened. A fold does that when it
    /// begins: a form may decide here whether the request is recorded.
    fn outermost(&mut self, head: &Head, name: &'static str, kind: Kind) -> Self::Draft;
    /// Starts a span below another one of the record.
    fn inner(&mut self, head: &Head, new: Inner) -> Self::Draft;
    /// Takes a finished span: its events are sorted by time and none lies after its end.
    fn emit(&mut self, head: &Head, span: Self::Draft);
}

/// A span below another one of the same record.
#[derive(Clone, Copy, Debug)]
pub struct Inner {
    /// Name from the registry.
    pub name: &'static str,
    /// Role.
    pub kind: Kind,
    /// The span above it.
    pub parent: SpanId,
    /// Its own id.
    pub id: SpanId,
    /// Its start.
    pub start: Time,
    /// Its end, as far as it is known.
    pub end: Time,
}

/// What a fold works with: the record's identity, and the form.
#[derive(Debug)]
pub struct Cx<'a, S> {
    /// The record's identity.
    pub head: &'a Head,
    form: &'a mut S,
}

impl<'a, S: Form> Cx<'a, S> {
    /// A context for the record `head`.
    pub fn new(head: &'a Head, form: &'a mut S) -> Cx<'a, S> {
        Cx { head, form }
    }
    /// Starts the service's outermost span.
    pub fn outermost(&mut self, name: &'static str, kind: Kind) -> S::Draft {
        self.form.outermost(self.head, name, kind)
    }
    /// Starts a span below another one.
    pub fn inner(&mut self, new: Inner) -> S::Draft {
        self.form.inner(self.head, new)
    }
    /// Hands a finished span over.
    pub fn emit(&mut self, span: S::Draft) {
        self.form.emit(self.head, span);
    }
}

/// The fold of one component's facts: the state between facts.
pub trait Fold<F, S: Form>: Sized {
    /// Begins with a record that was just opened.
    fn begin(cx: &mut Cx<'_, S>) -> Self;
    /// Takes the next fact.
    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &F);
    /// Ends with the record.
    fn end(self, cx: &mut Cx<'_, S>, ending: &Ending);
}

/// Folds a whole record.
pub fn fold<F: Fact, S: Form>(record: &Record<F>, form: &mut S) {
    let mut cx = Cx::new(&record.head, form);
    let mut state = F::Fold::<S>::begin(&mut cx);
    for (at, fact) in &record.facts {
        state.fact(&mut cx, *at, fact);
    }
    state.end(&mut cx, &record.ending());
}

/// Spans as plain data, the outermost span of a record first if its fold emits it first.
impl Form for Vec<Span> {
    type Draft = Span;

    fn outermost(&mut self, head: &Head, name: &'static str, kind: Kind) -> Span {
        let start = head.opened;
        let new = Inner { name, kind, parent: head.span_id, id: head.span_id, start, end: start };
        let mut span = self.inner(head, new);
        span.parent = head.parent;
        span.parent_is_remote = head.parent.is_some();
        span
    }

    fn inner(&mut self, head: &Head, new: Inner) -> Span {
        Span {
            trace_id: head.trace_id,
            span_id: new.id,
            parent: Some(new.parent),
            parent_is_remote: false,
            tracestate: head.tracestate.clone(),
            instance: head.instance,
            name: Cow::Borrowed(new.name),
            kind: new.kind,
            start: new.start,
            end: new.end.max(new.start),
            attrs: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        }
    }

    fn emit(&mut self, _: &Head, mut span: Span) {
        let end = span.end;
        span.events.iter_mut().for_each(|e| e.at = e.at.min(end));
        span.events.sort_by_key(|e| e.at);
        self.push(span);
    }
}

impl Draft for Span {
    fn id(&self) -> SpanId {
        self.span_id
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
        self.name = Cow::Borrowed(name);
    }
    fn put(&mut self, key: &'static str, value: Val<'_>) {
        self.attrs.push((Cow::Borrowed(key), value.into()));
    }
    fn event(&mut self, name: &'static str, at: Time, attrs: &[Pair<'_>]) -> &mut Span {
        self.events.push(Event { name: Cow::Borrowed(name), at, attrs: owned(attrs) });
        self
    }
    fn link(&mut self, to: &LinkTo, attrs: &[Pair<'_>]) -> &mut Span {
        self.links.push(Link { trace_id: to.trace_id, span_id: to.span_id, attrs: owned(attrs) });
        self
    }
    fn error(&mut self, description: &'static str) {
        if self.status == Status::Unset {
            self.status = Status::Error(Cow::Borrowed(description));
        }
    }
    fn failed(&self) -> bool {
        self.status != Status::Unset
    }
}

fn owned(attrs: &[Pair<'_>]) -> Vec<Attr> {
    attrs.iter().map(|(key, value)| (Cow::Borrowed(*key), (*value).into())).collect()
}

impl From<Val<'_>> for Value {
    fn from(value: Val<'_>) -> Value {
        match value {
            Val::Static(v) => Value::Str(Cow::Borrowed(v)),
            Val::Text(v) => Value::Str(Cow::Owned(v.to_owned())),
            Val::Shared(v) => Value::Shared(Arc::clone(v)),
            Val::Int(v) => Value::Int(v),
            Val::F64(v) => Value::F64(v),
            Val::Bool(v) => Value::Bool(v),
            Val::Statics(v) => Value::StrList(v.iter().map(|t| Text::Borrowed(t)).collect()),
            Val::Names(v) => Value::StrList(v.iter().map(|t| Text::Owned(t.to_string())).collect()),
            Val::F64s(v) => Value::F64List(v.to_vec()),
        }
    }
}

impl From<&'static str> for Val<'_> {
    fn from(v: &'static str) -> Self {
        Val::Static(v)
    }
}
impl<'a> From<&'a Arc<str>> for Val<'a> {
    fn from(v: &'a Arc<str>) -> Self {
        Val::Shared(v)
    }
}
impl From<i64> for Val<'_> {
    fn from(v: i64) -> Self {
        Val::Int(v)
    }
}
impl From<u64> for Val<'_> {
    fn from(v: u64) -> Self {
        Val::Int(i64::try_from(v).unwrap_or(i64::MAX))
    }
}
impl From<u32> for Val<'_> {
    fn from(v: u32) -> Self {
        Val::Int(i64::from(v))
    }
}
impl From<u16> for Val<'_> {
    fn from(v: u16) -> Self {
        Val::Int(i64::from(v))
    }
}
impl From<i32> for Val<'_> {
    fn from(v: i32) -> Self {
        Val::Int(i64::from(v))
    }
}
impl From<f64> for Val<'_> {
    fn from(v: f64) -> Self {
        Val::F64(v)
    }
}
impl From<bool> for Val<'_> {
    fn from(v: bool) -> Self {
        Val::Bool(v)
    }
}
