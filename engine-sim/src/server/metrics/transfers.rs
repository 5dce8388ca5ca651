//! The KV connector's part of the page; nothing without one.

use super::{Kind, Page};
use crate::core::engine::Engine;

pub(super) fn render(engine: &Engine, page: &mut Page) {
    let (Some(m), Some(config)) = (engine.kv_metrics(), &engine.config().kv_transfer) else { return };
    if config.kv_role.consumes() {
        let stages = engine.fetch_stages();
        let stages = [
            ("waiting_to_start", f64::from(stages.waiting_to_start)),
            ("in_progress", f64::from(stages.in_progress)),
            ("completed_waiting", f64::from(stages.completed_waiting)),
        ];
        page.by("num_requests_kv_fetch_by_stage", Kind::Gauge, "stage", &stages);
    }
    page.one("external_prefix_cache_queries_total", Kind::Counter, m.external_prefix_cache_queries as f64);
    page.one("external_prefix_cache_hits_total", Kind::Counter, m.external_prefix_cache_hits as f64);
    for (name, n) in m.counters() {
        page.one(name, Kind::Counter, n as f64);
    }
    for (name, histogram) in m.histograms() {
        page.histogram(name, histogram);
    }
}
