//! The overhead lab with its real processes: orders are answered, blocks account for every request and span, and a process that
//! dies fails the run with what it said.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use igsim::overhead::fleet::{Fleet, FleetSpec};
use igsim::overhead::model::{Arm, Block, Health, Path as TracePath, Regime};
use igsim::overhead::node::child::{Node, NodeError};
use igsim::overhead::node::message::{Answer, Order, Role, Start, Tracing};
use igsim::overhead::place::{self, Placement};
use igsim::overhead::record::{self, Recorded};
use igsim::scenario::Scenario;
use shared::time::Dur;

fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_igsim"))
}

fn scenario() -> Scenario {
    let yaml = "name: t\nengines: [{count: 2, profile: instant}]\nworkload:\n  arrivals: {process: poisson, rate: 5}\nrequests: 1\n";
    shared::config::load_str::<Scenario>("t", yaml, &[]).unwrap().config
}

fn start() -> Start {
    Start {
        cpus: place::allowed_cpus().unwrap(),
        scenario: Box::new(scenario()),
        engines: Vec::new(),
        spans_to: "http://127.0.0.1:9/v1/traces".to_owned(),
        schedule_delay_ms: 20.0,
        stored_bytes: 1 << 30,
    }
}

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn engines_do_what_they_are_told_and_end_with_their_input() {
    let mut engine = Node::start(&binary(), Role::Engine, start()).unwrap();
    assert_eq!(engine.urls().len(), 2);
    for order in [Order::Reset, Order::Arm(None), Order::Delay(12.5), Order::Delay(0.0)] {
        engine.order(&order).unwrap();
    }
    assert_eq!(engine.ask(&Order::Served).unwrap(), Answer::Served(Vec::new()));
    assert_eq!(engine.ask(&Order::Flush(100)).unwrap(), Answer::Settled(true), "nothing was recorded");
    let before = engine.counters().unwrap();
    let used = engine.counters().unwrap().since(&before);
    assert_eq!((used.records, used.spans, used.exported, used.dropped), (0, 0, 0, 0));
    // What is for another role is refused, and the next order is answered all the same.
    let refused = engine.order(&Order::Health(Health::Absent)).unwrap_err().to_string();
    assert_eq!(refused, "the engine failed: this is no order for the engine");
    let odd =
        engine.order(&Order::Arm(Some(Tracing { path: TracePath::Deferred, ratio: 7.0, steps: 0.0 }))).unwrap_err();
    assert_eq!(odd.to_string(), "the engine failed: 7 is no share of traces");
    engine.order(&Order::Reset).unwrap();
    let pid = engine.pid();
    drop(engine);
    assert!(!Path::new("/proc").join(pid.to_string()).exists(), "it ended and was waited for");
}

#[test]
fn a_process_that_cannot_start_or_that_dies_says_why() {
    let nowhere = Node::start(Path::new("/nowhere/igsim"), Role::Gateway, start()).unwrap_err();
    assert!(matches!(nowhere, NodeError::Spawn { .. }), "{nowhere}");
    let cpus = vec![100_000];
    let misplaced = Node::start(&binary(), Role::Engine, Start { cpus, ..start() }).unwrap_err().to_string();
    assert!(misplaced.starts_with("the engine failed: cannot run on CPUs [100000]"), "{misplaced}");
    let broken = Start { engines: vec!["no url".to_owned()], ..start() };
    let broken = Node::start(&binary(), Role::Gateway, broken).unwrap_err().to_string();
    assert!(broken.starts_with("the gateway failed: "), "{broken}");

    let mut receiver = Node::start(&binary(), Role::Receiver, start()).unwrap();
    let killed = Command::new("kill").args(["-KILL", &receiver.pid().to_string()]).status().unwrap();
    assert!(killed.success());
    let dead = receiver.ask(&Order::Take).unwrap_err().to_string();
    assert!(dead.starts_with("the receiver ended before its time (signal: 9"), "{dead}");
}

#[test]
fn a_fleet_is_switched_as_one() {
    let cpus = place::allowed_cpus().unwrap();
    let placement = Placement::of(&cpus, Regime::Saturation);
    let spec =
        FleetSpec { binary: binary(), scenario: scenario(), placement, schedule_delay_ms: 20.0, stored_bytes: 1 << 30 };
    let mut fleet = Fleet::start(&spec).unwrap();
    for arm in [Arm::Off, Arm::traced(TracePath::Deferred, 1.0), Arm::Delayed { us: 5.0 }, Arm::Control] {
        fleet.prepare(&arm).unwrap();
        assert!(fleet.flush(Dur::from_secs(10)).unwrap(), "{arm}");
    }
    let moment = fleet.moment().unwrap();
    assert!(moment.gateway_cpu.threads.len() > 1 && moment.client_nanos > 0, "{moment:?}");
    assert!(fleet.gateway_peak_kib().unwrap() > 1_000);
    assert_eq!(fleet.take().unwrap().bytes, 0);
}

/// Every request and every span of a run is accounted for.
fn check(recorded: &Recorded, requests: u64, rounds: u32, arms: usize) {
    let run = &recorded.run;
    assert_eq!(run.settings.len(), 1);
    assert_eq!((run.settings[0].rounds, run.settings[0].requests), (rounds, requests));
    assert_eq!(run.blocks.len(), rounds as usize * (arms + arms.div_ceil(2)) + 1);
    for (place, block) in run.blocks.iter().enumerate() {
        let Block { arm, telemetry: t, .. } = block;
        assert_eq!(block.place as usize, place);
        assert_eq!((block.answered, block.failed), (requests, 0), "{arm}");
        assert_eq!((block.e2e.count, block.ttft.count, block.added.count), (requests, requests, requests), "{arm}");
        assert!(block.added.mean < block.ttft.mean, "the gateway's share is part of the whole: {block:?}");
        assert!(block.cpu.gateway_request > 0.0 && block.cpu.engine_request > 0.0 && block.cpu.client > 0.0);
        assert_eq!(t.spans, t.exported + t.dropped, "{arm}");
        match arm {
            Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => {
                assert_eq!((t.spans, t.receiver_requests, t.receiver_spans), (0, 0, 0), "{arm}");
                assert_eq!(
                    (block.sampled_e2e.count, block.unsampled_e2e.count),
                    (0, 0),
                    "{arm} says nothing of traces"
                );
            }
            Arm::Traced { ratio, receiver: Health::Healthy, .. } => {
                assert_eq!((t.dropped, t.records_dropped, t.receiver_spans), (0, 0, t.exported), "{arm}");
                assert_eq!(block.sampled_e2e.count + block.unsampled_e2e.count, requests, "{arm}");
                assert_eq!(t.records, block.sampled_e2e.count, "a record for each sampled request: {arm}");
                assert!(*ratio < 1.0 || t.records == requests, "{arm}");
                assert!(*ratio > 0.0 || t.spans == 0, "{arm}");
                assert_eq!(t.spans > 0, t.receiver_bytes > 0, "{arm}");
            }
            Arm::Traced { .. } => assert!(t.receiver_spans <= t.spans, "{arm}"),
        }
    }
}

#[test]
fn a_small_run_accounts_for_every_request_and_span() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let (out_text, arms) = (out.to_str().unwrap(), "off',deferred:0,deferred:0.5,deferred:1.0,eager:0.5");
    let args = ["overhead", "--rounds", "2", "--requests", "20", "--arms", arms, "--target", "900%", "--out", out_text];
    let (verdict, stdout, stderr) = run(&args);
    // So few blocks may say anything: 1 is as good as 0.
    assert!(matches!(verdict, Some(0 | 1)), "{stdout}{stderr}");
    let recorded = record::read(&out).unwrap();
    check(&recorded, 20, 2, 5);
    for name in ["report.json", "report.html"] {
        assert!(out.join(name).metadata().unwrap().len() > 1_000, "{name}");
    }
    assert!(stdout.contains("deferred 0.5"), "{stdout}");
    // The blocks say the same when they are read again.
    let (code, again, _) = run(&["overhead", "report", out_text, "--target", "900%"]);
    assert_eq!((code, again), (verdict, stdout));
    let (code, _, stderr) = run(&args);
    assert_eq!(code, Some(2), "a folder with results is left alone: {stderr}");
}

#[test]
fn the_realistic_regime_accounts_for_every_request_and_span() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let out_text = out.to_str().unwrap();
    let args = ["overhead", "--regime", "realistic", "--rounds", "1", "--requests", "8", "--arms", "off',deferred:1.0"];
    let (code, stdout, stderr) = run(&[&args[..], &["--target", "900%", "--out", out_text]].concat());
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    check(&record::read(&out).unwrap(), 8, 1, 2);
}

#[test]
fn faulty_receivers_cost_spans_and_no_requests() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let args = ["overhead", "--faults", "--delay", "10%", "--rounds", "1", "--requests", "20", "--target", "900%"];
    let (code, stdout, stderr) = run(&[&args[..], &["--out", out.to_str().unwrap()]].concat());
    // Twenty requests say nothing about latency; that the run came to its end is what counts.
    assert!(matches!(code, Some(0 | 1)), "{stdout}{stderr}");
    let recorded = record::read(&out).unwrap();
    // The usual five, three faults of two paths, and the delayed one.
    check(&recorded, 20, 1, 12);
    let delayed = recorded.run.blocks.iter().find_map(|b| match b.arm {
        Arm::Delayed { us } => Some(us),
        Arm::Off | Arm::Control | Arm::Traced { .. } | Arm::Outside { .. } => None,
    });
    assert!(delayed.is_some_and(|us| us > 0.0), "{delayed:?}");
}

#[test]
fn bad_input_is_told_before_anything_starts() {
    let check = |args: &[&str], expect: &str| {
        let (code, _, stderr) = run(&[&["overhead"], args].concat());
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(expect), "{args:?}: {stderr}");
    };
    check(&["nowhere.yaml"], "nowhere.yaml");
    check(&["--target", "much"], "expected a share such as 5% or 0.05");
    check(&["--arms", "lazy:0.1"], "expected off', PATH:RATIO or PATH:RATIO:STEPS");
    check(&["--quick", "--full"], "cannot be used with");
    check(&["report", "nowhere"], "nowhere: ");
    let real = "engines=[{url: http://127.0.0.1:1, model: m, count: 1}]";
    check(&["--set", real], "the engine at http://127.0.0.1:1 is not ours");
}
