//! What the pools look like. Several pools have a label each: their number is bounded by the configuration.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use shared::metrics::{Def, Family, Key, Kind, Label, Point};
use shared::time::Time;

use crate::core::gateway::Gateway;
use crate::core::pool::{Endpoint, Presence};
use crate::server::pool::Pool;

const ENDPOINTS: Def =
    Def::new(Kind::UpDownCounter, "gateway.endpoints", "{endpoint}", "Endpoints of the pool by state.");
const EJECTIONS: Def = Def::new(
    Kind::Counter,
    "gateway.ejections",
    "{endpoint}",
    "Endpoints left out for failing several times in a row.",
);
const HEDGES: Def =
    Def::new(Kind::Counter, "gateway.hedges", "{attempt}", "Second attempts beside one that had not answered.");
const RETRIES_REFUSED: Def =
    Def::new(Kind::Counter, "gateway.retries.refused", "{attempt}", "Attempts not made: the retry budget was spent.");
const POOL_REQUESTS: Def =
    Def::new(Kind::Counter, "gateway.pool.requests", "{request}", "Requests by the pool that they went to.");

const POOL: Key = Key::called("gateway.pool.name", "pool");
const STATE: Key = Key::called("gateway.endpoint.state", "state");

/// A metric with a value for each pool.
type OfPool = (Def, fn(&Pool) -> u64);

const COUNTERS: [OfPool; 3] = [
    (EJECTIONS, |p| p.core().ejections()),
    (HEDGES, |p| p.core().hedges()),
    (RETRIES_REFUSED, |p| p.core().retries_refused()),
];
/// What only tells pools apart.
const OF_SEVERAL: OfPool = (POOL_REQUESTS, |p| p.requests.load(Ordering::Relaxed));

/// All of it; `split` says whether there are several pools.
pub(crate) fn families(pools: &[Arc<Pool>], split: bool, now: Time) -> Vec<Family> {
    let label = |pool: &Pool| -> Option<Label> { split.then(|| (POOL, pool.config.pool.name.clone().into())) };
    let mut endpoints = Vec::new();
    for pool in pools {
        endpoints.extend(states(&pool.core(), now).map(|(state, n)| {
            let labels: Vec<Label> = label(pool).into_iter().chain([(STATE, state.into())]).collect();
            Point { labels, value: n.into() }
        }));
    }
    let mut all = vec![ENDPOINTS.family(endpoints)];
    for (def, value) in COUNTERS.into_iter().chain(split.then_some(OF_SEVERAL)) {
        let point = |pool: &Arc<Pool>| Point { labels: label(pool).into_iter().collect(), value: value(pool).into() };
        all.push(def.family(pools.iter().map(point).collect()));
    }
    all
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
