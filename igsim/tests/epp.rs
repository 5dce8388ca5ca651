//! llm-d's own configuration files drive runs, in both modes.

mod common;

use std::collections::BTreeSet;

use common::{Place, assert_whole, by_trace, findings, library, scenario};
use shared::trace::Span;

const FEW: [&str; 8] = [
    "--set",
    "requests=30",
    "--set",
    "workload.arrivals.rate=60",
    "--set",
    "listen={gateway: '127.0.0.1:0', engines: '127.0.0.1:0'}",
    "--out",
    "out",
];

/// Runs a scenario of `scenarios/epp` and hands each of its traces to `look`.
fn runs(name: &str, mode: &str, mut look: impl FnMut(&[&Span])) {
    let place = Place::new();
    let file = scenario(&format!("epp/{name}"));
    place.good(&[["run", &file, "--mode", mode].as_slice(), &FEW].concat());
    let traces = place.traces("out");
    assert_eq!(findings(&traces), []);
    let by_trace = by_trace(&traces);
    assert_eq!(by_trace.len(), 30);
    for spans in by_trace.values() {
        assert_whole(spans);
        look(spans);
    }
}

fn named<'s>(spans: &[&'s Span], name: &str) -> Vec<&'s Span> {
    spans.iter().copied().filter(|s| s.name == name).collect()
}

fn text(span: &Span, key: &str) -> Option<String> {
    span.get(key)?.as_str().map(str::to_owned)
}

#[test]
fn optimized_baseline_scores_by_four() {
    for mode in ["virtual", "live"] {
        runs("optimized-baseline", mode, |spans| {
            let scorers: Vec<_> = named(spans, "gateway.scheduler.score")
                .iter()
                .filter_map(|s| text(s, "gateway.scheduler.scorer.type"))
                .collect();
            let expect = ["queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "no-hit-lru-scorer"];
            assert_eq!(scorers, expect, "{mode}");
        });
    }
}

#[test]
fn sim_pd_decides_for_every_request() {
    for mode in ["virtual", "live"] {
        let mut decisions = BTreeSet::new();
        runs("sim-pd", mode, |spans| {
            let decided = named(spans, "gateway.pd.decide");
            let [decided] = decided[..] else { panic!("{mode}: {} decisions", decided.len()) };
            let decision = text(decided, "gateway.pd.decision").unwrap();
            let prefill = text(decided, "gateway.pd.prefill_endpoint.name");
            let profiles: Vec<_> = named(spans, "gateway.scheduler.schedule")
                .iter()
                .filter_map(|s| text(s, "gateway.scheduler.profile"))
                .collect();
            if decision == "disaggregate" {
                assert_eq!(profiles, ["decode", "prefill"], "{mode}");
                assert!(matches!(prefill.as_deref(), Some("engine-0" | "engine-1")), "{prefill:?} prefills");
            } else {
                assert_eq!((profiles, prefill), (vec!["decode".to_owned()], None), "{mode}");
            }
            // The sidecar in front of the engine that decodes does what the gateway decided.
            let reason = text(named(spans, "pd_proxy.request")[0], "pd_proxy.reason");
            let elsewhere = decision == "disaggregate";
            let expect = if elsewhere { "prefill_header" } else { "no_prefill_header" };
            assert_eq!(reason.as_deref(), Some(expect), "{mode}");
            assert_eq!(named(spans, "vllm.kv_cache.transfer").len(), if elsewhere { 2 } else { 0 }, "{mode}");
            let served = named(spans, "gateway.backend.proxy")[0];
            let served = text(served, "gateway.backend.endpoint.name").unwrap();
            assert!(["engine-2", "engine-3"].contains(&served.as_str()), "{served} decodes");
            decisions.insert(decision);
        });
        assert!(decisions.contains("disaggregate"), "{mode}: {decisions:?}");
    }
}

/// The resolved scenario says what the file said, and needs it no more.
#[test]
fn the_resolved_scenario_runs_without_the_file() {
    let place = Place::new();
    let file = scenario("epp/sim-pd");
    let run = |file: &str, out: &str| {
        place.good(&["run", file, "--set", "requests=20", "--out", out]);
        std::fs::read(place.path(out).join("traces.otlp.jsonl")).unwrap()
    };
    let first = run(&file, "first");
    let resolved = place.path("first").join("scenario.yaml");
    let text = std::fs::read_to_string(&resolved).unwrap();
    assert!(!text.contains("epp_config") && text.contains("nonCachedTokens: 16"), "{text}");
    assert_eq!(run(&resolved.display().to_string(), "second"), first, "the same seed, the same bytes (I6)");
}

#[test]
fn what_is_wrong_with_the_file_is_told_by_the_file() {
    let place = Place::new();
    place.write("bad.yaml", &format!("{}gateway: {{ epp_config: bad.epp.yaml }}\n", common::TINY));
    let head = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";
    place.write(
        "bad.epp.yaml",
        &format!("{head}plugins: [{{type: queue-scorer}}, {{type: topology-affinity-scorer}}]\n"),
    );
    let refused = place.ran(&["validate", "bad.yaml"]);
    assert_eq!(refused.code, 2, "{refused:#?}");
    assert!(refused.err.contains("bad.epp.yaml: plugins[1].type: found \"topology-affinity-scorer\""), "{refused:#?}");
    assert!(refused.err.contains("--allow-unsupported"), "{refused:#?}");
    let allowed = place.good(&["validate", "bad.yaml", "--allow-unsupported"]);
    assert!(allowed.err.contains("warning: plugins[1].type: \"topology-affinity-scorer\""), "{allowed:#?}");
    let beside = place.ran(&["validate", "bad.yaml", "--set", "gateway.prefix.auto_tune=false"]);
    assert!(beside.err.contains("a section beside epp_config"), "{beside:#?}");
    let other = library().join("epp/sim-pd.epp.yaml").display().to_string();
    place.good(&["validate", "bad.yaml", "--set", &format!("gateway.epp_config={other}")]);
}
