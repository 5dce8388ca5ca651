//! What tracing would cost elsewhere: a straight line through the lab's blocks, with its error.
//!
//! `CPU per request = base + spans per request * per_span`, one line for each path. The base is what every request pays
//! whether it is sampled or not (seen at ratio 0); the slope is what a kept span pays from record to acknowledgement,
//! with its share of what its trace pays. A run has one set of spans, so it cannot tell a span's cost from its
//! attributes' or its trace's: how cost changes with the number of attributes comes from benches of single stages and
//! is given to the fit, and without it a prediction keeps the run's attributes. Nothing here knows coefficients: they
//! come from a fit file that the lab writes.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::analysis::References;
use super::format;
use super::model::{Arm, Block, Health, Path, Regime, Run};
use super::stats::{Interval, LEVEL, student_quantile};
use crate::report::digits;

/// Lines through the blocks of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// Version of igsim that made the run.
    pub version: String,
    /// The machine of the run, in words.
    pub machine: String,
    /// The regime whose blocks are fitted.
    pub regime: Regime,
    /// One line for each path that the run tells enough of.
    pub lines: Vec<Line>,
    /// What an attribute more costs on each path; none where it was not measured.
    #[serde(default)]
    pub attributes: BTreeMap<Path, Attributes>,
}

/// The cost of attributes, from benches of single stages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attributes {
    /// Attributes of a span in the run that is fitted, on average.
    pub per_span: f64,
    /// Nanoseconds of CPU for one attribute of one span, from record to bytes.
    pub ns: f64,
    /// Bytes on the wire for one attribute of one span.
    pub bytes: f64,
}

/// The cost of one path, gateway and engines together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The path.
    pub path: Path,
    /// Microseconds of CPU that every request pays.
    pub base_us: f64,
    /// Microseconds of CPU for a span that is kept.
    pub per_span_us: f64,
    /// Bytes that the receiver took for a span.
    pub bytes_per_span: f64,
    /// Spans of a sampled request in the run.
    pub spans_per_trace: f64,
    /// Rounds that were fitted.
    pub rounds: usize,
    /// Spans per request at the arms that were fitted, the largest.
    pub most_spans: f64,
    /// Root mean square error in microseconds per request of predicting the blocks of a round from all other rounds.
    pub held_out_us: f64,
    /// Variance of the base, covariance, variance of the slope: jackknife over rounds.
    pub covariance: [f64; 3],
}

/// Why there is nothing to predict from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unpredictable {
    /// The run has too few blocks.
    #[error("the run has no regime with off blocks and two ratios of one path in three rounds or more")]
    NothingToFit,
    /// The fit lacks the path.
    #[error("the fit has no line for path {0}: the run that it comes from has too few of its arms")]
    NoSuchPath(&'static str),
    /// Attributes are asked for and their cost is not known.
    #[error("the fit does not know what an attribute costs: leave --attributes out, or fit with measured costs")]
    NoAttributes,
}

/// The load to predict for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Spans of a sampled request.
    pub spans: f64,
    /// Attributes of a span; as in the run where not given.
    pub attributes: Option<f64>,
    /// Share of traces kept.
    pub ratio: f64,
    /// Requests per second.
    pub rps: f64,
    /// By how much stored spans are smaller than on the wire, above 0; 1 is no compression.
    pub compression: f64,
}

/// What a load would cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The path.
    pub path: Path,
    /// The load.
    pub load: Load,
    /// CPUs kept busy by tracing, gateway and engines together.
    pub cores: f64,
    /// Their 95 % interval, of the mean.
    pub cores_interval: Interval,
    /// Microseconds of CPU per request.
    pub us_per_request: f64,
    /// How far a block of the run lay from its prediction, in microseconds per request.
    pub held_out_us: f64,
    /// Bytes per day on the wire, not compressed.
    pub wire_bytes_per_day: f64,
    /// Bytes per day in storage, with the assumed compression.
    pub stored_bytes_per_day: f64,
    /// Whether the load has more spans per request than any arm of the run.
    pub beyond_the_run: bool,
}

impl Fit {
    /// Of a run: of its `saturation` blocks, where CPU is paid at full load, or of the next regime that has enough.
    ///
    /// # Errors
    /// Where no regime has `off` blocks and arms of one path at two ratios or more in three rounds or more.
    pub fn of(run: &Run, attributes: &BTreeMap<Path, Attributes>) -> Result<Fit, Unpredictable> {
        for regime in [Regime::Saturation, Regime::Floor, Regime::FloorUnpinned, Regime::Realistic] {
            let lines: Vec<Line> = Path::ALL.iter().filter_map(|path| line(run, regime, *path)).collect();
            if !lines.is_empty() {
                let (machine, attributes) = (format::machine(&run.machine), attributes.clone());
                return Ok(Fit { version: run.version.clone(), machine, regime, lines, attributes });
            }
        }
        Err(Unpredictable::NothingToFit)
    }

    /// What `load` would cost on `path`.
    ///
    /// # Errors
    /// Where the fit lacks the path, or the cost of attributes that are asked for.
    pub fn predict(&self, path: Path, load: Load) -> Result<Prediction, Unpredictable> {
        let line = self.lines.iter().find(|l| l.path == path).ok_or(Unpredictable::NoSuchPath(path.name()))?;
        let more = match (load.attributes, self.attributes.get(&path)) {
            (None, _) => Attributes { per_span: 0.0, ns: 0.0, bytes: 0.0 },
            (Some(n), Some(known)) => Attributes { per_span: n - known.per_span, ..*known },
            (Some(_), None) => return Err(Unpredictable::NoAttributes),
        };
        let spans = load.ratio * load.spans;
        let us = line.at(spans) + spans * more.per_span * more.ns / 1e3;
        let error = student_quantile((line.rounds - 1) as f64, 0.5 + LEVEL / 2.0) * line.standard_error(spans);
        let cores = |us: f64| us * load.rps / 1e6;
        let bytes = spans * (line.bytes_per_span + more.per_span * more.bytes).max(0.0) * load.rps * 86_400.0;
        Ok(Prediction {
            path,
            load,
            cores: cores(us),
            cores_interval: Interval { low: cores(us - error), high: cores(us + error) },
            us_per_request: us,
            held_out_us: line.held_out_us,
            wire_bytes_per_day: bytes,
            stored_bytes_per_day: bytes / load.compression,
            beyond_the_run: spans > line.most_spans * 1.05,
        })
    }

    /// The coefficients for people, lines ended.
    pub fn text(&self) -> String {
        let mut out = format!("fitted to {} of igsim {} on {}\n", self.regime.name(), self.version, self.machine);
        for l in &self.lines {
            let [base, _, slope] = l.covariance.map(|v| v.max(0.0).sqrt());
            // Writing to a String does not fail.
            let _ = writeln!(
                out,
                "  {:<9} {:.2} us per request (+- {base:.2}), {:.3} us per kept span (+- {slope:.3}), {:.0} bytes per span, held-out error {:.2} us",
                l.path.name(),
                l.base_us,
                l.per_span_us,
                l.bytes_per_span,
                l.held_out_us,
            );
        }
        out
    }
}

impl Prediction {
    /// For people, lines ended.
    pub fn text(&self, fit: &Fit) -> String {
        let l = &self.load;
        let attributes =
            l.attributes.map_or_else(|| "attributes as in the run".to_owned(), |n| format!("{n} attributes a span"));
        let mut out = format!(
            "{} path, {} spans a trace, {attributes}, ratio {}, {} requests/s; fitted to {} of igsim {}\n",
            self.path.name(),
            l.spans,
            l.ratio,
            l.rps,
            fit.regime.name(),
            fit.version,
        );
        let compression = if l.compression == 1.0 {
            "no compression assumed".to_owned()
        } else {
            format!("compression {} assumed", l.compression)
        };
        let Interval { low, high } = self.cores_interval;
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "  CPU      {:.4} cores [{low:.4}, {high:.4}], {} us per request; a block of the run lay {} us off",
            self.cores,
            digits(self.us_per_request),
            digits(self.held_out_us)
        );
        let _ = writeln!(out, "  wire     {} a day", bytes(self.wire_bytes_per_day));
        let _ = writeln!(out, "  storage  {} a day, {compression}", bytes(self.stored_bytes_per_day));
        let _ = writeln!(out, "  on {}: another machine has other costs", fit.machine);
        if self.beyond_the_run {
            out.push_str("  WARNING  more spans per request than any arm of the run had: an extrapolation\n");
        }
        out
    }
}

/// In decimal units, as storage is sold.
fn bytes(value: f64) -> String {
    match value {
        v if v >= 1e12 => format!("{} TB", digits(v / 1e12)),
        v if v >= 1e9 => format!("{} GB", digits(v / 1e9)),
        v if v >= 1e6 => format!("{} MB", digits(v / 1e6)),
        v => format!("{} kB", digits(v / 1e3)),
    }
}

impl Line {
    /// Microseconds per request at so many kept spans per request.
    fn at(&self, spans: f64) -> f64 {
        self.base_us + spans * self.per_span_us
    }

    /// The standard error of that.
    fn standard_error(&self, spans: f64) -> f64 {
        let [base, both, slope] = self.covariance;
        (base + 2.0 * spans * both + spans * spans * slope).max(0.0).sqrt()
    }
}

/// One block: kept spans per request, and microseconds per request above its references.
type Point = (f64, f64);

/// Fewer rounds have no error worth the name.
const FEWEST_ROUNDS: usize = 3;

fn line(run: &Run, regime: Regime, path: Path) -> Option<Line> {
    let blocks = || run.blocks.iter().filter(|b| b.regime == regime && b.answered > 0);
    let references = References::new(blocks().filter(|b| b.arm == Arm::Off));
    let own =
        || blocks().filter(|b| matches!(b.arm, Arm::Traced { path: p, receiver: Health::Healthy, .. } if p == path));
    let mut rounds: BTreeMap<u32, Vec<Point>> = BTreeMap::new();
    for block in own() {
        if let Some(point) = point(block, &references) {
            rounds.entry(block.round).or_default().push(point);
        }
    }
    let mut ratios: Vec<f64> = own().filter_map(|b| b.arm.ratio()).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.dedup();
    if rounds.len() < FEWEST_ROUNDS || ratios.len() < 2 {
        return None;
    }
    let all: Vec<Point> = rounds.values().flatten().copied().collect();
    let (base_us, per_span_us) = least_squares(&all)?;
    let (covariance, held_out_us) = left_out(&rounds, base_us, per_span_us)?;
    let (mut spans, mut bytes, mut sampled) = (0.0, 0.0, 0.0);
    for b in own() {
        // What the receiver took, not what it had room to keep.
        spans += b.telemetry.exported as f64;
        bytes += b.telemetry.receiver_bytes as f64;
        sampled += b.arm.ratio().unwrap_or(0.0) * b.answered as f64;
    }
    let per = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
    Some(Line {
        path,
        base_us,
        per_span_us,
        bytes_per_span: per(bytes, spans),
        spans_per_trace: per(spans, sampled),
        rounds: rounds.len(),
        most_spans: all.iter().map(|p| p.0).fold(0.0, f64::max),
        held_out_us,
        covariance,
    })
}

fn point(block: &Block, references: &References<'_>) -> Option<Point> {
    let cpu = |b: &Block| b.cpu.gateway() + b.cpu.engine_request + b.cpu.engine_exporter;
    let [a, b] = references.around(block.place)?;
    let spans = block.telemetry.exported as f64 / block.answered as f64;
    Some((spans, cpu(block) - (cpu(a) + cpu(b)) / 2.0))
}

/// The line with the least squares; none where all points have the same number of spans.
fn least_squares(points: &[Point]) -> Option<(f64, f64)> {
    let n = points.len() as f64;
    let (mx, my) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let sxx: f64 = points.iter().map(|p| (p.0 - mx).powi(2)).sum();
    let sxy: f64 = points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    let slope = sxy / sxx;
    slope.is_finite().then_some((my - slope * mx, slope))
}

/// The jackknife covariance of base and slope (Efron and Tibshirani, chapter 11), and the root mean square error of the
/// rounds left out.
fn left_out(rounds: &BTreeMap<u32, Vec<Point>>, base: f64, slope: f64) -> Option<([f64; 3], f64)> {
    let n = rounds.len() as f64;
    let (mut covariance, mut squares, mut count) = ([0.0; 3], 0.0, 0.0);
    for (left, held) in rounds {
        let rest: Vec<Point> = rounds.iter().filter(|(r, _)| *r != left).flat_map(|(_, p)| p.iter().copied()).collect();
        let (b, s) = least_squares(&rest)?;
        let (db, ds) = (b - base, s - slope);
        let scale = (n - 1.0) / n;
        covariance[0] += scale * db * db;
        covariance[1] += scale * db * ds;
        covariance[2] += scale * ds * ds;
        squares += held.iter().map(|(x, y)| (y - b - s * x).powi(2)).sum::<f64>();
        count += held.len() as f64;
    }
    Some((covariance, (squares / count).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::super::analysis::synthetic::{Noise, run};
    use super::*;

    /// Every traced request pays 2 % of 20 + 30 us, every kept span 0.5 us: see the synthetic run.
    fn fitted(seed: u64) -> Fit {
        let mut arms = vec![Arm::Control];
        arms.extend([0.0, 0.01, 0.1, 1.0].map(|r| Arm::traced(Path::Deferred, r)));
        arms.push(Arm::traced(Path::Eager, 1.0));
        let truth = |arm: &Arm| if matches!(arm, Arm::Traced { .. }) { 1.02 } else { 1.0 };
        let run = run(Regime::Saturation, 20, &arms, &Noise { sd: 0.005, drift: 0.0 }, seed, truth);
        let attributes = Attributes { per_span: 8.0, ns: 20.0, bytes: 15.0 };
        Fit::of(&run, &BTreeMap::from([(Path::Deferred, attributes)])).unwrap()
    }

    const LOAD: Load = Load { spans: 24.0, attributes: None, ratio: 0.1, rps: 1000.0, compression: 1.0 };

    #[test]
    fn a_line_is_found_again() {
        let fit = fitted(1);
        let [line] = &fit.lines[..] else { panic!("{fit:?}: one ratio of eager is not enough for a line") };
        assert!((line.base_us - 1.0).abs() < 0.15, "{line:?}");
        assert!((line.per_span_us - 0.5).abs() < 0.01, "{line:?}");
        assert_eq!((line.bytes_per_span, line.rounds), (180.0, 20));
        assert!((line.spans_per_trace - 24.0).abs() < 1e-9);
        // Half a per cent of 50 us, with the noise of the references.
        assert!((0.2..0.45).contains(&line.held_out_us), "{line:?}");
    }

    #[test]
    fn a_prediction_reads_well() {
        let fit = fitted(1);
        let found = fit.predict(Path::Deferred, LOAD).unwrap();
        insta::assert_snapshot!(fit.text() + &found.text(&fit), @r"
        fitted to saturation of igsim 0.0.0 on 2 x Test CPU (virtual), 8,192 MiB, Linux 6.1
          deferred  0.96 us per request (+- 0.05), 0.502 us per kept span (+- 0.003), 180 bytes per span, held-out error 0.30 us
        deferred path, 24 spans a trace, attributes as in the run, ratio 0.1, 1000 requests/s; fitted to saturation of igsim 0.0.0
          CPU      0.0022 cores [0.0021, 0.0022], 2.16 us per request; a block of the run lay 0.30 us off
          wire     37.3 GB a day
          storage  37.3 GB a day, no compression assumed
          on 2 x Test CPU (virtual), 8,192 MiB, Linux 6.1: another machine has other costs
        ");
        let large = Load { spans: 40.0, attributes: Some(16.0), ratio: 1.0, compression: 8.0, ..LOAD };
        insta::assert_snapshot!(fit.predict(Path::Deferred, large).unwrap().text(&fit), @r"
        deferred path, 40 spans a trace, 16 attributes a span, ratio 1, 1000 requests/s; fitted to saturation of igsim 0.0.0
          CPU      0.0274 cores [0.0272, 0.0276], 27.4 us per request; a block of the run lay 0.30 us off
          wire     1.04 TB a day
          storage  130 GB a day, compression 8 assumed
          on 2 x Test CPU (virtual), 8,192 MiB, Linux 6.1: another machine has other costs
          WARNING  more spans per request than any arm of the run had: an extrapolation
        ");
    }

    #[test]
    fn the_interval_holds_the_truth_as_often_as_it_says() {
        // 1 us and 2.4 spans of 0.5 us.
        let held = (0..100).filter(|seed| {
            let found = fitted(*seed).predict(Path::Deferred, LOAD).unwrap();
            found.cores_interval.contains(2.2e-3)
        });
        let held = held.count();
        assert!((88..=100).contains(&held), "{held} of 100");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let mut fit = fitted(1);
        assert_eq!(fit.predict(Path::Direct, LOAD), Err(Unpredictable::NoSuchPath("direct")));
        fit.attributes.clear();
        let asked = Load { attributes: Some(3.0), ..LOAD };
        assert_eq!(fit.predict(Path::Deferred, asked), Err(Unpredictable::NoAttributes));
        let none = run(Regime::Floor, 20, &[Arm::Control], &Noise { sd: 0.01, drift: 0.0 }, 1, |_| 1.0);
        assert_eq!(Fit::of(&none, &BTreeMap::new()), Err(Unpredictable::NothingToFit));
        let text = serde_json::to_string(&fit).unwrap();
        assert_eq!(serde_json::from_str::<Fit>(&text).unwrap(), fit);
    }
}
