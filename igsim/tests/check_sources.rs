//! Where `igsim check` takes traces from, what it says of them, and how it ends: folders, files, a Tempo, llm-d's own traces.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use common::{Place, by_trace};
use igsim::check::{Options, check};
use shared::ids::{InstanceId, SpanId, TraceId};
use shared::time::{Anchor, Time};
use shared::trace::Naming;
use shared::trace::{Kind, Resource, Span, Status, TraceSet, otlp_json};

/// Traces of a run as a Tempo gives them out.
#[derive(Clone, Default)]
struct Tempo(Arc<BTreeMap<String, String>>);

impl Tempo {
    fn of(set: &TraceSet) -> Tempo {
        let resources: Vec<Arc<Resource>> = set.resources.iter().cloned().map(Arc::new).collect();
        let one = |(id, spans): (String, Vec<&Span>)| {
            let (spans, mut json) = (spans.into_iter().cloned().collect::<Vec<_>>(), Vec::new());
            otlp_json::write(&spans, &resources, set.anchor, &mut json).expect("spans can be written");
            (id, String::from_utf8(json).expect("UTF-8"))
        };
        Tempo(Arc::new(by_trace(set).into_iter().map(one).collect()))
    }

    /// Serves on a free port.
    fn start(self, runtime: &tokio::runtime::Runtime) -> SocketAddr {
        let router =
            Router::new().route("/api/search", get(search)).route("/api/traces/{id}", get(trace)).with_state(self);
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            tokio::spawn(async move { axum::serve(listener, router).await });
            address
        })
    }
}

async fn search(State(tempo): State<Tempo>, Query(asked): Query<BTreeMap<String, String>>) -> Response {
    match asked.get("q").map(String::as_str) {
        Some("{ name = \"gateway.request\" }") => {}
        Some("{}") => return r#"{"traces":[],"metrics":{}}"#.into_response(),
        Some("{ gone }") => return r#"{"traces":[{"traceID":"abc"}]}"#.into_response(),
        _ => return (StatusCode::BAD_REQUEST, "invalid TraceQL query: parse error at line 1").into_response(),
    }
    let limit: usize = asked["limit"].parse().expect("a number");
    let named = |id: &String| format!("{{\"traceID\":\"{}\",\"durationMs\":3}}", id.trim_start_matches('0'));
    let all: Vec<String> = tempo.0.keys().take(limit).map(named).collect();
    format!("{{\"traces\":[{}],\"metrics\":{{\"inspectedBytes\":\"12\"}}}}", all.join(",")).into_response()
}

async fn trace(State(tempo): State<Tempo>, Path(id): Path<String>) -> Response {
    match tempo.0.get(&id) {
        Some(document) => document.replace("resourceSpans", "batches").into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// A tiny run in virtual time, in the folder `out`.
fn tiny() -> (Place, TraceSet) {
    let place = Place::with_tiny();
    place.good(&["run", "tiny.yaml", "--mode", "virtual", "--out", "out"]);
    let set = place.traces("out");
    (place, set)
}

#[test]
fn a_tempo_is_asked_by_query_and_by_id() {
    let (place, mut set) = tiny();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let address = Tempo::of(&set).start(&runtime);
    let url = format!("http://{address}");
    let query = ["--query", "{ name = \"gateway.request\" }"];
    let ran = place.good(&[["check", &url].as_slice(), &query].concat());
    assert_eq!(ran.out, format!("{url}: 12 traces, 288 spans, 3 service instances\nno findings\n"));
    let ran = place.good(&[["check", "--tempo", &url, "--limit", "5"].as_slice(), &query].concat());
    assert!(ran.out.contains(": 5 traces, "), "{}", ran.out);
    let says = |args: &[&str], code: i32, expect: &str| {
        let ran = place.ran(&[&["check", url.as_str()], args].concat());
        assert_eq!(ran.code, code, "{args:?}: {ran:#?}");
        assert!(format!("{}{}", ran.out, ran.err).contains(expect), "{args:?}: {ran:#?}");
    };
    says(&["--query", "{ bad"], 2, "Tempo refuses the query (400 Bad Request): invalid TraceQL query: parse error");
    says(&["--query", "{}"], 2, "the query finds no trace");
    says(&["--query", "{ gone }"], 1, "trace 00000000000000000000000000000abc: the search finds it");
    says(&[], 2, "--query: found none");
    says(&["--query", "{}", "--start", "yesterday"], 2, "expected seconds since 1970");
    // One of its traces is broken.
    let at = set.spans.iter().position(|s| s.name == "gateway.request").expect("a root");
    set.spans.remove(at);
    let url = format!("http://{}", Tempo::of(&set).start(&runtime));
    let ran = place.ran(&[["check", &url].as_slice(), &query].concat());
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.out.contains("orphan: ") && ran.out.contains("  help: the parent's record was dropped"), "{}", ran.out);
}

#[test]
fn who_is_not_there_is_told_from_what_is_wrong() {
    let place = Place::new();
    // A port that was just free.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
    let ran = place.ran(&["check", &format!("http://{gone}"), "--query", "{}"]);
    assert_eq!(ran.code, 3, "{ran:#?}");
    assert!(ran.err.starts_with(&format!("error: cannot reach http://{gone}/api/search")), "{}", ran.err);
    place.write("empty.jsonl", "");
    place.write("broken.jsonl", "{\"resourceSpans\": 7}\n");
    let bad = |args: &[&str], expect: &str| {
        let ran = place.ran(&[&["check"], args].concat());
        assert_eq!(ran.code, 2, "{args:?}: {ran:#?}");
        assert!(ran.err.contains(expect), "{args:?}: {}", ran.err);
    };
    bad(&[], "PATH|URL");
    bad(&["nowhere.jsonl"], "nowhere.jsonl: ");
    bad(&["empty.jsonl"], "empty.jsonl: found no span");
    bad(&["broken.jsonl"], "broken.jsonl:1: ");
    bad(&["empty.jsonl", "--query", "{}"], "--query, --start and --end are for a Tempo");
    bad(&["empty.jsonl", "--canary", "abc"], "canary 1: found fewer than 4 characters");
    bad(&["http://?", "--query", "{}"], "expected one such as http://127.0.0.1:3200");
}

/// A file of one document over several lines, as tools that are kind to people write it.
#[test]
fn a_file_may_be_one_document() {
    let (place, _) = tiny();
    let lines = std::fs::read_to_string(place.path("out/traces.otlp.jsonl")).expect("traces");
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    place.write("one.json", &format!("{first:#}"));
    let ran = place.ran(&["check", "one.json", "--format", "json"]);
    let checked: serde_json::Value = serde_json::from_str(&ran.out).expect("one document");
    assert_eq!(checked["source"], "one.json");
    assert!(checked["spans"].as_u64().is_some_and(|n| n > 0), "{}", ran.out);
}

#[test]
fn canaries_are_looked_for_in_spans_and_in_files() {
    let (place, set) = tiny();
    let model = "Llama-3.1-8B";
    let ran = place.ran(&["check", "out", "--canary", "not there", "--canary", model]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.out.contains("canary 2 is in its attribute `gen_ai.request.model`"), "{}", ran.out);
    assert!(ran.out.contains("canary 2 is in the file scenario.yaml") || !place_has(&place, model), "{}", ran.out);
    assert!(!ran.out.contains("canary 1"), "{}", ran.out);
    place.write("canaries.txt", "not there\n\nnor this\n");
    place.good(&["check", "out", "--canary-file", "canaries.txt"]);
    std::fs::write(place.path("out/notes.txt"), "well: nor this, one would think").expect("the folder can be written");
    let ran = place.ran(&["check", "out", "--canary-file", "canaries.txt"]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.out.contains("canary 2 is in the file notes.txt"), "{}", ran.out);
    assert!(!ran.out.contains("nor this"), "what was found is not repeated: {}", ran.out);
    assert!(set.spans.len() > 100);
}

fn place_has(place: &Place, text: &str) -> bool {
    std::fs::read_to_string(place.path("out/scenario.yaml")).is_ok_and(|s| s.contains(text))
}

#[test]
fn a_folder_tells_which_traces_it_should_have() {
    let (place, set) = tiny();
    let path = place.path("out/traces.otlp.jsonl");
    let lost = set.spans[0].trace_id;
    let resources: Vec<Arc<Resource>> = set.resources.iter().cloned().map(Arc::new).collect();
    let kept: Vec<Span> = set.spans.iter().filter(|s| s.trace_id != lost).cloned().collect();
    let mut json = Vec::new();
    otlp_json::write(&kept, &resources, set.anchor, &mut json).expect("spans can be written");
    std::fs::write(path, json).expect("the folder can be written");
    let ran = place.ran(&["check", "out"]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.out.contains(&format!("trace {lost}: the request was recorded (requests.csv)")), "{}", ran.out);
}

/// A request through llm-d's endpoint picker, sidecar and two engines, as its blog shows it but for the faults.
fn llm_d() -> TraceSet {
    let mut set = TraceSet::new(Anchor::VIRTUAL);
    for (service, instance) in
        [("llm-d-epp", "e"), ("llm-d-disagg-sidecar", "s"), ("vllm-prefill", "p"), ("vllm-decode", "d")]
    {
        set.resources.push(Resource::new(service, instance));
    }
    let mut add = |id: u64, parent: u64, service: u16, name: &'static str, kind: Kind, at: (u64, u64)| {
        set.spans.push(Span {
            trace_id: TraceId::new(1).expect("not zero"),
            span_id: SpanId::new(id).expect("not zero"),
            parent: SpanId::new(parent),
            parent_is_remote: false,
            tracestate: None,
            instance: InstanceId(service),
            name: name.into(),
            kind,
            start: Time::from_nanos(at.0 * 1_000_000),
            end: Time::from_nanos(at.1 * 1_000_000),
            attrs: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        });
    };
    let (server, client, inner) = (Kind::Server, Kind::Client, Kind::Internal);
    // A caller's own trace, whose spans are elsewhere.
    add(1, 100, 0, "request", server, (0, 3146));
    add(2, 1, 0, "request_orchestration", inner, (0, 2));
    add(3, 2, 0, "prepare_disaggregation", inner, (1, 2));
    add(4, 1, 1, "POST /v1/chat/completions", server, (3, 3145));
    add(5, 4, 1, "forward_request", inner, (3, 3145));
    add(6, 5, 1, "prefill", inner, (3, 53));
    add(7, 6, 1, "HTTP POST", client, (4, 53));
    add(8, 7, 2, "llm_request", server, (5, 52));
    add(9, 5, 1, "decode", inner, (53, 3145));
    add(10, 9, 1, "HTTP POST", client, (54, 3144));
    add(11, 10, 3, "llm_request", server, (55, 3143));
    set.spans[2].set("llm_d.epp.pd.disaggregation_used", true);
    for (call, port) in [(6, 8000u16), (9, 8200)] {
        set.spans[call]
            .set("http.response.status_code", 200u16)
            .set("server.address", "10.0.0.5")
            .set("server.port", port);
    }
    // Its exporter does not say whether parents are remote.
    set.flags_known = false;
    set
}

#[test]
fn llm_ds_own_traces_are_checked_by_their_names() {
    let broken = |fault: fn(&mut TraceSet)| {
        let mut set = llm_d();
        fault(&mut set);
        let options = Options { naming: Some(Naming::LlmD), ..Options::default() };
        let checked = check(&set, "test".to_owned(), &options);
        checked.findings.iter().map(|f| f.rule).collect::<BTreeSet<_>>()
    };
    let check = |rules: &[&'static str], fault: fn(&mut TraceSet)| {
        assert_eq!(broken(fault), rules.iter().copied().collect::<BTreeSet<_>>());
    };
    check(&[], |_| {});
    // Errors without `error.type` are no fault of theirs.
    check(&[], |set| set.spans[8].status = Status::Error("decode request failed".into()));
    // As it is: orchestration and forwarding are server spans, the decode hangs below the prefill, two plugins prepare.
    check(&["ended-parent", "local-server", "repeated"], |set| {
        for inner in [1, 4] {
            set.spans[inner].kind = Kind::Server;
        }
        set.spans[8].parent = SpanId::new(6);
        let twice = Span { span_id: SpanId::new(12).expect("not zero"), ..set.spans[2].clone() };
        set.spans.push(twice);
    });
    // The sidecar does not trace: the engines hang on the endpoint picker.
    check(&["untraced"], |set| {
        set.spans.retain(|s| s.instance != InstanceId(1));
        set.spans.iter_mut().filter(|s| s.name == "llm_request").for_each(|s| s.parent = SpanId::new(1));
    });
    // A duplicated `traceparent`: the sidecar hangs beside the endpoint picker, on whoever called that.
    check(&["one-root", "sibling"], |set| set.spans[3].parent = SpanId::new(100));
    // An engine without tracing, or with a decision of its own.
    check(&["untraced"], |set| drop(set.spans.remove(10)));
    check(&["service-name"], |set| set.resources[3].service_name = "unknown_service".to_owned());
    check(&["orphan"], |set| drop(set.spans.remove(4)));
    check(&["clock-skew"], |set| {
        let engine = &mut set.spans[10];
        (engine.start, engine.end) = (Time::from_nanos(10_000_000), Time::from_nanos(3_000_000_000));
    });
}
