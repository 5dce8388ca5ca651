//! How long a step takes: a model of the GPU and of the host, in integer picoseconds.
//!
//! Pure functions of what is in a batch; knows nothing of requests, queues or the clock. No profile is calibrated against a
//! GPU of our own: each constant names the published measurement it comes from, the sum is a model.
//!
//! `step = pnorm(floor, c * tokens) + overhead + per_sequence * decodes + kv * context + attention * pairs + all-reduce`
//!
//! Decode-only and mixed steps differ in their overhead, since decode runs from CUDA graphs and prefill does not.

use shared::time::Dur;

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
}

/// GPU time of a step. Every field in picoseconds but `p_16ths`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepModel {
    /// Linear layers of a step with very few tokens: reading the weights.
    pub floor: u64,
    /// Linear layers per token when compute bound.
    pub per_token: u64,
    /// Exponent of the norm that joins the two, in sixteenths. 16 adds them; a large value takes the larger.
    pub p_16ths: u32,
    /// Everything else in a decode-only step: logits, sampling, norms, launch gaps.
    pub decode_overhead: u64,
    /// The same in a step with prefill.
    pub mixed_overhead: u64,
    /// Each decoding request: its share of sampling and input preparation.
    pub per_sequence: u64,
    /// Each token of KV cache that a decoding request reads.
    pub per_context_token: u64,
    /// Each query-key pair of prefill attention.
    pub per_pair: u64,
    /// All-reduces of one step with very few tokens; 0 without tensor parallelism.
    pub all_reduce: u64,
    /// All-reduces per token.
    pub all_reduce_per_token: u64,
}

/// CPU time of the engine core around a step, in picoseconds. Source: section "engine overheads" of the reference study, vLLM
/// 0.33's scheduler timed on a small machine and divided by 4 for a production host, checked against vLLM PR 46112.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostModel {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyProfile {
    /// Name by which a configuration selects it.
    pub name: &'static str,
    /// Model id as a client names it.
    pub model: &'static str,
    /// GPU, for reports.
    pub gpu: &'static str,
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

const US: u64 = 1_000_000;

const HOST: HostModel = HostModel {
    schedule: 20 * US,
    schedule_per_seq: 2_500_000,
    allocate_per_seq: 1_500_000,
    admit: 60 * US,
    admit_per_token: 20_000,
    prepare: 150 * US,
    prepare_per_seq: US,
    sample: 200 * US,
    update: 5 * US,
    update_per_seq: 1_100_000,
    detokenize: 45 * US,
};

const NO_HOST: HostModel = HostModel {
    schedule: 0,
    schedule_per_seq: 0,
    allocate_per_seq: 0,
    admit: 0,
    admit_per_token: 0,
    prepare: 0,
    prepare_per_seq: 0,
    sample: 0,
    update: 0,
    update_per_seq: 0,
    detokenize: 0,
};

// The linear layers of all three are fits of floor, c and p to the H100 GEMM times of aiconfigurator (vLLM 0.19, bf16, tables
// for 1 to 8192 tokens, shapes of each model under its tensor parallelism), mean error 2.3-3.2 %; attention per pair and KV read
// per token come from its attention tables at 2,048 tokens and more, all-reduce from its NVLink tables (8 MiB and up).

/// Llama-3.1-8B, one H100. Anchor: 6.44 ms + 4.37e-5 ms per context token at batch 1 (vLLM blog, 2026-04-22, v0.19.1, bf16).
const LLAMA_8B: LatencyProfile = LatencyProfile {
    name: "llama-3.1-8b-h100",
    model: "meta-llama/Llama-3.1-8B-Instruct",
    gpu: "H100-80GB",
    tensor_parallel: 1,
    layers: 32,
    hidden_size: 4096,
    max_model_len: 131_072,
    // 2 * 8 KV heads * 128 * 2 bytes * 32 layers.
    kv_bytes_per_token: 131_072,
    // 79.1 GiB * 0.92 - 15 GiB of weights - 2.8 GiB for the rest = 55 GiB; / 128 KiB = 450,560 tokens = 28,160 blocks of 16.
    kv_cache_tokens: 450_560,
    step: StepModel {
        floor: 5_400 * US,
        per_token: 17_700_000,
        p_16ths: 36,
        // What the anchor leaves above the linear layers and one sequence.
        decode_overhead: 1_009_900_000,
        // Model: attention floor and eager launches instead of graphs; not calibrated.
        mixed_overhead: 2_000 * US,
        // Slope of Dynamo's H200 FP8 decode sweep (513 to 900 sequences, 350 tokens each) without its KV reads.
        per_sequence: 30 * US,
        per_context_token: 43_700,
        per_pair: 750,
        all_reduce: 0,
        all_reduce_per_token: 0,
    },
    host: HOST,
};

/// Qwen3-32B on two H100. Overheads and per-sequence time by hand from InferenceX sweeps (vLLM 0.12, TP2, 1,024 + 1,024 tokens,
/// concurrency 8 to 128), after taking out KV reads and the prefill of other requests.
const QWEN_32B: LatencyProfile = LatencyProfile {
    name: "qwen3-32b-h100-tp2",
    model: "Qwen/Qwen3-32B",
    gpu: "H100-80GB",
    tensor_parallel: 2,
    layers: 64,
    hidden_size: 5120,
    max_model_len: 40_960,
    // 2 * 8 KV heads * 128 * 2 bytes * 64 layers.
    kv_bytes_per_token: 262_144,
    // What llm-d's benchmark reports state for a pod: 307,328 tokens = 19,208 blocks of 16.
    kv_cache_tokens: 307_328,
    step: StepModel {
        floor: 11_660 * US,
        per_token: 40_000_000,
        p_16ths: 38,
        decode_overhead: 2_200 * US,
        mixed_overhead: 3_500 * US,
        per_sequence: 50 * US,
        // 128 KiB per GPU.
        per_context_token: 45_500,
        per_pair: 1_500,
        // 2 per layer: 128 * 4.3 us, and 128 * 10 KiB a token at 9.7 ps a byte.
        all_reduce: 550 * US,
        all_reduce_per_token: 12_700_000,
    },
    host: HOST,
};

/// Llama-3.3-70B on eight H100. Base step from InferenceX (70B FP8 on four H100 reads as many bytes a GPU: 11.8 ms at
/// concurrency 4); Dynamo issue 402 reports 13.9 ms on eight H200. Model, not calibrated.
const LLAMA_70B: LatencyProfile = LatencyProfile {
    name: "llama-3.3-70b-h100-tp8",
    model: "meta-llama/Llama-3.3-70B-Instruct",
    gpu: "H100-80GB",
    tensor_parallel: 8,
    layers: 80,
    hidden_size: 8192,
    max_model_len: 131_072,
    // 2 * 8 KV heads * 128 * 2 bytes * 80 layers.
    kv_bytes_per_token: 327_680,
    // 8 * (79.1 GiB * 0.92 - 16.4 GiB of weights - 3.4 GiB for the rest) = 424 GiB; / 320 KiB = 1,389,360 tokens.
    kv_cache_tokens: 1_389_360,
    step: StepModel {
        floor: 6_990 * US,
        per_token: 22_300_000,
        p_16ths: 36,
        decode_overhead: 3_700 * US,
        mixed_overhead: 5_000 * US,
        per_sequence: 50 * US,
        // 40 KiB per GPU.
        per_context_token: 14_500,
        per_pair: 490,
        // 2 per layer: 160 * 4.7 us, and 160 * 16 KiB a token at 8.1 ps a byte.
        all_reduce: 752 * US,
        all_reduce_per_token: 21_200_000,
    },
    host: HOST,
};

/// Answers at once: for measuring everything around an engine.
const INSTANT: LatencyProfile = LatencyProfile {
    name: "instant",
    model: "igsim/instant",
    gpu: "none",
    step: StepModel {
        floor: 0,
        per_token: 0,
        p_16ths: 16,
        decode_overhead: 0,
        mixed_overhead: 0,
        per_sequence: 0,
        per_context_token: 0,
        per_pair: 0,
        all_reduce: 0,
        all_reduce_per_token: 0,
    },
    host: NO_HOST,
    ..LLAMA_8B
};

const ALL: [LatencyProfile; 4] = [LLAMA_8B, QWEN_32B, LLAMA_70B, INSTANT];

impl LatencyProfile {
    /// The profile used when none is named.
    pub const DEFAULT: LatencyProfile = LLAMA_8B;
    /// Its name.
    pub const DEFAULT_NAME: &'static str = LLAMA_8B.name;

    /// The profile with this name.
    pub fn named(name: &str) -> Option<LatencyProfile> {
        ALL.into_iter().find(|p| p.name == name)
    }

    /// Names of all profiles.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ALL.into_iter().map(|p| p.name)
    }

    /// Whether every step takes no time at all.
    pub fn is_instant(&self) -> bool {
        let probe = BatchShape { decode_seqs: 1, decode_context: 1, ..BatchShape::default() };
        self.step_ps(&probe) == 0
    }

    /// From the launch of a step to its outputs, in picoseconds. An empty batch takes none.
    pub fn step_ps(&self, shape: &BatchShape) -> u64 {
        let (m, tokens) = (&self.step, shape.tokens());
        if tokens == 0 {
            return 0;
        }
        let overhead = if shape.is_decode_only() { m.decode_overhead } else { m.mixed_overhead };
        p_norm(m.floor, m.per_token * tokens, m.p_16ths)
            + overhead
            + m.per_sequence * u64::from(shape.decode_seqs)
            + m.per_context_token * shape.decode_context
            + (u128::from(m.per_pair) * u128::from(shape.prefill_pairs_x2) / 2) as u64
            + m.all_reduce
            + m.all_reduce_per_token * tokens
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

    /// The parts of an execution of `total` with so many requests that are not the forward pass: preparation and sampling.
    pub fn around_forward(&self, total: Dur, seqs: u64) -> (Dur, Dur) {
        let prepare = nanos(self.host.prepare + self.host.prepare_per_seq * seqs);
        let sample = nanos(self.host.sample);
        // A profile faster than its host: halves leave room for the forward pass.
        if prepare + sample < total { (prepare, sample) } else { (Dur::ZERO, Dur::ZERO) }
    }
}

const fn nanos(ps: u64) -> Dur {
    Dur::from_nanos(ps / 1000)
}

/// `(a^p + b^p)^(1/p)` with `p` in sixteenths, rounded to whole picoseconds.
///
/// Only multiplications, divisions and square roots, which IEEE 754 rounds exactly: every platform gives the same integer.
fn p_norm(a: u64, b: u64, p_16ths: u32) -> u64 {
    let (low, high) = (a.min(b), a.max(b));
    if low == 0 {
        return high;
    }
    let ratio = low as f64 / high as f64;
    let sum = 1.0 + int_power(sixteenth_root(ratio), p_16ths);
    (high as f64 * root(sum, p_16ths)).round() as u64
}

fn sixteenth_root(x: f64) -> f64 {
    x.sqrt().sqrt().sqrt().sqrt()
}

fn int_power(mut base: f64, mut exponent: u32) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// `s^(16 / k)` for `s` in 1..=2: Newton's method on the k-th root of `s`, then its 16th power.
fn root(s: f64, k: u32) -> f64 {
    let mut z = 1.0 + (s - 1.0) / f64::from(k);
    for _ in 0..4 {
        let power = int_power(z, k - 1);
        z -= (power * z - s) / (f64::from(k) * power);
    }
    int_power(z, 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(profile: &LatencyProfile, seqs: u32, context: u64) -> f64 {
        let shape = BatchShape { decode_seqs: seqs, decode_context: context, ..BatchShape::default() };
        profile.step_ps(&shape) as f64 / 1e9
    }

    fn prefill(profile: &LatencyProfile, tokens: u32) -> f64 {
        let pairs = u64::from(tokens) * u64::from(tokens);
        let shape =
            BatchShape { prefill_seqs: 1, prefill_tokens: tokens, prefill_pairs_x2: pairs, ..BatchShape::default() };
        profile.step_ps(&shape) as f64 / 1e9
    }

    fn near(found: f64, expect: f64, tolerance: f64) {
        assert!((found / expect - 1.0).abs() < tolerance, "found {found}, expected {expect}");
    }

    #[test]
    fn batch_one_of_the_8b_is_the_published_line() {
        near(decode(&LLAMA_8B, 1, 0), 6.44, 0.001);
        near(decode(&LLAMA_8B, 1, 100_000) - decode(&LLAMA_8B, 1, 0), 4.37, 0.001);
    }

    #[test]
    fn bases_of_the_larger_models() {
        near(decode(&QWEN_32B, 1, 0), 14.4, 0.02);
        near(decode(&LLAMA_70B, 1, 0), 11.5, 0.02);
    }

    #[test]
    fn prefill_of_8192_tokens_is_in_the_range_of_published_hardware() {
        // Linear layers measured at 159.1 ms and 348.6 ms by aiconfigurator; attention and all-reduce come on top.
        assert!((160.0..200.0).contains(&prefill(&LLAMA_8B, 8192)));
        assert!((380.0..560.0).contains(&prefill(&QWEN_32B, 8192)));
    }

    #[test]
    fn the_norm_has_its_limits() {
        let check = |a, b, p, expect: u64| assert_eq!(p_norm(a, b, p), expect, "p_norm({a}, {b}, {p}/16)");
        check(1_000_000, 0, 20, 1_000_000);
        check(0, 1_000_000, 20, 1_000_000);
        check(1_000_000, 2_000_000, 16, 3_000_000);
        check(3_000_000, 4_000_000, 32, 5_000_000);
        // A large exponent takes the larger, a hard roofline.
        check(1_000_000, 2_000_000, 1600, 2_000_000);
    }

    #[test]
    fn only_the_instant_profile_is_instant() {
        let instant: Vec<_> = ALL.iter().filter(|p| p.is_instant()).map(|p| p.name).collect();
        assert_eq!(instant, ["instant"]);
    }

    #[test]
    fn the_parts_of_a_scheduling_pass_add_up() {
        let shape = BatchShape { decode_seqs: 64, admitted: 1, admitted_tokens: 2048, ..BatchShape::default() };
        // 20 us + 64 * 2.5 us + 60 us + 2048 * 0.02 us.
        assert_eq!(LLAMA_8B.schedule_cost(&shape).total().as_nanos() / 100, 2_809);
    }

    proptest! {
        #[test]
        fn more_work_never_takes_less(
            p in 0..ALL.len(), d in 0u32..1024, ctx in 0u64..1_000_000, t in 1u32..8192, more in 1u32..512,
        ) {
            let p = &ALL[p];
            let shape = BatchShape {
                decode_seqs: d, decode_context: ctx, prefill_seqs: 1, prefill_tokens: t, prefill_pairs_x2: 5, ..BatchShape::default()
            };
            let now = p.step_ps(&shape);
            let context = ctx + u64::from(more);
            let longer = [
                BatchShape { decode_seqs: d + more, ..shape },
                BatchShape { prefill_tokens: t + more, ..shape },
                BatchShape { decode_context: context, ..shape },
            ];
            for shape in longer {
                prop_assert!(p.step_ps(&shape) >= now);
            }
        }

        #[test]
        fn the_norm_lies_between_the_larger_and_the_sum(a in 1u64..1 << 40, b in 1u64..1 << 40, p in 16u32..64) {
            let n = p_norm(a, b, p);
            let slack = (a + b) / 1_000_000_000 + 1;
            prop_assert!(n + slack >= a.max(b) && n <= a + b + slack, "{n}");
        }
    }
}
