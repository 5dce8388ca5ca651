//! What reaches telemetry and what never does: no content (I8), and no touch on the caller's headers where tracing is off.

mod common;

use std::fmt::Write as _;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use common::collector::{Answer, Collector, by_resource};
use common::http::{Backend, address, request};
use common::{Place, TINY, around, findings, names, words};
use igsim::live::stack::{Ports, Stack};
use igsim::run::telemetry::{TracingOptions, resolve};
use igsim::scenario::Scenario;
use igsim::workload::Plan;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Dur;
use shared::tokens;
use shared::trace::check::Rule;
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
use shared::trace::exporter::console::ConsoleTarget;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::{Telemetry, TelemetryConfig, TraceSet};
use tokio::runtime::Runtime;

/// A gateway and its engines in this process.
struct Served {
    runtime: Runtime,
    stack: Stack,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
}

impl Served {
    /// Serves `yaml`, traced as `environment` and the scenario say; spans go to memory and to `exporters`.
    fn start(runtime: Runtime, yaml: &str, environment: &[(&str, &str)], exporters: Vec<ExporterConfig>) -> Served {
        let loaded = shared::config::load_str::<Scenario>("test", yaml, &[]);
        let scenario = loaded.unwrap_or_else(|e| panic!("{e}")).config;
        let env = |key: &str| environment.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned());
        let resolved = resolve(&TracingOptions::default(), &scenario.tracing, &scenario.metrics, None, &env)
            .expect("a configuration");
        let spans = MemorySpans::default();
        let mut config: TelemetryConfig = resolved.config;
        config.exporters = exporters;
        config.exporters.push(ExporterConfig::Memory(spans.clone()));
        let clock = RunClock::start();
        let telemetry = Telemetry::live(config, clock).expect("telemetry");
        let stack = runtime.block_on(Stack::start(&scenario, &telemetry, clock, Ports::default(), None));
        Served { runtime, stack: stack.expect("everything serves"), telemetry, spans, clock }
    }

    fn gateway(&self) -> SocketAddr {
        address(&self.stack.gateway_url())
    }

    fn post(&self, target: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
        request(self.gateway(), "POST", target, headers, body)
    }

    /// Stops everything; the spans of the whole time.
    fn stop(self) -> TraceSet {
        self.runtime.block_on(self.stack.stop());
        self.telemetry.shutdown(self.clock.now());
        self.spans.take()
    }
}

/// Text that many threads write to and the test reads.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Text {
    fn read(&self) -> String {
        String::from_utf8(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).expect("UTF-8")
    }
}

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Words that stand nowhere but in the content of requests.
const CANARY: &str = "canary-zqx7-in-the-coal-mine";
const CANARY_TOKEN: u32 = 1_987_654_321;

/// Everything that a caller may send and that has content in it: good requests of both endpoints, streamed and whole, prompts as
/// token ids, and bodies that are refused.
fn requests_with_a_canary(model: &str) -> Vec<(&'static str, String, u16)> {
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    let say = |extra: &str| {
        format!(
            "{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{CANARY} {CANARY}\"}}],{extra}}}"
        )
    };
    vec![
        (chat, say("\"max_tokens\":3,\"stream\":true"), 200),
        (chat, say("\"max_tokens\":3"), 200),
        (text, format!("{{\"model\":\"{model}\",\"prompt\":\"{CANARY}\",\"max_tokens\":3}}"), 200),
        (text, format!("{{\"model\":\"{model}\",\"prompt\":[{CANARY_TOKEN},{CANARY_TOKEN},7],\"max_tokens\":3}}"), 200),
        // The query is the caller's, and may be a secret; an unknown field is passed on.
        ("/v1/chat/completions?key=canary-zqx7-in-the-coal-mine", say("\"max_tokens\":3"), 200),
        (chat, say(&format!("\"max_tokens\":2,\"user_note\":\"{CANARY}\"")), 200),
        // Refused: what is wrong must not be quoted.
        (chat, say(&format!("\"max_tokens\":\"{CANARY}\"")), 400),
        (chat, say(&format!("\"temperature\":\"{CANARY}\"")), 400),
        (chat, format!("{{\"model\":\"{model}\",\"messages\":\"{CANARY}\"}}"), 400),
        (text, format!("{{\"model\":\"{model}\",\"prompt\":{{\"{CANARY}\":1}}}}"), 400),
        (chat, format!("{CANARY} is no JSON"), 400),
    ]
}

/// I8, on the wire: spans, trees on the console, both metrics pages and the log at its finest.
#[test]
fn content_reaches_no_span_metric_or_log() {
    let (log, console) = (Text::default(), Text::default());
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
    subscriber.with_writer(move || writer.clone()).try_init().expect("no other test of this binary logs");
    tracing::debug!("the log is kept");
    let place = Place::new();
    let target: Arc<Mutex<dyn Write + Send>> = Arc::new(Mutex::new(console.clone()));
    let exporters = vec![
        ExporterConfig::File(place.path("traces.otlp.jsonl")),
        ExporterConfig::Console(ConsoleTarget::Writer(target)),
    ];
    let served = Served::start(Runtime::new().unwrap(), &finest(), &[], exporters);
    let loaded = shared::config::load_str::<Scenario>("test", TINY, &[]).unwrap();
    let model = loaded.config.model();
    let secret =
        [("authorization", "Bearer canary-zqx7-in-the-coal-mine"), ("cookie", "id=canary-zqx7-in-the-coal-mine")];
    let mut answers = Vec::new();
    for (target, body, expect) in requests_with_a_canary(&model) {
        let (status, answer) = served.post(target, &secret, &body);
        assert_eq!(status, expect, "{target} {body}: {answer}");
        answers.extend(words(&answer).filter(|_| status == 200));
    }
    assert!(!answers.is_empty(), "answers have words to look for");
    let engines: Vec<SocketAddr> = served.stack.engines().iter().map(|(_, url)| address(url)).collect();
    let mut pages = String::new();
    for server in engines.into_iter().chain([served.gateway()]) {
        let (status, page) = request(server, "GET", "/metrics", &[], "");
        assert_eq!(status, 200);
        pages.push_str(&page);
    }
    let set = served.stop();
    assert!(set.spans.iter().filter(|s| s.name == "gateway.request").count() >= 6, "requests are traced");
    assert_eq!(findings(&set).first(), None);
    let file = std::fs::read_to_string(place.path("traces.otlp.jsonl")).unwrap();
    let places = [
        ("the spans", format!("{:?}", set.spans)),
        ("the file of traces", file),
        ("the console", console.read()),
        ("a metrics page", pages),
        ("the log", log.read()),
    ];
    // The search is in the right places: they do have what may be there.
    assert!(places[..4].iter().all(|(_, text)| text.contains(&model)), "the model is named");
    assert!(places[4].1.contains("the log is kept"), "the log is kept");
    let token = CANARY_TOKEN.to_string();
    let secrets = ["canary", "coal-mine", token.as_str()];
    for (name, text) in &places {
        for secret in secrets.into_iter().chain(answers.iter().map(String::as_str)) {
            assert!(
                !text.contains(secret),
                "{secret:?} of a request or an answer is in {name}: {}",
                around(text, secret)
            );
        }
    }
}

/// What the gateway and the engines record, answered, refused and in the background, is the same to a collector whether the SDK
/// encodes it or the records are encoded as they are.
#[test]
fn real_records_are_the_same_in_either_encoding() {
    let collectors = [Collector::http(Answer::Accept), Collector::http(Answer::Accept)];
    let exporters = collectors.iter().zip([OtlpEncoding::Sdk, OtlpEncoding::Direct]).map(|(collector, encoding)| {
        let (protocol, timeout) = (OtlpProtocol::HttpProtobuf, Dur::from_secs(10));
        let endpoint = format!("{}/v1/traces", collector.url());
        ExporterConfig::Otlp(OtlpConfig {
            endpoint,
            protocol,
            headers: Vec::new(),
            timeout,
            gzip: false,
            encoding,
            ca_file: None,
        })
    });
    let served = Served::start(Runtime::new().unwrap(), &finest(), &[], exporters.collect());
    let model = shared::config::load_str::<Scenario>("test", TINY, &[]).unwrap().config.model();
    let caller =
        [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("tracestate", "a=1, b=2")];
    for (target, body, expect) in requests_with_a_canary(&model) {
        assert_eq!(served.post(target, &caller, &body).0, expect, "{target} {body}");
    }
    let set = served.stop();
    let [by_sdk, direct] = collectors.map(|c| by_resource(c.spans()));
    assert_eq!(by_sdk, direct);
    assert_eq!(direct.values().map(Vec::len).sum::<usize>(), set.spans.len());
    for name in ["gateway.request", "vllm.engine.step", "vllm.sampler.sample", "vllm.detokenizer.update"] {
        assert!(set.spans.iter().any(|s| s.name == name), "{name}");
    }
    assert_eq!(set.resources.len(), 3, "gateway and engines");
    // The caller's one trace has a local root for each of its requests.
    let found = findings(&set);
    assert!(found.iter().all(|f| f.rule == Rule::OneRoot), "{found:#?}");
}

/// [`TINY`] with everything that can be recorded.
fn finest() -> String {
    TINY.replace("ratio: 1.0", "ratio: 1.0, detail: 3, engine_steps: 1.0")
}

/// I8, of a whole run: what igsim's own client sends is in no file, on no terminal.
#[test]
fn a_run_writes_no_prompt_anywhere() {
    let place = Place::with_tiny();
    let env = [("RUST_LOG", "trace"), ("OTEL_TRACES_EXPORTER", "console")];
    let loaded = shared::config::load_str::<Scenario>("tiny", TINY, &[]).unwrap();
    let mut plan = Plan::new(&loaded.config, Seed(loaded.config.seed)).unwrap();
    let prompts: Vec<String> = std::iter::from_fn(|| plan.next_arrival().unwrap())
        .map(|request| {
            let (mut tokens, mut text) = (Vec::new(), String::new());
            request.tokens(&mut tokens);
            tokens::push_text(&tokens, &mut text);
            text[..16].to_owned()
        })
        .collect();
    assert_eq!(prompts.len(), 12);
    for mode in ["live", "virtual"] {
        let ran = place.ran_with(&env, &["run", "tiny.yaml", "--mode", mode, "--out", mode]);
        assert_eq!(ran.code, 0, "{ran:#?}");
        assert!(ran.err.contains("gateway.request"), "the console exporter prints to standard error");
        let mut everything = format!("{}{}", ran.out, ran.err);
        for file in names(&place.path(mode)) {
            let text = std::fs::read_to_string(place.path(mode).join(file)).unwrap();
            let _ = writeln!(everything, "{text}");
        }
        for prompt in &prompts {
            assert!(!everything.contains(prompt), "{prompt:?} is in {}", around(&everything, prompt));
        }
    }
}

const CALLER: [(&str, &str); 4] = [
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("tracestate", "vendor=x,ot=th:8"),
    ("baggage", "k=v"),
    ("x-own", "kept"),
];

/// Sends a request with [`CALLER`]'s headers through a gateway to a real backend: what arrives there, and the spans.
fn forwarded(environment: &[(&str, &str)]) -> (http::HeaderMap, String, TraceSet) {
    let runtime = Runtime::new().unwrap();
    let (backend, at) = runtime.block_on(Backend::start());
    let yaml = format!(
        "name: t\nrequests: 1\nengines: [{{ url: 'http://{at}', model: m }}]\n\
         workload: {{ arrivals: {{ process: constant, rate: 1 }} }}\nlisten: {{ gateway: '127.0.0.1:0' }}\n"
    );
    let served = Served::start(runtime, &yaml, environment, Vec::new());
    let body = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
    let (status, answer) = served.post("/v1/chat/completions", &CALLER, body);
    assert_eq!(status, 200, "{answer}");
    let received = backend.headers();
    assert_eq!(received.len(), 1);
    (received[0].clone(), answer, served.stop())
}

#[test]
fn a_disabled_sdk_forwards_headers_untouched_and_records_nothing() {
    let (received, answer, set) = forwarded(&[("OTEL_SDK_DISABLED", "true")]);
    for (name, value) in CALLER {
        let values: Vec<_> = received.get_all(name).iter().collect();
        assert_eq!(values, [value], "{name}");
    }
    assert!(!answer.contains("traceresponse"), "{answer}");
    assert_eq!(set.spans.len(), 0);
}

#[test]
fn a_callers_trace_goes_on_through_the_gateway() {
    let (received, answer, set) = forwarded(&[]);
    let text = |name: &str| received.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let span = |name: &str| set.spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name}"));
    let (root, proxy) = (span("gateway.request"), span("gateway.backend.proxy"));
    assert_eq!(root.parent.map(|p| p.to_string()).as_deref(), Some("b7ad6b7169203331"));
    assert_eq!(text("traceparent"), format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", proxy.span_id));
    assert_eq!(text("tracestate"), "vendor=x,ot=th:8");
    assert_eq!((text("baggage"), text("x-own")), ("k=v".to_owned(), "kept".to_owned()));
    assert!(answer.contains(&format!("traceresponse: 00-0af7651916cd43dd8448eb211c80319c-{}-01", root.span_id)));
    assert_eq!(findings(&set).first(), None);
}

/// Runs [`TINY`] in virtual time with this environment and these options: the traces kept, and the files.
fn kept(tracing: &str, env: &[(&str, &str)], options: &[&str]) -> (u64, Vec<String>) {
    let place = Place::new();
    place.write("tiny.yaml", &TINY.replace("tracing: { ratio: 1.0 }", tracing));
    let args = ["run", "tiny.yaml", "--mode", "virtual", "--out", "out", "--set", "requests=200"];
    let ran = place.ran_with(env, &[args.as_slice(), options].concat());
    assert_eq!(ran.code, 0, "{ran:#?}");
    let (report, files) = (place.report("out"), names(&place.path("out")));
    if files.iter().any(|f| f == "traces.otlp.jsonl") {
        let kept = common::by_trace(&place.traces("out")).len();
        assert_eq!(kept as u64, report.traces.kept);
    }
    (report.traces.kept, files)
}

#[test]
fn the_command_line_stands_over_the_file_and_the_file_over_the_environment() {
    let on = ("OTEL_TRACES_SAMPLER", "always_on");
    let off = ("OTEL_TRACES_SAMPLER", "always_off");
    let ratio = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
    let check = |file: &str, env: &[(&str, &str)], options: &[&str], expect: std::ops::RangeInclusive<u64>| {
        let (kept, _) = kept(file, env, options);
        assert!(expect.contains(&kept), "{kept} of 200 kept with {file:?}, {env:?}, {options:?}");
    };
    let nothing = "tracing: {}";
    // 99 % of the binomial distribution: 9 to 32 of 200 at 0.1, 81 to 119 at 0.5.
    check(nothing, &[], &[], 9..=32);
    check(nothing, &[on], &[], 200..=200);
    check(nothing, &[off], &[], 0..=0);
    check(nothing, &[ratio, ("OTEL_TRACES_SAMPLER_ARG", "0.5")], &[], 81..=119);
    check(nothing, &[("OTEL_TRACES_SAMPLER_ARG", "0.5")], &[], 81..=119);
    check("tracing: { sampler: always_off }", &[on], &[], 0..=0);
    check("tracing: { ratio: 0.5 }", &[ratio, ("OTEL_TRACES_SAMPLER_ARG", "1")], &[], 81..=119);
    check("tracing: { ratio: 0.5 }", &[off], &[], 81..=119);
    check("tracing: { ratio: 0.5 }", &[off], &["--sampling", "1"], 200..=200);
    check("tracing: { sampler: always_on }", &[on], &["--sampling", "0"], 0..=0);
    check(nothing, &[on], &["--sampling", "0.5"], 81..=119);
}

#[test]
fn no_exporter_means_no_file_and_a_disabled_sdk_no_telemetry() {
    let plain = ["report.json", "requests.csv", "scenario.yaml"];
    let (none, files) = kept("tracing: { ratio: 1.0 }", &[("OTEL_TRACES_EXPORTER", "none")], &[]);
    assert_eq!((none, files.as_slice()), (200, plain.map(String::from).as_slice()), "decided and folded, not written");
    let (disabled, files) = kept("tracing: { ratio: 1.0 }", &[("OTEL_SDK_DISABLED", "true")], &[]);
    assert_eq!((disabled, files.as_slice()), (0, plain.map(String::from).as_slice()));
}

#[test]
fn a_wrong_variable_is_a_warning_and_the_run_goes_on() {
    let place = Place::with_tiny();
    let env = [("OTEL_TRACES_SAMPLER", "sometimes"), ("OTEL_TRACES_SAMPLER_ARG", "2")];
    let ran = place.ran_with(&env, &["run", "tiny.yaml", "--mode", "virtual", "--out", "out"]);
    assert_eq!(ran.code, 0);
    insta::assert_snapshot!(ran.err, @r"
    warning: OTEL_TRACES_SAMPLER=`sometimes` is ignored: a sampler of the specification is allowed
    warning: OTEL_TRACES_SAMPLER_ARG=`2` is ignored: a number from 0 to 1 is allowed
    ");
}
