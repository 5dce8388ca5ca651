//! What is recorded of every endpoint at the finest detail: what was known of it, which filter took it out, what each scorer gave it.
//!
//! At lower detail a stage costs one comparison here and nothing is collected.

use std::sync::Arc;

use shared::time::{Dur, Time};
use shared::trace::Trail;

use crate::core::pool::{EndpointId, Pool};
use crate::core::scheduler::{Candidate, Run};
use crate::spans::GatewayFact;

/// The detail level that names every endpoint of every stage.
pub const EVERY_ENDPOINT: u8 = 3;
/// The most endpoints that one stage records: OpenTelemetry's default limit of events of a span.
pub const MAX_EXPLAINED: usize = 128;

/// One candidate as a profile found it.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// The endpoint's name.
    pub endpoint: Arc<str>,
    /// Requests in its queue.
    pub waiting: u32,
    /// Requests in its batch.
    pub running: u32,
    /// Used part of its KV cache, 0 to 1.
    pub kv_usage: f64,
    /// Leading blocks of the prompt that it was sent before.
    pub matched_blocks: u32,
    /// Requests sent to it and not finished.
    pub in_flight: u32,
    /// Age of its metrics; `None` if it was never scraped.
    pub metrics_age: Option<Dur>,
}

/// What a scorer gave one endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// The endpoint's name.
    pub endpoint: Arc<str>,
    /// The score, 0 to 1.
    pub raw: f64,
    /// The score times the scorer's weight.
    pub weighted: f64,
}

/// Whether `trail` records every endpoint.
pub(super) fn wanted(trail: &Trail<GatewayFact>) -> bool {
    trail.detail() >= EVERY_ENDPOINT && trail.is_recording()
}

/// Notes what is known of the candidates of a profile that starts at `at`.
pub(super) fn candidates(at: Time, candidates: &[Candidate], run: &Run<'_>) {
    let known = candidates.iter().take(MAX_EXPLAINED).map(|c| Known {
        endpoint: name(run.view.pool, c.id),
        waiting: c.waiting,
        running: c.running,
        kv_usage: c.kv_usage,
        matched_blocks: c.matched_blocks,
        in_flight: c.in_flight,
        metrics_age: run.view.pool.get(c.id).metrics_age(run.now),
    });
    run.trail.note(at, || GatewayFact::Known(known.collect()));
}

/// The candidates before a filter, to be compared with those after it.
pub(super) fn before(candidates: &[Candidate]) -> Vec<EndpointId> {
    candidates.iter().map(|c| c.id).collect()
}

/// Notes which of the candidates `before` a filter it took out.
pub(super) fn removed(at: Time, before: &[EndpointId], after: &[Candidate], run: &Run<'_>) {
    let mut left = after.iter().map(|c| c.id).peekable();
    // Filters keep the order.
    let gone = before.iter().filter(|id| left.next_if_eq(id).is_none());
    let names = gone.take(MAX_EXPLAINED).map(|id| name(run.view.pool, *id));
    run.trail.note(at, || GatewayFact::Removed(names.collect()));
}

/// Notes what a scorer of this weight gave the candidates.
pub(super) fn scores(at: Time, candidates: &[Candidate], scores: &[f64], weight: f64, run: &Run<'_>) {
    let given = candidates.iter().zip(scores).take(MAX_EXPLAINED);
    let given = given.map(|(c, raw)| Given { endpoint: name(run.view.pool, c.id), raw: *raw, weighted: raw * weight });
    run.trail.note(at, || GatewayFact::Given(given.collect()));
}

fn name(pool: &Pool, id: EndpointId) -> Arc<str> {
    Arc::clone(&pool.get(id).config.name)
}
