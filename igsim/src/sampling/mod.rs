//! What sampling strategies keep of one and the same run, and what they miss.
//!
//! The scenario runs once in virtual time with everything recorded; then every strategy is asked, with the code that decides in a
//! gateway, what it would have kept.

mod gather;
mod size;
mod strategies;
mod table;

use serde::Serialize;
use shared::ids::TraceId;
use shared::time::Time;
use shared::trace::TelemetryError;
use shared::trace::policy::Outcome;

use crate::replay::ReplayError;
use crate::scenario::Scenario;

pub use strategies::Strategy;
pub use table::table;

/// A comparison that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// The recorded trace that the scenario replays cannot be read.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// Telemetry cannot start.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

/// A request of the run and its whole trace.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its trace.
    pub trace_id: TraceId,
    /// When it came to the gateway.
    pub at: Time,
    /// Index of its tenant.
    pub tenant: u16,
    /// What became of it, as the gateway saw it.
    pub outcome: Outcome,
    /// Whether the client got no answer, or not all of it.
    pub failed: bool,
    /// Spans of its trace, and their size as OTLP protobuf in bytes.
    pub spans: u64,
    /// Size of the spans.
    pub bytes: u64,
}

/// Strategies beside each other.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Name of the scenario.
    pub scenario: String,
    /// The seed.
    pub seed: u64,
    /// Requests of the run.
    pub requests: u64,
    /// Requests that are worth looking at, by why.
    pub interesting: Interesting,
    /// Requests that took longer than this are slow: the 99th percentile of the gateway's time with a request, in milliseconds.
    pub slow_ms: f64,
    /// Requests with more tokens than this are expensive: the 99th percentile of prompt and answer.
    pub expensive_tokens: u64,
    /// What each strategy keeps.
    pub strategies: Vec<Kept>,
}

/// Counts of requests that are worth looking at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Interesting {
    /// Failed, as their clients saw them.
    pub failed: u64,
    /// Slow.
    pub slow: u64,
    /// Expensive.
    pub expensive: u64,
    /// Preempted or retried.
    pub disturbed: u64,
}

/// What a strategy keeps of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kept {
    /// The strategy.
    pub strategy: String,
    /// Requests whose services record them: those of a strategy that judges at the end are all of them.
    pub recorded: u64,
    /// Traces kept.
    pub traces: u64,
    /// Of the requests that are worth looking at, those whose traces are kept.
    pub interesting: Interesting,
    /// Spans kept.
    pub spans: u64,
    /// Their size as OTLP protobuf, in bytes.
    pub bytes: u64,
}

/// Runs `scenario` once in virtual time and asks every strategy.
///
/// # Errors
/// If a recorded trace cannot be read.
pub fn compare(scenario: &Scenario) -> Result<Compared, SamplingError> {
    let seen = gather::gather(scenario)?;
    Ok(strategies::ask(scenario, &seen))
}
