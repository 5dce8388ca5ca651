//! The gateway as a server: binds, serves connections, scrapes endpoints, drains.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use shared::clock::RunClock;
use shared::ids::RequestId;
use shared::metrics::{Family, Source as MetricsSource};
use shared::rng::{Seed, Stream, mix64};
use shared::time::Dur;
use shared::trace::{OwnTraces, Tracer, TracerCell};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::core::config::{ConfigProblem, GatewayConfig, TrustInbound, UpstreamHttp};
use crate::core::gateway::Input;
use crate::core::pools::{PoolId, PoolTable};
use crate::core::rewrite::Rewrites;
use crate::server::auth::Tokens;
use crate::server::backend::Backend;
use crate::server::connect::Connector;
use crate::server::discovery::{self, Source};
use crate::server::membership::Endpoints;
use crate::server::metrics::Metrics;
use crate::server::opening::Opening;
use crate::server::patient::Patient;
use crate::server::pool::Pool;
use crate::server::verdicts::{self, Verdicts};
use crate::server::{api, pool_metrics, queue, tls};

/// The client to the engines. Bodies are sent whole: they were read to be understood.
pub(crate) type Upstream = Client<Connector, Full<Bytes>>;

/// How long a connection may take to answer a ping.
const PING_TIMEOUT: Dur = Dur::from_secs(30);
/// So many headers are read without allocating for them.
const HEADERS_AT_HAND: u32 = 100;
/// How long to wait when no connection can be accepted, for example without file descriptors.
const ACCEPT_PAUSE: Dur = Dur::from_millis(10);

/// A gateway that cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration has problems.
    #[error("the gateway's configuration is not valid: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigProblem>),
    /// The configuration names a file that [`crate::epp::resolve`] did not read.
    #[error("the gateway's epp_config {} was not read", .0.display())]
    Unread(std::path::PathBuf),
    /// No pool selects an endpoint.
    #[error("no pool selects the endpoint {0:?}: its labels must be those of a pool's selector")]
    NoPool(String),
    /// Two endpoints have one name.
    #[error("two endpoints are called {0:?}: names must be unique")]
    DuplicateName(String),
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
    /// A source of endpoints cannot be read from the start.
    #[error("cannot find endpoints: {0}")]
    Discovery(String),
    /// There are no tokens.
    #[error("cannot read tokens: {0}")]
    Auth(String),
}

/// What a gateway did since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests received on proxied paths.
    pub received: u64,
    /// Of these, requests that are not finished.
    pub active: u64,
    /// Answered with 2xx.
    pub succeeded: u64,
    /// Answered with 4xx.
    pub client_errors: u64,
    /// Answered with 5xx.
    pub server_errors: u64,
    /// Refused by admission or scheduling.
    pub rejected: u64,
    /// Further attempts after an endpoint could not be reached.
    pub retries: u64,
    /// Given up by their callers.
    pub disconnected: u64,
    /// Broken off by an engine after their status was sent.
    pub broken: u64,
    /// Scrapes of endpoints.
    pub scrapes: u64,
    /// Of these, scrapes that failed.
    pub scrapes_failed: u64,
}

/// A bound gateway.
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    shared: Arc<Shared>,
    sources: Vec<(Source, Dur)>,
    tls: Option<TlsAcceptor>,
}

/// What all connections share.
pub(crate) struct Shared {
    /// The pools, one at least.
    pub(crate) pools: Vec<Arc<Pool>>,
    /// Which of them gets what.
    pub(crate) table: PoolTable,
    /// Held while an endpoint joins: names are unique over all pools.
    pub(crate) joining: Mutex<()>,
    pub(crate) config: GatewayConfig,
    /// What is made of a caller's trace context.
    pub(crate) trust: TrustInbound,
    /// Who may call; everybody if `None`.
    pub(crate) tokens: Option<Tokens>,
    /// Traces of scrapes; `None` where none is kept.
    pub(crate) scrape_traces: Option<Arc<OwnTraces>>,
    /// Which models requests are sent to.
    pub(crate) rewrites: Arc<Rewrites>,
    pub(crate) client: Upstream,
    /// Who is told of traces that are kept for what became of them; `None` where none are.
    pub(crate) verdicts: Option<Verdicts>,
    pub(crate) tracer: Arc<TracerCell>,
    pub(crate) clock: RunClock,
    pub(crate) metrics: Metrics,
    next_key: AtomicU64,
    id_base: u64,
    draining: AtomicBool,
    cutting_off: AtomicBool,
}

impl Server {
    /// Binds a gateway in front of `endpoints`. Connections wait until [`Server::run`].
    ///
    /// # Errors
    /// If the configuration is not valid or the address cannot be bound.
    pub async fn bind(
        addr: SocketAddr,
        config: GatewayConfig,
        endpoints: Vec<Backend>,
        tracer: Tracer,
        clock: RunClock,
        seed: Seed,
    ) -> Result<Server, ServeError> {
        let problems = config.validate();
        if !problems.is_empty() {
            return Err(ServeError::Config(problems));
        }
        if let Some(path) = config.epp_config {
            return Err(ServeError::Unread(path));
        }
        let client = client(&config)?;
        let table = PoolTable::new(&config);
        let pools = pools(&config, &table, endpoints, &client, clock, seed)?;
        let sources = config.discovery.iter().map(|d| Source::new(d).map(|source| (source, d.interval().get())));
        let sources = sources.collect::<Result<_, _>>().map_err(ServeError::Discovery)?;
        let tls = config.tls.as_ref().map(tls::acceptor).transpose().map_err(ServeError::Tls)?;
        let env = |name: &str| std::env::var(name).ok();
        let tokens = config.auth.as_ref().map(|auth| Tokens::read(auth, &env)).transpose().map_err(ServeError::Auth)?;
        let bind = |source| ServeError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let by_address = if local_addr.ip().is_loopback() { TrustInbound::Always } else { TrustInbound::Link };
        let shared = Arc::new(Shared {
            rewrites: Arc::new(Rewrites::new(&config.model_rewrites, seed)),
            pools,
            table,
            joining: Mutex::new(()),
            trust: config.trust_inbound.unwrap_or(by_address),
            tokens,
            scrape_traces: tracer.scrapes(),
            verdicts: tracer.keeps().map(|_| Verdicts::new()),
            config,
            client,
            tracer: TracerCell::new(tracer),
            clock,
            metrics: Metrics::new(),
            next_key: AtomicU64::new(0),
            id_base: Stream::from_os().next_u64(),
            draining: AtomicBool::new(false),
            cutting_off: AtomicBool::new(false),
        });
        Ok(Server { listener, local_addr, shared, sources, tls })
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The tracer, which may be exchanged while the server runs: each request keeps the one it began with.
    pub fn tracer_cell(&self) -> Arc<TracerCell> {
        Arc::clone(&self.shared.tracer)
    }

    /// What happened so far; the handle stays valid while the server runs.
    pub fn stats(&self) -> impl Fn() -> Stats + Send + Sync + Clone + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.metrics.stats()
    }

    /// Its metrics, those of the process's telemetry included; the handle stays valid while the server runs.
    pub fn metrics(&self) -> MetricsSource {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.families())
    }

    /// Changes the pool while the server runs.
    pub fn endpoints(&self) -> Endpoints {
        Endpoints::of(&self.shared)
    }

    /// Forgets what earlier requests left behind: prefixes and sessions. The handle stays valid while the server runs.
    pub fn reset(&self) -> impl Fn() + Send + Sync + Clone + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.pools.iter().for_each(|pool| pool.core().forget())
    }

    /// Serves until `shutdown` is ready, then stops accepting and lets requests finish, for at most the drain timeout.
    ///
    /// Every source of endpoints is read and every endpoint scraped once before the first connection is accepted.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Stats {
        let Server { listener, shared, sources, tls, .. } = self;
        let mut shutdown = std::pin::pin!(shutdown);
        let (first, mut scraped) = tokio::sync::mpsc::channel(1);
        let endpoints = Endpoints::of(&shared);
        endpoints.scrape_all(&first);
        let mut followers = JoinSet::new();
        for (source, every) in sources {
            followers.spawn(discovery::follow(Arc::clone(&shared), source, every.to_std(), first.clone()));
        }
        drop(first);
        for pool in &shared.pools {
            followers.spawn(queue::drive(Arc::clone(pool)));
        }
        followers.spawn(verdicts::spread(Arc::clone(&shared)));
        let stopped = tokio::select! {
            _ = scraped.recv() => false,
            () = &mut shutdown => true,
        };
        if !stopped {
            serve(listener, &shared, tls, shutdown).await;
        }
        if let Some(verdicts) = &shared.verdicts {
            verdicts.finish().await;
        }
        followers.shutdown().await;
        endpoints.stop_scraping();
        shared.metrics.stats()
    }
}

/// The pools of a configuration, each with its endpoints.
fn pools(
    config: &GatewayConfig,
    table: &PoolTable,
    endpoints: Vec<Backend>,
    client: &Upstream,
    clock: RunClock,
    seed: Seed,
) -> Result<Vec<Arc<Pool>>, ServeError> {
    let (mut names, configs) = (std::collections::BTreeSet::new(), config.pool_configs());
    let mut members: Vec<Vec<Backend>> = configs.iter().map(|_| Vec::new()).collect();
    for endpoint in endpoints {
        let name = Arc::clone(&endpoint.config.name);
        let Some(pool) = table.of_labels(endpoint.config.labels()) else {
            return Err(ServeError::NoPool(name.to_string()));
        };
        if !names.insert(Arc::clone(&name)) {
            return Err(ServeError::DuplicateName(name.to_string()));
        }
        members[pool.index()].push(endpoint);
    }
    let pools = configs.into_iter().zip(members).zip((0..).map(PoolId));
    pools.map(|((config, own), id)| Pool::new(config, own, client, clock, id.seed(seed)).map(Arc::new)).collect()
}

/// Accepts connections until `shutdown`, then drains them.
async fn serve(
    listener: TcpListener,
    shared: &Arc<Shared>,
    tls: Option<TlsAcceptor>,
    mut shutdown: impl Future<Output = ()> + Unpin,
) {
    let service = TowerToHyperService::new(api::router(Arc::clone(shared)));
    let builder = http(&shared.config);
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let most = shared.config.limits.max_connections as usize;
    let timeouts = &shared.config.timeouts;
    let (head, idle) = (timeouts.request_head.get().to_std(), timeouts.idle_write.get().to_std());
    loop {
        tokio::select! {
            // Beyond the limit connections wait in the operating system's queue.
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    // Without it a token may wait for the acknowledgement of the one before.
                    let _ = stream.set_nodelay(true);
                    let stream = Patient::new(stream, idle);
                    let (watcher, service, builder) = (graceful.watcher(), service.clone(), builder.clone());
                    // Callers that go away are recorded where their request is.
                    match tls.clone() {
                        None => {
                            let io = TokioIo::new(Opening::new(stream, head));
                            let connection = watcher.watch(builder.serve_connection(io, service).into_owned());
                            connections.spawn(async move { drop(connection.await) });
                        }
                        Some(tls) => {
                            connections.spawn(async move {
                                let Ok(Ok(stream)) = tokio::time::timeout(head, tls.accept(stream)).await else { return };
                                let io = TokioIo::new(Opening::new(stream, head));
                                let connection = watcher.watch(builder.serve_connection(io, service).into_owned());
                                drop(connection.await);
                            });
                        }
                    }
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
    shared.draining.store(true, Ordering::Relaxed);
    shared.pools.iter().for_each(|pool| pool.tell(shared.clock.now(), Input::ShutDown));
    let bound = shared.config.timeouts.drain.get().to_std();
    if tokio::time::timeout(bound, graceful.shutdown()).await.is_err() {
        tracing::warn!(connections = connections.len(), "the drain timeout is over: open requests are cut off");
    }
    shared.cutting_off.store(true, Ordering::Relaxed);
    connections.shutdown().await;
}

/// HTTP/1.1 and HTTP/2, by what a connection begins with, within the limits of the configuration.
fn http(config: &GatewayConfig) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let head = config.timeouts.request_head.get().to_std();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(head);
    if config.limits.max_headers > HEADERS_AT_HAND {
        builder.http1().max_headers(config.limits.max_headers as usize);
    }
    builder.http2().timer(TokioTimer::new()).max_header_list_size(config.limits.max_header_bytes);
    // A peer that is gone without a word is found out.
    let ping = PING_TIMEOUT.to_std();
    builder.http2().keep_alive_interval(Some(ping)).keep_alive_timeout(ping);
    builder
}

fn client(config: &GatewayConfig) -> Result<Upstream, ServeError> {
    let connector = Connector::new(&config.timeouts, &config.upstream).map_err(ServeError::Tls)?;
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new());
    match config.upstream.http {
        UpstreamHttp::Http1 => {}
        UpstreamHttp::Http2 => {
            builder.http2_only(true);
        }
    }
    Ok(builder.build(connector))
}

impl Shared {
    /// All metrics, as they are now.
    pub(crate) fn families(&self) -> Vec<Family> {
        let mut all = self.metrics.families(pool_metrics::queued(&self.pools));
        all.extend(pool_metrics::families(&self.pools, self.table.is_split(), self.clock.now()));
        all.extend(self.tracer.load().metrics());
        all
    }

    /// Whether a request with these headers may be answered.
    pub(crate) fn may_call(&self, headers: &HeaderMap) -> bool {
        let may = self.tokens.as_ref().is_none_or(|tokens| tokens.allow(headers));
        if !may {
            self.metrics.unauthorized.fetch_add(1, Ordering::Relaxed);
        }
        may
    }

    /// Whether any endpoint may get requests.
    pub(crate) fn is_ready(&self) -> bool {
        !self.is_draining() && self.pools.iter().any(|pool| pool.is_ready())
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether the drain is over: what ends now is ended by the gateway.
    pub(crate) fn is_cutting_off(&self) -> bool {
        self.cutting_off.load(Ordering::Relaxed)
    }

    /// The model of requests that name none: the first one that is known of the pool that gets them.
    pub(crate) fn default_model(&self) -> Arc<str> {
        let pool = self.table.of_nothing();
        let listed = self.table.first_model(pool).map(Arc::from);
        listed.or_else(|| self.pools[pool.index()].first_model()).unwrap_or_else(|| "".into())
    }

    /// A number for a request, unique in this process.
    pub(crate) fn next_key(&self) -> u64 {
        self.next_key.fetch_add(1, Ordering::Relaxed)
    }

    /// An id for a request that came without one.
    pub(crate) fn new_request_id(&self, key: u64) -> RequestId {
        let high = mix64(self.id_base ^ key);
        RequestId::sanitise(&format!("{high:016x}{:016x}", mix64(high ^ key.rotate_left(32))))
    }
}
