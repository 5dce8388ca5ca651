//! How much spans weigh on the wire: their bytes in an OTLP request, as the direct exporter writes it, without what a batch shares
//! (resources).

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use shared::time::Anchor;
use shared::trace::otlp_bytes::{Encoder, Requests};
use shared::trace::record::Closed;
use shared::trace::{Draft, Ending, Form, Head, Inner, LinkTo, Span, Status, Val, Value};

/// Weighs spans.
pub(super) struct Scale(Requests);

impl Scale {
    pub(super) fn new() -> Scale {
        Scale(Requests::new(Anchor::VIRTUAL))
    }

    /// The bytes of spans of one trace from one service instance.
    pub(super) fn weigh(&mut self, spans: &[Span]) -> u64 {
        self.0.add(&Folded(head_of(&spans[0]), spans));
        self.0.take(usize::MAX, &[]).bytes.len() as u64
    }
}

/// Spans that were folded already, as a record.
struct Folded<'a>(Head, &'a [Span]);

fn head_of(span: &Span) -> Head {
    Head {
        trace_id: span.trace_id,
        span_id: span.span_id,
        parent: span.parent,
        tracestate: span.tracestate.clone(),
        instance: span.instance,
        opened: span.start,
        detail: 3,
        naming: Default::default(),
    }
}

impl Closed for Folded<'_> {
    fn head(&self) -> &Head {
        &self.0
    }
    fn ending(&self) -> Ending {
        Ending { closed: self.0.opened, abandoned: false, cut: 0 }
    }
    fn fold(&self, out: &mut Vec<Span>) {
        out.extend_from_slice(self.1);
    }
    fn encode(&self, out: &mut Encoder) {
        self.1.iter().for_each(|span| encode(span, out));
    }
    fn emptied(self: Box<Self>) -> Box<dyn Any + Send> {
        Box::new(())
    }
}

/// Names and keys are texts of the program, in a run of the same process.
fn known(text: Cow<'static, str>) -> &'static str {
    match text {
        Cow::Borrowed(text) => text,
        Cow::Owned(_) => "",
    }
}

fn encode(span: &Span, out: &mut Encoder) {
    let head = head_of(span);
    let mut draft = match span.parent {
        Some(parent) if !span.parent_is_remote => {
            let (name, id) = (known(span.name.clone()), span.span_id);
            out.inner(&head, Inner { name, kind: span.kind, parent, id, start: span.start, end: span.end })
        }
        Some(_) | None => out.outermost(&head, known(span.name.clone()), span.kind),
    };
    draft.set_end(span.end);
    for (key, value) in &span.attrs {
        with_value(value, |value| draft.put(known(key.clone()), value));
    }
    for event in &span.events {
        draft.event(known(event.name.clone()), event.at, &[]);
        event.attrs.iter().for_each(|(key, value)| with_value(value, |value| draft.put(known(key.clone()), value)));
    }
    for link in &span.links {
        draft.link(&LinkTo { trace_id: link.trace_id, span_id: link.span_id }, &[]);
        link.attrs.iter().for_each(|(key, value)| with_value(value, |value| draft.put(known(key.clone()), value)));
    }
    if let Status::Error(description) = &span.status {
        draft.error(known(description.clone()));
    }
    out.emit(&head, draft);
}

fn with_value(value: &Value, put: impl FnOnce(Val<'_>)) {
    match value {
        Value::Str(text) => put(Val::Text(text)),
        Value::Shared(text) => put(Val::Shared(text)),
        Value::Int(n) => put(Val::Int(*n)),
        Value::F64(n) => put(Val::F64(*n)),
        Value::Bool(b) => put(Val::Bool(*b)),
        Value::StrList(texts) => {
            let names: Vec<Arc<str>> = texts.iter().map(|t| Arc::from(&**t)).collect();
            put(Val::Names(&names));
        }
        Value::F64List(numbers) => put(Val::F64s(numbers)),
    }
}
