//! The gateway's own metrics in the Prometheus text format. Labels have a fixed, small set of values.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use shared::time::Dur;

use crate::core::request::Rejection;
use crate::server::request::Route;
use crate::server::runtime::Stats;

/// Buckets of durations in seconds, those of `gen_ai.server.request.duration` (OpenTelemetry semantic conventions).
const DURATION: [f64; 14] = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// Buckets of the time to first token in seconds, those of `gen_ai.server.time_to_first_token`.
const FIRST_TOKEN: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

const ROUTES: [Route; 3] = [Route::Chat, Route::Completions, Route::Other];
/// Status classes; `none` is a caller that went away before a status.
const CLASSES: [&str; 5] = ["2xx", "4xx", "5xx", "other", "none"];

/// llm-d's reasons for dropping a request.
const REASONS: [&str; 5] = [
    "rejected-saturated",
    "rejected-no-endpoints",
    "rejected-ttl-expired",
    "rejected-context-cancelled",
    "rejected-shutting-down",
];

/// Counts since the start.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: [[AtomicU64; CLASSES.len()]; ROUTES.len()],
    active: AtomicI64,
    duration: Histogram<14>,
    first_token: Histogram<16>,
    queue_duration: Histogram<14>,
    rejected: AtomicU64,
    dropped: [AtomicU64; REASONS.len()],
    pub(crate) retries: AtomicU64,
    pub(crate) disconnected: AtomicU64,
    pub(crate) broken: AtomicU64,
    pub(crate) scrapes: AtomicU64,
    pub(crate) scrapes_failed: AtomicU64,
    pub(crate) unauthorized: AtomicU64,
    pub(crate) discovery_failed: AtomicU64,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        Metrics {
            requests: Default::default(),
            active: AtomicI64::new(0),
            duration: Histogram::new(DURATION),
            first_token: Histogram::new(FIRST_TOKEN),
            queue_duration: Histogram::new(DURATION),
            dropped: Default::default(),
            rejected: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            disconnected: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            scrapes: AtomicU64::new(0),
            scrapes_failed: AtomicU64::new(0),
            unauthorized: AtomicU64::new(0),
            discovery_failed: AtomicU64::new(0),
        }
    }

    pub(crate) fn begun(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn rejected(&self, rejection: Rejection) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
        self.dropped(rejection);
    }

    pub(crate) fn dropped(&self, rejection: Rejection) {
        if let Some(i) = REASONS.iter().position(|r| Some(*r) == rejection.dropped()) {
            self.dropped[i].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn queue_duration(&self, time: Dur) {
        self.queue_duration.record(time);
    }

    pub(crate) fn first_token(&self, after: Dur) {
        self.first_token.record(after);
    }

    pub(crate) fn ended(&self, route: Route, status: Option<u16>, took: Dur) {
        let class = match status {
            Some(200..300) => 0,
            Some(400..500) => 1,
            Some(500..600) => 2,
            Some(_) => 3,
            None => 4,
        };
        self.active.fetch_sub(1, Ordering::Relaxed);
        self.requests[route as usize][class].fetch_add(1, Ordering::Relaxed);
        self.duration.record(took);
    }

    pub(crate) fn stats(&self) -> Stats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let class = |i: usize| self.requests.iter().map(|r| read(&r[i])).sum::<u64>();
        let finished = (0..CLASSES.len()).map(class).sum::<u64>();
        let active = u64::try_from(self.active.load(Ordering::Relaxed)).unwrap_or(0);
        Stats {
            received: finished + active,
            active,
            succeeded: class(0),
            client_errors: class(1),
            server_errors: class(2),
            rejected: read(&self.rejected),
            retries: read(&self.retries),
            disconnected: read(&self.disconnected),
            broken: read(&self.broken),
            scrapes: read(&self.scrapes),
            scrapes_failed: read(&self.scrapes_failed),
        }
    }

    /// All metrics as text; `queued` are requests and bytes in the gateway's queue, where there is one.
    pub(crate) fn text(&self, queued: Option<(usize, u64)>) -> String {
        let mut out = String::with_capacity(4096);
        head(&mut out, "gateway_requests_total", "counter", "Finished requests by route and status class.");
        for (route, classes) in ROUTES.iter().zip(&self.requests) {
            for (class, count) in CLASSES.iter().zip(classes) {
                let labels = format!("{{route=\"{}\",status=\"{class}\"}}", route.template());
                line(&mut out, "gateway_requests_total", &labels, count.load(Ordering::Relaxed));
            }
        }
        head(&mut out, "llm_requests_active", "gauge", "Requests that are not finished.");
        line(&mut out, "llm_requests_active", "", self.active.load(Ordering::Relaxed));
        let counters = [
            ("gateway_rejected_total", "Requests refused by admission or scheduling.", &self.rejected),
            ("gateway_retries_total", "Further attempts after an endpoint could not be reached.", &self.retries),
            ("gateway_disconnected_total", "Requests whose caller went away.", &self.disconnected),
            ("gateway_broken_total", "Responses that an engine broke off.", &self.broken),
            ("gateway_scrapes_total", "Scrapes of endpoints.", &self.scrapes),
            ("gateway_scrapes_failed_total", "Scrapes of endpoints that failed.", &self.scrapes_failed),
            ("gateway_unauthorized_total", "Requests without a valid token.", &self.unauthorized),
            (
                "gateway_discovery_failures_total",
                "Readings of a source of endpoints that failed.",
                &self.discovery_failed,
            ),
        ];
        for (name, help, counter) in counters {
            head(&mut out, name, "counter", help);
            line(&mut out, name, "", counter.load(Ordering::Relaxed));
        }
        head(&mut out, "gateway_dropped_total", "counter", "Requests refused, by llm-d's reason.");
        for (reason, count) in REASONS.iter().zip(&self.dropped) {
            let labels = format!("{{reason=\"{reason}\"}}");
            line(&mut out, "gateway_dropped_total", &labels, count.load(Ordering::Relaxed));
        }
        if let Some((requests, bytes)) = queued {
            let (size, total) = ("gateway_flow_control_queue_size", "gateway_flow_control_queue_bytes");
            head(&mut out, size, "gauge", "Requests that wait in the gateway.");
            line(&mut out, size, "", requests);
            head(&mut out, total, "gauge", "Bytes of the bodies of requests that wait in the gateway.");
            line(&mut out, total, "", bytes);
            let name = "gateway_flow_control_request_queue_duration_seconds";
            self.queue_duration.text(&mut out, name, "Time in the gateway's queue, however it ended.");
        }
        self.duration.text(
            &mut out,
            "gen_ai_server_request_duration_seconds",
            "Time from the request to its last byte.",
        );
        self.first_token.text(
            &mut out,
            "gen_ai_server_time_to_first_token_seconds",
            "Time to the first streamed token.",
        );
        out
    }
}

#[derive(Debug)]
struct Histogram<const N: usize> {
    bounds: [f64; N],
    counts: [AtomicU64; N],
    count: AtomicU64,
    sum_ns: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    fn new(bounds: [f64; N]) -> Histogram<N> {
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Histogram { bounds, counts, count: AtomicU64::new(0), sum_ns: AtomicU64::new(0) }
    }

    fn record(&self, value: Dur) {
        let seconds = value.as_secs_f64();
        if let Some(i) = self.bounds.iter().position(|b| seconds <= *b) {
            self.counts[i].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(value.as_nanos(), Ordering::Relaxed);
    }

    fn text(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count.load(Ordering::Relaxed);
            line(out, &bucket, &format!("{{le=\"{bound}\"}}"), below);
        }
        let count = self.count.load(Ordering::Relaxed).max(below);
        line(out, &bucket, "{le=\"+Inf\"}", count);
        line(out, &format!("{name}_sum"), "", self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9);
        line(out, &format!("{name}_count"), "", count);
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

    #[test]
    fn the_text_counts_what_happened() {
        let metrics = Metrics::new();
        (0..3).for_each(|_| metrics.begun());
        metrics.ended(Route::Chat, Some(200), Dur::from_millis(15));
        metrics.ended(Route::Other, Some(503), Dur::from_secs(100));
        metrics.first_token(Dur::from_millis(4));
        metrics.rejected(Rejection::TtlExpired);
        metrics.rejected(Rejection::UnknownModel);
        metrics.queue_duration(Dur::from_millis(30));
        let text = metrics.text(Some((2, 300)));
        for expect in [
            "gateway_requests_total{route=\"/v1/chat/completions\",status=\"2xx\"} 1",
            "gateway_requests_total{route=\"/v1/{*path}\",status=\"5xx\"} 1",
            "llm_requests_active 1",
            "gen_ai_server_request_duration_seconds_bucket{le=\"0.01\"} 0",
            "gen_ai_server_request_duration_seconds_bucket{le=\"0.02\"} 1",
            "gen_ai_server_request_duration_seconds_bucket{le=\"81.92\"} 1",
            "gen_ai_server_request_duration_seconds_bucket{le=\"+Inf\"} 2",
            "gen_ai_server_request_duration_seconds_sum 100.015",
            "gen_ai_server_time_to_first_token_seconds_bucket{le=\"0.005\"} 1",
            "gateway_rejected_total 2",
            "gateway_dropped_total{reason=\"rejected-ttl-expired\"} 1",
            "gateway_flow_control_queue_size 2",
            "gateway_flow_control_queue_bytes 300",
            "gateway_flow_control_request_queue_duration_seconds_bucket{le=\"0.04\"} 1",
        ] {
            assert!(text.lines().any(|l| l == expect), "{expect} is not in\n{text}");
        }
        let stats = metrics.stats();
        assert_eq!((stats.received, stats.active, stats.succeeded, stats.server_errors), (3, 1, 1, 1));
    }
}
