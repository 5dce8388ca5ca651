//! The lab's load and receiver at the two ends of the real thing: what is sent is answered, and what is traced arrives whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use http::HeaderMap;
use igsim::live::stack::{Ports, Stack};
use igsim::overhead::load::{Lengths, LoadSpec, Loader, Pattern, Sample};
use igsim::overhead::receiver::{Limits, Receiver};
use igsim::scenario::{Api, Scenario};
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
use shared::trace::{Ratio, SamplerKind, Telemetry, TelemetryConfig};

const SCENARIO: &str = "\
name: lab
requests: 30
engines: [{ count: 2, profile: instant }]
workload: { arrivals: { process: poisson, rate: 1000 }, system_prompt: { tokens: 64 }, prompt_tokens: 20, output_tokens: 8 }
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
";

/// Spans of a request of the default gateway whose prompt is one prefill chunk.
const SPANS_PER_TRACE: u32 = 24;
const MINUTE: Dur = Dur::from_secs(60);

fn telemetry(receiver: &Receiver, clock: RunClock) -> Telemetry {
    let otlp = OtlpConfig {
        endpoint: receiver.traces_url(),
        protocol: OtlpProtocol::HttpProtobuf,
        headers: Vec::new(),
        timeout: MINUTE,
        gzip: false,
        encoding: OtlpEncoding::Sdk,
        ca_file: None,
    };
    let config = TelemetryConfig {
        sampler: SamplerKind::ParentBasedTraceIdRatio.with(Ratio::new(0.5).unwrap()),
        exporters: vec![ExporterConfig::Otlp(otlp)],
        ..TelemetryConfig::default()
    };
    Telemetry::live(config, clock).unwrap()
}

fn spec(stack: &Stack, scenario: &Scenario, pattern: Pattern) -> LoadSpec {
    LoadSpec {
        uri: format!("{}/v1/chat/completions", stack.gateway_url()).parse().unwrap(),
        api: Api::Chat,
        model: scenario.model().to_owned(),
        headers: HeaderMap::new(),
        pattern,
        timeout: MINUTE,
        spin: Dur::ZERO,
        seed: Seed(1),
    }
}

/// Every request was answered, and the engines served just these.
fn check(samples: &[Sample], served: &mut BTreeMap<String, (Time, Time)>, expect: usize) {
    assert_eq!(samples.iter().map(|s| &s.id).collect::<BTreeSet<_>>().len(), expect);
    for s in samples {
        assert!(s.ok(), "{s:?}");
        assert_eq!(s.output_tokens, Some(8));
        assert!(s.first_byte <= s.first_token && s.first_token.is_some());
        let (read, written) = served.remove(&s.id).expect("an engine knows the id");
        assert!(s.sent <= read && read <= written && Some(written) <= s.first_byte, "{s:?}");
    }
    assert_eq!(served.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sampled_arrives_whole() {
    let scenario = shared::config::load_str::<Scenario>("lab", SCENARIO, &[]).unwrap().config;
    let clock = RunClock::start();
    let receiver = Receiver::start("127.0.0.1:0".parse().unwrap(), Limits::default()).unwrap();
    let telemetry = telemetry(&receiver, clock);
    let served = Arc::new(Mutex::new(BTreeMap::new()));
    let log = Arc::clone(&served);
    let hook: engine_sim::server::ServedHook = Arc::new(move |s| {
        let (_, id) = s.id.as_str().split_once('-').expect("behind the endpoint's prefix");
        log.lock().unwrap().insert(id.to_owned(), (s.body_read, s.first_write));
    });
    let stack = Stack::start(&scenario, &telemetry, clock, Ports::default(), Some(hook)).await.unwrap();
    let lengths = Lengths { prompt: 20, output: 8 };
    let patterns = [
        Pattern::Closed { in_flight: 4, requests: 60, lengths },
        Pattern::FixedRate { per_second: 2_000.0, requests: 60, lengths },
        Pattern::of_scenario(&scenario, Seed(7), 30).unwrap(),
    ];
    let mut sampled = Vec::new();
    for (block, pattern) in (0..).zip(patterns) {
        let expect = pattern.requests() as usize;
        let loader = Loader::new(clock, spec(&stack, &scenario, pattern)).unwrap();
        let samples = loader.run(block).await.unwrap();
        check(&samples, &mut served.lock().unwrap(), expect);
        sampled.push(samples.iter().filter(|s| s.sampled).count() as u64);
        assert!(telemetry.flush(MINUTE));
        assert_eq!(u64::from(receiver.take().mark), block);
    }
    stack.stop().await;
    assert!(sampled.iter().sum::<u64>() > 0);
    let decoded = receiver.decode().unwrap();
    for (mark, traces) in (0..).zip(sampled) {
        let m = &decoded.marks[&mark];
        assert_eq!((m.traces, m.incomplete, m.invalid, m.malformed), (traces, 0, 0, 0));
        assert_eq!(m.spans_per_trace, BTreeMap::from([(SPANS_PER_TRACE, traces)]));
        assert_eq!((m.spans, m.distinct), (24 * traces, 24 * traces));
    }
    let stats = telemetry.shutdown(clock.now());
    assert_eq!(stats.spans_created, decoded.total().spans);
}
