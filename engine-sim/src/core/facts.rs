//! What the engine knows about one recorded request: typed facts without names, folded into spans elsewhere.
//!
//! The core notes most of them; the server (or the virtual driver) notes those marked so. No fact holds content, and each is at
//! most 48 bytes, so that a record stays bounded.

use std::sync::Arc;

use shared::ids::RequestId;
use shared::time::{Dur, Time};
use shared::trace::langfuse::Generation;

use crate::core::faults::FaultKind;
use crate::core::kv_transfer::{LinkKind, Peer, Transfer, TransferError};
use crate::core::latency::LatencyProfile;
use crate::core::sequence::FinishReason;

/// A fact about one request; the time it is noted at is given with each variant.
#[derive(Clone, Debug)]
pub enum EngineFact {
    /// Server, at the request's head: which model and request.
    Received {
        /// Model as the client named it.
        model: Arc<str>,
        /// The request's external id.
        request: RequestId,
        /// What is asked for.
        operation: Operation,
    },
    /// Server, any time: what the request asks for. Absent values were not given, so vLLM's own hold.
    Asked {
        /// Output limit.
        max_tokens: Option<u32>,
        /// Sampling temperature.
        temperature: Option<f32>,
        /// Nucleus.
        top_p: Option<f32>,
        /// Choices.
        n: Option<u32>,
        /// Priority, if one was given.
        priority: Option<i32>,
    },
    /// Server, any time, for the finest detail only: what the request asks of sampling and of its output.
    Decoding(DecodingFact),
    /// Server, before [`EngineFact::Asked`]: how the request is a generation of Langfuse's, where that is asked for.
    Langfuse(Box<Generation>),
    /// Server, any time: the LoRA adapter.
    Adapter(Arc<str>),
    /// Server, when the tokens are ready.
    InputsProcessed {
        /// When the body was read.
        started: Time,
        /// Length of the prompt.
        prompt_tokens: u32,
        /// Whether the prompt was cut.
        truncated: bool,
    },
    /// Server, when the first bytes of the answer are written.
    FirstWrite,
    /// Server, when the last bytes of the answer are written: the end of the request.
    LastWrite,
    /// Server or core, when an abort is handled: the end of the request.
    Aborted,
    /// Server or core, when the request failed or was refused.
    Failed {
        /// Value of `error.type`.
        error_type: &'static str,
        /// Status of the answer: from 500 on it is the engine's fault.
        http_status: u16,
    },
    /// Core, at the entry into the core, for the finest detail only.
    Model(Arc<ModelFact>),
    /// Core, at entry into a waiting queue.
    Queued {
        /// Why it waits.
        reason: QueueReason,
        /// Requests waiting before it.
        position: u32,
        /// Requests running.
        running: u32,
    },
    /// Core, at the planned start of a scheduling pass that admitted the request or gave it a chunk of prefill.
    Scheduled(StepFact),
    /// Core, at the same time: the admission, only if the pass admitted or resumed the request.
    Admitted(AdmitFact),
    /// Core, at the same time: the blocks.
    Allocated(AllocateFact),
    /// Core, at the launch of the step that prefilled a chunk.
    Prefilled(ExecuteFact),
    /// Core, at the launch of the first step of an uninterrupted run of decode steps; amended by every further one.
    Decoded(DecodeRun),
    /// Core, at the same time: the times between the run's tokens.
    DecodeTimes(TokenTimes),
    /// Core, after each of the three above and for the finest detail only: the parts of the step, or of a run's last one.
    Fine(FineFact),
    /// Core, at the start of the scheduling pass that preempted the request.
    Preempted,
    /// Core, when a read of the prompt's blocks from another engine is asked for.
    PullStarted {
        /// Who has them.
        peer: Arc<Peer>,
        /// How many.
        blocks: u32,
        /// What lies between the engines.
        link: LinkKind,
    },
    /// Core, when that ended.
    PullEnded(Result<Pulled, TransferError>),
    /// Core, when a fault begins that the request suffers or when it arrives during one; server, when a fault strikes it alone.
    Fault(FaultKind),
    /// Core, when the last token is handed to the stream.
    Finished(FinishFact),
}

/// What a read of blocks moved.
#[derive(Clone, Copy, Debug)]
pub struct Pulled {
    /// Bytes of all ranks.
    pub bytes: u64,
    /// Descriptors of all ranks.
    pub descriptors: u64,
    /// Bytes per second.
    pub bandwidth: f64,
}

impl From<&Transfer> for Pulled {
    fn from(t: &Transfer) -> Pulled {
        Pulled { bytes: t.bytes(), descriptors: t.descriptors(), bandwidth: t.bandwidth() }
    }
}

/// What a request asks of sampling and of its output. Absent values were not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodingFact {
    /// Tokens to choose from.
    pub top_k: Option<u32>,
    /// Log probabilities wanted with each token: how many alternatives beside its own.
    pub logprobs: Option<u32>,
    /// Which output token, counted from 1, completes a stop string.
    pub stop_string_at: Option<u32>,
}

/// The model and how it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFact {
    /// Model id.
    pub name: Arc<str>,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Attention backend, by vLLM's name.
    pub attention: &'static str,
}

impl ModelFact {
    /// Of the model that a latency profile imitates.
    pub fn new(profile: &LatencyProfile) -> ModelFact {
        // What vLLM takes by itself on Ampere and Hopper, and on Blackwell (`vllm/platforms/cuda.py`).
        let attention = if profile.gpu.contains("B200") { "FLASHINFER" } else { "FLASH_ATTN" };
        let (layers, hidden_size) = (profile.layers, profile.hidden_size);
        ModelFact { name: profile.model.as_str().into(), layers, hidden_size, attention }
    }
}

/// The parts of a step. All lengths in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct FineFact {
    /// When it was launched.
    pub launch: Time,
    /// Preparing the inputs, from the launch on.
    pub prepare_ns: u32,
    /// The forward pass after that.
    pub forward_ns: u64,
    /// Sampling after that.
    pub sample_ns: u32,
    /// The engine core's part of handing the outputs over.
    pub update_ns: u32,
}

/// What a request asks an engine for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    TextCompletion,
}

impl Operation {
    /// Value of `gen_ai.operation.name`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::TextCompletion => "text_completion",
        }
    }
}

/// Why a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueReason {
    /// For tokens, a seat or blocks.
    Capacity,
    /// For its LoRA adapter.
    Lora,
    /// For its KV cache to arrive.
    RemoteKv,
    /// It was preempted.
    Preempted,
}

impl QueueReason {
    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            QueueReason::Capacity => "capacity",
            QueueReason::Lora => "lora",
            QueueReason::RemoteKv => "remote_kv",
            QueueReason::Preempted => "preempted",
        }
    }
}

/// A scheduling pass as one request sees it.
#[derive(Clone, Copy, Debug)]
pub struct StepFact {
    /// Number of the step.
    pub iteration: u64,
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
    /// Tokens for this request.
    pub tokens: u32,
    /// Whether this pass resumed the request after a preemption.
    pub resumed: bool,
}

/// The admission part of a scheduling pass.
#[derive(Clone, Copy, Debug)]
pub struct AdmitFact {
    /// Its end after the start of the pass, in nanoseconds.
    pub end_ns: u32,
    /// Requests waiting before it.
    pub waiting: u32,
    /// Requests admitted.
    pub admitted: u32,
    /// Requests preempted.
    pub preempted: u32,
    /// Blocks that the request needed.
    pub needed: u32,
    /// Blocks that were free.
    pub available: u32,
}

/// The allocation part of a scheduling pass.
#[derive(Clone, Copy, Debug)]
pub struct AllocateFact {
    /// Its start after the start of the pass, in nanoseconds.
    pub start_ns: u32,
    /// Its end after the start of the pass, in nanoseconds.
    pub end_ns: u32,
    /// Blocks that were free before the pass.
    pub available: u32,
    /// Blocks the request got, those found in the cache included.
    pub allocated: u32,
    /// Blocks that the pass freed by preempting others.
    pub freed: u32,
    /// Cached blocks that lost their content in the pass.
    pub evicted: u32,
    /// Blocks found in the cache.
    pub hit: u32,
}

/// An executed step as one request sees it.
#[derive(Clone, Copy, Debug)]
pub struct ExecuteFact {
    /// When its outputs were ready.
    pub ready: Time,
    /// From there to the hand-over of the token, in nanoseconds; 0 for a chunk that gives none.
    pub hand_over_ns: u32,
    /// The forward pass alone, in nanoseconds.
    pub forward_ns: u64,
    /// Requests in the batch.
    pub batch: u32,
    /// Requests whose outputs were handled.
    pub processed: u32,
    /// Of these, finished.
    pub finished: u32,
    /// Tokens sampled for this request.
    pub new_tokens: u32,
}

/// An uninterrupted run of decode steps.
#[derive(Clone, Copy, Debug)]
pub struct DecodeRun {
    /// When the outputs of the last step were ready.
    pub ready: Time,
    /// Requests in the batch, summed over the steps.
    pub batch_sum: u64,
    /// Forward passes alone, summed, in nanoseconds.
    pub forward_ns: u64,
    /// From `ready` to the hand-over of the last token, in nanoseconds.
    pub hand_over_ns: u32,
    /// Steps, each one token.
    pub count: u32,
    /// Largest batch.
    pub batch_max: u16,
    /// Requests whose outputs were handled with the last step.
    pub processed: u16,
    /// Of these, finished.
    pub finished: u16,
}

/// How a request ended and when it passed its stations (engine core time).
#[derive(Clone, Copy, Debug)]
pub struct FinishFact {
    /// Whether it was ever admitted; if not, the durations are zero.
    pub admitted: bool,
    /// From the entry into the queue to the first admission.
    pub queue: Dur,
    /// From that to the first token.
    pub prefill: Dur,
    /// From the first to the last token.
    pub decode: Dur,
    /// Tokens of the output.
    pub output_tokens: u32,
    /// Prompt tokens found in the cache at the first admission.
    pub cached_tokens: u32,
    /// Preemptions.
    pub preemptions: u16,
    /// Why it ended.
    pub reason: FinishReason,
}

const BUCKETS: usize = 18;

/// Times between tokens in a fixed histogram: quarter octaves from half an octave below the first time.
///
/// Steps of a run differ by the prefills they share, rarely by more than a factor of 16: 18 quarter octaves hold that, and what
/// falls outside counts in the outermost bucket. A percentile is off by at most half a bucket, 9 %.
#[derive(Clone, Copy, Debug)]
pub struct TokenTimes {
    /// Longest, in microseconds.
    max_us: u32,
    /// Index of the lowest bucket on the scale of [`quarter_octaves`].
    lowest: u8,
    counts: [u16; BUCKETS],
}

impl TokenTimes {
    /// A histogram of one time.
    pub fn new(first: Dur) -> TokenTimes {
        let lowest = quarter_octaves(first).saturating_sub(2) as u8;
        let mut times = TokenTimes { max_us: 0, lowest, counts: [0; BUCKETS] };
        times.add(first);
        times
    }

    /// Adds a time.
    pub fn add(&mut self, time: Dur) {
        let bucket = quarter_octaves(time).saturating_sub(u32::from(self.lowest)) as usize;
        let count = &mut self.counts[bucket.min(BUCKETS - 1)];
        *count = count.saturating_add(1);
        self.max_us = self.max_us.max(u32::try_from(time.as_nanos() / 1000).unwrap_or(u32::MAX));
    }

    /// The time below which a fraction `q` in 0..=1 lies, in milliseconds.
    pub fn quantile_ms(&self, q: f64) -> f64 {
        let all: u32 = self.counts.iter().map(|&c| u32::from(c)).sum();
        let rank = (f64::from(all) * q).ceil().max(1.0) as u32;
        let mut seen = 0;
        let bucket = self.counts.iter().position(|&c| {
            seen += u32::from(c);
            seen >= rank
        });
        let middle = f64::from(self.lowest) + bucket.unwrap_or(0) as f64 + 0.5;
        ((middle / 4.0).exp2() / 1e6).min(f64::from(self.max_us) / 1e3)
    }
}

/// Four times the binary logarithm of a time in nanoseconds, rounded down, with linear steps inside an octave.
fn quarter_octaves(time: Dur) -> u32 {
    let ns = time.as_nanos().max(1);
    let octave = ns.ilog2();
    let within = if octave >= 2 { (ns >> (octave - 2)) & 3 } else { 0 };
    octave * 4 + within as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_small() {
        assert!(size_of::<EngineFact>() <= 48, "{}", size_of::<EngineFact>());
    }

    #[test]
    fn quantiles_are_near() {
        let mut times = TokenTimes::new(Dur::from_micros(6_500));
        for i in 0..199u64 {
            times.add(Dur::from_micros(if i % 20 == 0 { 60_000 } else { 6_500 + i }));
        }
        let near = |found: f64, expect: f64| assert!((found / expect - 1.0).abs() < 0.13, "{found} for {expect}");
        near(times.quantile_ms(0.5), 6.6);
        near(times.quantile_ms(0.99), 60.0);
        assert!(times.quantile_ms(1.0) <= 60.0);
    }
}
