//! A sidecar, its two engines and a caller in one process.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use shared::clock::RunClock;
use shared::time::Dur;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::{Ratio, Resource, SamplerKind, Span, Status, Telemetry, TelemetryConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::engines::Engine;
use crate::pd_proxy::core::{Allowed, Done, PdProxyConfig};
use crate::pd_proxy::server::Server;
use crate::server::Backend;

/// What no span may show.
pub(super) const SECRET: &str = "the-secret-prompt";
/// A request as an OpenAI client writes it, with a field that nobody knows.
pub(super) const BODY: &str =
    r#"{"model":"m","x_unknown": 1.50,"stream":true,"max_tokens":7,"prompt":"the-secret-prompt"}"#;
pub(super) const PARAMS: &str =
    r#"{"do_remote_prefill":true,"remote_engine_id":"e-1","remote_block_ids":[[1,2]], "remote_port":5600}"#;

/// A running sidecar before the engine `decode`, which may have `prefill` prefill.
pub(super) struct Sidecar {
    pub(super) addr: SocketAddr,
    pub(super) prefill: Engine,
    pub(super) decode: Engine,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    done: Arc<Mutex<Vec<Done>>>,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Sidecar {
    pub(super) async fn start(config: PdProxyConfig) -> Sidecar {
        let (prefill, decode) = (Engine::start(0).await, Engine::start(0).await);
        let pool = prefill.addr.to_string();
        let engine = Backend::new("engine-0", &format!("http://{}", decode.addr)).unwrap();
        Sidecar::before(config, engine, &pool, prefill, decode).await
    }

    /// A sidecar before `engine`, which may have the engine at `pool` prefill.
    pub(super) async fn before(
        config: PdProxyConfig,
        engine: Backend,
        pool: &str,
        prefill: Engine,
        decode: Engine,
    ) -> Sidecar {
        let clock = RunClock::start();
        let spans = MemorySpans::default();
        let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::new(1.0).unwrap());
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let telemetry = TelemetryConfig { sampler, exporters, ..TelemetryConfig::default() };
        let telemetry = Telemetry::live(telemetry, clock).unwrap();
        let tracer = telemetry.tracer(Resource::new("pd-proxy", "pd-proxy-0"));
        let (any, allowed) = ("127.0.0.1:0".parse().unwrap(), Allowed::these([pool]).unwrap());
        let server = Server::bind(any, config, engine, tracer, clock).await.unwrap().allowing(allowed);
        let done = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&done);
        let server = server.telling(Arc::new(move |d| told.lock().unwrap().push(*d)));
        let addr = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(server.run(async { _ = stopped.await }));
        let client = Client::builder(TokioExecutor::new()).build_http();
        Sidecar { addr, prefill, decode, stop, server, telemetry, spans, clock, done, client }
    }

    pub(super) fn request(&self, body: &'static str) -> http::Request<Full<Bytes>> {
        let request = http::Request::post(format!("http://{}/v1/completions", self.addr));
        let request = request.header("content-type", "application/json").header("x-request-id", "req-1");
        request.body(Full::from(body)).unwrap()
    }

    /// A request to be prefilled at `target`.
    pub(super) fn to(&self, target: &str, body: &'static str) -> http::Request<Full<Bytes>> {
        let mut request = self.request(body);
        request.headers_mut().insert("x-prefiller-host-port", target.parse().unwrap());
        request
    }

    /// A request to be prefilled by the engine that is there for it.
    pub(super) fn disaggregated(&self) -> http::Request<Full<Bytes>> {
        self.to(&self.prefill.addr.to_string(), BODY)
    }

    pub(super) async fn send(&self, request: http::Request<Full<Bytes>>) -> http::Response<Incoming> {
        self.client.request(request).await.unwrap()
    }

    /// Like [`Sidecar::send`] in a task of its own, so that the test can play the engines.
    pub(super) fn spawn(&self, request: http::Request<Full<Bytes>>) -> JoinHandle<http::Response<Incoming>> {
        let client = self.client.clone();
        tokio::spawn(async move { client.request(request).await.unwrap() })
    }

    /// Stops it; what it did and recorded. Every span is as the registry says, and none shows content.
    pub(super) async fn done(self) -> (Vec<Done>, Vec<Span>) {
        self.stop.send(()).expect("the sidecar runs");
        self.server.await.unwrap();
        self.telemetry.shutdown(self.clock.now());
        let spans = self.spans.take().spans;
        let registry = Registry::builtin().expect("the registry is sound");
        let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO });
        assert!(found.is_empty(), "{found:#?}");
        let all = format!("{spans:?}");
        for secret in [SECRET, "remote_engine_id", "e-1", "the-secret-answer"] {
            assert!(!all.contains(secret), "{secret} in spans: {all}");
        }
        let done = self.done.lock().unwrap().clone();
        (done, spans)
    }
}

/// Names and types of errors of the spans that failed, sorted.
pub(super) fn errors(spans: &[Span]) -> Vec<String> {
    let failed = spans.iter().filter(|s| s.status != Status::Unset);
    let mut all: Vec<_> = failed
        .map(|s| format!("{} {}", s.name, s.get("error.type").and_then(|v| v.as_str()).unwrap_or_default()))
        .collect();
    all.sort();
    all
}

pub(super) fn named<'s>(spans: &'s [Span], name: &str) -> Vec<&'s Span> {
    spans.iter().filter(|s| s.name == name).collect()
}

/// The attribute of the only span of that name that has it.
pub(super) fn text<'s>(spans: &'s [Span], name: &str, key: &str) -> &'s str {
    let found = named(spans, name).iter().find_map(|s| s.get(key)?.as_str());
    found.unwrap_or_else(|| panic!("no {key} on {name}: {spans:?}"))
}

/// What the engine that prefills answers.
pub(super) fn prefilled() -> axum::response::Response {
    let text = format!(r#"{{"id":"cmpl-1","choices":[{{"text":"the-secret-answer"}}],"kv_transfer_params":{PARAMS}}}"#);
    super::engines::json(200, Box::leak(text.into_boxed_str()))
}
