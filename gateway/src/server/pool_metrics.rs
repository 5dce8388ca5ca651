//! What the pools look like, in the Prometheus text format. Several pools have a label each: their number is bounded by the configuration.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shared::time::Time;

use crate::core::gateway::Gateway;
use crate::core::pool::{Endpoint, Presence};
use crate::server::pool::Pool;

/// A metric with a value for each pool.
type Counter = (&'static str, &'static str, fn(&Pool) -> u64);

const COUNTERS: [Counter; 3] = [
    ("gateway_ejections_total", "Endpoints left out for failing several times in a row.", |p| p.core().ejections()),
    ("gateway_hedges_total", "Second attempts beside one that had not answered.", |p| p.core().hedges()),
    ("gateway_retries_refused_total", "Attempts not made: the retry budget was spent.", |p| p.core().retries_refused()),
];
/// Metrics that only tell pools apart.
const OF_SEVERAL: Counter =
    ("gateway_pool_requests_total", "Requests by the pool that they went to.", |p| p.requests.load(Ordering::Relaxed));

/// All of it.
pub(crate) fn text(pools: &[Arc<Pool>], split: bool, now: Time) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP gateway_endpoints Endpoints of the pool by state.\n# TYPE gateway_endpoints gauge");
    for pool in pools {
        let label = if split { format!("pool=\"{}\",", escaped(&pool.config.pool.name)) } else { String::new() };
        for (state, n) in states(&pool.core(), now) {
            let _ = writeln!(out, "gateway_endpoints{{{label}state=\"{state}\"}} {n}");
        }
    }
    for (name, help, value) in COUNTERS.into_iter().chain(split.then_some(OF_SEVERAL)) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter");
        for pool in pools {
            let label = if split { format!("{{pool=\"{}\"}}", escaped(&pool.config.pool.name)) } else { String::new() };
            let _ = writeln!(out, "{name}{label} {}", value(pool));
        }
    }
    out
}

/// Requests and bytes that wait in all pools; `None` where nobody may wait.
pub(crate) fn queued(pools: &[Arc<Pool>]) -> Option<(usize, u64)> {
    let waiting = pools.iter().filter(|pool| pool.queue.is_some()).map(|pool| pool.core().queued());
    waiting.reduce(|a, b| (a.0 + b.0, a.1 + b.1))
}

fn states(core: &Gateway, now: Time) -> [(&'static str, usize); 4] {
    let count = |of: &dyn Fn(&Endpoint) -> bool| core.endpoints().iter().filter(|e| of(e)).count();
    [
        ("available", count(&|e| e.is_available() && !e.outlier.is_ejected(now))),
        ("ejected", count(&|e| e.is_member() && e.outlier.is_ejected(now))),
        ("unavailable", count(&|e| e.is_member() && !e.is_available() && !e.outlier.is_ejected(now))),
        ("draining", count(&|e| e.presence == Presence::Draining)),
    ]
}

/// A name as the value of a label.
fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
