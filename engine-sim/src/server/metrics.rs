//! The metrics page, with vLLM's names, labels and buckets in Prometheus' text format.
//!
//! Which of vLLM's metrics are there, and which are not, is listed in docs/engine.md.

use std::fmt::Write as _;

use crate::core::engine::Engine;
use crate::core::metrics::{Histogram, Unit};

/// Writes the metrics of `engine`, which serves `model`, at the Unix time `now` in seconds. `names` are those of adapters.
pub(super) fn render(engine: &Engine, model: &str, now: f64, names: &dyn Fn(&[u32]) -> String) -> String {
    let mut page = Page { text: String::with_capacity(16 * 1024), labels: labels(model) };
    gauges(engine, &mut page);
    loras(engine, now, names, &mut page);
    counters(engine, &mut page);
    for (name, histogram) in engine.metrics().histograms() {
        page.histogram(name, histogram);
    }
    page.text
}

/// `model_name="...",engine="0"`, as every metric of vLLM has them.
fn labels(model: &str) -> String {
    format!("model_name=\"{}\",engine=\"0\"", escaped(model))
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
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
    let asleep = engine.asleep();
    let level = |n| asleep.any() && asleep.level == n;
    for (state, on) in [("awake", !asleep.any()), ("weights_offloaded", level(1)), ("discard_all", level(2))] {
        page.line("engine_sleep_state", &format!(",sleep_state=\"{state}\""), f64::from(u8::from(on)));
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
    let sources =
        [("local_compute", computed), ("local_cache_hit", m.prompt_tokens_cached), ("external_kv_transfer", 0)];
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
    // vLLM has this from the start; nothing looks for repetitions here.
    page.line("request_success_total", ",finished_reason=\"repetition\"", 0.0);
    page.head("admission_rejections_total", "counter");
    let refused = m.admission_rejections_queued_reqs as f64;
    page.line("admission_rejections_total", ",reason=\"max_num_queued_reqs\"", refused);
    let refused = m.admission_rejections_queued_tokens as f64;
    page.line("admission_rejections_total", ",reason=\"max_num_queued_tokens\"", refused);
}

/// The adapters in use; only with LoRA. vLLM lists every adapter that has an open request under both labels, as its
/// `LoRARequestStates` keeps one entry for either; its value is the time. Series of the past, which vLLM keeps, are left out.
fn loras(engine: &Engine, now: f64, names: &dyn Fn(&[u32]) -> String, page: &mut Page) {
    let Some(max) = engine.config().lora_slots() else { return };
    page.head("lora_requests_info", "gauge");
    let names = escaped(&names(&engine.open_loras()));
    let _ = writeln!(
        page.text,
        "vllm:lora_requests_info{{max_lora=\"{max}\",waiting_lora_adapters=\"{names}\",\
         running_lora_adapters=\"{names}\"}} {now:?}"
    );
}

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
