//! A process that ends in a panic: the test starts itself as that process.

mod support;

use std::process::Command;

use shared::clock::RunClock;
use shared::trace::config::ExporterConfig;
use shared::trace::{Resource, Telemetry, Value, fold_on_panic, otlp_json};
use support::{Step, config};

/// Where the other process writes its spans; set for it only.
const FILE: &str = "IGSIM_TEST_PANIC_FILE";

/// The other process: a request is open when the thread that all depend on panics, and the process is gone at once.
#[test]
fn the_process_that_panics() {
    let Some(file) = std::env::var_os(FILE) else { return };
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config(vec![ExporterConfig::File(file.into())]), clock).expect("telemetry");
    fold_on_panic(&telemetry, &["pacing"]);
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let (_, trail) = tracer.start::<Step>(&http::HeaderMap::new(), clock.now());
    trail.note(clock.now(), || Step(7));
    let worker = std::thread::Builder::new().name("worker".to_owned()).spawn(|| panic!("a task's own affair"));
    assert!(worker.expect("a thread").join().is_err());
    assert_eq!(telemetry.stats().records_abandoned, 0, "the request goes on");
    let pacing = std::thread::Builder::new().name("pacing".to_owned()).spawn(|| panic!("on purpose"));
    assert!(pacing.expect("a thread").join().is_err());
    // No destructor runs any more.
    std::process::abort();
}

#[test]
fn open_records_are_in_the_file_when_a_panic_has_ended_the_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("traces.jsonl");
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["the_process_that_panics", "--exact", "--test-threads=1"]).env(FILE, &file);
    let output = command.output().expect("it starts");
    assert!(!output.status.success(), "{output:?}");
    let spans = otlp_json::read_file(&file).expect("the file").spans;
    let root = spans.iter().find(|s| s.name == "test.request").expect("the open request");
    assert_eq!((root.get("error.type"), spans.len()), (Some(&Value::from("abandoned")), 2));
}
