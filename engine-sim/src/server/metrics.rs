//! The metrics page, with vLLM's names, labels and buckets in Prometheus' text format.
//!
//! Which of vLLM's metrics are there, and which are not, is listed in docs/engine.md.

mod transfers;

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use shared::time::Time;

use crate::core::engine::Engine;
use crate::core::metrics::{Histogram, Unit};

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

/// Writes the metrics of `engine`, which serves `model`.
pub(super) fn render(engine: &Engine, model: &str) -> String {
    let mut page = Page { text: String::with_capacity(16 * 1024), labels: labels(model) };
    gauges(engine, &mut page);
    counters(engine, &mut page);
    for (name, histogram) in engine.metrics().histograms() {
        page.histogram(name, histogram);
    }
    one_choice(engine, &mut page);
    transfers::render(engine, &mut page);
    page.text
}

/// `model_name="...",engine="0"`, as every metric of vLLM has them.
fn labels(model: &str) -> String {
    let escaped = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("model_name=\"{escaped}\",engine=\"0\"")
}

fn gauges(engine: &Engine, page: &mut Page) {
    let now = engine.snapshot();
    page.one("num_requests_running", "gauge", f64::from(now.running));
    page.one("num_requests_waiting", "gauge", f64::from(now.waiting));
    page.head("num_requests_waiting_by_reason", "gauge");
    for (reason, n) in [("capacity", now.waiting - now.waiting_deferred), ("deferred", now.waiting_deferred)] {
        page.line("num_requests_waiting_by_reason", &format!(",reason=\"{reason}\""), f64::from(n));
    }
    page.one("kv_cache_usage_perc", "gauge", now.kv_usage);
    page.head("engine_sleep_state", "gauge");
    for (state, on) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
        page.line("engine_sleep_state", &format!(",sleep_state=\"{state}\""), on);
    }
    page.head("cache_config_info", "gauge");
    let cache = &engine.config().cache;
    let _ = writeln!(
        page.text,
        "vllm:cache_config_info{{block_size=\"{}\",num_gpu_blocks=\"{}\",enable_prefix_caching=\"{}\",engine=\"0\"}} 1.0",
        now.block_size,
        now.num_gpu_blocks,
        if cache.enable_prefix_caching { "True" } else { "False" }
    );
}

fn counters(engine: &Engine, page: &mut Page) {
    let m = engine.metrics();
    page.one("prompt_tokens_total", "counter", m.prompt_tokens as f64);
    page.head("prompt_tokens_by_source_total", "counter");
    let computed = m.prompt_tokens - m.prompt_tokens_cached;
    // A token computed again was there: the three add up to the prompt tokens and those.
    let local = m.prompt_tokens_cached + m.prompt_tokens_recomputed - m.prompt_tokens_external;
    let external = m.prompt_tokens_external;
    let sources = [("local_compute", computed), ("local_cache_hit", local), ("external_kv_transfer", external)];
    for (source, n) in sources {
        page.line("prompt_tokens_by_source_total", &format!(",source=\"{source}\""), n as f64);
    }
    page.one("prompt_tokens_cached_total", "counter", m.prompt_tokens_cached as f64);
    page.one("generation_tokens_total", "counter", m.generation_tokens as f64);
    page.one("prefix_cache_queries_total", "counter", m.prefix_cache_queries as f64);
    page.one("prefix_cache_hits_total", "counter", m.prefix_cache_hits as f64);
    page.one("num_preemptions_total", "counter", m.num_preemptions as f64);
    page.head("request_success_total", "counter");
    for (reason, n) in m.request_success() {
        page.line("request_success_total", &format!(",finished_reason=\"{}\"", reason.as_str()), n as f64);
    }
    // vLLM has these from the start; a caller's abort is not counted and nothing looks for repetitions here.
    for reason in ["abort", "repetition"] {
        page.line("request_success_total", &format!(",finished_reason=\"{reason}\""), 0.0);
    }
    page.head("admission_rejections_total", "counter");
    let refused = m.admission_rejections_queued_reqs as f64;
    page.line("admission_rejections_total", ",reason=\"max_num_queued_reqs\"", refused);
}

/// Histograms that say nothing new where every request has one choice.
fn one_choice(engine: &Engine, page: &mut Page) {
    let m = engine.metrics();
    page.histogram("request_max_num_generation_tokens", &m.request_generation_tokens);
    let requests = m.request_generation_tokens.count();
    let mut counts = vec![0; N_BOUNDS.len() + 1];
    counts[0] = requests;
    let n = Histogram { unit: Unit::Count, bounds: N_BOUNDS.to_vec(), counts, sum: u128::from(requests) };
    page.histogram("request_params_n", &n);
}

/// Buckets of `request_params_n` (`vllm/v1/metrics/loggers.py`).
const N_BOUNDS: [u64; 5] = [1, 2, 5, 10, 20];

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str) {
        let _ = writeln!(self.text, "# TYPE vllm:{name} {kind}");
    }

    fn line(&mut self, name: &str, more: &str, value: f64) {
        let _ = writeln!(self.text, "vllm:{name}{{{}{more}}} {value:?}", self.labels);
    }

    fn one(&mut self, name: &str, kind: &str, value: f64) {
        self.head(name, kind);
        self.line(name, "", value);
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        self.head(name, "histogram");
        let scale = match histogram.unit {
            Unit::Time => 1e-9,
            Unit::Count => 1.0,
        };
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count;
            // 0.02, not 0.020000000000000004: nine digits hold a nanosecond.
            let bound = ((*bound as f64 * scale) * 1e9).round() / 1e9;
            self.line(&format!("{name}_bucket"), &format!(",le=\"{bound:?}\""), below as f64);
        }
        self.line(&format!("{name}_bucket"), ",le=\"+Inf\"", histogram.count() as f64);
        self.line(&format!("{name}_count"), "", histogram.count() as f64);
        self.line(&format!("{name}_sum"), "", histogram.sum as f64 * scale);
    }
}
