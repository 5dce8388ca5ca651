//! What a soak came to, in figures and in words, and what of it must not be.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::slope::{Slope, medians};
pub use super::tally::Requests;
use crate::overhead::fleet::Moment;
use crate::overhead::model::{Machine, Path};
use crate::overhead::receiver::Marked;
use crate::stats::Quantiles;

/// The share of a soak in which caches fill and memory is expected to grow.
const WARM_UP: f64 = 0.2;
/// Memory is looked at in medians of so many seconds, or less in a short run.
const PART: f64 = 10.0;
/// The fewest parts that a run is cut into.
const PARTS: f64 = 12.0;
/// A load that ends so many seconds after its last request was due has not kept up.
const BACKLOG: f64 = 1.0;

/// What a soak came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoakReport {
    /// Version of igsim.
    pub version: String,
    /// The machine.
    pub machine: Machine,
    /// Recorder and encoder.
    pub path: Path,
    /// Share of traces kept.
    pub ratio: f64,
    /// Seed of arrivals and prompts.
    pub seed: u64,
    /// Requests per second as asked for.
    pub rate: f64,
    /// Seconds as asked for.
    pub duration: f64,
    /// Whether the user ended it early.
    pub interrupted: bool,
    /// Share of the machine's CPU time that the hypervisor took.
    pub steal: f64,
    /// The requests.
    pub requests: Requests,
    /// The spans, as the processes that made them count them.
    pub spans: Spans,
    /// The spans, as the receiver has them.
    pub received: Received,
    /// Memory of each process.
    pub memory: Vec<Memory>,
}

/// What became of spans, gateway and engines together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spans {
    /// Made.
    pub created: u64,
    /// Acknowledged.
    pub exported: u64,
    /// Lost on the way.
    pub dropped: u64,
    /// Records lost before they became spans.
    pub records_dropped: u64,
    /// Whether nothing was on its way any more when this was counted.
    pub settled: bool,
}

/// What the receiver has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Spans and traces.
    pub marked: Marked,
    /// Acknowledged requests that it had no room for.
    pub not_kept: u64,
}

/// The resident memory of a process over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// The process.
    pub process: String,
    /// The largest, in KiB (`VmHWM`).
    pub peak_kib: u64,
    /// Growth in KiB per minute after the warm-up; absent if the run is too short to tell.
    pub slope: Option<Slope>,
    /// From here on growth counts, in seconds.
    pub warm_up: f64,
    /// Seconds since the start and KiB (`VmRSS`).
    pub series: Vec<(f64, u64)>,
}

impl Spans {
    pub(super) fn of(before: &Moment, after: &Moment, settled: bool) -> Spans {
        let (gateway, engine) = (after.gateway.since(&before.gateway), after.engine.since(&before.engine));
        Spans {
            created: gateway.spans + engine.spans,
            exported: gateway.exported + engine.exported,
            dropped: gateway.dropped + engine.dropped,
            records_dropped: gateway.records_dropped + engine.records_dropped,
            settled,
        }
    }
}

impl Memory {
    pub(super) fn of(process: &str, series: &[(f64, u64)], peak_kib: u64) -> Memory {
        let length = series.last().map_or(0.0, |(seconds, _)| *seconds);
        let warm_up = length * WARM_UP;
        let part = PART.min((length - warm_up) / PARTS).max(f64::MIN_POSITIVE);
        let values: Vec<_> = series.iter().map(|(seconds, kib)| (*seconds, *kib as f64)).collect();
        let minutes: Vec<_> = medians(&values, warm_up, part).iter().map(|(s, kib)| (s / 60.0, *kib)).collect();
        let slope = Slope::of(&minutes);
        Memory { process: process.to_owned(), peak_kib, slope, warm_up, series: series.to_vec() }
    }
}

impl SoakReport {
    /// What must not be, in words; nothing if all is well. Growth of memory is not among it: whether some KiB a minute
    /// matter is for the reader to say.
    pub fn problems(&self) -> Vec<String> {
        let SoakReport { requests, spans, received, .. } = self;
        let Marked { spans: came, traces, incomplete, invalid, malformed, .. } = received.marked;
        let failed = requests.sent - requests.answered;
        let kinds = || requests.failures.iter().map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", ");
        let fates = spans.exported + spans.dropped;
        let found = [
            (requests.answered == 0).then(|| "nothing was answered".to_owned()),
            (failed > 0).then(|| format!("{failed} of {} requests failed: {}", requests.sent, kinds())),
            (requests.backlog > BACKLOG).then(|| {
                let (backlog, rate) = (requests.backlog, requests.asked_per_second);
                format!(
                    "the last answer came {backlog:.1} s after it was asked for: {rate:.0} requests/s are not carried"
                )
            }),
            (!spans.settled).then(|| "spans were still on their way at the end".to_owned()),
            (spans.created != fates).then(|| {
                format!("{} spans were made, {} exported and {} dropped", spans.created, spans.exported, spans.dropped)
            }),
            (spans.dropped > 0).then(|| format!("{} spans were dropped", spans.dropped)),
            (spans.records_dropped > 0).then(|| format!("{} records were dropped", spans.records_dropped)),
            (received.not_kept > 0).then(|| format!("the receiver had no room for {} requests", received.not_kept)),
            (came != spans.exported).then(|| format!("{} spans were exported and {came} received", spans.exported)),
            (traces != requests.sampled)
                .then(|| format!("{} requests were sampled and {traces} traces received", requests.sampled)),
            (incomplete > 0).then(|| format!("{incomplete} of {traces} traces are not whole")),
            (invalid + malformed > 0).then(|| format!("{invalid} spans and {malformed} requests are no valid OTLP")),
        ];
        found.into_iter().flatten().collect()
    }
}

impl fmt::Display for SoakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SoakReport { requests, spans, received, .. } = self;
        let cut = if self.interrupted { ", ended early" } else { "" };
        let (path, ratio, steal) = (self.path.name(), ratio(self.ratio), self.steal * 100.0);
        writeln!(f, "soak: {path} {ratio}, {} requests/s for {} s{cut}, steal {steal:.2} %", self.rate, self.duration)?;
        writeln!(
            f,
            "requests  {} sent, {} answered, {:.1}/s asked for, {:.1}/s answered",
            requests.sent, requests.answered, requests.asked_per_second, requests.answered_per_second
        )?;
        for (name, q) in [("end to end", &requests.e2e), ("first token", &requests.ttft), ("sent late", &requests.late)]
        {
            writeln!(f, "  {name:<12}{}", quantiles(q))?;
        }
        let Spans { created, exported, dropped, .. } = spans;
        writeln!(f, "spans     {created} made = {exported} exported + {dropped} dropped")?;
        let marked = &received.marked;
        let whole = marked.traces - marked.incomplete;
        let sizes: Vec<_> = marked.spans_per_trace.iter().map(|(spans, n)| format!("{n} of {spans} spans")).collect();
        let sizes = if sizes.is_empty() { String::new() } else { format!(" ({})", sizes.join(", ")) };
        writeln!(f, "receiver  {} spans, {whole} whole traces of {} sampled{sizes}", marked.spans, requests.sampled)?;
        let memory = self.memory.iter().map(|memory| format!("memory    {memory}"));
        let problems = self.problems().into_iter().map(|problem| format!("PROBLEM   {problem}"));
        f.write_str(&memory.chain(problems).collect::<Vec<_>>().join("\n"))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.series.last().map_or(0, |(_, kib)| *kib);
        write!(f, "{:<9}{last} KiB at the end, peak {} KiB, ", self.process, self.peak_kib)?;
        match &self.slope {
            Some(Slope { value, interval, .. }) => {
                let (low, high) = (interval.low, interval.high);
                write!(f, "{value:+.1} KiB/min [{low:+.1}, {high:+.1}] after {:.0} s", self.warm_up)
            }
            None => f.write_str("too short to tell its growth"),
        }
    }
}

/// As text lines have ratios: `0.1`, `1.0`.
fn ratio(ratio: f64) -> String {
    if ratio.fract() == 0.0 { format!("{ratio:.1}") } else { ratio.to_string() }
}

fn quantiles(q: &Quantiles) -> String {
    let Quantiles { mean, p50, p95, p99, max, .. } = q;
    format!("mean {mean:.0} us  p50 {p50:.0}  p95 {p95:.0}  p99 {p99:.0}  max {max:.0}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn good() -> SoakReport {
        let figures =
            Quantiles { count: 990, mean: 210.4, p50: 200.0, p90: 280.0, p95: 300.0, p99: 410.0, max: 5_000.0 };
        let late = Quantiles { mean: 30.0, p50: 29.0, p95: 60.0, p99: 90.0, max: 400.0, ..figures };
        let requests = Requests {
            sent: 1_000,
            answered: 1_000,
            sampled: 100,
            asked_per_second: 100.2,
            answered_per_second: 100.1,
            backlog: 0.001,
            e2e: figures,
            ttft: figures,
            late,
            ..Requests::default()
        };
        let marked = Marked {
            spans: 2_400,
            distinct: 2_400,
            traces: 100,
            spans_per_trace: BTreeMap::from([(24, 100)]),
            ..Marked::default()
        };
        let series: Vec<_> = (0..=600).map(|s| (f64::from(s), 50_000 + 10 * (s as u64 / 60))).collect();
        SoakReport {
            version: "0".to_owned(),
            machine: Machine::default(),
            path: Path::Deferred,
            ratio: 0.1,
            seed: 1,
            rate: 100.0,
            duration: 10.0,
            interrupted: false,
            steal: 0.001,
            requests,
            spans: Spans { created: 2_400, exported: 2_400, dropped: 0, records_dropped: 0, settled: true },
            received: Received { marked, not_kept: 0 },
            memory: vec![Memory::of("gateway", &series, 60_000), Memory::of("engines", &series[..3], 70_000)],
        }
    }

    #[test]
    fn a_soak_is_told_in_few_lines() {
        insta::assert_snapshot!(good(), @r"
        soak: deferred 0.1, 100 requests/s for 10 s, steal 0.10 %
        requests  1000 sent, 1000 answered, 100.2/s asked for, 100.1/s answered
          end to end  mean 210 us  p50 200  p95 300  p99 410  max 5000
          first token mean 210 us  p50 200  p95 300  p99 410  max 5000
          sent late   mean 30 us  p50 29  p95 60  p99 90  max 400
        spans     2400 made = 2400 exported + 0 dropped
        receiver  2400 spans, 100 whole traces of 100 sampled (100 of 24 spans)
        memory    gateway  50100 KiB at the end, peak 60000 KiB, +9.8 KiB/min [+9.6, +10.1] after 120 s
        memory    engines  50000 KiB at the end, peak 70000 KiB, too short to tell its growth
        ");
    }

    #[test]
    fn growth_is_that_of_the_time_after_the_warm_up() {
        // Fast at first, then one KiB a second.
        let series: Vec<_> =
            (0..=600).map(|s| (f64::from(s), 1_000 + if s < 100 { 50 * s } else { 4_900 + s } as u64)).collect();
        let slope = Memory::of("gateway", &series, 0).slope.unwrap();
        assert!((slope.value - 60.0).abs() < 1e-6 && slope.points == 48, "{slope:?}");
    }

    #[test]
    fn whatever_is_lost_is_a_problem() {
        assert_eq!(good().problems(), Vec::<String>::new());
        let check = |spoil: fn(&mut SoakReport), expect: &[&str]| {
            let mut report = good();
            spoil(&mut report);
            assert_eq!(report.problems(), expect);
        };
        check(
            |r| {
                r.requests.answered = 998;
                r.requests.failures = BTreeMap::from([("connect".to_owned(), 1), ("http_503".to_owned(), 1)]);
            },
            &["2 of 1000 requests failed: 1 connect, 1 http_503"],
        );
        check(
            |r| r.requests.backlog = 2.5,
            &["the last answer came 2.5 s after it was asked for: 100 requests/s are not carried"],
        );
        check(|r| r.spans.settled = false, &["spans were still on their way at the end"]);
        check(|r| r.spans.created += 1, &["2401 spans were made, 2400 exported and 0 dropped"]);
        check(
            |r| {
                r.spans.created += 3;
                r.spans.dropped = 3;
            },
            &["3 spans were dropped"],
        );
        check(|r| r.spans.records_dropped = 1, &["1 records were dropped"]);
        check(|r| r.received.not_kept = 1, &["the receiver had no room for 1 requests"]);
        check(|r| r.received.marked.spans = 2_399, &["2400 spans were exported and 2399 received"]);
        check(|r| r.requests.sampled = 101, &["101 requests were sampled and 100 traces received"]);
        check(|r| r.received.marked.incomplete = 1, &["1 of 100 traces are not whole"]);
        check(|r| r.received.marked.invalid = 1, &["1 spans and 0 requests are no valid OTLP"]);
        check(|r| (r.requests.sent, r.requests.answered) = (0, 0), &["nothing was answered"]);
    }
}
