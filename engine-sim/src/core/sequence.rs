//! One request inside the scheduler, and the slab that holds all of them.
//!
//! Pure state: the scheduler decides, this file only keeps the arithmetic of a request in one place.

use shared::block_hash::BlockKey;
use shared::tokens::TokenId;

use crate::core::block_pool::BlockIx;
use crate::core::hasher::BlockHasher;
use crate::core::kv_events::EventSource;
use crate::core::kv_transfer::LoadId;

/// Slot of a request in the slab; reused after the request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqIx(pub u32);

/// What a request asks of sampling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SamplingParams {
    /// Output tokens after which the request ends with `length`. At least 1.
    pub max_tokens: u32,
    /// Output tokens before which neither the end-of-sequence token nor a stop token is sampled.
    pub min_tokens: u32,
    /// Whether the end-of-sequence token does not end the request.
    pub ignore_eos: bool,
    /// Tokens that end the request with `stop`.
    pub stop_token_ids: Vec<TokenId>,
    /// Which output token, counted from 1, the imitated model makes the end-of-sequence token; never when absent.
    pub eos_at: Option<u32>,
    /// Whether the prompt is computed even where it is cached: log probabilities of prompt tokens need that.
    pub skip_reading_prefix_cache: bool,
    /// The caller's request that this one is a part of; a request of its own when absent.
    pub parallel: Option<Parallel>,
}

/// What a choice of a request for several (`n` above 1, several prompts) knows of its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    /// Names the prompt; equal for its choices and unique while any of them is open.
    pub parent: u64,
    /// Choices of the prompt.
    pub n: u32,
    /// Whether this is the first choice of all: the queue limits are checked once per caller's request.
    pub first: bool,
}

impl SamplingParams {
    /// Places that the queue limit is checked for with this request.
    pub(crate) fn places(&self) -> u32 {
        self.parallel.map_or(1, |p| if p.first { p.n } else { 0 })
    }
}

/// A request as the scheduler takes it.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// The caller's name for it, repeated in everything reported.
    pub tag: u64,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Keys of the prompt's full blocks; empty with prefix caching off.
    pub keys: Vec<BlockKey>,
    /// Prompt tokens after the last full block.
    pub tail: Vec<TokenId>,
    /// The chain after the last full block.
    pub hasher: BlockHasher,
    /// Sampling.
    pub params: SamplingParams,
    /// Lower runs first under the priority policy.
    pub priority: i32,
    /// Order of arrival.
    pub arrival: u64,
    /// Order among equal arrivals; unique.
    pub tie: u64,
    /// The LoRA adapter, by number.
    pub lora: Option<u32>,
    /// What KV events tell of it beside keys; absent where nobody publishes them.
    pub source: Option<Box<EventSource>>,
    /// What it has to do with other engines.
    pub remote: Remote,
}

/// What a request has to do with other engines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Remote {
    /// Nothing.
    #[default]
    None,
    /// Another engine holds so many tokens beyond any local hit; they are loaded asynchronously at every lookup. vLLM's mock
    /// connector, which its recordings were made with.
    Beyond(u32),
    /// Another engine holds the first so many tokens of the prompt; those beyond the local hit are loaded asynchronously, once.
    Prompt(u32),
    /// Another engine will read its blocks: they are kept when it ends with `stop` or `length`.
    Keep,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// In a waiting queue, never preempted.
    Waiting,
    /// In a waiting queue while its KV cache is loaded; `arrived` once it is there.
    Loading {
        /// Whether the load is complete.
        arrived: bool,
    },
    /// Admitted.
    Running,
    /// In a waiting queue after a preemption.
    Preempted,
    /// Ended; the slot is about to be reused.
    Finished,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FinishReason {
    /// End-of-sequence token or a stop token.
    Stop,
    /// `max_tokens` or the model's longest context.
    Length,
    /// The caller went away.
    Abort,
    /// The engine failed.
    Error,
}

impl FinishReason {
    /// vLLM's word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Error => "error",
        }
    }
}

/// A request in the slab. Counters are in tokens.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) new: NewSequence,
    /// Whether tokens from before the last preemption are discarded.
    pub(crate) drop_stale: bool,
    /// Distinguishes the users of a slot.
    pub(crate) generation: u32,
    pub(crate) status: Status,
    pub(crate) outputs: u32,
    /// KV computed, or scheduled to be.
    pub(crate) computed: u32,
    /// Scheduled to be sampled but not yet returned.
    pub(crate) placeholders: u32,
    /// Scheduled in batches that are not complete.
    pub(crate) in_flight: u32,
    /// The part of `in_flight` from before a preemption.
    pub(crate) stale: u32,
    pub(crate) preemptions: u32,
    /// Whether its last scheduled chunk left prompt to compute.
    pub(crate) is_prefill_chunk: bool,
    /// Whether a token was scheduled to be sampled since the last admission.
    pub(crate) decoding: bool,
    /// Looked at by the waiting loop and skipped for a reason other than capacity.
    pub(crate) deferred: bool,
    /// In the set of in-flight prefills whose blocks asynchronous loads may not take.
    pub(crate) reserving: bool,
    pub(crate) blocks: Vec<BlockIx>,
    /// Leading blocks that are registered under their keys.
    pub(crate) registered: u32,
    /// The newest load of remote blocks, and the tokens found here before it.
    pub(crate) load: LoadId,
    pub(crate) local_tokens: u32,
    /// Number of the last step that scheduled it.
    pub(crate) last_step: u64,
}

impl Sequence {
    /// Prompt and outputs known so far.
    pub(crate) const fn num_tokens(&self) -> u32 {
        self.new.prompt_tokens + self.outputs
    }

    /// Key of the priority queue and of the victim's tie-break.
    pub(crate) const fn order(&self) -> (i32, u64, u64) {
        (self.new.priority, self.new.arrival, self.new.tie)
    }

    /// Appends a sampled token; a block that it fills gets a key.
    pub(crate) fn push_output(&mut self, token: TokenId, block_size: u32, hashing: bool) {
        self.outputs += 1;
        if !hashing {
            return;
        }
        self.new.tail.push(token);
        if let Some(source) = &mut self.new.source {
            source.push(token);
        }
        if self.new.tail.len() == block_size as usize {
            let key = self.new.hasher.next_key(&self.new.tail);
            self.new.keys.push(key);
            self.new.tail.clear();
            if let Some(source) = &mut self.new.source {
                source.push_digest(&self.new.hasher);
            }
        }
    }

    /// Whether the newest output `token` ends the request: `check_stop` of vLLM's `sched/utils.py`, in its order.
    pub(crate) fn stop_reason(&self, token: TokenId, max_model_len: u32) -> Option<FinishReason> {
        let p = &self.new.params;
        // vLLM's sampler masks these tokens until min_tokens outputs exist.
        if self.outputs > p.min_tokens {
            let eos = !p.ignore_eos && p.eos_at.is_some_and(|n| self.outputs >= n);
            if eos || p.stop_token_ids.contains(&token) {
                return Some(FinishReason::Stop);
            }
        }
        let length = self.num_tokens() >= max_model_len || self.outputs >= p.max_tokens;
        length.then_some(FinishReason::Length)
    }
}

/// Requests by slot.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slab {
    slots: Vec<Sequence>,
    vacant: Vec<SeqIx>,
}

impl Slab {
    pub(crate) fn insert(&mut self, new: NewSequence) -> SeqIx {
        let sequence = |generation, blocks| Sequence {
            new,
            generation,
            status: Status::Waiting,
            outputs: 0,
            computed: 0,
            placeholders: 0,
            in_flight: 0,
            stale: 0,
            preemptions: 0,
            drop_stale: false,
            is_prefill_chunk: true,
            decoding: false,
            deferred: false,
            reserving: false,
            blocks,
            registered: 0,
            load: LoadId(0),
            local_tokens: 0,
            last_step: 0,
        };
        if let Some(ix) = self.vacant.pop() {
            let slot = &mut self.slots[ix.0 as usize];
            let blocks = std::mem::take(&mut slot.blocks);
            *slot = sequence(slot.generation, blocks);
            ix
        } else {
            self.slots.push(sequence(0, Vec::new()));
            SeqIx(self.slots.len() as u32 - 1)
        }
    }

    /// Frees a slot. What the request owned is dropped, its block table is kept for the next one.
    pub(crate) fn remove(&mut self, ix: SeqIx) {
        let slot = &mut self.slots[ix.0 as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.status = Status::Finished;
        slot.deferred = false;
        slot.blocks.clear();
        slot.new.keys = Vec::new();
        slot.new.source = None;
        self.vacant.push(ix);
    }

    /// The request of this generation, if it has not ended.
    pub(crate) fn alive(&self, ix: SeqIx, generation: u32) -> bool {
        let slot = &self.slots[ix.0 as usize];
        slot.generation == generation && slot.status != Status::Finished
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.slots.iter().filter(|s| s.status != Status::Finished)
    }
}

impl std::ops::Index<SeqIx> for Slab {
    type Output = Sequence;
    fn index(&self, ix: SeqIx) -> &Sequence {
        &self.slots[ix.0 as usize]
    }
}

impl std::ops::IndexMut<SeqIx> for Slab {
    fn index_mut(&mut self, ix: SeqIx) -> &mut Sequence {
        &mut self.slots[ix.0 as usize]
    }
}
