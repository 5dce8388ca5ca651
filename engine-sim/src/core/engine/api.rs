//! What goes into an engine and what comes out.

use shared::time::Time;
use shared::tokens::ContentId;
use shared::trace::Trail;

use crate::core::facts::EngineFact;
use crate::core::faults::Lost;
use crate::core::hasher::PreparedPrompt;
use crate::core::kv_transfer::{Kept, KvAsk, KvInput};
use crate::core::scheduler::Scheduler;
use crate::core::sequence::{FinishReason, SamplingParams};

/// A request's name between driver and engine; chosen by the driver, unique while the request is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// A request.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its name.
    pub key: RequestKey,
    /// Its prompt, from [`crate::core::hasher::prepare_prompt`].
    pub prompt: PreparedPrompt,
    /// Sampling.
    pub params: SamplingParams,
    /// Lower runs first under the priority policy.
    pub priority: i32,
    /// When it arrived at the frontend: latencies count from here.
    pub arrival: Time,
    /// Output tokens are `content.token(0)`, `content.token(1)`, ...
    pub content: ContentId,
    /// The LoRA adapter, by number.
    pub lora: Option<u32>,
    /// What it asks of the KV connector; ignored without one.
    pub kv: Option<KvAsk>,
    /// The request's record. The engine notes facts; the driver finishes it.
    pub trail: Trail<EngineFact>,
}

/// Something that arrives at an engine.
#[derive(Clone, Debug)]
pub enum Input {
    /// A request.
    Add(Box<NewRequest>),
    /// The caller of a request went away.
    Abort(RequestKey),
    /// Word from another engine; ignored without a KV connector.
    Kv(Box<KvInput>),
}

/// Something an engine hands over. Each request ends with exactly one `Finished`, `Rejected` or `Broken`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Tokens for a stream.
    Tokens {
        /// The request.
        key: RequestKey,
        /// When they are handed to the stream.
        at: Time,
        /// How many.
        new_tokens: u32,
    },
    /// The request ended.
    Finished {
        /// The request.
        key: RequestKey,
        /// When the end is handed to the stream.
        at: Time,
        /// Why.
        reason: FinishReason,
        /// What happened to it. Boxed: tokens outnumber ends by hundreds to one.
        stats: Box<RequestStats>,
        /// The blocks kept for another engine, if it asked for that and ended with `stop` or `length`.
        kept: Option<Box<Kept>>,
    },
    /// The request was not taken.
    Rejected {
        /// The request.
        key: RequestKey,
        /// When.
        at: Time,
        /// Why.
        reason: RejectReason,
    },
    /// A fault ended the request.
    Broken {
        /// The request.
        key: RequestKey,
        /// When.
        at: Time,
        /// Which: whether its caller is told.
        lost: Lost,
    },
}

impl Output {
    /// When it is handed over.
    pub const fn at(&self) -> Time {
        match self {
            Output::Tokens { at, .. }
            | Output::Finished { at, .. }
            | Output::Rejected { at, .. }
            | Output::Broken { at, .. } => *at,
        }
    }

    /// The request it belongs to.
    pub const fn key(&self) -> RequestKey {
        match self {
            Output::Tokens { key, .. }
            | Output::Finished { key, .. }
            | Output::Rejected { key, .. }
            | Output::Broken { key, .. } => *key,
        }
    }

    /// Whether the request ends with it.
    pub const fn is_last(&self) -> bool {
        match self {
            Output::Tokens { .. } => false,
            Output::Finished { .. } | Output::Rejected { .. } | Output::Broken { .. } => true,
        }
    }
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// As many requests are open as may (`max_num_queued_reqs`): HTTP 503.
    QueueFull {
        /// The limit.
        limit: u32,
    },
    /// As many prompt tokens wait to be computed as may (`max_num_queued_tokens`): HTTP 503.
    BacklogFull {
        /// The limit.
        limit: u32,
    },
    /// The engine is paused: HTTP 503.
    Paused,
    /// The prompt leaves no room for a token: HTTP 400.
    TooLong {
        /// The longest request, in tokens.
        max_model_len: u32,
    },
    /// There is no prompt: HTTP 400.
    EmptyPrompt,
}

impl RejectReason {
    /// Value of `error.type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            RejectReason::QueueFull { .. } => "queue_full",
            RejectReason::BacklogFull { .. } => "backlog_full",
            RejectReason::Paused => "engine_paused",
            RejectReason::TooLong { .. } => "prompt_too_long",
            RejectReason::EmptyPrompt => "empty_prompt",
        }
    }

    /// Status of vLLM's answer.
    pub const fn http_status(self) -> u16 {
        match self {
            RejectReason::QueueFull { .. } | RejectReason::BacklogFull { .. } | RejectReason::Paused => 503,
            RejectReason::TooLong { .. } | RejectReason::EmptyPrompt => 400,
        }
    }
}

/// What happened to a request, in engine core time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestStats {
    /// Entry into the core's queue.
    pub queued: Time,
    /// First admission.
    pub first_scheduled: Option<Time>,
    /// First token ready.
    pub first_token: Option<Time>,
    /// Newest token ready.
    pub last_token: Option<Time>,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache, or loaded from another engine, at the first admission.
    pub cached_tokens: u32,
    /// Prompt tokens loaded from another engine.
    pub external_tokens: u32,
    /// Of those that were there, computed again because something has to be sampled from: one, if the whole prompt was there.
    pub recomputed_tokens: u32,
    /// Preemptions.
    pub preemptions: u32,
    /// Length of the output.
    pub output_tokens: u32,
}

impl RequestStats {
    pub(super) const fn queued(at: Time, prompt_tokens: u32) -> RequestStats {
        RequestStats {
            queued: at,
            first_scheduled: None,
            first_token: None,
            last_token: None,
            prompt_tokens,
            cached_tokens: 0,
            external_tokens: 0,
            recomputed_tokens: 0,
            preemptions: 0,
            output_tokens: 0,
        }
    }
}

/// Gauges of an engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Snapshot {
    /// Requests running.
    pub running: u32,
    /// Requests waiting, deferred ones included.
    pub waiting: u32,
    /// Requests waiting for something else than capacity.
    pub waiting_deferred: u32,
    /// Fraction of the usable blocks that is held, in 0..=1.
    pub kv_usage: f64,
    /// Blocks, the null block included.
    pub num_gpu_blocks: u32,
    /// Blocks that nobody holds.
    pub free_blocks: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// Longest request in tokens.
    pub max_model_len: u32,
}

impl Snapshot {
    pub(super) fn of(scheduler: &Scheduler) -> Snapshot {
        let (capacity, deferred) = scheduler.num_waiting();
        let (pool, params) = (scheduler.kv().pool(), scheduler.params());
        Snapshot {
            running: scheduler.running().len() as u32,
            waiting: capacity + deferred,
            waiting_deferred: deferred,
            kv_usage: pool.usage(),
            num_gpu_blocks: pool.num_blocks(),
            free_blocks: pool.free_blocks(),
            block_size: params.block_size,
            max_model_len: params.max_model_len,
        }
    }
}
