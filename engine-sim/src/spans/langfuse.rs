//! What a request's span says to Langfuse, where it is asked for: that it is the generation, its first token, its usage and cost.
//!
//! An engine's request is the generation of its trace; with prefill and decode apart only the one that decodes is.

use shared::time::{Anchor, Time};
use shared::trace::langfuse::{Generation, iso8601};
use shared::trace::{Draft, Val};

use crate::core::facts::FinishFact;

/// What is collected of a request until it ends.
#[derive(Default)]
pub(super) struct Collected {
    generation: Option<Generation>,
    /// What was asked for, as members of a JSON object.
    parameters: String,
    prompt_tokens: u32,
    cached_tokens: u32,
    output_tokens: u32,
}

impl Collected {
    pub(super) fn asked(&mut self, generation: &Generation) {
        self.generation = Some(*generation);
    }

    /// A parameter of the request.
    pub(super) fn parameter(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let (Some(_), Some(value)) = (&self.generation, value) {
            let comma = if self.parameters.is_empty() { "" } else { "," };
            self.parameters += &format!("{comma}\"{name}\":{value}");
        }
    }

    pub(super) fn prompt(&mut self, tokens: u32) {
        self.prompt_tokens = tokens;
    }

    pub(super) fn finished(&mut self, end: &FinishFact) {
        (self.cached_tokens, self.output_tokens) = (end.cached_tokens, end.output_tokens);
    }

    /// Tells it; `first` is when the first token was there.
    pub(super) fn tell<D: Draft>(&self, root: &mut D, first: Option<Time>) {
        let Some(Generation { anchor, price, prefills }) = self.generation else { return };
        if prefills {
            root.set("langfuse.observation.type", "span");
            return;
        }
        root.set("langfuse.observation.type", "generation");
        if !self.parameters.is_empty() {
            root.set("langfuse.observation.model.parameters", Val::Text(&format!("{{{}}}", self.parameters)));
        }
        let Some(first) = first else { return };
        root.set("langfuse.observation.completion_start_time", Val::Text(&moment(anchor, first)));
        let cached = self.cached_tokens.min(self.prompt_tokens);
        let (input, output) = (self.prompt_tokens - cached, self.output_tokens);
        let total = self.prompt_tokens + output;
        let usage = format!(r#"{{"input":{input},"input_cached_tokens":{cached},"output":{output},"total":{total}}}"#);
        root.set("langfuse.observation.usage_details", Val::Text(&usage));
        if let Some(price) = price {
            let cost = price.of(self.prompt_tokens, cached, output);
            let (input, cached, output) = (cost.input, cost.cached, cost.output);
            let total = input + cached + output;
            let cost =
                format!(r#"{{"input":{input},"input_cached_tokens":{cached},"output":{output},"total":{total}}}"#);
            root.set("langfuse.observation.cost_details", Val::Text(&cost));
        }
    }
}

fn moment(anchor: Anchor, at: Time) -> String {
    iso8601(anchor.unix_nanos(at))
}
