//! A gateway, its engines and a client in one process.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Dur;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::{Ratio, Resource, SamplerKind, Span, Telemetry, TelemetryConfig, Tracer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::core::config::GatewayConfig;
use crate::server::{Backend, Endpoints, Server, Stats};

/// A request that an engine received, to be answered by the test.
pub(crate) struct Call {
    pub(crate) head: http::request::Parts,
    pub(crate) body: Bytes,
    pub(crate) reply: oneshot::Sender<Response>,
}

/// An engine that does what the test says.
pub(crate) struct Engine {
    pub(crate) addr: SocketAddr,
    pub(crate) calls: mpsc::UnboundedReceiver<Call>,
}

#[derive(Clone)]
struct Script {
    waiting: u32,
    model: &'static str,
    calls: mpsc::UnboundedSender<Call>,
}

impl Engine {
    /// An engine that reports so many waiting requests and serves the model `m`.
    pub(crate) async fn start(waiting: u32) -> Engine {
        Engine::serving(waiting, "m").await
    }

    /// An engine that serves another model.
    pub(crate) async fn serving(waiting: u32, model: &'static str) -> Engine {
        let (sender, calls) = mpsc::unbounded_channel();
        let router = Router::new()
            .route("/metrics", get(gauges))
            .route("/v1/models", get(models))
            .fallback(call)
            .with_state(Script { waiting, model, calls: sender });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Engine { addr, calls }
    }

    pub(crate) async fn call(&mut self) -> Call {
        self.calls.recv().await.expect("the engine runs")
    }

    pub(super) fn backend(&self, name: &str) -> Backend {
        Backend::new(name, &format!("http://{}", self.addr)).unwrap()
    }
}

async fn models(State(script): State<Script>) -> String {
    format!(r#"{{"object":"list","data":[{{"id":"{}","object":"model"}}]}}"#, script.model)
}

async fn gauges(State(script): State<Script>) -> String {
    let waiting = script.waiting;
    format!("vllm:num_requests_running 0\nvllm:num_requests_waiting {waiting}\nvllm:kv_cache_usage_perc 0\n")
}

async fn call(State(script): State<Script>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let (reply, answer) = oneshot::channel();
    assert!(script.calls.send(Call { head, body, reply }).is_ok(), "the test listens");
    answer.await.expect("the test answers")
}

/// A body whose pieces the test sends.
struct Piped(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Piped {
    type Data = Bytes;
    type Error = std::convert::Infallible;
    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.get_mut().0.poll_recv(cx).map(|piece| Some(Ok(Frame::data(piece?))))
    }
}

/// A streamed response and the hand that feeds it.
pub(crate) fn stream() -> (mpsc::Sender<Bytes>, Response) {
    let (sender, receiver) = mpsc::channel(1);
    let response = Response::builder().header("content-type", "text/event-stream");
    (sender, response.body(Body::new(Piped(receiver))).unwrap())
}

pub(crate) fn json(status: u16, text: &'static str) -> Response {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(Body::from(text)).unwrap()
}

/// A running gateway.
pub(super) struct Running {
    pub(super) addr: SocketAddr,
    pub(super) stats: Box<dyn Fn() -> Stats>,
    pub(super) endpoints: Endpoints,
    stop: oneshot::Sender<()>,
    pub(super) server: JoinHandle<Stats>,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// Whether there is telemetry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracing {
    Off,
    /// Without a propagator.
    Alone,
    On,
}

impl Running {
    /// A gateway that records every request.
    pub(super) async fn start(config: GatewayConfig, backends: Vec<Backend>) -> Running {
        Running::with(Tracing::On, config, backends).await
    }

    pub(super) async fn with(tracing: Tracing, config: GatewayConfig, backends: Vec<Backend>) -> Running {
        Running::at("127.0.0.1:0", tracing, |_| (), config, backends).await
    }

    /// A gateway at this address, with telemetry to taste.
    pub(super) async fn at(
        addr: &str,
        tracing: Tracing,
        change: impl FnOnce(&mut TelemetryConfig),
        config: GatewayConfig,
        backends: Vec<Backend>,
    ) -> Running {
        let clock = RunClock::start();
        let spans = MemorySpans::default();
        let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::new(1.0).unwrap());
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let trace_context = tracing != Tracing::Alone;
        let mut telemetry = TelemetryConfig { sampler, exporters, trace_context, ..TelemetryConfig::default() };
        change(&mut telemetry);
        let telemetry = Telemetry::live(telemetry, clock).unwrap();
        let tracer = match tracing {
            Tracing::On | Tracing::Alone => telemetry.tracer(Resource::new("inference-gateway", "gateway-0")),
            Tracing::Off => Tracer::off(),
        };
        let server = Server::bind(addr.parse().unwrap(), config, backends, tracer, clock, Seed(1)).await.unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], server.local_addr().port()));
        let (stats, endpoints) = (Box::new(server.stats()), server.endpoints());
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(server.run(async { _ = stopped.await }));
        let client = Client::builder(TokioExecutor::new()).build_http();
        Running { addr, stats, endpoints, stop, server, telemetry, spans, clock, client }
    }

    /// Sends a request and waits for the head of its response.
    pub(super) async fn send(&self, request: http::Request<Full<Bytes>>) -> http::Response<Incoming> {
        self.client.request(request).await.unwrap()
    }

    /// Like [`Running::send`] in a task of its own, so that the test can play the engine.
    pub(super) fn spawn(&self, request: http::Request<Full<Bytes>>) -> JoinHandle<http::Response<Incoming>> {
        let client = self.client.clone();
        tokio::spawn(async move { client.request(request).await.unwrap() })
    }

    pub(super) fn client(&self) -> Client<HttpConnector, Full<Bytes>> {
        self.client.clone()
    }

    pub(super) fn post(&self, path: &str, body: &'static str) -> http::Request<Full<Bytes>> {
        let uri = format!("http://{}{path}", self.addr);
        http::Request::post(uri).header("content-type", "application/json").body(Full::from(body)).unwrap()
    }

    pub(super) fn chat(&self) -> http::Request<Full<Bytes>> {
        self.post("/v1/chat/completions", CHAT)
    }

    pub(super) async fn get(&self, path: &str) -> (u16, String) {
        let uri = format!("http://{}{path}", self.addr);
        let response = self.send(http::Request::get(uri).body(Full::default()).unwrap()).await;
        (response.status().as_u16(), text(response).await)
    }

    /// Waits until the gateway would give an endpoint a request, or would not.
    pub(super) async fn until_ready(&self, ready: bool) {
        while (self.get("/health").await.0 == 200) != ready {
            tokio::task::yield_now().await;
        }
    }

    /// Waits until these are the members of the pool.
    pub(super) async fn until_members(&self, names: &[&str]) {
        while self.endpoints.names() != names {
            tokio::task::yield_now().await;
        }
    }

    /// Asks for an orderly stop.
    pub(super) fn stop(self) -> Stopping {
        self.stop.send(()).expect("the gateway runs");
        Stopping { server: self.server, telemetry: self.telemetry, spans: self.spans, clock: self.clock }
    }
}

/// A gateway that drains.
pub(super) struct Stopping {
    server: JoinHandle<Stats>,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
}

impl Stopping {
    /// What it did and recorded, once it has stopped.
    pub(super) async fn done(self) -> (Stats, Vec<Span>) {
        let stats = self.server.await.unwrap();
        self.telemetry.shutdown(self.clock.now());
        let spans = self.spans.take().spans;
        let registry = Registry::builtin().expect("the registry is sound");
        let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO });
        assert!(found.is_empty(), "{found:#?}");
        (stats, spans)
    }
}

pub(super) const CHAT: &str = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}"#;

pub(crate) async fn text(response: http::Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

pub(crate) fn header<T>(response: &http::Response<T>, name: &str) -> String {
    response.headers().get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// The spans of this name.
pub(super) fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|s| s.name == name).collect()
}

/// An address at which nobody listens.
pub(crate) async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}
