//! Links of a trace as text: where its spans point, and which other traces point here.

use std::fmt::Write as _;

use shared::ids::TraceId;
use shared::trace::{Link, Span};

use super::Traces;

/// Lines for each direction; the rest is counted.
const MOST: usize = 10;

/// Writes the links of the trace `id`, if there are any.
pub(super) fn write(traces: &Traces<'_>, id: TraceId, out: &mut String) {
    let own = traces.spans(id);
    let from_here: Vec<(&Span, &Link)> = own.iter().flat_map(|s| s.links.iter().map(|l| (*s, l))).collect();
    list(out, "links to", from_here.iter().map(|(span, link)| to(traces, span, link)));
    let others = traces.set.spans.iter().filter(|s| s.trace_id != id);
    let to_here: Vec<&Span> = others.filter(|s| s.links.iter().any(|l| l.trace_id == id)).collect();
    list(out, "linked from", to_here.iter().map(|span| format!("trace {}  {}", span.trace_id, span.name)));
}

fn list(out: &mut String, title: &str, lines: impl ExactSizeIterator<Item = String>) {
    let all = lines.len();
    for (i, line) in lines.take(MOST).enumerate() {
        let _ = writeln!(out, "{:<12} {line}", if i == 0 { title } else { "" });
    }
    if all > MOST {
        let _ = writeln!(out, "{:<12} ... {} more", "", all - MOST);
    }
}

/// `trace ...  span ...  vllm.engine.request`: a trace that the set does not have is none the worse for it.
fn to(traces: &Traces<'_>, span: &Span, link: &Link) -> String {
    let target = traces.spans(link.trace_id).iter().find(|s| s.span_id == link.span_id);
    let name = target.map_or("(not in this file)", |s| &*s.name);
    format!("trace {}  span {}  {name}  (from {})", link.trace_id, link.span_id, span.name)
}

#[cfg(test)]
mod tests {
    use shared::ids::{InstanceId, SpanId};
    use shared::time::{Anchor, Time};
    use shared::trace::{Kind, Status, TraceSet};

    use super::*;

    fn span(trace: u128, name: &'static str, links: &[u128]) -> Span {
        let link =
            |t: &u128| Link { trace_id: TraceId::new(*t).unwrap(), span_id: SpanId::new(1).unwrap(), attrs: vec![] };
        Span {
            trace_id: TraceId::new(trace).unwrap(),
            span_id: SpanId::new(1).unwrap(),
            parent: None,
            parent_is_remote: false,
            tracestate: None,
            instance: InstanceId(0),
            name: name.into(),
            kind: Kind::Internal,
            start: Time::ZERO,
            end: Time::ZERO,
            attrs: Vec::new(),
            events: Vec::new(),
            links: links.iter().map(link).collect(),
            status: Status::Unset,
        }
    }

    fn links(set: &TraceSet, trace: u128) -> String {
        let mut out = String::new();
        write(&Traces::of(set), TraceId::new(trace).unwrap(), &mut out);
        out
    }

    #[test]
    fn links_are_shown_at_both_ends() {
        let mut set = TraceSet::new(Anchor::VIRTUAL);
        set.spans = vec![span(1, "request", &[]), span(2, "step", &[1, 9])];
        insta::assert_snapshot!(links(&set, 2), @r"
        links to     trace 00000000000000000000000000000001  span 0000000000000001  request  (from step)
                     trace 00000000000000000000000000000009  span 0000000000000001  (not in this file)  (from step)
        ");
        insta::assert_snapshot!(links(&set, 1), @"linked from  trace 00000000000000000000000000000002  step");
        set.spans.extend((0..12).map(|_| span(3, "step", &[1])));
        assert!(links(&set, 1).ends_with("... 3 more\n"));
    }
}
