//! Faults of llm-d's own traces that are known, by what its components call their spans (endpoint picker, routing sidecar, vLLM).
//!
//! Names are those of llm-d-router before and after September 2026.

use std::collections::{HashMap, HashSet};

use super::{Finding, Findings, Rule};
use crate::ids::{SpanId, TraceId};
use crate::trace::set::TraceSet;
use crate::trace::span::{Kind, Span, Value};

/// The endpoint picker's span of a whole request.
const ENTRY: [&str; 2] = ["request", "gateway.request"];
/// Server spans inside of a service.
const INNER_SERVERS: [&str; 3] = ["request_orchestration", "gateway.request_orchestration", "forward_request"];
/// An engine's span of a request.
const ENGINE: &str = "llm_request";

/// What is found in traces with llm-d's names.
pub(super) fn find(set: &TraceSet) -> Vec<Finding> {
    let mut findings = Findings::default();
    let by_id: HashMap<(TraceId, SpanId), &Span> = set.spans.iter().map(|s| ((s.trace_id, s.span_id), s)).collect();
    let parent = |span: &Span| span.parent.and_then(|p| by_id.get(&(span.trace_id, p)).copied());
    let disaggregated: HashSet<TraceId> = set.spans.iter().filter(|s| disaggregates(s)).map(|s| s.trace_id).collect();
    let mut entries: HashMap<(TraceId, Option<SpanId>), &Span> = HashMap::new();
    for span in set.spans.iter().filter(|s| ENTRY.contains(&&*s.name) && s.kind == Kind::Server) {
        entries.insert((span.trace_id, span.parent), span);
    }
    let mut prepared: HashMap<TraceId, u32> = HashMap::new();
    for span in &set.spans {
        let above = parent(span);
        if INNER_SERVERS.contains(&&*span.name)
            && span.kind == Kind::Server
            && above.is_some_and(|p| same_service(set, p, span))
        {
            findings.add(span, Rule::LocalServer, "is a server span inside of its service");
        }
        if span.name == "prepare_disaggregation" {
            let seen = prepared.entry(span.trace_id).or_default();
            *seen += 1;
            if *seen == 2 {
                findings.add(span, Rule::Repeated, "stands twice in its trace");
            }
        }
        // Whoever the endpoint picker passes its context to belongs below its span, not beside it.
        let beside = entries.get(&(span.trace_id, span.parent)).filter(|entry| !std::ptr::eq(**entry, span));
        if let Some(entry) = beside.filter(|_| span.parent.is_some() && is_callee(span)) {
            findings.add(span, Rule::Sibling, format!("hangs beside `{}`, not below it", entry.name));
        }
        let direct = above.is_some_and(|p| ENTRY.contains(&&*p.name));
        if span.name == ENGINE && direct && disaggregated.contains(&span.trace_id) {
            findings.add(span, Rule::Untraced, "hangs on the endpoint picker: the sidecar that called it is not seen");
        }
    }
    service_names(set, &mut findings);
    findings.0
}

/// Whether the endpoint picker had another engine prefill.
fn disaggregates(span: &Span) -> bool {
    span.get("llm_d.epp.pd.disaggregation_used") == Some(&Value::Bool(true))
}

/// A sidecar's or an engine's span of a request: otelhttp names the former by method and path.
fn is_callee(span: &Span) -> bool {
    let of_sidecar = span.name.starts_with("llm_d.pd_proxy.") || span.name.starts_with("POST /");
    span.kind == Kind::Server && (of_sidecar || span.name == ENGINE)
}

fn same_service(set: &TraceSet, a: &Span, b: &Span) -> bool {
    a.instance == b.instance
        || (set.service(a.instance) == set.service(b.instance) && !set.service(a.instance).is_empty())
}

/// Services without a name of their own, each at its first span.
fn service_names(set: &TraceSet, findings: &mut Findings) {
    let mut told = HashSet::new();
    for span in &set.spans {
        let name = set.service(span.instance);
        if (name.is_empty() || name.starts_with("unknown_service")) && told.insert(span.instance) {
            findings.add(span, Rule::ServiceName, format!("its service is called {name:?}"));
        }
    }
}
