//! An engine with its server, a client and telemetry in one process.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Snapshot};
use engine_sim::core::faults::{FaultRule, Faults};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::server::control::Control;
use engine_sim::server::pacing::{EngineHandle, Pacer};
use engine_sim::server::{Frontend, Server, ServerConfig};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::{Ratio, Resource, SamplerKind, Span, Telemetry, TelemetryConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// An engine that answers at once.
pub(crate) fn instant() -> EngineConfig {
    EngineConfig { profile: "instant".into(), ..EngineConfig::default() }
}

/// An engine that needs 6.4 ms a token: a long answer is still under way when a test looks at it.
pub(crate) fn paced() -> EngineConfig {
    EngineConfig { profile: "llama-3.1-8b-h100".into(), ..EngineConfig::default() }
}

/// A running engine.
pub(crate) struct Running {
    addr: SocketAddr,
    pub(crate) engine: EngineHandle,
    pacer: Option<Pacer>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// A whole answer.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Running {
    pub(crate) async fn start(engine: EngineConfig) -> Running {
        Running::with(engine, |_| ()).await
    }

    /// An engine with these faults before it, as JSON; further ones can be injected.
    pub(crate) async fn faulty(engine: EngineConfig, rules: &[&str], by_header: bool) -> Running {
        let rules: Vec<FaultRule> = rules.iter().map(|r| serde_json::from_str(r).unwrap()).collect();
        let faults = Faults::new(Seed(7), "engine-0", &rules).by_header(by_header);
        Running::launch(engine, |engine| engine.with_faults(faults), |_| ()).await
    }

    pub(crate) async fn with(engine: EngineConfig, change: impl FnOnce(&mut ServerConfig)) -> Running {
        Running::launch(engine, |engine| engine, change).await
    }

    async fn launch(
        engine: EngineConfig,
        prepare: impl FnOnce(Engine) -> Engine,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Running {
        let profile = LatencyProfile::named(&engine.profile).unwrap();
        assert_eq!(engine.validate(&profile), []);
        let clock = RunClock::start();
        let spans = MemorySpans::default();
        let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::new(1.0).unwrap());
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let telemetry = TelemetryConfig { sampler, exporters, ..TelemetryConfig::default() };
        let telemetry = Telemetry::live(telemetry, clock).unwrap();
        let tracer = telemetry.tracer(Resource::new("vllm", "engine-0"));
        let pacer = Pacer::start(clock, vec![prepare(Engine::new(engine.clone(), profile.clone()))]).unwrap();
        let mut config = ServerConfig {
            engine,
            model: profile.model.as_str().into(),
            max_body_bytes: 1 << 20,
            prompt_tokens_details: false,
            frontend: Frontend::default(),
            on_served: None,
        };
        change(&mut config);
        let handle = pacer.engine(0);
        let any = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(any, config, handle.clone(), tracer, clock).await.unwrap();
        let addr = server.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(server.run(async { _ = stopped.await }));
        let client = Client::builder(TokioExecutor::new()).build_http();
        Running { addr, engine: handle, pacer: Some(pacer), stop, server, telemetry, spans, clock, client }
    }

    pub(crate) fn request(&self, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
        let request = Request::post(format!("http://{}{path}", self.addr));
        let request = request.header("content-type", "application/json").header("x-request-id", "r-1");
        request.body(Full::from(body.into())).unwrap()
    }

    /// A control address for the engine.
    pub(crate) async fn control(&self, address: &str) -> std::io::Result<Control> {
        Control::bind(address.parse().unwrap(), vec![("engine-0".to_owned(), self.engine.clone())], self.clock).await
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    /// Lets a fault, as JSON, happen now.
    pub(crate) fn inject(&self, rule: &str) {
        self.engine.inject(self.clock.now(), serde_json::from_str(rule).unwrap());
    }

    /// Takes every fault back.
    pub(crate) fn mend(&self) {
        self.engine.clear_faults(self.clock.now());
    }

    /// Sends a request whose connection may break: the answer as far as it came, and whether it was complete.
    pub(crate) async fn attempt(&self, request: Request<Full<Bytes>>) -> (Option<u16>, String, bool) {
        let Ok(response) = self.client.request(request).await else { return (None, String::new(), false) };
        let status = Some(response.status().as_u16());
        let (mut body, mut text) = (response.into_body(), String::new());
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => text.extend(frame.data_ref().map(|data| String::from_utf8_lossy(data).into_owned())),
                Err(_) => return (status, text, false),
            }
        }
        (status, text, true)
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        self.client.request(request).await.unwrap()
    }

    /// Sends a request in a task of its own; aborting the task closes the connection.
    pub(crate) fn spawn(&self, request: Request<Full<Bytes>>) -> JoinHandle<http::Response<Incoming>> {
        let client = self.client.clone();
        tokio::spawn(async move { client.request(request).await.unwrap() })
    }

    pub(crate) async fn exchange(&self, request: Request<Full<Bytes>>) -> Reply {
        let (head, body) = self.send(request).await.into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        Reply { status: head.status.as_u16(), headers: head.headers, text }
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.exchange(self.request(path, body.to_owned())).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.exchange(Request::get(format!("http://{}{path}", self.addr)).body(Full::default()).unwrap()).await
    }

    /// Posts a body that is answered with 200 and JSON.
    pub(crate) async fn json(&self, path: &str, body: &str) -> Value {
        let reply = self.post(path, body).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/json"), "{}", reply.text);
        serde_json::from_str(&reply.text).unwrap()
    }

    /// Posts a body that is answered with a stream.
    pub(crate) async fn events(&self, path: &str, body: &str) -> Vec<String> {
        let reply = self.post(path, body).await;
        let kind = reply.header("content-type");
        assert_eq!((reply.status, kind), (200, "text/event-stream; charset=utf-8"), "{}", reply.text);
        let events = reply.text.strip_suffix("\n\n").expect("the last event is complete").split("\n\n");
        events.map(|e| e.strip_prefix("data: ").expect("events are data").to_owned()).collect()
    }

    /// The value of a line of the metrics page, given up to its value.
    pub(crate) async fn metric(&self, line: &str) -> f64 {
        let page = self.get("/metrics").await.text;
        let found = page.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("no {line} in\n{page}")).parse().unwrap()
    }

    /// Polls the engine's gauges until `holds`.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) {
        for _ in 0..10_000 {
            if self.engine.inspect(|e| holds(&e.snapshot())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("never {what}: {:?}", self.engine.inspect(|e| e.snapshot()));
    }

    /// Lets the engine die under its server.
    pub(crate) fn kill_engine(&mut self) {
        self.pacer = None;
    }

    /// Stops everything and returns what was recorded.
    pub(crate) async fn stop(self) -> Vec<Span> {
        drop(self.client);
        self.stop.send(()).expect("the server runs");
        self.server.await.unwrap().unwrap();
        drop(self.pacer);
        self.telemetry.shutdown(self.clock.now());
        self.spans.take().spans
    }
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

/// `text` with the time of creation and the hash of the configuration taken out.
pub(crate) fn timeless(text: &str) -> String {
    let text = masked(text, "\"created\":", 'T', |c| c.is_ascii_digit());
    masked(&text, "\"system_fingerprint\":\"vllm-0.33.0-", 'H', |c| c.is_ascii_hexdigit())
}

fn masked(text: &str, before: &str, mask: char, what: fn(char) -> bool) -> String {
    let mut parts = text.split(before);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str(before);
        out.push(mask);
        out.push_str(part.trim_start_matches(what));
    }
    out
}

/// The text in a chunk or in a whole answer.
pub(crate) fn content(chunk: &Value) -> String {
    let choice = &chunk["choices"][0];
    let found = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
    found.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned()
}

/// The chunks of a stream, without the mark of its end.
pub(crate) fn chunks(events: &[String]) -> Vec<Value> {
    let (end, chunks) = events.split_last().expect("a stream has an end");
    assert_eq!(end, "[DONE]");
    chunks.iter().map(|e| serde_json::from_str(e).unwrap()).collect()
}
