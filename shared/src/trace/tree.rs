//! Spans as trees: for people on a terminal, and for tests that compare shapes.
//!
//! Children are ordered by start, then name. The form for tests has neither ids nor times, so that it repeats exactly.

use std::collections::HashMap;
use std::fmt::Write;

use crate::ids::{SpanId, TraceId};
use crate::time::Time;
use crate::trace::span::{Attr, Kind, Span, Status, Value};

/// Spans arranged as trees. A span whose parent is not among them is a root.
#[derive(Debug)]
pub struct Forest<'a> {
    spans: &'a [Span],
    /// Indices of roots, ordered by trace of first appearance, then start and name.
    roots: Vec<usize>,
    /// Indices of each span's children.
    children: Vec<Vec<usize>>,
}

/// What the text of a forest shows beside names and kinds.
#[derive(Clone, Copy, Default)]
pub struct Show<'a> {
    /// Attributes, events and links.
    pub details: bool,
    /// Start (since its root) and duration.
    pub times: bool,
    /// The service name of a span.
    pub service: Option<&'a dyn Fn(&Span) -> String>,
}

impl<'a> Forest<'a> {
    /// Arranges `spans`; those of several traces may be mixed.
    pub fn new(spans: &'a [Span]) -> Forest<'a> {
        let mut index: HashMap<(TraceId, SpanId), usize> = HashMap::with_capacity(spans.len());
        let mut seen: HashMap<TraceId, usize> = HashMap::new();
        for (i, span) in spans.iter().enumerate() {
            index.entry((span.trace_id, span.span_id)).or_insert(i);
            let order = seen.len();
            seen.entry(span.trace_id).or_insert(order);
        }
        let mut roots = Vec::new();
        let mut children = vec![Vec::new(); spans.len()];
        for (i, span) in spans.iter().enumerate() {
            let parent = span.parent.and_then(|p| index.get(&(span.trace_id, p)));
            match parent {
                Some(parent) if *parent != i => children[*parent].push(i),
                Some(_) | None => roots.push(i),
            }
        }
        let key = |i: &usize| (spans[*i].start, spans[*i].name.clone());
        children.iter_mut().for_each(|c| c.sort_by_key(key));
        roots.sort_by_key(|i| (seen[&spans[*i].trace_id], key(i)));
        Forest { spans, roots, children }
    }

    /// The roots: one per whole trace, more if spans are missing.
    pub fn roots(&self) -> impl Iterator<Item = &'a Span> + '_ {
        self.roots.iter().map(|i| &self.spans[*i])
    }

    /// Calls `visit(depth, span)` for every span that hangs on a root, parents first.
    pub fn walk(&self, mut visit: impl FnMut(usize, &'a Span)) {
        let mut stack: Vec<_> = self.roots.iter().rev().map(|i| (0, *i)).collect();
        while let Some((depth, i)) = stack.pop() {
            visit(depth, &self.spans[i]);
            stack.extend(self.children[i].iter().rev().map(|c| (depth + 1, *c)));
        }
    }

    /// The trees as indented text.
    pub fn text(&self, show: Show<'_>) -> String {
        let mut out = String::new();
        let mut root_start = Time::ZERO;
        self.walk(|depth, span| {
            if depth == 0 {
                root_start = span.start;
            }
            line(&mut out, depth, span, root_start, show);
        });
        out
    }
}

/// Names, kinds, attributes and events of `spans` as indented text without ids and times: what tests compare.
pub fn outline(spans: &[Span]) -> String {
    Forest::new(spans).text(Show { details: true, ..Show::default() })
}

/// The name of a kind as the registry writes it.
pub const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Internal => "internal",
        Kind::Server => "server",
        Kind::Client => "client",
    }
}

fn line(out: &mut String, depth: usize, span: &Span, root_start: Time, show: Show<'_>) {
    let pad = "  ".repeat(depth);
    // Writing to a string does not fail.
    let _ = write!(out, "{pad}{} ({})", span.name, kind_name(span.kind));
    if let Some(service) = show.service {
        let _ = write!(out, " [{}]", service(span));
    }
    if show.times {
        let _ = write!(out, " +{} {}", span.start - root_start, span.end - span.start);
    }
    if show.details {
        attrs(out, &span.attrs);
    }
    if let Status::Error(message) = &span.status {
        let _ = write!(out, " !error: {message}");
    }
    out.push('\n');
    if show.details {
        for event in &span.events {
            let _ = write!(out, "{pad}  * {}", event.name);
            if show.times {
                let _ = write!(out, " +{}", event.at - root_start);
            }
            attrs(out, &event.attrs);
            out.push('\n');
        }
        for link in &span.links {
            let _ = write!(out, "{pad}  ~ link");
            attrs(out, &link.attrs);
            out.push('\n');
        }
    }
}

fn attrs(out: &mut String, attrs: &[Attr]) {
    for (key, value) in attrs {
        let _ = write!(out, " {key}={}", value_text(value));
    }
}

/// A value as text, without quotes.
pub fn value_text(value: &Value) -> String {
    match value {
        Value::Str(v) => v.to_string(),
        Value::Shared(v) => v.to_string(),
        Value::Int(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::StrList(v) => format!("[{}]", v.join(",")),
        Value::F64List(v) => format!("[{}]", v.iter().map(f64::to_string).collect::<Vec<_>>().join(",")),
    }
}
