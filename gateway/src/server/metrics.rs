//! The gateway's own metrics: counted where requests pass, read as a page of Prometheus or pushed. Labels have bounded values.

mod served;

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use shared::metrics::{Def, Family, Histogram, Key, Kind, Point};
use shared::time::Dur;

pub(crate) use served::Ending;

use crate::core::request::Rejection;
use crate::server::request::Route;
use crate::server::runtime::Stats;
use served::Models;

/// Buckets of durations in seconds, those of `gen_ai.server.request.duration` (OpenTelemetry semantic conventions).
const DURATION: &[f64] = &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// Buckets of the time to first token in seconds, those of `gen_ai.server.time_to_first_token`.
const FIRST_TOKEN: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

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

const ROUTE: Key = Key::called("http.route", "route");
const STATUS: Key = Key::called("gateway.response.status_class", "status");
const REASON: Key = Key::called("gateway.rejection.reason", "reason");

const REQUESTS: Def = counter("gateway.requests", "{request}", "Finished requests by route and status class.");
const ACTIVE: Def =
    Def::new(Kind::UpDownCounter, "llm.requests.active", "{request}", "Requests that are not finished.");
const REJECTED: Def = counter("gateway.rejected", "{request}", "Requests refused by admission or scheduling.");
const RETRIES: Def =
    counter("gateway.retries", "{attempt}", "Further attempts after an endpoint could not be reached.");
const DISCONNECTED: Def = counter("gateway.disconnected", "{request}", "Requests whose caller went away.");
const BROKEN: Def = counter("gateway.broken", "{response}", "Responses that an engine broke off.");
const SCRAPES: Def = counter("gateway.scrapes", "{scrape}", "Scrapes of endpoints.");
const SCRAPES_FAILED: Def = counter("gateway.scrapes.failed", "{scrape}", "Scrapes of endpoints that failed.");
const UNAUTHORIZED: Def = counter("gateway.unauthorized", "{request}", "Requests without a valid token.");
const DISCOVERY_FAILURES: Def =
    counter("gateway.discovery.failures", "{reading}", "Readings of a source of endpoints that failed.");
const DROPPED: Def = counter("gateway.dropped", "{request}", "Requests refused, by llm-d's reason.");
const QUEUE_SIZE: Def =
    Def::new(Kind::UpDownCounter, "gateway.flow_control.queue.size", "{request}", "Requests that wait in the gateway.");
const QUEUE_BYTES: Def = Def::new(
    Kind::UpDownCounter,
    "gateway.flow_control.queue.bytes",
    "By",
    "Bytes of the bodies of requests that wait in the gateway.",
);
const QUEUE_DURATION: Def = Def::new(
    Kind::Histogram,
    "gateway.flow_control.request.queue.duration",
    "s",
    "Time in the gateway's queue, however it ended.",
);

const fn counter(name: &'static str, unit: &'static str, brief: &'static str) -> Def {
    Def::new(Kind::Counter, name, unit, brief)
}

/// Counts since the start.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: [[AtomicU64; CLASSES.len()]; ROUTES.len()],
    active: AtomicI64,
    served: Models,
    queue_duration: Histogram,
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
            served: Models::new(),
            queue_duration: Histogram::seconds(DURATION),
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
        self.queue_duration.record(time, None);
    }

    pub(crate) fn ended(&self, ending: &Ending<'_>) {
        let class = match ending.status {
            Some(200..300) => 0,
            Some(400..500) => 1,
            Some(500..600) => 2,
            Some(_) => 3,
            None => 4,
        };
        self.active.fetch_sub(1, Ordering::Relaxed);
        self.requests[ending.route as usize][class].fetch_add(1, Ordering::Relaxed);
        self.served.ended(ending);
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

    /// All metrics; `queued` are requests and bytes in the gateway's queue, where there is one.
    pub(crate) fn families(&self, queued: Option<(usize, u64)>) -> Vec<Family> {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let mut requests = Vec::new();
        for (route, classes) in ROUTES.iter().zip(&self.requests) {
            requests.extend(CLASSES.iter().zip(classes).map(|(class, count)| {
                let labels = vec![(ROUTE, route.template().into()), (STATUS, (*class).into())];
                Point { labels, value: read(count).into() }
            }));
        }
        let mut all = vec![REQUESTS.family(requests), ACTIVE.alone(self.active.load(Ordering::Relaxed))];
        all.extend([
            REJECTED.alone(read(&self.rejected)),
            RETRIES.alone(read(&self.retries)),
            DISCONNECTED.alone(read(&self.disconnected)),
            BROKEN.alone(read(&self.broken)),
            SCRAPES.alone(read(&self.scrapes)),
            SCRAPES_FAILED.alone(read(&self.scrapes_failed)),
            UNAUTHORIZED.alone(read(&self.unauthorized)),
            DISCOVERY_FAILURES.alone(read(&self.discovery_failed)),
        ]);
        let dropped = REASONS.iter().zip(&self.dropped);
        all.push(DROPPED.family(dropped.map(|(reason, n)| Point::with(REASON, *reason, read(n))).collect()));
        if let Some((requests, bytes)) = queued {
            all.extend([
                QUEUE_SIZE.alone(requests),
                QUEUE_BYTES.alone(bytes),
                QUEUE_DURATION.alone(self.queue_duration.read()),
            ]);
        }
        all.extend(self.served.families());
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::metrics::text::Format;
    use shared::time::Anchor;

    #[test]
    fn the_page_counts_what_happened() {
        let metrics = Metrics::new();
        (0..3).for_each(|_| metrics.begun());
        let chat = Ending {
            route: Route::Chat,
            model: "m",
            status: Some(200),
            failure: None,
            took: Dur::from_millis(15),
            first_token: Some(Dur::from_millis(4)),
            usage: None,
            found: None,
        };
        metrics.ended(&chat);
        metrics.ended(&Ending { route: Route::Other, status: Some(503), ..chat });
        metrics.rejected(Rejection::TtlExpired);
        metrics.rejected(Rejection::UnknownModel);
        metrics.queue_duration(Dur::from_millis(30));
        let text = Format::Prometheus.write(&metrics.families(Some((2, 300))), Anchor::from_unix_nanos(0));
        let series = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"vllm\",gen_ai_request_model=\"m\"";
        for expect in [
            "gateway_requests_total{route=\"/v1/chat/completions\",status=\"2xx\"} 1".to_owned(),
            "gateway_requests_total{route=\"/v1/{*path}\",status=\"5xx\"} 1".to_owned(),
            "llm_requests_active 1".to_owned(),
            format!("gen_ai_server_request_duration_seconds_bucket{{{series},le=\"0.01\"}} 0"),
            format!("gen_ai_server_request_duration_seconds_bucket{{{series},le=\"0.02\"}} 1"),
            format!("gen_ai_server_request_duration_seconds_bucket{{{series},le=\"+Inf\"}} 1"),
            format!("gen_ai_server_request_duration_seconds_sum{{{series}}} 0.015"),
            format!("gen_ai_server_time_to_first_token_seconds_bucket{{{series},le=\"0.005\"}} 1"),
            "gateway_rejected_total 2".to_owned(),
            "gateway_dropped_total{reason=\"rejected-ttl-expired\"} 1".to_owned(),
            "gateway_flow_control_queue_size 2".to_owned(),
            "gateway_flow_control_queue_bytes 300".to_owned(),
            "gateway_flow_control_request_queue_duration_seconds_bucket{le=\"0.04\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == expect), "{expect} is not in\n{text}");
        }
        let stats = metrics.stats();
        assert_eq!((stats.received, stats.active, stats.succeeded, stats.server_errors), (3, 1, 1, 1));
    }
}
