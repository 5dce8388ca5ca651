//! KV events on their way from the engines of a virtual run to the gateway's index: each batch takes the way of an answer, none is
//! lost.
//!
//! What ZeroMQ carries in a live run (`gateway/src/server/kv_events`), with an event queue instead.

use std::sync::Arc;

use engine_sim::core::config::EngineConfig;
use engine_sim::core::hasher::PreparedPrompt;
use engine_sim::core::kv_events::{BlockName, CacheEvent as EngineEvent, EventSource, KvBatch};
use gateway::core::config::PreciseConfig;
use gateway::core::gateway::Gateway;
use gateway::core::kv_index::KvPrompt;
use gateway::core::kv_index::events::{Batch, CacheEvent, EngineHash, Stored, Tier};
use gateway::core::pool::EndpointId;
use gateway::spans::EventsFact;
use shared::block_hash::{ExtraKeys, key_of};
use shared::time::Stage;
use shared::tokens::TokenId;
use shared::trace::{OwnTraces, Tracer, Trail};

use super::cost;
use super::event::Event;
use super::world::World;

/// What a virtual run needs for KV events.
pub(super) struct Events {
    traces: Option<Arc<OwnTraces>>,
}

impl Events {
    pub(super) fn new(gateway: &Tracer) -> Events {
        Events { traces: gateway.kv_events() }
    }

    /// What the gateway asks its index for a prompt.
    pub(super) fn prompt(
        &self,
        gateway: &Gateway,
        config: &PreciseConfig,
        model: &str,
        tokens: &[TokenId],
    ) -> KvPrompt {
        if !gateway.reads_kv_events() {
            return KvPrompt::default();
        }
        let mut hasher = config.hasher(model, None);
        hasher.tokens(tokens.iter().copied());
        KvPrompt { keys: hasher.finish(), answer: None }
    }

    /// Lets an engine keep the tokens of a prompt, which its events tell.
    pub(super) fn keep(
        &self,
        prompt: &mut PreparedPrompt,
        config: &EngineConfig,
        tokens: &[TokenId],
        extra: &ExtraKeys,
    ) {
        let events = &config.kv_events_config;
        if events.enable_kv_cache_events && config.cache.enable_prefix_caching {
            let source = EventSource::new(&config.cache, tokens, extra, !events.use_int_block_hashes);
            prompt.source = Some(Box::new(source));
        }
    }
}

impl World<'_> {
    /// Sends the gateway what an engine says of its cache.
    pub(super) fn tell_gateway(&mut self, engine: usize) {
        if !self.pools.core(self.pools.of_engine(engine)).reads_kv_events() {
            return;
        }
        while let Some(batch) = self.machines[engine].engine.take_kv_batch() {
            let at = batch.at.max(self.now) + self.engine_delay;
            self.push(at, Event::KvEvents(engine, Box::new(told(batch))));
        }
    }

    /// A batch is at the gateway.
    pub(super) fn kv_events(&mut self, engine: usize, batch: &Batch) {
        let now = self.now;
        let trail: Trail<EventsFact> = self.events.traces.as_ref().map_or_else(Trail::off, |t| t.start(now));
        let model = Arc::clone(&self.machines[engine].model);
        let (endpoint, pool) = (EndpointId(engine as u32), self.pools.of_engine(engine));
        let applied = self.pools.core_mut(pool).kv_events(endpoint, Some(&model), batch, false);
        let at = now + cost::stage(Stage::KvEvents { blocks: batch.blocks() });
        trail.note(at, || EventsFact::Handled {
            topic: format!("kv@engine-{engine}@{model}").into(),
            endpoint: Arc::clone(&self.pools.endpoint(engine).name),
            sequence: batch.seq,
            events: batch.events.len() as u32,
            blocks: batch.blocks(),
            applied,
        });
        trail.finish(at);
    }
}

/// A batch as the gateway takes it.
fn told(batch: KvBatch) -> Batch {
    let KvBatch { seq, at, events } = batch;
    Batch { seq, made: at.as_nanos(), events: events.into_iter().map(event).collect() }
}

fn event(event: EngineEvent) -> CacheEvent {
    match event {
        EngineEvent::Stored { blocks, parent, block_size, content } => {
            let known = content.is_some();
            let content = content.map(|c| *c).unwrap_or_default();
            CacheEvent::Stored(Stored {
                blocks: blocks.into_iter().map(name).collect(),
                parent: parent.map(name),
                tokens: content.tokens,
                block_tokens: block_size,
                tier: Tier::Gpu,
                adapter: content.lora_name.map(Arc::from),
                salt: content.cache_salt.map(Arc::from),
                opaque: !known,
            })
        }
        EngineEvent::Removed(block) => CacheEvent::Removed { blocks: vec![name(block)], tier: Tier::Gpu },
        EngineEvent::Cleared => CacheEvent::Cleared,
    }
}

fn name(block: BlockName) -> EngineHash {
    match block {
        BlockName::Key(key) => EngineHash(key.event_hash()),
        BlockName::Digest(digest) => EngineHash(key_of(&digest).event_hash()),
    }
}
