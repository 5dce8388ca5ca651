//! Bodies of the side channel, in JSON. Lengths are bounded by [`MAX_BODY`].

use serde::{Deserialize, Serialize};
use shared::time::Dur;

use crate::core::kv_transfer::{LONGEST_TRANSFER, Notice, Transfer, TransferError};

/// Largest body in bytes: a heartbeat about tens of thousands of requests.
pub(super) const MAX_BODY: usize = 4 << 20;

pub(super) const PULL: &str = "/kv/pull";
pub(super) const NOTIFY: &str = "/kv/notify";

/// Asks to read blocks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PullRequest {
    /// Whom it is for: a name that is not the sender's own is one of an engine that was there before.
    pub(super) engine_id: String,
    /// Whose blocks.
    pub(super) request_id: String,
    /// The last so many.
    pub(super) blocks: u32,
    /// The reader's tensor parallelism.
    pub(super) tp_size: u32,
    /// An injected fault: the link breaks when so many blocks have arrived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) breaks_after: Option<u32>,
    /// The reader.
    pub(super) reader: String,
}

/// Answers a read with 200 when the last block would be there: what was moved, per rank of the reader.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PullAnswer {
    blocks: u32,
    ranks: u32,
    rank_bytes: u64,
    rank_descriptors: u64,
    post_ns: u64,
    time_ns: u64,
}

/// Answers a read that is refused, with 404, 409 or 503.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Refusal {
    /// A word of [`TransferError::as_str`].
    pub(super) error: String,
}

/// Says something about requests. Answered with 204.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Notification {
    pub(super) engine_id: String,
    pub(super) notice: Word,
    pub(super) request_ids: Vec<String>,
}

/// What a notification says.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Word {
    /// NIXL's `HB:id1,id2`.
    Heartbeat,
    /// NIXL's `id:consumers`: an empty receive.
    Done,
}

impl From<Notice> for Word {
    fn from(notice: Notice) -> Word {
        match notice {
            Notice::Heartbeat => Word::Heartbeat,
            Notice::Done => Word::Done,
        }
    }
}

impl From<Transfer> for PullAnswer {
    fn from(t: Transfer) -> PullAnswer {
        let Transfer { blocks, ranks, rank_bytes, rank_descriptors, post, time } = t;
        let (post_ns, time_ns) = (post.as_nanos(), time.as_nanos());
        PullAnswer { blocks, ranks, rank_bytes, rank_descriptors, post_ns, time_ns }
    }
}

impl PullAnswer {
    /// What was moved, unless the figures cannot be true for a pull of `blocks` to `ranks`.
    pub(super) fn transfer(self, blocks: u32, ranks: u32) -> Result<Transfer, TransferError> {
        let time = Dur::from_nanos(self.time_ns);
        if self.blocks != blocks || self.ranks != ranks || time > LONGEST_TRANSFER {
            return Err(TransferError::BadAnswer);
        }
        let (rank_bytes, rank_descriptors) = (self.rank_bytes, self.rank_descriptors);
        Ok(Transfer { blocks, ranks, rank_bytes, rank_descriptors, post: Dur::from_nanos(self.post_ns), time })
    }
}

impl Refusal {
    pub(super) fn error(&self) -> TransferError {
        let known = TransferError::ALL.into_iter().find(|e| e.as_str() == self.error);
        known.unwrap_or(TransferError::BadAnswer)
    }
}
