//! Where the cost of tracing goes, in CPU time of this process's threads: part by part for the trace of the default scenario, and
//! by trace, span and attribute for made-up ones, on every path.
//!
//! `attribution [--out FILE.json]`: a table on standard output, and a file for `igsim overhead fit --attribution`. Takes about a
//! minute. Paths and sizes take turns, round by round, so that what changes with time falls on all alike.

mod pipeline;
mod synthetic;

use std::path::PathBuf;
use std::process::ExitCode;

use benches::{Facts, one_traced_request};
use gateway::spans::proxy_span_id;
use http::HeaderMap;
use igsim::overhead::attribution::{Attribution, Cell, Costs, Figure, Part, Payer, Terms};
use igsim::overhead::cpu;
use igsim::overhead::model::Path;
use igsim::overhead::place;
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::trace::Span;

use pipeline::{Pipeline, Spent, record};
use synthetic::Made;

/// Rounds, unless time runs out first.
const ROUNDS: usize = 24;
/// Fewer have no interval worth the name.
const FEWEST: usize = 3;
/// No round begins later than this.
const BUDGET: Dur = Dur::from_secs(55);
/// Spans of one burst: fewer than may wait for an exporter, enough for full batches.
const BURST: u32 = 7_200;
/// Sizes of made-up traces: spans, and attributes of each.
const SPANS: [u32; 4] = [6, 12, 24, 48];
const ATTRIBUTES: [u32; 4] = [0, 4, 8, 16];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => attribute(None),
        ["--out", file] => attribute(Some(file.into())),
        _ => Err("usage: attribution [--out FILE.json]".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn attribute(out: Option<PathBuf>) -> Result<(), String> {
    let clock = RunClock::start();
    let receiver = pipeline::receiver()?;
    let pipelines = Path::ALL.map(|path| Pipeline::start(path, &receiver, clock));
    let pipelines: Vec<Pipeline> = pipelines.into_iter().collect::<Result<_, _>>()?;
    let default = Default::new();
    // What is done once, connections and buffers among it, is done here.
    round(&pipelines, &default)?;
    let mut rounds = Vec::new();
    while rounds.len() < ROUNDS && (rounds.len() < FEWEST || clock.now().since(Time::ZERO) < BUDGET) {
        rounds.push(round(&pipelines, &default)?);
    }
    let attribution = default.conclude(&rounds).ok_or("too few rounds for intervals")?;
    print!("{}", attribution.text());
    print!("{NOTES}");
    match out {
        Some(file) => {
            let text = serde_json::to_string_pretty(&attribution).map_err(|e| e.to_string())?;
            std::fs::write(&file, text + "\n").map_err(|e| format!("{}: {e}", file.display()))
        }
        None => Ok(()),
    }
}

const NOTES: &str = "
eager makes SDK spans as facts come: context, recording and folding are one. direct folds and encodes in one pass.
The SDK encodes and sends on one thread: sending is taken to cost what an export request of direct costs, the rest is encoding.
Recording is what the request thread pays beyond context. CPU time of the kernel's network code counts with sending.
";

/// What one round says of one path.
struct Round {
    /// The trace of the default scenario, per trace.
    default: Spent,
    /// Its context handling alone, in nanoseconds per trace; of the deferred recorder.
    context: f64,
    /// Costs of made-up traces, by size.
    cells: Vec<(u32, u32, Spent)>,
}

fn round(pipelines: &[Pipeline], default: &Default) -> Result<Vec<Round>, String> {
    let measure = |pipeline: &Pipeline| {
        let spent = default.spend(pipeline)?;
        Ok(Round { default: spent, context: default.context(pipeline), cells: Vec::new() })
    };
    let mut rounds: Vec<Round> = pipelines.iter().map(measure).collect::<Result<_, String>>()?;
    for (spans, attributes) in SPANS.into_iter().flat_map(|n| ATTRIBUTES.map(|m| (n, m))) {
        let facts = synthetic::facts(spans, attributes);
        for (pipeline, round) in pipelines.iter().zip(&mut rounds) {
            let spent = made_up(pipeline, &facts, spans)?;
            round.cells.push((spans, attributes, spent));
        }
    }
    Ok(rounds)
}

/// One burst of made-up traces, per trace.
fn made_up(pipeline: &Pipeline, facts: &[(Time, Made)], spans: u32) -> Result<Spent, String> {
    let (headers, traces) = (HeaderMap::new(), BURST / spans);
    let end = Time::from_nanos(2_000_000);
    let spent = pipeline.spend(|p| (0..traces).for_each(|_| record(&p.gateway, &headers, facts, end)))?;
    per_trace(spent, traces, spans)
}

/// Each trace's share. An error if spans were lost: then the cost is not that of all of them.
fn per_trace(spent: Spent, traces: u32, spans: u32) -> Result<Spent, String> {
    let (n, expected) = (f64::from(traces), f64::from(traces * spans));
    if spent.spans != expected {
        return Err(format!("{} of {expected} spans were exported", spent.spans));
    }
    Ok(Spent {
        request: spent.request / n,
        worker: spent.worker / n,
        batches: spent.batches / n,
        sender: spent.sender / n,
        requests: spent.requests / n,
        bytes: spent.bytes / n,
        spans: spent.spans / n,
    })
}

/// The trace of the default scenario.
struct Default {
    facts: Facts,
    spans: u32,
    attributes_per_span: f64,
}

impl Default {
    fn new() -> Default {
        let mut spans = Vec::<Span>::new();
        benches::stages::closed_records().iter().for_each(|r| r.fold(&mut spans));
        let attributes: usize = spans.iter().map(|s| s.attrs.len()).sum();
        let attributes_per_span = attributes as f64 / spans.len() as f64;
        Default { facts: one_traced_request(), spans: spans.len() as u32, attributes_per_span }
    }

    /// One burst, per trace: the gateway's part, then the engine's below it.
    fn spend(&self, pipeline: &Pipeline) -> Result<Spent, String> {
        let traces = BURST / self.spans;
        let Facts { gateway, engine, end } = &self.facts;
        let (inbound, mut outbound) = (HeaderMap::new(), HeaderMap::new());
        let one = |p: &Pipeline, outbound: &mut HeaderMap| {
            let (started, trail) = p.gateway.start(&inbound, gateway[0].0);
            if let Some(started) = started {
                let child = started.context.child(proxy_span_id(started.context.span_id, 0));
                p.gateway.inject(&child, outbound);
            }
            gateway.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
            record(&p.engine, outbound, engine, *end);
            trail.finish(*end);
        };
        let spent = pipeline.spend(|p| (0..traces).for_each(|_| one(p, &mut outbound)))?;
        per_trace(spent, traces, self.spans)
    }

    /// The context of both services alone: parse or draw ids, decide, inject. 0 for the eager recorder, whose context cannot be
    /// had without its spans.
    fn context(&self, pipeline: &Pipeline) -> f64 {
        if pipeline.path == Path::Eager {
            return 0.0;
        }
        let traces = BURST / self.spans;
        let (inbound, mut outbound) = (HeaderMap::new(), HeaderMap::new());
        let began = cpu::of_this_thread();
        for _ in 0..traces {
            let started = pipeline.gateway.begin(pipeline.gateway.extract(std::hint::black_box(&inbound)));
            let child = started.context.child(proxy_span_id(started.context.span_id, 0));
            pipeline.gateway.inject(&child, &mut outbound);
            let below = pipeline.engine.begin(pipeline.engine.extract(std::hint::black_box(&outbound)));
            std::hint::black_box(below);
        }
        (cpu::of_this_thread() - began) as f64 / f64::from(traces)
    }

    fn conclude(&self, rounds: &[Vec<Round>]) -> Option<Attribution> {
        let mut parts = Vec::new();
        for (at, path) in Path::ALL.into_iter().enumerate() {
            for (what, payer, values) in parts_of(path, at, rounds) {
                parts.push(Part { path, what: what.to_owned(), payer, nanos: Figure::of(&values)? });
            }
        }
        let costs = Path::ALL.into_iter().enumerate().map(|(at, path)| costs_of(path, at, rounds));
        Some(Attribution {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: place::machine(),
            rounds: rounds.len(),
            spans_per_trace: self.spans,
            attributes_per_span: self.attributes_per_span,
            parts,
            costs: costs.collect::<Option<_>>()?,
        })
    }
}

/// A part of a trace's cost in every round.
type Values = (&'static str, Payer, Vec<f64>);

fn parts_of(path: Path, at: usize, rounds: &[Vec<Round>]) -> Vec<Values> {
    let direct = Path::ALL.iter().position(|p| *p == Path::Direct).unwrap_or(at);
    let each = |of: &dyn Fn(&Round, f64) -> f64| {
        let one = |round: &Vec<Round>| {
            let Spent { sender, requests, .. } = round[direct].default;
            of(&round[at], sender / requests.max(f64::MIN_POSITIVE) * round[at].default.requests)
        };
        rounds.iter().map(one).collect::<Vec<f64>>()
    };
    let (front, behind) = (Payer::Request, Payer::Background);
    let context = || ("context", front, each(&|r, _| r.context));
    let recording = || ("recording", front, each(&|r, _| r.default.request - r.context));
    let encoding = || ("encoding", behind, each(&|r, sending| r.default.sender - sending));
    let sending = ("sending", behind, each(&|_, sending| sending));
    let total = ("all", Payer::All, each(&|r, _| all(&r.default)));
    match path {
        Path::Eager => {
            let spans = ("context, recording and folding", front, each(&|r, _| r.default.request));
            let batches = ("batching", behind, each(&|r, _| r.default.batches + r.default.worker));
            vec![spans, batches, encoding(), sending, total]
        }
        Path::Deferred => {
            let folding = ("folding", behind, each(&|r, _| r.default.worker));
            vec![context(), recording(), folding, encoding(), sending, total]
        }
        Path::Direct => {
            let folding = ("folding and encoding", behind, each(&|r, _| r.default.worker));
            vec![context(), recording(), folding, sending, total]
        }
    }
}

fn all(spent: &Spent) -> f64 {
    spent.request + behind(spent)
}

fn behind(spent: &Spent) -> f64 {
    spent.worker + spent.batches + spent.sender
}

fn costs_of(path: Path, at: usize, rounds: &[Vec<Round>]) -> Option<Costs> {
    let terms = |cost: fn(&Spent) -> f64| {
        let cell = |(spans, each, spent): &(u32, u32, Spent)| Cell {
            spans: f64::from(*spans),
            attributes: f64::from(spans * each),
            cost: cost(spent),
        };
        Terms::of(&rounds.iter().map(|r| r[at].cells.iter().map(cell).collect()).collect::<Vec<_>>())
    };
    Some(Costs {
        path,
        request: terms(|s| s.request)?,
        background: terms(behind)?,
        total: terms(all)?,
        bytes: terms(|s| s.bytes)?,
    })
}
