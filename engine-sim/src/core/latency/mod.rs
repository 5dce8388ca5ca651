//! How long a step takes: a model of the GPU and of the host, in integer picoseconds.
//!
//! Pure functions of what is in a batch; knows nothing of requests, queues or the clock. Steps that only decode, steps that only
//! prefill and steps that do both each have terms of their own, since different kernels run in them (decode-only steps run from
//! CUDA graphs, attention of mixed steps is one kernel for both):
//!
//! `step = pnorm(floor, per_token * tokens) + base + per_sequence * decodes + per_chunk * chunks
//!  + per_context_token * KV tokens of decodes + per_past_token * KV tokens of chunks + per_pair * query-key pairs of chunks
//!  + all_reduce + all_reduce_per_token * tokens`
//!
//! All terms but the norm are affine, and a run of decode steps changes only the context: within it the time is affine, too.
//! Constants come from [`ProfileFile`]s; how they are fitted is in [`crate::calibrate`], how well in `docs/latency.md`.

mod builtin;
mod file;
mod norm;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use shared::time::Dur;

pub use file::{
    Fit, HostTimes, Link, Operators, Overhead, ProfileFile, RegimeFit, Source, StepTimes, Tables, TermTimes,
    load_profile,
};
use norm::p_norm;

/// What decides the length of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchShape {
    /// Requests that decode one token.
    pub decode_seqs: u32,
    /// Tokens of KV cache that those read.
    pub decode_context: u64,
    /// Requests with a chunk of prefill.
    pub prefill_seqs: u32,
    /// Tokens of all chunks.
    pub prefill_tokens: u32,
    /// Tokens of KV cache, computed earlier, that the chunks read.
    pub prefill_past: u64,
    /// Twice the query-key pairs of all chunks: the sum of `chunk * (2 * past + chunk)`.
    pub prefill_pairs_x2: u64,
    /// Requests admitted in this step: the scheduler looks up and allocates for each.
    pub admitted: u32,
    /// Tokens of the requests admitted.
    pub admitted_tokens: u64,
}

impl BatchShape {
    /// Tokens that go through the model.
    pub const fn tokens(&self) -> u64 {
        self.decode_seqs as u64 + self.prefill_tokens as u64
    }
    /// Requests in the batch.
    pub const fn seqs(&self) -> u64 {
        self.decode_seqs as u64 + self.prefill_seqs as u64
    }
    /// Whether no request prefills.
    pub const fn is_decode_only(&self) -> bool {
        self.prefill_seqs == 0
    }
    /// Which terms apply.
    pub const fn regime(&self) -> Regime {
        match (self.prefill_seqs, self.decode_seqs) {
            (0, _) => Regime::Decode,
            (_, 0) => Regime::Prefill,
            _ => Regime::Mixed,
        }
    }
}

/// What kinds of requests are in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Regime {
    /// Only requests that decode.
    Decode,
    /// Only chunks of prefill.
    Prefill,
    /// Both.
    Mixed,
}

impl Regime {
    /// All of them.
    pub const ALL: [Regime; 3] = [Regime::Decode, Regime::Prefill, Regime::Mixed];

    /// Its name in files and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Regime::Decode => "decode",
            Regime::Prefill => "prefill",
            Regime::Mixed => "mixed",
        }
    }
}

/// GPU time of a step, by what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepModel {
    /// Steps that only decode.
    pub decode: StepTerms,
    /// Steps that only prefill.
    pub prefill: StepTerms,
    /// Steps that do both.
    pub mixed: StepTerms,
}

impl StepModel {
    /// The terms of one kind of step.
    pub const fn terms(&self, regime: Regime) -> &StepTerms {
        match regime {
            Regime::Decode => &self.decode,
            Regime::Prefill => &self.prefill,
            Regime::Mixed => &self.mixed,
        }
    }
}

/// Terms of one kind of step. Every field in picoseconds but `p_16ths`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTerms {
    /// Linear layers of a step with very few tokens: reading the weights.
    pub floor: u64,
    /// Linear layers per token when compute bound.
    pub per_token: u64,
    /// Exponent of the norm that joins the two, in sixteenths. 16 adds them; a large value takes the larger.
    pub p_16ths: u32,
    /// Everything that does not depend on the batch: logits, sampling, norms, launch gaps.
    pub base: u64,
    /// Each decoding request.
    pub per_sequence: u64,
    /// Each request with a chunk of prefill.
    pub per_chunk: u64,
    /// Each token of KV cache that a decoding request reads.
    pub per_context_token: u64,
    /// Each token of KV cache that a chunk reads besides its own.
    pub per_past_token: u64,
    /// Each query-key pair of prefill attention.
    pub per_pair: u64,
    /// All-reduces of one step with very few tokens; 0 without tensor parallelism.
    pub all_reduce: u64,
    /// All-reduces per token.
    pub all_reduce_per_token: u64,
}

impl Default for StepTerms {
    fn default() -> Self {
        StepTerms {
            floor: 0,
            per_token: 0,
            p_16ths: 16,
            base: 0,
            per_sequence: 0,
            per_chunk: 0,
            per_context_token: 0,
            per_past_token: 0,
            per_pair: 0,
            all_reduce: 0,
            all_reduce_per_token: 0,
        }
    }
}

/// A step's time by cause, in picoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepParts {
    /// Linear layers.
    pub linear: u64,
    /// What does not depend on the batch.
    pub base: u64,
    /// What each request costs.
    pub sequences: u64,
    /// Attention of decoding requests.
    pub decode_attention: u64,
    /// Attention of chunks.
    pub prefill_attention: u64,
    /// All-reduces.
    pub all_reduce: u64,
}

impl StepParts {
    /// The step's whole time.
    pub const fn total(&self) -> u64 {
        self.linear + self.base + self.sequences + self.decode_attention + self.prefill_attention + self.all_reduce
    }
}

impl StepTerms {
    /// The parts of a step of this kind.
    #[inline]
    fn parts(&self, shape: &BatchShape) -> StepParts {
        let tokens = shape.tokens();
        let pairs = (u128::from(self.per_pair) * u128::from(shape.prefill_pairs_x2) / 2) as u64;
        StepParts {
            linear: p_norm(self.floor, self.per_token * tokens, self.p_16ths),
            base: self.base,
            sequences: self.per_sequence * u64::from(shape.decode_seqs)
                + self.per_chunk * u64::from(shape.prefill_seqs),
            decode_attention: self.per_context_token * shape.decode_context,
            prefill_attention: self.per_past_token * shape.prefill_past + pairs,
            all_reduce: self.all_reduce + self.all_reduce_per_token * tokens,
        }
    }
}

/// CPU time of the engine core around a step, in picoseconds; sources in [`HostTimes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostModel {
    /// From a request's arrival to the engine core: HTTP, tokenization, the way between processes.
    pub frontend: u64,
    /// `schedule()` with nothing to do.
    pub schedule: u64,
    /// `schedule()` per request in the batch, allocation included.
    pub schedule_per_seq: u64,
    /// Allocation's share of `schedule_per_seq`.
    pub allocate_per_seq: u64,
    /// Prefix lookup and allocation per admission.
    pub admit: u64,
    /// The same per token of the request admitted.
    pub admit_per_token: u64,
    /// Input preparation within a step.
    pub prepare: u64,
    /// Input preparation per request.
    pub prepare_per_seq: u64,
    /// Sampling within a step.
    pub sample: u64,
    /// `update_from_output()`.
    pub update: u64,
    /// `update_from_output()` per request.
    pub update_per_seq: u64,
    /// Detokenizing one token and handing it to its stream, in the frontend. Contention between streams is not modelled.
    pub detokenize: u64,
}

/// Times of one scheduling pass, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScheduleCost {
    /// Walking the queues and looking up prefixes.
    pub admit: Dur,
    /// Allocating blocks.
    pub allocate: Dur,
    /// Building the batch.
    pub create: Dur,
}

impl ScheduleCost {
    /// The whole pass.
    pub fn total(&self) -> Dur {
        self.admit + self.allocate + self.create
    }
}

/// A model on a GPU: identity, sizes and latency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyProfile {
    /// Name by which a configuration selects it.
    pub name: String,
    /// Model id as a client names it.
    pub model: String,
    /// GPU, for reports.
    pub gpu: String,
    /// GPUs that share each layer.
    pub tensor_parallel: u32,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Longest context of the model, in tokens.
    pub max_model_len: u32,
    /// KV cache of one token on all GPUs together, in bytes.
    pub kv_bytes_per_token: u64,
    /// Tokens that the KV cache holds, the null block included.
    pub kv_cache_tokens: u64,
    /// GPU time.
    pub step: StepModel,
    /// CPU time.
    pub host: HostModel,
}

impl LatencyProfile {
    /// Name of the profile used when none is named.
    pub const DEFAULT_NAME: &'static str = "llama-3.1-8b-h100";

    /// The built-in profile with this name.
    pub fn named(name: &str) -> Option<Arc<LatencyProfile>> {
        builtin::find(name).map(|b| Arc::clone(&b.parsed().1))
    }

    /// Names of all built-in profiles, the default first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        builtin::ALL.iter().map(|b| b.name)
    }

    /// Whether every step takes no time at all.
    pub fn is_instant(&self) -> bool {
        let probe = BatchShape { decode_seqs: 1, decode_context: 1, ..BatchShape::default() };
        self.step_ps(&probe) == 0
    }

    /// From the launch of a step to its outputs, in picoseconds. An empty batch takes none.
    #[inline]
    pub fn step_ps(&self, shape: &BatchShape) -> u64 {
        self.step_parts(shape).total()
    }

    /// [`LatencyProfile::step_ps`] by cause.
    #[inline]
    pub fn step_parts(&self, shape: &BatchShape) -> StepParts {
        if shape.tokens() == 0 {
            return StepParts::default();
        }
        self.step.terms(shape.regime()).parts(shape)
    }

    /// CPU time of the scheduling pass that made this batch.
    pub fn schedule_cost(&self, shape: &BatchShape) -> ScheduleCost {
        let (h, seqs) = (&self.host, shape.seqs());
        let admissions = h.admit * u64::from(shape.admitted) + h.admit_per_token * shape.admitted_tokens;
        let walk = h.schedule_per_seq.saturating_sub(h.allocate_per_seq) * seqs;
        ScheduleCost {
            // The lookup is about a third of an admission and the allocation the rest (own assumption).
            admit: nanos(h.schedule / 2 + admissions / 3 + walk / 2),
            allocate: nanos(h.allocate_per_seq * seqs + admissions - admissions / 3),
            create: nanos(h.schedule - h.schedule / 2 + walk - walk / 2),
        }
    }

    /// CPU time of handling the outputs of a batch in the engine core.
    pub fn update_cost(&self, seqs: u64) -> Dur {
        nanos(self.host.update + self.host.update_per_seq * seqs)
    }

    /// CPU time from the engine core's output to the stream.
    pub fn detokenize_cost(&self) -> Dur {
        nanos(self.host.detokenize)
    }

    /// Time from a request's arrival to the engine core.
    pub fn frontend_cost(&self) -> Dur {
        nanos(self.host.frontend)
    }

    /// The parts of an execution of `total` with so many requests that are not the forward pass: preparation and sampling.
    pub fn around_forward(&self, total: Dur, seqs: u64) -> (Dur, Dur) {
        let prepare = nanos(self.host.prepare + self.host.prepare_per_seq * seqs);
        let sample = nanos(self.host.sample);
        // A profile faster than its host: halves leave room for the forward pass.
        if prepare + sample < total { (prepare, sample) } else { (Dur::ZERO, Dur::ZERO) }
    }
}

impl ProfileFile {
    /// The file of a built-in profile.
    pub fn named(name: &str) -> Option<&'static ProfileFile> {
        builtin::find(name).map(|b| &b.parsed().0)
    }
}

const fn nanos(ps: u64) -> Dur {
    Dur::from_nanos(ps / 1000)
}
