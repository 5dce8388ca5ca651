//! The gateway as a server: binds, serves connections, scrapes endpoints, drains.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use shared::clock::RunClock;
use shared::ids::RequestId;
use shared::rng::{Seed, Stream, mix64};
use shared::time::{Dur, Stopped, Stopwatch, Time};
use shared::trace::{Tracer, TracerCell};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::core::config::{ConfigProblem, GatewayConfig};
use crate::core::gateway::{Gateway, Input};
use crate::core::kv_index::Applied;
use crate::core::kv_index::events::Batch;
use crate::core::pool::{Adapters, EndpointId};
use crate::core::request::RequestKey;
use crate::core::rewrite::Rewrites;
use crate::server::backend::Backend;
use crate::server::connect::Connector;
use crate::server::kv_events::{Follower, Keeper, Sources};
use crate::server::kv_manager::Manager;
use crate::server::metrics::Metrics;
use crate::server::opening::Opening;
use crate::server::queue::{self, Answer, Queue};
use crate::server::routing::Routing;
use crate::server::{api, scrape};

/// The client to the engines. Bodies are sent whole: they were read to be understood.
pub(crate) type Upstream = Client<Connector, Full<Bytes>>;

/// How long a connection may take to send its first bytes, and the head of a request, and to answer a ping.
const HEAD_TIMEOUT: Dur = Dur::from_secs(30);
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
}

/// What all connections share.
pub(crate) struct Shared {
    core: Mutex<Gateway>,
    /// Those who wait for the core, with flow control.
    pub(crate) queue: Option<Queue>,
    pub(crate) config: GatewayConfig,
    pub(crate) backends: Vec<Backend>,
    pub(crate) routing: Routing,
    /// Which models requests are sent to.
    pub(crate) rewrites: Arc<Rewrites>,
    /// Whether the core wants to know of first chunks.
    pub(crate) reads_first_chunks: bool,
    /// Whether it wants to know what requests were served.
    pub(crate) reads_usage: bool,
    /// Whether it wants to know of LoRA adapters.
    pub(crate) reads_adapters: bool,
    /// Whether it wants prompts named for the index of KV events.
    pub(crate) reads_kv_events: bool,
    pub(crate) client: Upstream,
    kv_sources: Sources,
    /// Who is asked for precise prefixes, where that is a service of its own.
    pub(crate) kv_manager: Option<Manager>,
    pub(crate) tracer: Arc<TracerCell>,
    pub(crate) clock: RunClock,
    pub(crate) metrics: Metrics,
    cards: Mutex<Vec<Vec<serde_json::Value>>>,
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
        for (i, e) in endpoints.iter().enumerate() {
            if endpoints[..i].iter().any(|other| other.config.name == e.config.name) {
                return Err(ServeError::DuplicateName(e.config.name.to_string()));
            }
        }
        let client = client(&config)?;
        let sources = Sources::new(config.precise_prefix.events_port);
        let kv_sources = sources.map_err(|e| ServeError::Tls(e.to_string()))?;
        let bind = |source| ServeError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let core = Gateway::new(config.clone(), endpoints.iter().map(|e| e.config.clone()).collect(), seed);
        let kv_manager = Manager::of(&config.precise_prefix, &client).filter(|_| core.reads_kv_events());
        let shared = Arc::new(Shared {
            routing: Routing::new(&config, &endpoints),
            reads_first_chunks: core.reads_first_chunks(),
            rewrites: core.rewrites(),
            reads_usage: core.reads_usage(),
            reads_adapters: core.reads_adapters(),
            reads_kv_events: core.reads_kv_events(),
            queue: core.has_flow_control().then(Queue::new),
            core: Mutex::new(core),
            config,
            cards: Mutex::new(vec![Vec::new(); endpoints.len()]),
            backends: endpoints,
            kv_manager,
            client,
            kv_sources,
            tracer: TracerCell::new(tracer),
            clock,
            metrics: Metrics::new(),
            next_key: AtomicU64::new(0),
            id_base: Stream::from_os().next_u64(),
            draining: AtomicBool::new(false),
            cutting_off: AtomicBool::new(false),
        });
        Ok(Server { listener, local_addr, shared })
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

    /// Forgets what earlier requests left behind: prefixes and sessions. The handle stays valid while the server runs.
    pub fn reset(&self) -> impl Fn() + Send + Sync + Clone + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.core().forget()
    }

    /// Serves until `shutdown` is ready, then stops accepting and lets requests finish, for at most the drain timeout.
    ///
    /// Every endpoint is scraped once before the first connection is accepted.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Stats {
        let Server { listener, shared, .. } = self;
        let mut shutdown = std::pin::pin!(shutdown);
        let mut scrapers = JoinSet::new();
        let (first, mut scraped) = tokio::sync::mpsc::channel(1);
        for i in 0..shared.backends.len() {
            scrapers.spawn(scrape::watch(Arc::clone(&shared), EndpointId(i as u32), first.clone()));
        }
        drop(first);
        follow(&shared, &mut scrapers);
        scrapers.spawn(queue::drive(Arc::clone(&shared)));
        let stopped = tokio::select! {
            _ = scraped.recv() => false,
            () = &mut shutdown => true,
        };
        if !stopped {
            serve(listener, &shared, shutdown).await;
        }
        shared.metrics.stats()
    }
}

/// Follows the KV events of all endpoints, if the index of them is kept here.
fn follow(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) {
    let config = &shared.config.precise_prefix;
    if !shared.reads_kv_events || config.manager.is_some() {
        return;
    }
    for (i, backend) in shared.backends.iter().enumerate() {
        tasks.spawn(
            Follower {
                keeper: Arc::clone(shared) as Arc<dyn Keeper>,
                endpoint: EndpointId(i as u32),
                backend: backend.clone(),
                sources: shared.kv_sources.clone(),
                config: config.clone(),
                tracer: shared.tracer.load(),
                clock: shared.clock,
            }
            .run(),
        );
    }
}

impl Keeper for Shared {
    fn take(&self, endpoint: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied {
        self.core().kv_events(endpoint, model, batch, after_gap)
    }

    fn next(&self, endpoint: EndpointId) -> u64 {
        self.core().next_kv_batch(endpoint)
    }
}

/// Accepts connections until `shutdown`, then drains them.
async fn serve(listener: TcpListener, shared: &Arc<Shared>, mut shutdown: impl Future<Output = ()> + Unpin) {
    let service = TowerToHyperService::new(api::router(Arc::clone(shared)));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT.to_std());
    builder.http2().timer(TokioTimer::new());
    // A peer that is gone without a word is found out.
    builder.http2().keep_alive_interval(Some(HEAD_TIMEOUT.to_std())).keep_alive_timeout(HEAD_TIMEOUT.to_std());
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let most = shared.config.limits.max_connections as usize;
    loop {
        tokio::select! {
            // Beyond the limit connections wait in the operating system's queue.
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    // Without it a token may wait for the acknowledgement of the one before.
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
    shared.draining.store(true, Ordering::Relaxed);
    shared.tell(shared.clock.now(), Input::ShutDown);
    let bound = shared.config.timeouts.drain.get().to_std();
    if tokio::time::timeout(bound, graceful.shutdown()).await.is_err() {
        tracing::warn!(connections = connections.len(), "the drain timeout is over: open requests are cut off");
    }
    shared.cutting_off.store(true, Ordering::Relaxed);
    connections.shutdown().await;
}

fn client(config: &GatewayConfig) -> Result<Upstream, ServeError> {
    let connector = Connector::new(&config.timeouts).map_err(|e| ServeError::Tls(e.to_string()))?;
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new());
    Ok(builder.build(connector))
}

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Gateway> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the core what happened where nothing is to be done about it for the one who tells.
    pub(crate) fn tell(&self, now: Time, input: Input) {
        let mut out = Vec::new();
        {
            let mut core = self.core();
            core.handle(now, input, &mut Stopped(now), &mut out);
            if let Some(queue) = &self.queue {
                queue.plan(&core);
            }
        }
        match &self.queue {
            Some(queue) => _ = queue.deliver(out, None),
            None => debug_assert!(out.is_empty(), "an answer that nobody reads: {out:?}"),
        }
    }

    /// Asks the core what to do with a request; `timed` says whether the stages of its decision are recorded.
    pub(crate) fn ask(&self, now: Time, key: RequestKey, input: Input, timed: bool) -> Answer {
        let mut out = Vec::with_capacity(1);
        let (mut live, mut stopped) = (self.clock.stopwatch(), Stopped(now));
        let Some(queue) = &self.queue else {
            let watch: &mut dyn Stopwatch = if timed { &mut live } else { &mut stopped };
            self.core().handle(now, input, watch, &mut out);
            return Answer::Now(out.pop().expect("the core answers a request"));
        };
        let later = queue.enter(key);
        {
            let mut core = self.core();
            // It may be another request that goes, and that one may be recorded.
            core.handle(now, input, &mut live, &mut out);
            queue.plan(&core);
        }
        queue.deliver(out, Some(key)).map_or(Answer::Later(later), Answer::Now)
    }

    /// Tells the core that a caller waits no more.
    pub(crate) fn cancel(&self, now: Time, key: RequestKey) {
        if let Some(queue) = &self.queue {
            queue.leave(key);
        }
        self.tell(now, Input::Cancelled(key));
    }

    /// Lets the core do what is due.
    pub(crate) fn advance(&self) {
        let Some(queue) = &self.queue else { return };
        let mut out = Vec::new();
        let now = self.clock.now();
        self.core().advance(now, &mut self.clock.stopwatch(), &mut out);
        queue.deliver(out, None);
    }

    /// Whether any endpoint may get requests.
    pub(crate) fn is_ready(&self) -> bool {
        !self.is_draining() && self.core().endpoints().iter().any(crate::core::pool::Endpoint::is_available)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether the drain is over: what ends now is ended by the gateway.
    pub(crate) fn is_cutting_off(&self) -> bool {
        self.cutting_off.load(Ordering::Relaxed)
    }

    /// The model of requests that name none: the first one that is known.
    pub(crate) fn default_model(&self) -> Arc<str> {
        let core = self.core();
        let first = core.endpoints().iter().find_map(|e| e.config.models.first());
        first.cloned().unwrap_or_else(|| "".into())
    }

    /// The LoRA adapters of an endpoint, as the core knows them.
    pub(crate) fn adapters(&self, id: EndpointId) -> Option<Adapters> {
        self.core().endpoints().get(id.index()).map(|e| e.adapters.clone())
    }

    /// Remembers an endpoint's model cards.
    pub(crate) fn cards(&self, id: EndpointId, cards: Vec<serde_json::Value>) {
        self.cards.lock().unwrap_or_else(PoisonError::into_inner)[id.index()] = cards;
    }

    /// The model cards of all endpoints, each model once.
    pub(crate) fn all_cards(&self) -> Vec<serde_json::Value> {
        let mut all: Vec<serde_json::Value> = Vec::new();
        for card in self.cards.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            if !all.iter().any(|c| c.get("id") == card.get("id")) {
                all.push(card.clone());
            }
        }
        all
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
