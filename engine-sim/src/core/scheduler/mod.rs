//! vLLM's v1 scheduler: which request gets how many tokens in the next step, and what its outputs change.
//!
//! Step by step the decisions of vLLM 0.33 (`vllm/v1/core/sched/scheduler.py`); the recordings under `tests/golden` are its own.
//! Knows neither durations nor telemetry: a driver says when a step is scheduled and when it is complete.
//!
//! A batch is scheduled ([`Scheduler::schedule`]), stays in flight, and is completed in order ([`Scheduler::complete`]). KV is
//! counted as computed when it is scheduled, so with asynchronous scheduling the next batch builds on outputs still unknown
//! (placeholders).

mod complete;
mod pause;
#[cfg(test)]
mod properties;
mod queue;
mod remote;
mod step;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use shared::time::Time;
use shared::tokens::TokenId;

use crate::core::block_pool::BlockIx;
use crate::core::config::{EngineConfig, ObservabilityConfig, Policy};
use crate::core::kv_cache::{KvCache, KvEvent};
use crate::core::kv_transfer::LoadId;
use crate::core::latency::{BatchShape, LatencyProfile};
use crate::core::sequence::{FinishReason, NewSequence, SeqIx, Sequence, Slab, Status};

pub use pause::PauseState;
pub use remote::{LoadStart, PinId};

use queue::Queue;
use remote::{Destination, Pinned};

/// What a scheduler is built from: plain numbers, checked before.
#[derive(Clone, Debug)]
pub struct SchedulerParams {
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks of the cache, the null block included.
    pub num_blocks: u32,
    /// Longest request in tokens.
    pub max_model_len: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most requests in a step.
    pub max_num_seqs: u32,
    /// Whether prompts may be split.
    pub chunked_prefill: bool,
    /// Most prompt tokens of one request in a step while others are there; 0 for no limit.
    pub long_prefill_token_threshold: u32,
    /// Order of admission and preemption.
    pub policy: Policy,
    /// Whether the whole sequence must fit at admission.
    pub reserve_full_isl: bool,
    /// Blocks kept free at an admission while others run.
    pub watermark_blocks: u32,
    /// Whether a batch may be scheduled before the outputs of the last one are known.
    pub async_scheduling: bool,
    /// Whether blocks are found by content.
    pub prefix_caching: bool,
    /// LoRA adapters that may run at once; no LoRA when absent.
    pub max_loras: Option<u32>,
    /// Whether cache events are collected.
    pub kv_events: bool,
    /// What is measured of blocks.
    pub observability: ObservabilityConfig,
    /// Whether outputs from before a preemption are discarded (a KV connector that sends its cache to others).
    pub drop_stale_outputs: bool,
    /// Whether blocks stay until no batch in flight uses them (a KV connector that receives into its cache).
    pub defer_frees: bool,
}

impl SchedulerParams {
    /// The numbers of a checked configuration.
    pub fn new(config: &EngineConfig, profile: &LatencyProfile) -> SchedulerParams {
        let (s, c) = (&config.scheduler, &config.cache);
        let num_blocks = config.num_gpu_blocks(profile);
        SchedulerParams {
            block_size: c.block_size,
            num_blocks,
            max_model_len: config.model_len(profile),
            max_num_batched_tokens: s.max_num_batched_tokens,
            max_num_seqs: s.max_num_seqs,
            chunked_prefill: s.enable_chunked_prefill,
            long_prefill_token_threshold: s.long_prefill_token_threshold,
            policy: s.policy,
            reserve_full_isl: s.scheduler_reserve_full_isl,
            watermark_blocks: (s.watermark * f64::from(num_blocks)) as u32,
            async_scheduling: s.async_scheduling,
            prefix_caching: c.enable_prefix_caching,
            max_loras: config.lora_slots(),
            kv_events: config.kv_events_config.enable_kv_cache_events,
            observability: config.observability.clone(),
            drop_stale_outputs: config.kv_transfer.as_ref().is_some_and(|kv| kv.kv_role.produces()),
            defer_frees: config.kv_transfer.as_ref().is_some_and(|kv| kv.kv_role.consumes()) && config.inflight() > 1,
        }
    }
}

/// How a request came into a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It ran already.
    Running,
    /// Admitted for the first time.
    New,
    /// Admitted again after a preemption.
    Resumed,
}

/// One request in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The request.
    pub ix: SeqIx,
    /// Which user of the slot it is.
    generation: u32,
    /// The caller's name for it.
    pub tag: u64,
    /// Tokens scheduled.
    pub tokens: u32,
    /// Tokens computed before.
    pub computed: u32,
    /// How it came in.
    pub origin: Origin,
    /// Whether it only decodes.
    pub decode: bool,
    /// Whether a token is sampled for it.
    pub samples: bool,
    /// Blocks it had before this step; those after are new.
    pub owned_blocks: u32,
    /// Blocks it got in this step, hits included.
    pub new_blocks: u32,
    /// Blocks found in the cache; only at an admission.
    pub hit_blocks: u32,
}

/// What one call of `schedule` decided.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Number of the call, from 1.
    pub step: u64,
    /// Requests with their tokens: running ones, then admissions.
    pub entries: Vec<Entry>,
    /// Loads of remote blocks that start with the step.
    pub loads: Vec<LoadStart>,
    /// Requests whose remote blocks are all here already.
    pub covered: Vec<(SeqIx, u64)>,
    /// Requests preempted, in order.
    pub preempted: Vec<(SeqIx, u64)>,
    /// Requests that ended since the last call.
    pub finished: Vec<u64>,
    /// What decides how long the step takes.
    pub shape: BatchShape,
    /// The longest sequence in the batch, in tokens.
    pub max_seq_len: u32,
    /// Requests that waited before the step.
    pub waiting_before: u32,
    /// Free blocks before the step.
    pub free_before: u32,
    /// Blocks that lost their content in the step.
    pub evicted: u32,
    /// Blocks freed by preemptions in the step.
    pub freed: u32,
    /// Equal for batches of exactly the same decoding requests; absent when anything else is in the batch.
    pub composition: Option<u64>,
}

impl Batch {
    /// Tokens in the batch.
    pub const fn total_tokens(&self) -> u64 {
        self.shape.tokens()
    }

    /// Whether the call decided anything: if not, neither will the next one until something else happens.
    pub(crate) fn changes_something(&self) -> bool {
        let nobody = self.entries.is_empty() && self.loads.is_empty() && self.covered.is_empty();
        !nobody || !self.preempted.is_empty() || !self.finished.is_empty()
    }

    fn reset(&mut self) {
        self.entries.clear();
        self.loads.clear();
        self.covered.clear();
        self.preempted.clear();
        self.finished.clear();
        self.shape = BatchShape::default();
        self.max_seq_len = 0;
        self.freed = 0;
        self.composition = None;
    }
}

/// A token that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenOut {
    /// The request; its slot may be free by now.
    pub ix: SeqIx,
    /// The caller's name for it.
    pub tag: u64,
    /// The token.
    pub token: TokenId,
    /// Why the request ended, if it did.
    pub finish: Option<FinishReason>,
    /// Whether it is from before a preemption.
    pub stale: bool,
    /// Its blocks, if they are kept for another engine.
    pub pin: Option<PinId>,
}

/// Tokens looked up in the prefix cache and found, summed over admissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens of requests admitted for the first time.
    pub queries: u64,
    /// Of these, found.
    pub hits: u64,
    /// Tokens of requests admitted again.
    pub preempted_queries: u64,
    /// Of these, found.
    pub preempted_hits: u64,
    /// Tokens beyond the local hits of requests admitted, or loaded for, the first time: what a connector is asked for.
    pub external_queries: u64,
    /// Of these, loaded.
    pub external_hits: u64,
}

/// The scheduler and the KV cache it manages.
#[derive(Clone, Debug)]
pub struct Scheduler {
    params: SchedulerParams,
    slab: Slab,
    kv: KvCache,
    running: Vec<SeqIx>,
    waiting: Queue,
    /// Waiting requests that own blocks; examined before `waiting`.
    holding: Queue,
    deferred: usize,
    finished: Vec<u64>,
    in_flight: VecDeque<Batch>,
    /// Changes whenever the set of running requests does.
    membership: u64,
    pause: PauseState,
    step: u64,
    sched_seq: u64,
    processed_seq: u64,
    prefix: PrefixStats,
    /// Blocks of ended requests that a batch in flight still uses, with the step after which they are free.
    pending_frees: VecDeque<(u64, Vec<BlockIx>)>,
    /// Loads under way and where they lead.
    loads: BTreeMap<LoadId, Destination>,
    next_load: u64,
    /// Blocks kept for other engines.
    pins: BTreeMap<PinId, Pinned>,
    next_pin: u64,
    // Scratch, kept for its capacity.
    spare: Vec<Batch>,
    outputs: Vec<TokenOut>,
    hits: Vec<BlockIx>,
    skipped: Vec<SeqIx>,
    loras: Vec<u32>,
}

impl Scheduler {
    /// An idle scheduler with an empty cache.
    pub fn new(params: SchedulerParams) -> Scheduler {
        let p = &params;
        let mut kv = KvCache::new(p.num_blocks, p.block_size, p.max_model_len, p.prefix_caching, p.kv_events);
        kv.measure(&p.observability);
        Scheduler {
            slab: Slab::default(),
            kv,
            running: Vec::new(),
            waiting: Queue::new(p.policy),
            holding: Queue::new(p.policy),
            deferred: 0,
            finished: Vec::new(),
            in_flight: VecDeque::new(),
            membership: 0,
            pause: PauseState::default(),
            step: 0,
            sched_seq: 0,
            processed_seq: 0,
            prefix: PrefixStats::default(),
            pending_frees: VecDeque::new(),
            loads: BTreeMap::new(),
            next_load: 0,
            pins: BTreeMap::new(),
            next_pin: 0,
            spare: Vec::new(),
            outputs: Vec::new(),
            hits: Vec::new(),
            skipped: Vec::new(),
            loras: Vec::new(),
            params,
        }
    }

    /// Queues a request.
    pub fn add(&mut self, new: NewSequence) -> SeqIx {
        let ix = self.slab.insert(new);
        self.waiting.push(&self.slab, ix);
        ix
    }

    /// Ends a request; nothing happens if it ended before. Its entries in batches in flight are ignored from now on.
    pub fn abort(&mut self, ix: SeqIx, tag: u64) {
        if self.slab[ix].new.tag != tag {
            return;
        }
        match self.slab[ix].status {
            Status::Running => {
                self.running.retain(|&other| other != ix);
                self.membership += 1;
            }
            // Nothing writes into the blocks of a load that has arrived.
            Status::Waiting | Status::Preempted | Status::Loading { arrived: true } => self.unqueue(ix),
            Status::Loading { arrived: false } => {
                self.unqueue(ix);
                self.orphan(ix);
            }
            Status::Finished => return,
        }
        self.end(ix);
    }

    /// Whether a request that is not held by a pause runs or waits, or an end has not been reported by a `schedule` yet.
    pub fn has_work(&self) -> bool {
        self.has_unpaused() || !self.finished.is_empty()
    }

    /// Batches scheduled and not completed.
    pub fn batches_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Requests running, in order of admission.
    pub fn running(&self) -> &[SeqIx] {
        &self.running
    }

    /// Requests waiting without blocks, in queue order.
    pub fn waiting(&self) -> impl Iterator<Item = SeqIx> {
        self.waiting.iter()
    }

    /// Requests waiting with blocks, in queue order.
    pub fn holding(&self) -> impl Iterator<Item = SeqIx> {
        self.holding.iter()
    }

    /// Requests waiting: for capacity, and deferred for another reason.
    pub fn num_waiting(&self) -> (u32, u32) {
        let all = self.waiting.len() + self.holding.len();
        ((all - self.deferred) as u32, self.deferred as u32)
    }

    /// Tags of the deferred requests, in no order that means anything.
    pub fn deferred(&self) -> impl Iterator<Item = u64> {
        self.slab.iter().filter(|s| s.deferred).map(|s| s.new.tag)
    }

    /// A request's name.
    pub fn tag(&self, ix: SeqIx) -> u64 {
        self.slab[ix].new.tag
    }

    /// A request's output limit.
    pub fn max_tokens(&self, ix: SeqIx) -> u32 {
        self.slab[ix].new.params.max_tokens
    }

    /// A request's blocks, in order.
    pub fn blocks(&self, ix: SeqIx) -> &[BlockIx] {
        &self.slab[ix].blocks
    }

    /// Blocks that a request still lacks for all its tokens.
    pub fn missing_blocks(&self, ix: SeqIx) -> u32 {
        self.kv.missing_blocks(&self.slab[ix])
    }

    /// Whether the request would wait for its LoRA adapter if a step were scheduled now.
    pub fn lora_blocked(&self, ix: SeqIx) -> bool {
        let (Some(max), Some(lora)) = (self.params.max_loras, self.slab[ix].new.lora) else { return false };
        let mut active: Vec<u32> = self.running.iter().filter_map(|&r| self.slab[r].new.lora).collect();
        active.sort_unstable();
        active.dedup();
        active.len() >= max as usize && !active.contains(&lora)
    }

    /// The KV cache.
    pub const fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// The numbers it was built from.
    pub const fn params(&self) -> &SchedulerParams {
        &self.params
    }

    /// Prefix statistics since the last call.
    pub fn take_prefix_stats(&mut self) -> PrefixStats {
        std::mem::take(&mut self.prefix)
    }

    /// Moves cache events since the last call to `out`.
    pub fn drain_kv_events(&mut self, out: &mut Vec<KvEvent>) {
        self.kv.drain_events(out);
    }

    /// What the next `schedule` does happens at `now`; only the life of blocks is measured by it.
    pub fn set_now(&mut self, now: Time) {
        self.kv.set_now(now);
    }

    /// Empties the prefix cache; `false` and no change while a request holds blocks.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.kv.reset()
    }

    /// Takes a waiting request out of its queue. A request with computed tokens waits in `holding`.
    fn unqueue(&mut self, ix: SeqIx) {
        let queue = if holds_blocks(&self.slab[ix]) { &mut self.holding } else { &mut self.waiting };
        queue.remove(&self.slab, ix);
        self.undefer(ix);
    }

    fn undefer(&mut self, ix: SeqIx) {
        if std::mem::take(&mut self.slab[ix].deferred) {
            self.deferred -= 1;
        }
    }

    /// Gives up what an ended request holds. It is in no queue any more.
    fn end(&mut self, ix: SeqIx) {
        self.finished.push(self.slab[ix].new.tag);
        if self.can_free(ix) {
            self.kv.release(&mut self.slab[ix]);
        } else {
            let blocks = std::mem::take(&mut self.slab[ix].blocks);
            self.pending_frees.push_back((self.sched_seq, blocks));
        }
        self.slab.remove(ix);
    }

    /// Whether no batch in flight writes into the request's blocks, where that matters.
    fn can_free(&self, ix: SeqIx) -> bool {
        !self.params.defer_frees || self.slab[ix].last_step <= self.processed_seq
    }
}

fn holds_blocks(seq: &Sequence) -> bool {
    seq.computed > 0 || matches!(seq.status, Status::Loading { .. })
}
