//! What a sidecar did. llm-d's sidecar counts nothing of its own; names follow the gateway's. Labels have a fixed, small set of values.
//!
//! The page stands at an address of its own: `/metrics` of the sidecar is the engine's, which the gateway scrapes there.

use shared::metrics::{Counter, Def, Family, Histogram, Key, Kind, Point};

use crate::pd_proxy::core::{Done, Failure, Reason};

/// Upper bounds of durations in seconds: those of `gen_ai.server.request.duration` (OpenTelemetry semantic conventions), and below them
/// what coordination takes.
const BOUNDS: &[f64] =
    &[0.0001, 0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];

const REASONS: [Reason; 7] = [
    Reason::PrefillHeader,
    Reason::NoPrefillHeader,
    Reason::NoTransferParams,
    Reason::ForbiddenTarget,
    Reason::BadTarget,
    Reason::BadBody,
    Reason::Undecided,
];
const FAILURES: [Failure; 5] =
    [Failure::Connect, Failure::Timeout, Failure::Reset, Failure::BadAnswer, Failure::Abandoned];
/// Status classes; `none` is a caller that went away before a status.
const CLASSES: [&str; 4] = ["2xx", "4xx", "5xx", "none"];

const ACTIVE: Def = Def::new(
    Kind::UpDownCounter,
    "pd_proxy.requests.active",
    "{request}",
    "Requests for inference that are not finished.",
);
const REQUESTS: Def =
    counter("pd_proxy.requests", "{request}", "Finished requests for inference by where they were prefilled.");
const RESPONSES: Def = counter("pd_proxy.responses", "{request}", "Finished requests by status class.");
const FAILED: Def = counter("pd_proxy.failures", "{request}", "Requests that failed, by what went wrong.");
const DISCONNECTED: Def = counter("pd_proxy.disconnected", "{request}", "Requests whose caller went away.");
const PREFILL_ATTEMPTS: Def = counter("pd_proxy.prefill.attempts", "{attempt}", "Calls of engines that prefill.");
const PREFILL_FAILED: Def = counter("pd_proxy.prefill.failed", "{prefill}", "Prefills that failed for good.");
const TOTAL: Def =
    Def::new(Kind::Histogram, "pd_proxy.request.duration", "s", "From a request's head to its last byte.");
const PREFILL: Def = Def::new(Kind::Histogram, "pd_proxy.prefill.duration", "s", "Prefills, all attempts and pauses.");
const DECODE: Def =
    Def::new(Kind::Histogram, "pd_proxy.decode.duration", "s", "From the end of the prefill to the last byte.");
const FIRST_BYTE: Def = Def::new(
    Kind::Histogram,
    "pd_proxy.time_to_first_token",
    "s",
    "From a request's head to the first byte passed on.",
);
const COORDINATION: Def =
    Def::new(Kind::Histogram, "pd_proxy.coordination.duration", "s", "Up to the decode, without calls of the prefill.");

const REASON: Key = Key::called("pd_proxy.reason", "reason");
const STATUS: Key = Key::called("pd_proxy.response.status_class", "status");
const ERROR: Key = Key::of("error.type");

const fn counter(name: &'static str, unit: &'static str, brief: &'static str) -> Def {
    Def::new(Kind::Counter, name, unit, brief)
}

/// Counts since the start.
#[derive(Debug)]
pub(super) struct Metrics {
    begun: Counter,
    reasons: [Counter; REASONS.len()],
    classes: [Counter; CLASSES.len()],
    failures: [Counter; FAILURES.len()],
    disconnected: Counter,
    prefill_attempts: Counter,
    prefill_failed: Counter,
    total: Histogram,
    prefill: Histogram,
    decode: Histogram,
    first_byte: Histogram,
    coordination: Histogram,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let seconds = || Histogram::seconds(BOUNDS);
        Metrics {
            begun: Counter::default(),
            reasons: Default::default(),
            classes: Default::default(),
            failures: Default::default(),
            disconnected: Counter::default(),
            prefill_attempts: Counter::default(),
            prefill_failed: Counter::default(),
            total: seconds(),
            prefill: seconds(),
            decode: seconds(),
            first_byte: seconds(),
            coordination: seconds(),
        }
    }
}

impl Metrics {
    /// A request came.
    pub(super) fn begun(&self) {
        self.begun.one();
    }

    /// A request ended.
    pub(super) fn done(&self, done: &Done) {
        let Done { reason, prefill_attempts, prefill_failed, status, failure, times } = done;
        if let Some(i) = REASONS.iter().position(|r| r == reason) {
            self.reasons[i].one();
        }
        let class = match status {
            Some(200..400) => 0,
            Some(400..500) => 1,
            Some(_) => 2,
            None => 3,
        };
        self.classes[class].one();
        if let Some(i) = FAILURES.iter().position(|f| Some(f) == failure.as_ref()) {
            self.failures[i].one();
        }
        self.disconnected.add(u64::from(*failure == Some(Failure::Cancelled)));
        self.prefill_attempts.add(u64::from(*prefill_attempts));
        self.prefill_failed.add(u64::from(*prefill_failed));
        self.total.record(times.total, None);
        let parts = [
            (times.prefill, &self.prefill),
            (times.decode, &self.decode),
            (times.first_byte, &self.first_byte),
            (times.coordination, &self.coordination),
        ];
        for (time, durations) in parts {
            time.into_iter().for_each(|t| durations.record(t, None));
        }
    }

    /// All of it at this moment.
    pub(super) fn families(&self) -> Vec<Family> {
        let ended: u64 = self.reasons.iter().map(Counter::get).sum();
        let reasons = REASONS.iter().map(|r| r.as_str()).zip(&self.reasons);
        let classes = CLASSES.into_iter().zip(&self.classes);
        let failures = FAILURES.iter().filter_map(|f| f.error()).map(|(kind, _)| kind).zip(&self.failures);
        vec![
            ACTIVE.alone(self.begun.get().saturating_sub(ended)),
            REQUESTS.family(reasons.map(|(reason, n)| Point::with(REASON, reason, n.get())).collect()),
            RESPONSES.family(classes.map(|(class, n)| Point::with(STATUS, class, n.get())).collect()),
            FAILED.family(failures.map(|(kind, n)| Point::with(ERROR, kind, n.get())).collect()),
            DISCONNECTED.alone(self.disconnected.get()),
            PREFILL_ATTEMPTS.alone(self.prefill_attempts.get()),
            PREFILL_FAILED.alone(self.prefill_failed.get()),
            TOTAL.alone(self.total.read()),
            PREFILL.alone(self.prefill.read()),
            DECODE.alone(self.decode.read()),
            FIRST_BYTE.alone(self.first_byte.read()),
            COORDINATION.alone(self.coordination.read()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use shared::metrics::text::Format;
    use shared::time::{Anchor, Dur};

    use super::*;
    use crate::pd_proxy::core::Times;

    #[test]
    fn the_text_counts_what_happened() {
        let metrics = Metrics::default();
        (0..4).for_each(|_| metrics.begun());
        let ms = Dur::from_millis;
        let times = Times {
            total: ms(300),
            prefill: Some(ms(50)),
            decode: Some(ms(240)),
            first_byte: Some(ms(60)),
            coordination: Some(ms(1)),
        };
        let done = Done {
            reason: Reason::PrefillHeader,
            prefill_attempts: 2,
            prefill_failed: false,
            status: Some(200),
            failure: None,
            times,
        };
        metrics.done(&done);
        let failed = Failure::Connect;
        metrics.done(&Done { prefill_failed: true, status: Some(502), failure: Some(failed), ..done });
        let gone = Failure::Cancelled;
        metrics.done(&Done {
            reason: Reason::Undecided,
            status: None,
            failure: Some(gone),
            prefill_attempts: 0,
            ..done
        });
        let text = Format::Prometheus.write(&metrics.families(), Anchor::VIRTUAL);
        for expect in [
            "pd_proxy_requests_active 1",
            "pd_proxy_requests_total{reason=\"prefill_header\"} 2",
            "pd_proxy_requests_total{reason=\"undecided\"} 1",
            "pd_proxy_responses_total{status=\"5xx\"} 1",
            "pd_proxy_responses_total{status=\"none\"} 1",
            "pd_proxy_failures_total{error_type=\"connection_failed\"} 1",
            "pd_proxy_failures_total{error_type=\"timeout\"} 0",
            "pd_proxy_disconnected_total 1",
            "pd_proxy_prefill_attempts_total 4",
            "pd_proxy_prefill_failed_total 1",
            "pd_proxy_time_to_first_token_seconds_bucket{le=\"0.04\"} 0",
            "pd_proxy_time_to_first_token_seconds_bucket{le=\"0.08\"} 3",
            "pd_proxy_request_duration_seconds_sum 0.9",
            "pd_proxy_coordination_duration_seconds_count 3",
        ] {
            assert!(text.lines().any(|l| l == expect), "{expect} is not in\n{text}");
        }
    }
}
