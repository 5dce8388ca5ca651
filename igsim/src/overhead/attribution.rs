//! Where the cost of tracing goes: parts of a trace's cost, and what traces, spans and attributes cost on each path.
//!
//! Written by the program `attribution` of the benches, which measures; read by `igsim overhead fit`, for predictions. Nothing
//! in here measures.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use super::format;
use super::model::{Machine, Path};
use super::predict::Attributes;
use super::stats::{Interval, LEVEL, Moments};
use crate::report::digits;

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attribution {
    /// Version of igsim.
    pub version: String,
    /// The machine.
    pub machine: Machine,
    /// Rounds that were measured.
    pub rounds: usize,
    /// Spans of the trace whose cost is taken apart: that of the default scenario.
    pub spans_per_trace: u32,
    /// Attributes of a span of that trace, on average.
    pub attributes_per_span: f64,
    /// Its cost, part by part.
    pub parts: Vec<Part>,
    /// Costs by size, from made-up traces.
    pub costs: Vec<Costs>,
}

/// A part of a trace's cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// The path.
    pub path: Path,
    /// What it is; several stages where the path does not separate them.
    pub what: String,
    /// Which thread pays it.
    pub payer: Payer,
    /// Nanoseconds of CPU per trace.
    pub nanos: Figure,
}

/// Who pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payer {
    /// The thread that serves the request.
    Request,
    /// A thread behind it.
    Background,
    /// All of them.
    All,
}

/// A mean over rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The mean.
    pub mean: f64,
    /// Its 95 % interval (Student's).
    pub interval: Interval,
}

/// What a path costs by the size of a trace: `trace + spans * span + attributes * attribute`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// The path.
    pub path: Path,
    /// Nanoseconds of CPU of the thread that serves the request.
    pub request: Terms,
    /// Nanoseconds of CPU of all threads behind it: fold, encode, send.
    pub background: Terms,
    /// Nanoseconds of CPU of both.
    pub total: Terms,
    /// Bytes of export requests, not compressed, each trace's share of their resources among them.
    pub bytes: Terms,
}

/// The terms of a cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// For a trace, beside its spans and attributes.
    pub trace: Figure,
    /// For a span without attributes.
    pub span: Figure,
    /// For an attribute.
    pub attribute: Figure,
}

/// The cost of traces of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// Spans of a trace.
    pub spans: f64,
    /// Attributes of a trace, of all its spans.
    pub attributes: f64,
    /// What a trace costs.
    pub cost: f64,
}

impl Figure {
    /// Of one value for each round; nothing where there are fewer than two.
    pub fn of(rounds: &[f64]) -> Option<Figure> {
        let moments = Moments::of(rounds)?;
        Some(Figure { mean: moments.mean, interval: moments.interval(LEVEL) })
    }
}

impl Terms {
    /// Of each round's cells: fitted round by round, so that what rounds differ by is in the intervals.
    pub fn of(rounds: &[Vec<Cell>]) -> Option<Terms> {
        let fits: Vec<[f64; 3]> = rounds.iter().map(|cells| fit(cells)).collect::<Option<_>>()?;
        let figure = |term: usize| Figure::of(&fits.iter().map(|f| f[term]).collect::<Vec<_>>());
        Some(Terms { trace: figure(0)?, span: figure(1)?, attribute: figure(2)? })
    }
}

impl Attribution {
    /// Of a file that the program wrote.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn read(path: &std::path::Path) -> io::Result<Attribution> {
        let bad = |e: &dyn fmt::Display| io::Error::other(format!("{}: this is no attribution: {e}", path.display()));
        let text = std::fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        serde_json::from_slice(&text).map_err(|e| bad(&e))
    }

    /// What an attribute costs on each path, for a fit.
    pub fn attributes(&self) -> BTreeMap<Path, Attributes> {
        let of = |costs: &Costs| Attributes {
            per_span: self.attributes_per_span,
            ns: costs.total.attribute.mean,
            bytes: costs.bytes.attribute.mean,
        };
        self.costs.iter().map(|c| (c.path, of(c))).collect()
    }

    /// For people, lines ended.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let (spans, attributes) = (f64::from(self.spans_per_trace), self.attributes_per_span);
        writeln!(out, "igsim {}  where the cost of tracing goes  {} rounds", self.version, self.rounds)?;
        writeln!(out, "{}", format::machine(&self.machine))?;
        writeln!(
            out,
            "\nA trace of {spans} spans with {attributes:.1} attributes each, from record to acknowledgement"
        )?;
        writeln!(out, "  {:<9} {:<34} {:<11} {:<26} ns/span", "path", "part", "thread", "us CPU per trace, 95 %")?;
        for Part { path, what, payer, nanos } in &self.parts {
            let each = digits(nanos.mean / spans);
            let us = nanos.shown(1e-3);
            writeln!(out, "  {:<9} {what:<34} {:<11} {us:<26} {each:>7}", path.name(), payer.name())?;
        }
        writeln!(out, "\nMade-up traces of 6 to 48 spans with 0 to 16 attributes each: fitted by least squares")?;
        let head = ["per trace", "per span", "per attribute"].map(|c| format!("{c:<26}")).concat();
        writeln!(out, "  {:<9} {:<24} {}", "path", "cost", head.trim_end())?;
        for Costs { path, request, background, total, bytes } in &self.costs {
            let rows = [("ns, request thread", request), ("ns, threads behind it", background), ("ns, all", total)];
            for (name, terms) in rows.into_iter().chain([("bytes", bytes)]) {
                let Terms { trace, span, attribute } = terms;
                let cells = [trace, span, attribute].map(|f| format!("{:<26}", f.shown(1.0))).concat();
                writeln!(out, "  {:<9} {name:<24} {}", path.name(), cells.trim_end())?;
            }
        }
        Ok(())
    }
}

impl Payer {
    const fn name(self) -> &'static str {
        match self {
            Payer::Request => "request",
            Payer::Background => "background",
            Payer::All => "all",
        }
    }
}

impl Figure {
    fn shown(&self, scale: f64) -> String {
        let [mean, low, high] = [self.mean, self.interval.low, self.interval.high].map(|v| signed(v * scale));
        format!("{mean} [{low}, {high}]")
    }
}

fn signed(value: f64) -> String {
    let sign = if value < 0.0 { "-" } else { "" };
    format!("{sign}{}", digits(value.abs()))
}

/// Least squares of `trace + spans * span + attributes * attribute`, each cell weighted by one over the square of its size, so
/// that large traces do not drown small ones: noise grows with the cost. Nothing where the cells do not tell the terms apart.
fn fit(cells: &[Cell]) -> Option<[f64; 3]> {
    let mut a = [[0.0; 4]; 3];
    for Cell { spans, attributes, cost } in cells {
        let weight = 1.0 / (spans + attributes).powi(2);
        let row = [1.0, *spans, *attributes, *cost];
        for (equation, own) in a.iter_mut().zip(row) {
            equation.iter_mut().zip(row).for_each(|(sum, other)| *sum += weight * own * other);
        }
    }
    solve(a)
}

/// Gauss's elimination, for normal equations: their diagonal is the pivot.
fn solve(mut a: [[f64; 4]; 3]) -> Option<[f64; 3]> {
    for i in 0..3 {
        let pivot = a[i][i];
        a[i].iter_mut().for_each(|v| *v /= pivot);
        let own = a[i];
        for (_, other) in a.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = other[i];
            other.iter_mut().zip(own).for_each(|(v, o)| *v -= factor * o);
        }
    }
    let found = a.map(|equation| equation[3]);
    found.iter().all(|v| v.is_finite()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(trace: f64, span: f64, attribute: f64) -> Vec<Cell> {
        let sizes = [6.0, 12.0, 24.0, 48.0].into_iter().flat_map(|n| [0.0, 4.0, 8.0, 16.0].map(|m| (n, n * m)));
        sizes
            .map(|(spans, attributes)| Cell { spans, attributes, cost: trace + spans * span + attributes * attribute })
            .collect()
    }

    fn costs(path: Path) -> Costs {
        let terms = |scale: f64| {
            let rounds = [0.9, 1.0, 1.1].map(|r| cells(600.0 * r * scale, 300.0 * r * scale, 40.0 * r * scale));
            Terms::of(&rounds).unwrap()
        };
        Costs { path, request: terms(0.25), background: terms(0.75), total: terms(1.0), bytes: terms(0.5) }
    }

    fn attribution() -> Attribution {
        let nanos = Figure::of(&[2_400.0, 2_500.0, 2_600.0]).unwrap();
        let part = |what: &str, payer| Part { path: Path::Deferred, what: what.to_owned(), payer, nanos };
        Attribution {
            version: "0.0.0".into(),
            machine: Machine {
                cpu: "Test CPU".into(),
                cpus: 2,
                memory_mib: 8_192,
                kernel: "6.1".into(),
                virtual_machine: true,
                awake: false,
            },
            rounds: 3,
            spans_per_trace: 24,
            attributes_per_span: 6.5,
            parts: vec![part("recording", Payer::Request), part("folding", Payer::Background)],
            costs: vec![costs(Path::Deferred)],
        }
    }

    #[test]
    fn terms_are_found_again() {
        let found = Terms::of(&[cells(500.0, 250.0, 30.0), cells(700.0, 350.0, 50.0)]).unwrap();
        for (figure, mean) in [(found.trace, 600.0), (found.span, 300.0), (found.attribute, 40.0)] {
            assert!((figure.mean - mean).abs() < 1e-6 && figure.interval.contains(mean), "{figure:?}");
        }
        assert_eq!(Terms::of(&[cells(1.0, 1.0, 1.0)]), None, "one round has no interval");
        let alike = vec![Cell { spans: 6.0, attributes: 0.0, cost: 1.0 }; 4];
        assert_eq!(Terms::of(&[alike.clone(), alike]), None, "cells of one size tell nothing apart");
    }

    #[test]
    fn a_table_reads_well() {
        insta::assert_snapshot!(attribution().text(), @"
        igsim 0.0.0  where the cost of tracing goes  3 rounds
        2 x Test CPU (virtual), 8,192 MiB, Linux 6.1

        A trace of 24 spans with 6.5 attributes each, from record to acknowledgement
          path      part                               thread      us CPU per trace, 95 %     ns/span
          deferred  recording                          request     2.50 [2.25, 2.75]              104
          deferred  folding                            background  2.50 [2.25, 2.75]              104

        Made-up traces of 6 to 48 spans with 0 to 16 attributes each: fitted by least squares
          path      cost                     per trace                 per span                  per attribute
          deferred  ns, request thread       150 [113, 187]            75.0 [56.4, 93.6]         10.0 [7.52, 12.5]
          deferred  ns, threads behind it    450 [338, 562]            225 [169, 281]            30.0 [22.5, 37.5]
          deferred  ns, all                  600 [451, 749]            300 [225, 375]            40.0 [30.1, 49.9]
          deferred  bytes                    300 [225, 375]            150 [113, 187]            20.0 [15.0, 25.0]
        ");
    }

    #[test]
    fn it_is_read_back_as_it_was() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_string(&attribution()).unwrap()).unwrap();
        let read = Attribution::read(file.path()).unwrap();
        assert_eq!((read.rounds, read.parts.len()), (3, 2));
        let attributes = read.attributes()[&Path::Deferred];
        assert_eq!((attributes.per_span, attributes.ns.round(), attributes.bytes.round()), (6.5, 40.0, 20.0));
        std::fs::write(file.path(), "{}").unwrap();
        let problem = Attribution::read(file.path()).unwrap_err().to_string();
        assert!(problem.contains("this is no attribution: missing field"), "{problem}");
    }
}
