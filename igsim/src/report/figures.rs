//! `report.json`: the figures of a run as data. Field names carry their units.

use std::collections::BTreeMap;

use engine_sim::core::faults::{FaultCounts, FaultKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::expect::Verdict;
use super::pd::PdFigures;
use super::tenants::TenantFigures;
use crate::stats::Quantiles;

/// The report of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Report {
    /// Versions of the program and of what it imitates, by name.
    pub versions: BTreeMap<String, String>,
    /// Name of the scenario.
    pub scenario: String,
    /// `live` or `virtual`.
    pub mode: String,
    /// The seed.
    pub seed: u64,
    /// The gateway, where it ran already and only requests were sent. Then nobody knows `engines`, `gateway_added_us`, `routing.retries` and
    /// `traces`, and the report as it is written does not have them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<GatewayFigures>,
    /// From the start of the run to the end of the last request, in seconds.
    pub duration_s: f64,
    /// Whether the run was stopped before its plan was done.
    pub interrupted: bool,
    /// Why latency figures of this run must not be used; empty when they may.
    pub invalid: Vec<String>,
    /// Requests sent.
    pub sent: u64,
    /// Requests answered in full.
    pub ok: u64,
    /// Requests that were not.
    pub errors: u64,
    /// Errors by kind: `http_429`, `connect`, `timeout`, `disconnected`, `protocol`, `cancelled`, `unfinished`.
    pub errors_by_kind: BTreeMap<String, u64>,
    /// Of these errors, requests that the gateway refused, by llm-d's reason: `rejected-saturated` (shed, or no room in the queue),
    /// `rejected-ttl-expired`, `rejected-no-endpoints`, `rejected-shutting-down`.
    #[serde(default)]
    pub dropped_by_reason: BTreeMap<String, u64>,
    /// Each of the scenario's tenants, by name.
    #[serde(default)]
    pub tenants: BTreeMap<String, TenantFigures>,
    /// Throughput.
    pub throughput: Throughput,
    /// Tokens.
    pub tokens: Tokens,
    /// Time to first token, from sending, in milliseconds.
    pub ttft_ms: Quantiles,
    /// Mean time per output token after the first, one value per request, in milliseconds.
    pub per_token_ms: Quantiles,
    /// Gaps between tokens as the client saw them, one value per gap, in milliseconds; no values when nobody measured them.
    pub inter_token_ms: Quantiles,
    /// Time from sending to the last byte, in milliseconds.
    pub e2e_ms: Quantiles,
    /// Latency added by the gateway, in microseconds.
    pub gateway_added_us: Quantiles,
    /// How requests were spread over engines.
    pub routing: Routing,
    /// What the engines report of themselves.
    pub engines: EngineFigures,
    /// How well the client kept to its plan.
    pub pacing: Pacing,
    /// What became of the traces.
    pub traces: TraceFigures,
    /// The scenario's expectations, judged.
    pub expectations: Vec<Verdict>,
}

/// What only whoever starts gateway and engines can know, by its path in the report.
const UNSEEN: [&str; 4] = ["engines", "gateway_added_us", "routing.retries", "traces"];

/// Whether the client alone knows the figure at `path`.
pub fn seen_by_the_client(path: &str) -> bool {
    UNSEEN.iter().all(|unseen| path.strip_prefix(unseen).is_none_or(|rest| !(rest.is_empty() || rest.starts_with('.'))))
}

impl Report {
    /// The report as it is written: without what nobody knows.
    pub fn to_json(&self) -> String {
        let text = match self.gateway {
            None => serde_json::to_string_pretty(self),
            Some(_) => serde_json::to_string_pretty(&self.known()),
        };
        format!("{}\n", text.expect("figures serialise"))
    }

    /// Its figures, without those that nobody knows.
    pub(super) fn known(&self) -> serde_json::Value {
        let mut all = serde_json::to_value(self).unwrap_or_default();
        for path in UNSEEN.iter().filter(|_| self.gateway.is_some()) {
            let (parent, key) = path.rsplit_once('.').unwrap_or(("", path));
            let parent = if parent.is_empty() { Some(&mut all) } else { all.get_mut(parent) };
            parent.and_then(serde_json::Value::as_object_mut).and_then(|figures| figures.remove(key));
        }
        all
    }
}

/// A gateway that ran already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GatewayFigures {
    /// Its address.
    pub url: String,
    /// Answers that named a trace which is kept (`traceresponse`).
    pub traces_named: u64,
}

/// Rates over the whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Throughput {
    /// Requests answered per second.
    pub requests_per_s: f64,
    /// Prompt tokens of answered requests per second.
    pub prompt_tokens_per_s: f64,
    /// Output tokens per second.
    pub output_tokens_per_s: f64,
}

/// Tokens of all requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Tokens {
    /// Prompt tokens of requests sent.
    pub prompt: u64,
    /// Prompt tokens found in a prefix cache.
    pub cached: u64,
    /// Output tokens received.
    pub output: u64,
}

/// How requests were spread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Routing {
    /// Share of prompt tokens of answered requests that was found in a prefix cache, 0 to 1.
    pub prefix_hit_ratio: f64,
    /// Attempts beyond the first.
    #[serde(default)]
    pub retries: u64,
    /// Each engine, by name.
    pub endpoints: Vec<EndpointFigures>,
}

/// One engine's part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointFigures {
    /// Name of the engine.
    pub name: String,
    /// Requests that ended there.
    pub requests: u64,
    /// Their share of all requests that reached an engine, 0 to 1.
    pub share: f64,
}

/// What the engines report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EngineFigures {
    /// Preemptions.
    pub preemptions: u64,
    /// Steps executed.
    pub steps: u64,
    /// Faults that were injected.
    #[serde(default)]
    pub faults: FaultFigures,
    /// What the routing sidecars in front of them did.
    #[serde(default)]
    pub pd: PdFigures,
    /// Live only: moments that were planned and reached: ends of steps, tokens handed over.
    pub planned_moments: u64,
    /// Live only: how late these were, median, in microseconds.
    pub late_p50_us: f64,
    /// Live only: how late these were, 99th percentile, in microseconds.
    pub late_p99_us: f64,
    /// Live only: share of steps that ended more than 20 ms after their plan, 0 to 1.
    pub late_step_share: f64,
    /// Live only: whether more than 1 % of steps were that late, so that latencies are those of this machine.
    pub fell_behind: bool,
}

/// Faults that were injected: conditions begun, requests and transfers struck.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FaultFigures {
    /// Processes that crashed.
    pub crash: u64,
    /// Engine cores that died.
    pub engine_dead: u64,
    /// Hangs.
    pub hang: u64,
    /// Times in which steps took longer.
    pub slow: u64,
    /// Times in which a metrics page did not change.
    pub metrics_stale: u64,
    /// Times in which a metrics page was an error.
    pub metrics_error: u64,
    /// Times in which a metrics page was not answered.
    pub metrics_timeout: u64,
    /// Requests answered with an error.
    pub http_error: u64,
    /// Connections to break in the middle of an answer.
    pub cut_stream: u64,
    /// Transfers of KV blocks that failed.
    pub kv_transfer: u64,
    /// Requests that were open in an engine when it went down.
    pub requests_lost: u64,
}

impl FaultFigures {
    /// What engines counted, added up.
    pub fn of(engines: impl Iterator<Item = FaultCounts>) -> FaultFigures {
        let mut all = FaultCounts::default();
        engines.for_each(|counts| all.add(&counts));
        FaultFigures {
            crash: all.of(FaultKind::Crash),
            engine_dead: all.of(FaultKind::EngineDead),
            hang: all.of(FaultKind::Hang),
            slow: all.of(FaultKind::Slow),
            metrics_stale: all.of(FaultKind::MetricsStale),
            metrics_error: all.of(FaultKind::MetricsError),
            metrics_timeout: all.of(FaultKind::MetricsTimeout),
            http_error: all.of(FaultKind::HttpError),
            cut_stream: all.of(FaultKind::CutStream),
            kv_transfer: all.of(FaultKind::KvTransfer),
            requests_lost: all.requests_lost,
        }
    }

    /// Every figure that is not 0, with its name, in their order.
    pub(super) fn told(&self) -> Vec<(String, u64)> {
        let all = serde_json::to_value(self).unwrap_or_default();
        let figure = |(name, value): (&String, &serde_json::Value)| Some((name.clone(), value.as_u64()?));
        let told = all.as_object().into_iter().flatten().filter_map(figure);
        told.filter(|(_, n)| *n > 0).collect()
    }
}

/// How well the client kept to its plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Pacing {
    /// How much later than planned requests were sent, in milliseconds.
    pub lateness_ms: Quantiles,
}

/// What became of the traces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TraceFigures {
    /// Sampling ratio of the client's edge, 0 to 1.
    pub ratio: f64,
    /// Requests that a sampler decided on.
    pub decided: u64,
    /// Traces kept.
    pub kept: u64,
    /// Least number of kept traces that is no surprise (99 % interval of the binomial distribution).
    pub expected_low: u64,
    /// Largest number of kept traces that is no surprise.
    pub expected_high: u64,
    /// Whether more than a ratio decided on them: rules, callers or a limit. Then nothing is said of how many are no surprise.
    #[serde(default)]
    pub by_policy: bool,
    /// Traces kept later, for what became of their requests: not counted above.
    #[serde(default)]
    pub kept_later: u64,
    /// Records that were held for that and not asked for: judged, out of time, or in the way of others.
    #[serde(default)]
    pub let_go: LetGo,
    /// Records folded into spans.
    pub records: u64,
    /// Records lost because the channel was full.
    pub records_dropped: u64,
    /// Records closed by deadline or shutdown.
    pub records_abandoned: u64,
    /// Trace contexts of callers that were malformed and ignored.
    pub malformed_contexts: u64,
    /// Traces of engine steps, which are no requests': not counted above.
    #[serde(default)]
    pub engine_steps: u64,
    /// Traces of the gateway's scrapes, not counted above either.
    #[serde(default)]
    pub scrapes: u64,
    /// Traces of batches of KV events, not counted above either.
    #[serde(default)]
    pub kv_events: u64,
    /// Spans made from records.
    pub spans_created: u64,
    /// Each exporter: created = exported + dropped.
    pub exporters: Vec<ExporterFigures>,
    /// Traces that were looked at after the run.
    pub checked: u64,
    /// Of those: traces without a root, or with a span whose parent is missing.
    pub incomplete: u64,
    /// Spans whose parent is missing.
    pub orphans: u64,
    /// Findings of any rule.
    pub findings: u64,
}

/// Records that were held until their edge had judged, and not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LetGo {
    /// The edge's own, which it judged.
    pub judged: u64,
    /// Those of other services, whose time was over.
    pub expired: u64,
    /// Those that gave way to newer ones: any of them may belong to a trace that was kept.
    pub evicted: u64,
}

/// One exporter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExporterFigures {
    /// Name: `file`, `otlp`, `console`.
    pub name: String,
    /// Spans handed over and acknowledged.
    pub exported: u64,
    /// Spans lost, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// The last error, for people.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
}

impl ExporterFigures {
    /// Spans lost for whatever reason.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }
}
