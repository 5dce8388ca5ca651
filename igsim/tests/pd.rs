//! Prefill in one engine and decode in another, through gateway and sidecar, live and in virtual time: one trace, whole.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use common::{Place, Ran, assert_whole, by_trace, findings, scenario};
use shared::trace::{Kind, Span, TraceSet};

const ANY: &str = "listen={gateway: '127.0.0.1:0', engines: '127.0.0.1:0'}";

/// Runs `scenarios/pd.yaml` with further settings.
fn run(place: &Place, mode: &str, set: &[&str]) -> Ran {
    let file = scenario("pd");
    let mut args = vec!["run", &file, "--mode", mode, "--out", "out", "--set", ANY];
    set.iter().for_each(|s| args.extend(["--set", s]));
    place.ran(&args)
}

/// One client, so that nothing depends on who comes first.
const ONE_BY_ONE: [&str; 5] = [
    "requests=4",
    "expectations={}",
    "workload.arrivals={process: closed, concurrency: 1, think_time: 200ms}",
    "workload.prefixes={groups: 1, tokens: 1, share: 0}",
    "workload.prompt_tokens=600",
];

fn named<'s>(spans: &[&'s Span], name: &str) -> Vec<&'s Span> {
    spans.iter().copied().filter(|s| s.name == name).collect()
}

fn text<'s>(span: &'s Span, key: &str) -> &'s str {
    span.get(key).and_then(|v| v.as_str()).unwrap_or_default()
}

/// The tree of a trace: names, kinds and instances, nothing that differs between two runs.
fn tree(set: &TraceSet, spans: &[&Span]) -> String {
    fn write(set: &TraceSet, spans: &[&Span], span: &Span, depth: usize, out: &mut String) {
        let resource = set.resource(span.instance).expect("a resource");
        let (pad, kind) = ("  ".repeat(depth), format!("{:?}", span.kind).to_lowercase());
        let links = if span.links.is_empty() { "" } else { "  linked" };
        let _ = writeln!(out, "{pad}{}  {kind}  {}{links}", span.name, resource.instance_id);
        let mut below: Vec<&&Span> = spans.iter().filter(|s| s.parent == Some(span.span_id)).collect();
        below.sort_by(|a, b| (a.start, &a.name, a.end).cmp(&(b.start, &b.name, b.end)));
        below.into_iter().for_each(|s| write(set, spans, s, depth + 1, out));
    }
    let mut out = String::new();
    let root = spans.iter().find(|s| s.parent.is_none()).expect("a root");
    write(set, spans, root, 0, &mut out);
    out
}

/// The trees of a run, in the order of the requests, by the same names for instances however the gateway chose.
fn trees(place: &Place, mode: &str) -> Vec<String> {
    let ran = run(place, mode, &ONE_BY_ONE);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let set = place.traces("out");
    assert_eq!(findings(&set), []);
    let mut trees: Vec<(String, String)> = Vec::new();
    for spans in by_trace(&set).values() {
        assert_whole(spans);
        let id = text(named(spans, "gateway.request")[0], "gateway.request.id").to_owned();
        let mut tree = tree(&set, spans);
        for (engine, role) in [(0, "prefill"), (1, "prefill"), (2, "decode"), (3, "decode")] {
            tree = tree.replace(&format!("engine-{engine}"), role).replace(&format!("pd-proxy-{engine}"), "pd-proxy");
        }
        trees.push((id, tree));
    }
    trees.sort();
    trees.into_iter().map(|(_, tree)| tree).collect()
}

/// The golden tree is one file for both modes.
#[test]
fn live_and_virtual_runs_give_the_golden_tree() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        let trees = trees(&place, mode);
        assert_eq!(trees.len(), 4);
        let first = &trees[0];
        assert!(first.lines().count() >= 35, "{mode}: {} spans\n{first}", first.lines().count());
        insta::assert_snapshot!("pd_tree", first, "the same tree in both modes");
        assert!(trees.iter().all(|t| t == first), "{mode}: every request takes the same way");
    }
}

#[test]
fn every_hop_has_both_its_ends_and_nothing_hangs_on_what_has_ended() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        let ran = run(&place, mode, &["requests=40", "workload.arrivals.rate=40", "expectations={}"]);
        assert_eq!(ran.code, 0, "{ran:#?}");
        let set = place.traces("out");
        assert_eq!(findings(&set), []);
        let (mut disaggregated, mut passed) = (0, 0);
        for spans in by_trace(&set).values() {
            assert_whole(spans);
            let by_id: BTreeMap<_, _> = spans.iter().map(|s| (s.span_id, *s)).collect();
            let services = |s: &Span| set.resource(s.instance).expect("a resource").instance_id.clone();
            // Where a trace passes from one instance to another, a client's span is above a server's.
            let mut hops = Vec::new();
            for span in spans.iter().filter(|s| s.parent.is_some()) {
                let above = by_id[&span.parent.unwrap()];
                if above.instance != span.instance {
                    assert_eq!((above.kind, span.kind), (Kind::Client, Kind::Server), "{} {}", above.name, span.name);
                    hops.push(format!("{} > {}", above.name, span.name));
                }
                assert!(span.start <= above.end, "{mode}: {} begins after {} ended", span.name, above.name);
            }
            hops.sort();
            let proxy = named(spans, "pd_proxy.request")[0];
            if text(proxy, "pd_proxy.reason") == "no_prefill_header" {
                passed += 1;
                assert_eq!(
                    hops,
                    ["gateway.backend.proxy > pd_proxy.request", "pd_proxy.backend > vllm.engine.request"]
                );
                continue;
            }
            disaggregated += 1;
            let expect = [
                "gateway.backend.proxy > pd_proxy.request",
                "pd_proxy.backend > vllm.engine.request",
                "pd_proxy.backend > vllm.engine.request",
                "vllm.kv_cache.transfer > vllm.kv_cache.transfer",
            ];
            assert_eq!(hops, expect, "{mode}");
            let instances: BTreeSet<_> = spans.iter().map(|s| services(s)).collect();
            assert_eq!(instances.len(), 4, "gateway, sidecar and two engines: {instances:?}");
            let (prefill, decode) = (named(spans, "pd_proxy.prefill")[0], named(spans, "pd_proxy.decode")[0]);
            assert_eq!((prefill.parent, decode.parent), (Some(proxy.span_id), Some(proxy.span_id)), "siblings");
            assert!(prefill.end <= decode.start);
            // The gateway's choice is what the sidecar did.
            let decided = named(spans, "gateway.pd.decide")[0];
            let chosen = text(decided, "gateway.pd.prefill_endpoint.name").to_owned();
            assert!(instances.contains(&chosen), "{chosen} prefilled: {instances:?}");
            // What the engine that decodes did not compute came from the other one.
            let ms = |key: &str| proxy.get(key).and_then(|v| v.as_f64()).unwrap_or_else(|| panic!("no {key}"));
            let (prefill, first, total) =
                (ms("pd_proxy.prefill_ms"), ms("pd_proxy.time_to_first_token_ms"), ms("pd_proxy.total_ms"));
            assert!(prefill < first && first < total, "{mode}: {prefill} {first} {total}");
            assert!(ms("pd_proxy.coordination_ms") + ms("pd_proxy.decode_ms") < total);
        }
        let pd = place.report("out").engines.pd;
        assert_eq!((pd.disaggregated, pd.passed), (disaggregated, passed), "{mode}");
        assert!(disaggregated >= 20 && passed >= 1, "{mode}: {disaggregated} and {passed}");
        assert!(ran.out.contains(&format!("P/D        {disaggregated} of 40 prefilled elsewhere")), "{}", ran.out);
    }
}

/// The engine that decodes computes one token of a prompt that came whole.
#[test]
fn the_cache_is_read_and_not_computed_again() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        assert_eq!(run(&place, mode, &ONE_BY_ONE).code, 0);
        for spans in by_trace(&place.traces("out")).values() {
            let requests = named(spans, "vllm.engine.request");
            let cached = |s: &Span| s.get("vllm.kv_cache.cached_tokens").and_then(|v| v.as_int()).unwrap_or_default();
            let mut found: Vec<i64> = requests.iter().map(|s| cached(s)).collect();
            found.sort();
            assert!(found[0] < 64 && found[1] >= 599, "{mode}: {found:?} of 600 tokens");
        }
    }
}

/// Engines that fail: every request has an answer, and every trace is whole.
#[test]
fn what_fails_is_told_and_traced() {
    let faults = "engines[0].faults=[{kind: http_error, rate: 0.5, status: 503}]";
    for mode in ["virtual", "live"] {
        let place = Place::new();
        let set = ["requests=40", "workload.arrivals.rate=40", "expectations={}", "engines[0].count=1", faults];
        let ran = run(&place, mode, &set);
        assert_eq!(ran.code, 0, "{ran:#?}");
        let (report, set) = (place.report("out"), place.traces("out"));
        assert_eq!(findings(&set), []);
        let pd = &report.engines.pd;
        assert_eq!(report.ok + report.errors, 40, "{mode}: {report:#?}");
        assert!(pd.prefill_retries > 0 && pd.prefill_failed > 0, "{mode}: {pd:?}");
        assert_eq!(report.errors, pd.prefill_failed, "{mode}: one retry, then the error is the client's");
        assert_eq!(report.errors_by_kind.get("http_503"), Some(&pd.prefill_failed), "{mode}");
    }
}

#[test]
fn a_crashed_engine_that_prefills_is_a_bad_gateway() {
    let faults = "engines[0].faults=[{kind: crash, at: 1s}]";
    for mode in ["virtual", "live"] {
        let place = Place::new();
        // The first request comes before the crash, the second after it; the metrics are not looked at again in between.
        let set = [
            "requests=2",
            "expectations={}",
            "engines[0].count=1",
            "engines[1].pd_proxy={}",
            "workload.arrivals={process: constant, rate: 0.7}",
            "workload.prompt_tokens=600",
            "gateway.metrics.scrape_interval=10s",
            faults,
        ];
        let ran = run(&place, mode, &set);
        assert_eq!(ran.code, 0, "{ran:#?}");
        let report = place.report("out");
        assert_eq!((report.ok, report.errors_by_kind.get("http_502")), (1, Some(&1)), "{mode}: {report:#?}");
        let set = place.traces("out");
        assert_eq!(findings(&set), []);
        let mut failed = 0;
        for spans in by_trace(&set).values() {
            assert_whole(spans);
            let proxy = named(spans, "pd_proxy.request")[0];
            if text(proxy, "error.type") == "connection_failed" {
                failed += 1;
                assert!(named(spans, "pd_proxy.decode").is_empty(), "{mode}");
            }
        }
        assert_eq!(failed, 1, "{mode}");
    }
}

#[test]
fn virtual_runs_repeat_to_the_byte() {
    let bytes = || {
        let place = Place::new();
        assert_eq!(run(&place, "virtual", &[]).code, 0);
        std::fs::read(place.path("out/traces.otlp.jsonl")).expect("the file of traces")
    };
    assert_eq!(bytes(), bytes(), "the same seed, the same bytes (I6)");
}

#[test]
fn a_sidecar_where_there_is_none_to_be_is_refused() {
    let check = |set: &str, expect: &str| {
        let place = Place::new();
        let ran = place.ran(&["validate", &scenario("pd"), "--set", set]);
        assert_eq!(ran.code, 2, "{set}: {ran:#?}");
        assert!(ran.err.contains(expect), "{set}: {}", ran.err);
    };
    check("engines[0].pd_proxy={}", "engines[0].pd_proxy: found a sidecar of engines of another role");
    check(
        "engines[1].kv_transfer.kv_role=kv_producer",
        "engines[1].pd_proxy: found a sidecar of engines that read nobody's cache",
    );
    check("engines[1].pd_proxy.prefill_max_retries=9", "engines[1].pd_proxy.prefill_max_retries: found 9");
    check("engines[1].pd_proxy.retries=1", "prefill_max_retries");
}
