//! Recorded traces, read line by line: when requests came and how long they were.
//!
//! A trace holds no text. What prompts share is made of names: the blocks of a Mooncake trace, the prefix groups of a CSV. An
//! error names the file, the line, what was found and what is expected. Nothing here knows of tenants' names or engines.

mod azure;
mod generic;
mod mooncake;

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use shared::rng::Seed;
use shared::time::Time;

use crate::scenario::{Trace, TraceFormat};
use crate::workload::Segment;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// When it came, since the first request, with the speed-up applied.
    pub at: Time,
    /// The parts of the prompt that may be shared.
    pub prompt: Vec<Segment>,
    /// Tokens of text of its own after that.
    pub own_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// The tenant, where the trace says.
    pub tenant: Option<u16>,
    /// The priority, where the trace says.
    pub priority: Option<i32>,
}

/// Why a trace cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayError {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 when it is the file itself.
    pub line: u64,
    /// What was found.
    pub found: String,
    /// What is expected.
    pub expected: String,
}

impl std::error::Error for ReplayError {}

impl fmt::Display for ReplayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": found {}, expected {}", self.found, self.expected)
    }
}

/// What is wrong with a line; the reader adds the file.
#[derive(Debug)]
struct Wrong {
    line: u64,
    found: String,
    expected: String,
}

impl Wrong {
    fn new(line: u64, found: impl Into<String>, expected: impl Into<String>) -> Wrong {
        Wrong { line, found: found.into(), expected: expected.into() }
    }
}

type Records = Box<dyn Iterator<Item = Result<Recorded, Wrong>> + Send>;

/// A trace being read: one request after the other, in order of time.
pub struct Reader {
    file: String,
    records: Records,
    left: u64,
    speed_up: f64,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("file", &self.file).field("left", &self.left).finish_non_exhaustive()
    }
}

impl Reader {
    /// Opens the trace of a scenario.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(trace: &Trace, seed: Seed) -> Result<Reader, ReplayError> {
        let name = |path: &Path| path.display().to_string();
        let file = File::open(&trace.path).map_err(|e| ReplayError {
            file: name(&trace.path),
            line: 0,
            found: e.to_string(),
            expected: "a readable trace file".to_owned(),
        })?;
        Ok(Reader::new(&name(&trace.path), file, trace, seed))
    }

    /// Reads a trace from `input`; `name` is what errors call it.
    pub fn new(name: &str, input: impl Read + Send + 'static, trace: &Trace, seed: Seed) -> Reader {
        let records: Records = match trace.format {
            TraceFormat::Mooncake => Box::new(mooncake::read(BufReader::new(input), trace.spread, seed)),
            TraceFormat::Azure => Box::new(azure::read(input)),
            TraceFormat::Csv => Box::new(generic::read(input, seed)),
        };
        let left = trace.limit.unwrap_or(u64::MAX);
        Reader { file: name.to_owned(), records, left, speed_up: trace.speed_up }
    }

    /// Dividing whole numbers by one leaves them as they are, beyond 2^53 as well.
    fn scaled(&self, at: Time) -> Time {
        if self.speed_up == 1.0 { at } else { Time::from_nanos((at.as_nanos() as f64 / self.speed_up).round() as u64) }
    }
}

impl Iterator for Reader {
    type Item = Result<Recorded, ReplayError>;

    fn next(&mut self) -> Option<Result<Recorded, ReplayError>> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        match self.records.next()? {
            Ok(recorded) => Some(Ok(Recorded { at: self.scaled(recorded.at), ..recorded })),
            Err(Wrong { line, found, expected }) => {
                self.left = 0;
                Some(Err(ReplayError { file: self.file.clone(), line, found, expected }))
            }
        }
    }
}

/// Tokens are counted from 1: a request without a prompt or an answer cannot be sent.
fn tokens(line: u64, field: &str, value: u64) -> Result<u32, Wrong> {
    u32::try_from(value)
        .ok()
        .filter(|&v| (1..=MAX_TOKENS).contains(&v))
        .ok_or_else(|| Wrong::new(line, format!("{field} {value}"), format!("1 to {MAX_TOKENS} tokens")))
}

/// Far above any model's context, far below what would exhaust memory.
const MAX_TOKENS: u32 = 16 << 20;

/// A field of a CSV record as a number.
fn number<T: std::str::FromStr>(line: u64, field: &str, text: &str, expected: &str) -> Result<T, Wrong> {
    text.trim().parse().map_err(|_| Wrong::new(line, format!("{field} {text:?}"), expected))
}

/// The line of a CSV record.
fn line_of(row: &csv::StringRecord) -> u64 {
    row.position().map_or(0, csv::Position::line)
}

/// What the CSV reader itself complains about.
fn csv_error(e: &csv::Error) -> Wrong {
    let line = e.position().map_or(0, csv::Position::line);
    match e.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            Wrong::new(line, format!("{len} fields"), format!("{expected_len}, as in the header"))
        }
        csv::ErrorKind::Utf8 { .. } => Wrong::new(line, "bytes that are not UTF-8", "UTF-8 text"),
        _ => Wrong::new(line, e.to_string(), "CSV"),
    }
}

#[cfg(test)]
mod tests;
