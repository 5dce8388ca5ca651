//! Options of the API server and of LoRA, named as vLLM's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args};
use engine_sim::core::config::{EngineConfig, LoraModule, Tokenizer};
use engine_sim::server::{ApiKeys, Frontend};
use shared::log::{FORMAT_VARIABLE, LogFormat};
use shared::time::Dur;
use shared::trace::Naming;
use shared::trace::config::{ExporterChoice, Rotation};

/// How the engine's HTTP surface differs from vLLM's defaults.
#[derive(Debug, Args)]
pub(crate) struct FrontendArgs {
    /// Served model names, the first of which answers carry; the profile's own if not given.
    #[arg(long, num_args = 1..)]
    served_model_name: Vec<String>,
    /// How text becomes tokens: by length (four bytes each), or with the vocabulary cl100k_base.
    #[arg(long, value_parser = ["bytes", "bpe"], default_value = "bytes")]
    tokenizer: String,
    /// A key that callers must send as `Authorization: Bearer ...`; may be given several times.
    #[arg(long, num_args = 1.., env = "VLLM_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Prompt tokens not computed yet from which on requests are refused with 503.
    #[arg(long)]
    max_num_queued_tokens: Option<u32>,
    /// Support LoRA adapters.
    #[arg(long)]
    enable_lora: bool,
    /// LoRA adapters as name=path or as JSON with name, path and base_model_name.
    #[arg(long, num_args = 1.., value_parser = lora_module, requires = "enable_lora")]
    lora_modules: Vec<LoraModule>,
    /// LoRA adapters that may be in one batch.
    #[arg(long, default_value_t = 1)]
    max_loras: u32,
    /// LoRA adapters that may be in the host's memory; as many as in one batch if not given.
    #[arg(long)]
    max_cpu_loras: Option<u32>,
    /// Largest rank of a LoRA adapter.
    #[arg(long, default_value_t = 16)]
    max_lora_rank: u32,
    /// Have /v1/load_lora_adapter and /v1/unload_lora_adapter.
    #[arg(long, env = "VLLM_ALLOW_RUNTIME_LORA_UPDATING", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new())]
    allow_runtime_lora_updating: bool,
    /// Have endpoints to pause, sleep, reset and abort.
    #[arg(long, env = "VLLM_SERVER_DEV_MODE", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new())]
    server_dev_mode: bool,
    /// Answer with an X-Request-Id.
    #[arg(long)]
    enable_request_id_headers: bool,
    /// Tell the times of a request in its answer.
    #[arg(long)]
    enable_per_request_metrics: bool,
    /// Tell the usage in every chunk of every stream.
    #[arg(long)]
    enable_force_include_usage: bool,
    /// Count open requests for /load.
    #[arg(long)]
    enable_server_load_tracking: bool,
    /// Log a line at level info for every request for a generation, when its answer begins.
    #[arg(long)]
    pub(crate) access_log: bool,
    /// Seconds without an event after which a stream gets a comment; 0 for never.
    #[arg(long, default_value_t = 0.0)]
    sse_keep_alive_interval: f64,
}

/// Where telemetry and logs go, beside what vLLM has options for.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Push metrics of the telemetry path to this collector: port 4317 means gRPC, others HTTP. Repeat for more.
    #[arg(long, value_name = "URL")]
    pub(crate) otlp_metrics: Vec<String>,
    /// Begin a new trace file where one would be larger than this; it grows for ever if not given.
    #[arg(long, value_name = "BYTES", requires = "trace_file")]
    trace_file_max_bytes: Option<u64>,
    /// How many full trace files are kept beside the one that is written.
    #[arg(long, value_name = "N", default_value_t = 5)]
    trace_file_keep: u32,
    /// Whose names spans have: those of llm-d's tracing proposal (proposal, the default), or of llm-d's own components (llm-d).
    #[arg(long, value_name = "NAMING")]
    pub(crate) naming: Option<Naming>,
    /// Let spans say what Langfuse wants to know of generations.
    #[arg(long)]
    pub(crate) langfuse: bool,
    /// A table of prices, for the cost of generations in Langfuse.
    #[arg(long, value_name = "FILE")]
    pub(crate) prices: Option<PathBuf>,
    /// Log lines for people (text), or one JSON object a line (json).
    #[arg(long, value_name = "FORMAT", env = FORMAT_VARIABLE, default_value = "text")]
    pub(crate) log_format: LogFormat,
}

impl OutputArgs {
    /// A trace file.
    pub(crate) fn file(&self, path: &Path) -> ExporterChoice {
        let (path, keep) = (path.to_owned(), self.trace_file_keep);
        match self.trace_file_max_bytes {
            None => ExporterChoice::File(path),
            Some(max_bytes) => ExporterChoice::RotatingFile(Rotation { path, max_bytes, keep }),
        }
    }
}

impl FrontendArgs {
    /// Sets what the engine has to know.
    pub(crate) fn apply(&self, config: &mut EngineConfig) {
        config.max_num_queued_tokens = self.max_num_queued_tokens;
        config.tokenizer = Tokenizer::named(&self.tokenizer).unwrap_or_default();
        if self.enable_lora {
            config.max_loras = Some(self.max_loras);
            config.max_cpu_loras = self.max_cpu_loras;
            config.max_lora_rank = self.max_lora_rank;
            config.lora_modules.clone_from(&self.lora_modules);
        }
    }

    /// The name that answers carry.
    pub(crate) fn model<'a>(&'a self, own: &'a str) -> &'a str {
        self.served_model_name.first().map_or(own, String::as_str)
    }

    pub(crate) fn frontend(&self) -> Frontend {
        let keep_alive = self.sse_keep_alive_interval;
        Frontend {
            aliases: self.served_model_name.iter().skip(1).map(|name| Arc::from(name.as_str())).collect(),
            api_keys: ApiKeys::new(self.api_key.iter().map(String::as_str)),
            dev_mode: self.server_dev_mode,
            runtime_lora: self.allow_runtime_lora_updating,
            request_id_headers: self.enable_request_id_headers,
            per_request_metrics: self.enable_per_request_metrics,
            access_log: self.access_log,
            force_include_usage: self.enable_force_include_usage,
            server_load_tracking: self.enable_server_load_tracking,
            sse_keep_alive: (keep_alive > 0.0 && keep_alive < 1e9).then(|| Dur::from_secs_f64(keep_alive)),
        }
    }
}

fn lora_module(text: &str) -> Result<LoraModule, String> {
    if text.starts_with('{') {
        return serde_json::from_str(text).map_err(|e| e.to_string());
    }
    match text.split_once('=') {
        Some((name, path)) => Ok(LoraModule { name: name.into(), path: path.into(), base_model_name: None }),
        None => Err("expected name=path".into()),
    }
}
