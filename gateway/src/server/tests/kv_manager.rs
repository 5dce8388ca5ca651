//! A gateway beside a kv-cache-manager: which request it asks about, and that the manager learns which traces are kept.

use http_body_util::BodyExt;
use shared::clock::RunClock;
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::policy::Hold;
use shared::trace::verdict::KEEP_PATH;
use shared::trace::{Keep, Policy, Ratio, Resource, SamplerKind, Span, Stats, Telemetry, TelemetryConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::harness::{Call, Engine, Running, Tracing, json, named};
use crate::core::config::{GatewayConfig, PreciseConfig};
use crate::server::{Backend, KvManager};
use crate::spans::SCORE_PATH;

/// Two blocks at least.
const ASKED: &str = r#"{"model":"m","prompt":"one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"}"#;

/// A gateway that asks a manager at `url` about every request, and samples nothing but what `policy` keeps.
async fn gateway(url: &str, policy: Policy, engine: &Engine) -> Running {
    let yaml = format!(
        "precise_prefix: {{ manager: '{url}', manager_timeout: 60s, speculative: true }}\n\
         profile: {{ filters: [{{ type: healthy-filter }}], scorers: [{{ type: precise-prefix-cache-scorer }}] }}"
    );
    let config = shared::config::load_str::<GatewayConfig>("test", &yaml, &[]).unwrap_or_else(|e| panic!("{e}")).config;
    let telemetry = |t: &mut TelemetryConfig| {
        t.sampler = SamplerKind::ParentBasedTraceIdRatio.with(Ratio::NONE);
        t.hold = policy.keep.as_ref().map(Keep::hold);
        t.policy = policy;
    };
    Running::at("127.0.0.1:0", Tracing::On, telemetry, config, vec![engine.backend("a")]).await
}

/// A kv-cache-manager in this process that holds records of candidates, with telemetry of its own.
struct Manager {
    url: String,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

impl Manager {
    async fn start() -> Manager {
        let (clock, spans) = (RunClock::start(), MemorySpans::default());
        let config = TelemetryConfig {
            sampler: SamplerKind::ParentBasedTraceIdRatio.with(Ratio::NONE),
            exporters: vec![ExporterConfig::Memory(spans.clone())],
            hold: Some(Hold::default()),
            ..TelemetryConfig::default()
        };
        let telemetry = Telemetry::live(config, clock).unwrap();
        let tracer = telemetry.tracer(Resource::new("kv-cache-manager", "kv-cache-manager-0"));
        // It is asked about this engine, and hears nothing of it.
        let engines = vec![Backend::new("a", "http://127.0.0.1:9").unwrap()];
        let bound = KvManager::bind(([127, 0, 0, 1], 0).into(), PreciseConfig::default(), engines, tracer, clock);
        let manager = bound.await.unwrap();
        let (url, (stop, stopped)) = (format!("http://{}", manager.local_addr()), oneshot::channel());
        let server = tokio::spawn(manager.run(async move { drop(stopped.await) }));
        Manager { url, telemetry, spans, clock, stop, server }
    }

    /// What it exported, and what became of its records.
    async fn done(self) -> (Vec<Span>, Stats) {
        drop(self.stop);
        self.server.await.unwrap().unwrap();
        let stats = self.telemetry.shutdown(self.clock.now());
        (self.spans.take().spans, stats)
    }
}

fn reply(call: Call, status: u16, body: &'static str) {
    call.reply.send(json(status, body)).unwrap();
}

#[tokio::test]
async fn a_manager_exports_its_part_of_kept_traces_and_lets_go_of_others() {
    let (mut engine, manager) = (Engine::start(0).await, Manager::start().await);
    let keeping = Policy { keep: Some(Keep::default()), ..Policy::default() };
    let gateway = gateway(&manager.url, keeping, &engine).await;
    // Two that nobody keeps, and one that fails.
    for status in [200, 200, 503] {
        let response = gateway.spawn(gateway.post("/v1/completions", ASKED));
        reply(engine.call().await, status, "{}");
        response.await.unwrap().into_body().collect().await.unwrap();
    }
    let verdict = engine.call().await;
    assert_eq!(verdict.head.uri.path(), KEEP_PATH, "the engine is told");
    reply(verdict, 204, "");
    // It ends when everybody has been told.
    let (_, edge) = gateway.stop().done().await;
    let (held, stats) = manager.done().await;

    let (roots, parts) = (named(&edge, "gateway.request"), named(&held, "kvcache.manager.get_scores"));
    assert_eq!((roots.len(), parts.len()), (1, 1), "{held:#?}");
    assert!(held.iter().all(|span| span.trace_id == roots[0].trace_id), "{held:#?}");
    let lookups = named(&edge, "gateway.kvcache.lookup");
    assert_eq!(parts[0].parent, lookups.first().map(|lookup| lookup.span_id), "it hangs below the question");
    assert_eq!(held.len(), 3, "with its stages: {held:#?}");
    assert_eq!((stats.records_closed, stats.records_folded, stats.records_expired), (3, 1, 2));
}

#[tokio::test]
async fn a_manager_is_told_which_request_it_is_asked_about() {
    let (mut engine, mut manager) = (Engine::start(0).await, Engine::start(0).await);
    let gateway = gateway(&format!("http://{}", manager.addr), Policy::default(), &engine).await;
    let mut request = gateway.post("/v1/completions", ASKED);
    request.headers_mut().insert("x-request-id", "req-7".parse().unwrap());
    let response = gateway.spawn(request);
    let asked = manager.call().await;
    let id = |call: &Call| call.head.headers.get("x-request-id").cloned();
    assert_eq!((asked.head.uri.path(), id(&asked)), (SCORE_PATH, Some("req-7".parse().unwrap())));
    assert!(asked.head.headers.contains_key("traceparent"));
    reply(asked, 200, r#"{"blocks_found":0,"endpoints":{}}"#);
    let told = manager.call().await;
    assert_eq!((told.head.uri.path(), id(&told)), ("/v1/expect", Some("req-7".parse().unwrap())));
    reply(told, 204, "");
    reply(engine.call().await, 200, "{}");
    response.await.unwrap().into_body().collect().await.unwrap();
    gateway.stop().done().await;
}
