//! The Azure LLM inference trace 2023: CSV with `TIMESTAMP` (UTC, digits of 100 ns), `ContextTokens`, `GeneratedTokens`.

use std::io::Read;

use csv::StringRecord;
use jiff::civil::DateTime;
use shared::time::Time;

use super::{Recorded, Wrong, csv_error, line_of, number, tokens};

const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// The records of `input`.
pub(super) fn read(input: impl Read + Send + 'static) -> impl Iterator<Item = Result<Recorded, Wrong>> + Send {
    let mut reader = csv::Reader::from_reader(input);
    let mut header = Some(check_header(&mut reader));
    let mut clock = Clock::default();
    let mut rows = reader.into_records();
    std::iter::from_fn(move || {
        if let Some(Err(wrong)) = header.take() {
            return Some(Err(wrong));
        }
        Some(rows.next()?.map_err(|e| csv_error(&e)).and_then(|row| parse(&row, &mut clock)))
    })
}

fn check_header<R: Read>(reader: &mut csv::Reader<R>) -> Result<(), Wrong> {
    let header = reader.headers().map_err(|e| csv_error(&e))?;
    if header.iter().map(str::trim).eq(COLUMNS) {
        return Ok(());
    }
    let found = header.iter().collect::<Vec<_>>().join(",");
    Err(Wrong::new(1, format!("the header {found:?}"), COLUMNS.join(",")))
}

fn parse(row: &StringRecord, clock: &mut Clock) -> Result<Recorded, Wrong> {
    let line = line_of(row);
    let text = |i: usize| row.get(i).unwrap_or_default();
    let count =
        |i: usize| number(line, COLUMNS[i], text(i), "a number of tokens").and_then(|n| tokens(line, COLUMNS[i], n));
    let (own_tokens, output_tokens) = (count(1)?, count(2)?);
    let at =
        clock.since_first(line, number(line, COLUMNS[0], text(0), "a time such as 2023-11-16 18:15:46.6805900")?)?;
    Ok(Recorded { at, prompt: Vec::new(), own_tokens, output_tokens, tenant: None, priority: None })
}

#[derive(Default)]
struct Clock {
    first: Option<DateTime>,
    last: Option<DateTime>,
}

impl Clock {
    fn since_first(&mut self, line: u64, at: DateTime) -> Result<Time, Wrong> {
        if self.last.is_some_and(|last| at < last) {
            return Err(Wrong::new(line, format!("TIMESTAMP {at}"), "a time not before that of the line before"));
        }
        self.last = Some(at);
        let since = at.duration_since(*self.first.get_or_insert(at)).as_nanos();
        Ok(Time::from_nanos(u64::try_from(since).unwrap_or_default()))
    }
}
