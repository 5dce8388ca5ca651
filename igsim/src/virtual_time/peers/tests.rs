//! Prefill in one virtual engine, decode in another: times, spans, and the same bytes twice.

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Input, NewRequest, Output, RequestKey};
use engine_sim::core::facts::{EngineFact, Operation};
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::kv_transfer::{KvAsk, KvRole, KvTransferConfig, LinkKind, RemoteBlocks, Shipment, Transfer};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::{FinishReason, SamplingParams};
use shared::block_hash::ExtraKeys;
use shared::ids::{RequestId, SpanId, TraceId};
use shared::rng::Seed;
use shared::time::Anchor;
use shared::tokens::ContentId;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::{Kind, Ratio, Resource, SamplerKind, Span, Telemetry, TelemetryConfig};

use super::*;
use crate::virtual_time::queue::Queue;

const PREFILL: usize = 0;
const DECODE: usize = 1;
const PROMPT: u32 = 1024;

enum Event {
    Send(usize, Option<Arc<RemoteBlocks>>),
    Heard(usize, Box<KvInput>),
    Step(usize),
}

/// How a request ended at one engine, with its tokens that came from another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    engine: usize,
    at: Time,
    reason: FinishReason,
    external: u32,
}

/// What a router in front of the two engines does, as far as this needs it.
struct Router {
    engines: [Engine; 2],
    tracers: [Tracer; 2],
    network: PeerNetwork,
    queue: Queue<Event>,
    caller: Option<TraceContext>,
    trails: [Trail<EngineFact>; 2],
    ends: Vec<End>,
    /// Whom the decoding engine is told to ask.
    asks: Arc<Peer>,
}

impl Router {
    fn new(telemetry: &Telemetry, sampled: bool) -> Router {
        let engine = |role| {
            let config = EngineConfig { kv_transfer: Some(KvTransferConfig::nixl(role)), ..EngineConfig::default() };
            Engine::new(config, LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap())
        };
        let engines = [engine(KvRole::KvProducer), engine(KvRole::KvConsumer)];
        let tracer = |i: usize| telemetry.tracer(Resource::new("vllm", format!("engine-{i}")));
        let network = PeerNetwork::new(engines.iter(), Dur::from_micros(100));
        let asks = Arc::clone(&network.peers[PREFILL]);
        let (trace_id, span_id) = (TraceId::new(7).unwrap(), SpanId::new(9).unwrap());
        let caller = TraceContext { trace_id, span_id, sampled, random: false, tracestate: None };
        Router {
            engines,
            tracers: [tracer(PREFILL), tracer(DECODE)],
            network,
            queue: Queue::default(),
            caller: Some(caller),
            trails: [Trail::off(), Trail::off()],
            ends: Vec::new(),
            asks,
        }
    }

    fn run(mut self) -> Router {
        self.queue.push(Time::ZERO, 0, Event::Send(PREFILL, None));
        while let Some((now, event)) = self.queue.pop() {
            let engine = match event {
                Event::Send(to, remote) => {
                    let request = self.request(to, remote, now);
                    self.engines[to].handle(now, Input::Add(request));
                    to
                }
                Event::Heard(to, mut input) => {
                    self.network.record(&mut input, &self.tracers[to], now);
                    self.engines[to].handle(now, Input::Kv(input));
                    to
                }
                Event::Step(engine) => engine,
            };
            self.advance(engine, now);
        }
        self
    }

    fn request(&mut self, to: usize, remote: Option<Arc<RemoteBlocks>>, now: Time) -> Box<NewRequest> {
        let mut tokens = Vec::new();
        ContentId(3).extend(0, u64::from(PROMPT), &mut tokens);
        let started = self.tracers[to].begin(self.caller.clone());
        let trail = self.tracers[to].open::<EngineFact>(&started, now);
        let (model, request) = ("m".into(), RequestId::sanitise("cmpl-1"));
        trail.note(now, || EngineFact::Received { model, request, operation: Operation::TextCompletion });
        trail.note(now, || EngineFact::InputsProcessed { started: now, prompt_tokens: PROMPT, truncated: false });
        self.trails[to] = trail.clone();
        Box::new(NewRequest {
            key: RequestKey(to as u64),
            prompt: prepare_prompt(&self.engines[to].config().cache, &tokens, &ExtraKeys::default()),
            params: SamplingParams { max_tokens: if to == PREFILL { 1 } else { 8 }, ..SamplingParams::default() },
            priority: 0,
            arrival: now,
            content: ContentId(5),
            lora: None,
            kv: Some(remote.map_or_else(|| KvAsk::Keep("cmpl-1-0".into()), KvAsk::Pull)),
            trail,
        })
    }

    fn advance(&mut self, engine: usize, now: Time) {
        let mut outputs = Vec::new();
        self.engines[engine].advance(now, &mut outputs);
        for output in outputs {
            let Output::Finished { at, reason, stats, kept, .. } = output else { continue };
            self.ends.push(End { engine, at, reason, external: stats.external_tokens });
            let trail = std::mem::take(&mut self.trails[engine]);
            trail.note(at, || EngineFact::LastWrite);
            trail.finish(at);
            if let Some(kept) = kept {
                let (peer, blocks) = (Arc::clone(&self.asks), kept.blocks.len() as u32);
                let remote = Arc::new(RemoteBlocks { peer, request: kept.request, blocks });
                self.queue.push(at + Dur::from_millis(1), 0, Event::Send(DECODE, Some(remote)));
            }
        }
        for message in self.network.carry(engine, &mut self.engines[engine]) {
            self.queue.push(message.at, 3, Event::Heard(message.to, Box::new(message.input)));
        }
        if let Some(at) = self.engines[engine].next_wakeup() {
            self.queue.push(at.max(now), 5, Event::Step(engine));
        }
    }
}

fn run(sampled: bool, change: impl FnOnce(&mut Router)) -> (Vec<End>, Vec<Span>) {
    let spans = MemorySpans::default();
    let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::new(1.0).unwrap());
    let exporters = vec![ExporterConfig::Memory(spans.clone())];
    let config = TelemetryConfig { sampler, exporters, ..TelemetryConfig::default() };
    let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(1)).unwrap();
    let mut router = Router::new(&telemetry, sampled);
    change(&mut router);
    let router = router.run();
    for engine in &router.engines {
        assert_eq!((engine.leases(), engine.blocks_without_request(), engine.open_requests()), (0, 0, 0));
        assert_eq!(engine.snapshot().kv_usage, 0.0);
    }
    let ends = router.ends;
    drop(router.trails);
    telemetry.shutdown(Time::ZERO);
    (ends, spans.take().spans)
}

fn transfers(spans: &[Span]) -> (&Span, &Span) {
    let side = |kind| spans.iter().find(|s| s.name == "vllm.kv_cache.transfer" && s.kind == kind);
    (side(Kind::Client).expect("the reader's side"), side(Kind::Server).expect("the sender's side"))
}

#[test]
fn a_transfer_has_two_spans_in_one_trace_and_takes_the_time_of_its_link() {
    let (ends, spans) = run(true, |_| ());
    let told: Vec<_> = ends.iter().map(|e| (e.engine, e.reason, e.external)).collect();
    assert_eq!(told, [(PREFILL, FinishReason::Length, 0), (DECODE, FinishReason::Length, PROMPT)]);
    let (client, server) = transfers(&spans);
    let request = |at: &Span| {
        spans.iter().find(|s| s.name == "vllm.engine.request" && s.instance == at.instance).expect("its request")
    };
    assert_eq!(client.parent, Some(request(client).span_id));
    assert_eq!(server.parent, Some(client.span_id));
    assert_eq!(client.trace_id, server.trace_id);
    let link = &server.links[0];
    assert_eq!((link.trace_id, link.span_id), (request(server).trace_id, request(server).span_id));
    let shipment = Shipment { blocks: PROMPT / 16, block_size: 16, receiver_ranks: 1 };
    let moved =
        Transfer::over(LinkKind::InfiniBand, &LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap(), shipment);
    assert_eq!(server.end - server.start, moved.time);
    // One way there, one way back.
    assert_eq!(client.end - client.start, moved.time + Dur::from_micros(200));
    for span in [client, server] {
        assert_eq!(span.get("vllm.kv_transfer.bytes").and_then(|v| v.as_int()), Some(moved.bytes() as i64));
    }
    // The caller's span is not here: two local roots, which a whole trace would not have.
    let registry = Registry::builtin().unwrap();
    let options = CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO };
    let findings: Vec<String> = check_spans(&spans, &options).iter().map(ToString::to_string).collect();
    assert!(findings.iter().all(|f| f.contains("one-root")), "{findings:#?}");
}

#[test]
fn an_unsampled_request_leaves_no_span_on_either_side() {
    let (ends, spans) = run(false, |_| ());
    assert_eq!(ends.len(), 2);
    assert_eq!(spans, []);
}

#[test]
fn the_same_run_gives_the_same_spans() {
    assert_eq!(run(true, |_| ()), run(true, |_| ()));
}

#[test]
fn an_engine_that_is_not_there_cannot_be_read_from() {
    let (ends, spans) = run(true, |router| {
        router.asks = Arc::new(Peer { engine_id: "nobody".into(), ..Peer::clone(&router.asks) });
    });
    let decoded = ends.iter().find(|e| e.engine == DECODE).unwrap();
    assert_eq!(decoded.reason, FinishReason::Error);
    let client = spans.iter().find(|s| s.name == "vllm.kv_cache.transfer").unwrap();
    assert_eq!(client.get("error.type").and_then(|v| v.as_str()), Some("kv_peer_unreachable"));
    let request = spans.iter().find(|s| Some(s.span_id) == client.parent).unwrap();
    assert_eq!(request.get("error.type").and_then(|v| v.as_str()), Some("kv_load_failed"));
}
