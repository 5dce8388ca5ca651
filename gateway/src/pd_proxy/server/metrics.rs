//! What a sidecar did, in the Prometheus text format. llm-d's sidecar has no such page; names follow the gateway's. Labels have a fixed,
//! small set of values.
//!
//! It stands at an address of its own: `/metrics` of the sidecar is the engine's, which the gateway scrapes there.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use shared::time::Dur;

use crate::pd_proxy::core::{Done, Failure, Reason};

/// Upper bounds of durations in seconds: those of `gen_ai.server.request.duration` (OpenTelemetry semantic conventions), and below them
/// what coordination takes.
const BOUNDS: [f64; 17] =
    [0.0001, 0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];

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

/// Counts since the start.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    begun: AtomicU64,
    reasons: [AtomicU64; REASONS.len()],
    classes: [AtomicU64; CLASSES.len()],
    failures: [AtomicU64; FAILURES.len()],
    disconnected: AtomicU64,
    prefill_attempts: AtomicU64,
    prefill_failed: AtomicU64,
    total: Durations,
    prefill: Durations,
    decode: Durations,
    first_byte: Durations,
    coordination: Durations,
}

impl Metrics {
    /// A request came.
    pub(super) fn begun(&self) {
        add(&self.begun, 1);
    }

    /// A request ended.
    pub(super) fn done(&self, done: &Done) {
        let Done { reason, prefill_attempts, prefill_failed, status, failure, times } = done;
        if let Some(i) = REASONS.iter().position(|r| r == reason) {
            add(&self.reasons[i], 1);
        }
        let class = match status {
            Some(200..400) => 0,
            Some(400..500) => 1,
            Some(_) => 2,
            None => 3,
        };
        add(&self.classes[class], 1);
        if let Some(i) = FAILURES.iter().position(|f| Some(f) == failure.as_ref()) {
            add(&self.failures[i], 1);
        }
        add(&self.disconnected, u64::from(*failure == Some(Failure::Cancelled)));
        add(&self.prefill_attempts, u64::from(*prefill_attempts));
        add(&self.prefill_failed, u64::from(*prefill_failed));
        self.total.record(times.total);
        let parts = [
            (times.prefill, &self.prefill),
            (times.decode, &self.decode),
            (times.first_byte, &self.first_byte),
            (times.coordination, &self.coordination),
        ];
        for (time, durations) in parts {
            time.into_iter().for_each(|t| durations.record(t));
        }
    }

    /// All of it as text.
    pub(super) fn text(&self) -> String {
        let mut out = String::with_capacity(8192);
        let ended: u64 = self.reasons.iter().map(read).sum();
        head(&mut out, "pd_proxy_requests_active", "gauge", "Requests for inference that are not finished.");
        line(&mut out, "pd_proxy_requests_active", "", read(&self.begun).saturating_sub(ended));
        let (name, help) = ("pd_proxy_requests_total", "Finished requests for inference by where they were prefilled.");
        let reasons = REASONS.iter().map(|r| r.as_str()).zip(&self.reasons);
        labelled(&mut out, name, help, "reason", reasons);
        let classes = CLASSES.into_iter().zip(&self.classes);
        labelled(&mut out, "pd_proxy_responses_total", "Finished requests by status class.", "status", classes);
        let failures = FAILURES.iter().filter_map(|f| f.error()).map(|(kind, _)| kind).zip(&self.failures);
        labelled(
            &mut out,
            "pd_proxy_failures_total",
            "Requests that failed, by what went wrong.",
            "error_type",
            failures,
        );
        let counters = [
            ("pd_proxy_disconnected_total", "Requests whose caller went away.", &self.disconnected),
            ("pd_proxy_prefill_attempts_total", "Calls of engines that prefill.", &self.prefill_attempts),
            ("pd_proxy_prefill_failed_total", "Prefills that failed for good.", &self.prefill_failed),
        ];
        for (name, help, counter) in counters {
            head(&mut out, name, "counter", help);
            line(&mut out, name, "", read(counter));
        }
        let durations = [
            ("pd_proxy_request_duration_seconds", "From a request's head to its last byte.", &self.total),
            ("pd_proxy_prefill_duration_seconds", "Prefills, all attempts and pauses.", &self.prefill),
            ("pd_proxy_decode_duration_seconds", "From the end of the prefill to the last byte.", &self.decode),
            (
                "pd_proxy_time_to_first_token_seconds",
                "From a request's head to the first byte passed on.",
                &self.first_byte,
            ),
            (
                "pd_proxy_coordination_duration_seconds",
                "Up to the decode, without calls of the prefill.",
                &self.coordination,
            ),
        ];
        for (name, help, durations) in durations {
            durations.text(&mut out, name, help);
        }
        out
    }
}

/// A histogram of durations.
#[derive(Debug, Default)]
struct Durations {
    counts: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    sum_ns: AtomicU64,
}

impl Durations {
    fn record(&self, value: Dur) {
        let seconds = value.as_secs_f64();
        if let Some(i) = BOUNDS.iter().position(|b| seconds <= *b) {
            add(&self.counts[i], 1);
        }
        add(&self.count, 1);
        add(&self.sum_ns, value.as_nanos());
    }

    fn text(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let (bucket, mut below) = (format!("{name}_bucket"), 0);
        for (bound, count) in BOUNDS.iter().zip(&self.counts) {
            below += read(count);
            line(out, &bucket, &format!("{{le=\"{bound}\"}}"), below);
        }
        // Of two threads one may have counted a value that the other one has not placed yet.
        let count = read(&self.count).max(below);
        line(out, &bucket, "{le=\"+Inf\"}", count);
        line(out, &format!("{name}_sum"), "", read(&self.sum_ns) as f64 / 1e9);
        line(out, &format!("{name}_count"), "", count);
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn labelled<'c>(
    out: &mut String,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'static str, &'c AtomicU64)>,
) {
    head(out, name, "counter", help);
    for (value, counter) in values {
        line(out, name, &format!("{{{label}=\"{value}\"}}"), read(counter));
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{name}{labels} {value}");
}

#[cfg(test)]
mod tests {
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
        let text = metrics.text();
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
