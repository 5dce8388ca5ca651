//! Follows the KV events of engines over ZeroMQ, one task for each engine, and hands them to an index.
//!
//! There is no queue in here: a batch that the index has no time for waits in the socket, and what a publisher drops then is seen
//! as a gap. A gap is replayed; if that cannot be, the index forgets the engine and goes on. An engine that goes away is looked for
//! again.

mod replay;
mod source;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use shared::clock::RunClock;
use shared::time::Time;
use shared::trace::{OwnTraces, Tracer, Trail};
use zeromq::{Socket, SocketEvent, SocketOptions, SocketRecv, SubSocket};

use crate::core::config::PreciseConfig;
use crate::core::kv_index::events::{Batch, CacheEvent};
use crate::core::kv_index::{Applied, model_of_topic};
use crate::core::pool::EndpointId;
use crate::server::backend::Backend;
use crate::spans::{EventsFact, bounded_name};
use source::Source;
pub(crate) use source::Sources;

/// How long connecting may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often an idle socket is asked whether its peer is still there.
const LOOK: Duration = Duration::from_millis(100);
/// Pauses between attempts to reach an engine: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Who keeps an index.
pub(crate) trait Keeper: Send + Sync {
    /// Takes a batch of an endpoint that serves `model`; one after a gap that stays if `after_gap`.
    fn take(&self, endpoint: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied;
    /// The number of the next batch of an endpoint.
    fn next(&self, endpoint: EndpointId) -> u64;
}

/// One engine that is followed.
pub(crate) struct Follower {
    pub(crate) keeper: Arc<dyn Keeper>,
    pub(crate) endpoint: EndpointId,
    pub(crate) backend: Backend,
    pub(crate) sources: Sources,
    pub(crate) config: PreciseConfig,
    pub(crate) tracer: Arc<Tracer>,
    pub(crate) clock: RunClock,
}

/// A message of an engine.
#[derive(Debug)]
struct Message {
    topic: Bytes,
    seq: u64,
    payload: Bytes,
}

impl Message {
    fn of(topic: &Bytes, seq: &Bytes, payload: &Bytes) -> Option<Message> {
        let seq = u64::from_be_bytes(seq.as_ref().try_into().ok()?);
        Some(Message { topic: topic.clone(), seq, payload: payload.clone() })
    }
}

impl Follower {
    /// Follows the engine until the task is aborted.
    pub(crate) async fn run(mut self) {
        let mut pause = PAUSES.0;
        loop {
            if let Some((source, socket)) = self.connect().await {
                tracing::info!(endpoint = &*self.backend.config.name, at = source.publisher, "following KV events");
                pause = PAUSES.0;
                self.listen(&source, socket).await;
                tracing::info!(endpoint = &*self.backend.config.name, "KV events have ended");
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(PAUSES.1);
        }
    }

    async fn connect(&self) -> Option<(Source, SubSocket)> {
        let source = self.sources.of(&self.backend).await?;
        let mut options = SocketOptions::default();
        options.connect_timeout(PATIENCE);
        let mut socket = SubSocket::with_options(options);
        tokio::time::timeout(PATIENCE, socket.connect(&source.publisher)).await.ok()?.ok()?;
        socket.subscribe(&self.config.topic_filter).await.ok()?;
        Some((source, socket))
    }

    /// Takes what comes until the engine is gone.
    async fn listen(&mut self, source: &Source, mut socket: SubSocket) {
        let traces = self.tracer.kv_events();
        let mut events = socket.monitor();
        // What was published before the subscription is there to be asked for.
        self.replay(source, self.keeper.next(self.endpoint), traces.as_ref()).await;
        loop {
            match tokio::time::timeout(LOOK, socket.recv()).await {
                Ok(Ok(message)) => {
                    let frames = message.into_vec();
                    let [topic, seq, payload] = frames.as_slice() else { continue };
                    let Some(message) = Message::of(topic, seq, payload) else { continue };
                    self.heard(source, &message, traces.as_ref()).await;
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "KV events were not received");
                    return;
                }
                Err(_) => {}
            }
            while let Ok(event) = events.try_recv() {
                if matches!(event, SocketEvent::Disconnected(_) | SocketEvent::Closed) {
                    return;
                }
            }
        }
    }

    /// Takes a published batch, with those before it that were missed.
    async fn heard(&mut self, source: &Source, message: &Message, traces: Option<&Arc<OwnTraces>>) {
        let Some(Applied::Gap { from }) = self.take(message, false, traces) else { return };
        self.replay(source, from, traces).await;
        if let Some(Applied::Gap { from }) = self.take(message, false, traces) {
            let endpoint = &*self.backend.config.name;
            tracing::warn!(endpoint, from, to = message.seq, "KV events are lost: what its cache held is forgotten");
            self.take(message, true, traces);
        }
    }

    async fn replay(&mut self, source: &Source, from: u64, traces: Option<&Arc<OwnTraces>>) {
        let Some(endpoint) = &source.replay else { return };
        let asked = replay::ask(endpoint, from, |message| {
            // The oldest that is left begins anew: what was before it is forgotten by everybody.
            if let Some(Applied::Gap { .. }) = self.take(&message, false, traces) {
                self.take(&message, true, traces);
            }
        });
        match asked.await {
            Some(batches) => tracing::debug!(endpoint, from, batches, "KV events are replayed"),
            None => tracing::debug!(endpoint, from, "KV events are not replayed"),
        }
    }

    /// Hands a batch to the index; `None` if it cannot be read.
    fn take(&self, message: &Message, after_gap: bool, traces: Option<&Arc<OwnTraces>>) -> Option<Applied> {
        let started = self.clock.now();
        let batch = match wire::batch(message.seq, &message.payload) {
            Ok(batch) => batch,
            Err(error) => {
                tracing::warn!(endpoint = &*self.backend.config.name, seq = message.seq, "{error}");
                return None;
            }
        };
        self.look_at_sizes(&batch);
        let topic = std::str::from_utf8(&message.topic).unwrap_or_default();
        let model = model_of_topic(topic);
        let applied = self.keeper.take(self.endpoint, model.as_deref(), &batch, after_gap);
        if let Some(traces) = traces {
            self.record(traces.start(started), topic, &batch, applied);
        }
        Some(applied)
    }

    fn record(&self, trail: Trail<EventsFact>, topic: &str, batch: &Batch, applied: Applied) {
        let now: Time = self.clock.now();
        trail.note(now, || EventsFact::Handled {
            topic: bounded_name(&topic.into()),
            endpoint: Arc::clone(&self.backend.config.name),
            sequence: batch.seq,
            events: batch.events.len() as u32,
            blocks: batch.blocks(),
            applied,
        });
        trail.finish(now);
    }

    /// Blocks of another size are never found: that is worth a word, once.
    fn look_at_sizes(&self, batch: &Batch) {
        let size = |e: &CacheEvent| match e {
            CacheEvent::Stored(stored) => Some(stored.block_tokens),
            CacheEvent::Removed { .. } | CacheEvent::Cleared => None,
        };
        if batch.seq == 0
            && let Some(found) = batch.events.iter().find_map(size).filter(|s| *s != self.config.block_tokens)
        {
            let endpoint = &*self.backend.config.name;
            tracing::warn!(endpoint, found, expected = self.config.block_tokens, "KV blocks of another size");
        }
    }
}
