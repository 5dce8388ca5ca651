//! Latency profiles as files: YAML that people read, checked field by field, times in microseconds.
//!
//! Six decimals of a microsecond are a picosecond, the unit of [`super::StepModel`], so nothing is lost on the way in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::{ConfigErrors, Problems, Validate, load_str};

use super::{HostModel, LatencyProfile, Regime, StepModel, StepTerms};

/// A latency profile as it is in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileFile {
    /// Name by which a configuration selects it.
    pub name: String,
    /// Model id as a client names it.
    pub model: String,
    /// GPU, for reports.
    pub gpu: String,
    /// GPUs that share each layer.
    #[schemars(range(min = 1, max = 1024))]
    pub tensor_parallel: u32,
    /// Transformer layers.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: u32,
    /// Width of the residual stream.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub hidden_size: u32,
    /// Longest context of the model, in tokens.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_model_len: u32,
    /// KV cache of one token on all GPUs together, in bytes.
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub kv_bytes_per_token: u64,
    /// Tokens that the KV cache holds, the null block included.
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub kv_cache_tokens: u64,
    /// Where the constants come from.
    pub source: Source,
    /// How far they are from what was measured.
    #[serde(default)]
    pub fit: Fit,
    /// GPU time.
    pub step: StepTimes,
    /// CPU time; a production host when absent.
    #[serde(default)]
    pub host: HostTimes,
}

/// Where a profile's constants come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What was measured, by whom, with which software.
    pub data: String,
    /// When it was measured or published.
    pub date: String,
    /// Licence of the data.
    pub licence: String,
    /// What was done to it, assumed or left out.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Raw tables that `engine-sim steps` turns into step times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<Tables>,
}

/// Raw tables of measurements, in the formats that are published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "format", rename_all = "lowercase", deny_unknown_fields)]
pub enum Tables {
    /// LLMServingSim's profiler: `PREFIX__{dense,per_sequence,attention}.csv[.gz]`, microseconds per layer.
    LlmServingSim {
        /// Path of the files up to `__dense.csv`.
        prefix: String,
        /// All-reduce of a message: latency in microseconds and bytes a microsecond; none with one GPU.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        all_reduce: Option<Link>,
    },
    /// Dynamo's planner: a decode sweep and lone prefills, milliseconds.
    Dynamo {
        /// The decode sweep.
        decode: String,
        /// Time to first token by prompt length.
        prefill: String,
    },
    /// Splitwise: `perf_model.csv`, milliseconds, rows of one model, GPU and tensor parallelism.
    Splitwise {
        /// The file.
        file: String,
        /// Its column `model`.
        model: String,
        /// Its column `hardware`.
        hardware: String,
    },
    /// aiconfigurator's operators: `PREFIX_{gemm,context_attention,generation_attention}.csv[.gz]`, milliseconds.
    AiConfigurator(Operators),
}

/// Tables of operators, and the shapes of the model that is composed of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Operators {
    /// Path of the files up to `_gemm.csv`.
    pub prefix: String,
    /// The all-reduce table; none with one GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_reduce: Option<String>,
    /// Column `gemm_dtype` of the weights.
    pub dtype: String,
    /// Query heads of the model.
    #[schemars(range(min = 1, max = 4096))]
    pub heads: u32,
    /// KV heads of the model.
    #[schemars(range(min = 1, max = 4096))]
    pub kv_heads: u32,
    /// Width of a head.
    #[schemars(range(min = 1, max = 4096))]
    pub head_dim: u32,
    /// Width of the MLP.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub intermediate_size: u32,
    /// Rows of the logits layer.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub vocab_size: u32,
    /// What the tables leave out.
    pub overhead: Overhead,
}

/// A link between GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// One all-reduce of a small message, in microseconds.
    #[schemars(range(min = 0, max = 10_000))]
    pub latency: f64,
    /// Bytes a microsecond of a large one.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub bytes_per_us: f64,
}

/// What operator tables leave out of a step, in microseconds: norms, activations, sampling, launch gaps, throttling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Overhead {
    /// A step that only decodes.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub decode: f64,
    /// Any other step.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub prefill: f64,
    /// Each request.
    #[schemars(range(min = 0, max = 100_000))]
    pub per_sequence: f64,
    /// Each token of a step that is not decode-only.
    #[schemars(range(min = 0, max = 100_000))]
    pub per_token: f64,
}

/// How far predicted steps are from measured ones, as `engine-sim calibrate` found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fit {
    /// Steps that only decode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<RegimeFit>,
    /// Steps that only prefill.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<RegimeFit>,
    /// Steps that do both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixed: Option<RegimeFit>,
}

/// Mean absolute relative errors of one kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegimeFit {
    /// Measured steps.
    pub rows: u32,
    /// Of the fit to all rows, in percent.
    #[schemars(range(min = 0))]
    pub in_sample_percent: f64,
    /// Each half judged by the fit to the other half, in percent.
    #[schemars(range(min = 0))]
    pub held_out_percent: f64,
}

/// GPU time of a step, by what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepTimes {
    /// Steps that only decode.
    pub decode: TermTimes,
    /// Steps that only prefill.
    pub prefill: TermTimes,
    /// Steps that do both.
    pub mixed: TermTimes,
}

/// Terms of one kind of step, in microseconds; see [`StepTerms`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TermTimes {
    /// Linear layers of a step with very few tokens.
    #[schemars(range(min = 0, max = 10_000_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub floor: f64,
    /// Linear layers per token when compute bound.
    #[schemars(range(min = 0, max = 100_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_token: f64,
    /// Exponent of the norm that joins the two, a multiple of 1/16. 1 adds them; a large value takes the larger.
    #[schemars(range(min = 1, max = 16))]
    pub exponent: f64,
    /// What does not depend on the batch.
    #[schemars(range(min = 0, max = 10_000_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub base: f64,
    /// Each decoding request.
    #[schemars(range(min = 0, max = 100_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_sequence: f64,
    /// Each request with a chunk of prefill.
    #[schemars(range(min = 0, max = 100_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_chunk: f64,
    /// Each token of KV cache that a decoding request reads.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_context_token: f64,
    /// Each token of KV cache that a chunk reads besides its own.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_past_token: f64,
    /// Each query-key pair of prefill attention.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub per_pair: f64,
    /// All-reduces of one step with very few tokens.
    #[schemars(range(min = 0, max = 10_000_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub all_reduce: f64,
    /// All-reduces per token.
    #[schemars(range(min = 0, max = 100_000))]
    #[serde(skip_serializing_if = "is_zero")]
    pub all_reduce_per_token: f64,
}

/// CPU time of the engine around a step, in microseconds; see [`HostModel`].
///
/// Defaults are vLLM 0.33's scheduler timed on a small machine and divided by 4 for a production host, checked against vLLM
/// PR 46112 (`update_from_output` 0.142 ms at 128 requests); `prepare`, `sample` and `detokenize` are published estimates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HostTimes {
    /// From a request's arrival to the engine core: HTTP, tokenization, the way between processes.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub frontend: f64,
    /// `schedule()` with nothing to do.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub schedule: f64,
    /// `schedule()` per request in the batch, allocation included.
    #[schemars(range(min = 0, max = 100_000))]
    pub schedule_per_seq: f64,
    /// Allocation's share of `schedule_per_seq`.
    #[schemars(range(min = 0, max = 100_000))]
    pub allocate_per_seq: f64,
    /// Prefix lookup and allocation per admission.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub admit: f64,
    /// The same per token of the request admitted.
    #[schemars(range(min = 0, max = 1000))]
    pub admit_per_token: f64,
    /// Input preparation within a step.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub prepare: f64,
    /// Input preparation per request.
    #[schemars(range(min = 0, max = 100_000))]
    pub prepare_per_seq: f64,
    /// Sampling within a step.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub sample: f64,
    /// `update_from_output()`.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub update: f64,
    /// `update_from_output()` per request.
    #[schemars(range(min = 0, max = 100_000))]
    pub update_per_seq: f64,
    /// Detokenizing one token and handing it to its stream.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub detokenize: f64,
}

impl Default for TermTimes {
    fn default() -> Self {
        TermTimes {
            floor: 0.0,
            per_token: 0.0,
            exponent: 1.0,
            base: 0.0,
            per_sequence: 0.0,
            per_chunk: 0.0,
            per_context_token: 0.0,
            per_past_token: 0.0,
            per_pair: 0.0,
            all_reduce: 0.0,
            all_reduce_per_token: 0.0,
        }
    }
}

impl Default for HostTimes {
    fn default() -> Self {
        HostTimes {
            frontend: 0.0,
            schedule: 20.0,
            schedule_per_seq: 2.5,
            allocate_per_seq: 1.5,
            admit: 60.0,
            admit_per_token: 0.02,
            prepare: 150.0,
            prepare_per_seq: 1.0,
            sample: 200.0,
            update: 5.0,
            update_per_seq: 1.1,
            detokenize: 45.0,
        }
    }
}

/// Reads a profile from the text of a file; `source` is what messages call it.
///
/// # Errors
/// Everything that is wrong with it, with field, line, what was found and what is allowed.
pub fn load_profile(source: &str, text: &str) -> Result<ProfileFile, ConfigErrors> {
    load_str::<ProfileFile>(source, text, &[]).map(|loaded| loaded.config)
}

impl Validate for ProfileFile {
    fn validate(&self, p: &mut Problems) {
        for (path, text) in [("name", &self.name), ("model", &self.model), ("gpu", &self.gpu)] {
            p.check(!text.is_empty(), path, "an empty text", "a name");
        }
        for regime in Regime::ALL {
            let exponent = self.step.terms(regime).exponent * 16.0;
            let path = format!("step.{}.exponent", regime.as_str());
            p.check(exponent.fract() == 0.0, &path, exponent / 16.0, "a multiple of 1/16");
        }
    }
}

impl ProfileFile {
    /// The profile, in the units of the core.
    pub fn profile(&self) -> LatencyProfile {
        LatencyProfile {
            name: self.name.clone(),
            model: self.model.clone(),
            gpu: self.gpu.clone(),
            tensor_parallel: self.tensor_parallel,
            layers: self.layers,
            hidden_size: self.hidden_size,
            max_model_len: self.max_model_len,
            kv_bytes_per_token: self.kv_bytes_per_token,
            kv_cache_tokens: self.kv_cache_tokens,
            step: StepModel {
                decode: self.step.decode.terms(),
                prefill: self.step.prefill.terms(),
                mixed: self.step.mixed.terms(),
            },
            host: self.host.model(),
        }
    }

    /// The file's text: reads back as this value.
    pub fn to_yaml(&self) -> String {
        let value = serde_json::to_value(self).expect("plain data");
        let mut out = String::new();
        for key in FIELDS {
            if let Some(part) = value.get(key) {
                out += &shared::config::to_yaml(&serde_json::json!({ key: part }));
            }
        }
        out
    }
}

/// Fields in the order in which they are written.
const FIELDS: [&str; 13] = [
    "name",
    "model",
    "gpu",
    "tensor_parallel",
    "layers",
    "hidden_size",
    "max_model_len",
    "kv_bytes_per_token",
    "kv_cache_tokens",
    "source",
    "fit",
    "step",
    "host",
];

impl StepTimes {
    /// The terms of one kind of step.
    pub const fn terms(&self, regime: Regime) -> &TermTimes {
        match regime {
            Regime::Decode => &self.decode,
            Regime::Prefill => &self.prefill,
            Regime::Mixed => &self.mixed,
        }
    }

    /// The same, to change them.
    pub const fn terms_mut(&mut self, regime: Regime) -> &mut TermTimes {
        match regime {
            Regime::Decode => &mut self.decode,
            Regime::Prefill => &mut self.prefill,
            Regime::Mixed => &mut self.mixed,
        }
    }
}

impl Fit {
    /// The errors of one kind of step, to change them.
    pub const fn regime_mut(&mut self, regime: Regime) -> &mut Option<RegimeFit> {
        match regime {
            Regime::Decode => &mut self.decode,
            Regime::Prefill => &mut self.prefill,
            Regime::Mixed => &mut self.mixed,
        }
    }
}

impl TermTimes {
    /// In picoseconds.
    pub fn terms(&self) -> StepTerms {
        StepTerms {
            floor: picos(self.floor),
            per_token: picos(self.per_token),
            p_16ths: (self.exponent * 16.0).round() as u32,
            base: picos(self.base),
            per_sequence: picos(self.per_sequence),
            per_chunk: picos(self.per_chunk),
            per_context_token: picos(self.per_context_token),
            per_past_token: picos(self.per_past_token),
            per_pair: picos(self.per_pair),
            all_reduce: picos(self.all_reduce),
            all_reduce_per_token: picos(self.all_reduce_per_token),
        }
    }
}

impl HostTimes {
    fn model(&self) -> HostModel {
        HostModel {
            frontend: picos(self.frontend),
            schedule: picos(self.schedule),
            schedule_per_seq: picos(self.schedule_per_seq),
            allocate_per_seq: picos(self.allocate_per_seq),
            admit: picos(self.admit),
            admit_per_token: picos(self.admit_per_token),
            prepare: picos(self.prepare),
            prepare_per_seq: picos(self.prepare_per_seq),
            sample: picos(self.sample),
            update: picos(self.update),
            update_per_seq: picos(self.update_per_seq),
            detokenize: picos(self.detokenize),
        }
    }
}

fn is_zero(us: &f64) -> bool {
    *us == 0.0
}

/// Microseconds, at most ten million of them, in picoseconds.
fn picos(us: f64) -> u64 {
    (us * 1e6).round() as u64
}
