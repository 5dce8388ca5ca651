//! LLMServingSim's profiles: time of each layer by tokens, and of attention by what is in the batch.
//!
//! `step = layers * (dense + attention) + embedding + last norm + logits + sampler (+ all-reduce)`

use std::collections::BTreeMap;

use super::super::steps::StepRow;
use super::super::table::Table;
use super::grid::Curve;
use super::{Folder, TablesError};
use crate::core::latency::{Link, ProfileFile};

pub(super) fn steps(
    profile: &ProfileFile,
    prefix: &str,
    link: Option<Link>,
    folder: &Folder<'_>,
) -> Result<Vec<StepRow>, TablesError> {
    let dense = curves(&folder.table(&format!("{prefix}__dense.csv"))?, "tokens")?;
    let ends = curves(&folder.table(&format!("{prefix}__per_sequence.csv"))?, "sequences")?;
    let longest = dense.values().map(Curve::last).fold(f64::INFINITY, f64::min);
    let outside = |tokens: f64, seqs: f64| -> f64 {
        let layers: f64 = dense.iter().map(|(name, curve)| runs(name, profile.layers) * curve.at(tokens)).sum();
        layers + ends.values().map(|c| c.at(seqs)).sum::<f64>()
    };
    let reduce = |tokens: f64| {
        let bytes = tokens * 2.0 * f64::from(profile.hidden_size);
        link.map_or(0.0, |l| 2.0 * f64::from(profile.layers) * (l.latency + bytes / l.bytes_per_us))
    };
    let mut rows = Vec::new();
    for row in folder.table(&format!("{prefix}__attention.csv"))?.rows() {
        let (chunk, past) = (row.number("prefill_chunk")?, row.number("kv_prefill")?);
        let (seqs, context) = (row.number("n_decode")?, row.number("kv_decode")?);
        let attention = row.number("time_us")?;
        let mut add = |seqs: f64, attention: f64| {
            let prefill = if chunk > 0.0 { StepRow::prefill(1.0, chunk, past, 0.0) } else { StepRow::default() };
            let step = StepRow { decode_seqs: seqs, decode_context: seqs * context, ..prefill };
            let all_reduce_us = reduce(step.tokens());
            let time = f64::from(profile.layers) * attention + outside(step.tokens(), step.seqs()) + all_reduce_us;
            rows.push(StepRow { all_reduce_us, time_us: time, ..step });
        };
        if chunk + seqs <= longest {
            add(seqs, attention);
        }
        // The table ends at 256 decodes, the linear layers' knee lies about there: beyond, attention is in proportion.
        if chunk == 0.0 && seqs == MOST_DECODES {
            for times in [2.0, 4.0] {
                add(times * seqs, times * attention);
            }
        }
    }
    Ok(rows)
}

const MOST_DECODES: f64 = 256.0;

/// How often a layer of this name runs in a step.
fn runs(name: &str, layers: u32) -> f64 {
    let layers = f64::from(layers);
    match name {
        "embedding" | "final_layernorm" => 1.0,
        // Before attention and before the MLP.
        "layernorm" => 2.0 * layers,
        _ => layers,
    }
}

/// One curve for each name in the column `layer`.
fn curves(table: &Table, size: &str) -> Result<BTreeMap<String, Curve>, TablesError> {
    let mut curves: BTreeMap<String, Curve> = BTreeMap::new();
    for row in table.rows() {
        curves.entry(row.text("layer").to_owned()).or_default().insert(row.number(size)?, row.number("time_us")?);
    }
    Ok(curves)
}
