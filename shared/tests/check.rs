//! Each rule of the checks: a trace that breaks it is found, the same trace without the fault is not.

use shared::ids::{InstanceId, SpanId, TraceId};
use shared::time::{Anchor, Dur, Time};
use shared::trace::check::{CheckOptions, check, check_spans};
use shared::trace::registry::Registry;
use shared::trace::tree::{Forest, Show, outline};
use shared::trace::{Event, Kind, Link, Span, Status, TraceSet, Value};

const REGISTRY: &str = "
groups:
  - id: registry
    type: attribute_group
    attributes:
      - {id: error.type, type: string, brief: Class}
      - {id: late, type: boolean, brief: Outlives its parent}
      - {id: tokens, type: int, brief: Tokens}
      - {id: other, type: int, brief: Of another span}
  - {id: event.first, type: event, name: first, brief: First token, attributes: [{ref: tokens, requirement_level: required}]}
  - {id: event.second, type: event, name: second, brief: Of another span}
  - id: span.root
    type: span
    name: root
    span_kind: server
    attributes: [{ref: error.type}]
    events: [first]
  - id: span.call
    type: span
    name: call
    span_kind: client
    attributes: [{ref: tokens, requirement_level: required}, {ref: late}]
    annotations: {level: 1, parent: [root]}
  - {id: span.work, type: span, name: work, span_kind: server, annotations: {parent: [call]}, attributes: [{ref: late}]}
";

fn span(id: u64, parent: Option<u64>, name: &'static str, kind: Kind, start: u64, end: u64) -> Span {
    Span {
        trace_id: TraceId::new(1).expect("not zero"),
        span_id: SpanId::new(id).expect("not zero"),
        parent: parent.and_then(SpanId::new),
        parent_is_remote: false,
        tracestate: None,
        instance: InstanceId(0),
        name: name.into(),
        kind,
        start: Time::from_nanos(start),
        end: Time::from_nanos(end),
        attrs: Vec::new(),
        events: Vec::new(),
        links: Vec::new(),
        status: Status::Unset,
    }
}

/// root > call > work, the last one in another service instance whose clock is 5 ns behind.
fn trace() -> Vec<Span> {
    let mut spans = vec![
        span(1, None, "root", Kind::Server, 0, 100),
        span(2, Some(1), "call", Kind::Client, 10, 90),
        span(3, Some(2), "work", Kind::Server, 5, 80),
    ];
    spans[1].set("tokens", 4u32);
    spans[2].instance = InstanceId(1);
    spans[2].parent_is_remote = true;
    spans
}

/// The rules and details found after `fault` was done to the trace.
fn findings(fault: impl FnOnce(&mut Vec<Span>)) -> Vec<String> {
    let registry = Registry::parse(&[("r.yaml", REGISTRY)]).expect("a registry");
    let options = CheckOptions { registry: Some(&registry), clock_tolerance: Dur::from_nanos(5) };
    let mut spans = trace();
    fault(&mut spans);
    let found = check_spans(&spans, &options);
    found.iter().map(|f| format!("{}: {}: {}", f.span, f.rule.name(), f.detail)).collect()
}

fn event(name: &'static str, at: u64) -> Event {
    Event { name: name.into(), at: Time::from_nanos(at), attrs: vec![("tokens".into(), Value::Int(1))] }
}

#[test]
fn a_sound_trace_has_no_findings() {
    assert_eq!(findings(|_| {}), [""; 0]);
    assert_eq!(findings(|s| s[0].events.push(event("first", 50))), [""; 0]);
    // A caller's own trace: the server span is the local root.
    assert_eq!(findings(|s| (s[0].parent, s[0].parent_is_remote) = (SpanId::new(9), true)), [""; 0]);
}

/// A trace that a link points to may be somewhere else, or not kept at all.
#[test]
fn a_link_to_a_trace_that_is_not_there_is_no_finding() {
    let link =
        |trace| Link { trace_id: TraceId::new(trace).unwrap(), span_id: SpanId::new(8).unwrap(), attrs: Vec::new() };
    assert_eq!(findings(|s| s[0].links.extend([link(7), link(9)])), [""; 0]);
}

#[test]
fn every_fault_is_found() {
    let check = |expect: &[&str], fault: fn(&mut Vec<Span>)| assert_eq!(findings(fault), expect);
    check(&["call: orphan: parent 0000000000000001 is missing", ": one-root: 0 roots among 2 spans"], |s| {
        s.remove(0);
    });
    check(&[": one-root: 2 roots among 4 spans"], |s| s.push(span(4, None, "root", Kind::Server, 0, 1)));
    check(&["call: orphan: parent 0000000000000009 is missing"], |s| s[1].parent = SpanId::new(9));
    check(&["work: unique-id: `work` has the same id"], |s| s.push(s[2].clone()));
    check(&["call: times: ends 5 ns before its start"], |s| {
        s.truncate(2);
        (s[1].start, s[1].end) = (Time::from_nanos(20), Time::from_nanos(15));
    });
    check(&["root: times: event `first` lies outside"], |s| s[0].events.push(event("first", 101)));
    check(&["call: nesting: ends 1 ns after its parent `root`"], |s| s[1].end = Time::from_nanos(101));
    // It fits into its parent, so it is its clock that is wrong; what is longer has outlived it.
    check(&["work: clock-skew: starts 6 ns before its parent `call`"], |s| s[2].start = Time::from_nanos(4));
    check(&["work: nesting: ends 40 ns after its parent `call`"], |s| s[2].end = Time::from_nanos(130));
    check(
        &[
            "call: ended-parent: starts 0 ns after its parent `root` ended",
            "work: nesting: starts 95 ns before its parent `call`",
        ],
        |s| {
            (s[1].start, s[1].end) = (Time::from_nanos(100), Time::from_nanos(110));
        },
    );
    check(&[], |s| {
        s[2].end = Time::from_nanos(500);
        s[2].set("late", true);
    });
    check(&["root: error-type: failed without `error.type`"], |s| s[0].status = Status::Error("bad".into()));
    check(&[], |s| {
        s[0].fail("timeout", "bad");
    });
    check(&["call: duplicate-key: `tokens` occurs twice"], |s| {
        s[1].set("tokens", 5u32);
    });
    check(&["work2: name: is not registered"], |s| s[2].name = "work2".into());
    check(&["call: kind-of-span: is internal"], |s| s[1].kind = Kind::Internal);
    check(&["work: parent: hangs on `root`"], |s| s[2].parent = SpanId::new(1));
    check(&["call: attribute: `other` is not registered for it"], |s| {
        s[1].set("other", 1u32);
    });
    check(&["call: attribute-type: `tokens` has a value of the wrong type"], |s| s[1].attrs[0].1 = Value::F64(1.0));
    check(&["call: required: `tokens` is missing"], |s| s[1].attrs.clear());
    check(&["root: event: event `second` is not registered for it"], |s| s[0].events.push(event("second", 1)));
    check(&["root: required: event `first`: `tokens` is missing"], |s| {
        s[0].events.push(Event { attrs: Vec::new(), ..event("first", 1) });
    });
}

#[test]
fn a_cycle_is_found_once() {
    let found = findings(|s| s[0].parent = SpanId::new(2));
    let cycles: Vec<_> = found.iter().filter(|f| f.contains("cycle")).collect();
    assert_eq!(cycles, ["root: cycle: is its own ancestor"]);
    assert!(found.iter().any(|f| f == ": one-root: 0 roots among 3 spans"), "{found:?}");
}

#[test]
fn an_ok_status_in_a_file_is_found() {
    let mut set = TraceSet::new(Anchor::VIRTUAL);
    set.spans = trace();
    set.ok_statuses.push((set.spans[1].trace_id, set.spans[1].span_id));
    let options = CheckOptions { registry: None, clock_tolerance: Dur::from_nanos(5) };
    let found: Vec<_> = check(&set, &options).iter().map(ToString::to_string).collect();
    assert_eq!(found, ["trace 00000000000000000000000000000001 span 0000000000000002 call: status-ok: status is Ok"]);
}

#[test]
fn an_outline_orders_children_by_start_then_name() {
    let mut spans = vec![
        span(4, Some(1), "b", Kind::Internal, 20, 30),
        span(5, Some(1), "a", Kind::Internal, 20, 30),
        span(3, Some(2), "leaf", Kind::Server, 11, 12),
        span(2, Some(1), "first", Kind::Client, 10, 20),
        span(1, None, "root", Kind::Server, 0, 100),
    ];
    spans[4].set("k", "v").event("e", Time::from_nanos(1), vec![("n".into(), Value::Int(1))]);
    spans[3].fail("timeout", "too slow");
    insta::assert_snapshot!(outline(&spans), @r"
    root (server) k=v
      * e n=1
      first (client) error.type=timeout !error: too slow
        leaf (server)
      a (internal)
      b (internal)
    ");
    assert_eq!(Forest::new(&spans).text(Show::default()).lines().count(), 5);
}
