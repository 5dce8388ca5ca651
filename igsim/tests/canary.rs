//! No content in telemetry (I8): prompts, answers, token ids, keys and cookies planted in requests of every endpoint, in errors and in
//! faults, appear in no span, event, log line, metric, file or terminal output of gateway, sidecar, engines, kv-cache-manager and runner.

mod common;

use std::fmt::Write as _;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use common::http::{address, request};
use common::{Place, TINY, around, names, scenario, words};
use igsim::check::{Options, check};
use igsim::live::stack::{Ports, Stack};
use igsim::run::telemetry::{TracingOptions, resolve};
use igsim::scenario::Scenario;
use igsim::workload::Plan;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::tokens;
use shared::trace::Telemetry;
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::console::ConsoleTarget;
use shared::trace::exporter::memory::MemorySpans;
use tokio::runtime::Runtime;

/// Words that stand nowhere but in what callers send.
const CANARY: &str = "canary-zqx7-in-the-coal-mine";
/// The same in base64, as a picture would be.
const PICTURE: &str = "Y2FuYXJ5LXpxeDctaW4tdGhlLWNvYWwtbWluZQ";
const TOKEN: u32 = 1_987_654_321;

/// Everything that serves, behind a gateway that asks for a token which is a canary too.
const FLEET: &str = "\
name: canary
requests: 1
gateway:
  auth: { bearer_tokens_file: tokens.txt }
  flow_control: { enabled: true }
  precise_prefix: { speculative: true }
  profile:
    filters: [{ type: healthy-filter }, { type: decode-filter }]
    scorers: [{ type: precise-prefix-cache-scorer }, { type: prefix-cache-scorer }]
  disaggregation:
    profile: { name: prefill, filters: [{ type: prefill-filter }], scorers: [{ type: queue-scorer }] }
    decider: { type: prefix-based-pd-decider, parameters: { nonCachedTokens: 64 } }
engines:
  - role: prefill
    profile: llama-3.1-8b-h100
    kv_transfer: { kv_connector: NixlConnector, kv_role: kv_producer }
    kv_events_config: { enable_kv_cache_events: true, endpoint: 'tcp://*:0', replay_endpoint: 'tcp://*:0', topic: 'kv@{pod}@{model}' }
  - role: decode
    profile: llama-3.1-8b-h100
    fault_headers: true
    kv_transfer: { kv_connector: NixlConnector, kv_role: kv_consumer }
    kv_events_config: { enable_kv_cache_events: true, endpoint: 'tcp://*:0', replay_endpoint: 'tcp://*:0', topic: 'kv@{pod}@{model}' }
workload: { arrivals: { process: constant, rate: 1 } }
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0', kv_cache_manager: '127.0.0.1:0' }
tracing: { ratio: 1.0, detail: 3, engine_steps: 1.0, kv_events: 1.0, scrapes: 1.0 }
";

/// Text that many threads write to and the test reads.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Text {
    fn read(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
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

/// A request: target, further headers, body, and the status that it is answered with.
type Asked = (&'static str, &'static [(&'static str, &'static str)], String, u16);

/// What goes through the gateway.
fn through_the_gateway(model: &str) -> Vec<Asked> {
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    let long = format!("{CANARY} ").repeat(20);
    let say = |extra: &str| {
        format!("{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{long}\"}}],{extra}}}")
    };
    let parts = format!(
        "{{\"model\":\"{model}\",\"max_tokens\":2,\"user\":\"{CANARY}\",\"metadata\":{{\"{CANARY}\":\"{CANARY}\"}},\"messages\":[\
         {{\"role\":\"system\",\"content\":\"{CANARY}\"}},{{\"role\":\"user\",\"name\":\"{CANARY}\",\"content\":[\
         {{\"type\":\"text\",\"text\":\"{CANARY}\"}}]}}]}}"
    );
    let prompt =
        |prompt: &str, extra: &str| format!("{{\"model\":\"{model}\",\"prompt\":{prompt},\"max_tokens\":3{extra}}}");
    let quoted = format!("\"{long}\"");
    let ids = format!("[{}]", vec![TOKEN.to_string(); 100].join(","));
    vec![
        (chat, &[], say("\"max_tokens\":3,\"stream\":true"), 200),
        (chat, &[], say("\"max_tokens\":3"), 200),
        (chat, &[], parts, 200),
        (chat, &[], say(&format!("\"max_tokens\":2,\"stop\":[\"{CANARY}\"],\"n\":2")), 200),
        (chat, &[], say("\"max_tokens\":2,\"logprobs\":true,\"top_logprobs\":2"), 200),
        (text, &[], prompt(&quoted, ""), 200),
        (text, &[], prompt(&quoted, ",\"echo\":true,\"stream\":true"), 200),
        (text, &[], prompt(&ids, ""), 200),
        (text, &[], prompt(&format!("[{quoted},{quoted}]"), ""), 200),
        (text, &[], prompt(&ids, &format!(",\"cache_salt\":\"{CANARY}\",\"return_token_ids\":true")), 200),
        // The query is the caller's, and may be a secret.
        ("/v1/chat/completions?key=canary-zqx7-in-the-coal-mine", &[], say("\"max_tokens\":3"), 200),
        // Refused: what is wrong must not be quoted where others read it.
        (chat, &[], say(&format!("\"max_tokens\":\"{CANARY}\"")), 400),
        (chat, &[], format!("{{\"model\":\"{model}\",\"messages\":\"{CANARY}\"}}"), 400),
        (text, &[], prompt(&format!("{{\"{CANARY}\":1}}"), ""), 400),
        (text, &[], prompt("[\"a\",7]", &format!(",\"suffix\":\"{CANARY}\"")), 400),
        (chat, &[], format!("{CANARY} is no JSON"), 400),
        (chat, &[("authorization", "Bearer canary-zqx7-in-the-coal-mine-but-wrong")], say("\"max_tokens\":3"), 401),
        ("/v1/embeddings", &[], format!("{{\"model\":\"{model}\",\"input\":\"{CANARY}\"}}"), 404),
        (
            "/v1/responses",
            &[],
            format!("{{\"model\":\"{model}\",\"input\":[\"{CANARY}\",\"data:image/png;base64,{PICTURE}\"]}}"),
            404,
        ),
        // Faults that a request asks for.
        (chat, &[("x-igsim-fault", "http_error=500")], say("\"max_tokens\":3"), 500),
        (chat, &[("x-return-error", "429")], say("\"max_tokens\":3,\"stream\":true"), 429),
        (chat, &[("x-igsim-fault", "cut_stream=2")], say("\"max_tokens\":9,\"stream\":true"), 200),
    ]
}

/// What an engine answers that nobody routes.
fn to_an_engine(model: &str) -> Vec<Asked> {
    vec![
        ("/tokenize", &[], format!("{{\"model\":\"{model}\",\"prompt\":\"{CANARY}\"}}"), 200),
        ("/tokenize", &[], format!("{{\"model\":\"{model}\",\"prompt\":7,\"x\":\"{CANARY}\"}}"), 400),
        ("/detokenize", &[], format!("{{\"model\":\"{model}\",\"tokens\":[{TOKEN},{TOKEN}]}}"), 200),
        ("/detokenize", &[], format!("{{\"model\":\"{model}\",\"tokens\":[\"{CANARY}\"]}}"), 400),
        ("/invocations", &[], format!("{{\"model\":\"{model}\",\"prompt\":\"{CANARY}\",\"max_tokens\":2}}"), 200),
        ("/invocations", &[], format!("{{\"{CANARY}\":1}}"), 400),
    ]
}

/// I8, on the wire, of everything that serves.
#[test]
fn nothing_that_callers_send_is_told_to_anybody_else() {
    let (log, console) = (Text::default(), Text::default());
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
    subscriber.with_writer(move || writer.clone()).try_init().expect("no other test of this binary logs");
    tracing::debug!("the log is kept");
    let place = Place::new();
    place.write("tokens.txt", CANARY);
    let yaml = FLEET.replace("tokens.txt", &place.path("tokens.txt").display().to_string());
    let scenario = shared::config::load_str::<Scenario>("test", &yaml, &[]).unwrap_or_else(|e| panic!("{e}")).config;
    let (tracing, metrics) = (&scenario.tracing, &scenario.metrics);
    let resolved = resolve(&TracingOptions::default(), tracing, metrics, None, &|_| None).expect("a configuration");
    let (mut config, spans) = (resolved.config, MemorySpans::default());
    let target: Arc<Mutex<dyn Write + Send>> = Arc::new(Mutex::new(console.clone()));
    config.exporters = vec![
        ExporterConfig::File(place.path("traces.otlp.jsonl")),
        ExporterConfig::Console(ConsoleTarget::Writer(target)),
        ExporterConfig::Memory(spans.clone()),
    ];
    let (clock, runtime) = (RunClock::start(), Runtime::new().expect("a runtime"));
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let stack = runtime.block_on(Stack::start(&scenario, &telemetry, clock, Ports::default(), None));
    let stack = stack.expect("everything serves");
    let (gateway, model) = (address(&stack.gateway_url()), scenario.model());
    let engines: Vec<SocketAddr> = stack.engines().iter().map(|(_, url)| address(url)).collect();

    let bearer = format!("Bearer {CANARY}");
    let cookie = format!("id={CANARY}; other={CANARY}");
    let secrets = [("cookie", cookie.as_str()), ("x-api-key", CANARY), ("x-forwarded-user", CANARY)];
    let mut answers = Vec::new();
    let mut ask = |at: SocketAddr, asked: &Asked| {
        let (target, headers, body, expect) = asked;
        let own: Vec<(&str, &str)> = headers.iter().chain(&secrets).copied().collect();
        let known = own.iter().any(|(name, _)| *name == "authorization");
        let own = if known { own } else { [own.as_slice(), &[("authorization", bearer.as_str())]].concat() };
        let (status, answer) = request(at, "POST", target, &own, body);
        assert_eq!(status, *expect, "{target} {headers:?} {body}: {answer}");
        answers.extend(words(&answer).filter(|_| status == 200));
    };
    through_the_gateway(&model).iter().for_each(|asked| ask(gateway, asked));
    to_an_engine(&model).iter().for_each(|asked| ask(engines[1], asked));
    assert!(!answers.is_empty(), "answers have words to look for");
    let mut pages = String::new();
    for server in engines.iter().copied().chain([gateway]) {
        let (status, page) = request(server, "GET", "/metrics", &[], "");
        assert_eq!(status, 200);
        pages.push_str(&page);
    }
    runtime.block_on(stack.stop());
    telemetry.shutdown(clock.now());
    let set = spans.take();

    // Everything took part and left something to look into.
    for service in ["inference-gateway", "pd-proxy", "vllm", "kv-cache-manager"] {
        assert!(set.spans.iter().any(|s| set.service(s.instance) == service), "{service} is traced");
    }
    for name in ["vllm.kv_cache.transfer", "kvcache.manager.get_scores", "kvcache.events.process", "vllm.engine.step"] {
        assert!(set.spans.iter().any(|s| s.name == name), "{name} is there");
    }
    let file = std::fs::read_to_string(place.path("traces.otlp.jsonl")).expect("traces");
    let places = [
        ("the spans", format!("{:?}", set.spans)),
        ("the file of traces", file),
        ("the console", console.read()),
        ("a metrics page", pages),
        ("the log", log.read()),
    ];
    assert!(places[..4].iter().all(|(_, text)| text.contains(&model)), "the model is named");
    assert!(places[4].1.contains("the log is kept"));
    let token = TOKEN.to_string();
    let mut canaries: Vec<String> = ["zqx7", "coal-mine", PICTURE, &token].map(str::to_owned).to_vec();
    canaries.extend(answers);
    for (name, text) in &places {
        for canary in &canaries {
            assert!(!text.contains(canary.as_str()), "{canary:?} is in {name}: {}", around(text, canary));
        }
    }
    // The same by the product's own search; requests to engines themselves are nobody's calls.
    let checked = check(&set, "memory".to_owned(), &Options { canaries, ..Options::default() });
    let found: Vec<_> = checked.findings.iter().filter(|f| f.rule != "severed").collect();
    assert!(found.is_empty(), "{found:#?}");
}

/// What a scenario's requests say: the start of each prompt as text, and the ids of its first tokens.
fn prompts(file: &str, set: &[(String, String)]) -> Vec<String> {
    let scenario = igsim::scenario::load(std::path::Path::new(file), set).unwrap_or_else(|e| panic!("{e}")).config;
    let mut plan = Plan::new(&scenario, Seed(scenario.seed)).expect("a plan");
    let mut said = Vec::new();
    while let Some(request) = plan.next_arrival().expect("a plan") {
        let (mut tokens, mut text) = (Vec::new(), String::new());
        request.tokens(&mut tokens);
        tokens::push_text(&tokens, &mut text);
        said.push(text[..16].to_owned());
        // Shorter numbers stand anywhere by accident.
        said.extend(tokens.iter().take(4).map(|t| t.0.to_string()).filter(|id| id.len() >= 9));
    }
    said.sort();
    said.dedup();
    said
}

/// I8, of whole runs: no file and no terminal has what the client sent, whatever goes wrong.
#[test]
fn a_run_with_faults_writes_no_content_anywhere() {
    let place = Place::new();
    let faults = "faults: [{ kind: http_error, rate: 0.2, status: 503 }, { kind: cut_stream, rate: 0.3, after_tokens: 2 }, \
                  { kind: crash, at: 40ms, for: 20ms }]";
    let tiny = TINY.replace("{ count: 2, ", &format!("{{ count: 2, {faults}, "));
    place.write("faulty.yaml", &format!("{tiny}propagation_faults: [{{ kind: drop, by: gateway, share: 0.5 }}]\n"));
    let faulty = place.path("faulty.yaml").display().to_string();
    let mut runs = vec![(faulty.clone(), "live"), (faulty, "virtual")];
    let broken = names(&common::library()).into_iter().filter(|n| n.starts_with("propagation-"));
    runs.extend(broken.map(|name| (scenario(name.trim_end_matches(".yaml")), "virtual")));
    let env = [("RUST_LOG", "trace"), ("OTEL_TRACES_EXPORTER", "console")];
    for (i, (file, mode)) in runs.iter().enumerate() {
        let out = format!("out-{i}");
        let args = [
            "run",
            file,
            "--mode",
            mode,
            "--out",
            &out,
            "--set",
            "expectations={}",
            "--set",
            "requests=12",
            "--set",
            "tracing.exporters=[file, console]",
        ];
        let ran = place.ran_with(&env, &args);
        assert_eq!(ran.code, 0, "{file} {mode}: {ran:#?}");
        assert!(ran.err.contains("gateway.request"), "the console exporter prints to standard error");
        let mut everything = format!("{}{}", ran.out, ran.err);
        for name in names(&place.path(&out)) {
            let text = std::fs::read_to_string(place.path(&out).join(name)).expect("a file of the run");
            let _ = writeln!(everything, "{text}");
        }
        let said = prompts(file, &[("requests".to_owned(), "12".to_owned())]);
        assert!(said.len() >= 12, "{file}");
        for prompt in &said {
            assert!(
                !everything.contains(prompt.as_str()),
                "{file} {mode}: {prompt:?} in {}",
                around(&everything, prompt)
            );
        }
        // The product's own search agrees, whatever else it finds.
        place.write("said.txt", &said.join("\n"));
        let ran = place.ran(&["check", &out, "--canary-file", "said.txt"]);
        assert!(ran.code <= 1 && !ran.out.contains("content:"), "{file} {mode}: {ran:#?}");
    }
}
