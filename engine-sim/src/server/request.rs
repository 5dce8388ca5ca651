//! The body of a generation request, as far as the emulator reads it. Unknown fields are ignored, as in vLLM.

use std::borrow::Cow;

use serde::Deserialize;
use shared::openai::{Message, OneOrMany, Prompt, StreamOptions};

/// A completion or chat-completion request (`CompletionRequest`, `ChatCompletionRequest` of vLLM). Borrows from the body.
#[derive(Debug, Default, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"), default)]
pub(super) struct Body<'a> {
    #[serde(borrow)]
    pub(super) model: Option<Cow<'a, str>>,
    pub(super) messages: Option<Vec<Message<'a>>>,
    pub(super) prompt: Option<Prompt<'a>>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) max_tokens: Option<i64>,
    pub(super) max_completion_tokens: Option<i64>,
    pub(super) min_tokens: Option<i64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) n: Option<i64>,
    pub(super) seed: Option<i64>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    #[serde(borrow)]
    pub(super) stop: Option<OneOrMany<'a>>,
    pub(super) include_stop_str_in_output: Option<bool>,
    pub(super) priority: Option<i64>,
    #[serde(borrow)]
    pub(super) cache_salt: Option<Cow<'a, str>>,
    pub(super) echo: Option<bool>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) top_logprobs: Option<i64>,
    pub(super) prompt_logprobs: Option<i64>,
    pub(super) return_token_ids: Option<bool>,
    pub(super) return_tokens_as_token_ids: Option<bool>,
    pub(super) add_generation_prompt: Option<bool>,
}

/// Whether to tell log probabilities (chat) or of how many tokens (completions).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Told(bool),
    Count(i64),
}

impl Logprobs {
    /// As a completion reads it.
    pub(super) fn count(self) -> i64 {
        match self {
            Logprobs::Told(told) => i64::from(told),
            Logprobs::Count(n) => n,
        }
    }
}

impl Body<'_> {
    /// The texts that end the output.
    pub(super) fn stop_texts(&self) -> &[Cow<'_, str>] {
        match &self.stop {
            None => &[],
            Some(OneOrMany::One(text)) => std::slice::from_ref(text),
            Some(OneOrMany::Many(texts)) => texts,
        }
    }

    /// The output limit asked for, and the name it was given under.
    pub(super) fn output_limit(&self) -> (Option<i64>, &'static str) {
        match self.max_completion_tokens {
            Some(n) => (Some(n), "max_completion_tokens"),
            None => (self.max_tokens, "max_tokens"),
        }
    }

    /// The limit alone.
    pub(super) fn most_tokens(&self) -> Option<i64> {
        self.output_limit().0
    }
}
