//! One virtual run with everything recorded, added up trace by trace as it goes: spans are counted and weighed, not kept.

use std::collections::HashMap;

use shared::ids::TraceId;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::policy::Outcome;
use shared::trace::{Ratio, SamplerKind, Span, Telemetry, TelemetryConfig};

use super::size::Scale;
use super::{SamplingError, Seen};
use crate::report::{Failure, Outcome as Ended, RequestRow};
use crate::scenario::Scenario;
use crate::virtual_time::{self, Observer};
use crate::workload::Plan;

/// Requests between two looks at the spans that came.
const LOOK_EVERY: u64 = 64;

struct Gathering {
    spans: MemorySpans,
    scale: Scale,
    /// By trace; never iterated, so that its order shows nowhere.
    traces: HashMap<TraceId, Tally>,
    ended: Vec<RequestRow>,
}

/// What is known of a trace.
#[derive(Default)]
struct Tally {
    spans: u64,
    bytes: u64,
    at: Time,
    took: Dur,
    error: bool,
    preempted: bool,
}

/// The requests of a run of `scenario`, in the order in which they came to the gateway.
pub(super) fn gather(scenario: &Scenario) -> Result<Vec<Seen>, SamplingError> {
    let (seed, spans) = (Seed(scenario.seed), MemorySpans::default());
    let config = TelemetryConfig {
        sampler: SamplerKind::AlwaysOn.with(Ratio::ALL),
        detail: scenario.tracing.detail.unwrap_or(2),
        exporters: vec![ExporterConfig::Memory(spans.clone())],
        ..TelemetryConfig::default()
    };
    let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, seed)?;
    let plan = Plan::new(scenario, seed)?;
    let mut gathering = Gathering { spans, scale: Scale::new(), traces: HashMap::new(), ended: Vec::new() };
    let ended = virtual_time::run(scenario, plan, seed, &telemetry, &mut gathering)?;
    telemetry.shutdown(ended.at);
    gathering.look();
    Ok(gathering.seen())
}

impl Observer for Gathering {
    fn request(&mut self, row: &RequestRow, _: &[Dur]) {
        self.ended.push(row.clone());
        if (self.ended.len() as u64).is_multiple_of(LOOK_EVERY) {
            self.look();
        }
    }

    fn go_on(&mut self, _: Time) -> bool {
        true
    }
}

impl Gathering {
    /// Takes in the spans that came.
    fn look(&mut self) {
        let set = self.spans.take();
        for part in set.spans.chunk_by(|a, b| (a.trace_id, a.instance) == (b.trace_id, b.instance)) {
            let tally = self.traces.entry(part[0].trace_id).or_default();
            tally.bytes += self.scale.weigh(part);
            tally.spans += part.len() as u64;
            part.iter().for_each(|span| tally.learn(span));
        }
    }

    fn seen(mut self) -> Vec<Seen> {
        let traces = &mut self.traces;
        let seen = self.ended.iter().filter_map(|row| {
            let trace_id = row.trace_id?;
            let Tally { spans, bytes, at, took, error, preempted } = traces.remove(&trace_id)?;
            let tokens = u64::from(row.prompt_tokens) + u64::from(row.output_tokens);
            // An error event in a stream is in no span of the gateway, which passes it on.
            let error = error || row.outcome == Ended::Failed(Failure::Protocol);
            let outcome = Outcome { error, took, tokens, preempted, retried: row.attempts > 1 };
            let failed = row.outcome != Ended::Ok;
            Some(Seen { trace_id, at, tenant: row.tenant, outcome, failed, spans, bytes })
        });
        let mut seen: Vec<Seen> = seen.collect();
        seen.sort_by_key(|s| (s.at, s.trace_id.get()));
        seen
    }
}

impl Tally {
    /// What the gateway's and the engines' outermost spans say of the request.
    fn learn(&mut self, span: &Span) {
        let int = |key: &str| span.get(key).and_then(|v| v.as_int());
        match &*span.name {
            "gateway.request" => {
                let status = int("http.response.status_code").and_then(|s| u16::try_from(s).ok());
                (self.at, self.took) = (span.start, span.end.since(span.start));
                self.error |= status.is_some_and(Outcome::is_failure) || span.get("error.type").is_some();
            }
            "vllm.engine.request" => {
                self.preempted |= int("vllm.request.preemptions").is_some_and(|n| n > 0);
            }
            _ => {}
        }
    }
}
