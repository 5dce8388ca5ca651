//! What a request pays with the eager recorder, for the same facts as the stages of the deferred path. Not counted in instructions:
//! the SDK's batch processor works beside the request.

use std::hint::black_box;

use engine_sim::core::facts::EngineFact;
use gateway::spans::{GatewayFact, proxy_span_id};
use http::HeaderMap;
use shared::clock::RunClock;
use shared::trace::config::{ExporterConfig, RecorderKind};
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::sampler::{Root, Sampler};
use shared::trace::{Resource, Telemetry, TelemetryConfig, Trail};

use crate::one_traced_request;
use crate::stages::Stage;

/// The stages of the eager recorder.
pub const STAGES: &[Stage] = &[
    Stage { name: "eager/hop_unsampled", prepare: hop_unsampled },
    Stage { name: "eager/unsampled", prepare: unsampled },
    Stage { name: "eager/record sampled", prepare: sampled },
];

/// How often what was exported is thrown away.
const EMPTY_EVERY: u32 = 256;

struct Eager {
    telemetry: Telemetry,
    spans: MemorySpans,
    runs: u32,
}

impl Eager {
    fn new(root: Root) -> Eager {
        let spans = MemorySpans::default();
        let config = TelemetryConfig {
            sampler: Sampler { parent_based: true, root },
            recorder: RecorderKind::Eager,
            exporters: vec![ExporterConfig::Memory(spans.clone())],
            ..TelemetryConfig::default()
        };
        let telemetry = Telemetry::live(config, RunClock::start()).expect("no exporter can fail");
        Eager { telemetry, spans, runs: 0 }
    }

    fn ran(&mut self) {
        self.runs += 1;
        if self.runs.is_multiple_of(EMPTY_EVERY) {
            drop(self.spans.take());
        }
    }
}

/// All of a hop's context handling where the trace is not kept, with the outermost span that decides it.
fn hop_unsampled() -> Box<dyn FnMut()> {
    let eager = Eager::new(Root::Off);
    let tracer = eager.telemetry.tracer(Resource::new("bench", "bench-0"));
    let (inbound, mut outbound) = (HeaderMap::new(), HeaderMap::new());
    let now = one_traced_request().end;
    Box::new(move || {
        let _keep = &eager;
        let (started, _trail) = tracer.start::<GatewayFact>(black_box(&inbound), now);
        if let Some(started) = started {
            let span = proxy_span_id(started.context.span_id, 0);
            tracer.inject(&started.context.child(span), &mut outbound);
        }
    })
}

/// Both services' part of one trace that is not kept: 24 spans that do not record.
fn unsampled() -> Box<dyn FnMut()> {
    traced(Root::Off)
}

/// Both services' part of one trace that is kept, up to the batch processor's queue: 24 spans.
fn sampled() -> Box<dyn FnMut()> {
    traced(Root::On)
}

fn traced(root: Root) -> Box<dyn FnMut()> {
    let mut eager = Eager::new(root);
    let gateway = eager.telemetry.tracer(Resource::new("gateway", "gateway-0"));
    let engine = eager.telemetry.tracer(Resource::new("vllm", "engine-0"));
    let (facts, headers) = (one_traced_request(), HeaderMap::new());
    Box::new(move || {
        let (_, trail): (_, Trail<GatewayFact>) = gateway.start(&headers, facts.gateway[0].0);
        facts.gateway.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
        trail.finish(facts.end);
        let (_, trail): (_, Trail<EngineFact>) = engine.start(&headers, facts.engine[0].0);
        facts.engine.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
        trail.finish(facts.end);
        eager.ran();
    })
}
