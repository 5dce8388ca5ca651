//! What the lab and its processes say to each other: one JSON document a line, an answer to every order.
//!
//! Orders come on standard input and answers go to standard output, not over a control port: a measured process then has no
//! listener, connection or task beyond its own work, and it ends by itself when the lab is gone.

use serde::{Deserialize, Serialize};

use crate::overhead::model::{Health, Path};
use crate::overhead::receiver::{Decoded, Taken};
use crate::scenario::Scenario;

/// What a process of the lab is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// A gateway in front of the engines.
    Gateway,
    /// All simulated engines.
    Engine,
    /// The receiver of spans.
    Receiver,
}

impl Role {
    /// Its name on the command line and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Engine => "engine",
            Role::Receiver => "receiver",
        }
    }
}

/// The first order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// CPUs to run on.
    pub cpus: Vec<usize>,
    /// The fleet.
    pub scenario: Box<Scenario>,
    /// Base URLs of the engines, for the gateway.
    pub engines: Vec<String>,
    /// Where spans go: the whole URL, for gateway and engines.
    pub spans_to: String,
    /// The longest time that a span waits for its batch.
    pub schedule_delay_ms: f64,
    /// Bytes of bodies that the receiver keeps in a file, to decode them after the run.
    pub stored_bytes: u64,
}

/// What is recorded from now on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tracing {
    /// Recorder and encoder.
    pub path: Path,
    /// Share of traces kept.
    pub ratio: f64,
    /// Share of engine steps that get a trace of their own.
    pub steps: f64,
}

/// What a process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Begin to serve.
    Start(Start),
    /// Record so, or nothing.
    Arm(Option<Tracing>),
    /// Forget what earlier requests left behind.
    Reset,
    /// Export everything, within so many milliseconds.
    Flush(u64),
    /// Say what became of records and spans, and how much CPU was used.
    Counters,
    /// Engines: say, and forget, how long each request took from its last byte read to the first byte of its answer.
    Served,
    /// Engines: hold back each answer by so many microseconds.
    Delay(f64),
    /// Receiver: behave so.
    Health(Health),
    /// Receiver: say what arrived since the last time.
    Take,
    /// Receiver: decode everything.
    Decode,
}

/// What a process answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It serves at these base URLs.
    Serving(Vec<String>),
    /// It is done.
    Done,
    /// Whether everything is exported or counted as dropped.
    Settled(bool),
    /// What became of records and spans.
    Counters(Counters),
    /// Request ids and nanoseconds.
    Served(Vec<(String, u64)>),
    /// What arrived.
    Taken(Taken),
    /// Everything that arrived.
    Decoded(Decoded),
    /// It could not do what it was told.
    Failed(String),
}

/// What became of records and spans since the process started, all paths together, and its CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Records opened.
    pub records: u64,
    /// Records lost before they were folded.
    pub records_dropped: u64,
    /// Spans made.
    pub spans: u64,
    /// Spans acknowledged.
    pub exported: u64,
    /// Spans lost.
    pub dropped: u64,
    /// Batches acknowledged.
    pub batches: u64,
    /// CPU time of the process, in nanoseconds.
    pub cpu_nanos: u64,
    /// Allocations of the process, where the build counts them.
    pub allocations: Option<u64>,
}

impl Counters {
    /// What happened since `before`.
    #[must_use]
    pub fn since(&self, before: &Counters) -> Counters {
        Counters {
            records: self.records - before.records,
            records_dropped: self.records_dropped - before.records_dropped,
            spans: self.spans - before.spans,
            exported: self.exported - before.exported,
            dropped: self.dropped - before.dropped,
            batches: self.batches - before.batches,
            cpu_nanos: self.cpu_nanos - before.cpu_nanos,
            allocations: self.allocations.zip(before.allocations).map(|(now, then)| now - then),
        }
    }
}
