//! Sends the traces of a finished run to an OTLP endpoint, unchanged but for one shift of all times and a salt on trace ids.

use shared::clock::RunClock;
use shared::ids::TraceId;
use shared::rng::mix64;
use shared::time::{Anchor, Time};
use shared::trace::config::OtlpConfig;
use shared::trace::exporter::otlp;
use shared::trace::langfuse::{COMPLETION_START, shifted};
use shared::trace::stats::ExporterStats;
use shared::trace::{TelemetryError, TraceSet};

/// What to change on the way.
#[derive(Clone, Debug, Default)]
pub struct SendOptions {
    /// Shift all times so that the last span ends now.
    pub end_now: bool,
    /// Salt of the trace ids; unchanged if absent.
    pub run_id: Option<String>,
}

/// Sends `set` to `endpoint`, waiting for it rather than dropping.
///
/// # Errors
/// If the exporter cannot be built. What the receiver refuses is in the counts.
pub fn send(mut set: TraceSet, endpoint: &OtlpConfig, options: &SendOptions) -> Result<ExporterStats, TelemetryError> {
    let last = set.spans.iter().map(|s| s.end).max().unwrap_or(Time::ZERO);
    let anchor = if options.end_now { ending_now(RunClock::start(), last) } else { set.anchor };
    let before = set.anchor;
    for span in &mut set.spans {
        // A time that is a text is shifted as all others are.
        for (_, value) in span.attrs.iter_mut().filter(|(key, _)| key == COMPLETION_START) {
            if let Some(moved) = value.as_str().and_then(|moment| shifted(moment, before, anchor)) {
                *value = moved.into();
            }
        }
        span.trace_id = salted(span.trace_id, options);
        for link in &mut span.links {
            link.trace_id = salted(link.trace_id, options);
        }
    }
    otlp::send(&set, endpoint, anchor)
}

/// The anchor that puts `last` at this moment.
fn ending_now(clock: RunClock, last: Time) -> Anchor {
    let now = clock.anchor().unix_nanos(clock.now());
    Anchor::from_unix_nanos(now.saturating_sub(last.as_nanos()))
}

/// The id under which a trace is sent.
pub fn salted(id: TraceId, options: &SendOptions) -> TraceId {
    let Some(run_id) = &options.run_id else { return id };
    let salt = run_id.bytes().fold(0x1653_u64, |h, b| mix64(h ^ u64::from(b)));
    let (high, low) = ((id.get() >> 64) as u64, id.get() as u64);
    let mixed = u128::from(mix64(high ^ salt)) << 64 | u128::from(mix64(low ^ salt.rotate_left(32)));
    TraceId::new(mixed).unwrap_or(id)
}
