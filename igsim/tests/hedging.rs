//! Hedging in whole runs: an engine that hangs for a while costs its requests the time of a second attempt, not that of the fault.

mod common;

use common::{Place, assert_whole, by_trace, findings};
use shared::trace::{Span, Status, Value};

/// Two engines, of which one hangs for two seconds while requests come. Answers come in one piece, so no head of one comes early.
const HANG: &str = "\
name: hang
requests: 60
gateway:
  retry: { hedge: { after: 250ms }, budget_min_per_second: 100 }
  profile: { scorers: [], picker: { type: round-robin-picker } }
engines:
  - { count: 1, profile: llama-3.1-8b-h100, faults: [{ kind: hang, at: 500ms, for: 2s }] }
  - { count: 1, profile: llama-3.1-8b-h100 }
workload:
  arrivals: { process: constant, rate: 30 }
  prompt_tokens: 64
  output_tokens: 8
  streaming: 0
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
tracing: { ratio: 1.0, exporters: [file] }
";

fn proxies<'s>(spans: &[&'s Span]) -> Vec<&'s Span> {
    let mut found: Vec<_> = spans.iter().copied().filter(|s| s.name == "gateway.backend.proxy").collect();
    found.sort_by_key(|s| s.start);
    found
}

#[test]
fn nobody_waits_for_an_engine_that_hangs() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        place.write("hang.yaml", HANG);
        let without = ["run", "hang.yaml", "--mode", mode, "--out", "without", "--set", "gateway.retry.hedge=null"];
        place.good(&without);
        place.good(&["run", "hang.yaml", "--mode", mode, "--out", "with"]);
        let (without, with) = (place.report("without"), place.report("with"));
        assert_eq!((without.ok, with.ok), (60, 60), "{mode}");
        assert!(without.e2e_ms.max > 1500.0, "{mode}: {:?}", without.e2e_ms);
        assert!(with.e2e_ms.max < 1000.0, "{mode}: {:?}", with.e2e_ms);
        let set = place.traces("with");
        assert_eq!(findings(&set), [], "{mode}");
        let mut hedged = 0;
        for spans in by_trace(&set).values() {
            assert_whole(spans);
            let attempts = proxies(spans);
            if let [first, second] = attempts[..] {
                hedged += 1;
                assert!(second.start < first.end, "{mode}: they overlap");
                let cancelled = |s: &Span| s.get("gateway.backend.cancelled") == Some(&Value::Bool(true));
                assert_eq!((cancelled(first), cancelled(second)), (true, false), "{mode}");
                assert!(attempts.iter().all(|s| s.status == Status::Unset), "{mode}: {attempts:?}");
                let engines: Vec<_> = spans.iter().filter(|s| s.name == "vllm.engine.request").collect();
                assert_eq!(engines.len(), 2, "{mode}: both engines had it");
            }
        }
        assert!((20..40).contains(&hedged), "{mode}: {hedged} of the requests of two seconds, every other one");
    }
}

#[test]
fn virtual_runs_repeat_to_the_byte() {
    let bytes = || {
        let place = Place::new();
        place.write("hang.yaml", HANG);
        place.good(&[
            "run",
            "hang.yaml",
            "--mode",
            "virtual",
            "--out",
            "out",
            "--set",
            "gateway.retry.hedge.after=p95",
        ]);
        std::fs::read(place.path("out/traces.otlp.jsonl")).expect("the file of traces")
    };
    assert_eq!(bytes(), bytes(), "the same seed, the same bytes (I6)");
}

#[test]
fn hedging_and_disaggregated_prefill_exclude_each_other() {
    let place = Place::new();
    let ran = place.ran(&["validate", &common::scenario("pd"), "--set", "gateway.retry.hedge={after: 1s}"]);
    assert_eq!(ran.code, 2, "{ran:#?}");
    assert!(ran.err.contains("gateway.retry.hedge: found hedging with disaggregated prefill"), "{}", ran.err);
    place.write("hang.yaml", HANG);
    let ran = place.ran(&["validate", "hang.yaml", "--set", "gateway.retry.hedge.after=p99"]);
    assert_eq!(ran.code, 2, "{ran:#?}");
    assert!(ran.err.contains("a duration such as 500ms, or p95"), "{}", ran.err);
}
