//! Publishes KV events over ZeroMQ as vLLM does (`ZmqEventPublisher` in `vllm/distributed/kv_events.py`).
//!
//! ```text
//! engine thread --(max_queue_size)--> encoder --(hwm)--> PUB socket
//!                                        |
//!                                    last buffer_steps --> ROUTER socket
//! ```
//!
//! Both queues are bounded and nobody waits for the next: a batch that finds no room is dropped and counted, and subscribers see the
//! gap in the sequence numbers. Token ids are part of this protocol for routers; none of it goes to a span, a log or a metric.

mod replay;
mod socket;
pub mod wire;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use shared::clock::RunClock;
use tokio::sync::mpsc::{self, Receiver, Sender, error::TrySendError};
use tokio::task::JoinHandle;

use crate::core::config::{Endpoint, KvEventsConfig, Publisher as Kind};
use crate::core::engine::Engine;
use crate::core::kv_events::KvBatch;
use replay::Buffer;
use wire::Form;

/// What became of the batches of one engine.
#[derive(Debug, Default)]
pub struct Counts {
    /// Handed to the socket. Whether a subscriber is there is the socket's business.
    pub published: AtomicU64,
    /// Dropped because a queue was full.
    pub dropped: AtomicU64,
}

impl Counts {
    fn drop_one(&self) {
        if self.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("KV events are dropped: the publisher or its subscriber does not keep up");
        }
    }
}

/// The engine thread's end.
#[derive(Debug)]
pub struct Sink {
    queue: Sender<KvBatch>,
    counts: Arc<Counts>,
}

impl Sink {
    /// Hands on what the engine has made; never waits.
    pub fn take_from(&self, engine: &mut Engine) {
        while let Some(batch) = engine.take_kv_batch() {
            match self.queue.try_send(batch) {
                Ok(()) => {}
                Err(TrySendError::Full(_) | TrySendError::Closed(_)) => self.counts.drop_one(),
            }
        }
    }
}

/// The sockets of one engine. They close when this is dropped.
#[derive(Debug)]
pub struct Publisher {
    source: KvEventsConfig,
    counts: Arc<Counts>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// The bytes of a published batch.
#[derive(Clone, Debug)]
struct Encoded {
    seq: u64,
    payload: Bytes,
}

impl Publisher {
    /// Opens the sockets for the engine that serves `model` at `server`, and returns the end for its thread.
    ///
    /// # Errors
    /// If an endpoint cannot be bound; the message names it.
    pub async fn open(
        config: &KvEventsConfig,
        server: SocketAddr,
        model: &str,
        clock: RunClock,
    ) -> std::io::Result<(Publisher, Sink)> {
        let mut source = KvEventsConfig { publisher: Some(Kind::Zmq), ..config.clone() };
        source.topic = config.topic.replace("{pod}", &server.to_string()).replace("{model}", model);
        let topic = Bytes::from(source.topic.clone().into_bytes());
        let buffer = Arc::new(Buffer::new(config.buffer_steps as usize));
        let counts = Arc::new(Counts::default());
        let (queue, batches) = mpsc::channel(config.max_queue_size as usize);
        let (to_socket, encoded) = mpsc::channel(config.hwm as usize);

        let socket = match bound(&config.endpoint, server.ip(), false)? {
            Some((listener, endpoint)) => {
                source.endpoint = endpoint;
                socket::Publishing::bind(listener).await?
            }
            None => socket::Publishing::connect(&config.endpoint),
        };
        let mut tasks = Vec::new();
        if let Some(endpoint) = &config.replay_endpoint
            && let Some((listener, endpoint)) = bound(endpoint, server.ip(), true)?
        {
            source.replay_endpoint = Some(endpoint);
            tasks.push(replay::serve(listener, Arc::clone(&buffer), topic.clone()).await?);
        }
        tasks.push(tokio::spawn(socket.run(encoded, topic)));
        let form = Form { format: config.event_format, int_hashes: config.use_int_block_hashes };
        let encoder = Encoder { form, clock, buffer, counts: Arc::clone(&counts), to_socket };
        tasks.push(tokio::spawn(encoder.run(batches)));
        Ok((Publisher { source, counts: Arc::clone(&counts), tasks }, Sink { queue, counts }))
    }

    /// The configuration in force, with addresses as they are bound: an entry of `GET /kv_event_sources`.
    pub fn source(&self) -> serde_json::Value {
        let s = &self.source;
        serde_json::json!({
            "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": s.endpoint, "replay_endpoint": s.replay_endpoint,
            "buffer_steps": s.buffer_steps, "hwm": s.hwm, "max_queue_size": s.max_queue_size, "topic": s.topic,
        })
    }

    /// What became of the batches.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}

/// Binds an endpoint, the wildcard at `own` interface; `None` for one to connect to, unless it `must` be bound.
fn bound(endpoint: &str, own: IpAddr, must: bool) -> std::io::Result<Option<(TcpListener, String)>> {
    let invalid = || std::io::Error::new(std::io::ErrorKind::InvalidInput, format!("{endpoint} is no endpoint"));
    let listener = match Endpoint::parse(endpoint).ok_or_else(invalid)? {
        Endpoint::Wildcard { port } => TcpListener::bind((own, port)),
        Endpoint::Address { bind: false, .. } if !must => return Ok(None),
        Endpoint::Address { host, port, .. } => TcpListener::bind((host.trim_matches(['[', ']']), port)),
    };
    let listener = listener.map_err(|e| std::io::Error::new(e.kind(), format!("KV events at {endpoint}: {e}")))?;
    let address = listener.local_addr()?;
    Ok(Some((listener, format!("tcp://{address}"))))
}

struct Encoder {
    form: Form,
    clock: RunClock,
    buffer: Arc<Buffer>,
    counts: Arc<Counts>,
    to_socket: Sender<Encoded>,
}

impl Encoder {
    async fn run(self, mut batches: Receiver<KvBatch>) {
        while let Some(batch) = batches.recv().await {
            let unix = self.clock.anchor().unix_nanos(batch.at) as f64 / 1e9;
            let payload = Bytes::from(wire::payload(unix, &batch.events, self.form));
            let encoded = Encoded { seq: batch.seq, payload };
            self.buffer.push(encoded.clone());
            match self.to_socket.try_send(encoded) {
                Ok(()) => drop(self.counts.published.fetch_add(1, Ordering::Relaxed)),
                Err(TrySendError::Full(_) | TrySendError::Closed(_)) => self.counts.drop_one(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::time::Time;

    use super::*;
    use crate::core::config::EngineConfig;
    use crate::core::engine::Input;
    use crate::core::engine::tests::{engine, request, run_to_idle};

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let mut config = EngineConfig::default();
        config.kv_events_config.enable_kv_cache_events = true;
        let mut engine = engine(config.clone());
        // A block of the prompt, and one each 16 output tokens.
        engine.handle(Time::ZERO, Input::Add(Box::new(request(&config, 1, 16, 50, Time::ZERO))));
        run_to_idle(&mut engine);
        let (queue, mut batches) = mpsc::channel(1);
        let sink = Sink { queue, counts: Arc::default() };
        sink.take_from(&mut engine);
        assert_eq!(batches.try_recv().unwrap().seq, 0);
        assert_eq!(sink.counts.dropped.load(Ordering::Relaxed), 3);
        drop(batches);
        assert!(engine.reset_prefix_cache());
        engine.handle(Time::ZERO, Input::Add(Box::new(request(&config, 2, 16, 1, Time::ZERO))));
        run_to_idle(&mut engine);
        sink.take_from(&mut engine);
        assert_eq!(sink.counts.dropped.load(Ordering::Relaxed), 4, "a publisher that is gone takes nothing");
    }
}
