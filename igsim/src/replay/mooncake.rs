//! The Mooncake traces: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.
//!
//! A hash id names a block of 512 tokens together with everything before it, so equal ids mean equal text given an equal prefix.
//! Its text here is named by id and position. The last block may be partial. Timestamps are ticks of about 3 s with some ten
//! requests each; replayed as they are, they would be bursts, so the requests of a tick are spread until the next.

use std::collections::VecDeque;
use std::io::{BufRead, Read};

use serde::Deserialize;
use shared::rng::{Seed, Stream, mix64};
use shared::time::{Dur, Time};
use shared::tokens::ContentId;

use super::{Recorded, Wrong, tokens};
use crate::scenario::Spread;
use crate::workload::Segment;

/// Tokens in a block of the trace.
const BLOCK: u32 = 512;
/// The longest line that is read, in bytes: a million-token prompt has 2,000 ids.
const MAX_LINE: u64 = 1 << 20;
/// The most requests of one timestamp.
const MAX_TICK: usize = 1_000_000;
/// How long the last tick lasts when it is also the first.
const TICK: Dur = Dur::from_secs(3);

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// The records of `input`.
pub(super) fn read<R: BufRead + Send>(
    input: R,
    spread: Spread,
    seed: Seed,
) -> impl Iterator<Item = Result<Recorded, Wrong>> + Send {
    let stream = seed.stream("replay/spread");
    let lines = Lines { input, line: 0, origin: None, last: 0 };
    Ticks { lines, ahead: None, ready: VecDeque::new(), tick: TICK, spread, stream, failed: None }
}

/// Parsed lines with their time since the first.
struct Lines<R> {
    input: R,
    line: u64,
    origin: Option<u64>,
    last: u64,
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Recorded, Wrong>;

    fn next(&mut self) -> Option<Result<Recorded, Wrong>> {
        let mut text = String::new();
        loop {
            self.line += 1;
            text.clear();
            match (&mut self.input).take(MAX_LINE).read_line(&mut text) {
                Ok(0) => return None,
                Ok(n) if n as u64 == MAX_LINE => {
                    return Some(Err(self.wrong("a line without end", format!("lines below {MAX_LINE} bytes"))));
                }
                Ok(_) if text.trim().is_empty() => {}
                Ok(_) => return Some(self.parse(&text)),
                Err(e) => return Some(Err(self.wrong(e.to_string(), "JSON lines"))),
            }
        }
    }
}

impl<R: BufRead> Lines<R> {
    fn wrong(&self, found: impl Into<String>, expected: impl Into<String>) -> Wrong {
        Wrong::new(self.line, found, expected)
    }

    fn parse(&mut self, text: &str) -> Result<Recorded, Wrong> {
        let line: Line = serde_json::from_str(text).map_err(|e| {
            // The line and column of the text it was given mean nothing to the reader of a file.
            let text = e.to_string();
            let why = text.split(" at line ").next().unwrap_or_default();
            let expected = "an object with timestamp, input_length, output_length and hash_ids";
            self.wrong(format!("a line that does not fit ({why})"), expected)
        })?;
        let input = tokens(self.line, "input_length", line.input_length)?;
        let output_tokens = tokens(self.line, "output_length", line.output_length)?;
        let blocks = input.div_ceil(BLOCK) as usize;
        if line.hash_ids.len() != blocks {
            let expected = format!("{blocks}, one for each {BLOCK} of {input} tokens");
            return Err(self.wrong(format!("{} hash_ids", line.hash_ids.len()), expected));
        }
        let since = line.timestamp.checked_sub(*self.origin.get_or_insert(line.timestamp));
        let Some(since) = since.filter(|&s| s >= self.last) else {
            let found = format!("timestamp {}", line.timestamp);
            return Err(self.wrong(found, "a time not before that of the line before"));
        };
        self.last = since;
        Ok(Recorded {
            at: Time::from_nanos(since.saturating_mul(1_000_000)),
            prompt: line.hash_ids.iter().zip(0..).map(|(&id, i)| block(input, i, id)).collect(),
            own_tokens: 0,
            output_tokens,
            tenant: None,
            priority: None,
        })
    }
}

/// Block `i` of a prompt of `input` tokens.
fn block(input: u32, i: u32, id: u64) -> Segment {
    let content = ContentId(mix64(mix64(id) ^ u64::from(i)));
    Segment { content, from: 0, tokens: BLOCK.min(input - i * BLOCK) }
}

/// Spreads the requests of each tick until the next.
struct Ticks<R> {
    lines: Lines<R>,
    /// The first request of the next tick.
    ahead: Option<Recorded>,
    ready: VecDeque<Recorded>,
    /// Length of the latest tick.
    tick: Dur,
    spread: Spread,
    stream: Stream,
    /// An error found while reading ahead, told when its turn comes.
    failed: Option<Wrong>,
}

impl<R: BufRead> Iterator for Ticks<R> {
    type Item = Result<Recorded, Wrong>;

    fn next(&mut self) -> Option<Result<Recorded, Wrong>> {
        if self.spread == Spread::None {
            return self.lines.next();
        }
        if self.ready.is_empty() {
            self.fill();
        }
        self.ready.pop_front().map(Ok).or_else(|| self.failed.take().map(Err))
    }
}

impl<R: BufRead> Ticks<R> {
    /// Reads one tick and one line more.
    fn fill(&mut self) {
        let Some(first) = self.ahead.take().or_else(|| self.pull()) else { return };
        let start = first.at;
        self.ready.push_back(first);
        while let Some(next) = self.pull() {
            if next.at > start {
                self.tick = next.at.since(start);
                self.ahead = Some(next);
                break;
            }
            self.ready.push_back(next);
        }
        let offsets = self.offsets(self.ready.len());
        for (request, offset) in self.ready.iter_mut().zip(offsets) {
            request.at += offset;
        }
    }

    fn pull(&mut self) -> Option<Recorded> {
        if self.failed.is_some() {
            return None;
        }
        if self.ready.len() == MAX_TICK {
            self.failed = Some(self.lines.wrong("too many requests of one timestamp", format!("at most {MAX_TICK}")));
            return None;
        }
        match self.lines.next()? {
            Ok(recorded) => Some(recorded),
            Err(wrong) => {
                self.failed = Some(wrong);
                None
            }
        }
    }

    /// Offsets of `n` requests within the tick, in order. Uniform points in order are a Poisson process given its count.
    fn offsets(&mut self, n: usize) -> Vec<Dur> {
        let tick = u128::from(self.tick.as_nanos());
        let part = |k: u64, of: u64| Dur::from_nanos((tick * u128::from(k) / u128::from(of)) as u64);
        match self.spread {
            Spread::None => vec![Dur::ZERO; n],
            Spread::Even => (0..n as u64).map(|i| part(i, n as u64)).collect(),
            Spread::Random => {
                let mut at: Vec<Dur> = (0..n).map(|_| part(self.stream.next_u64() >> 11, 1 << 53)).collect();
                at.sort_unstable();
                at
            }
        }
    }
}
