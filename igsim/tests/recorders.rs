//! Both recorders give the same span trees: one set of folds, whether facts are kept or become calls of the SDK at once.
//!
//! The same requests, one after the other, for each recorder through servers of its own. Compared are names, kinds, parents,
//! attributes, events, links and status; ids, times and the attributes that depend on time ([`TIMED`]) are not.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Input, NewRequest, Output, RequestKey, prepare_prompt};
use engine_sim::core::facts::EngineFact;
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::SamplingParams;
use engine_sim::server::pacing::Pacer;
use engine_sim::server::{Frontend, Server as EngineServer, ServerConfig};
use gateway::core::config::GatewayConfig;
use gateway::server::{Backend, Server as GatewayServer};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use shared::block_hash::ExtraKeys;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::tokens::ContentId;
use shared::trace::check::{CheckOptions, check};
use shared::trace::config::{ExporterConfig, RecorderKind};
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::tree::{Forest, value_text};
use shared::trace::{Ratio, Resource, Sampler, Span, Stats, Telemetry, TelemetryConfig, TraceSet, Trail};
use shared::units::HumanDur;
use tokio::sync::watch;

/// Attributes whose values depend on how long things took, on how bytes arrived, or on which ports were free.
const TIMED: &[&str] = &[
    "gateway.response.chunks",
    "gateway.response.time_to_first_token_ms",
    "gateway.response.total_bytes",
    "gateway.scheduler.metrics_age_ms",
    "gen_ai.latency.e2e",
    "gen_ai.latency.time_to_first_token",
    "server.port",
];

const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";

/// A telemetry that keeps its spans in memory.
struct Kept {
    clock: RunClock,
    telemetry: Telemetry,
    spans: MemorySpans,
}

impl Kept {
    fn new(recorder: RecorderKind, ratio: f64) -> Kept {
        Kept::with(recorder, ratio, |_| ())
    }

    fn with(recorder: RecorderKind, ratio: f64, change: impl FnOnce(&mut TelemetryConfig)) -> Kept {
        let (clock, spans) = (RunClock::start(), MemorySpans::default());
        let sampler = Sampler::parent_based_ratio(Ratio::new(ratio).unwrap());
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let mut config = TelemetryConfig { recorder, sampler, exporters, ..TelemetryConfig::default() };
        change(&mut config);
        Kept { clock, telemetry: Telemetry::live(config, clock).unwrap(), spans }
    }

    fn done(self) -> (TraceSet, Stats) {
        let stats = self.telemetry.shutdown(self.clock.now());
        assert_eq!(stats.spans_created, stats.exporters[0].exported, "{stats:#?}");
        (self.spans.take(), stats)
    }
}

/// The trees of a set, without what may differ.
fn trees(spans: &[Span]) -> String {
    // How far an engine gets before it learns that its caller has left depends on time.
    let left = |s: &&Span| s.events.iter().any(|e| e.name == "gateway.client_disconnected");
    let left: BTreeSet<_> = spans.iter().filter(left).map(|s| s.trace_id).collect();
    let compared = |s: &&Span| !(s.name.starts_with("vllm.") && left.contains(&s.trace_id));
    // The recorders export in different orders.
    let mut spans: Vec<Span> = spans.iter().filter(compared).cloned().collect();
    spans.sort_by_key(|s| s.start);
    let mut out = String::new();
    Forest::new(&spans).walk(|depth, span| {
        let pad = "  ".repeat(depth);
        let _ = writeln!(out, "{pad}{} {:?} {:?} {:?}", span.name, span.kind, span.status, span.tracestate);
        let mut lines: Vec<String> = span
            .attrs
            .iter()
            .filter(|(key, _)| !TIMED.contains(&&**key))
            .map(|(key, value)| format!("{key}={}", value_text(value)))
            .chain(span.events.iter().map(|e| {
                let attrs: Vec<_> = e.attrs.iter().map(|(k, v)| format!("{k}={}", value_text(v))).collect();
                format!("! {} {}", e.name, attrs.join(" "))
            }))
            .chain(span.links.iter().map(|l| format!("~ {} attributes", l.attrs.len())))
            .collect();
        lines.sort();
        lines.iter().for_each(|line| {
            let _ = writeln!(out, "{pad}  {line}");
        });
    });
    out
}

/// Fails with the lines that differ.
fn assert_same(deferred: &str, eager: &str) {
    if deferred != eager {
        let pairs = deferred.lines().zip(eager.lines()).filter(|(a, b)| a != b);
        let different: Vec<String> = pairs.map(|(a, b)| format!("  deferred {a}\n  eager    {b}")).collect();
        panic!("the trees differ:\n{}\n\ndeferred:\n{deferred}\neager:\n{eager}", different.join("\n"));
    }
}

fn assert_sound(set: &TraceSet) {
    let registry = Registry::builtin().expect("the registry is sound");
    let found = check(set, &CheckOptions { registry: Some(&registry), ..CheckOptions::default() });
    assert!(found.is_empty(), "{found:#?}");
}

/// Gateway, an engine, and an address where nobody listens that looks like another one.
struct Stack {
    kept: Kept,
    gateway: SocketAddr,
    stop: watch::Sender<bool>,
    servers: Vec<tokio::task::JoinHandle<()>>,
    _pacer: Pacer,
}

impl Stack {
    async fn start(recorder: RecorderKind, ratio: f64) -> Stack {
        let kept = Kept::new(recorder, ratio);
        let (stop, stopped) = watch::channel(false);
        let stopped = move || {
            let mut stopped = stopped.clone();
            async move { _ = stopped.wait_for(|s| *s).await }
        };
        // Short steps, so that a caller can leave in the middle; chunks small enough for a prompt to need two.
        let mut engine = EngineConfig { profile: "llama-3.1-8b-h100".into(), ..EngineConfig::default() };
        engine.scheduler.max_num_batched_tokens = 256;
        let profile = LatencyProfile::named(&engine.profile).unwrap();
        let pacer = Pacer::start(kept.clock, vec![Engine::new(engine.clone(), profile)]).unwrap();
        let config = ServerConfig {
            engine,
            model: "m".into(),
            max_body_bytes: 1 << 20,
            prompt_tokens_details: true,
            frontend: Frontend::default(),
            on_served: None,
        };
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let tracer = kept.telemetry.tracer(Resource::new("vllm", "engine-0"));
        let server = EngineServer::bind(any, config, pacer.engine(0), tracer, kept.clock).await.unwrap();
        let alive = Backend::new("alive", &format!("http://{}", server.local_addr().unwrap())).unwrap();
        let nobody = tokio::net::TcpListener::bind(any).await.unwrap().local_addr().unwrap();
        let dead = Backend::new("dead", &format!("http://{nobody}")).unwrap();
        // Without the health filter an endpoint that cannot be reached is chosen, as between two scrapes.
        let mut config = GatewayConfig::default();
        config.profile.filters.clear();
        // Every decision is made on the figures of the first scrape, so that it does not depend on time.
        config.metrics.scrape_interval = HumanDur::secs(3_600);
        config.saturation.metrics_staleness = HumanDur::secs(3_600);
        let engine_stopped = stopped();
        let mut servers = vec![tokio::spawn(async move { server.run(engine_stopped).await.unwrap() })];
        let tracer = kept.telemetry.tracer(Resource::new("inference-gateway", "gateway-0"));
        let server = GatewayServer::bind(any, config, vec![dead, alive], tracer, kept.clock, Seed(1)).await.unwrap();
        let (gateway, stats) = (server.local_addr(), server.stats());
        let gateway_stopped = stopped();
        servers.push(tokio::spawn(async move { _ = server.run(gateway_stopped).await }));
        while stats().scrapes < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Stack { kept, gateway, stop, servers, _pacer: pacer }
    }

    /// Sends a request on a connection of its own and reads its answer, or leaves after the first piece.
    async fn post(&self, id: usize, path: &str, body: &str, parent: Option<&str>, leave: bool) -> u16 {
        let mut request = Request::post(format!("http://{}{path}", self.gateway))
            .header("content-type", "application/json")
            .header("x-request-id", format!("r-{id}"));
        if let Some(flags) = parent {
            request = request.header("traceparent", format!("{CALLER}-{flags}")).header("tracestate", "v=1");
        }
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let response = client.request(request.body(Full::from(Bytes::from(body.to_owned()))).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let mut body = response.into_body();
        if leave {
            body.frame().await.expect("a piece").expect("of the answer");
        } else {
            body.collect().await.unwrap();
        }
        status
    }

    async fn done(self) -> (TraceSet, Stats) {
        let gone = self.settle();
        gone.await;
        self.stop.send_replace(true);
        for server in self.servers {
            server.await.unwrap();
        }
        tokio::task::spawn_blocking(move || self.kept.done()).await.unwrap()
    }

    /// Waits until every record that was opened is closed.
    async fn settle(&self) {
        let open = || {
            let stats = self.kept.telemetry.stats();
            stats.records_opened > stats.records_closed
        };
        for _ in 0..1_000 {
            if !open() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("a record stays open: {:?}", self.kept.telemetry.stats());
    }
}

/// Path, body, flags of the caller's trace, whether the caller leaves early, expected status.
type Case = (&'static str, String, Option<&'static str>, bool, u16);

fn cases() -> Vec<Case> {
    let (chat, plain) = ("/v1/chat/completions", "/v1/completions");
    let message =
        |text: &str, more: &str| format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]{more}}}"#);
    let long = "word ".repeat(300);
    vec![
        (chat, message("hello", r#","max_tokens":3"#), None, false, 200),
        (chat, message("hello", r#","max_tokens":4,"stream":true"#), None, false, 200),
        (plain, r#"{"model":"m","prompt":"hello","max_tokens":3,"temperature":0.5}"#.into(), Some("01"), false, 200),
        (plain, r#"{"model":"m","prompt":"hello","max_tokens":3,"stream":true}"#.into(), None, false, 200),
        (chat, message(&long, r#","max_tokens":2,"stream":true"#), None, false, 200),
        (chat, message("hello", r#","max_tokens":2,"n":0"#), None, false, 400),
        (chat, "{".into(), None, false, 400),
        // Only the dead endpoint may serve a model that nobody knows.
        (chat, message("hello", "").replace("\"m\"", "\"other\""), None, false, 502),
        (chat, message("stay", r#","max_tokens":5000,"stream":true"#), None, true, 200),
        (chat, message("hello", r#","max_tokens":2"#), Some("00"), false, 200),
    ]
}

async fn all_cases(recorder: RecorderKind) -> (TraceSet, Stats) {
    let stack = Stack::start(recorder, 1.0).await;
    for (id, (path, body, parent, leave, expect)) in cases().into_iter().enumerate() {
        let status = stack.post(id, path, &body, parent, leave).await;
        assert_eq!(status, expect, "{path} {body}");
        stack.settle().await;
    }
    stack.done().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_requests_give_the_same_trees() {
    let (deferred, _) = all_cases(RecorderKind::Deferred).await;
    let (eager, stats) = all_cases(RecorderKind::Eager).await;
    assert_sound(&eager);
    let (deferred, eager) = (trees(&deferred.spans), trees(&eager.spans));
    assert_same(&deferred, &eager);
    // The cases are what they are meant to be.
    for sign in ["! gateway.retry", "! gateway.client_disconnected", "vllm.scheduler.create_batch"] {
        assert!(eager.contains(sign), "{sign}:\n{eager}");
    }
    assert_eq!((stats.traces_started, stats.records_abandoned), (8, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsampled_requests_leave_nothing_behind() {
    for recorder in [RecorderKind::Deferred, RecorderKind::Eager] {
        let stack = Stack::start(recorder, 0.0).await;
        for (id, (path, body, _, leave, expect)) in cases().into_iter().enumerate() {
            assert_eq!(stack.post(id, path, &body, None, leave).await, expect);
        }
        let (set, stats) = stack.done().await;
        assert_eq!((set.spans.len(), stats.records_opened, stats.spans_created), (0, 0, 0), "{recorder:?}");
        // A request that the gateway answers itself never gets to the engine, and only roots start traces.
        assert_eq!((stats.traces_started, stats.traces_sampled), (cases().len() as u64, 0), "{recorder:?}");
    }
}

/// Requests that an engine with few blocks cannot hold at once, in virtual time: one is preempted and resumed, one aborted. At the
/// finest detail, with every step of the engine.
fn preempted_and_aborted(recorder: RecorderKind) -> String {
    let kept = Kept::with(recorder, 1.0, |config| {
        config.detail = 3;
        config.engine_steps = Ratio::ALL;
    });
    let tracer = kept.telemetry.tracer(Resource::new("vllm", "engine-0"));
    let mut config = EngineConfig::default();
    config.cache.num_gpu_blocks = Some(20);
    config.max_model_len = Some(256);
    let mut engine = Engine::new(config.clone(), LatencyProfile::named(&config.profile).unwrap());
    engine.trace_steps(tracer.engine_steps());
    let mut trails: Vec<Trail<EngineFact>> = Vec::new();
    for key in 0..3u64 {
        let at = Time::ZERO + Dur::from_micros(100 * key);
        let (_, trail) = tracer.start(&HeaderMap::new(), at);
        let mut tokens = Vec::new();
        ContentId(key).extend(0, 120, &mut tokens);
        let new = NewRequest {
            key: RequestKey(key),
            prompt: prepare_prompt(&config.cache, &tokens, &ExtraKeys::default()),
            params: SamplingParams { max_tokens: 60, ..SamplingParams::default() },
            priority: 0,
            arrival: at,
            content: ContentId(100 + key),
            lora: None,
            trail: trail.clone(),
        };
        trails.push(trail);
        engine.handle(at, Input::Add(Box::new(new)));
    }
    let (mut out, mut wakeups) = (Vec::new(), 0);
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
        wakeups += 1;
        if wakeups == 20 {
            trails[0].note(at, || EngineFact::Aborted);
            engine.handle(at, Input::Abort(RequestKey(0)));
        }
    }
    for output in out {
        if let Output::Finished { key, at, .. } = output {
            trails[key.0 as usize].clone().finish(at);
        }
    }
    drop(trails);
    let (set, stats) = kept.done();
    assert_eq!(stats.records_abandoned, 0);
    assert_eq!((stats.traces_started, stats.own_traces_started), (3, stats.own_traces_sampled));
    let mut roots: Vec<&Span> = set.spans.iter().filter(|s| s.parent.is_none()).collect();
    roots.sort_by_key(|s| (s.start, s.name.clone()));
    let of =
        |root: &&Span| -> Vec<Span> { set.spans.iter().filter(|s| s.trace_id == root.trace_id).cloned().collect() };
    roots.iter().map(|root| trees(&of(root))).collect()
}

#[test]
fn preempted_and_aborted_requests_give_the_same_trees() {
    let [deferred, eager] = [RecorderKind::Deferred, RecorderKind::Eager].map(preempted_and_aborted);
    assert_same(&deferred, &eager);
    for sign in
        ["! vllm.preempted", "! vllm.resumed", "vllm.late=true", "vllm.engine.step", "~ 0", "vllm.sampler.sample"]
    {
        assert!(eager.contains(sign), "{sign}:\n{eager}");
    }
}
