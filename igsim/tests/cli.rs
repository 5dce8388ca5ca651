//! The command line as its users meet it: exit codes, messages, what is printed where, what is left behind.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use common::{Place, Ran, SPANS_PER_TRACE, by_trace, library, names, rows, scenario};
use igsim::inspect::{TRACES_FILE, Traces};
use igsim::report::Report;
use rustix::process::{Pid, Signal, kill_process};
use shared::clock::RunClock;
use shared::time::Dur;

const VIRTUAL: [&str; 6] = ["run", "tiny.yaml", "--mode", "virtual", "--out", "out"];

#[test]
fn exit_codes_say_what_went_wrong() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = format!("listen.gateway={}", taken.local_addr().unwrap());
    let check = |args: &[&str], code: i32, says: &str| {
        let place = Place::with_tiny();
        let ran = place.ran(args);
        assert_eq!(ran.code, code, "{args:?}: {ran:#?}");
        assert!(format!("{}{}", ran.out, ran.err).contains(says), "{args:?}: {ran:#?}");
        ran
    };
    check(&["--help"], 0, "Exit codes: 0 good, 1 an expectation");
    check(&["run", "--help"], 0, "Examples:\n  igsim run");
    check(&["--version"], 0, "igsim ");
    check(&VIRTUAL, 0, "12 of 12 traces kept");
    let expectation = check(&[&VIRTUAL[..], &["--set", "expectations={ok: {min: 13}}"]].concat(), 1, "ok");
    assert!(expectation.out.contains("at least 13"), "the report says which: {}", expectation.out);
    for usage in [&["frobnicate"][..], &["run"], &["run", "tiny.yaml", "--sampling", "2"]] {
        check(usage, 2, "For more information, try '--help'");
    }
    check(&["run", "nowhere.yaml"], 2, "nowhere.yaml: found no such file, expected a readable YAML file");
    check(&["inspect", "nowhere"], 2, "nowhere");
    check(&["send", "nowhere", "--otlp", "http://127.0.0.1:1"], 2, "nowhere");
    check(&["run", "tiny.yaml", "--mode", "live", "--set", &gateway], 3, "cannot listen on");
}

#[test]
fn a_failed_expectation_leaves_a_whole_report() {
    let place = Place::with_tiny();
    assert_eq!(place.ran(&[&VIRTUAL[..], &["--set", "expectations={ok: {min: 13}}"]].concat()).code, 1);
    let report = place.report("out");
    let verdicts: Vec<_> = report.expectations.iter().map(|v| (v.path.as_str(), v.value, v.pass)).collect();
    assert_eq!(verdicts, [("ok", Some(12.0), false)]);
}

/// Runs a scenario file that is wrong; nothing may be left behind. What it says.
fn refused(text: &str) -> String {
    let place = Place::new();
    place.write("bad.yaml", text);
    let ran = place.ran(&["run", "bad.yaml"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{ran:#?}");
    assert_eq!(place.names(), ["bad.yaml"], "something is left behind");
    let validated = place.ran(&["validate", "bad.yaml"]);
    assert_eq!((validated.code, &validated.err), (2, &ran.err), "validate says the same");
    ran.err
}

/// A good scenario with a line of `workload.arrivals` and more lines at its end.
fn with(arrivals: &str, more: &str) -> String {
    format!("name: bad\nrequests: 5\nengines: [{{ count: 1 }}]\nworkload:\n  arrivals: {arrivals}\n{more}")
}

const ARRIVALS: &str = "{ process: poisson, rate: 10 }";

#[test]
fn an_unknown_key_is_refused_with_the_likely_one() {
    insta::assert_snapshot!(refused(&with(ARRIVALS, "tracng: { ratio: 1 }\n")), @r"
    error: bad.yaml: tracng: found an unknown key, expected one of description, duration, engines, expectations, gateway, listen, metrics, mode, name, network, propagation_faults, requests, seed, trace, tracing, workload
       6 | tracng: { ratio: 1 }
         | ^^^^^^
    help: did you mean tracing?
    ");
}

#[test]
fn a_negative_rate_is_refused() {
    insta::assert_snapshot!(refused(&with("{ process: poisson, rate: -3 }", "")), @r"
    error: bad.yaml: workload.arrivals.rate: found -3, expected a number of at least 0
       5 |   arrivals: { process: poisson, rate: -3 }
         |                                       ^^
    ");
}

#[test]
fn a_trace_that_is_not_there_is_refused() {
    let text = "name: bad\nengines: [{ count: 1 }]\ntrace: { format: azure, path: nowhere.csv }\n";
    insta::assert_snapshot!(refused(text), @r#"
    error: bad.yaml: trace.path: found no file "nowhere.csv", expected a trace file
       3 | trace: { format: azure, path: nowhere.csv }
         |                               ^^^^^^^^^^^
    help: give the path of yours with --set trace.path=FILE; scenarios/README.md says where traces come from
    "#);
}

#[test]
fn an_unknown_plugin_is_refused_with_the_known_ones() {
    insta::assert_snapshot!(refused(&with(ARRIVALS, "gateway: { profile: { scorers: [{ type: prefix-cash-scorer }] } }\n")), @r#"
    error: bad.yaml: gateway.profile.scorers[0].type: found "prefix-cash-scorer", expected one of queue-scorer, running-requests-size-scorer, kv-cache-utilization-scorer, load-aware-scorer, lora-affinity-scorer, active-request-scorer, token-load-scorer, prefix-cache-scorer, precise-prefix-cache-scorer, no-hit-lru-scorer, session-affinity-scorer, context-length-aware, latency-scorer
       6 | gateway: { profile: { scorers: [{ type: prefix-cash-scorer }] } }
         |                                         ^^^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_port_that_is_given_twice_is_refused() {
    insta::assert_snapshot!(refused(&with(ARRIVALS, "listen: { gateway: 127.0.0.1:8100, engines: 127.0.0.1:8100 }\n")), @r"
    error: bad.yaml: listen.engines: found port 8100, which the gateway has, expected ports of its own
       6 | listen: { gateway: 127.0.0.1:8100, engines: 127.0.0.1:8100 }
         |                                             ^^^^^^^^^^^^^^
    ");
}

#[test]
fn a_weight_that_is_no_number_is_refused() {
    insta::assert_snapshot!(refused(&with(ARRIVALS, "gateway: { profile: { scorers: [{ type: queue-scorer, weight: .nan }] } }\n")), @r"
    error: bad.yaml: gateway.profile.scorers[0].weight: found .nan, expected a finite number
       6 | gateway: { profile: { scorers: [{ type: queue-scorer, weight: .nan }] } }
         |                                                               ^^^^
    ");
}

#[test]
fn all_problems_are_told_at_once() {
    let more = "duration: 10s\nexpectations: { errrors: { max: 0 } }\ntracing: { exporters: [file, none] }\n";
    let text =
        with(ARRIVALS, more).replace("name: bad", "name: bad name").replace("count: 1", "profile: llama-3.1-8b-h10");
    insta::assert_snapshot!(refused(&text), @r#"
    error: bad.yaml: name: found "bad name", expected 1 to 64 of the characters A-Z a-z 0-9 - _ . not starting with a dot
       1 | name: bad name
         |       ^^^^^^^^
    error: bad.yaml: requests: found both duration and requests, expected one of the two
       2 | requests: 5
         |           ^
    error: bad.yaml: engines[0].profile: found llama-3.1-8b-h10, expected one of llama-3.1-8b-h100, llama-3.1-8b-fp8-h200, llama-3.1-8b-rtxpro6000, llama-3.1-8b-rtxpro6000-tp2, qwen3-32b-h100-tp2, qwen3-32b-h100-tp4, qwen3-32b-rtxpro6000, qwen3-32b-rtxpro6000-tp2, llama-3.3-70b-h100-tp8, llama-2-70b-a100-tp8, llama-2-70b-h100-tp8, instant, or the path of a .yaml file
       3 | engines: [{ profile: llama-3.1-8b-h10 }]
         |                      ^^^^^^^^^^^^^^^^
    help: did you mean llama-3.1-8b-h100?
    error: bad.yaml: expectations.errrors: found no such figure of the report, expected a path such as errors, ttft_ms.p99 or traces.incomplete
       7 | expectations: { errrors: { max: 0 } }
         |                          ^^^^^^^^^
    error: bad.yaml: tracing.exporters: found none among others, expected none alone
       8 | tracing: { exporters: [file, none] }
         |                       ^^^^^^^^^^^
    "#);
}

#[test]
fn a_syntax_error_is_shown_where_it_is() {
    insta::assert_snapshot!(refused("name: bad\nengines: [{ count: 1 }\nworkload: {}\n"), @r"
    error: bad.yaml: line 3: found a syntax error (invalid indentation in flow construct), expected YAML
       3 | workload: {}
         | ^
    ");
}

#[test]
fn a_tab_is_called_a_tab() {
    insta::assert_snapshot!(refused("name: bad\nworkload:\n\tarrivals: {}\n"), @r"
    error: bad.yaml: line 3: found a tab in the indentation, expected spaces
       3 |  arrivals: {}
         | ^
    ");
}

#[test]
fn a_wrong_override_is_shown_as_typed() {
    let place = Place::with_tiny();
    let ran = place.ran(&[&VIRTUAL[..], &["--set", "workload.arrivals.rate=abc"]].concat());
    insta::assert_snapshot!(ran.err, @r#"
    error: tiny.yaml: workload.arrivals.rate: found "abc", expected a number of at least 0
    --set | workload.arrivals.rate=abc
          |                        ^^^
    "#);
    assert_eq!((ran.code, place.names()), (2, vec!["tiny.yaml".to_owned()]));
}

#[test]
fn a_wrong_endpoint_leaves_no_folder() {
    let place = Place::with_tiny();
    let ran = place.ran(&["run", "tiny.yaml", "--otlp", "ftp://x"]);
    insta::assert_snapshot!(ran.err, @"error: otlp: found `ftp://x`, a URL like http://127.0.0.1:4318 (HTTP) or http://127.0.0.1:4317 (gRPC) is allowed");
    assert_eq!((ran.code, place.names()), (2, vec!["tiny.yaml".to_owned()]));
}

/// A trace is read while it is replayed: what is wrong in the middle of it shows in the middle of a run.
#[test]
fn a_broken_line_of_a_trace_is_bad_input_in_both_modes() {
    let place = Place::with_tiny();
    place.write("trace.csv", "arrival_s,prompt_tokens,output_tokens\n0,64,4\n0.01,64,4\n0.02,many,4\n0.03,64,4\n");
    let set = ["requests=null", "workload={}", "trace={format: csv, path: trace.csv}"];
    for mode in ["live", "virtual"] {
        let args = ["run", "tiny.yaml", "--mode", mode, "--out", mode].into_iter();
        let args: Vec<&str> = args.chain(set.iter().flat_map(|s| ["--set", s])).collect();
        let ran = place.ran(&args);
        let said = ran.err.lines().last().unwrap_or_default();
        let expect = "error: trace.csv:4: found prompt_tokens \"many\", expected a number of tokens";
        assert_eq!((ran.code, said), (2, expect), "{ran:#?}");
    }
}

#[test]
fn every_scenario_of_the_library_validates() {
    let place = Place::new();
    place.write("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n");
    let files = names(&library());
    let (replays, others): (Vec<&String>, Vec<&String>) =
        files.iter().filter(|n| n.ends_with(".yaml")).partition(|n| n.starts_with("replay-"));
    let paths =
        |list: &[&String]| -> Vec<String> { list.iter().map(|n| scenario(n.trim_end_matches(".yaml"))).collect() };
    let validate = |list: &[&String], set: &[&str]| {
        let paths = paths(list);
        let args: Vec<&str> = ["validate"].into_iter().chain(paths.iter().map(String::as_str)).collect();
        let ran = place.good(&[args.as_slice(), set].concat());
        assert_eq!(ran.out.matches(": good (").count(), list.len(), "{}", ran.out);
    };
    assert!(others.len() >= 6 && replays.len() >= 2, "{files:?}");
    validate(&others, &[]);
    validate(&replays, &["--set", "trace.path=azure"]);
    let missing = place.ran(&["validate", &scenario("replay-azure")]);
    assert_eq!(missing.code, 2, "a trace that is not there is told by validate");
}

#[test]
fn the_published_schema_is_the_programs() {
    let out = Place::new().good(&["schema"]).out;
    let schema: serde_json::Value = serde_json::from_str(&out).expect("one JSON document");
    assert_eq!(schema["title"], "Scenario");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/scenario.schema.json");
    let published = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        published == out,
        "docs/scenario.schema.json is old; renew it: cargo run -q -- schema > docs/scenario.schema.json"
    );
}

#[test]
fn json_is_one_document_on_standard_output() {
    let place = Place::with_tiny();
    for mode in ["live", "virtual"] {
        let ran = place.good(&["run", "tiny.yaml", "--mode", mode, "--out", mode, "--format", "json"]);
        let report: Report = serde_json::from_str(&ran.out).expect("the report and nothing else");
        assert_eq!((report.sent, report.mode.as_str()), (12, mode));
        assert_eq!(ran.out, std::fs::read_to_string(place.path(mode).join("report.json")).unwrap());
    }
    let inspected: serde_json::Value =
        serde_json::from_str(&place.good(&["inspect", "live", "--format", "json"]).out).unwrap();
    assert_eq!((&inspected["count"], &inspected["findings"]), (&12.into(), &0.into()));
}

#[test]
fn a_run_writes_its_folder_and_the_scenario_in_it_runs_again() {
    let place = Place::with_tiny();
    place.good(&["run", "tiny.yaml", "--mode", "virtual"]);
    let runs = names(&place.path("runs"));
    let [run] = runs.as_slice() else { panic!("{runs:?}") };
    assert!(run.starts_with("tiny-20"), "{run}");
    let resolved = format!("runs/{run}/scenario.yaml");
    place.good(&["run", &resolved, "--out", "again"]);
    for file in names(&place.path("again")) {
        let read = |dir: &Path| std::fs::read(dir.join(&file)).unwrap();
        assert!(read(&place.path("again")) == read(&place.path("runs").join(run)), "{file} differs");
    }
}

#[test]
fn a_folder_with_something_in_it_is_refused_and_left_alone() {
    let place = Place::with_tiny();
    std::fs::create_dir(place.path("out")).unwrap();
    place.write("out/notes.txt", "mine");
    let ran = place.ran(&VIRTUAL);
    insta::assert_snapshot!(ran.err, @"error: out: found a folder that is not empty, expected a new or empty one; --overwrite writes into it all the same");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert_eq!(names(&place.path("out")), ["notes.txt"]);
    assert_eq!(std::fs::read_to_string(place.path("out/notes.txt")).unwrap(), "mine");
}

#[test]
fn overwriting_leaves_nothing_of_the_run_before() {
    let place = Place::with_tiny();
    place.good(&VIRTUAL);
    let off = [("OTEL_SDK_DISABLED", "true")];
    assert_eq!(place.ran_with(&off, &[&VIRTUAL[..], &["--overwrite"]].concat()).code, 0);
    assert_eq!(names(&place.path("out")), ["report.json", "requests.csv", "scenario.yaml"]);
    assert_eq!(place.report("out").traces.checked, 0);
}

#[test]
fn inspect_prints_the_traces_asked_for() {
    let place = Place::with_tiny();
    place.good(&VIRTUAL);
    let inspect = |args: &[&str]| place.ran(&[&["inspect", "out"], args].concat());
    let set = place.traces("out");
    let slowest = Traces::of(&set).slowest()[0].id.to_string();
    let trees = |ran: &Ran| -> Vec<String> {
        let heads = ran.out.lines().filter_map(|l| l.strip_prefix("trace ")).filter(|l| l.contains(" findings"));
        heads.filter_map(|l| l.split(' ').next()).map(str::to_owned).collect()
    };
    let overview = inspect(&[]);
    assert!(overview.out.starts_with("12 traces  288 spans  0 with an error  0 findings\n"), "{}", overview.out);
    assert!(by_trace(&set).keys().all(|id| overview.out.contains(id.as_str())), "{}", overview.out);

    let one = inspect(&["--slowest", "1"]);
    assert_eq!((one.code, trees(&one)), (0, vec![slowest.clone()]));
    let spans = one.out.lines().filter(|l| l.contains("gateway-0") || l.contains("engine-")).count();
    assert!(spans >= SPANS_PER_TRACE, "{}", one.out);
    assert_eq!(trees(&inspect(&["--slowest", "3"])).len(), 3);

    for id in [slowest.as_str(), &slowest[..12], &slowest[..12].to_uppercase()] {
        assert_eq!(trees(&inspect(&["--trace", id])), [slowest.as_str()], "--trace {id}");
    }
    let errors = inspect(&["--errors"]);
    assert_eq!((errors.code, errors.out.as_str()), (0, "no trace has an error (12 traces)\n"));

    let unknown = inspect(&["--trace", "ffffffffffffffffffffffffffffffff"]);
    insta::assert_snapshot!(unknown.err, @"error: --trace ffffffffffffffffffffffffffffffff: no trace of out has this id");
    let every = inspect(&["--trace", ""]);
    insta::assert_snapshot!(every.err, @"error: --trace : 12 traces start so, give more digits");
    assert_eq!([unknown.code, every.code], [2, 2]);
}

#[test]
fn inspect_prints_failed_traces() {
    let place = Place::new();
    let refusing =
        "engines=[{count: 1, profile: llama-3.1-8b-h100, max_num_queued_reqs: 1, scheduler: {max_num_seqs: 1}}]";
    place.write("tiny.yaml", common::TINY);
    place.good(&[&VIRTUAL[..], &["--set", refusing, "--set", "workload.arrivals.rate=1000"]].concat());
    let failed = place.report("out").errors_by_kind["http_503"];
    let ran = place.good(&["inspect", "out", "--errors"]);
    assert_eq!(ran.out.lines().filter(|l| l.starts_with("trace ") && l.ends_with("failed")).count() as u64, failed);
    assert!(ran.out.contains("ERROR queue_full"), "{}", ran.out);
}

#[test]
fn the_eager_recorder_makes_whole_traces_in_real_time_only() {
    let place = Place::with_tiny();
    let refused = place.ran(&["run", "tiny.yaml", "--mode", "virtual", "--recorder", "eager", "--out", "out"]);
    assert_eq!((refused.code, place.names()), (2, vec!["tiny.yaml".to_owned()]), "{refused:#?}");
    assert!(refused.err.contains("tracing.recorder: found eager in virtual mode"), "{}", refused.err);
    place.good(&["run", "tiny.yaml", "--recorder", "eager", "--out", "out"]);
    let set = place.traces("out");
    let traces = by_trace(&set);
    assert_eq!(traces.len(), 12);
    for spans in traces.values() {
        assert_eq!(spans.len(), SPANS_PER_TRACE);
        common::assert_whole(spans);
    }
}

/// `igsim schema | head -1`: whoever read goes away, and that is no failure.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let place = Place::with_tiny();
    place.good(&VIRTUAL);
    for args in
        [&["schema"][..], &["inspect", "out"], &["inspect", "out", "--slowest", "12"], &["validate", "tiny.yaml"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = Ran::of(place.igsim().args(args).stdout(writer).output());
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}");
    }
}

/// `igsim up`: serves until it is told to stop, says where, and leaves the traces of whoever asked.
#[test]
fn up_serves_until_it_is_stopped() {
    let place = Place::with_tiny();
    let mut command = place.igsim();
    command.args(["up", "tiny.yaml", "--out", "out", "--access-log", "--log-format", "json"]).env("RUST_LOG", "debug");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let welcome: Vec<String> = lines.by_ref().take_while(|l| !l.starts_with("OpenAI clients")).collect();
    let url = welcome.iter().find_map(|l| l.trim().strip_prefix("gateway ")).unwrap_or_else(|| panic!("{welcome:?}"));
    let gateway = common::http::address(url.trim());
    let model = welcome[0].rsplit(' ').next().unwrap();
    let canary = "canary-zqx7-in-the-coal-mine";
    let body = format!(
        "{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{canary}\"}}],\"max_tokens\":3}}"
    );
    let (status, answer) = common::http::request(gateway, "POST", "/v1/chat/completions", &[], &body);
    assert_eq!(status, 200, "{answer}");
    let (status, models) = common::http::request(gateway, "GET", "/v1/models", &[], "");
    assert!(status == 200 && models.contains(model), "{models}");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let rest: Vec<String> = lines.collect();
    let ran = Ran::of(child.wait_with_output());
    assert_eq!((ran.code, rest.as_slice()), (0, ["1 of 1 traces kept, 24 spans".to_owned()].as_slice()), "{ran:#?}");
    assert_eq!(names(&place.path("out")), [TRACES_FILE]);
    let set = place.traces("out");
    assert_eq!((by_trace(&set).len(), common::findings(&set).first()), (1, None));
    let log: Vec<serde_json::Value> =
        ran.err.lines().filter(|l| l.starts_with('{')).map(|l| serde_json::from_str(l).expect(l)).collect();
    let access: Vec<_> = log.iter().filter(|l| l["target"] == "access").collect();
    let ids: Vec<_> = access.iter().map(|l| l["trace_id"].as_str().unwrap()).collect();
    assert_eq!(ids, by_trace(&set).keys().map(ToString::to_string).collect::<Vec<_>>());
    // I8, through the program's own log.
    let file = std::fs::read_to_string(place.path("out").join(TRACES_FILE)).unwrap();
    assert!(![file, ran.err, rest.concat()].iter().any(|text| text.contains("canary")), "content is written down");
    assert_eq!(place.ran(&["up", "tiny.yaml", "--out", "out"]).code, 2, "a folder with something in it is left alone");
    assert_eq!(place.ran(&["up", "tiny.yaml", "--out", "new", "--otlp", "ftp://x"]).code, 2);
    assert_eq!(place.names(), ["out", "tiny.yaml"]);
}

/// A run that goes on for hours unless it is stopped, started and caught in the middle of its work.
fn interrupted(mode: &str, signal: Signal) -> (Place, Ran) {
    let place = Place::with_tiny();
    let set = ["requests=100000000", "workload.output_tokens=16", "tracing.ratio=0.05"];
    let mut command = place.igsim();
    command.args(["run", "tiny.yaml", "--out", "out", "--mode", mode]).args(set.iter().flat_map(|s| ["--set", s]));
    // Spans are written as they come: the file shows that requests have been answered.
    command.env("OTEL_BSP_SCHEDULE_DELAY", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    wait_until(&mut child, || std::fs::metadata(place.path("out").join(TRACES_FILE)).is_ok_and(|f| f.len() > 0));
    kill_process(Pid::from_child(&child), signal).unwrap();
    let mut err = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        err.push_str(&line.unwrap());
        err.push('\n');
    }
    let mut ran = Ran::of(child.wait_with_output());
    ran.err = err;
    (place, ran)
}

fn wait_until(child: &mut Child, done: impl Fn() -> bool) {
    let clock = RunClock::start();
    while !done() {
        let gone = child.try_wait().unwrap();
        if gone.is_some() || clock.now().since(shared::time::Time::ZERO) > Dur::from_secs(30) {
            let _ = child.kill();
            panic!("gave up waiting: {gone:?}");
        }
        std::thread::yield_now();
    }
}

#[test]
fn an_interrupted_run_still_reports() {
    for (mode, signal) in [("live", Signal::INT), ("live", Signal::TERM), ("virtual", Signal::INT)] {
        let (place, ran) = interrupted(mode, signal);
        assert_eq!(ran.code, 0, "{mode} {signal:?}: {ran:#?}");
        assert!(ran.err.contains("stopping: requests in flight are finished"), "{}", ran.err);
        assert!(ran.out.contains("Written to out/"), "{}", ran.out);
        let (report, rows) = (place.report("out"), rows(&place.path("out")));
        assert!(report.interrupted && report.sent > 0, "{mode}: {report:#?}");
        assert_eq!((report.sent, report.sent), (report.ok + report.errors, rows.len() as u64), "I1");
        // What was in flight is finished, and its traces are whole.
        assert_eq!((report.errors, report.traces.records_abandoned), (0, 0), "{mode}: {report:#?}");
        assert_eq!((report.traces.incomplete, report.traces.findings), (0, 0), "{mode}: {:#?}", report.traces);
        assert_eq!(report.traces.checked, report.traces.kept, "{mode}");
    }
}
