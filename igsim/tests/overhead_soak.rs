//! `igsim overhead soak` as a user runs it: a short one, with every path.

mod common;

use common::Place;
use igsim::overhead::soak::SoakReport;

/// Spans of a request of the lab's own fleet.
const SPANS_PER_TRACE: u32 = common::SPANS_PER_TRACE as u32;

fn soak(path: &str) -> SoakReport {
    let options = ["--rate", "150", "--duration", "2s", "--sampling", "0.5", "--format", "json", "--path", path];
    let ran = Place::new().ran(&[&["overhead", "soak"][..], &options].concat());
    let report: SoakReport = serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {ran:#?}"));
    assert_eq!((ran.code, report.problems()), (0, Vec::new()), "{ran:#?}");
    report
}

#[test]
fn every_sampled_trace_of_a_soak_arrives_whole() {
    for path in ["deferred", "eager"] {
        let report = soak(path);
        assert_eq!((report.requests.sent, report.requests.answered), (300, 300));
        assert!((100..200).contains(&report.requests.sampled), "half of 300: {report:?}");
        let marked = &report.received.marked;
        assert_eq!(marked.spans_per_trace.keys().copied().collect::<Vec<_>>(), [SPANS_PER_TRACE]);
        assert_eq!((marked.traces, marked.distinct), (report.requests.sampled, marked.spans));
        assert_eq!((report.spans.created, report.spans.dropped), (marked.spans, 0));
        assert!(report.memory.iter().all(|m| m.peak_kib > 0 && !m.series.is_empty() && m.slope.is_none()));
    }
}

#[test]
fn a_soak_that_cannot_be_is_refused() {
    let check = |options: &[&str], expect: &str| {
        let ran = Place::new().ran(&[&["overhead", "soak"], options].concat());
        assert_eq!(ran.code, 2, "{ran:#?}");
        assert!(ran.err.contains(expect), "{ran:#?}");
    };
    check(&["--rate", "0"], "expected requests per second");
    check(&["--sampling", "2"], "expected a number from 0 to 1");
    check(&["--path", "lazy"], "invalid value 'lazy'");
    check(&["--duration", "soon"], "not a duration");
}
