//! What the engine knows about one of its own steps: typed facts without names, folded into spans elsewhere.
//!
//! A step is the batch's view; requests in it have facts of their own ([`super::facts`]). A record of a step holds at most
//! [`MAX_LINKS`] links and a handful of facts, well inside the bound of a record.

use std::sync::Arc;

use shared::time::Time;
use shared::trace::LinkTo;

use crate::core::facts::ModelFact;

/// The most requests that a step links to; OpenTelemetry's SDKs keep 128 links of a span by default.
pub const MAX_LINKS: usize = 128;

/// A fact about one step; the time it is noted at is given with each variant.
#[derive(Clone, Debug)]
pub enum BatchFact {
    /// At the planned start of the scheduling pass.
    Scheduled(PassFact),
    /// At the same time: its blocks.
    Blocks(PassBlocks),
    /// At the same time: a recorded request in the batch.
    Linked(LinkTo),
    /// At the same time: recorded requests in the batch beyond [`MAX_LINKS`].
    LinksDropped(u32),
    /// At the same time, for the finest detail only.
    Model(Arc<ModelFact>),
    /// At the launch.
    Executed(BatchRun),
    /// When the outputs were ready.
    Processed(BatchOutputs),
}

/// A scheduling pass and the batch it made.
#[derive(Clone, Copy, Debug)]
pub struct PassFact {
    /// Number of the step.
    pub iteration: u64,
    /// End of the admissions after the start of the pass, in nanoseconds.
    pub admitted_ns: u32,
    /// End of the allocations after the start of the pass, in nanoseconds.
    pub allocated_ns: u32,
    /// Length of the pass, in nanoseconds.
    pub length_ns: u32,
    /// Requests that prefill.
    pub prefill_seqs: u32,
    /// Requests that decode.
    pub decode_seqs: u32,
    /// Prefill tokens in the batch.
    pub prefill_tokens: u32,
    /// Longest sequence in the batch, in tokens.
    pub max_seq_len: u32,
}

/// Queues and blocks of a scheduling pass.
#[derive(Clone, Copy, Debug)]
pub struct PassBlocks {
    /// Requests waiting before it.
    pub waiting: u32,
    /// Requests admitted.
    pub admitted: u32,
    /// Requests preempted.
    pub preempted: u32,
    /// Blocks that were free before it.
    pub available: u32,
    /// Blocks that requests of the batch got, those found in the cache included.
    pub allocated: u32,
    /// Blocks found in the cache.
    pub hit: u32,
    /// Blocks freed by preemptions.
    pub freed: u32,
    /// Cached blocks that lost their content.
    pub evicted: u32,
}

/// The execution of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchRun {
    /// When its outputs were ready.
    pub ready: Time,
    /// Preparing the inputs, from the launch on, in nanoseconds.
    pub prepare_ns: u32,
    /// Sampling, after the forward pass, in nanoseconds.
    pub sample_ns: u32,
    /// The forward pass between the two, in nanoseconds.
    pub forward_ns: u64,
    /// Tokens sampled.
    pub sampled: u32,
}

/// The outputs of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchOutputs {
    /// When they were handed to the streams.
    pub handed: Time,
    /// Requests whose outputs were handled: as many tokens.
    pub processed: u32,
    /// Of these, finished.
    pub finished: u32,
}

#[cfg(test)]
mod tests {
    use shared::trace::record::{MAX_BYTES, MAX_FACTS};

    use super::*;

    #[test]
    fn a_record_holds_every_link_and_all_other_facts() {
        let fit = (MAX_BYTES / size_of::<(Time, BatchFact)>()).min(MAX_FACTS);
        assert!(fit >= MAX_LINKS + 32, "{fit}");
    }
}
