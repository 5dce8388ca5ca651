//! Checks on finished traces: shape, times, status, and agreement with the registry.
//!
//! A finding names the trace, the span and the rule. Works on spans of any origin: a run's own, a file, a backend's answer.
//! [`check`] looks at each trace for itself; [`audit`] also at what the set as a whole tells of how traces are handed on.

mod audit;
mod content;
mod llm_d;
mod propagation;
mod rules;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use crate::ids::{SpanId, TraceId};
use crate::time::Dur;
use crate::trace::registry::{Registry, Requirement, is_named};
use crate::trace::set::TraceSet;
use crate::trace::span::{Attr, Kind, Span, Status, Value};
use crate::trace::tree::kind_name;

pub use audit::{AuditOptions, audit};
pub use rules::Rule;

/// What is checked, and how strictly.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions<'a> {
    /// Names, kinds, parents, attributes and events are compared with this, if given.
    pub registry: Option<&'a Registry>,
    /// How far a span may stick out of its parent in another service instance: the difference of their clocks.
    pub clock_tolerance: Dur,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The trace.
    pub trace_id: TraceId,
    /// The span; absent if the trace as a whole is at fault.
    pub span_id: Option<SpanId>,
    /// The span's name, empty without a span.
    pub span: String,
    /// The rule.
    pub rule: Rule,
    /// What was found.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "trace {}", self.trace_id)?;
        if let Some(id) = self.span_id {
            write!(f, " span {id} {}", self.span)?;
        }
        write!(f, ": {}: {}", self.rule.name(), self.detail)
    }
}

/// Checks every trace of `set`, in the order of their ids.
pub fn check(set: &TraceSet, options: &CheckOptions<'_>) -> Vec<Finding> {
    let mut findings = check_all(&set.spans, options, set.flags_known);
    for (trace_id, span_id) in &set.ok_statuses {
        let span = set.spans.iter().find(|s| s.trace_id == *trace_id && s.span_id == *span_id);
        findings.push(Finding {
            trace_id: *trace_id,
            span_id: Some(*span_id),
            span: span.map_or(String::new(), |s| s.name.to_string()),
            rule: Rule::StatusOk,
            detail: "status is Ok".to_owned(),
        });
    }
    findings
}

/// Checks every trace of `spans`, in the order of their ids.
pub fn check_spans(spans: &[Span], options: &CheckOptions<'_>) -> Vec<Finding> {
    check_all(spans, options, true)
}

/// As [`check_spans`]; where no span says whether its parent is remote, any server span may be a local root.
fn check_all(spans: &[Span], options: &CheckOptions<'_>, flags_known: bool) -> Vec<Finding> {
    let mut traces: BTreeMap<TraceId, Vec<&Span>> = BTreeMap::new();
    for span in spans {
        traces.entry(span.trace_id).or_default().push(span);
    }
    let mut findings = Findings(Vec::new());
    for (trace_id, spans) in traces {
        let trace = Trace::new(trace_id, spans, &mut findings);
        trace.shape(flags_known, &mut findings);
        for span in &trace.spans {
            trace.times(span, options, &mut findings);
            contents(span, options.registry, &mut findings);
            if let Some(registry) = options.registry {
                trace.registered(span, registry, &mut findings);
            }
        }
    }
    findings.0
}

/// Whether a span may outlive its parent: marked `late`, for work after a disconnect.
pub fn is_late(span: &Span) -> bool {
    let marked = |(key, value): &Attr| (key == "late" || key.ends_with(".late")) && *value == Value::Bool(true);
    span.attrs.iter().any(marked)
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, span: &Span, rule: Rule, detail: impl Into<String>) {
        let (trace_id, span_id) = (span.trace_id, Some(span.span_id));
        self.0.push(Finding { trace_id, span_id, span: span.name.to_string(), rule, detail: detail.into() });
    }
}

struct Trace<'a> {
    trace_id: TraceId,
    spans: Vec<&'a Span>,
    by_id: HashMap<SpanId, &'a Span>,
}

impl<'a> Trace<'a> {
    fn new(trace_id: TraceId, spans: Vec<&'a Span>, findings: &mut Findings) -> Trace<'a> {
        let mut by_id = HashMap::with_capacity(spans.len());
        for &span in &spans {
            if let Some(other) = by_id.insert(span.span_id, span) {
                findings.add(span, Rule::UniqueId, format!("`{}` has the same id", other.name));
            }
        }
        Trace { trace_id, spans, by_id }
    }

    fn parent(&self, span: &Span) -> Option<&'a Span> {
        self.by_id.get(&span.parent?).copied()
    }

    fn shape(&self, flags_known: bool, findings: &mut Findings) {
        let mut roots = 0;
        for span in &self.spans {
            match (span.parent, self.parent(span)) {
                (None, _) => roots += 1,
                (Some(_), Some(_)) => {}
                (Some(_), None) if span.kind == Kind::Server && (span.parent_is_remote || !flags_known) => roots += 1,
                (Some(parent), None) => findings.add(span, Rule::Orphan, format!("parent {parent} is missing")),
            }
        }
        if roots != 1 {
            findings.0.push(Finding {
                trace_id: self.trace_id,
                span_id: None,
                span: String::new(),
                rule: Rule::OneRoot,
                detail: format!("{roots} roots among {} spans", self.spans.len()),
            });
        }
        self.cycles(findings);
    }

    fn cycles(&self, findings: &mut Findings) {
        // Spans known to lead to a root or to a missing parent; every span is walked once.
        let mut sound: HashSet<SpanId> = HashSet::new();
        for &span in &self.spans {
            let mut path = HashSet::new();
            let mut at = Some(span);
            while let Some(here) = at.filter(|s| !sound.contains(&s.span_id)) {
                if !path.insert(here.span_id) {
                    findings.add(here, Rule::Cycle, "is its own ancestor");
                    break;
                }
                at = self.parent(here);
            }
            sound.extend(path);
        }
    }

    fn times(&self, span: &Span, options: &CheckOptions<'_>, findings: &mut Findings) {
        if span.end < span.start {
            findings.add(span, Rule::Times, format!("ends {} before its start", span.start - span.end));
        }
        for event in span.events.iter().filter(|e| e.at < span.start || e.at > span.end) {
            findings.add(span, Rule::Times, format!("event `{}` lies outside", event.name));
        }
        let Some(parent) = self.parent(span).filter(|_| !is_late(span)) else { return };
        let foreign = parent.instance != span.instance;
        if !foreign && span.start >= parent.end && span.end > parent.end {
            let gap = span.start - parent.end;
            findings.add(span, Rule::EndedParent, format!("starts {gap} after its parent `{}` ended", parent.name));
            return;
        }
        let tolerance = if foreign { options.clock_tolerance } else { Dur::ZERO };
        let before = parent.start.since(span.start);
        let after = span.end.since(parent.end);
        // Another clock moves a span as a whole.
        let fits = span.end.since(span.start) <= parent.end.since(parent.start);
        let moved = foreign && fits && (before > tolerance) != (after > tolerance);
        let rule = if moved { Rule::ClockSkew } else { Rule::Nesting };
        for (stick_out, side) in [(before, "starts"), (after, "ends")] {
            if stick_out > tolerance {
                let side_of = if side == "starts" { "before" } else { "after" };
                findings.add(span, rule, format!("{side} {stick_out} {side_of} its parent `{}`", parent.name));
            }
        }
    }

    fn registered(&self, span: &Span, registry: &Registry, findings: &mut Findings) {
        let Some(def) = registry.span(&span.name) else {
            findings.add(span, Rule::Name, "is not registered");
            return;
        };
        if !def.kinds.contains(&span.kind) {
            findings.add(span, Rule::KindOfSpan, format!("is {}", kind_name(span.kind)));
        }
        if let Some(parent) = self.parent(span)
            && !def.parents.is_empty()
            && !def.parents.iter().any(|p| is_named(p, &parent.name))
        {
            findings.add(span, Rule::Parent, format!("hangs on `{}`", parent.name));
        }
        attributes(span, "", &span.attrs, &def.attributes, registry, findings);
        for event in &span.events {
            match registry.events.get(&*event.name).filter(|_| def.events.contains(&*event.name)) {
                None => findings.add(span, Rule::Event, format!("event `{}` is not registered for it", event.name)),
                Some(def) => {
                    let place = format!("event `{}`: ", event.name);
                    attributes(span, &place, &event.attrs, &def.attributes, registry, findings);
                }
            }
        }
    }
}

/// Rules that need no other span.
fn contents(span: &Span, registry: Option<&Registry>, findings: &mut Findings) {
    // Spans with others' names need not say what went wrong.
    let tells = registry.and_then(|r| r.span(&span.name)).is_none_or(|def| def.attributes.contains_key("error.type"));
    if let (Status::Error(_), None, true) = (&span.status, span.get("error.type"), tells) {
        findings.add(span, Rule::ErrorType, "failed without `error.type`");
    }
    let lists = std::iter::once(&span.attrs).chain(span.events.iter().map(|e| &e.attrs));
    for list in lists {
        let mut seen = HashSet::new();
        for (key, _) in list.iter().filter(|(key, _)| !seen.insert(key)) {
            findings.add(span, Rule::DuplicateKey, format!("`{key}` occurs twice"));
        }
    }
}

fn attributes(
    span: &Span,
    place: &str,
    attrs: &[Attr],
    allowed: &BTreeMap<String, Requirement>,
    registry: &Registry,
    findings: &mut Findings,
) {
    for (key, value) in attrs {
        match registry.attributes.get(&**key).filter(|_| allowed.contains_key(&**key)) {
            None => findings.add(span, Rule::Attribute, format!("{place}`{key}` is not registered for it")),
            Some(def) if !def.kind.accepts(value) => {
                findings.add(span, Rule::AttributeType, format!("{place}`{key}` has a value of the wrong type"));
            }
            Some(_) => {}
        }
    }
    let required = allowed.iter().filter(|(_, requirement)| **requirement == Requirement::Required);
    for (key, _) in required.filter(|(key, _)| !attrs.iter().any(|(k, _)| k == *key)) {
        findings.add(span, Rule::Required, format!("{place}`{key}` is missing"));
    }
}
