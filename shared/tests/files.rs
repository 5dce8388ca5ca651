//! Trace files of bounded size: a full one is put aside between two lines, and only the newest are kept.

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use shared::clock::RunClock;
use shared::trace::config::{ExporterConfig, Rotation};
use shared::trace::{Resource, Stats, Telemetry, TelemetryConfig, otlp_json};
use support::{assert_conserved, config, requests};

/// Writes `n` requests of three spans, a line each.
fn written(path: &Path, max_bytes: u64, keep: u32, n: u32) -> Stats {
    let rotation = Rotation { path: path.to_owned(), max_bytes, keep };
    let clock = RunClock::start();
    let one_a_line = TelemetryConfig { max_batch: 3, ..config(vec![ExporterConfig::RotatingFile(rotation)]) };
    let telemetry = Telemetry::live(one_a_line, clock).expect("telemetry");
    requests(&telemetry.tracer(Resource::new("test", "one")), clock, n);
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    stats
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn full_files_are_put_aside_and_the_oldest_goes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("traces.jsonl");
    let line = {
        written(&path, u64::MAX, 0, 1);
        std::fs::metadata(&path).expect("the file").len()
    };
    // Two lines to a file, with room for one that is a little longer.
    let max_bytes = 2 * line + line / 2;
    let stats = written(&path, max_bytes, 2, 9);
    assert_eq!(stats.exporters[0].exported, 27);
    assert_eq!(names(folder.path()), ["traces.jsonl", "traces.jsonl.1", "traces.jsonl.2"].map(str::to_owned).into());
    let counts = ["traces.jsonl.2", "traces.jsonl.1", "traces.jsonl"].map(|name| {
        let path = folder.path().join(name);
        assert!(std::fs::metadata(&path).expect("the file").len() <= max_bytes);
        otlp_json::read_file(&path).expect("whole lines").spans.len()
    });
    assert_eq!(counts, [6, 6, 3]);
}

#[test]
fn nothing_is_kept_where_nothing_shall_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("traces.jsonl");
    written(&path, 1, 0, 5);
    assert_eq!(names(folder.path()), ["traces.jsonl".to_owned()].into());
    assert_eq!(
        otlp_json::read_file(&path).expect("a whole line").spans.len(),
        3,
        "a line has room in a file of its own"
    );
}

#[test]
fn a_file_that_cannot_be_put_aside_costs_spans_and_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("traces.jsonl");
    // A folder with something in it cannot be replaced.
    std::fs::create_dir_all(folder.path().join("traces.jsonl.1/full")).expect("a folder");
    let stats = written(&path, 1, 1, 3);
    assert_eq!((stats.exporters[0].exported, stats.exporters[0].dropped.export_failed), (3, 6), "{stats:#?}");
    assert!(stats.exporters[0].last_error.is_some());
}
