use shared::time::Dur;
use shared::tokens::TokenId;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::{Ratio, Resource, SamplerKind, Span, Telemetry, TelemetryConfig};
use tokio::sync::oneshot;

use super::client::Asked;
use super::*;
use crate::core::kv_index::events::{CacheEvent, EngineHash, Stored};
use crate::core::kv_index::{Match, model_of_topic};
use crate::server::connect::Connector;
use crate::server::runtime::Upstream;
use crate::spans::{EventsFact, Failure};

/// A manager of the engines `a` and `b`, of which `a` holds the first two blocks of the prompt.
struct Rig {
    addr: SocketAddr,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    stop: oneshot::Sender<()>,
    config: PreciseConfig,
    backends: Vec<Backend>,
}

fn keys(blocks: usize) -> Vec<u64> {
    let mut hasher = PreciseConfig::default().hasher("m", None);
    hasher.tokens((0..16 * blocks as u32).map(TokenId));
    hasher.finish()
}

impl Rig {
    async fn start() -> Rig {
        let (clock, spans) = (RunClock::start(), MemorySpans::default());
        let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::ALL);
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let config = TelemetryConfig { sampler, exporters, ..TelemetryConfig::default() };
        let telemetry = Telemetry::live(config, clock).unwrap();
        let tracer = telemetry.tracer(Resource::new("kv-cache-manager", "kv-cache-manager-0"));
        // Nobody listens there: what they hold is told directly.
        let backends: Vec<Backend> = ["a", "b"].map(|name| Backend::new(name, "http://127.0.0.1:9").unwrap()).into();
        let config = PreciseConfig { speculative: true, ..PreciseConfig::default() };
        let manager =
            KvManager::bind(([127, 0, 0, 1], 0).into(), config.clone(), backends.clone(), tracer, clock).await.unwrap();
        let stored = Stored {
            blocks: vec![EngineHash(1), EngineHash(2)],
            tokens: (0..32).map(TokenId).collect(),
            block_tokens: 16,
            ..Stored::default()
        };
        let batch = Batch { events: vec![CacheEvent::Stored(stored)], ..Batch::default() };
        let model = model_of_topic("kv@pod@m");
        assert_eq!(manager.state.take(EndpointId(0), model.as_deref(), &batch, false), Applied::Taken);
        let (addr, (stop, stopped)) = (manager.local_addr(), oneshot::channel());
        tokio::spawn(manager.run(async move { drop(stopped.await) }));
        let config = PreciseConfig { manager: Some(format!("http://{addr}")), ..config };
        Rig { addr, telemetry, spans, clock, stop, config, backends }
    }

    fn client(&self, config: &PreciseConfig) -> Manager {
        let connector = Connector::new(&Default::default(), &Default::default()).unwrap();
        let client: Upstream =
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build(connector);
        Manager::of(config, &client).unwrap()
    }

    async fn ask(&self, keys: &[u64]) -> Asked {
        self.client(&self.config).ask(&"m".into(), keys, http::HeaderMap::new(), &self.backends).await
    }

    async fn post(&self, path: &str, body: &str) -> u16 {
        let client = self.client(&self.config);
        let request = http::Request::post(format!("http://{}{path}", self.addr));
        let request = request.body(http_body_util::Full::new(body.to_owned().into())).unwrap();
        client.raw(request).await
    }

    fn spans(self) -> Vec<Span> {
        drop(self.stop);
        self.telemetry.shutdown(self.clock.now());
        let spans = self.spans.take().spans;
        let registry = Registry::builtin().unwrap();
        let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO });
        assert!(found.is_empty(), "{found:#?}");
        spans
    }
}

#[tokio::test]
async fn a_manager_says_who_holds_a_prompt() {
    let rig = Rig::start().await;
    let asked = rig.ask(&keys(3)).await;
    let held = Match { blocks: 2, score: 2.0 };
    assert_eq!(asked.answer, Some(vec![held, Match::default()]));
    assert_eq!((asked.status, asked.failure), (Some(200), None));
    assert_eq!(rig.ask(&[]).await.answer, Some(vec![Match::default(); 2]));

    assert_eq!(rig.post("/v1/expect", &format!(r#"{{"endpoint":"b","block_keys":{:?}}}"#, keys(1))).await, 204);
    let asked = rig.ask(&keys(3)).await;
    assert_eq!(asked.answer, Some(vec![held, Match { blocks: 1, score: 1.0 }]), "what is expected counts too");

    let spans = rig.spans();
    let roots: Vec<&Span> = spans.iter().filter(|s| s.name == "kvcache.manager.get_scores").collect();
    assert_eq!(roots.len(), 3);
    for name in ["kvcache.storage.lookup", "kvcache.scorer.compute"] {
        let inner: Vec<&Span> = spans.iter().filter(|s| s.name == name).collect();
        assert_eq!(inner.len(), 3, "{name}");
        assert!(inner.iter().all(|s| roots.iter().any(|r| Some(r.span_id) == s.parent)), "{name}");
    }
}

/// Like those of scrapes, they are no requests'.
#[test]
fn traces_of_batches_of_events_are_counted_apart() {
    let config = TelemetryConfig { kv_events: Ratio::ALL, ..TelemetryConfig::default() };
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config, clock).unwrap();
    let traces = telemetry.tracer(Resource::new("kv-cache-manager", "kv-cache-manager-0")).kv_events().unwrap();
    (0..3).for_each(|_| traces.start::<EventsFact>(clock.now()).finish(clock.now()));
    let stats = telemetry.shutdown(clock.now());
    assert_eq!((stats.kv_event_traces_sampled, stats.scrape_traces_sampled, stats.own_traces_sampled), (3, 0, 0));
    assert_eq!((stats.records_folded, stats.traces_started), (3, 0));
}

#[tokio::test]
async fn what_cannot_be_read_is_refused() {
    let rig = Rig::start().await;
    assert_eq!(rig.post("/v1/score", "{").await, 400);
    assert_eq!(rig.post("/v1/score", r#"{"model":"m","block_keys":[-1]}"#).await, 400);
    assert_eq!(rig.post("/v1/expect", r#"{"endpoint":"c","block_keys":[1]}"#).await, 404);
    let many = serde_json::json!({"model": "m", "block_keys": vec![1; 131_073]}).to_string();
    assert_eq!(rig.post("/v1/score", &many).await, 413);
    assert_eq!(rig.post("/v1/score", &" ".repeat(5 << 20)).await, 413);
}

#[tokio::test]
async fn without_an_answer_there_is_none() {
    let rig = Rig::start().await;
    let nobody = PreciseConfig { manager: Some("http://127.0.0.1:9".into()), ..rig.config.clone() };
    let asked = rig.client(&nobody).ask(&"m".into(), &keys(1), http::HeaderMap::new(), &rig.backends).await;
    assert_eq!((asked.answer, asked.failure), (None, Some(Failure::Connect)));

    // Accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = PreciseConfig {
        manager: Some(format!("http://{}", silent.local_addr().unwrap())),
        manager_timeout: shared::units::HumanDur(Dur::from_millis(20)),
        ..rig.config.clone()
    };
    let asked = rig.client(&config).ask(&"m".into(), &keys(1), http::HeaderMap::new(), &rig.backends).await;
    assert_eq!((asked.answer, asked.failure), (None, Some(Failure::Timeout)));
}
