//! Content in telemetry: canaries, which a test plants where content is, looked for in every text that a span has.
//!
//! What was found is named by its place and never repeated.

use super::{Finding, Rule};
use crate::trace::resource::Resource;
use crate::trace::set::TraceSet;
use crate::trace::span::{Attr, Span, Status};
use crate::trace::tree::value_text;

/// Looks for `canaries` in all spans of `set` and in the resources that emitted them.
pub(super) fn find(set: &TraceSet, canaries: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if canaries.is_empty() {
        return findings;
    }
    let resources: Vec<Vec<Attr>> = set.resources.iter().map(Resource::attributes).collect();
    // A resource is named once, at its first span.
    let mut named = vec![false; resources.len()];
    for span in &set.spans {
        let mut search = Search { canaries, span, findings: &mut findings };
        search.span();
        let instance = usize::from(span.instance.0);
        if let Some(attrs) = resources.get(instance)
            && !std::mem::replace(&mut named[instance], true)
        {
            search.attributes("the resource's", attrs);
        }
    }
    findings
}

struct Search<'a> {
    canaries: &'a [String],
    span: &'a Span,
    findings: &'a mut Vec<Finding>,
}

impl<'a> Search<'a> {
    /// Every text of the span.
    fn span(&mut self) {
        let span = self.span;
        self.text("its name", &span.name);
        self.attributes("its", &span.attrs);
        for event in &span.events {
            self.text("the name of an event", &event.name);
            self.attributes(&format!("the event `{}`'s", self.shown(&event.name)), &event.attrs);
        }
        for link in &span.links {
            self.attributes("a link's", &link.attrs);
        }
        if let Status::Error(message) = &span.status {
            self.text("its status message", message);
        }
        if let Some(state) = &span.tracestate {
            self.text("its trace state", state);
        }
    }

    fn attributes(&mut self, whose: &str, attrs: &'a [Attr]) {
        for (key, value) in attrs {
            self.text(&format!("the key of {whose} attributes"), key);
            self.text(&format!("{whose} attribute `{}`", self.shown(key)), &value_text(value));
        }
    }

    fn text(&mut self, place: &str, text: &str) {
        for (i, _) in self.canaries.iter().enumerate().filter(|(_, canary)| text.contains(canary.as_str())) {
            let span = self.shown(&self.span.name).to_owned();
            let (trace_id, span_id) = (self.span.trace_id, Some(self.span.span_id));
            let detail = format!("canary {} is in {place}", i + 1);
            self.findings.push(Finding { trace_id, span_id, span, rule: Rule::Content, detail });
        }
    }

    /// A name that is repeated unless there is a canary in it.
    fn shown<'n>(&self, name: &'n str) -> &'n str {
        if self.canaries.iter().any(|canary| name.contains(canary.as_str())) { "?" } else { name }
    }
}
