//! Flow control from end to end: the scenario of the library in virtual time and over real sockets, and what its traces show.

mod common;

use std::collections::BTreeMap;

use common::{Place, by_trace, findings, scenario};
use igsim::report::Report;
use shared::time::{Dur, Time};
use shared::trace::Span;

fn text<'a>(span: &'a Span, key: &str) -> &'a str {
    span.get(key).and_then(|v| v.as_str()).unwrap_or_default()
}

/// One request's time in the queue.
struct Wait {
    priority: i64,
    from: Time,
    until: Time,
    result: String,
}

/// What the traces of a run say: everything that waited, and how many were refused for which reason.
fn waits(spans: &BTreeMap<String, Vec<&Span>>) -> (Vec<Wait>, BTreeMap<String, u64>) {
    let (mut waits, mut refused) = (Vec::new(), BTreeMap::new());
    for trace in spans.values() {
        let find = |name: &str| trace.iter().find(|s| s.name == name);
        let director = find("gateway.director.handle_request").expect("every request is directed");
        let reason = text(director, "gateway.admission.reason");
        if !reason.is_empty() {
            *refused.entry(reason.to_owned()).or_default() += 1;
        }
        let enqueue = find("gateway.flowcontrol.enqueue").expect("every request comes to the queue");
        if let Some(dispatch) = find("gateway.flowcontrol.dispatch") {
            let priority = enqueue.get("gateway.flow_control.priority_band").and_then(|v| v.as_int());
            waits.push(Wait {
                priority: priority.expect("a band"),
                from: dispatch.start,
                until: dispatch.end,
                result: text(dispatch, "gateway.flow_control.result").to_owned(),
            });
        }
    }
    (waits, refused)
}

/// Nothing is dispatched while something of a higher priority waits, for longer than `slack`: over real sockets a request knows the time
/// before it is in the queue.
fn assert_strict(waits: &[Wait], slack: Dur) {
    for low in waits.iter().filter(|w| w.result == "dispatched") {
        let passed = waits.iter().find(|high| {
            high.priority > low.priority && high.from + slack < low.until && low.until + slack < high.until
        });
        assert!(
            passed.is_none(),
            "{} of {} passed {}",
            low.until.as_nanos(),
            low.priority,
            passed.map_or(0, |p| p.priority)
        );
    }
}

fn conserved(report: &Report) {
    assert_eq!(report.sent, report.ok + report.errors);
    let tenants = report.tenants.values();
    assert_eq!(report.sent, tenants.clone().map(|t| t.sent).sum::<u64>());
    assert_eq!(report.dropped_by_reason.values().sum::<u64>(), tenants.map(|t| t.dropped).sum::<u64>());
}

/// The expectations of the file hold; report and traces agree.
#[test]
fn priorities_are_strict_and_shares_fair_in_virtual_time() {
    let place = Place::new();
    place.good(&["run", &scenario("flow-control"), "--out", "out"]);
    let (report, set) = (place.report("out"), place.traces("out"));
    conserved(&report);
    assert_eq!(findings(&set).first(), None);
    let (waits, refused) = waits(&by_trace(&set));
    assert_eq!(refused, report.dropped_by_reason);
    assert_strict(&waits, Dur::ZERO);
    let of = |result: &str| waits.iter().filter(|w| w.result == result).count() as u64;
    assert_eq!(of("timeout"), report.dropped_by_reason["rejected-ttl-expired"]);
    assert_eq!(of("dispatched"), report.ok);
}

/// I6.
#[test]
fn the_same_seed_waits_the_same() {
    let place = Place::new();
    let file = scenario("flow-control");
    let files = |out: &str| {
        let set = ["--set", "duration=2s", "--set", "expectations={}"];
        place.good(&[["run", &file, "--out", out].as_slice(), &set].concat());
        ["requests.csv", "report.json", "traces.otlp.jsonl"].map(|f| std::fs::read(place.path(out).join(f)).unwrap())
    };
    assert!(files("a") == files("b"), "equal runs differ");
}

/// The same file over real sockets, shortened. A busy machine may be late, so that figures are looser than the file's own.
#[test]
fn priorities_are_strict_over_real_sockets() {
    let place = Place::new();
    let file = scenario("flow-control");
    let mut args = vec!["run", &file, "--mode", "live", "--out", "out"];
    for set in ["duration=4s", "expectations={}", "listen.gateway=127.0.0.1:0", "listen.engines=127.0.0.1:0"] {
        args.extend(["--set", set]);
    }
    place.good(&args);
    let (report, set) = (place.report("out"), place.traces("out"));
    conserved(&report);
    let (waits, refused) = waits(&by_trace(&set));
    assert_eq!(refused, report.dropped_by_reason);
    assert_strict(&waits, Dur::from_millis(20));
    assert!(report.dropped_by_reason["rejected-ttl-expired"] > 0, "{report:#?}");
    assert_eq!(report.tenants["premium"].errors, 0);
    for team in ["team-a", "team-b", "team-c"] {
        let share = report.tenants[team].share_of_priority;
        assert!((0.25..0.42).contains(&share), "{team}: {share}");
    }
}

/// Flows that share by what they were served.
#[test]
fn least_attained_service_counts_tokens() {
    let place = Place::new();
    let file = scenario("flow-control");
    let fairness = "gateway.flow_control.default_band={fairness: program-aware-fairness}";
    place.good(&["run", &file, "--out", "out", "--set", fairness, "--set", "duration=5s", "--set", "expectations={}"]);
    let report = place.report("out");
    conserved(&report);
    // All ask for the same: then it is as fair as taking turns.
    for team in ["team-a", "team-b", "team-c"] {
        let share = report.tenants[team].share_of_priority;
        assert!((0.29..0.38).contains(&share), "{team}: {share}");
    }
}

/// Without room for waiting and with a ceiling of nothing, everything is refused, each for its reason.
#[test]
fn a_closed_gate_refuses_everything() {
    let place = Place::new();
    let file = scenario("flow-control");
    let run = |out: &str, set: &[&str]| {
        let mut args = vec!["run", &file, "--out", out, "--set", "duration=1s", "--set", "expectations={}"];
        set.iter().for_each(|s| args.extend(["--set", s]));
        place.good(&args);
        place.report(out)
    };
    let report = run("a", &["gateway.flow_control.usage_limit=0", "gateway.flow_control.max_requests=5"]);
    conserved(&report);
    assert_eq!((report.ok, report.dropped_by_reason["rejected-ttl-expired"]), (0, 5));
    let report = run("b", &["gateway.flow_control.default_request_ttl=0s"]);
    assert_eq!(report.dropped_by_reason.get("rejected-ttl-expired"), None, "0s is for ever");
}
