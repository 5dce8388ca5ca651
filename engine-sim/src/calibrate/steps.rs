//! Step times as a CSV: what was in each step and how long it took.
//!
//! Columns, in any order, with these names in the first line:
//!
//! | column | | |
//! |---|---|---|
//! | `decode_seqs` | required | requests that decode a token; a mean need not be whole |
//! | `decode_context` | required | tokens of KV cache that those read together |
//! | `prefill_tokens` | required | tokens of all chunks of prefill |
//! | `time_us` | required | the step's time in microseconds |
//! | `prefill_seqs` | 1 with a chunk | chunks |
//! | `prefill_past` | 0 | tokens of KV cache, computed earlier, that the chunks read |
//! | `prefill_pairs` | of equal chunks | query-key pairs: the sum of `chunk * (past + chunk / 2)` |
//! | `all_reduce_us` | 0 | the part of the time that is all-reduce, where it is known apart |
//! | `kind` | `step` | `step`, or `ttft`: the time to first token of a lone request, frontend included |

use std::fmt::Write as _;

use super::table::{CsvError, Row, Table};
use crate::core::latency::Regime;

/// What a time is the time of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// A step, from its launch to its outputs.
    #[default]
    Step,
    /// A lone request, from its arrival to its first token.
    Ttft,
}

/// One measured step.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct StepRow {
    /// What was timed.
    pub kind: Kind,
    /// Requests that decode.
    pub decode_seqs: f64,
    /// Tokens of KV cache that those read together.
    pub decode_context: f64,
    /// Chunks of prefill.
    pub prefill_seqs: f64,
    /// Tokens of all chunks.
    pub prefill_tokens: f64,
    /// Tokens of KV cache, computed earlier, that the chunks read.
    pub prefill_past: f64,
    /// Query-key pairs of all chunks.
    pub prefill_pairs: f64,
    /// All-reduces, in microseconds.
    pub all_reduce_us: f64,
    /// The whole step, in microseconds.
    pub time_us: f64,
}

impl StepRow {
    /// A step that only decodes: so many requests with so much context together.
    pub fn decode(seqs: f64, context: f64, time_us: f64) -> StepRow {
        StepRow { decode_seqs: seqs, decode_context: context, time_us, ..StepRow::default() }
    }

    /// A step with `seqs` equal chunks of `tokens` together, each after `past` tokens.
    pub fn prefill(seqs: f64, tokens: f64, past: f64, time_us: f64) -> StepRow {
        StepRow {
            prefill_seqs: seqs,
            prefill_tokens: tokens,
            prefill_past: seqs * past,
            prefill_pairs: tokens * (past + tokens / seqs / 2.0),
            time_us,
            ..StepRow::default()
        }
    }

    /// The kind of step.
    pub fn regime(&self) -> Regime {
        match (self.prefill_tokens > 0.0, self.decode_seqs > 0.0) {
            (false, _) => Regime::Decode,
            (true, false) => Regime::Prefill,
            (true, true) => Regime::Mixed,
        }
    }

    /// Tokens that go through the model.
    pub fn tokens(&self) -> f64 {
        self.decode_seqs + self.prefill_tokens
    }

    /// Requests in the step.
    pub fn seqs(&self) -> f64 {
        self.decode_seqs + self.prefill_seqs
    }
}

/// Names of the columns; the first four are required.
const COLUMNS: [&str; 9] = [
    "decode_seqs",
    "decode_context",
    "prefill_tokens",
    "time_us",
    "prefill_seqs",
    "prefill_past",
    "prefill_pairs",
    "all_reduce_us",
    "kind",
];
const REQUIRED: usize = 4;

/// Reads step times; `source` is what messages call the text.
///
/// # Errors
/// The first thing that is wrong: line, column, what was found and what is expected.
pub fn read_steps(source: &str, text: &str) -> Result<Vec<StepRow>, CsvError> {
    let table = Table::read(source, text)?;
    table.expect_columns(&COLUMNS[..REQUIRED], &COLUMNS)?;
    let mut rows: Vec<StepRow> = Vec::new();
    let mut prefill = None;
    for row in table.rows() {
        let step = read_step(&row)?;
        if step.regime() == Regime::Prefill && *prefill.get_or_insert(step.kind) != step.kind {
            let found = format!("{:?} after the other kind", row.text("kind"));
            return Err(row.wrong("kind", &found, "one kind in all rows that only prefill"));
        }
        rows.push(step);
    }
    Ok(rows)
}

fn read_step(row: &Row<'_>) -> Result<StepRow, CsvError> {
    let prefill_tokens = row.number("prefill_tokens")?;
    let chunks = row.number_or_nothing("prefill_seqs")?.unwrap_or(if prefill_tokens > 0.0 { 1.0 } else { 0.0 });
    let prefill_past = row.number_or_nothing("prefill_past")?.unwrap_or(0.0);
    let equal = if chunks > 0.0 { prefill_tokens * (prefill_past + prefill_tokens / 2.0) / chunks } else { 0.0 };
    let step = StepRow {
        kind: match row.text("kind") {
            "" | "step" => Kind::Step,
            "ttft" => Kind::Ttft,
            other => return Err(row.wrong("kind", &format!("{other:?}"), "step or ttft")),
        },
        decode_seqs: row.number("decode_seqs")?,
        decode_context: row.number("decode_context")?,
        prefill_seqs: chunks,
        prefill_tokens,
        prefill_past,
        prefill_pairs: row.number_or_nothing("prefill_pairs")?.unwrap_or(equal),
        all_reduce_us: row.number_or_nothing("all_reduce_us")?.unwrap_or(0.0),
        time_us: row.number("time_us")?,
    };
    plausible(row, &step).map(|()| step)
}

/// Relations between the columns of a row.
fn plausible(row: &Row<'_>, step: &StepRow) -> Result<(), CsvError> {
    let check = |ok: bool, column: &str, expected: &str| match ok {
        true => Ok(()),
        false => Err(row.wrong(column, &format!("{:?}", row.text(column)), expected)),
    };
    check(step.time_us > 0.0, "time_us", "a time above 0")?;
    check(step.tokens() > 0.0, "decode_seqs", "a decoding request, or prefill_tokens above 0")?;
    let chunks_and_tokens = (step.prefill_seqs > 0.0) == (step.prefill_tokens > 0.0);
    check(chunks_and_tokens, "prefill_seqs", "above 0 with prefill_tokens, 0 without")?;
    check(step.all_reduce_us < step.time_us, "all_reduce_us", "less than time_us")?;
    check(step.kind == Kind::Step || step.regime() == Regime::Prefill, "kind", "step in a row with decoding requests")
}

/// The CSV that [`read_steps`] reads.
pub fn write_steps(rows: &[StepRow]) -> String {
    let mut out = String::from(
        "kind,decode_seqs,decode_context,prefill_seqs,prefill_tokens,prefill_past,prefill_pairs,all_reduce_us,time_us\n",
    );
    for r in rows {
        let kind = match r.kind {
            Kind::Step => "step",
            Kind::Ttft => "ttft",
        };
        let _ = writeln!(
            out,
            "{kind},{},{},{},{},{},{},{:.3},{:.3}",
            r.decode_seqs,
            r.decode_context,
            r.prefill_seqs,
            r.prefill_tokens,
            r.prefill_past,
            r.prefill_pairs,
            r.all_reduce_us,
            r.time_us
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        assert_eq!(read_steps("s.csv", text).unwrap_err().to_string(), expect);
    }

    const HEAD: &str = "decode_seqs,decode_context,prefill_tokens,time_us\n";

    #[test]
    fn wrong_files_are_told_with_line_and_column() {
        let number = "a number in 0..=1e12";
        check("", "s.csv: line 2, found no row, expected at least one");
        check(HEAD, "s.csv: line 2, found no row, expected at least one");
        let bad = |cells: &str, expect: &str| {
            check(&format!("{HEAD}1,10,0,5\n{cells}\n"), &format!("s.csv: line 3, {expect}"));
        };
        bad("x,10,0,5", &format!("column decode_seqs: found \"x\", expected {number}"));
        bad("1,10,0", "found 3 values, expected 4, as in the first line");
        bad("1,-1,0,5", &format!("column decode_context: found \"-1\", expected {number}"));
        bad("1,NaN,0,5", &format!("column decode_context: found \"NaN\", expected {number}"));
        bad("1,,0,5", &format!("column decode_context: found nothing, expected {number}"));
        bad("1,1,0,0", "column time_us: found \"0\", expected a time above 0");
        bad("0,0,0,5", "column decode_seqs: found \"0\", expected a decoding request, or prefill_tokens above 0");
        let all = COLUMNS.join(", ");
        check("speed\n1\n", &format!("s.csv: line 1, column speed: found an unknown column, expected one of {all}"));
        check(
            "time_us,time_us\n1,1\n",
            "s.csv: line 1, column time_us: found a second time, expected each column once",
        );
        let required = COLUMNS[..REQUIRED].join(", ");
        check(
            "time_us\n1\n",
            &format!("s.csv: line 1, column decode_seqs: found no such column, expected the columns {required}"),
        );
    }

    #[test]
    fn missing_columns_have_their_defaults() {
        let rows =
            read_steps("s.csv", "time_us,prefill_tokens,decode_seqs,decode_context,prefill_past\n9.5,100,0,0,50\n");
        let expect = StepRow::prefill(1.0, 100.0, 50.0, 9.5);
        assert_eq!(rows.unwrap(), [expect]);
    }

    #[test]
    fn what_is_written_reads_back() {
        let rows = [
            StepRow { all_reduce_us: 1.5, ..StepRow::decode(3.5, 1000.0, 20.125) },
            StepRow { kind: Kind::Ttft, ..StepRow::prefill(2.0, 64.0, 10.0, 7.0) },
        ];
        assert_eq!(read_steps("s.csv", &write_steps(&rows)).unwrap(), rows);
    }
}
