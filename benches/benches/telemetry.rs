//! The telemetry path: what a request pays, and what the worker pays behind its back.

use std::hint::black_box;
use std::sync::{Arc, Mutex, Weak};

use benches::{head, one_traced_request};
use criterion::{Criterion, criterion_group, criterion_main};
use engine_sim::core::facts::EngineFact;
use gateway::spans::GatewayFact;
use http::HeaderMap;
use shared::ids::{SpanId, TraceId};
use shared::trace::context::{Propagation, TraceContext, extract, inject};
use shared::trace::record::{Closed, Open, Sink};
use shared::trace::sampler::{Ratio, Sampler};
use shared::trace::{Span, Trail};

fn context(c: &mut Criterion) {
    let propagation = Propagation::new(true);
    let ids = (TraceId::new(0x1234).unwrap(), SpanId::new(0x56).unwrap());
    let plain = TraceContext { trace_id: ids.0, span_id: ids.1, sampled: true, random: false, tracestate: None };
    let state = TraceContext { tracestate: Some("ot=th:e666,vendor=value".into()), ..plain.clone() };
    let mut group = c.benchmark_group("trace_context");
    for (name, context) in [("plain", plain), ("tracestate", state)] {
        let mut headers = HeaderMap::new();
        inject(&context, &mut headers);
        group.bench_function(format!("parse/{name}"), |b| b.iter(|| extract(black_box(&headers), &propagation)));
        group.bench_function(format!("format/{name}"), |b| b.iter(|| inject(black_box(&context), &mut headers)));
    }
    group.finish();
}

fn sampler(c: &mut Criterion) {
    let sampler = Sampler::parent_based_ratio(Ratio::new(0.1).unwrap());
    let mut n = 0u128;
    c.bench_function("sampling_decision", |b| {
        b.iter(|| {
            n += 0x9E37_79B9_7F4A_7C15;
            sampler.sample(None, TraceId::new(black_box(n)).unwrap())
        });
    });
}

/// Keeps the last closed record.
#[derive(Default)]
struct Last(Mutex<Option<Box<dyn Closed>>>);

impl Sink for Last {
    fn accept(&self, record: Box<dyn Closed>) {
        *self.0.lock().unwrap() = Some(record);
    }
    fn opened(&self, _: Weak<dyn Open>) {}
}

/// One full trace of the default scenario: 24 spans, recorded by gateway and engine, then folded.
fn record_and_fold(c: &mut Criterion) {
    let mut group = c.benchmark_group("trace");
    let last = Arc::new(Last::default());
    let sink: Arc<dyn Sink> = last.clone();
    let facts = one_traced_request();
    let record = |sink: &Arc<dyn Sink>| {
        let gateway = Trail::<GatewayFact>::open(head(), sink);
        facts.gateway.iter().for_each(|(at, fact)| gateway.note(*at, || fact.clone()));
        gateway.finish(facts.end);
        let engine = Trail::<EngineFact>::open(head(), sink);
        facts.engine.iter().for_each(|(at, fact)| engine.note(*at, || fact.clone()));
        engine.finish(facts.end);
    };
    group.bench_function("record", |b| b.iter(|| record(&sink)));
    group.bench_function("record_unsampled", |b| {
        let (gateway, engine) = (Trail::<GatewayFact>::off(), Trail::<EngineFact>::off());
        b.iter(|| {
            facts.gateway.iter().for_each(|(at, fact)| black_box(&gateway).note(*at, || fact.clone()));
            facts.engine.iter().for_each(|(at, fact)| black_box(&engine).note(*at, || fact.clone()));
        });
    });
    let records = closed(&facts);
    let mut spans: Vec<Span> = Vec::new();
    group.bench_function("fold", |b| {
        b.iter(|| {
            spans.clear();
            records.iter().for_each(|r| r.fold(&mut spans));
            spans.len()
        });
    });
    assert_eq!(spans.len(), 24, "the trace of the default scenario");
    group.finish();
}

fn closed(facts: &benches::Facts) -> Vec<Box<dyn Closed>> {
    let last = Arc::new(Last::default());
    let sink: Arc<dyn Sink> = last.clone();
    let take = || last.0.lock().unwrap().take().expect("a record was closed");
    let gateway = Trail::<GatewayFact>::open(head(), &sink);
    facts.gateway.iter().for_each(|(at, fact)| gateway.note(*at, || fact.clone()));
    gateway.finish(facts.end);
    let gateway = take();
    let engine = Trail::<EngineFact>::open(head(), &sink);
    facts.engine.iter().for_each(|(at, fact)| engine.note(*at, || fact.clone()));
    engine.finish(facts.end);
    vec![gateway, take()]
}

criterion_group!(benches, context, sampler, record_and_fold);
criterion_main!(benches);
