//! The library of questions: names and keys against the registry, the document, the command, and, where `TEMPO_URL` names a Tempo,
//! every answer against one computed from the spans that were sent.

#[path = "../common/mod.rs"]
mod common;

mod answers;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;

use answers::{Sent, figures, matches};
use common::tempo::{Server, lately};
use common::{Place, library, traceql};
use igsim::queries::{self, Answers, QUERIES, Query, Shape};
use shared::clock::RunClock;
use shared::ids::TraceId;
use shared::time::{Dur, Time};
use shared::trace::registry::Registry;
use shared::trace::tree::value_text;
use shared::trace::{Event, TraceSet};

/// How long Tempo may take to merge what it has of a trace.
const PATIENCE: Dur = Dur::from_secs(90);

/// Above what is generated.
const HEAD: &str = "# Questions to traces

<!-- Generated from igsim/src/queries/library.rs. `UPDATE_DOCS=1 cargo test -p igsim --test queries` writes it anew. -->

`igsim query NAME` asks Grafana Tempo one of these questions and prints the answer as a table, `--format json` as one document,
`--print` only the TraceQL, to be pasted into Grafana. [tempo.md](tempo.md) says how to start a Tempo and send traces to it.

    igsim query --list
    igsim query slow-requests --set over=1s
    igsim query errors --start 24h --where 'resource.service.namespace = \"staging\"'

Without `--start` the last hour is asked about. `--tempo URL` or `TEMPO_URL` names another Tempo than `http://127.0.0.1:3200`; headers
for it, credentials among them, stand in `TEMPO_HEADERS`. Thresholds below are the defaults that have answers on the run named with each
question. Names and keys are those of [spans.md](spans.md). A test sends those runs to a Tempo 3.0 and compares its answers with ones
computed from the spans.

";

#[test]
fn every_query_names_what_is_registered() {
    let registry = Registry::builtin().unwrap();
    for query in QUERIES {
        let text = query.render(&[], Some("resource.service.name = \"vllm\"")).unwrap();
        assert_eq!(traceql::complaints(&text, &registry), Vec::<String>::new(), "{}: {text}", query.name);
    }
}

#[test]
fn what_is_not_registered_is_noticed() {
    let registry = Registry::builtin().unwrap();
    let check = |query: &str, expect: &str| {
        let found = traceql::complaints(query, &registry);
        assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), [expect], "{query}");
    };
    check("{ name = \"gateway.reqest\" }", "no span is called gateway.reqest");
    check("{ event:name = \"gateway.retri\" }", "no event is called gateway.retri");
    check("{ name = \"gateway.request\" && span.vllm.late = true }", "vllm.late is on none of [\"gateway.request\"]");
    check("{ name = \"gateway.request\" } | select(span.vllm.late)", "vllm.late is on none of [\"gateway.request\"]");
    check("{ span.gateway.nothing = 1 }", "gateway.nothing is not registered");
    check("{ } | rate() by (resource.service.instance)", "no resource has service.instance");
    check(
        "{ span.gateway.queue.wait_ms > 100 }",
        "gateway.queue.wait_ms is compared with Plain(\"100\"), its type is Double",
    );
    check("{ span.vllm.queue.position > 1.0 }", "vllm.queue.position is compared with Plain(\"1.0\"), its type is Int");
}

#[test]
fn the_document_is_what_the_library_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/queries.md");
    let expect = format!("{HEAD}{}", queries::markdown());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &expect).expect("docs/queries.md can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let line = found.lines().zip(expect.lines()).take_while(|(f, e)| f == e).count() + 1;
    assert!(
        found == expect,
        "docs/queries.md is not what the library says, from line {line} on: UPDATE_DOCS=1 cargo test -p igsim --test queries writes it"
    );
}

/// Answers one request with `status` and `body`; the first line of the request.
fn answers_once(status: &str, body: &'static str) -> (String, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let status = status.to_owned();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let first = lines.next().unwrap();
        lines.take_while(|l| !l.is_empty()).for_each(drop);
        let length = body.len();
        write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}").unwrap();
        first
    });
    (url, served)
}

#[test]
fn the_command_lists_prints_asks_and_says_what_is_wrong() {
    let place = Place::new();
    let list = place.good(&["query", "--list"]).out;
    assert_eq!(list.lines().count(), QUERIES.len());
    let print = place.good(&["query", "preempted", "--set", "over=2", "--print"]).out;
    assert!(print.starts_with("{ name = \"vllm.engine.request\" && span.vllm.request.preemptions > 2 }"), "{print}");
    let json: serde_json::Value =
        serde_json::from_str(&place.good(&["query", "--list", "--format", "json"]).out).unwrap();
    assert_eq!(json.as_array().map(Vec::len), Some(QUERIES.len()));

    let check = |args: &[&str], code: i32, says: &str| {
        let ran = place.ran(args);
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{args:?}: {ran:#?}");
        assert!(ran.err.contains(says), "{args:?}: {ran:#?}");
    };
    check(&["query"], 2, "required");
    check(&["query", "nothing"], 2, "error: nothing: found no such query; igsim query --list shows what there is");
    check(&["query", "errors", "--set", "a=1"], 2, "error: errors: found the parameter a, expected none");
    check(&["query", "errors", "--start", "soon"], 2, "error: --start: found \"soon\", expected how long ago (1h)");
    check(&["query", "errors", "--start", "1h", "--end", "2h"], 2, "which is not before the end");
    check(&["query", "errors", "--tempo", "http://u:secret@h"], 2, "error: http://h: found credentials in a URL");
    check(&["query", "errors", "--tempo", "http://127.0.0.1:1"], 3, "error: http://127.0.0.1:1: ");
    let (url, _served) = answers_once("400 Bad Request", "invalid TraceQL query");
    check(&["query", "errors", "--tempo", &url], 2, "answered 400: invalid TraceQL query");
    let (url, _served) = answers_once("200 OK", "<html>");
    check(&["query", "errors", "--tempo", &url], 3, "answered something else than Tempo does");
}

#[test]
fn the_command_asks_tempo_and_prints_a_table() {
    let body = r#"{"traces": [{"traceID": "ab", "rootTraceName": "gateway.request", "durationMs": 70, "spanSets": [{"matched": 1,
        "spans": [{"spanID": "01", "name": "vllm.engine.queue", "startTimeUnixNano": "5", "durationNanos": "60000000",
        "attributes": [{"key": "vllm.queue.reason", "value": {"stringValue": "capacity"}}]}]}]}]}"#;
    let place = Place::new();
    let ask = |extra: &[&str]| {
        let (url, served) = answers_once("200 OK", body);
        let args = ["query", "engine-queue", "--set", "over=50ms", "--start", "100", "--end", "200", "--tempo", &url];
        (place.good(&[args.as_slice(), extra].concat()).out, served.join().unwrap())
    };
    let (text, asked) = ask(&["--limit", "7"]);
    assert!(asked.starts_with(
        "GET /api/search?q=%7B%20name%20%3D%20%22vllm.engine.queue%22%20%26%26%20duration%20%3E%2050ms%20%7D"
    ));
    assert!(asked.ends_with("&start=100&end=200&limit=7&spss=100 HTTP/1.1"), "{asked}");
    let row = text.lines().find(|l| l.starts_with("000000000000000000000000000000ab")).expect("a row");
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[1..], ["gateway.request", "70", "ms", "vllm.engine.queue", "60.0", "ms", "capacity"], "{text}");
    let (json, _) = ask(&["--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["query"], &json["start"]), (&"engine-queue".into(), &100.into()));
    let span = &json["traces"][0]["spans"][0];
    assert_eq!(
        (&span["span_id"], &span["attributes"]["vllm.queue.reason"]),
        (&"0000000000000001".into(), &"capacity".into())
    );
}

/// Asks Tempo until its answer is the expected one, and says how large that is. Tempo takes the spans of a trace in in parts, one for
/// each service; until it has merged what it wrote of them, a search may see one part only.
fn compare(server: &Server, sent: &Sent, query: &Query) -> usize {
    let clock = RunClock::start();
    loop {
        match difference(server, sent, query) {
            Ok(answers) => return answers,
            Err(difference) if clock.now().since(Time::ZERO) > PATIENCE => panic!("{}: {difference}", sent.name),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(500)),
        }
    }
}

/// How large the answer is, or how it differs from what is expected.
fn difference(server: &Server, sent: &Sent, query: &Query) -> Result<usize, String> {
    let links = sent.set.spans.iter().flat_map(|s| &s.links).map(|l| l.trace_id);
    let trace = links.min().unwrap_or(TraceId::new(1).unwrap());
    let set = if query.name == "engine-steps" { vec![("trace".to_owned(), trace.to_string())] } else { Vec::new() };
    let traceql = query.render(&set, Some(&sent.only)).unwrap();
    let ensure =
        |good: bool, what: &dyn Fn() -> String| if good { Ok(()) } else { Err(format!("{traceql}: {}", what())) };
    match query.shape() {
        Shape::Spans => {
            let found = server.tempo.search(&traceql, lately(), 100_000).unwrap_or_else(|e| panic!("{traceql}: {e}"));
            let about = sent.set.spans.iter().filter(|s| matches(query.name, sent, s, trace));
            let expect: BTreeSet<_> = about.map(|s| (s.trace_id, s.span_id)).collect();
            let matched: u64 = found.iter().map(|f| f.matched).sum();
            ensure(matched == expect.len() as u64, &|| format!("{matched} spans, expected {}", expect.len()))?;
            let ids: BTreeSet<_> = found.iter().flat_map(|f| f.spans.iter().map(|s| (f.trace_id, s.span_id))).collect();
            // Of a trace with more spans than Tempo shows, those that it shows.
            ensure(ids.is_subset(&expect), &|| format!("one too many: {:?}", ids.difference(&expect).next()))?;
            let whole = found.iter().all(|f| f.matched == f.spans.len() as u64);
            ensure(!whole || ids == expect, &|| format!("one is missing: {:?}", expect.difference(&ids).next()))?;
            for (trace, span) in found.iter().flat_map(|f| f.spans.iter().map(move |s| (f, s))) {
                let ours = &sent.set.spans[sent.by_id[&(trace.trace_id, span.span_id)]];
                ensure(span.duration_nanos == (ours.end - ours.start).as_nanos(), &|| format!("{span:?}"))?;
                for (key, value) in span.attributes.iter().filter(|(key, _)| ours.get(key).is_some()) {
                    let same = Some(value_text(value)) == ours.get(key).map(value_text);
                    ensure(same, &|| format!("{key} is {value:?} in {ours:?}"))?;
                }
            }
            Ok(expect.len())
        }
        Shape::Figures => {
            let found = server.tempo.metrics(&traceql, lately()).unwrap_or_else(|e| panic!("{traceql}: {e}"));
            let (expect, exactness) = figures(query.name, sent);
            let labelled = found.iter().filter(|s| s.labels.iter().all(|(key, _)| key != "__name__"));
            let found: BTreeMap<Vec<String>, f64> =
                labelled.map(|s| (s.labels.iter().map(|(_, v)| value_text(v)).collect(), s.value)).collect();
            ensure(found.keys().eq(expect.keys()), &|| format!("{found:?}, expected {expect:?}"))?;
            for (labels, expect) in &expect {
                let found = found[labels];
                let close = found <= expect * (1.0 + exactness) && found >= expect / (1.0 + exactness);
                ensure(close, &|| format!("{labels:?}: {found}, expected {expect}"))?;
            }
            Ok(expect.len())
        }
    }
}

/// The traces of a run with the arguments of `igsim run`.
fn traces_of(arguments: &str) -> TraceSet {
    let place = Place::new();
    let file = |a: &str| match a.strip_prefix("scenarios/") {
        Some(file) => library().join(file).display().to_string(),
        None => a.to_owned(),
    };
    let mut args = vec!["run".to_owned()];
    args.extend(arguments.split_whitespace().map(file));
    args.extend(["--out".to_owned(), "out".to_owned()]);
    place.good(&args.iter().map(String::as_str).collect::<Vec<_>>());
    place.traces("out")
}

/// Conversations, and what no scenario in virtual time leaves in its traces: sessions named, callers gone, records cut.
fn edited() -> TraceSet {
    let mut set = traces_of("scenarios/multi-turn.yaml --sampling 1 --set duration=20s");
    let mut requests = 0;
    for span in &mut set.spans {
        if span.name == "gateway.request" {
            requests += 1;
            if requests % 2 == 0 {
                span.set("session.id", format!("session-{requests}"));
            }
            if requests % 10 == 0 {
                let at = span.end;
                span.events.push(Event { name: "gateway.client_disconnected".into(), at, attrs: Vec::new() });
            }
        }
        if span.name == "vllm.engine.request" && requests % 7 == 0 {
            span.set("vllm.record.facts_cut", 3i64);
        }
    }
    set
}

#[test]
fn the_answers_of_tempo_are_those_of_the_spans() {
    let Some(server) = Server::given("the answers of the query library") else { return };
    let runs: BTreeSet<&str> = QUERIES
        .iter()
        .filter_map(|q| match q.answers {
            Answers::Run(arguments) => Some(arguments),
            Answers::Else(_) => None,
        })
        .collect();
    let steps = "scenarios/quickstart.yaml --mode virtual --sampling 1 --engine-steps 0.05";
    let mut sets: Vec<(&str, TraceSet)> = runs.into_iter().chain([steps]).map(|run| (run, traces_of(run))).collect();
    sets.push(("edited", edited()));
    let mut answered: BTreeMap<&str, usize> = BTreeMap::new();
    for (run, set) in sets {
        let sent = Sent::new(&server, run.to_owned(), set);
        for query in QUERIES {
            let answers = compare(&server, &sent, query);
            assert!(answers > 0 || query.answers != Answers::Run(run), "{} has no answer on {run}", query.name);
            *answered.entry(query.name).or_default() += answers;
        }
    }
    let silent: Vec<_> = answered.iter().filter(|(_, n)| **n == 0).collect();
    assert!(silent.is_empty(), "never answered: {silent:?}");
    println!("{answered:#?}");
}
