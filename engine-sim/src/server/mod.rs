//! The engine as a server: sockets, HTTP, real time. It moves data, waits and drains; decisions are the core's.

mod accept;
mod answer;
mod api;
mod choice;
pub mod condition;
pub mod control;
mod frontend;
mod keep_alive;
pub mod kv_events;
mod logprobs;
mod lora;
pub mod metrics;
mod open;
pub mod pacing;
mod request;
mod schema;
mod shape;
mod stop;
mod strike;
mod validate;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shared::clock::RunClock;
use shared::ids::RequestId;
use shared::rng::mix64;
use shared::time::{Dur, Time};
use shared::trace::{Tracer, TracerCell};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::core::config::EngineConfig;
use crate::core::engine::RequestKey;
use condition::Condition;
pub use frontend::{ApiKeys, Frontend};
use lora::Adapters;
use open::OpenRequests;
use pacing::EngineHandle;

/// The version of vLLM whose behaviour the emulator follows.
pub const VLLM_VERSION: &str = "0.33.0";

/// How long open answers may go on after a server was told to stop.
pub const DRAIN: Dur = Dur::from_secs(30);

/// What a server needs to know beyond its engine.
#[derive(Clone)]
pub struct ServerConfig {
    /// The engine's configuration.
    pub engine: EngineConfig,
    /// Served model name.
    pub model: Arc<str>,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Whether usage says how much of the prompt was found in the prefix cache (`--enable-prompt-tokens-details`).
    pub prompt_tokens_details: bool,
    /// What else the server does differently from vLLM's defaults.
    pub frontend: Frontend,
    /// Told about the first byte of every answer.
    pub on_served: Option<ServedHook>,
}

/// Called when the first byte of an answer is handed to the socket.
pub type ServedHook = Arc<dyn Fn(&Served) + Send + Sync>;

/// When an engine had read a request and began to answer it: the engine's own share of the time to first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The engine's id of the request: the endpoint's prefix and the caller's `x-request-id`.
    pub id: RequestId,
    /// Last byte of the request read.
    pub body_read: Time,
    /// First byte of the answer written.
    pub first_write: Time,
}

/// A bound server.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
}

struct App {
    engine: EngineHandle,
    engine_config: EngineConfig,
    tracer: Arc<TracerCell>,
    clock: RunClock,
    model: Arc<str>,
    max_model_len: u32,
    max_body_bytes: usize,
    prompt_tokens_details: bool,
    started_unix: u64,
    salt: u64,
    keys: AtomicU64,
    ids: AtomicU64,
    parents: AtomicU64,
    open: OpenRequests,
    frontend: Frontend,
    adapters: Adapters,
    /// Names the server's configuration in every answer.
    fingerprint: Arc<str>,
    kv_events: Option<kv_events::Publisher>,
    http_metrics: metrics::http::HttpMetrics,
    process: metrics::process::ProcessFigures,
    on_served: Option<ServedHook>,
    /// Whether faults are wanted, and what the engine is like.
    faulty: bool,
    condition: watch::Receiver<Condition>,
    frozen: metrics::Frozen,
}

impl Server {
    /// Binds `address`; nothing is answered before [`Server::run`].
    ///
    /// # Errors
    /// If the address is taken or not ours.
    pub async fn bind(
        address: SocketAddr,
        config: ServerConfig,
        engine: EngineHandle,
        tracer: Tracer,
        clock: RunClock,
    ) -> std::io::Result<Server> {
        config.engine.tokenizer.load();
        let listener = TcpListener::bind(address).await?;
        let kv_events = publisher(&config, listener.local_addr()?, &engine, clock).await?;
        let started = clock.anchor().unix_nanos(clock.now());
        engine.trace_steps(tracer.engine_steps());
        let app = App {
            max_model_len: engine.inspect(|e| e.snapshot().max_model_len),
            faulty: engine.inspect(|e| e.faults().is_some()),
            condition: engine.condition(),
            frozen: metrics::Frozen::default(),
            engine,
            tracer: TracerCell::new(tracer),
            clock,
            max_body_bytes: config.max_body_bytes,
            prompt_tokens_details: config.prompt_tokens_details,
            started_unix: started / 1_000_000_000,
            salt: mix64(started ^ u64::from(listener.local_addr()?.port())),
            keys: AtomicU64::new(0),
            ids: AtomicU64::new(0),
            parents: AtomicU64::new(0),
            open: OpenRequests::new(&config.frontend),
            adapters: Adapters::new(config.engine.lora_slots().is_some(), &config.engine.lora_modules),
            fingerprint: frontend::fingerprint(&config.engine, &config.model),
            model: config.model,
            frontend: config.frontend,
            kv_events,
            http_metrics: metrics::http::HttpMetrics::default(),
            process: metrics::process::ProcessFigures::default(),
            on_served: config.on_served,
            engine_config: config.engine,
        };
        Ok(Server { listener, app: Arc::new(app) })
    }

    /// Where the server listens.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The tracer, which may be exchanged while the server runs: each request keeps the one it began with.
    pub fn tracer_cell(&self) -> Arc<TracerCell> {
        Arc::clone(&self.app.tracer)
    }

    /// Serves until `shutdown` completes and every open answer is written, for at most [`DRAIN`]; what is open then is aborted.
    ///
    /// # Errors
    /// If the socket cannot be accepted from any more.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
        let condition = self.app.condition.clone();
        accept::serve(self.listener, api::router(self.app), condition, shutdown).await
    }
}

/// Opens the sockets of KV events, if they are asked for.
async fn publisher(
    config: &ServerConfig,
    address: SocketAddr,
    engine: &EngineHandle,
    clock: RunClock,
) -> std::io::Result<Option<kv_events::Publisher>> {
    let events = &config.engine.kv_events_config;
    if !events.publishes() {
        return Ok(None);
    }
    let (publisher, sink) = kv_events::Publisher::open(events, address, &config.model, clock).await?;
    engine.publish_kv_events(sink);
    Ok(Some(publisher))
}

impl App {
    fn next_key(&self) -> RequestKey {
        RequestKey(self.keys.fetch_add(1, Ordering::Relaxed))
    }

    /// Stands for vLLM's random uuid.
    fn fresh_id(&self) -> RequestId {
        let n = self.ids.fetch_add(2, Ordering::Relaxed);
        let half = |n| mix64(self.salt ^ mix64(n));
        RequestId::sanitise(&format!("{:016x}{:016x}", half(n), half(n + 1)))
    }

    fn unix_seconds(&self) -> u64 {
        self.clock.anchor().unix_nanos(self.clock.now()) / 1_000_000_000
    }

    /// Names for so many prompts in a row.
    fn next_parents(&self, prompts: usize) -> u64 {
        self.parents.fetch_add(prompts as u64, Ordering::Relaxed)
    }

    /// Whether `model` is the served model, under any of its names.
    fn serves(&self, model: &str) -> bool {
        model == &*self.model || self.frontend.aliases.iter().any(|a| &**a == model)
    }

    /// The names of the served model.
    fn served_names(&self) -> String {
        let names: Vec<&str> = std::iter::once(&self.model).chain(&self.frontend.aliases).map(|n| &**n).collect();
        names.join(", ")
    }

    fn served(&self, served: &Served) {
        if let Some(hook) = &self.on_served {
            hook(served);
        }
    }
}
