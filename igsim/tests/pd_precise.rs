//! Precise prefix routing by a service of its own before engines that prefill and engines that decode: `scenarios/pd-precise.yaml` gives
//! one trace over five service instances, whole.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, assert_whole, by_trace, findings, scenario};
use shared::trace::{Kind, Span};

const ANY: &str = "listen={gateway: '127.0.0.1:0', engines: '127.0.0.1:0', kv_cache_manager: '127.0.0.1:0'}";

fn named<'s>(spans: &[&'s Span], name: &str) -> Vec<&'s Span> {
    spans.iter().copied().filter(|s| s.name == name).collect()
}

fn only<'s>(spans: &[&'s Span], name: &str) -> &'s Span {
    let [span] = named(spans, name)[..] else { panic!("one {name}: {}", spans.len()) };
    span
}

fn text<'s>(span: &'s Span, key: &str) -> &'s str {
    span.get(key).and_then(|v| v.as_str()).unwrap_or_default()
}

/// Where a trace passes from one instance to another: a client's span above a server's.
fn hops(spans: &[&Span]) -> Vec<String> {
    let by_id: BTreeMap<_, _> = spans.iter().map(|s| (s.span_id, *s)).collect();
    let mut hops = Vec::new();
    for span in spans.iter().filter(|s| s.parent.is_some()) {
        let above = by_id[&span.parent.unwrap()];
        assert!(span.start <= above.end, "{} begins after {} ended", span.name, above.name);
        if above.instance != span.instance {
            assert_eq!((above.kind, span.kind), (Kind::Client, Kind::Server), "{} {}", above.name, span.name);
            hops.push(format!("{} > {}", above.name, span.name));
        }
    }
    hops.sort();
    hops
}

#[test]
fn one_trace_shows_five_instances() {
    let place = Place::new();
    let file = scenario("pd-precise");
    let set = ["--set", ANY, "--set", "requests=30", "--set", "workload.arrivals.rate=30", "--set", "expectations={}"];
    let ran = place.good(&[["run", &file, "--out", "out"].as_slice(), set.as_slice()].concat());
    assert!(ran.err.contains("  kv-cache-manager http://127.0.0.1:"), "{}", ran.err);
    let set = place.traces("out");
    assert_eq!(findings(&set), []);
    let traces = by_trace(&set);
    assert_eq!(traces.len(), 30);
    let (mut disaggregated, mut matched) = (Vec::new(), 0);
    for (id, spans) in &traces {
        assert_whole(spans);
        let resource = |s: &Span| set.resource(s.instance).expect("a resource");
        let services: BTreeSet<_> = spans.iter().map(|s| resource(s).service_name.clone()).collect();
        assert!(services.contains("kv-cache-manager"), "every request is asked for: {services:?}");
        let scores = only(spans, "kvcache.manager.get_scores");
        assert_eq!((scores.kind, &*resource(scores).service_name), (Kind::Server, "kv-cache-manager"));
        matched += u32::from(scores.get("llm_d.kv_cache.blocks_found").and_then(|v| v.as_int()).is_some_and(|n| n > 0));
        let proxy = only(spans, "pd_proxy.request");
        if text(proxy, "pd_proxy.reason") == "no_prefill_header" {
            continue;
        }
        disaggregated.push(id.clone());
        let instances: BTreeSet<_> = spans.iter().map(|s| resource(s).instance_id.clone()).collect();
        assert_eq!(instances.len(), 5, "gateway, manager, sidecar and two engines: {instances:?}");
        assert!(spans.len() >= 35, "{} spans", spans.len());
        let expect = [
            "gateway.backend.proxy > pd_proxy.request",
            "gateway.kvcache.lookup > kvcache.manager.get_scores",
            "pd_proxy.backend > vllm.engine.request",
            "pd_proxy.backend > vllm.engine.request",
            "vllm.kv_cache.transfer > vllm.kv_cache.transfer",
        ];
        assert_eq!(hops(spans), expect);
        let (prefill, decode) = (only(spans, "pd_proxy.prefill"), only(spans, "pd_proxy.decode"));
        assert_eq!((prefill.parent, decode.parent), (Some(proxy.span_id), Some(proxy.span_id)), "siblings");
        assert!(prefill.end <= decode.start);
        // The cache is seen to move from both ends, in the engines that the gateway chose.
        let transfers = named(spans, "vllm.kv_cache.transfer");
        let ends: BTreeSet<_> = transfers.iter().map(|s| resource(s).instance_id.to_string()).collect();
        let director = only(spans, "gateway.director.handle_request");
        let decider = only(spans, "gateway.pd.decide");
        let chosen =
            [text(director, "gateway.target_endpoint.name"), text(decider, "gateway.pd.prefill_endpoint.name")];
        assert_eq!(ends, chosen.map(ToOwned::to_owned).into(), "the transfer's ends");
    }
    assert!(disaggregated.len() >= 15 && matched >= 5, "{} elsewhere, {matched} found blocks", disaggregated.len());
    let shown = place.good(&["inspect", "out", "--trace", &disaggregated[0]]).out;
    for place in ["inference-gateway gateway-0", "kv-cache-manager kv-cache-manager-0", "pd-proxy pd-proxy-"] {
        assert!(shown.contains(place), "{place} is not in\n{shown}");
    }
    assert!(shown.contains("vllm engine-0") || shown.contains("vllm engine-1"), "who prefilled\n{shown}");
    assert!(shown.contains("vllm engine-2") || shown.contains("vllm engine-3"), "who decoded\n{shown}");
}

/// Without a network the gateway keeps the index itself, and four instances are left.
#[test]
fn the_same_file_runs_in_virtual_time_without_the_service() {
    let place = Place::new();
    let file = scenario("pd-precise");
    let args = ["run", &file, "--out", "out", "--mode", "virtual"];
    let refused = place.ran(&args);
    assert_eq!(refused.code, 2, "{refused:#?}");
    assert!(refused.err.contains("listen.kv_cache_manager"), "{}", refused.err);
    place.good(&[args.as_slice(), &["--set", "listen.kv_cache_manager=null"]].concat());
    let set = place.traces("out");
    assert_eq!(findings(&set), []);
    for spans in by_trace(&set).values() {
        assert_whole(spans);
        assert_eq!(only(spans, "kvcache.manager.get_scores").kind, Kind::Internal);
    }
}
