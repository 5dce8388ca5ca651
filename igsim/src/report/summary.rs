//! Adds up the rows of a run into its report.

use std::collections::BTreeMap;
use std::sync::Arc;

use shared::time::{Dur, Time};

use super::expect::{Bound, evaluate};
use super::figures::{
    EndpointFigures, EngineFigures, GatewayFigures, Pacing, Report, Routing, Throughput, Tokens, TraceFigures,
};
use super::rows::{Failure, Outcome, RequestRow};
use super::tenants::Tallies;
use crate::stats::{Distribution, Unit, binomial_99, rounded};

/// The figures of a run while it goes on: bounded memory, however many requests.
#[derive(Debug, Default)]
pub struct Summary {
    sent: u64,
    ok: u64,
    errors: BTreeMap<Failure, u64>,
    dropped: BTreeMap<Arc<str>, u64>,
    tenants: Tallies,
    endpoints: BTreeMap<Arc<str>, u64>,
    retries: u64,
    tokens: Tokens,
    answered_prompt: u64,
    answered_cached: u64,
    answered_output: u64,
    ttft: Distribution,
    per_token: Distribution,
    gaps: Distribution,
    e2e: Distribution,
    added: Distribution,
    lateness: Distribution,
    traces_named: u64,
    end: Time,
}

/// What a driver knows at the end of a run and no row says.
#[derive(Clone, Debug, Default)]
pub struct RunFacts {
    /// Versions by name.
    pub versions: BTreeMap<String, String>,
    /// Name of the scenario.
    pub scenario: String,
    /// `live` or `virtual`.
    pub mode: String,
    /// The seed.
    pub seed: u64,
    /// Address of the gateway, if it ran already.
    pub gateway: Option<String>,
    /// Whether the run was stopped before its plan was done.
    pub interrupted: bool,
    /// Every tenant's name and priority, in order.
    pub tenants: Vec<(String, i32)>,
    /// Every engine's name, in order: one that got nothing is shown as such.
    pub endpoints: Vec<String>,
    /// Whether lateness says something about this machine: live runs only.
    pub paced: bool,
    /// What the engines report.
    pub engines: EngineFigures,
    /// Further attempts of the gateway, as it counts them itself: a client does not see them.
    pub retries: u64,
    /// What became of the traces; the expected interval is filled in here.
    pub traces: TraceFigures,
    /// The scenario's expectations by path.
    pub expectations: BTreeMap<String, Bound>,
}

impl Summary {
    /// Nothing yet.
    pub fn new() -> Summary {
        Summary::default()
    }

    /// Adds a request that ended, or that was open when the run ended.
    pub fn add(&mut self, row: &RequestRow) {
        self.sent += 1;
        self.tokens.prompt += u64::from(row.prompt_tokens);
        self.tokens.cached += u64::from(row.cached_tokens);
        self.tokens.output += u64::from(row.output_tokens);
        self.traces_named += u64::from(row.sampled);
        self.retries += u64::from(row.attempts.saturating_sub(1));
        self.end = self.end.max(row.done.unwrap_or(row.sent));
        self.lateness.record(row.lateness());
        if let Some(endpoint) = &row.endpoint {
            *self.endpoints.entry(endpoint.clone()).or_default() += 1;
        }
        if let Some(reason) = &row.dropped {
            *self.dropped.entry(Arc::clone(reason)).or_default() += 1;
        }
        self.tenants.add(row);
        if let Some(added) = row.added {
            self.added.record(added);
        }
        match row.outcome {
            Outcome::Ok => self.answered(row),
            Outcome::Failed(failure) => *self.errors.entry(failure).or_default() += 1,
        }
    }

    /// Adds a gap between two tokens as the client saw it.
    pub fn gap(&mut self, gap: Dur) {
        self.gaps.record(gap);
    }

    /// Requests added so far, and how many of them failed.
    pub fn progress(&self) -> (u64, u64) {
        (self.sent, self.sent - self.ok)
    }

    /// Median time to first token so far, in milliseconds.
    pub fn ttft_p50_ms(&self) -> f64 {
        self.ttft.summary(Unit::Millis).p50
    }

    fn answered(&mut self, row: &RequestRow) {
        self.ok += 1;
        self.answered_prompt += u64::from(row.prompt_tokens);
        self.answered_cached += u64::from(row.cached_tokens);
        self.answered_output += u64::from(row.output_tokens);
        for (value, distribution) in
            [(row.ttft(), &mut self.ttft), (row.per_token(), &mut self.per_token), (row.e2e(), &mut self.e2e)]
        {
            if let Some(value) = value {
                distribution.record(value);
            }
        }
    }

    /// The report, with expectations judged.
    pub fn finish(self, facts: RunFacts) -> Report {
        let seconds = self.end.as_secs_f64();
        let rate = |n: u64| if seconds > 0.0 { rounded(n as f64 / seconds) } else { 0.0 };
        let traces = &facts.traces;
        let by_ratio = binomial_99(traces.decided, traces.ratio);
        let (expected_low, expected_high) = if traces.by_policy { (0, traces.decided) } else { by_ratio };
        let mut report = Report {
            duration_s: rounded(seconds),
            sent: self.sent,
            ok: self.ok,
            errors: self.sent - self.ok,
            errors_by_kind: self.errors.iter().map(|(kind, &n)| (kind.to_string(), n)).collect(),
            dropped_by_reason: self.dropped.iter().map(|(reason, &n)| (reason.to_string(), n)).collect(),
            tenants: self.tenants.figures(&facts.tenants),
            throughput: Throughput {
                requests_per_s: rate(self.ok),
                prompt_tokens_per_s: rate(self.answered_prompt),
                output_tokens_per_s: rate(self.answered_output),
            },
            ttft_ms: self.ttft.summary(Unit::Millis),
            per_token_ms: self.per_token.summary(Unit::Millis),
            inter_token_ms: self.gaps.summary(Unit::Millis),
            e2e_ms: self.e2e.summary(Unit::Millis),
            gateway_added_us: self.added.summary(Unit::Micros),
            routing: self.routing(&facts.endpoints, facts.retries),
            pacing: Pacing { lateness_ms: self.lateness.summary(Unit::Millis) },
            invalid: invalid(&facts, &self.lateness),
            tokens: self.tokens,
            versions: facts.versions,
            scenario: facts.scenario,
            mode: facts.mode,
            seed: facts.seed,
            gateway: facts.gateway.map(|url| GatewayFigures { url, traces_named: self.traces_named }),
            interrupted: facts.interrupted,
            engines: facts.engines,
            traces: TraceFigures { expected_low, expected_high, ..facts.traces },
            expectations: Vec::new(),
        };
        report.expectations = evaluate(&report, facts.expectations.iter().map(|(p, &b)| (p.as_str(), b)));
        report
    }

    fn routing(&self, names: &[String], retries: u64) -> Routing {
        let reached: u64 = self.endpoints.values().sum();
        let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { rounded(part as f64 / whole as f64) };
        let endpoint = |(name, &requests): (&Arc<str>, &u64)| EndpointFigures {
            name: name.to_string(),
            requests,
            share: ratio(requests, reached),
        };
        let mut counts: Vec<(Arc<str>, u64)> = names
            .iter()
            .map(|n| (Arc::from(n.as_str()), self.endpoints.get(n.as_str()).copied().unwrap_or(0)))
            .collect();
        let others = self.endpoints.iter().filter(|(name, _)| !names.iter().any(|n| **n == ***name));
        counts.extend(others.map(|(name, n)| (Arc::clone(name), *n)));
        Routing {
            prefix_hit_ratio: ratio(self.answered_cached, self.answered_prompt),
            retries: self.retries.max(retries),
            endpoints: counts.iter().map(|(name, n)| endpoint((name, n))).collect(),
        }
    }
}

/// A client that is this late on 1 % of its requests did not offer the load of the scenario.
const LATE: Dur = Dur::from_millis(20);

fn invalid(facts: &RunFacts, lateness: &Distribution) -> Vec<String> {
    let mut reasons = Vec::new();
    if facts.engines.fell_behind {
        let share = 100.0 * facts.engines.late_step_share;
        reasons.push(format!("engine fell behind: {share:.1} % of steps ended more than 20 ms late"));
    }
    let p99 = lateness.summary(Unit::Millis).p99;
    if facts.paced && p99 > LATE.as_millis_f64() {
        reasons.push(format!("client fell behind: 1 % of requests were sent more than {p99:.0} ms late"));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::row;
    use super::*;

    #[test]
    fn failed_requests_count_as_errors_and_not_in_latencies() {
        let mut summary = Summary::new();
        summary.add(&row(0));
        for failure in [Failure::Status(429), Failure::Timeout, Failure::Status(429)] {
            summary.add(&RequestRow { outcome: Outcome::Failed(failure), attempts: 2, ..row(1) });
        }
        let report = summary.finish(RunFacts::default());
        assert_eq!((report.sent, report.ok, report.errors), (4, 1, 3));
        assert_eq!((report.ttft_ms.count, report.e2e_ms.count, report.routing.retries), (1, 1, 3));
        let kinds: Vec<(&str, u64)> = report.errors_by_kind.iter().map(|(k, &n)| (k.as_str(), n)).collect();
        assert_eq!(kinds, [("http_429", 2), ("timeout", 1)]);
        assert_eq!(report.per_token_ms.mean, 8.0);
    }

    #[test]
    fn an_empty_run_divides_by_nothing() {
        let report = Summary::new().finish(RunFacts::default());
        assert_eq!((report.throughput.requests_per_s, report.routing.prefix_hit_ratio), (0.0, 0.0));
        assert!(!serde_json::to_string(&report).unwrap().contains("null"));
    }

    #[test]
    fn a_run_that_fell_behind_says_so() {
        let mut summary = Summary::new();
        summary.add(&RequestRow { intended: Time::ZERO, sent: Time::from_nanos(50_000_000), ..row(0) });
        let engines = EngineFigures { late_step_share: 0.031, fell_behind: true, ..EngineFigures::default() };
        let report = summary.finish(RunFacts { paced: true, engines, ..RunFacts::default() });
        insta::assert_snapshot!(report.invalid.join("\n"), @r"
        engine fell behind: 3.1 % of steps ended more than 20 ms late
        client fell behind: 1 % of requests were sent more than 50 ms late
        ");
    }
}
