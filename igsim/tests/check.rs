//! `igsim check`: a sound trace has no findings, and each way to break one is found for what it is.

mod common;

use std::collections::BTreeSet;
use std::sync::OnceLock;

use common::{Place, TINY, scenario};
use igsim::check::{Checked, Options, check};
use shared::ids::{SpanId, TraceId};
use shared::time::{Dur, Time};
use shared::trace::{Event, Kind, Span, Status, TraceSet, Value};
use shared::units::HumanDur;

/// Requests of a gateway, sidecars and engines, some prefilled elsewhere.
fn sound() -> TraceSet {
    static SET: OnceLock<TraceSet> = OnceLock::new();
    let made = || {
        let place = Place::new();
        let options = ["--mode", "virtual", "--set", "requests=40", "--set", "expectations={}", "--out", "out"];
        place.good(&[["run", &scenario("pd")].as_slice(), options.as_slice()].concat());
        place.traces("out")
    };
    SET.get_or_init(made).clone()
}

/// The rules that the set breaks after `fault` was done to it.
fn broken(fault: impl FnOnce(&mut TraceSet)) -> BTreeSet<&'static str> {
    let mut set = sound();
    fault(&mut set);
    let options = Options { canaries: vec!["tell-tale".to_owned()], ..Options::default() };
    rules(&check(&set, "test".to_owned(), &options))
}

fn rules(checked: &Checked) -> BTreeSet<&'static str> {
    checked.findings.iter().map(|f| f.rule).collect()
}

fn set_of<'a>(rules: &[&'a str]) -> BTreeSet<&'a str> {
    rules.iter().copied().collect()
}

/// The first span of this name, in a trace without a transfer of cache.
fn place_of(set: &TraceSet, name: &str) -> usize {
    let moves: BTreeSet<TraceId> =
        set.spans.iter().filter(|s| s.name == "vllm.kv_cache.transfer").map(|s| s.trace_id).collect();
    let wanted = |s: &Span| s.name == name && !moves.contains(&s.trace_id);
    set.spans.iter().position(wanted).unwrap_or_else(|| panic!("no {name}"))
}

/// The same in a trace in which one engine prefills and another decodes.
fn moving(set: &TraceSet, name: &str) -> usize {
    let at = set.spans.iter().position(|s| s.name == "vllm.kv_cache.transfer").expect("a transfer");
    let trace = set.spans[at].trace_id;
    set.spans.iter().position(|s| s.name == name && s.trace_id == trace).unwrap_or_else(|| panic!("no {name}"))
}

fn id(n: u64) -> SpanId {
    SpanId::new(n).expect("not zero")
}

/// The spans of one service instance in one trace.
fn part_of(set: &TraceSet, at: usize) -> Vec<usize> {
    let span = &set.spans[at];
    let own = |s: &Span| (s.trace_id, s.instance) == (span.trace_id, span.instance);
    (0..set.spans.len()).filter(|i| own(&set.spans[*i])).collect()
}

#[test]
fn a_sound_set_has_no_findings() {
    let checked = check(&sound(), "test".to_owned(), &Options::default());
    assert_eq!(checked.findings, [], "with no tolerance at all");
    assert_eq!((checked.traces, checked.instances), (40, 7));
}

#[test]
fn every_broken_shape_is_found() {
    let check = |rules: &[&'static str], fault: fn(&mut TraceSet)| assert_eq!(broken(fault), set_of(rules));
    check(&["one-root", "orphan"], |set| drop(set.spans.remove(place_of(set, "gateway.request"))));
    check(&["orphan"], |set| drop(set.spans.remove(place_of(set, "gateway.scheduler.schedule"))));
    check(&["one-root"], |set| {
        let root = set.spans[place_of(set, "gateway.request")].clone();
        set.spans.push(Span { span_id: id(77), ..root });
    });
    check(&["cycle", "nesting", "one-root"], |set| {
        let (root, child) = (place_of(set, "gateway.request"), place_of(set, "gateway.response.process"));
        set.spans[root].parent = Some(set.spans[child].span_id);
    });
    check(&["unique-id"], |set| {
        let twice = set.spans[place_of(set, "gateway.scheduler.pick")].clone();
        set.spans.push(twice);
    });
    check(&["times"], |set| {
        let at = place_of(set, "gateway.scheduler.pick");
        let span = &mut set.spans[at];
        span.end = span.start - Dur::from_nanos(1);
    });
    check(&["nesting"], |set| {
        let at = place_of(set, "gateway.response.process");
        set.spans[at].end += Dur::from_secs(9);
    });
    check(&["ended-parent", "parent"], |set| {
        let (prefill, decode) = (moving(set, "pd_proxy.prefill"), moving(set, "pd_proxy.decode"));
        set.spans[decode].parent = Some(set.spans[prefill].span_id);
    });
    check(&["clock-skew"], |set| {
        for i in part_of(set, place_of(set, "vllm.engine.request")) {
            let span = &mut set.spans[i];
            let moved = |t: Time| t + Dur::from_millis(30);
            (span.start, span.end) = (moved(span.start), moved(span.end));
            span.events.iter_mut().for_each(|e| e.at = moved(e.at));
        }
    });
}

#[test]
fn everything_that_is_not_registered_is_found() {
    let check = |rules: &[&'static str], fault: fn(&mut TraceSet)| assert_eq!(broken(fault), set_of(rules));
    fn span<'a>(set: &'a mut TraceSet, name: &str) -> &'a mut Span {
        let at = place_of(set, name);
        &mut set.spans[at]
    }
    check(&["name"], |set| span(set, "gateway.scheduler.pick").name = "gateway.scheduler.choose".into());
    check(&["kind-of-span"], |set| span(set, "gateway.scheduler.pick").kind = Kind::Server);
    check(&["parent"], |set| {
        let root = span(set, "gateway.request").span_id;
        span(set, "gateway.scheduler.pick").parent = Some(root);
    });
    check(&["attribute"], |set| {
        span(set, "gateway.request").set("gateway.surprise", 1u32);
    });
    check(&["attribute-type"], |set| {
        let attrs = &mut span(set, "gateway.request").attrs;
        let at = attrs.iter().position(|(key, _)| key == "http.request.method").expect("a method");
        attrs[at].1 = Value::Int(1);
    });
    check(&["required"], |set| span(set, "gateway.request").attrs.retain(|(key, _)| key != "http.request.method"));
    check(&["duplicate-key"], |set| {
        let first = span(set, "gateway.request").attrs[0].clone();
        span(set, "gateway.request").attrs.push(first);
    });
    check(&["event"], |set| {
        let pick = span(set, "gateway.scheduler.pick");
        pick.events.push(Event { name: "gateway.surprise".into(), at: pick.start, attrs: Vec::new() });
    });
    check(&["error-type"], |set| span(set, "gateway.request").status = Status::Error("went wrong".into()));
    check(&["status-ok"], |set| {
        let root = span(set, "gateway.request");
        let named = (root.trace_id, root.span_id);
        set.ok_statuses.push(named);
    });
}

#[test]
fn every_fault_of_propagation_is_found() {
    let check = |rules: &[&'static str], fault: fn(&mut TraceSet)| assert_eq!(broken(fault), set_of(rules));
    // The engine started over.
    check(&["client-without-server", "severed"], |set| {
        let at = place_of(set, "vllm.engine.request");
        for i in part_of(set, at) {
            set.spans[i].trace_id = TraceId::new(99).expect("not zero");
        }
        (set.spans[at].parent, set.spans[at].parent_is_remote) = (None, false);
    });
    // Nothing of what belongs above the engine was recorded.
    check(&["severed"], |set| {
        let trace = set.spans[place_of(set, "vllm.engine.request")].trace_id;
        let engines: Vec<bool> =
            set.spans.iter().map(|s| set.service(s.instance) == "vllm" || s.trace_id != trace).collect();
        let mut keep = engines.iter();
        set.spans.retain(|_| *keep.next().expect("one for each"));
    });
    // No engine traces.
    check(&["untraced"], |set| {
        let engines: Vec<bool> = set.spans.iter().map(|s| set.service(s.instance) != "vllm").collect();
        let mut keep = engines.iter();
        set.spans.retain(|_| *keep.next().expect("one for each"));
    });
    // A sidecar passes on what it gets.
    check(&["untraced"], |set| {
        let call = set.spans[moving(set, "gateway.backend.proxy")].clone();
        let proxy = set.spans[moving(set, "pd_proxy.request")].instance;
        for span in set.spans.iter_mut().filter(|s| s.name == "vllm.engine.request" && s.trace_id == call.trace_id) {
            span.parent = Some(call.span_id);
        }
        set.spans.retain(|s| (s.instance, s.trace_id) != (proxy, call.trace_id));
    });
    // One trace in which the engine decided otherwise.
    check(&["sampling"], |set| {
        let gone = part_of(set, place_of(set, "vllm.engine.request"));
        let mut i = 0..;
        set.spans.retain(|_| !gone.contains(&i.next().expect("no end")));
    });
    check(&["sampling"], |set| {
        let at = place_of(set, "vllm.engine.request");
        set.unsampled.push((set.spans[at].trace_id, set.spans[at].span_id));
    });
    check(&["sampling"], |set| {
        let at = place_of(set, "vllm.engine.request");
        // No id passes it.
        set.spans[at].tracestate = Some("a=1,ot=th:ffffffffffffff".into());
    });
    check(&["client-without-server", "sibling"], |set| {
        let (engine, proxy) = (place_of(set, "vllm.engine.request"), place_of(set, "pd_proxy.request"));
        set.spans[engine].parent = set.spans[proxy].parent;
    });
    check(&["content"], |set| {
        let at = place_of(set, "gateway.scheduler.pick");
        set.spans[at].attrs[0].1 = Value::from("a tell-tale word".to_owned());
    });
    check(&["content"], |set| set.resources[0].host_name = Some("tell-tale".to_owned()));
}

#[test]
fn a_service_that_records_nothing_here_is_none_of_ours() {
    let mut set = sound();
    let engines: Vec<bool> = set.spans.iter().map(|s| set.service(s.instance) != "vllm").collect();
    let mut keep = engines.iter();
    set.spans.retain(|_| *keep.next().expect("one for each"));
    let options = Options { uninstrumented: vec!["vllm".to_owned()], ..Options::default() };
    assert_eq!(rules(&check(&set, "test".to_owned(), &options)), set_of(&[]));
}

/// Hosts whose clocks differ by less than is allowed for.
#[test]
fn a_tolerance_allows_for_clocks() {
    let mut set = sound();
    let engine = place_of(&set, "vllm.engine.request");
    for i in part_of(&set, engine) {
        let span = &mut set.spans[i];
        let moved = |t: Time| t + Dur::from_millis(3);
        (span.start, span.end) = (moved(span.start), moved(span.end));
        span.events.iter_mut().for_each(|e| e.at = moved(e.at));
    }
    let with = |ms| Options { clock_tolerance: HumanDur::millis(ms), ..Options::default() };
    assert_eq!(rules(&check(&set, "test".to_owned(), &with(1))), set_of(&["clock-skew"]));
    assert_eq!(rules(&check(&set, "test".to_owned(), &with(3))), set_of(&[]));
}

/// Every scenario whose traces are broken on purpose: what is wrong with them is found, and nothing else.
#[test]
fn every_fault_scenario_is_caught() {
    let place = Place::new();
    let check = |name: &str, set: &str, expect: &[&str]| {
        let out = format!("{name}-{}", place.names().len());
        let file = scenario(&format!("propagation-{name}"));
        let mut args = vec!["run", &file, "--out", &out];
        if !set.is_empty() {
            args.extend(["--set", set]);
        }
        place.good(&args);
        assert_eq!(found(&place, &out), set_of(expect), "{name} {set}");
    };
    let torn = ["client-without-server", "severed"];
    check("drop", "", &torn);
    check("drop", "propagation_faults[0].share=0.5", &torn);
    check("duplicate", "", &["client-without-server", "one-root", "sibling"]);
    check("unsampled", "", &["sampling"]);
    check("unsampled", "propagation_faults=[{ kind: unsample, by: client }]", &["unsampled-caller"]);
    check("unsampled", "propagation_faults=[{ kind: unsample, by: gateway }]", &["untraced"]);
    check("untraced", "", &["untraced"]);
    check("nested", "", &["ended-parent", "parent"]);
    check("nested", "propagation_faults=[{ kind: drop, by: pd-proxy }]", &torn);
    check("nested", "propagation_faults=[{ kind: duplicate, by: pd-proxy }]", &["client-without-server", "sibling"]);
    check("nested", "propagation_faults=[{ kind: unsample, by: pd-proxy, share: 0.5 }]", &["sampling"]);
    check("queue", "", &["lost-in-queue", "severed"]);
    check("skew", "", &["clock-skew"]);
    for name in ["drop", "nested", "queue"] {
        check(name, "propagation_faults=[]", &[]);
    }
}

/// The rules that a run breaks, by the program, whose exit code agrees.
fn found(place: &Place, run: &str) -> BTreeSet<&'static str> {
    let ran = place.ran(&["check", run, "--format", "json", "--clock-tolerance", "0ms"]);
    let checked: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {ran:#?}"));
    let findings = checked["findings"].as_array().expect("a list");
    assert_eq!(ran.code, i32::from(!findings.is_empty()), "{ran:#?}");
    let rules = findings.iter().map(|f| f["rule"].as_str().expect("a name").to_owned());
    rules.map(|rule| &*rule.leak()).collect()
}

/// The same faults over real sockets.
#[test]
fn faults_strike_what_is_on_the_wire() {
    let place = Place::new();
    let pd = "gateway: { disaggregation: { profile: { name: prefill, filters: [{ type: prefill-filter }] }, \
              decider: { type: always-disagg-pd-decider } } }\nengines:\n  \
              - { role: prefill, profile: llama-3.1-8b-h100, kv_transfer: { kv_connector: NixlConnector, kv_role: kv_producer } }\n  \
              - { role: decode, profile: llama-3.1-8b-h100, kv_transfer: { kv_connector: NixlConnector, kv_role: kv_consumer } }";
    let pd = TINY.replace("engines:\n  - { count: 2, profile: llama-3.1-8b-h100 }", pd);
    let queue = format!(
        "{TINY}gateway: {{ saturation: {{ detector: concurrency-detector, concurrency: {{ max_requests: 1 }} }}, \
         flow_control: {{ enabled: true }} }}\n"
    );
    let check = |yaml: &str, faults: &str, expect: &[&str]| {
        let out = format!("out-{}", place.names().len());
        place.write("faulty.yaml", &format!("{yaml}propagation_faults: [{faults}]\n"));
        place.good(&["run", "faulty.yaml", "--out", &out]);
        assert_eq!(found(&place, &out), set_of(expect), "{faults}");
    };
    let torn = ["client-without-server", "severed"];
    check(TINY, "{ kind: drop, by: gateway }", &torn);
    check(TINY, "{ kind: duplicate, by: gateway }", &["client-without-server", "one-root", "sibling"]);
    check(TINY, "{ kind: unsample, by: client }", &["unsampled-caller"]);
    check(TINY, "{ kind: untraced, instances: [engine-1] }", &["untraced"]);
    check(TINY, "{ kind: clock_skew, instances: [engine-0], skew_ms: -50 }", &["clock-skew"]);
    check(&queue, "{ kind: lost_in_queue }", &["lost-in-queue", "severed"]);
    check(&pd, "{ kind: drop, by: pd-proxy }", &torn);
    check(&pd, "{ kind: untraced, instances: [pd-proxy-1] }", &["untraced"]);
    check(&pd, "{ kind: decode_under_prefill }", &["ended-parent", "parent"]);
    check(&pd, "", &[]);
}

#[test]
fn a_fault_that_means_nothing_is_refused() {
    let place = Place::new();
    let check = |fault: &str, expect: &str| {
        place.write("bad.yaml", &format!("{TINY}propagation_faults: [{fault}]\n"));
        let ran = place.ran(&["validate", "bad.yaml"]);
        assert_eq!(ran.code, 2, "{ran:#?}");
        assert!(ran.err.contains(expect), "{}", ran.err);
    };
    check("{ kind: drop, by: client }", "propagation_faults[0].by: found client");
    check("{ kind: drop, by: pd-proxy }", "propagation_faults[0].kind: found a fault of sidecars where there is none");
    check("{ kind: untraced, instances: [engine-9] }", "propagation_faults[0].instances: found \"engine-9\"");
    check("{ kind: lost_in_queue }", "propagation_faults[0].kind: found lost_in_queue where nothing waits");
    check("{ kind: unsample, by: gateway, share: 2 }", "propagation_faults[0].share: found 2");
    check("{ kind: clock_skew, instances: [engine-0], skew_ms: 1e9 }", "propagation_faults[0].skew_ms: found");
    check("{ kind: drop, by: gateway }, { kind: unsample, by: gateway }", "propagation_faults[1].kind: found a second");
}
