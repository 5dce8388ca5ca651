//! A plain CSV for traces of one's own.
//!
//! Columns by name, in any order: `arrival_s` (seconds since any origin, not decreasing), `prompt_tokens` (the whole prompt),
//! `output_tokens`, and optionally `prefix_group` (any text; requests of a group share their prefix), `prefix_tokens` (how much
//! of the prompt that is), `priority` (an integer), `tenant` (index into the scenario's tenants). Optional fields may be empty.

use std::io::Read;

use csv::StringRecord;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::tokens::ContentId;

use super::{Recorded, Wrong, csv_error, line_of, number, tokens};
use crate::workload::Segment;

const REQUIRED: [&str; 3] = ["arrival_s", "prompt_tokens", "output_tokens"];
const OPTIONAL: [&str; 4] = ["prefix_group", "prefix_tokens", "priority", "tenant"];

/// The records of `input`; `seed` names the text of prefix groups.
pub(super) fn read(
    input: impl Read + Send + 'static,
    seed: Seed,
) -> impl Iterator<Item = Result<Recorded, Wrong>> + Send {
    let mut reader = csv::Reader::from_reader(input);
    let columns = reader.headers().map_err(|e| csv_error(&e)).and_then(Columns::of);
    let mut parser = columns.map(|columns| Parser { columns, seed, first: None, last: 0.0 }).map_err(Some);
    let mut rows = reader.into_records();
    std::iter::from_fn(move || match &mut parser {
        Ok(parser) => Some(rows.next()?.map_err(|e| csv_error(&e)).and_then(|row| parser.parse(&row))),
        Err(wrong) => wrong.take().map(Err),
    })
}

/// Where the columns are.
struct Columns([usize; 3], [Option<usize>; 4]);

impl Columns {
    fn of(header: &StringRecord) -> Result<Columns, Wrong> {
        let names: Vec<&str> = header.iter().map(str::trim).collect();
        let find = |name: &str| names.iter().position(|n| *n == name);
        if let Some(unknown) = names.iter().find(|n| !REQUIRED.contains(n) && !OPTIONAL.contains(n)) {
            let known = shared::config::one_of(REQUIRED.into_iter().chain(OPTIONAL));
            return Err(Wrong::new(1, format!("the column {unknown:?}"), known));
        }
        let mut required = [0; 3];
        for (slot, name) in required.iter_mut().zip(REQUIRED) {
            *slot = find(name).ok_or_else(|| Wrong::new(1, format!("no column {name}"), REQUIRED.join(",")))?;
        }
        Ok(Columns(required, OPTIONAL.map(find)))
    }
}

struct Parser {
    columns: Columns,
    seed: Seed,
    first: Option<f64>,
    last: f64,
}

impl Parser {
    fn parse(&mut self, row: &StringRecord) -> Result<Recorded, Wrong> {
        let line = line_of(row);
        let required = |i: usize| row.get(self.columns.0[i]).unwrap_or_default();
        let optional = |i: usize| self.columns.1[i].and_then(|c| row.get(c)).map(str::trim).filter(|t| !t.is_empty());
        let count = |i: usize| {
            number(line, REQUIRED[i], required(i), "a number of tokens").and_then(|n| tokens(line, REQUIRED[i], n))
        };
        let (prompt_tokens, output_tokens) = (count(1)?, count(2)?);
        let prefix = prefix(line, self.seed, optional(0), optional(1), prompt_tokens)?;
        let priority = optional(2).map(|t| number(line, OPTIONAL[2], t, "an integer")).transpose()?;
        let tenant = optional(3).map(|t| number(line, OPTIONAL[3], t, "an index from 0 to 65535")).transpose()?;
        let arrival = number(line, REQUIRED[0], required(0), "seconds")?;
        Ok(Recorded {
            at: self.time(line, arrival)?,
            own_tokens: prompt_tokens - prefix.map_or(0, |s| s.tokens),
            prompt: prefix.into_iter().collect(),
            output_tokens,
            tenant,
            priority,
        })
    }

    fn time(&mut self, line: u64, seconds: f64) -> Result<Time, Wrong> {
        let since = seconds - *self.first.get_or_insert(seconds);
        if !seconds.is_finite() {
            return Err(Wrong::new(line, format!("arrival_s {seconds}"), "seconds"));
        }
        if since < self.last {
            return Err(Wrong::new(line, format!("arrival_s {seconds}"), "a time not before that of the line before"));
        }
        self.last = since;
        Ok(Time::ZERO.saturating_add(Dur::from_secs_f64(since)))
    }
}

/// The shared part of a prompt, if the line has one.
fn prefix(
    line: u64,
    seed: Seed,
    group: Option<&str>,
    tokens: Option<&str>,
    prompt: u32,
) -> Result<Option<Segment>, Wrong> {
    let wanted = tokens.map(|t| number::<u32>(line, OPTIONAL[1], t, "a number of tokens")).transpose()?;
    let Some(tokens) = wanted.filter(|&t| t > 0) else { return Ok(None) };
    let Some(group) = group else {
        return Err(Wrong::new(line, format!("prefix_tokens {tokens} without a group"), "a prefix_group"));
    };
    if tokens > prompt {
        let expected = format!("at most prompt_tokens ({prompt})");
        return Err(Wrong::new(line, format!("prefix_tokens {tokens}"), expected));
    }
    let content = ContentId(seed.value(&format!("replay/prefix/{group}")));
    Ok(Some(Segment { content, from: 0, tokens }))
}
