//! The encoder against the SDK's own conversion: the same record, folded into our spans and turned into OTLP by the code that the
//! SDK's exporter runs, decodes to the same messages and takes as many bytes.

use std::sync::Arc;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use super::Requests;
use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::{Anchor, Time};
use crate::trace::exporter::sdk;
use crate::trace::fold::{Cx, Draft, Fold, Form, Inner, LinkTo, Pair, Val};
use crate::trace::record::{Closed, Ending, Fact, Head, Record};
use crate::trace::resource::Resource;
use crate::trace::span::{Kind, Span};

/// A value that owns what [`Val`] borrows.
#[derive(Clone, Debug)]
enum Any {
    Static(&'static str),
    Text(String),
    Shared(Arc<str>),
    Int(i64),
    F64(f64),
    Bool(bool),
    Statics(Vec<&'static str>),
    Names(Vec<Arc<str>>),
    F64s(Vec<f64>),
}

impl Any {
    fn val(&self) -> Val<'_> {
        match self {
            Any::Static(v) => Val::Static(v),
            Any::Text(v) => Val::Text(v),
            Any::Shared(v) => Val::Shared(v),
            Any::Int(v) => Val::Int(*v),
            Any::F64(v) => Val::F64(*v),
            Any::Bool(v) => Val::Bool(*v),
            Any::Statics(v) => Val::Statics(v),
            Any::Names(v) => Val::Names(v),
            Any::F64s(v) => Val::F64s(v),
        }
    }
}

type Attrs = Vec<(&'static str, Any)>;

/// What is done to a span, in this order of calls.
#[derive(Clone, Debug)]
enum Call {
    Put(&'static str, Any),
    Event(u64, Attrs),
    Link(u128, u64, Attrs),
    Error(&'static str),
    End(u64),
}

/// A fact that becomes one span, all of which are open until the record ends.
#[derive(Clone, Debug)]
struct Script {
    kind: Kind,
    calls: Vec<Call>,
    panics: bool,
}

impl Fact for Script {
    type Fold<S: Form> = Play<S::Draft>;
}

struct Play<D>(Vec<D>);

impl<S: Form> Fold<Script, S> for Play<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        Play(vec![cx.outermost("outermost", Kind::Server)])
    }
    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, script: &Script) {
        let (id, parent) = (cx.head.inner_id(self.0.len()), self.0[0].id());
        let mut span = cx.inner(Inner { name: "inner", kind: script.kind, parent, id, start: at, end: at });
        script.calls.iter().for_each(|call| play(&mut span, call));
        if script.panics {
            cx.emit(span);
            panic!("as the script says");
        }
        self.0.push(span);
    }
    fn end(self, cx: &mut Cx<'_, S>, _: &Ending) {
        self.0.into_iter().for_each(|span| cx.emit(span));
    }
}

fn play(span: &mut impl Draft, call: &Call) {
    fn pairs(attrs: &Attrs) -> Vec<Pair<'_>> {
        attrs.iter().map(|(key, value)| (*key, value.val())).collect()
    }
    match call {
        Call::Put(key, value) => span.put(key, value.val()),
        Call::Event(at, attrs) => drop(span.event("event", Time::from_nanos(*at), &pairs(attrs)).id()),
        Call::Link(trace, id, attrs) => {
            let (trace_id, span_id) = (TraceId::new(*trace).unwrap(), SpanId::new(*id).unwrap());
            span.link(&LinkTo { trace_id, span_id }, &pairs(attrs));
        }
        Call::Error(description) => span.error(description),
        Call::End(at) => span.set_end(Time::from_nanos(*at)),
    }
}

const ANCHOR: Anchor = Anchor::VIRTUAL;

fn resources() -> Vec<Arc<Resource>> {
    let mut long = Resource::new("vllm", "x".repeat(200));
    long.extra = vec![("gpu.count".into(), 4i64.into()), ("share".into(), 0.5.into()), ("on".into(), true.into())];
    vec![Arc::new(Resource::new("gateway", "gateway-0")), Arc::new(long)]
}

fn head(instance: u16, trace: u128) -> Head {
    Head {
        trace_id: TraceId::new(trace).unwrap(),
        span_id: SpanId::new(trace as u64 | 1).unwrap(),
        parent: trace.is_multiple_of(2).then(|| SpanId::new(77).unwrap()),
        tracestate: match trace % 3 {
            0 => None,
            1 => Some("ot=th:e666,vendor=x".into()),
            _ => Some("not a state that the SDK takes".into()),
        },
        instance: InstanceId(instance),
        opened: Time::from_nanos(5),
        detail: 2,
        naming: Default::default(),
    }
}

fn record(instance: u16, trace: u128, scripts: Vec<Script>) -> Record<Script> {
    let facts = scripts.into_iter().enumerate().map(|(i, s)| (Time::from_nanos(10 + i as u64), s)).collect();
    Record {
        head: head(instance, trace),
        facts,
        cut: 0,
        closed: Time::from_nanos(1_000),
        abandoned: false,
        candidate: false,
    }
}

/// What the SDK's exporter would send for these spans of one instance.
fn by_sdk(spans: &[Span], resource: &Resource) -> ResourceSpans {
    let data = spans.iter().map(|s| sdk::span_data(s, ANCHOR)).collect();
    let groups = group_spans_by_resource_and_scope(data, &(&sdk::resource(resource)).into());
    in_order(groups.into_iter().next().expect("a group"))
}

/// The SDK gives the attributes of a resource in any order.
fn in_order(mut group: ResourceSpans) -> ResourceSpans {
    let resource = group.resource.as_mut().expect("a resource");
    resource.attributes.sort_by(|a, b| a.key.cmp(&b.key));
    group
}

/// Equal, where NaN equals NaN.
fn assert_same(ours: &ResourceSpans, theirs: &ResourceSpans) {
    assert_eq!(format!("{ours:?}"), format!("{theirs:?}"));
}

/// Encodes the records one after the other and compares every request, of `max` spans, with the SDK's.
fn compare(records: &[Record<Script>], max: usize) {
    let resources = resources();
    let mut requests = Requests::new(ANCHOR);
    let mut spans: Vec<Span> = Vec::new();
    let check = |requests: &mut Requests, spans: &mut Vec<Span>| {
        let encoded = requests.take(max, &resources);
        let rest = spans.split_off(encoded.spans);
        let decoded = ExportTraceServiceRequest::decode(encoded.bytes.clone()).expect("protobuf");
        let mut length = 0;
        for group in decoded.resource_spans {
            let group = in_order(group);
            let named = |r: &&Arc<Resource>| sdk_name(&group) == r.service_name;
            let resource = resources.iter().find(named).expect("a known resource");
            let instance = InstanceId(u16::from(resource.service_name == "vllm"));
            let own: Vec<_> = spans.iter().filter(|s| s.instance == instance).cloned().collect();
            let expect = by_sdk(&own, resource);
            assert_same(&group, &expect);
            length += ExportTraceServiceRequest { resource_spans: vec![expect] }.encoded_len();
            spans.retain(|s| s.instance != instance);
        }
        assert_eq!((encoded.bytes.len(), spans.len()), (length, 0));
        *spans = rest;
    };
    for record in records {
        record.fold(&mut spans);
        requests.add(record);
        assert_eq!(requests.spans(), spans.len());
        while requests.spans() >= max {
            check(&mut requests, &mut spans);
        }
    }
    check(&mut requests, &mut spans);
    assert_eq!(requests.spans(), 0);
}

fn sdk_name(group: &ResourceSpans) -> String {
    let attributes = &group.resource.as_ref().expect("a resource").attributes;
    let name = attributes.iter().find(|a| a.key == "service.name").expect("a name");
    match name.value.as_ref().and_then(|v| v.value.clone()) {
        Some(opentelemetry_proto::tonic::common::v1::any_value::Value::StringValue(name)) => name,
        other => panic!("{other:?}"),
    }
}

/// Keys of every length class; a fold's keys are static.
const KEYS: [&str; 5] = [
    "k",
    "gen_ai.request.model",
    "a.key.that.is.as.long.as.the.short.way.of.writing.it.allows",
    "a.key.that.is.a.little.longer.than.the.short.way.of.writing.it.allows.it.to.be",
    "a.key.of.more.than.one.hundred.and.twenty-seven.bytes.whose.own.length.takes.two.bytes.0123456789.0123456789.0123456789.0123456789",
];

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "\\PC{0,40}",
        2 => (50usize..200).prop_map(|n| "x".repeat(n)),
        1 => (16_300usize..16_500).prop_map(|n| "y".repeat(n)),
    ]
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![any::<f64>(), Just(f64::NAN), Just(f64::NEG_INFINITY), Just(0.0), Just(-0.0)]
}

fn value() -> impl Strategy<Value = Any> {
    let statics = prop_oneof![Just(""), Just("static"), Just("\u{1F680}")];
    prop_oneof![
        statics.clone().prop_map(Any::Static),
        text().prop_map(Any::Text),
        text().prop_map(|t| Any::Shared(t.into())),
        prop_oneof![any::<i64>(), Just(0), Just(-1), 0i64..300].prop_map(Any::Int),
        number().prop_map(Any::F64),
        any::<bool>().prop_map(Any::Bool),
        vec(statics, 0..4).prop_map(Any::Statics),
        vec(text().prop_map(Arc::from), 0..4).prop_map(Any::Names),
        vec(number(), 0..30).prop_map(Any::F64s),
    ]
}

fn attrs(most: usize) -> impl Strategy<Value = Attrs> {
    vec((prop::sample::select(&KEYS[..]), value()), 0..most)
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => (prop::sample::select(&KEYS[..]), value()).prop_map(|(key, value)| Call::Put(key, value)),
        3 => (0u64..3_000, attrs(4)).prop_map(|(at, attrs)| Call::Event(at, attrs)),
        1 => (1u128.., 1u64.., attrs(3)).prop_map(|(trace, id, attrs)| Call::Link(trace, id, attrs)),
        1 => prop_oneof![Just(""), Just("why")].prop_map(Call::Error),
        1 => (0u64..2_000).prop_map(Call::End),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    let kind = prop_oneof![Just(Kind::Internal), Just(Kind::Server), Just(Kind::Client)];
    (kind, vec(call(), 0..24)).prop_map(|(kind, calls)| Script { kind, calls, panics: false })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_request_is_what_the_sdk_sends(
        records in vec((0u16..2, 1u128.., vec(script(), 0..5)), 1..6),
        max in 1usize..8,
    ) {
        let records: Vec<_> = records.into_iter().map(|(instance, trace, s)| record(instance, trace, s)).collect();
        compare(&records, max);
    }
}

#[test]
fn a_span_of_two_hundred_attributes() {
    let put = |i: usize| Call::Put(KEYS[i % KEYS.len()], Any::Int(i as i64 - 100));
    let script = Script { kind: Kind::Internal, calls: (0..200).map(put).collect(), panics: false };
    compare(&[record(0, 9, vec![script])], 512);
}

#[test]
fn a_record_whose_folding_panics_leaves_nothing_behind() {
    let calm = Script { kind: Kind::Internal, calls: vec![Call::Error("why")], panics: false };
    let broken = Script { panics: true, ..calm.clone() };
    let resources = resources();
    let mut requests = Requests::new(ANCHOR);
    requests.add(&record(1, 1, vec![calm.clone()]));
    let add = |requests: &mut Requests, record: &Record<Script>| {
        let adding = std::panic::AssertUnwindSafe(|| requests.add(record));
        assert!(std::panic::catch_unwind(adding).is_err());
        requests.roll_back();
    };
    add(&mut requests, &record(1, 2, vec![calm.clone(), broken.clone()]));
    add(&mut requests, &record(0, 3, vec![broken]));
    requests.add(&record(1, 4, vec![calm.clone()]));
    requests.roll_back();
    let encoded = requests.take(usize::MAX, &resources);
    let decoded = ExportTraceServiceRequest::decode(encoded.bytes).expect("protobuf");
    let mut expect = Vec::new();
    [1, 4].into_iter().for_each(|trace| record(1, trace, vec![calm.clone()]).fold(&mut expect));
    assert_eq!((encoded.spans, decoded.resource_spans.len()), (4, 1));
    assert_same(&in_order(decoded.resource_spans[0].clone()), &by_sdk(&expect, &resources[1]));
}

#[test]
fn nothing_makes_an_empty_request() {
    let encoded = Requests::new(ANCHOR).take(10, &resources());
    assert_eq!((encoded.spans, encoded.bytes.len()), (0, 0));
}
