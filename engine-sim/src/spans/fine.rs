//! The finest spans of a request (detail 3): the parts of an execution and of handing its outputs over.
//!
//! Where a span stands for many steps, as a run of decode steps does, its parts are those of the last one, whose outputs are the
//! ones handed over behind it.

use std::sync::Arc;

use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Form};

use super::{EngineFold, nanos};
use crate::core::facts::{DecodingFact, FineFact, FinishFact, ModelFact};
use crate::core::sequence::FinishReason;

/// Number of the first of these spans in a record, above that of any other span.
pub(super) const FIRST_ID: usize = 1 << 16;

/// What these spans need to know.
#[derive(Debug, Default)]
pub(super) struct Fine {
    /// So many of these spans so far.
    pub(super) drawn: usize,
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) asked: DecodingFact,
    pub(super) model: Option<Arc<ModelFact>>,
    /// Places of the newest execution and, if it gave a token, of the handling of its outputs.
    pub(super) newest: Option<(usize, Option<usize>)>,
    /// Place of the newest detokenization; whether it completes a stop string is known when the request ends.
    detokenized: Option<usize>,
    stopped_by_text: bool,
}

impl Fine {
    pub(super) fn ended(&mut self, end: &FinishFact) {
        self.stopped_by_text = end.reason == FinishReason::Stop && self.asked.stop_string_at == Some(end.output_tokens);
    }
}

impl<D: Draft> EngineFold<D> {
    /// The parts of the newest execution.
    pub(super) fn parts<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, parts: &FineFact) {
        let Some((executed, processed)) = self.fine.newest.take() else { return };
        let parent = self.inner[executed].id();
        let prepared = parts.launch + nanos(parts.prepare_ns);
        let forwarded = prepared + Dur::from_nanos(parts.forward_ns);
        let model = self.fine.model.clone();
        let model = model.as_deref();
        self.span(cx, "vllm.worker.prepare_inputs", parent, (parts.launch, prepared), |span| prepare(span, model));
        self.span(cx, "vllm.model.forward", parent, (prepared, forwarded), |span| forward(span, model));
        if let Some(processed) = processed {
            let (temperature, top_p, top_k) = (self.fine.temperature, self.fine.top_p, self.fine.asked.top_k);
            let sampled = forwarded + nanos(parts.sample_ns);
            self.span(cx, "vllm.sampler.sample", parent, (forwarded, sampled), |span| {
                span.set("vllm.sampling.temperature", temperature)
                    .set("vllm.sampling.top_p", top_p)
                    .set_some("vllm.sampling.top_k", top_k)
                    .set("vllm.sampling.tokens", 1u32);
            });
            self.texts(cx, processed, parts);
        }
    }

    /// From the token to its text, and to that of its alternatives.
    fn texts<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, processed: usize, parts: &FineFact) {
        let (parent, handed) = (self.inner[processed].id(), self.inner[processed].end());
        let from = (self.inner[processed].start() + nanos(parts.update_ns)).min(handed);
        let until = self.fine.asked.logprobs.map_or(handed, |n| share(from, handed, n));
        self.end_detokenized();
        self.fine.detokenized = self.span(cx, "vllm.detokenizer.update", parent, (from, until), |span| {
            span.set("vllm.tokens.new", 1u32);
        });
        if let Some(alternatives) = self.fine.asked.logprobs {
            self.span(cx, "vllm.logprobs.compute", parent, (until, handed), |span| {
                span.set("vllm.logprobs.alternatives", alternatives);
            });
        }
    }

    /// Says of the newest detokenization whether it completed a stop string: only the request's last one can.
    pub(super) fn end_detokenized(&mut self) {
        if let Some(span) = self.fine.detokenized.take() {
            self.inner[span].set("vllm.stop_string.detected", self.fine.stopped_by_text);
        }
    }
}

/// What is said about preparing inputs.
pub(super) fn prepare(span: &mut impl Draft, model: Option<&ModelFact>) {
    span.set_some("vllm.attention.backend", model.map(|m| m.attention));
}

/// What is said about a forward pass.
pub(super) fn forward(span: &mut impl Draft, model: Option<&ModelFact>) {
    if let Some(model) = model {
        span.set("vllm.model.name", &model.name)
            .set("vllm.model.num_layers", model.layers)
            .set("vllm.model.hidden_size", model.hidden_size);
    }
}

/// Where the time from `from` to `to` is divided between one token's text and its log probabilities: an equal part for each text
/// made, the token's own a second time. A model: vLLM's frontend turns each of them into text, and nobody has published how long
/// that takes.
fn share(from: Time, to: Time, alternatives: u32) -> Time {
    from + Dur::from_nanos((to - from).as_nanos() / (u64::from(alternatives) + 2))
}
