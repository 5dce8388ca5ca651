//! Splitwise's `perf_model.csv`: a prompt's time and a decode step's time by prompt length and batch.

use std::collections::BTreeMap;

use super::super::steps::StepRow;
use super::super::table::{CsvError, Table};

pub(super) fn steps(table: &Table, model: &str, hardware: &str, tp: u32) -> Result<Vec<StepRow>, CsvError> {
    // Runs of one configuration are averaged: repeats in both halves of a split would not be unseen.
    let mut runs: BTreeMap<[u64; 3], Vec<[f64; 2]>> = BTreeMap::new();
    for row in table.rows() {
        let wanted = [("model", model), ("hardware", hardware), ("valid", "True")];
        let same_tp = row.number("tensor_parallel")? == f64::from(tp);
        if same_tp && wanted.iter().all(|(column, value)| row.text(column) == *value) {
            let shape = [row.number("prompt_size")?, row.number("batch_size")?, row.number("token_size")?];
            let times = [1e3 * row.number("prompt_ms")?, 1e3 * row.number("token_ms")?];
            runs.entry(shape.map(|v| v as u64)).or_default().push(times);
        }
    }
    let mut rows = Vec::new();
    let mut prompts: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for ([prompt, batch, tokens], times) in runs {
        let (seqs, context) = (batch as f64, prompt as f64 + tokens as f64 / 2.0);
        rows.push(StepRow::decode(seqs, seqs * context, mean(times.iter().map(|t| t[1]))));
        // Prompts of larger batches took turns in that software.
        if batch == 1 {
            prompts.entry(prompt).or_default().extend(times.iter().map(|t| t[0]));
        }
    }
    let prefill = |(prompt, times): (u64, Vec<f64>)| StepRow::prefill(1.0, prompt as f64, 0.0, mean(times.into_iter()));
    rows.extend(prompts.into_iter().map(prefill));
    Ok(rows)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}
