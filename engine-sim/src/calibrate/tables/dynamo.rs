//! Sweeps of Dynamo's planner: inter-token latency by batch and context, time to first token by prompt length.

use super::super::steps::{Kind, StepRow};
use super::super::table::{CsvError, Table};

pub(super) fn steps(decode: &Table, prefill: &Table) -> Result<Vec<StepRow>, CsvError> {
    let mut rows = Vec::new();
    for row in decode.rows() {
        let (seqs, context) = (row.number("effective_batch")?, row.number("context_tokens")?);
        rows.push(StepRow::decode(seqs, seqs * context, 1e3 * row.number("itl_ms")?));
    }
    for row in prefill.rows() {
        let step = StepRow::prefill(1.0, row.number("isl")?, 0.0, 1e3 * row.number("ttft_ms")?);
        rows.push(StepRow { kind: Kind::Ttft, ..step });
    }
    Ok(rows)
}
