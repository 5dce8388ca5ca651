//! The sidecar as a server: binds, serves connections, drains.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use http::header::{HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use shared::clock::RunClock;
use shared::config::ConfigProblem;
use shared::ids::RequestId;
use shared::metrics::text::Format;
use shared::metrics::{Family, Source};
use shared::rng::{Stream, mix64};
use shared::time::Dur;
use shared::trace::verdict::{self, KEEP_PATH};
use shared::trace::{Tracer, TracerCell};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::answer::No;
use super::call::{self, Upstream, failure_of};
use super::exchange;
use super::metrics::Metrics;
use crate::core::config::{TimeoutConfig, UpstreamConfig};
use crate::pd_proxy::core::{Allowed, Done, Failure, PdProxyConfig};
use crate::server::Backend;
use crate::server::connect::Connector;
use crate::server::opening::Opening;
use crate::server::request;

/// Told of every request for inference that ended.
pub type DoneHook = Arc<dyn Fn(&Done) + Send + Sync>;

/// How long a connection may take to send its first bytes, and the head of a request, and to answer a ping.
const HEAD_TIMEOUT: Dur = Dur::from_secs(30);
/// How long to wait when no connection can be accepted, for example without file descriptors.
const ACCEPT_PAUSE: Dur = Dur::from_millis(10);
/// The routes of requests for inference. Their bodies can be sent to another engine first.
const ROUTES: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];

/// A sidecar that cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The configuration has problems.
    #[error("the sidecar's configuration is not valid: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigProblem>),
    /// The address cannot be bound.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the operating system says.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// A bound sidecar.
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    /// Where its own metrics are.
    page: Option<TcpListener>,
    shared: Arc<Shared>,
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) config: PdProxyConfig,
    /// The engine that decodes.
    pub(super) engine: Backend,
    pub(super) allowed: Allowed,
    pub(super) client: Upstream,
    pub(super) tracer: Arc<TracerCell>,
    pub(super) clock: RunClock,
    pub(super) on_done: Option<DoneHook>,
    pub(super) metrics: Metrics,
    next_id: AtomicU64,
    id_base: u64,
    cutting_off: AtomicBool,
}

impl Shared {
    /// Its own metrics, and what the telemetry path says of itself.
    fn families(&self) -> Vec<Family> {
        let mut all = self.metrics.families();
        all.extend(self.tracer.load().metrics());
        all
    }
}

impl Server {
    /// Binds a sidecar in front of `engine`, which may ask nobody to prefill: see [`Server::allowing`]. Connections wait until
    /// [`Server::run`].
    ///
    /// # Errors
    /// If the configuration is not valid or the address cannot be bound.
    pub async fn bind(
        addr: SocketAddr,
        config: PdProxyConfig,
        engine: Backend,
        tracer: Tracer,
        clock: RunClock,
    ) -> Result<Server, BindError> {
        let problems = config.validate();
        if !problems.is_empty() {
            return Err(BindError::Config(problems));
        }
        let client = client(&config)?;
        let bind = |source| BindError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let shared = Arc::new(Shared {
            config,
            engine,
            allowed: Allowed::These(BTreeSet::new()),
            client,
            tracer: TracerCell::new(tracer),
            clock,
            on_done: None,
            metrics: Metrics::default(),
            next_id: AtomicU64::new(0),
            id_base: Stream::from_os().next_u64(),
            cutting_off: AtomicBool::new(false),
        });
        Ok(Server { listener, local_addr, page: None, shared })
    }

    /// The same sidecar, which may have prefills done by the engines of `pool`.
    #[must_use]
    pub fn allowing(mut self, pool: Allowed) -> Server {
        self.fresh().allowed = pool;
        self
    }

    /// The same sidecar, which tells `hook` of every request.
    #[must_use]
    pub fn telling(mut self, hook: DoneHook) -> Server {
        self.fresh().on_done = Some(hook);
        self
    }

    /// The same sidecar, with a page of metrics of its own at `addr`; returns the address that was bound.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn measured(mut self, addr: SocketAddr) -> Result<(Server, SocketAddr), BindError> {
        let bind = |source| BindError::Bind { addr, source };
        let page = TcpListener::bind(addr).await.map_err(bind)?;
        let bound = page.local_addr().map_err(bind)?;
        self.page = Some(page);
        Ok((self, bound))
    }

    fn fresh(&mut self) -> &mut Shared {
        Arc::get_mut(&mut self.shared).expect("it does not serve yet")
    }

    /// What it counts, for whoever pushes it; to be asked for when nothing is left to be set.
    pub fn metrics(&self) -> Source {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.families())
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `shutdown` is ready, then stops accepting and lets requests finish, for at most the drain timeout.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Server { listener, shared, page, .. } = self;
        let mut pages = JoinSet::new();
        if let Some(page) = page {
            let router = Router::new().route("/metrics", get(metrics)).with_state(Arc::clone(&shared));
            pages.spawn(async move { axum::serve(page, router).await });
        }
        serve(listener, &shared, std::pin::pin!(shutdown)).await;
        pages.shutdown().await;
    }
}

/// Accepts connections until `shutdown`, then drains them.
async fn serve(listener: TcpListener, shared: &Arc<Shared>, mut shutdown: impl Future<Output = ()> + Unpin) {
    let service = TowerToHyperService::new(router(Arc::clone(shared)));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT.to_std());
    builder.http2().timer(TokioTimer::new());
    builder.http2().keep_alive_interval(Some(HEAD_TIMEOUT.to_std())).keep_alive_timeout(HEAD_TIMEOUT.to_std());
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let most = shared.config.limits.max_connections as usize;
    loop {
        tokio::select! {
            // Beyond the limit connections wait in the operating system's queue.
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    let opening = Opening::new(stream, HEAD_TIMEOUT.to_std());
                    let connection = builder.serve_connection(TokioIo::new(opening), service.clone()).into_owned();
                    let connection = graceful.watch(connection);
                    connections.spawn(async move {
                        // Callers that go away are recorded where their request is.
                        let _ = connection.await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE.to_std()).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            () = &mut shutdown => break,
        }
    }
    // From here on the operating system refuses connections, so that callers turn elsewhere at once.
    drop(listener);
    let bound = shared.config.timeouts.drain.get().to_std();
    if tokio::time::timeout(bound, graceful.shutdown()).await.is_err() {
        tracing::warn!(connections = connections.len(), "the drain timeout is over: open requests are cut off");
    }
    shared.cutting_off.store(true, Ordering::Relaxed);
    connections.shutdown().await;
}

fn client(config: &PdProxyConfig) -> Result<Upstream, BindError> {
    let timeouts = TimeoutConfig { connect: config.timeouts.connect, ..TimeoutConfig::default() };
    let connector = Connector::new(&timeouts, &UpstreamConfig::default()).map_err(BindError::Tls)?;
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new());
    Ok(builder.build(connector))
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route(ROUTES[0], post(chat).fallback(pass_through))
        .route(ROUTES[1], post(completions).fallback(pass_through))
        .route(KEEP_PATH, post(keep).fallback(pass_through))
        .fallback(pass_through)
        .with_state(shared)
}

async fn chat(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    exchange::handle(shared, ROUTES[0], &parts, body).await
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    exchange::handle(shared, ROUTES[1], &parts, body).await
}

/// All metrics, in the format that the reader asks for.
async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let format = Format::asked(&headers);
    let mut response = Response::new(Body::from(format.write(&shared.families(), shared.clock.anchor())));
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    response
}

/// Everything else is the engine's: what comes is passed on, place in the trace included, and nothing is recorded.
async fn pass_through(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    match pass(&shared, &parts, body).await {
        Ok(response) => response,
        Err(no) => no.response(),
    }
}

/// What the gateway keeps concerns the engine behind as well. One that is not ours holds nothing.
async fn keep(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let tracer = shared.tracer.load();
    if !tracer.holds() {
        return pass_through(State(shared), request).await;
    }
    let (parts, body) = request.into_parts();
    let most = u32::try_from(verdict::MAX_BYTES).unwrap_or(u32::MAX);
    let body = match request::body(body, &parts.headers, most).await {
        Ok(body) => body,
        Err(refusal) => return No::Body(refusal).response(),
    };
    let mut response = Response::new(Body::empty());
    let Some(traces) = verdict::read(&body) else {
        *response.status_mut() = http::StatusCode::BAD_REQUEST;
        return response;
    };
    tracer.keep(traces);
    match pass(&shared, &parts, Body::from(body)).await {
        Ok(answer) if answer.status().is_server_error() => answer,
        Ok(_) => {
            *response.status_mut() = http::StatusCode::NO_CONTENT;
            response
        }
        Err(no) => no.response(),
    }
}

async fn pass(shared: &Shared, parts: &http::request::Parts, body: Body) -> Result<Response, No> {
    let body = request::body(body, &parts.headers, shared.config.limits.max_body_bytes).await.map_err(No::Body)?;
    let root = PathAndQuery::from_static("/");
    let path = parts.uri.path_and_query().unwrap_or(&root);
    let uri = shared.engine.uri(path).ok_or(No::Decode(Failure::Connect))?;
    let request = call::request(parts.method.clone(), uri, call::forwarded(&parts.headers), body);
    let limit = shared.config.timeouts.response_head.get().to_std();
    let sent = tokio::time::timeout(limit, shared.client.request(request)).await;
    let response = sent.map_err(|_| No::Decode(Failure::Timeout))?.map_err(|e| No::Decode(failure_of(&e)))?;
    let (head, body) = response.into_parts();
    Ok(exchange::answered(&head, Body::new(body)))
}

impl Shared {
    /// Whether the drain is over: what ends now is ended by the proxy.
    pub(super) fn is_cutting_off(&self) -> bool {
        self.cutting_off.load(Ordering::Relaxed)
    }

    /// An id for a request that came without one, in spans and as a header.
    pub(super) fn new_request_id(&self) -> (RequestId, HeaderValue) {
        let n = self.next_id.fetch_add(1, Ordering::Relaxed);
        let high = mix64(self.id_base ^ n);
        let id = RequestId::sanitise(&format!("{high:016x}{:016x}", mix64(high ^ n.rotate_left(32))));
        let header = HeaderValue::from_str(id.as_str()).expect("hexadecimal digits are a header value");
        (id, header)
    }
}
