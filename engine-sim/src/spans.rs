//! Folds an engine's facts into spans.

use shared::trace::{Fact, Kind, Record, Span};

use crate::core::facts::EngineFact;

impl Fact for EngineFact {
    fn fold(record: &Record<EngineFact>, out: &mut Vec<Span>) {
        out.push(record.outermost("vllm.engine.request", Kind::Server, record.closed));
    }
}
