//! Trace files of others are read, broken ones are named by line.

use std::sync::Arc;

use proptest::prelude::*;
use shared::ids::{InstanceId, SpanId, TraceId};
use shared::time::{Anchor, Time};
use shared::trace::tree::outline;
use shared::trace::{Event, Kind, Link, Resource, Span, Status, TraceSet, Value, otlp_json};

fn read(text: &str) -> TraceSet {
    otlp_json::read_str(text, "t.jsonl").expect("a trace file")
}

#[test]
fn lines_of_a_collector() {
    // As the Collector's file exporter writes: kind and status as numbers, 64-bit integers as text, empty members left out.
    let set = read(concat!(
        r#"{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"gateway"}}]},"#,
        r#""scopeSpans":[{"scope":{"name":"x"},"spans":[{"traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331","#,
        r#""parentSpanId":"","flags":257,"name":"GET /","kind":2,"startTimeUnixNano":"1700000000000000000","#,
        r#""endTimeUnixNano":"1700000000000000500","attributes":[{"key":"n","value":{"intValue":"-5"}},"#,
        r#"{"key":"m","value":{"kvlistValue":{"values":[]}}},{"key":"e","value":{}}],"#,
        r#""events":[{"timeUnixNano":"1700000000000000100","name":"e"}],"status":{"code":2,"message":"bad"}}]}]}]}"#,
        "\n",
        r#"{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"gateway"}}]},"#,
        r#""scopeSpans":[{"spans":[{"traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"00f067aa0ba902b7","#,
        r#""parentSpanId":"b7ad6b7169203331","name":"inner","kind":1,"startTimeUnixNano":"1700000000000000100","#,
        r#""endTimeUnixNano":"1700000000000000200","status":{"code":1},"futureMember":[{"a":1}]}]}]}]}"#,
        "\n",
    ));
    assert_eq!((set.resources.len(), set.service(InstanceId(0)), set.truncated), (1, "gateway", false));
    assert_eq!(set.anchor, Anchor::from_unix_nanos(1_700_000_000_000_000_000));
    assert_eq!((set.spans[0].end, set.spans[1].start), (Time::from_nanos(500), Time::from_nanos(100)));
    assert_eq!(set.ok_statuses, [(set.spans[1].trace_id, set.spans[1].span_id)]);
    insta::assert_snapshot!(outline(&set.spans), @r#"
    GET / (server) n=-5 m={"values":[]} e= !error: bad
      * e
      inner (internal)
    "#);
}

#[test]
fn answers_of_tempo() {
    // `batches`, ids in base64, enum names, several lines; version 2 wraps everything in `trace`.
    let span = r#"{
        "traceId": "CvdlGRbNQ92ESOshHIAxnA==", "spanId": "t61rcWkgMzE=", "parentSpanId": "APBnqgupArc=",
        "name": "s", "kind": "SPAN_KIND_CLIENT", "startTimeUnixNano": 5, "endTimeUnixNano": "9",
        "attributes": [{"key": "d", "value": {"doubleValue": 1}}, {"key": "l", "value": {"arrayValue": {"values": [
            {"stringValue": "a"}, {"stringValue": "b"}]}}}],
        "status": {"code": "STATUS_CODE_ERROR"}
    }"#;
    let group = format!(r#"[{{"resource": {{}}, "instrumentationLibrarySpans": [{{"spans": [{span}]}}]}}]"#);
    let one = read(&format!(r#"{{"batches": {group}}}"#));
    let two = read(&format!(r#"{{"trace": {{"resourceSpans": {group}}}, "metrics": {{}}}}"#));
    assert_eq!(one, two);
    let span = &one.spans[0];
    assert_eq!(span.trace_id.to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(span.parent.map(|p| p.to_string()).as_deref(), Some("00f067aa0ba902b7"));
    assert_eq!((span.kind, &span.status), (Kind::Client, &Status::Error("".into())));
    assert_eq!(span.get("d"), Some(&Value::F64(1.0)));
    assert_eq!(span.get("l"), Some(&Value::StrList(vec!["a".into(), "b".into()])));
}

#[test]
fn faults_name_file_and_line() {
    let good = r#"{"resourceSpans":[]}"#;
    let span = |members: &str| format!(r#"{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{{{members}}}]}}]}}]}}"#);
    let ids = r#""traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331""#;
    let check = |text: &str, expect: &str| {
        let error = otlp_json::read_str(text, "t.jsonl").expect_err("a fault").to_string();
        assert!(error.starts_with(expect), "expected `{expect}`, found `{error}`");
    };
    check("{}", "t.jsonl:1: found neither `resourceSpans` nor `batches`");
    check(&format!("{good}\n\n{{}}\n{good}"), "t.jsonl:3: found neither");
    check(&format!("{good}\n{good}\nnonsense\n"), "t.jsonl:3: expected");
    check(&format!("{good}\n{}", span(r#""traceId":"xyz""#)), "t.jsonl:2: `xyz` is no trace id");
    check(&span(&format!(r#"{ids},"startTimeUnixNano":"soon""#)), "t.jsonl:1: `startTimeUnixNano` is missing");
    check(&span(r#""traceId":"00000000000000000000000000000000","spanId":"1""#), "t.jsonl:1: a trace id is zero");
    check("{", "t.jsonl:1:");
    let missing = otlp_json::read_file("no/such/file.jsonl").expect_err("no file").to_string();
    assert!(missing.starts_with("no/such/file.jsonl: "), "{missing}");
}

#[test]
fn a_last_line_cut_off_is_left_out_and_told() {
    let good = r#"{"resourceSpans":[]}"#;
    let set = read(&format!("{good}\n{}", &good[..good.len() - 3]));
    assert!(set.truncated);
    assert!(!read(good).truncated);
    assert_eq!(read(""), TraceSet::new(Anchor::from_unix_nanos(0)));
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<String>().prop_map(Value::from),
        any::<i64>().prop_map(Value::Int),
        any::<f64>().prop_filter("NaN is not equal to itself", |f| !f.is_nan()).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        proptest::collection::vec(any::<String>(), 0..4)
            .prop_map(|v| Value::StrList(v.into_iter().map(Into::into).collect())),
        proptest::collection::vec(-1e9..1e9f64, 1..4).prop_map(Value::F64List),
    ]
}

fn attrs() -> impl Strategy<Value = Vec<shared::trace::span::Attr>> {
    proptest::collection::vec(("[a-z.]{1,12}", value()), 0..5)
        .prop_map(|list| list.into_iter().map(|(k, v)| (k.into(), v)).collect())
}

prop_compose! {
    fn span()(
        trace in 1u128.., id in 1u64.., parent in proptest::option::of(1u64..), remote: bool, instance in 0u16..3,
        name in ".{0,12}", kind in 0usize..3, start in 0u64..1_000_000, length in 0u64..1_000_000, attrs in attrs(),
        event in proptest::option::of((".{0,8}", attrs())), link in proptest::option::of((1u128.., 1u64.., attrs())),
        error in proptest::option::of(".{0,12}"),
    ) -> Span {
        Span {
            trace_id: TraceId::new(trace).expect("not zero"),
            span_id: SpanId::new(id).expect("not zero"),
            parent: parent.and_then(SpanId::new),
            parent_is_remote: remote,
            tracestate: remote.then(|| Arc::from("a=1")),
            instance: InstanceId(instance),
            name: name.into(),
            kind: [Kind::Internal, Kind::Server, Kind::Client][kind],
            start: Time::from_nanos(start),
            end: Time::from_nanos(start + length),
            attrs,
            events: event.into_iter().map(|(name, attrs)| Event {
                name: name.into(), at: Time::from_nanos(start), attrs,
            }).collect(),
            links: link.into_iter().map(|(trace, id, attrs)| Link {
                trace_id: TraceId::new(trace).expect("not zero"), span_id: SpanId::new(id).expect("not zero"), attrs,
            }).collect(),
            status: error.map_or(Status::Unset, |e| Status::Error(e.into())),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_is_written_is_read_back(mut spans in proptest::collection::vec(span(), 1..8)) {
        let resources: Vec<_> = (0..3).map(|i| Arc::new(Resource::new("vllm", format!("{i}")))).collect();
        let mut out = Vec::new();
        otlp_json::write(&spans, &resources, Anchor::VIRTUAL, &mut out).expect("JSON");
        prop_assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1, "one line");
        let set = read(std::str::from_utf8(&out).expect("UTF-8"));
        // The file groups by instance, the reader numbers instances in that order and counts time from the first start.
        spans.sort_by_key(|s| s.instance);
        prop_assert_eq!(set.spans.len(), spans.len());
        for (found, mut sent) in set.spans.iter().cloned().zip(spans) {
            prop_assert_eq!(set.resource(found.instance), Some(&*resources[usize::from(sent.instance.0)]));
            prop_assert_eq!(set.anchor.unix_nanos(found.start), Anchor::VIRTUAL.unix_nanos(sent.start));
            prop_assert_eq!(found.end - found.start, sent.end - sent.start);
            prop_assert_eq!(found.events.first().map(|e| e.at), found.events.first().map(|_| found.start));
            sent.instance = found.instance;
            (sent.start, sent.end) = (found.start, found.end);
            sent.events.iter_mut().for_each(|e| e.at = found.start);
            prop_assert_eq!(found, sent);
        }
    }
}
