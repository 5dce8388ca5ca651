//! The KV connector's part of the page; nothing without one.

use super::Page;
use crate::core::engine::Engine;

pub(super) fn render(engine: &Engine, page: &mut Page) {
    let (Some(m), Some(config)) = (engine.kv_metrics(), &engine.config().kv_transfer) else { return };
    if config.kv_role.consumes() {
        page.head("num_requests_kv_fetch_by_stage", "gauge");
        let stages = engine.fetch_stages();
        for (stage, n) in [
            ("waiting_to_start", stages.waiting_to_start),
            ("in_progress", stages.in_progress),
            ("completed_waiting", stages.completed_waiting),
        ] {
            page.line("num_requests_kv_fetch_by_stage", &format!(",stage=\"{stage}\""), f64::from(n));
        }
    }
    page.one("external_prefix_cache_queries_total", "counter", m.external_prefix_cache_queries as f64);
    page.one("external_prefix_cache_hits_total", "counter", m.external_prefix_cache_hits as f64);
    for (name, n) in m.counters() {
        page.one(&format!("{name}_total"), "counter", n as f64);
    }
    for (name, histogram) in m.histograms() {
        page.histogram(name, histogram);
    }
}
