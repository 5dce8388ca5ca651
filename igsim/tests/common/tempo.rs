//! A real Tempo, where `TEMPO_URL` names one: sending traces to it, waiting until they can be searched.
//!
//! `TEMPO_URL` is the base address of its queries; traces go to the same host, OTLP over HTTP at port 4318 and over gRPC at port
//! 4317, as deploy/tempo/tempo.yaml has it.

use std::time::Duration;

use igsim::send::{SendOptions, salted, send};
use igsim::tempo::{Tempo, Window};
use shared::clock::RunClock;
use shared::rng::Stream;
use shared::time::Dur;
use shared::trace::config::{ExporterChoice, ExporterConfig, Layer, OtlpChoice, OtlpConfig, OtlpEncoding};
use shared::trace::{TelemetryConfig, TraceSet};

/// How long Tempo may take until what it accepted is found.
const PATIENCE: Dur = Dur::from_secs(60);

/// A Tempo to test with.
pub struct Server {
    pub tempo: Tempo,
    pub url: String,
    host: String,
}

impl Server {
    /// The one that `TEMPO_URL` names; without it says that `what` is skipped.
    pub fn given(what: &str) -> Option<Server> {
        let Some(url) = std::env::var("TEMPO_URL").ok().filter(|u| !u.is_empty()) else {
            eprintln!("skipped: {what}: TEMPO_URL names no Tempo");
            return None;
        };
        let tempo = Tempo::new(&url, "").unwrap_or_else(|e| panic!("TEMPO_URL: {e}"));
        let host = url.rsplit_once(':').filter(|(h, _)| h.contains("//")).map_or(url.as_str(), |(h, _)| h).to_owned();
        Some(Server { tempo, url, host })
    }

    pub fn otlp_http(&self) -> String {
        format!("{}:4318", self.host)
    }

    pub fn otlp_grpc(&self) -> String {
        format!("{}:4317", self.host)
    }

    /// Sends `set` under ids of its own, ending now, and waits until a search finds all of it. What Tempo now has, and the condition
    /// that tells it from everything else there.
    pub fn take(&self, mut set: TraceSet) -> (TraceSet, String) {
        let run_id = fresh_id();
        for resource in &mut set.resources {
            resource.environment = Some(run_id.clone());
        }
        let options = SendOptions { end_now: true, run_id: Some(run_id.clone()) };
        let stats = send(set.clone(), &endpoint(&self.otlp_http()), &options).expect("an exporter");
        assert_eq!((stats.exported, stats.dropped.total()), (set.spans.len() as u64, 0), "{stats:?}");
        for span in &mut set.spans {
            span.trace_id = salted(span.trace_id, &options);
            span.links.iter_mut().for_each(|link| link.trace_id = salted(link.trace_id, &options));
        }
        let only = format!("resource.deployment.environment.name = \"{run_id}\"");
        self.wait(&only, set.spans.len());
        (set, only)
    }

    /// Waits until `spans` spans can be searched that fulfil `condition`.
    pub fn wait(&self, condition: &str, spans: usize) {
        let clock = RunClock::start();
        let query = format!("{{ {condition} }} | count_over_time()");
        loop {
            let found = self.tempo.metrics(&query, lately()).expect("Tempo answers");
            let found = found.first().map_or(0.0, |s| s.value);
            if found == spans as f64 {
                return;
            }
            assert!(clock.now().since(shared::time::Time::ZERO) < PATIENCE, "Tempo shows {found} of {spans} spans");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Virtual runs of the tests cover less than an hour.
pub fn lately() -> Window {
    Window::last(Dur::from_secs(3600))
}

/// An id that no other test run has.
pub fn fresh_id() -> String {
    format!("test-{:016x}", Stream::from_os().next_u64())
}

fn endpoint(url: &str) -> OtlpConfig {
    let choice = ExporterChoice::Otlp(OtlpChoice { encoding: Some(OtlpEncoding::Sdk), ..OtlpChoice::to(url) });
    let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
    let (config, _) = TelemetryConfig::resolve(&layer, &Layer::default(), &|_| None).expect("an endpoint");
    match config.exporters.into_iter().next() {
        Some(ExporterConfig::Otlp(otlp)) => otlp,
        other => panic!("{other:?} is no OTLP endpoint"),
    }
}
