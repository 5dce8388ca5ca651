//! An engine's facts as the one span that vLLM itself emits of a request.
//!
//! Keys, units and what is left out where it is zero are vLLM's. Two things differ: vLLM makes the span when a request is done and makes
//! none of one that failed or was aborted, here it stands, as far as it got.

use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fold, Form, Kind, Val};

use super::{EngineFact, decimal, nanos};
use crate::core::sequence::FinishReason;

/// The span under construction.
pub struct LlmdFold<D> {
    root: D,
    opened: Time,
    first_token: Option<Time>,
    finished: Option<Time>,
    latest: Time,
}

impl<D: Draft, S: Form<Draft = D>> Fold<EngineFact, S> for LlmdFold<D> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        let opened = cx.head.opened;
        let root = cx.outermost("llm_request", Kind::Server);
        LlmdFold { root, opened, first_token: None, finished: None, latest: opened }
    }

    fn fact(&mut self, _: &mut Cx<'_, S>, at: Time, fact: &EngineFact) {
        match fact {
            EngineFact::Received { request, .. } => {
                self.root.set("gen_ai.request.id", Val::Text(request.as_str()));
            }
            EngineFact::Asked { max_tokens, temperature, top_p, n, .. } => {
                let (temperature, top_p) = (decimal(temperature.unwrap_or(1.0)), decimal(top_p.unwrap_or(1.0)));
                self.root
                    .set_some("gen_ai.request.max_tokens", max_tokens.filter(|v| *v != 0))
                    .set_some("gen_ai.request.temperature", Some(temperature).filter(|v| *v != 0.0))
                    .set_some("gen_ai.request.top_p", Some(top_p).filter(|v| *v != 0.0))
                    .set_some("gen_ai.request.n", Some(n.unwrap_or(1)).filter(|v| *v != 0));
            }
            EngineFact::InputsProcessed { prompt_tokens, .. } => {
                self.root.set("gen_ai.usage.prompt_tokens", *prompt_tokens);
            }
            EngineFact::Prefilled(step) if step.new_tokens > 0 => {
                self.first_token.get_or_insert(step.ready + nanos(step.hand_over_ns));
            }
            EngineFact::Finished(end) => {
                self.finished = Some(at);
                let inference = end.prefill + end.decode;
                self.root
                    .set("gen_ai.usage.completion_tokens", end.output_tokens)
                    .set("gen_ai.latency.time_in_queue", end.queue.as_secs_f64())
                    .set("gen_ai.latency.time_in_model_prefill", end.prefill.as_secs_f64())
                    .set("gen_ai.latency.time_in_model_decode", end.decode.as_secs_f64())
                    .set("gen_ai.latency.time_in_model_inference", inference.as_secs_f64());
                match end.reason {
                    FinishReason::Error => self.root.error("the engine failed the request"),
                    FinishReason::Stop | FinishReason::Length | FinishReason::Abort => {}
                }
            }
            EngineFact::Failed { .. } => self.root.error("the engine refused or failed the request"),
            EngineFact::Langfuse(_)
            | EngineFact::Decoding(_)
            | EngineFact::Model(_)
            | EngineFact::Fine(_)
            | EngineFact::Adapter(_)
            | EngineFact::FirstWrite
            | EngineFact::LastWrite
            | EngineFact::Aborted
            | EngineFact::Queued { .. }
            | EngineFact::Scheduled(_)
            | EngineFact::Admitted(_)
            | EngineFact::Allocated(_)
            | EngineFact::Prefilled(_)
            | EngineFact::Decoded(_)
            | EngineFact::DecodeTimes(_)
            | EngineFact::Preempted
            | EngineFact::PullStarted { .. }
            | EngineFact::PullEnded(_)
            | EngineFact::Fault(_) => {}
        }
        // Facts of the server may be stamped after those of the engine.
        self.latest = self.latest.max(at);
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = self.finished.unwrap_or(self.latest.max(ending.closed)).max(self.opened);
        let since = |at: Time| (at.max(self.opened) - self.opened).as_secs_f64();
        self.root.set_some("gen_ai.latency.time_to_first_token", self.first_token.map(since));
        self.root.set_some("gen_ai.latency.e2e", self.finished.map(since));
        if ending.abandoned {
            self.root.error("the request was never finished");
        }
        self.root.set_end(end);
        cx.emit(self.root);
    }
}
