//! The form that a record folds into: each span under construction is a buffer of protobuf fields, reused for later spans.
//!
//! Field numbers are those of `trace/v1/trace.proto`. The end of a span and the times of its events have a fixed width, so that
//! they are corrected in place once the end is known.

use std::sync::Arc;

use crate::ids::{SpanId, TraceId};
use crate::time::{Anchor, Time};
use crate::trace::exporter::sdk;
use crate::trace::fold::{Draft, Form, Inner, LinkTo, Pair, Val};
use crate::trace::otlp_json::{HAS_IS_REMOTE, IS_REMOTE, SAMPLED, kind_number};
use crate::trace::record::Head;
use crate::trace::span::Kind;

use super::wire;

/// `ScopeSpans.spans`
const SPAN: u8 = 0x12;
/// `Span.trace_state`
const TRACE_STATE: u8 = 0x1a;
/// `Span.parent_span_id`
const PARENT: u8 = 0x22;
/// `Span.name`
const NAME: u8 = 0x2a;
/// `Span.attributes`
const ATTRIBUTE: u8 = 0x4a;
/// `Span.events`
const EVENT: u8 = 0x5a;
/// `Span.links`
const LINK: u8 = 0x6a;
/// `Span.status`
const STATUS: u8 = 0x7a;
/// `Status.message`
const MESSAGE: u8 = 0x12;
/// `Status.code` with the value for an error.
const CODE_ERROR: [u8; 2] = [0x18, 2];
/// `Event.name`
const EVENT_NAME: u8 = 0x12;
/// `Event.attributes`
const EVENT_ATTRIBUTE: u8 = 0x1a;
/// `Link.attributes`
const LINK_ATTRIBUTE: u8 = 0x22;
/// `Link.flags`
const LINK_FLAGS: u8 = 0x35;

/// Where the eight bytes of `Span.end_time_unix_nano` lie: every span begins with the same fields.
const END: usize = 40;
/// The fields that every span begins with.
const FIXED: usize = 54;

/// Writes the spans of records as fields of OTLP's `ScopeSpans`, one after the other.
#[derive(Debug)]
pub struct Encoder {
    pub(super) anchor: Anchor,
    /// Buffers for the spans to come.
    free: Vec<SpanBytes>,
    state: State,
    /// Finished spans.
    pub(super) out: Vec<u8>,
    /// Where the spans of the current record lie in `out`: its start, then the end of each span.
    pub(super) bounds: Vec<usize>,
}

/// A span under construction.
#[derive(Debug)]
pub struct SpanBytes(Box<Scratch>);

#[derive(Debug)]
struct Scratch {
    id: SpanId,
    name: &'static str,
    start: Time,
    end: Time,
    anchor: Anchor,
    error: Option<&'static str>,
    bytes: Vec<u8>,
    events: Vec<Mark>,
}

/// An event among the fields of a span.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Time,
    /// Where the field begins and ends.
    from: usize,
    to: usize,
    /// Where the eight bytes of its time lie.
    time: usize,
}

/// The trace state that was last written, as a field: most records have the same.
#[derive(Debug, Default)]
struct State {
    given: Option<Arc<str>>,
    field: Vec<u8>,
}

impl Encoder {
    /// An encoder of records whose time zero is at `anchor`.
    pub fn new(anchor: Anchor) -> Encoder {
        Encoder { anchor, free: Vec::new(), state: State::default(), out: Vec::new(), bounds: Vec::new() }
    }

    fn begin(&mut self, head: &Head, new: &Inner, parent: Option<SpanId>, remote: bool) -> SpanBytes {
        let (start, end) = (new.start, new.end.max(new.start));
        let mut span = self.free.pop().unwrap_or_else(|| SpanBytes::new(new.id, self.anchor));
        let scratch = &mut *span.0;
        (scratch.id, scratch.start, scratch.end, scratch.error) = (new.id, start, end, None);
        (scratch.name, scratch.anchor) = (new.name, self.anchor);
        scratch.events.clear();
        let out = &mut scratch.bytes;
        out.clear();
        out.extend_from_slice(&fixed(head.trace_id, new.id, new.kind, self.anchor.unix_nanos(start), remote));
        if let Some(parent) = parent {
            out.extend_from_slice(&id_field(PARENT, parent));
        }
        if let Some(state) = &head.tracestate {
            out.extend_from_slice(self.state.field(state));
        }
        span
    }
}

impl Form for Encoder {
    type Draft = SpanBytes;

    fn outermost(&mut self, head: &Head, name: &'static str, kind: Kind) -> SpanBytes {
        let (id, start) = (head.span_id, head.opened);
        let new = Inner { name, kind, parent: id, id, start, end: start };
        self.begin(head, &new, head.parent, head.parent.is_some())
    }

    fn inner(&mut self, head: &Head, new: Inner) -> SpanBytes {
        self.begin(head, &new, Some(new.parent), false)
    }

    fn emit(&mut self, _: &Head, mut span: SpanBytes) {
        span.0.finish();
        let bytes = &span.0.bytes;
        wire::prefix(&mut self.out, SPAN, bytes.len());
        self.out.extend_from_slice(bytes);
        self.bounds.push(self.out.len());
        self.free.push(span);
    }
}

impl Draft for SpanBytes {
    fn id(&self) -> SpanId {
        self.0.id
    }
    fn start(&self) -> Time {
        self.0.start
    }
    fn end(&self) -> Time {
        self.0.end
    }
    fn set_end(&mut self, end: Time) {
        self.0.end = end.max(self.0.start);
    }
    fn rename(&mut self, name: &'static str) {
        self.0.name = name;
    }
    #[inline]
    fn put(&mut self, key: &'static str, value: Val<'_>) {
        wire::attribute(&mut self.0.bytes, ATTRIBUTE, key, value);
    }
    fn event(&mut self, name: &'static str, at: Time, attrs: &[Pair<'_>]) -> &mut SpanBytes {
        self.0.event(name, at, attrs);
        self
    }
    fn link(&mut self, to: &LinkTo, attrs: &[Pair<'_>]) -> &mut SpanBytes {
        wire::message(&mut self.0.bytes, LINK, |out| {
            out.extend_from_slice(&ids_fields(to.trace_id, to.span_id));
            attrs.iter().for_each(|(key, value)| wire::attribute(out, LINK_ATTRIBUTE, key, *value));
            out.push(LINK_FLAGS);
            out.extend_from_slice(&(SAMPLED | HAS_IS_REMOTE).to_le_bytes());
        });
        self
    }
    fn error(&mut self, description: &'static str) {
        self.0.error.get_or_insert(description);
    }
    fn failed(&self) -> bool {
        self.0.error.is_some()
    }
}

impl SpanBytes {
    fn new(id: SpanId, anchor: Anchor) -> SpanBytes {
        let (start, bytes) = (Time::ZERO, Vec::with_capacity(512));
        SpanBytes(Box::new(Scratch { id, name: "", start, end: start, anchor, error: None, bytes, events: Vec::new() }))
    }
}

impl Scratch {
    fn event(&mut self, name: &'static str, at: Time, attrs: &[Pair<'_>]) {
        let from = self.bytes.len();
        let start = wire::message(&mut self.bytes, EVENT, |out| {
            out.extend_from_slice(&time_field(0x09, self.anchor.unix_nanos(at)));
            wire::text(out, EVENT_NAME, name);
            attrs.iter().for_each(|(key, value)| wire::attribute(out, EVENT_ATTRIBUTE, key, *value));
        });
        self.events.push(Mark { at, from, to: self.bytes.len(), time: start + 1 });
    }

    /// Writes what is only known at the end.
    fn finish(&mut self) {
        wire::text(&mut self.bytes, NAME, self.name);
        self.bytes[END..END + 8].copy_from_slice(&self.anchor.unix_nanos(self.end).to_le_bytes());
        if !self.events.is_empty() {
            self.order_events();
        }
        match self.error {
            None => self.bytes.extend_from_slice(&[STATUS, 0]),
            Some(description) => {
                wire::message(&mut self.bytes, STATUS, |out| {
                    wire::text(out, MESSAGE, description);
                    out.extend_from_slice(&CODE_ERROR);
                });
            }
        }
    }

    /// Puts the events in order of time, none after the end.
    fn order_events(&mut self) {
        let end = self.end;
        for mark in self.events.iter_mut().filter(|m| m.at > end) {
            mark.at = end;
            self.bytes[mark.time..mark.time + 8].copy_from_slice(&self.anchor.unix_nanos(end).to_le_bytes());
        }
        if !self.events.is_sorted_by_key(|m| m.at) {
            self.sort_events();
        }
    }

    #[cold]
    fn sort_events(&mut self) {
        let mut sorted = Vec::with_capacity(self.bytes.len());
        let mut rest = 0;
        for mark in &self.events {
            sorted.extend_from_slice(&self.bytes[rest..mark.from]);
            rest = mark.to;
        }
        sorted.extend_from_slice(&self.bytes[rest..]);
        self.events.sort_by_key(|m| m.at);
        self.events.iter().for_each(|m| sorted.extend_from_slice(&self.bytes[m.from..m.to]));
        self.bytes = sorted;
    }
}

impl State {
    fn field(&mut self, state: &Arc<str>) -> &[u8] {
        if self.given.as_ref() != Some(state) {
            self.given = Some(Arc::clone(state));
            self.field.clear();
            wire::text(&mut self.field, TRACE_STATE, &sdk::trace_state(state).header());
        }
        &self.field
    }
}

/// `trace_id`, `span_id`, `kind`, the two times (the end is corrected later) and `flags`.
fn fixed(trace: TraceId, id: SpanId, kind: Kind, start: u64, remote: bool) -> [u8; FIXED] {
    let flags = SAMPLED | HAS_IS_REMOTE | if remote { IS_REMOTE } else { 0 };
    let mut bytes = [0; FIXED];
    bytes[..28].copy_from_slice(&ids_fields(trace, id));
    bytes[28..30].copy_from_slice(&[0x30, kind_number(kind)]);
    bytes[30..39].copy_from_slice(&time_field(0x39, start));
    bytes[39..48].copy_from_slice(&time_field(0x41, start));
    // Field 16 is the first whose tag takes two bytes.
    bytes[48..50].copy_from_slice(&[0x85, 0x01]);
    bytes[50..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// `trace_id` and `span_id`, fields 1 and 2 of spans and of links.
fn ids_fields(trace: TraceId, id: SpanId) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..2].copy_from_slice(&[0x0a, 16]);
    bytes[2..18].copy_from_slice(&trace.get().to_be_bytes());
    bytes[18..].copy_from_slice(&id_field(0x12, id));
    bytes
}

fn id_field(tag: u8, id: SpanId) -> [u8; 10] {
    let [a, b, c, d, e, f, g, h] = id.get().to_be_bytes();
    [tag, 8, a, b, c, d, e, f, g, h]
}

fn time_field(tag: u8, nanos: u64) -> [u8; 9] {
    let [a, b, c, d, e, f, g, h] = nanos.to_le_bytes();
    [tag, a, b, c, d, e, f, g, h]
}
