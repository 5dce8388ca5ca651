//! Sends the traces of a finished run to an OTLP endpoint, unchanged but for one shift of all times and a salt on trace ids.

use std::collections::BTreeMap;

use shared::clock::RunClock;
use shared::ids::TraceId;
use shared::rng::mix64;
use shared::time::{Anchor, Dur, Time};
use shared::trace::context::TraceContext;
use shared::trace::{Fact, Record, Span, Started, Stats, Telemetry, TelemetryConfig, TelemetryError, TraceSet};

/// Spans between two waits for the receiver, so that no queue on the way fills up.
const SPANS_AT_ONCE: usize = 4_000;
/// How long the receiver may take for those.
const PATIENCE: Dur = Dur::from_secs(60);

/// What to change on the way.
#[derive(Clone, Debug, Default)]
pub struct SendOptions {
    /// Shift all times so that the last span ends now.
    pub end_now: bool,
    /// Salt of the trace ids; unchanged if absent.
    pub run_id: Option<String>,
}

/// A finished trace on its way out.
struct Ready(Vec<Span>);

impl Fact for Ready {
    fn fold(record: &Record<Ready>, out: &mut Vec<Span>) {
        out.extend(record.facts.iter().flat_map(|(_, Ready(spans))| spans.iter().cloned()));
    }
}

/// Sends `set` through the exporters of `config`.
///
/// # Errors
/// If an exporter cannot be built. What the receiver refuses is in the counts.
pub fn send(set: TraceSet, config: TelemetryConfig, options: &SendOptions) -> Result<Stats, TelemetryError> {
    let clock = RunClock::start();
    let last = set.spans.iter().map(|s| s.end).max().unwrap_or(Time::ZERO);
    let anchor = if options.end_now { ending_now(clock, last) } else { set.anchor };
    let telemetry = Telemetry::live(config, clock.anchored(anchor))?;
    let tracers: Vec<_> = set.resources.iter().map(|r| telemetry.tracer(r.clone())).collect();
    let mut traces: BTreeMap<TraceId, Vec<Span>> = BTreeMap::new();
    for mut span in set.spans {
        span.trace_id = salted(span.trace_id, options);
        for link in &mut span.links {
            link.trace_id = salted(link.trace_id, options);
        }
        if let Some(tracer) = tracers.get(usize::from(span.instance.0)) {
            span.instance = tracer.instance();
        }
        traces.entry(span.trace_id).or_default().push(span);
    }
    let mut waiting = 0;
    for (trace_id, spans) in traces {
        let (Some(tracer), Some(first)) = (tracers.first(), spans.first()) else { continue };
        waiting += spans.len();
        let context = TraceContext { trace_id, span_id: first.span_id, sampled: true, random: false, tracestate: None };
        let now = clock.now();
        let trail = tracer.open::<Ready>(&Started { context, parent: None }, now);
        trail.note(now, || Ready(spans));
        trail.finish(now);
        if waiting >= SPANS_AT_ONCE {
            telemetry.flush(PATIENCE);
            waiting = 0;
        }
    }
    telemetry.flush(PATIENCE);
    Ok(telemetry.shutdown(clock.now()))
}

/// The anchor that puts `last` at this moment.
fn ending_now(clock: RunClock, last: Time) -> Anchor {
    let now = clock.anchor().unix_nanos(clock.now());
    Anchor::from_unix_nanos(now.saturating_sub(last.as_nanos()))
}

fn salted(id: TraceId, options: &SendOptions) -> TraceId {
    let Some(run_id) = &options.run_id else { return id };
    let salt = run_id.bytes().fold(0x1653_u64, |h, b| mix64(h ^ u64::from(b)));
    let (high, low) = ((id.get() >> 64) as u64, id.get() as u64);
    let mixed = u128::from(mix64(high ^ salt)) << 64 | u128::from(mix64(low ^ salt.rotate_left(32)));
    TraceId::new(mixed).unwrap_or(id)
}
