//! The questions of the library, asked of the spans themselves.

use std::collections::BTreeMap;

use shared::ids::{SpanId, TraceId};
use shared::trace::{Kind, Span, Status, TraceSet, Value};

use crate::common::tempo::Server;

/// A run whose traces Tempo has.
pub(crate) struct Sent {
    /// The run.
    pub(crate) name: String,
    /// Its spans, as Tempo has them.
    pub(crate) set: TraceSet,
    /// The condition that tells them from others.
    pub(crate) only: String,
    by_trace: BTreeMap<TraceId, Vec<usize>>,
    /// Places of spans in the set.
    pub(crate) by_id: BTreeMap<(TraceId, SpanId), usize>,
}

impl Sent {
    pub(crate) fn new(server: &Server, name: String, set: TraceSet) -> Sent {
        let (set, only) = server.take(set);
        let mut by_trace: BTreeMap<TraceId, Vec<usize>> = BTreeMap::new();
        let mut by_id = BTreeMap::new();
        for (i, span) in set.spans.iter().enumerate() {
            by_trace.entry(span.trace_id).or_default().push(i);
            by_id.insert((span.trace_id, span.span_id), i);
        }
        Sent { name, set, only, by_trace, by_id }
    }

    fn trace_of(&self, span: &Span) -> impl Iterator<Item = &Span> {
        self.by_trace[&span.trace_id].iter().map(|i| &self.set.spans[*i])
    }

    fn ancestors(&self, span: &Span) -> Vec<&Span> {
        let mut found = Vec::new();
        let mut parent = span.parent;
        while let Some(i) = parent.and_then(|p| self.by_id.get(&(span.trace_id, p))) {
            found.push(&self.set.spans[*i]);
            parent = self.set.spans[*i].parent;
        }
        found
    }

    fn has_below(&self, span: &Span, is: impl Fn(&Span) -> bool) -> bool {
        self.trace_of(span).any(|s| is(s) && self.ancestors(s).iter().any(|a| a.span_id == span.span_id))
    }

    fn instance(&self, span: &Span) -> String {
        self.set.resource(span.instance).map_or(String::new(), |r| r.instance_id.clone())
    }
}

fn text<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    span.get(key).and_then(Value::as_str)
}

fn number(span: &Span, key: &str) -> Option<f64> {
    span.get(key).and_then(Value::as_f64)
}

fn over(span: &Span, key: &str, bound: f64) -> bool {
    number(span, key).is_some_and(|n| n > bound)
}

fn has_event(span: &Span, name: &str) -> bool {
    span.events.iter().any(|e| e.name == name)
}

fn millis(span: &Span) -> f64 {
    (span.end - span.start).as_millis_f64()
}

fn failed(span: &Span) -> bool {
    matches!(span.status, Status::Error(_))
}

/// Stages in which time passes.
const STAGES: [&str; 4] =
    ["gateway.flowcontrol.dispatch", "vllm.engine.queue", "vllm.executor.execute_model", "vllm.kv_cache.transfer"];

/// Whether `query`, with its defaults, is about `span`: the question again, asked of the spans. `trace` is what `engine-steps` is
/// asked about.
pub(crate) fn matches(query: &str, sent: &Sent, s: &Span, trace: TraceId) -> bool {
    let is = |name: &str| s.name == name;
    match query {
        "slow-requests" => {
            let slow = |s: &Span| s.name == "gateway.request" && millis(s) > 400.0;
            let stage = |s: &Span| STAGES.contains(&&*s.name);
            slow(s) && sent.has_below(s, stage) || stage(s) && sent.ancestors(s).into_iter().any(slow)
        }
        "one-request" => text(s, "gateway.request.id") == Some("req-7"),
        "slow-first-token" => is("vllm.engine.request") && over(s, "gen_ai.latency.time_to_first_token", 0.022),
        "slow-for-callers" => is("gateway.request") && over(s, "gateway.response.time_to_first_token_ms", 1000.0),
        "flow-control-wait" => is("gateway.flowcontrol.dispatch") && over(s, "gateway.queue.wait_ms", 1000.0),
        "gave-up-waiting" => {
            is("gateway.flowcontrol.dispatch") && text(s, "gateway.flow_control.result") != Some("dispatched")
        }
        "rejected" => {
            is("gateway.director.handle_request") && text(s, "gateway.admission.reason") == Some("rejected-saturated")
        }
        "stale-metrics" => is("gateway.scheduler.schedule") && over(s, "gateway.scheduler.metrics_age_ms", 100.0),
        "scrape-failures" => {
            is("gateway.metrics.collect") && s.get("gateway.metrics.success") == Some(&Value::Bool(false))
        }
        "left-out" => {
            is("gateway.scheduler.filter")
                && over(s, "gateway.scheduler.filter.rejected_count", 0.0)
                && text(s, "gateway.scheduler.filter.name") == Some("healthy-filter")
        }
        "close-calls" => {
            is("gateway.scheduler.schedule")
                && number(s, "gateway.scheduler.margin").is_some_and(|m| (0.0..0.05).contains(&m))
                && over(s, "gateway.scheduler.candidates.after_filter", 1.0)
        }
        "ties" => is("gateway.scheduler.pick") && over(s, "gateway.scheduler.picker.ties", 0.0),
        "sticky-misses" => {
            let session = |s: &&Span| s.name == "gateway.request" && s.get("session.id").is_some();
            is("vllm.engine.request")
                && over(s, "gen_ai.usage.input_tokens", 1024.0)
                && number(s, "vllm.kv_cache.cached_tokens").is_some_and(|n| n < 512.0)
                && sent.ancestors(s).iter().any(session)
        }
        "broken-promises" => {
            let promise = |s: &Span| {
                s.name == "gateway.scheduler.score"
                    && text(s, "gateway.scheduler.scorer.type") == Some("prefix-cache-scorer")
                    && over(s, "gateway.scheduler.score.max", 0.3)
            };
            let broken =
                |s: &Span| s.name == "vllm.engine.request" && number(s, "vllm.kv_cache.cached_tokens") == Some(0.0);
            promise(s) && sent.trace_of(s).any(broken) || broken(s) && sent.trace_of(s).any(promise)
        }
        "index-misses" => {
            is("kvcache.manager.get_scores")
                && over(s, "llm_d.kv_cache.block_keys.count", 0.0)
                && number(s, "llm_d.kv_cache.block_hit_ratio").is_some_and(|r| r < 0.5)
        }
        "prefilled-elsewhere" => {
            is("gateway.pd.decide")
                && text(s, "gateway.pd.decision") == Some("disaggregate")
                && over(s, "gateway.pd.uncached_tokens", 512.0)
        }
        "sidecar-overhead" => is("pd_proxy.request") && over(s, "pd_proxy.coordination_ms", 0.001),
        "slow-transfers" => is("vllm.kv_cache.transfer") && s.kind == Kind::Client && millis(s) > 2.0,
        "retries" => is("gateway.backend.proxy") && over(s, "http.request.resend_count", 0.0),
        "retries-refused" => is("gateway.request") && has_event(s, "gateway.retry_refused"),
        "broken-streams" => {
            is("gateway.response.process") && s.get("gateway.response.complete") == Some(&Value::Bool(false))
        }
        "client-disconnects" => is("gateway.request") && has_event(s, "gateway.client_disconnected"),
        "work-after-the-caller-left" => is("vllm.engine.request") && s.get("vllm.late") == Some(&Value::Bool(true)),
        "abandoned" => text(s, "error.type") == Some("abandoned"),
        "injected-faults" => is("vllm.engine.request") && has_event(s, "vllm.fault_injected"),
        "engine-queue" => is("vllm.engine.queue") && millis(s) > 100.0,
        "preempted" => is("vllm.engine.request") && over(s, "vllm.request.preemptions", 0.0),
        "evictions" => is("vllm.scheduler.allocate_blocks") && over(s, "vllm.allocation.blocks_evicted", 0.0),
        "prefill-chunks" => {
            let chunk = |s: &&Span| {
                s.name == "vllm.executor.execute_model" && text(s, "vllm.executor.phase") == Some("prefill")
            };
            chunk(&s) && sent.trace_of(s).filter(chunk).count() > 1
        }
        "slow-decode" => is("vllm.executor.execute_model") && over(s, "vllm.token_latency.p99_ms", 12.0),
        "engine-steps" => is("vllm.engine.step") && s.links.iter().any(|l| l.trace_id == trace),
        "cut-records" => {
            let keys = ["gateway.record.facts_cut", "vllm.record.facts_cut", "pd_proxy.record.facts_cut"];
            keys.iter().any(|key| over(s, key, 0.0))
        }
        other => panic!("{other}: say here which spans it is about"),
    }
}

/// How a figure is made of the values of a group.
type Summary = fn(&[f64]) -> f64;

/// What a span is grouped by, and its value; nothing if it is not counted.
type Counted = Option<(Vec<String>, f64)>;

/// What `query` groups spans by and what it sums up of them, and how exactly Tempo does.
pub(crate) fn figures(query: &str, sent: &Sent) -> (BTreeMap<Vec<String>, f64>, f64) {
    const EXACT: f64 = 1e-9;
    let count: Summary = |values| values.len() as f64;
    let of = |s: &Span, key: &str| text(s, key).unwrap_or("nil").to_owned();
    let grouped = |summary: Summary, group: &dyn Fn(&Span) -> Counted| {
        let mut groups: BTreeMap<Vec<String>, Vec<f64>> = BTreeMap::new();
        for (labels, value) in sent.set.spans.iter().filter_map(group) {
            groups.entry(labels).or_default().push(value);
        }
        groups.into_iter().map(|(labels, values)| (labels, summary(&values))).collect::<BTreeMap<_, _>>()
    };
    match query {
        "time-by-stage" => {
            let stage = |s: &Span| s.name == "gateway.director.handle_request" || STAGES.contains(&&*s.name);
            let took = |s: &Span| stage(s).then(|| (vec![s.name.to_string()], millis(s) / 1e3));
            (grouped(|values| values.iter().sum(), &took), EXACT)
        }
        "first-token-by-engine" => {
            let took = |s: &Span| {
                let value = number(s, "gen_ai.latency.time_to_first_token").filter(|_| s.name == "vllm.engine.request");
                value.map(|v| (vec![sent.instance(s)], v))
            };
            (grouped(|values| values.iter().sum::<f64>() / values.len() as f64, &took), EXACT)
        }
        "queued-by-flow" => {
            let one = |s: &Span| {
                (s.name == "gateway.flowcontrol.enqueue").then(|| (vec![of(s, "gateway.flow_control.flow_id")], 1.0))
            };
            (grouped(count, &one), EXACT)
        }
        "rejected-by-reason" => {
            let one = |s: &Span| {
                let rejected = text(s, "gateway.admission.result") == Some("rejected");
                rejected.then(|| (vec![of(s, "gateway.admission.reason")], 1.0))
            };
            (grouped(count, &one), EXACT)
        }
        "requests-by-engine" => {
            let one = |s: &Span| {
                (s.name == "gateway.backend.proxy").then(|| (vec![of(s, "gateway.backend.endpoint.name")], 1.0))
            };
            (grouped(count, &one), EXACT)
        }
        "pd-decisions" => {
            let one = |s: &Span| {
                (s.name == "gateway.pd.decide")
                    .then(|| (vec![of(s, "gateway.pd.decision"), of(s, "gateway.pd.reason")], 1.0))
            };
            (grouped(count, &one), EXACT)
        }
        "failed-attempts" => {
            let one = |s: &Span| {
                (s.name == "gateway.backend.proxy" && failed(s))
                    .then(|| (vec![of(s, "gateway.backend.endpoint.name"), of(s, "error.type")], 1.0))
            };
            (grouped(count, &one), EXACT)
        }
        "errors" => {
            let one = |s: &Span| failed(s).then(|| (vec![s.name.to_string(), of(s, "error.type")], 1.0));
            (grouped(count, &one), EXACT)
        }
        "decode-time-by-engine" => {
            let decode = |s: &Span| {
                (text(s, "vllm.executor.phase") == Some("decode")).then(|| (vec![sent.instance(s)], millis(s) / 1e3))
            };
            let mut both = BTreeMap::new();
            for (label, q) in [("0.5", 0.5), ("0.99", 0.99)] {
                let of_quantile: Summary = if q < 0.9 { |v| quantile(v, 0.5) } else { |v| quantile(v, 0.99) };
                for (mut labels, value) in grouped(of_quantile, &decode) {
                    labels.push(label.to_owned());
                    both.insert(labels, value);
                }
            }
            // Buckets are powers of two.
            (both, 1.0)
        }
        other => panic!("{other}: say here what its figures are"),
    }
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((q * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1]
}
