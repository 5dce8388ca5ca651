//! Prefill in one engine, decode in another: the KV connector between them, without sockets.
//!
//! Semantics of vLLM's NIXL connector in pull mode (`vllm/distributed/kv_transfer/kv_connector/v1/nixl`). The engine that prefilled
//! (P) keeps the blocks of a finished request under a lease; the one that decodes (D) reads them, tells P meanwhile that it still
//! wants them, and P lets go when they are read or the lease ends. What one engine has to tell another is a [`KvOutput`], what
//! it is told a [`KvInput`]; a driver carries them over HTTP (`server/kv`) or an event queue. No cache is ever sent: a transfer is
//! the time it takes.

mod config;
mod connector;
mod cost;
mod lease;
mod metrics;
mod receive;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use shared::ids::{SpanId, TraceId};
use shared::time::{Dur, Time};
use shared::trace::{TraceContext, Trail};

use crate::core::block_pool::BlockIx;

pub use config::{KvConnector, KvExtraConfig, KvRole, KvTransferConfig, LinkKind, LoadFailurePolicy};
pub(crate) use connector::{Connector, Freed, Request};
pub use cost::{Link, POST_NS, REGIONS_PER_LAYER, Shipment, Transfer};
pub use metrics::KvMetrics;

/// What a request asks of the connector.
#[derive(Clone, Debug)]
pub enum KvAsk {
    /// Keep the blocks at the end for another engine (`do_remote_decode`), under this name.
    Keep(Arc<str>),
    /// Read the prompt's blocks from another engine (`do_remote_prefill`).
    Pull(Arc<RemoteBlocks>),
}

/// Another engine.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// Its name among engines (`remote_engine_id`).
    pub engine_id: Arc<str>,
    /// Where its side channel is (`remote_host`).
    pub host: Arc<str>,
    /// The same (`remote_port`).
    pub port: u16,
}

/// Blocks that another engine keeps for this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteBlocks {
    /// Who keeps them.
    pub peer: Arc<Peer>,
    /// The name it keeps them under (`remote_request_id`).
    pub request: Arc<str>,
    /// How many.
    pub blocks: u32,
}

/// What P kept of a finished request: what `kv_transfer_params` of its answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The name it is kept under.
    pub request: Arc<str>,
    /// The blocks, in order.
    pub blocks: Vec<BlockIx>,
    /// Tokens computed.
    pub tokens: u32,
    /// Prompt tokens that P found in its own cache.
    pub cached_tokens: u32,
    /// P's tensor parallelism.
    pub tensor_parallel: u32,
}

/// A load of one request's blocks; never reused within an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoadId(pub u64);

/// A pull that another engine asked for; chosen by the driver, unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PullKey(pub u64);

/// Something that one engine hears from another, or about it.
#[derive(Clone, Debug)]
pub enum KvInput {
    /// At P: another engine reads blocks.
    Pull(Pull),
    /// At P: another engine still wants these requests' blocks.
    Heartbeat(Vec<Arc<str>>),
    /// At P: another engine is done with these requests' blocks.
    Done(Vec<Arc<str>>),
    /// At D: a load ended.
    Received {
        /// Which.
        load: LoadId,
        /// What was moved, or why nothing was.
        outcome: Result<Transfer, TransferError>,
    },
    /// At D: a request was refused before the engine had it, so P has to be told that its blocks are not wanted.
    Refused(Arc<RemoteBlocks>),
    /// At D: a notification did not reach P.
    NotReached,
}

/// A read of blocks as it arrives at P.
#[derive(Clone, Debug)]
pub struct Pull {
    /// Its name.
    pub key: PullKey,
    /// Whose blocks.
    pub request: Arc<str>,
    /// How many.
    pub blocks: u32,
    /// The reader's tensor parallelism.
    pub ranks: u32,
    /// An injected fault: the link breaks when so many of the blocks have arrived.
    pub breaks_after: Option<u32>,
    /// The reader's name.
    pub peer: Arc<str>,
    /// The record of P's side. The connector notes facts and finishes it.
    pub trail: Trail<SendFact>,
}

/// Something that an engine tells another.
#[derive(Clone, Debug)]
pub enum KvOutput {
    /// From D: read blocks of `remote`; the answer comes back as [`KvInput::Received`].
    Pull {
        /// When.
        at: Time,
        /// Names the load.
        load: LoadId,
        /// Whose blocks.
        remote: Arc<RemoteBlocks>,
        /// The last so many of them.
        blocks: u32,
        /// D's tensor parallelism.
        ranks: u32,
        /// An injected fault: the link breaks when so many of the blocks have arrived.
        breaks_after: Option<u32>,
        /// The place of the request that needs them in its trace, if it is recorded.
        caller: Option<TraceContext>,
    },
    /// From D: a notification.
    Notify {
        /// When.
        at: Time,
        /// To whom.
        peer: Arc<Peer>,
        /// What.
        what: Notice,
        /// About which of its requests.
        requests: Vec<Arc<str>>,
    },
    /// From P: a pull ended.
    Sent {
        /// When.
        at: Time,
        /// Which.
        key: PullKey,
        /// What was moved, or why nothing was.
        outcome: Result<Transfer, TransferError>,
    },
}

impl KvOutput {
    /// When it is said.
    pub const fn at(&self) -> Time {
        match self {
            KvOutput::Pull { at, .. } | KvOutput::Notify { at, .. } | KvOutput::Sent { at, .. } => *at,
        }
    }
}

/// What a notification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The blocks are still wanted.
    Heartbeat,
    /// The blocks are not wanted any more.
    Done,
}

/// Why a transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransferError {
    /// P has no such blocks: the lease ended, they were read before, or it was restarted.
    NotKept,
    /// More blocks were asked for than are kept.
    TooMany,
    /// P cannot be reached, or went away.
    Unreachable,
    /// P did not answer in time.
    Timeout,
    /// The link broke under way.
    Broken,
    /// P refused, or its answer makes no sense.
    BadAnswer,
}

impl TransferError {
    /// All of them.
    pub const ALL: [TransferError; 6] = [
        TransferError::NotKept,
        TransferError::TooMany,
        TransferError::Unreachable,
        TransferError::Timeout,
        TransferError::Broken,
        TransferError::BadAnswer,
    ];

    /// Value of `error.type`, and the word for it between engines.
    pub const fn as_str(self) -> &'static str {
        match self {
            TransferError::NotKept => "kv_blocks_not_kept",
            TransferError::TooMany => "kv_blocks_too_many",
            TransferError::Unreachable => "kv_peer_unreachable",
            TransferError::Timeout => "kv_transfer_timeout",
            TransferError::Broken => "kv_transfer_broken",
            TransferError::BadAnswer => "kv_peer_bad_answer",
        }
    }
}

/// A fact about P's side of a transfer, a record of its own: it belongs to the trace of the request that pulls.
#[derive(Clone, Debug)]
pub enum SendFact {
    /// The pull arrived.
    Asked {
        /// Blocks wanted.
        blocks: u32,
        /// What lies between the engines.
        link: LinkKind,
        /// The reader's name.
        peer: Arc<str>,
    },
    /// The request that computed the blocks, if it was recorded.
    Computed(TraceId, SpanId),
    /// The blocks are being sent.
    Sending(Transfer),
    /// They are not.
    Failed(TransferError),
}

/// Counts of requests by how far their remote cache is (`num_requests_kv_fetch_by_stage`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStages {
    /// Waiting for blocks to load into.
    pub waiting_to_start: u32,
    /// Loading.
    pub in_progress: u32,
    /// Loaded and not admitted yet.
    pub completed_waiting: u32,
}

/// The longest transfer that is taken for one: whatever lasts longer is a fault.
pub const LONGEST_TRANSFER: Dur = Dur::from_secs(600);
