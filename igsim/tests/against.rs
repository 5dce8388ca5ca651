//! `igsim run --gateway`: requests sent to a gateway that runs already, and a report of what the client alone can know.

mod common;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Stdio};

use common::collector::{closed_port, silent};
use common::{Place, Ran, by_trace, http, names, rows};
use igsim::inspect::TRACES_FILE;
use rustix::process::{Pid, Signal, kill_process};

/// `igsim up`: gateway and engines in a process of their own.
struct Served {
    place: Place,
    child: Child,
    url: String,
}

impl Served {
    fn start(set: &[&str]) -> Served {
        let place = Place::with_tiny();
        let mut command = place.igsim();
        command.args(["up", "tiny.yaml", "--out", "served"]).args(set.iter().flat_map(|s| ["--set", s]));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the program starts");
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines().map(Result::unwrap);
        let welcome: Vec<String> = lines.take_while(|l| !l.starts_with("OpenAI clients")).collect();
        let url = welcome.iter().find_map(|l| l.trim().strip_prefix("gateway "));
        let url = url.unwrap_or_else(|| panic!("{welcome:?}")).trim().to_owned();
        Served { place, child, url }
    }

    /// Stops it; the place with its traces.
    fn stop(mut self) -> Place {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        self.place
    }
}

/// Runs [`common::TINY`] against a gateway.
fn against(place: &Place, url: &str, more: &[&str]) -> Ran {
    place.ran(&[&["run", "tiny.yaml", "--gateway", url, "--out", "out"], more].concat())
}

#[test]
fn every_request_is_answered_by_a_gateway_that_runs_already() {
    let served = Served::start(&[]);
    let place = Place::with_tiny();
    let expectations =
        "expectations={ok: {min: 12}, errors: {max: 0}, engines.preemptions: {max: 0}, traces.findings: {max: 0}}";
    let ran = against(&place, &format!("{}/v1/", served.url), &["--set", expectations]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.out.contains(&format!("gateway {}, running already\n", served.url)), "{}", ran.out);
    assert!(ran.out.contains("the gateway's own: 12 of 12 answers name a trace"), "{}", ran.out);
    assert!(
        ran.out.contains("2 of 2 hold") && ran.out.contains("Written to out/   traces: where the gateway"),
        "{}",
        ran.out
    );
    assert!(!ran.out.contains("preemptions"), "nobody knows: {}", ran.out);
    let left_out: Vec<_> = ran.err.lines().filter(|l| l.starts_with("left out of the scenario: ")).collect();
    let [line] = left_out.as_slice() else { panic!("{}", ran.err) };
    assert!(line.ends_with("not judged: engines.preemptions, traces.findings"), "{line}");
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    assert_eq!(names(&place.path("out")), ["report.json", "requests.csv", "scenario.yaml"]);

    let report = place.report("out");
    assert_eq!((report.sent, report.ok, report.errors), (12, 12, 0));
    assert_eq!((report.ttft_ms.count, report.gateway_added_us.count), (12, 0));
    let gateway = report.gateway.expect("it ran already");
    assert_eq!((gateway.url.as_str(), gateway.traces_named), (served.url.as_str(), 12));
    let engines: Vec<_> = report.routing.endpoints.iter().map(|e| e.name.as_str()).collect();
    assert!(engines.iter().all(|name| name.starts_with("engine-")) && !engines.is_empty(), "{engines:?}");
    let text = std::fs::read_to_string(place.path("out/report.json")).unwrap();
    for unseen in ["\"engines\"", "\"traces\"", "\"gateway_added_us\"", "\"retries\"", "\"vllm\""] {
        assert!(!text.contains(unseen), "{unseen} in {text}");
    }

    // Where the traces are: with the gateway, under the ids of the table.
    let rows = rows(&place.path("out"));
    let theirs = served.stop();
    let traces = theirs.traces("served");
    let mut named: Vec<&String> = rows.iter().map(|r| &r["trace_id"]).collect();
    named.sort();
    assert_eq!(named, by_trace(&traces).keys().collect::<Vec<_>>());
}

#[test]
fn json_is_one_document_and_its_folder_has_no_traces() {
    let served = Served::start(&["tracing.ratio=0"]);
    let place = Place::with_tiny();
    let ran = against(&place, &served.url, &["--format", "json"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let report: igsim::report::Report = serde_json::from_str(&ran.out).expect("the report and nothing else");
    assert_eq!((report.ok, report.gateway.as_ref().unwrap().traces_named), (12, 0));
    assert!(report.table().contains("the gateway's own: no answer names a trace"), "{}", report.table());
    assert_eq!(ran.out, std::fs::read_to_string(place.path("out/report.json")).unwrap());
    assert!(!place.path("out").join(TRACES_FILE).exists());
    for command in ["inspect", "check", "explain"] {
        let ran = place.ran(&[command, "out"]);
        assert_eq!(ran.code, 2, "{ran:#?}");
        assert!(ran.err.contains("help: the run only sent requests") && ran.err.contains(&served.url), "{}", ran.err);
    }
    served.stop();
}

/// Any OpenAI-compatible server: it names no engine and no trace, and gets the headers that the user has for it.
#[test]
fn a_server_that_is_no_gateway_of_ours_is_asked_with_the_headers_given() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (backend, address) = runtime.block_on(http::Backend::start());
    let (place, url) = (Place::with_tiny(), format!("http://{address}"));
    let args = ["run", "tiny.yaml", "--gateway", &url, "--out", "out", "--set", "workload.streaming=0"];
    let env = [("GATEWAY_HEADERS", "Authorization=Bearer s3cret,x-team=a")];
    let ran = place.ran_with(&env, &args);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let doubt =
        "v1/models lists m; requests ask for meta-llama/Llama-3.1-8B-Instruct (workload.model, else engines[0].model)";
    assert!(ran.err.contains(doubt), "{}", ran.err);
    assert!(ran.out.contains("no answer names its engine  no prefix hits told\n"), "{}", ran.out);
    assert_eq!(place.report("out").ok, 12);
    let headers = backend.headers();
    assert_eq!(headers.len(), 12);
    for of in &headers {
        assert_eq!((&of["authorization"], &of["x-team"]), (&"Bearer s3cret".parse().unwrap(), &"a".parse().unwrap()));
        assert!(!of.contains_key("traceparent"), "the gateway decides what is traced");
    }
    let said = format!("{}{}", ran.out, ran.err);
    let files =
        names(&place.path("out")).into_iter().map(|f| std::fs::read_to_string(place.path("out").join(f)).unwrap());
    assert!(![said].into_iter().chain(files).any(|text| text.contains("s3cret")), "a secret is written down");
    let served_model = place.ran(&[&args[..], &["--set", "engines[0].model=m", "--overwrite"]].concat());
    assert!(served_model.code == 0 && !served_model.err.contains("warning"), "{served_model:#?}");
}

#[test]
fn what_cannot_be_is_told_before_anything_is_written() {
    let check = |args: &[&str], code: i32, says: &str| {
        let place = Place::with_tiny();
        let ran = place.ran(&[&["run", "tiny.yaml"], args].concat());
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{args:?}: {ran:#?}");
        assert!(ran.err.contains(says), "{args:?}: {}", ran.err);
        assert_eq!(place.names(), ["tiny.yaml"], "something is left behind");
    };
    check(&["--gateway", "ftp://h"], 2, "error: --gateway ftp://h: expected http:// or https://");
    check(
        &["--gateway", "h:1/x"],
        2,
        "h:1/x: found no address of a gateway, expected one such as http://127.0.0.1:8080",
    );
    check(
        &["--gateway", "http://u:s3cret@h"],
        2,
        "http://h: found credentials in a URL, expected them in GATEWAY_HEADERS",
    );
    check(
        &["--gateway", "http://h", "--mode", "virtual"],
        2,
        "error: tiny.yaml: mode: found virtual beside --gateway, expected live",
    );
    for option in [&["--sampling", "1"][..], &["--otlp", "http://h"], &["--detail", "3"], &["--access-log"]] {
        let says = format!("'--gateway <URL>' cannot be used with '{}", option[0]);
        check(&[&["--gateway", "http://h"], option].concat(), 2, &says);
    }
    let closed = format!("http://{}", closed_port());
    check(&["--gateway", &closed], 3, &format!("error: {closed}: cannot reach a gateway: Connection refused"));
    check(&["--gateway", &closed], 3, "help: GET");
    // It answers, but not in HTTP.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", other.local_addr().unwrap());
    let thread = std::thread::spawn(move || drop(other.accept().unwrap()));
    check(&["--gateway", &url], 3, "cannot reach a gateway: ");
    thread.join().unwrap();
}

/// It accepts and never answers: the run ends before it begins.
#[test]
fn a_gateway_that_never_answers_is_not_reached() {
    let (_listener, url) = silent();
    let place = Place::with_tiny();
    let ran = against(&place, &url, &[]);
    assert_eq!(ran.code, 3, "{ran:#?}");
    assert!(ran.err.contains("cannot reach a gateway: no answer in 5"), "{}", ran.err);
}

#[test]
fn an_interrupted_run_reports_what_was_done() {
    let served = Served::start(&["tracing.ratio=0"]);
    let place = Place::with_tiny();
    let mut command = place.igsim();
    command.args(["run", "tiny.yaml", "--gateway", &served.url, "--out", "out", "--set", "requests=100000000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut err = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    // Progress says that requests have been answered.
    let told: Vec<String> = err.by_ref().take_while(|l| !l.contains(" requests  ")).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let rest: Vec<String> = err.collect();
    let ran = Ran::of(child.wait_with_output());
    assert_eq!(ran.code, 0, "{ran:#?} {rest:?}");
    let report = place.report("out");
    assert!(report.interrupted && report.ok > 0, "{report:#?}");
    assert_eq!((report.errors, report.sent), (0, rows(&place.path("out")).len() as u64));
    served.stop();
}
