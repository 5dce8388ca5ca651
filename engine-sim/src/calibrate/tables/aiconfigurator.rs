//! aiconfigurator's operator tables: matrix products, attention and all-reduce by shape, in milliseconds.
//!
//! A step is composed of them: four products a layer, attention of decodes and of prompts apart, two all-reduces a layer, the
//! logits, and what the tables leave out, which the profile states. Shapes between those measured are interpolated.

use std::collections::BTreeMap;

use super::super::steps::StepRow;
use super::super::table::Table;
use super::grid::{Curve, between, neighbours};
use super::{Folder, TablesError};
use crate::core::latency::{Operators, ProfileFile};

pub(super) fn steps(
    profile: &ProfileFile,
    operators: &Operators,
    folder: &Folder<'_>,
) -> Result<Vec<StepRow>, TablesError> {
    let reduce = match &operators.all_reduce {
        Some(file) => AllReduce::read(&folder.table(file)?, profile.tensor_parallel)?,
        None => AllReduce::default(),
    };
    let parts = Parts {
        profile,
        operators,
        products: Products::read(&folder.table(&format!("{}_gemm.csv", operators.prefix))?, &operators.dtype)?,
        reduce,
    };
    let heads = parts.heads();
    let decode = Attention::read(
        &folder.table(&format!("{}_generation_attention.csv", operators.prefix))?,
        heads,
        "past_kv_tokens",
        1,
    )?;
    let prefill =
        Attention::read(&folder.table(&format!("{}_context_attention.csv", operators.prefix))?, heads, "isl", 0)?;
    Ok(parts.steps(&decode, &prefill))
}

/// Most tokens in a step: twice vLLM's default on these GPUs.
const MOST_TOKENS: u64 = 16_384;

struct Parts<'a> {
    profile: &'a ProfileFile,
    operators: &'a Operators,
    products: Products,
    reduce: AllReduce,
}

impl Parts<'_> {
    fn heads(&self) -> (u32, u32) {
        let tp = self.profile.tensor_parallel;
        (self.operators.heads / tp, (self.operators.kv_heads / tp).max(1))
    }

    fn steps(&self, decode: &Attention, prefill: &Attention) -> Vec<StepRow> {
        let mut rows = Vec::new();
        for (&(seqs, context), &attention) in &decode.0 {
            rows.push(self.timed(decoding(seqs, context), attention));
        }
        let short = prefill.0.iter().filter(|((seqs, length), _)| seqs * length <= MOST_TOKENS);
        for (&(seqs, length), &attention) in short.clone() {
            rows.push(self.timed(prefilling(seqs, length), attention));
            // Chunks of one or two prompts among the decodes of a busy engine.
            let beside = decode.0.iter().filter(|((n, context), _)| *n >= 4 && (256..=8192).contains(context));
            for (&(n, context), &more) in beside.filter(|_| seqs <= 2 && length >= 128) {
                let (d, p) = (decoding(n, context), prefilling(seqs, length));
                let mixed = StepRow { decode_seqs: d.decode_seqs, decode_context: d.decode_context, ..p };
                rows.push(self.timed(mixed, attention + more));
            }
        }
        rows
    }

    /// `row` with its time, given the attention of one layer in milliseconds.
    fn timed(&self, row: StepRow, attention: f64) -> StepRow {
        let layers = f64::from(self.profile.layers);
        let (o, tp, hidden) =
            (self.operators, f64::from(self.profile.tensor_parallel), f64::from(self.profile.hidden_size));
        let width = |heads: u32| f64::from(heads * o.head_dim);
        let (heads, kv_heads) = self.heads();
        let inner = f64::from(o.intermediate_size) / tp;
        let m = row.tokens();
        let product = |n: f64, k: f64| self.products.at(m, n, k);
        let layer = product(width(heads + 2 * kv_heads), hidden)
            + product(hidden, width(heads))
            + product(2.0 * inner, hidden)
            + product(hidden, inner);
        let logits = self.products.at(row.seqs(), f64::from(o.vocab_size) / tp, hidden);
        let eager = row.prefill_tokens > 0.0;
        let all_reduce_us = 2e3 * layers * self.reduce.at(m * 2.0 * hidden, eager);
        let over = &o.overhead;
        let rest = if eager { over.prefill + over.per_token * m } else { over.decode } + over.per_sequence * row.seqs();
        StepRow { all_reduce_us, time_us: 1e3 * (layers * (layer + attention) + logits) + all_reduce_us + rest, ..row }
    }
}

fn decoding(seqs: u64, context: u64) -> StepRow {
    StepRow::decode(seqs as f64, (seqs * context) as f64, 0.0)
}

fn prefilling(seqs: u64, length: u64) -> StepRow {
    StepRow::prefill(seqs as f64, (seqs * length) as f64, 0.0, 0.0)
}

/// Milliseconds of attention of one layer, by requests and context.
struct Attention(BTreeMap<(u64, u64), f64>);

impl Attention {
    fn read(table: &Table, heads: (u32, u32), length: &str, more: u64) -> Result<Attention, TablesError> {
        let mut times = BTreeMap::new();
        for row in table.rows() {
            let found = (row.number("num_heads")?, row.number("num_key_value_heads")?);
            if found == (f64::from(heads.0), f64::from(heads.1)) {
                let shape = (row.number("batch_size")? as u64, row.number(length)? as u64 + more);
                times.insert(shape, row.number("ms")?);
            }
        }
        Ok(Attention(times))
    }
}

/// Milliseconds of `m x k` times `k x n`, by `n`, `k` and `m`.
struct Products(BTreeMap<u64, BTreeMap<u64, Curve>>);

impl Products {
    fn read(table: &Table, dtype: &str) -> Result<Products, TablesError> {
        let mut products: BTreeMap<u64, BTreeMap<u64, Curve>> = BTreeMap::new();
        for row in table.rows().filter(|r| r.text("gemm_dtype") == dtype) {
            let (n, k) = (row.number("n")? as u64, row.number("k")? as u64);
            products.entry(n).or_default().entry(k).or_default().insert(row.number("m")?, row.number("ms")?);
        }
        Ok(Products(products))
    }

    fn at(&self, m: f64, n: f64, k: f64) -> f64 {
        along(&self.0, n, |by_k| along(by_k, k, |curve| curve.at(m)))
    }
}

/// The value at `x` among values along an axis; in proportion outside of it.
fn along<T>(axis: &BTreeMap<u64, T>, x: f64, value: impl Fn(&T) -> f64) -> f64 {
    match neighbours(axis, x) {
        (Some((x0, a)), Some((x1, b))) => between(x, x0, x1, value(a), value(b)),
        (Some((edge, only)), None) | (None, Some((edge, only))) => value(only) * x / edge,
        (None, None) => 0.0,
    }
}

/// Milliseconds of one all-reduce by bytes: in decode steps from CUDA graphs, elsewhere launched one by one.
#[derive(Default)]
struct AllReduce {
    graph: Curve,
    eager: Curve,
}

impl AllReduce {
    fn read(table: &Table, gpus: u32) -> Result<AllReduce, TablesError> {
        let mut reduce = AllReduce::default();
        for row in table.rows() {
            if row.number("num_gpus")? == f64::from(gpus) {
                let curve = match row.text("backend") {
                    "vllm_graph" => &mut reduce.graph,
                    "vllm_eager" => &mut reduce.eager,
                    other => {
                        let error = row.wrong("backend", &format!("{other:?}"), "vllm_graph or vllm_eager");
                        return Err(error.into());
                    }
                };
                curve.insert(row.number("message_size")?, row.number("ms")?);
            }
        }
        Ok(reduce)
    }

    fn at(&self, bytes: f64, eager: bool) -> f64 {
        if eager { self.eager.at(bytes) } else { self.graph.at(bytes) }
    }
}
