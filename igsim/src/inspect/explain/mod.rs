//! Why requests went where they went, read back from the spans of their decisions.
//!
//! At detail 2 a decision has its stages, the best endpoints and the margin; at detail 3 every endpoint of every stage. What would have
//! become of a request elsewhere is known of virtual runs only.

mod text;

use serde::Serialize;
use shared::ids::TraceId;
use shared::trace::{Event, Span, Value};

pub use text::{decisions, summary};

/// One run of a scheduling profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// The profile.
    pub profile: String,
    /// Candidates before the first filter and after the last.
    pub candidates: (u64, u64),
    /// What was known of each candidate; empty below detail 3.
    pub known: Vec<Known>,
    /// The filters in their order.
    pub filters: Vec<Filtered>,
    /// The scorers in their order.
    pub scorers: Vec<Scored>,
    /// The picker's type.
    pub picker: Option<String>,
    /// The best endpoints with their weighted scores, best first, at most five.
    pub top: Vec<(String, f64)>,
    /// Other endpoints as good as the chosen one.
    pub ties: u64,
    /// The chosen endpoint; `None` if no candidate was left.
    pub chosen: Option<String>,
    /// Its weighted score.
    pub score: Option<f64>,
    /// That of the best of the others.
    pub runner_up: Option<f64>,
    /// The difference of the two.
    pub margin: Option<f64>,
    /// Age of the oldest metrics among the candidates, in milliseconds.
    pub metrics_age_ms: Option<f64>,
}

/// What was known of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Known {
    /// The endpoint.
    pub endpoint: String,
    /// Requests in its queue.
    pub waiting: u64,
    /// Requests in its batch.
    pub running: u64,
    /// Used part of its KV cache, 0 to 1.
    pub kv_usage: f64,
    /// Leading blocks of the prompt that it was sent before.
    pub matched_blocks: u64,
    /// Requests sent to it and not over.
    pub in_flight: u64,
    /// Age of its metrics in milliseconds.
    pub metrics_age_ms: Option<f64>,
}

/// What a filter did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Filtered {
    /// The filter's name.
    pub name: String,
    /// Candidates before and after it.
    pub candidates: (u64, u64),
    /// Whom it took out; empty below detail 3.
    pub removed: Vec<String>,
}

/// What a scorer did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scored {
    /// The scorer's name.
    pub name: String,
    /// Its weight.
    pub weight: f64,
    /// The lowest and the highest score.
    pub range: (f64, f64),
    /// The score of each endpoint, and that times the weight; empty below detail 3.
    pub endpoints: Vec<(String, f64, f64)>,
}

/// What would have become of a request on one endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hindsight {
    /// The endpoint.
    pub endpoint: String,
    /// Time to first token in milliseconds; `None` if the endpoint would have refused the request.
    pub ttft_ms: Option<f64>,
    /// Whether the request was sent there.
    pub chosen: bool,
}

/// Why one request went where it went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The trace.
    pub trace_id: String,
    /// Its decisions; a retry or a disaggregated request has more than one.
    pub decisions: Vec<Decision>,
    /// What would have become of it; empty of live runs and below detail 3.
    pub hindsight: Vec<Hindsight>,
    /// Time to first token on the chosen endpoint less the least on any, in milliseconds.
    pub regret_ms: Option<f64>,
}

impl Explanation {
    /// What the spans of one trace say of its decisions; `None` if there was none.
    pub fn of(id: TraceId, spans: &[&Span]) -> Option<Explanation> {
        let mut schedules: Vec<&Span> =
            spans.iter().copied().filter(|s| s.name == "gateway.scheduler.schedule").collect();
        schedules.sort_by_key(|s| (s.start, s.end));
        if schedules.is_empty() {
            return None;
        }
        let root = spans.iter().find(|s| s.name == "gateway.request");
        Some(Explanation {
            trace_id: id.to_string(),
            decisions: schedules.iter().map(|s| decision(s, spans)).collect(),
            hindsight: root.map(|r| events(r, "gateway.hindsight").map(hindsight).collect()).unwrap_or_default(),
            regret_ms: root.and_then(|r| r.get("gateway.hindsight.regret_ms")?.as_f64()),
        })
    }
}

fn decision(schedule: &Span, spans: &[&Span]) -> Decision {
    let mut stages: Vec<&Span> = spans.iter().copied().filter(|s| s.parent == Some(schedule.span_id)).collect();
    stages.sort_by_key(|s| (s.start, s.end));
    let named = |name: &'static str| stages.iter().copied().filter(move |s| s.name == name);
    let pick = named("gateway.scheduler.pick").next();
    Decision {
        profile: text(schedule, "gateway.scheduler.profile"),
        candidates: (
            count(schedule, "gateway.scheduler.candidates.initial"),
            count(schedule, "gateway.scheduler.candidates.after_filter"),
        ),
        known: events(schedule, "gateway.scheduler.candidate").map(known).collect(),
        filters: named("gateway.scheduler.filter").map(filtered).collect(),
        scorers: named("gateway.scheduler.score").map(scored).collect(),
        picker: pick.map(|p| text(p, "gateway.scheduler.picker.type")),
        top: pick.map(top).unwrap_or_default(),
        ties: pick.map_or(0, |p| count(p, "gateway.scheduler.picker.ties")),
        chosen: schedule.get("gateway.scheduler.selected.endpoint").and_then(Value::as_str).map(str::to_owned),
        score: number(schedule, "gateway.scheduler.selected.score"),
        runner_up: number(schedule, "gateway.scheduler.runner_up.score"),
        margin: number(schedule, "gateway.scheduler.margin"),
        metrics_age_ms: number(schedule, "gateway.scheduler.metrics_age_ms"),
    }
}

fn filtered(span: &Span) -> Filtered {
    Filtered {
        name: text(span, "gateway.scheduler.filter.name"),
        candidates: (
            count(span, "gateway.scheduler.filter.candidates_in"),
            count(span, "gateway.scheduler.filter.candidates_out"),
        ),
        removed: events(span, "gateway.scheduler.rejected").map(endpoint).collect(),
    }
}

fn scored(span: &Span) -> Scored {
    let each = events(span, "gateway.scheduler.endpoint_score").map(|e| {
        let value = |key| of(e, key).and_then(Value::as_f64).unwrap_or_default();
        (endpoint(e), value("gateway.scheduler.endpoint.score"), value("gateway.scheduler.endpoint.weighted"))
    });
    let value = |key| number(span, key).unwrap_or_default();
    Scored {
        name: text(span, "gateway.scheduler.scorer.name"),
        weight: value("gateway.scheduler.scorer.weight"),
        range: (value("gateway.scheduler.score.min"), value("gateway.scheduler.score.max")),
        endpoints: each.collect(),
    }
}

fn top(pick: &Span) -> Vec<(String, f64)> {
    let names = match pick.get("gateway.scheduler.picker.top_endpoints") {
        Some(Value::StrList(names)) => names.as_slice(),
        _ => &[],
    };
    let scores = match pick.get("gateway.scheduler.picker.top_scores") {
        Some(Value::F64List(scores)) => scores.as_slice(),
        _ => &[],
    };
    names.iter().map(|n| n.to_string()).zip(scores.iter().copied()).collect()
}

fn known(event: &Event) -> Known {
    let number = |key| of(event, key).and_then(Value::as_f64);
    let count = |key| number(key).unwrap_or_default() as u64;
    Known {
        endpoint: endpoint(event),
        waiting: count("gateway.scheduler.candidate.waiting"),
        running: count("gateway.scheduler.candidate.running"),
        kv_usage: number("gateway.scheduler.candidate.kv_usage").unwrap_or_default(),
        matched_blocks: count("gateway.scheduler.candidate.matched_blocks"),
        in_flight: count("gateway.scheduler.candidate.in_flight"),
        metrics_age_ms: number("gateway.scheduler.candidate.metrics_age_ms"),
    }
}

fn hindsight(event: &Event) -> Hindsight {
    Hindsight {
        endpoint: endpoint(event),
        ttft_ms: of(event, "gateway.hindsight.time_to_first_token_ms").and_then(Value::as_f64),
        chosen: of(event, "gateway.hindsight.chosen") == Some(&Value::Bool(true)),
    }
}

fn events<'a>(span: &'a Span, name: &'static str) -> impl Iterator<Item = &'a Event> {
    span.events.iter().filter(move |e| e.name == name)
}

fn of<'a>(event: &'a Event, key: &str) -> Option<&'a Value> {
    event.attrs.iter().find(|(k, _)| k == key).map(|(_, value)| value)
}

fn endpoint(event: &Event) -> String {
    of(event, "gateway.backend.endpoint.name").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn text(span: &Span, key: &str) -> String {
    span.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(span: &Span, key: &str) -> Option<f64> {
    span.get(key).and_then(Value::as_f64)
}

fn count(span: &Span, key: &str) -> u64 {
    span.get(key).and_then(Value::as_int).and_then(|n| u64::try_from(n).ok()).unwrap_or_default()
}
