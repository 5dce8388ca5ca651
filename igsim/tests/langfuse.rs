//! Traces as Langfuse's OTLP endpoint reads them: one generation each, with its usage, cost and first token counted once.
//!
//! The rules are those of Langfuse 4.16's `OtelIngestionProcessor.ts`, written down in docs/langfuse.md and once more here.

mod common;

use std::collections::BTreeMap;

use common::{Place, by_trace, scenario};
use serde_json::Value as Json;
use shared::trace::langfuse::iso8601;
use shared::trace::{Span, TraceSet, Value};

/// A span as an observation.
#[derive(Debug, PartialEq)]
struct Observation {
    kind: &'static str,
    model: Option<String>,
    usage: BTreeMap<String, f64>,
    cost: BTreeMap<String, f64>,
    completion_start: Option<String>,
    parameters: Json,
}

fn text(span: &Span, key: &str) -> Option<String> {
    span.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn json(span: &Span, key: &str) -> Option<Json> {
    text(span, key).map(|t| serde_json::from_str(&t).unwrap_or_else(|e| panic!("{key}: {e}: {t}")))
}

fn numbers(json: Option<Json>) -> Option<BTreeMap<String, f64>> {
    let Json::Object(members) = json? else { panic!("no object") };
    Some(members.into_iter().map(|(key, value)| (key, value.as_f64().expect("a number"))).collect())
}

/// What Langfuse makes of a span.
fn observed(span: &Span) -> Observation {
    const MODELS: [&str; 3] = ["gen_ai.request.model", "gen_ai.response.model", "model"];
    const GENERATE: [&str; 5] = ["chat", "completion", "text_completion", "generate_content", "generate"];
    let asked = text(span, "langfuse.observation.type");
    let operation = text(span, "gen_ai.operation.name");
    let kind = match (asked.as_deref(), operation.as_deref()) {
        (Some("generation"), _) => "generation",
        (Some("span"), _) => "span",
        (Some(other), _) => panic!("{other}: no type that is used here"),
        (None, Some(operation)) if GENERATE.contains(&operation) => "generation",
        (None, _) if MODELS.iter().any(|key| span.get(key).is_some()) => "generation",
        (None, _) => "span",
    };
    let model = text(span, "gen_ai.response.model").or_else(|| text(span, "gen_ai.request.model"));
    Observation {
        kind,
        model,
        usage: numbers(json(span, "langfuse.observation.usage_details")).unwrap_or_default(),
        cost: numbers(json(span, "langfuse.observation.cost_details")).unwrap_or_default(),
        completion_start: text(span, "langfuse.observation.completion_start_time"),
        parameters: json(span, "langfuse.observation.model.parameters").unwrap_or_default(),
    }
}

/// The generations of every trace.
fn generations(set: &TraceSet) -> Vec<Vec<(&Span, Observation)>> {
    let of = |spans: &Vec<&'_ Span>| spans.iter().map(|s| observed(s)).collect::<Vec<_>>();
    by_trace(set)
        .values()
        .map(|spans| spans.iter().copied().zip(of(spans)).filter(|(_, o)| o.kind == "generation").collect())
        .collect()
}

const PRICES: &str = "prices:\n  meta-llama/Llama-3.1-8B-Instruct: { input: 0.1, output: 0.3, cached_input: 0.05 }\n  '*': { input: 1, output: 3, cached_input: 0.5 }\n";

/// Runs `scenario` in virtual time for Langfuse; its traces.
fn ran(place: &Place, scenario: &str, more: &[&str]) -> TraceSet {
    place.write("prices.yaml", PRICES);
    let args = ["run", scenario, "--mode", "virtual", "--sampling", "1", "--out", "out"];
    let set = ["--set", "tracing.langfuse=true", "--set", "tracing.prices=prices.yaml"];
    let ran = place.ran(&[&args[..], &set, more].concat());
    assert_eq!(ran.code, 0, "{ran:#?}");
    place.traces("out")
}

#[test]
fn a_trace_has_one_generation_with_usage_cost_and_first_token() {
    let place = Place::with_tiny();
    let set = ran(&place, "tiny.yaml", &[]);
    let traces = generations(&set);
    assert_eq!(traces.len(), 12);
    for generations in traces {
        let [(span, observation)] = &generations[..] else { panic!("{generations:#?}") };
        assert_eq!(span.name, "vllm.engine.request");
        let int = |key: &str| span.get(key).and_then(Value::as_int).unwrap_or_else(|| panic!("{key}"));
        let (prompt, output) = (int("gen_ai.usage.input_tokens") as f64, int("gen_ai.usage.output_tokens") as f64);
        let cached = int("vllm.kv_cache.cached_tokens") as f64;
        let expect = [
            ("input", prompt - cached),
            ("input_cached_tokens", cached),
            ("output", output),
            ("total", prompt + output),
        ];
        assert_eq!(observation.usage, expect.map(|(k, v)| (k.to_owned(), v)).into());
        let total: f64 = ["input", "input_cached_tokens", "output"].iter().map(|k| observation.cost[*k]).sum();
        let price = if observation.model.as_deref() == Some("meta-llama/Llama-3.1-8B-Instruct") { 0.1 } else { 1.0 };
        let expect = ((prompt - cached) * price + cached * price / 2.0 + output * price * 3.0) / 1e6;
        assert!((observation.cost["total"] - expect).abs() < 1e-12 && (total - expect).abs() < 1e-12);
        let first = span.get("gen_ai.latency.time_to_first_token");
        let Some(Value::F64(first)) = first else { panic!("{first:?}") };
        let first = set.anchor.unix_nanos(span.start) + (first * 1e9).round() as u64;
        assert_eq!(observation.completion_start, Some(iso8601(first)));
        assert_eq!(observation.parameters["max_tokens"], 4);
    }
    let roots: Vec<_> = set.spans.iter().filter(|s| s.name == "gateway.request").collect();
    assert!(roots.iter().all(|s| text(s, "langfuse.trace.name").is_some_and(|n| n.starts_with("chat "))), "{roots:#?}");
}

#[test]
fn with_prefill_and_decode_apart_the_decode_is_the_generation() {
    let place = Place::new();
    let set = ran(&place, &scenario("pd"), &["--set", "expectations={}", "--set", "requests=20"]);
    let engines = |spans: &[&Span]| spans.iter().filter(|s| s.name == "vllm.engine.request").count();
    let traces = by_trace(&set);
    assert!(traces.values().any(|spans| engines(spans) == 2), "prefilled elsewhere");
    for (generations, spans) in generations(&set).iter().zip(traces.values()) {
        assert_eq!(generations.len(), 1, "{spans:#?}");
        if engines(spans) == 2 {
            // The one that decodes works after the other one.
            let last = spans.iter().filter(|s| s.name == "vllm.engine.request").max_by_key(|s| s.start).unwrap();
            assert_eq!(generations[0].0.span_id, last.span_id);
        }
    }
}

#[test]
fn nothing_is_said_to_langfuse_unless_it_is_asked_for() {
    let place = Place::with_tiny();
    let ran = place.ran(&["run", "tiny.yaml", "--mode", "virtual", "--out", "out"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let keys: Vec<_> = place.traces("out").spans.iter().flat_map(|s| s.attrs.clone()).map(|(key, _)| key).collect();
    let told: std::collections::BTreeSet<_> = keys.iter().filter(|k| k.starts_with("langfuse.")).collect();
    assert_eq!(told.into_iter().map(|k| &**k).collect::<Vec<_>>(), ["langfuse.observation.type"]);
}

#[test]
fn a_table_that_is_none_is_refused_before_anything_runs() {
    let place = Place::with_tiny();
    place.write("prices.yaml", "prices: { m: { input: -1, output: 2 } }");
    let ran = place.ran(&["run", "tiny.yaml", "--mode", "virtual", "--set", "tracing.prices=prices.yaml"]);
    assert_eq!(ran.code, 2, "{ran:#?}");
    assert!(ran.err.contains("prices.m.input") && ran.err.contains("dollars per million tokens"), "{}", ran.err);
    assert_eq!(place.names(), ["prices.yaml", "tiny.yaml"]);
}
