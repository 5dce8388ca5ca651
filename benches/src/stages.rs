//! The stages of the telemetry path, each as something that can be repeated: what a request pays, and what is paid behind its
//! back. Timed by `benches/telemetry.rs`, counted in instructions by the program `instructions`.

use std::hint::black_box;
use std::sync::{Arc, Mutex, Weak};

use engine_sim::core::facts::EngineFact;
use gateway::spans::{GatewayFact, proxy_span_id};
use http::HeaderMap;
use shared::clock::RunClock;
use shared::ids::{SpanId, TraceId};
use shared::time::{Anchor, Time};
use shared::trace::context::{Propagation, TraceContext, extract, inject};
use shared::trace::otlp_bytes::Requests;
use shared::trace::record::{Closed, Open, Sink, Ticket};
use shared::trace::sampler::{Ratio, Root, Sampler};
use shared::trace::{Resource, Span, Telemetry, TelemetryConfig, Tracer, Trail};

use crate::{Facts, head, one_traced_request};

/// One stage.
#[derive(Clone, Copy)]
pub struct Stage {
    /// Its name in benches and baselines.
    pub name: &'static str,
    /// Prepares it; what is returned does it once.
    pub prepare: fn() -> Box<dyn FnMut()>,
}

/// Every stage, in the order in which a request meets them.
pub const STAGES: &[Stage] = &[
    Stage { name: "context/parse", prepare: parse },
    Stage { name: "context/parse_tracestate", prepare: parse_tracestate },
    Stage { name: "context/decide", prepare: decide },
    Stage { name: "context/format", prepare: format },
    Stage { name: "context/format_tracestate", prepare: format_tracestate },
    Stage { name: "hop/unsampled", prepare: hop_unsampled },
    Stage { name: "hop/sampled", prepare: hop_sampled },
    Stage { name: "sites/none", prepare: sites_none },
    Stage { name: "sites/unsampled", prepare: sites_unsampled },
    Stage { name: "record/gateway", prepare: record_gateway },
    Stage { name: "record/engine", prepare: record_engine },
    Stage { name: "fold/spans", prepare: fold_spans },
    Stage { name: "fold/otlp", prepare: fold_otlp },
];

fn plain_context() -> TraceContext {
    let ids = (TraceId::new(0x1234).expect("not zero"), SpanId::new(0x56).expect("not zero"));
    TraceContext { trace_id: ids.0, span_id: ids.1, sampled: true, random: false, tracestate: None }
}

fn with_tracestate() -> TraceContext {
    TraceContext { tracestate: Some("ot=th:e666,vendor=value".into()), ..plain_context() }
}

fn parse() -> Box<dyn FnMut()> {
    parsing(&plain_context())
}

fn parse_tracestate() -> Box<dyn FnMut()> {
    parsing(&with_tracestate())
}

fn parsing(context: &TraceContext) -> Box<dyn FnMut()> {
    let (propagation, mut headers) = (Propagation::new(true), HeaderMap::new());
    inject(context, &mut headers);
    Box::new(move || drop(black_box(extract(black_box(&headers), &propagation))))
}

fn format() -> Box<dyn FnMut()> {
    formatting(plain_context())
}

fn format_tracestate() -> Box<dyn FnMut()> {
    formatting(with_tracestate())
}

fn formatting(context: TraceContext) -> Box<dyn FnMut()> {
    let mut headers = HeaderMap::new();
    Box::new(move || inject(black_box(&context), &mut headers))
}

fn decide() -> Box<dyn FnMut()> {
    let sampler = Sampler::parent_based_ratio(Ratio::new(0.1).expect("a ratio"));
    let mut n = 0u128;
    Box::new(move || {
        n += 0x9E37_79B9_7F4A_7C15;
        black_box(sampler.sample(None, TraceId::new(black_box(n)).expect("not zero")));
    })
}

fn live(root: Root) -> (Telemetry, Tracer) {
    let config = TelemetryConfig { sampler: Sampler { parent_based: true, root }, ..TelemetryConfig::default() };
    let telemetry = Telemetry::live(config, RunClock::start()).expect("no exporter can fail");
    let tracer = telemetry.tracer(Resource::new("bench", "bench-0"));
    (telemetry, tracer)
}

/// All of a hop's context handling where the trace is not kept: parse, draw ids, decide, inject.
fn hop_unsampled() -> Box<dyn FnMut()> {
    hop(Root::Off)
}

/// The same where it is kept.
fn hop_sampled() -> Box<dyn FnMut()> {
    hop(Root::On)
}

fn hop(root: Root) -> Box<dyn FnMut()> {
    let (telemetry, tracer) = live(root);
    let inbound = HeaderMap::new();
    let mut outbound = HeaderMap::new();
    Box::new(move || {
        let _keep = &telemetry;
        let started = tracer.begin(tracer.extract(black_box(&inbound)));
        let span = proxy_span_id(started.context.span_id, 0);
        tracer.inject(&started.context.child(span), &mut outbound);
    })
}

/// As many recording sites as an unrecorded request passes in both services: 19 in the gateway, 9 in the engine (those that
/// follow a test of their own count once, and each further token adds one). In a row and not in a loop, as they stand in its way.
fn sites_unsampled() -> Box<dyn FnMut()> {
    passing(|trail, (at, fact)| trail.note(*at, || fact.clone()))
}

/// The same walk past the same trail without the sites: what is to be taken off.
fn sites_none() -> Box<dyn FnMut()> {
    passing(|_, _| {})
}

fn passing(site: impl Fn(&Trail<GatewayFact>, &(Time, GatewayFact)) + Copy + 'static) -> Box<dyn FnMut()> {
    let (facts, trail) = (one_traced_request(), Trail::<GatewayFact>::off());
    Box::new(move || {
        let seven = || {
            let pass = || site(black_box(&trail), &facts.gateway[0]);
            let _: [(); 7] = [(); 7].map(|()| pass());
        };
        let _: [(); 4] = [(); 4].map(|()| seven());
    })
}

/// Keeps the last closed record.
#[derive(Default)]
struct Last(Mutex<Option<Box<dyn Closed>>>);

impl Sink for Last {
    fn accept(&self, record: Box<dyn Closed>) {
        *self.0.lock().expect("nobody panics with it") = Some(record);
    }
    fn opened(&self, _: Weak<dyn Open>) -> Ticket {
        Ticket::NONE
    }
    fn closed(&self, _: Ticket) {}
}

fn note_gateway(facts: &Facts, sink: &Arc<dyn Sink>) {
    let trail = Trail::<GatewayFact>::open(head(), sink);
    facts.gateway.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
    trail.finish(facts.end);
}

fn note_engine(facts: &Facts, sink: &Arc<dyn Sink>) {
    let trail = Trail::<EngineFact>::open(head(), sink);
    facts.engine.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
    trail.finish(facts.end);
}

/// The gateway's facts of one trace, recorded and closed.
fn record_gateway() -> Box<dyn FnMut()> {
    recording(note_gateway)
}

/// The engine's facts of one trace, recorded and closed.
fn record_engine() -> Box<dyn FnMut()> {
    recording(note_engine)
}

fn recording(note: fn(&Facts, &Arc<dyn Sink>)) -> Box<dyn FnMut()> {
    let (facts, sink): (Facts, Arc<dyn Sink>) = (one_traced_request(), Arc::new(Last::default()));
    Box::new(move || note(&facts, &sink))
}

/// Both closed records of one trace.
pub fn closed_records() -> Vec<Box<dyn Closed>> {
    let (facts, last) = (one_traced_request(), Arc::new(Last::default()));
    let sink: Arc<dyn Sink> = last.clone();
    [note_gateway, note_engine]
        .map(|note| {
            note(&facts, &sink);
            last.0.lock().expect("nobody panics with it").take().expect("a record was closed")
        })
        .into()
}

/// Both records of one trace into 24 spans.
fn fold_spans() -> Box<dyn FnMut()> {
    let (records, mut spans) = (closed_records(), Vec::<Span>::new());
    Box::new(move || {
        spans.clear();
        records.iter().for_each(|r| r.fold(&mut spans));
        assert_eq!(spans.len(), 24, "the trace of the default scenario");
    })
}

/// Both records of one trace into a request for a collector, cut at 512 spans.
fn fold_otlp() -> Box<dyn FnMut()> {
    let records = closed_records();
    let resources = [Arc::new(Resource::new("bench", "bench-0"))];
    let mut requests = Requests::new(Anchor::VIRTUAL);
    Box::new(move || {
        let spans: usize = records.iter().map(|r| requests.add(&**r)).sum();
        assert_eq!(spans, 24, "the trace of the default scenario");
        if requests.spans() >= 512 {
            black_box(requests.take(512, &resources));
        }
    })
}
