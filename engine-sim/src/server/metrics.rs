//! The metrics page, with vLLM's names, labels and buckets in Prometheus' text format.
//!
//! Gauges are those of the last completed step and counters are counted when outputs come back, as vLLM's scheduler and frontend report
//! them (`vllm/v1/metrics/{loggers,stats}.py`). docs/engine-metrics.md lists what is there and what is not.

mod help;
pub mod http;
mod page;
pub mod process;

pub use page::{Kind, Page};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use shared::time::Time;

use super::kv_events::Counts;
use crate::core::config::HashAlgo;
use crate::core::engine::{Engine, Snapshot};
use crate::core::sequence::FinishReason;

/// Bytes of a page, to begin with.
const TYPICAL: usize = 56 * 1024;

/// The page that is shown while it does not change.
#[derive(Debug, Default)]
pub(super) struct Frozen(Mutex<Option<(Time, String)>>);

impl Frozen {
    /// The page since `since`: as it was when it was first asked for.
    pub(super) fn page(&self, since: Time, render: impl FnOnce() -> String) -> String {
        let mut frozen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*frozen {
            Some((begun, page)) if *begun == since => page.clone(),
            Some(_) | None => frozen.insert((since, render())).1.clone(),
        }
    }
}

/// The part of the page that is the engine's, which serves `model`, at the Unix time `now` in seconds; others may follow. `names` are
/// those of adapters.
pub fn render(engine: &Engine, model: &str, now: f64, names: &dyn Fn(&[u32]) -> String) -> Page {
    let mut page = Page::new(model, TYPICAL);
    gauges(&engine.reported(), &mut page);
    sleep_state(engine, &mut page);
    loras(engine, now, names, &mut page);
    cache_config(engine, &mut page);
    counters(engine, model, &mut page);
    for (name, histogram) in engine.metrics().histograms() {
        page.histogram(name, histogram);
    }
    if let Some(residency) = engine.residency() {
        for (name, histogram) in residency.histograms() {
            page.histogram(name, histogram);
        }
    }
    page
}

fn gauges(now: &Snapshot, page: &mut Page) {
    page.one("num_requests_running", Kind::Gauge, f64::from(now.running));
    page.one("num_requests_waiting", Kind::Gauge, f64::from(now.waiting));
    let reasons =
        [("capacity", f64::from(now.waiting - now.waiting_deferred)), ("deferred", f64::from(now.waiting_deferred))];
    page.by("num_requests_waiting_by_reason", Kind::Gauge, "reason", &reasons);
    page.one("kv_cache_usage_perc", Kind::Gauge, now.kv_usage);
}

fn sleep_state(engine: &Engine, page: &mut Page) {
    let asleep = engine.asleep();
    let level = |n| f64::from(u8::from(asleep.any() && asleep.level == n));
    let awake = f64::from(u8::from(!asleep.any()));
    let states = [("awake", awake), ("weights_offloaded", level(1)), ("discard_all", level(2))];
    page.by("engine_sleep_state", Kind::Gauge, "sleep_state", &states);
}

/// The adapters in use; only with LoRA. vLLM lists every adapter that has an open request under both labels, as its
/// `LoRARequestStates` keeps one entry for either; its value is the time. Series of the past, which vLLM keeps, are left out.
fn loras(engine: &Engine, now: f64, names: &dyn Fn(&[u32]) -> String, page: &mut Page) {
    let Some(max) = engine.config().lora_slots() else { return };
    page.head("lora_requests_info", Kind::Gauge);
    let names = names(&engine.open_loras());
    let labels =
        [("max_lora", &*max.to_string()), ("waiting_lora_adapters", &names), ("running_lora_adapters", &names)];
    page.labelled("lora_requests_info", &labels, now);
}

/// The fields of vLLM's `CacheConfig` that mean something here, as Python prints them.
fn cache_config(engine: &Engine, page: &mut Page) {
    let (now, cache) = (engine.reported(), &engine.config().cache);
    let tokens = u64::from(now.num_gpu_blocks) * u64::from(now.block_size);
    let concurrency = tokens as f64 / f64::from(now.max_model_len.max(1));
    let block_size = now.block_size.to_string();
    let blocks_override = cache.num_gpu_blocks.map_or_else(|| "None".to_owned(), |n| n.to_string());
    page.head("cache_config_info", Kind::Gauge);
    let labels: [(&str, &str); 13] = [
        ("block_size", block_size.as_str()),
        ("cache_dtype", "auto"),
        ("is_attention_free", "False"),
        ("num_gpu_blocks_override", &blocks_override),
        ("sliding_window", "None"),
        ("enable_prefix_caching", if cache.enable_prefix_caching { "True" } else { "False" }),
        (
            "prefix_caching_hash_algo",
            match cache.prefix_caching_hash_algo {
                HashAlgo::Chain => "chain",
                HashAlgo::Sha256Cbor => "sha256_cbor",
            },
        ),
        ("num_gpu_blocks", &now.num_gpu_blocks.to_string()),
        ("effective_attention_block_size", &block_size),
        ("kv_cache_size_tokens", &tokens.to_string()),
        ("kv_cache_max_concurrency", &format!("{concurrency:?}")),
        ("hash_block_size", &block_size),
        ("engine", "0"),
    ];
    page.labelled("cache_config_info", &labels, 1.0);
}

fn counters(engine: &Engine, model: &str, page: &mut Page) {
    let m = engine.metrics();
    page.one("prefix_cache_queries_total", Kind::Counter, m.prefix_cache_queries as f64);
    page.one("prefix_cache_hits_total", Kind::Counter, m.prefix_cache_hits as f64);
    // A model for text has them, too, and they stay 0.
    page.one("mm_cache_queries_total", Kind::Counter, 0.0);
    page.one("mm_cache_hits_total", Kind::Counter, 0.0);
    page.one("num_preemptions_total", Kind::Counter, m.num_preemptions as f64);
    page.one("prompt_tokens_total", Kind::Counter, m.prompt_tokens as f64);
    let sources = [
        ("local_compute", (m.prompt_tokens - m.prompt_tokens_cached) as f64),
        ("local_cache_hit", m.prompt_tokens_cached as f64),
        ("external_kv_transfer", 0.0),
    ];
    page.by("prompt_tokens_by_source_total", Kind::Counter, "source", &sources);
    page.one("prompt_tokens_cached_total", Kind::Counter, m.prompt_tokens_cached as f64);
    let tiers = [
        ("device", m.prefix_cache_hits as f64),
        ("host", 0.0),
        ("p2p", 0.0),
        ("disk", 0.0),
        ("external_unspecified", 0.0),
    ];
    page.by("prompt_tokens_cached_by_source_total", Kind::Counter, "source", &tiers);
    page.one("generation_tokens_total", Kind::Counter, m.generation_tokens as f64);
    ends(engine, page);
    page.head("admission_rejections_total", Kind::Counter);
    let rejections = [
        ("max_num_queued_reqs", m.admission_rejections_queued_reqs),
        ("max_num_queued_tokens", m.admission_rejections_queued_tokens),
    ];
    for (reason, n) in rejections {
        page.labelled("admission_rejections_total", &[("model_name", model), ("reason", reason)], n as f64);
    }
}

/// vLLM has all five reasons from the start. A caller's abort is not counted, and nothing looks for repetitions here.
fn ends(engine: &Engine, page: &mut Page) {
    let counted = engine.metrics().request_success();
    let of = |reason| counted.iter().filter(|(r, _)| *r == reason).map(|(_, n)| *n as f64).sum();
    let reasons = [
        ("stop", of(FinishReason::Stop)),
        ("length", of(FinishReason::Length)),
        ("abort", of(FinishReason::Abort)),
        ("error", of(FinishReason::Error)),
        ("repetition", 0.0),
    ];
    page.by("request_success_total", Kind::Counter, "finished_reason", &reasons);
}

/// What became of batches of KV events. Ours: vLLM's engine waits instead of dropping.
pub fn kv_events(counts: &Counts, page: &mut Page) {
    let of = |n: &AtomicU64| n.load(Ordering::Relaxed) as f64;
    for (name, n) in [
        ("igsim:kv_event_batches_published_total", of(&counts.published)),
        ("igsim:kv_event_batches_dropped_total", of(&counts.dropped)),
    ] {
        page.bare_head(name, Kind::Counter);
        page.bare(name, "", &[], n);
    }
}
