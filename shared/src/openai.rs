//! The OpenAI wire format as far as gateways and engines read and write it.
//!
//! Requests borrow from the body. Unknown fields are ignored, as vLLM does.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::tokens::{self, TokenId};

/// A completion or chat-completion request; which one it is depends on the path.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Request<'a> {
    /// Model name; engines serve one, so absent means that one.
    #[serde(default, borrow)]
    pub model: Option<Cow<'a, str>>,
    /// Chat only.
    #[serde(default)]
    pub messages: Option<Vec<Message<'a>>>,
    /// Completions only.
    #[serde(default)]
    pub prompt: Option<Prompt<'a>>,
    /// Server-sent events instead of one body.
    #[serde(default)]
    pub stream: Option<bool>,
    /// Only allowed with `stream`.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Output limit in tokens.
    #[serde(default)]
    pub max_tokens: Option<i64>,
    /// Chat's newer name for `max_tokens`.
    #[serde(default)]
    pub max_completion_tokens: Option<i64>,
    /// No stop before so many tokens.
    #[serde(default)]
    pub min_tokens: Option<u32>,
    /// Sampling temperature.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(default)]
    pub top_p: Option<f64>,
    /// Likeliest tokens to choose from; vLLM takes -1 and 0 for all.
    #[serde(default)]
    pub top_k: Option<i64>,
    /// Log probabilities of the output.
    #[serde(default)]
    pub logprobs: Option<Logprobs>,
    /// Chat only: alternatives to each token, if `logprobs` is true.
    #[serde(default)]
    pub top_logprobs: Option<u32>,
    /// Choices to generate.
    #[serde(default)]
    pub n: Option<u32>,
    /// Seed of the sampler.
    #[serde(default)]
    pub seed: Option<i64>,
    /// Go on after an end-of-sequence token.
    #[serde(default)]
    pub ignore_eos: Option<bool>,
    /// Token ids that end the output.
    #[serde(default)]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Texts that end the output.
    #[serde(default, borrow)]
    pub stop: Option<OneOrMany<'a>>,
    /// vLLM's: a stop text, or the text of a stop token, is part of the output.
    #[serde(default)]
    pub include_stop_str_in_output: Option<bool>,
    /// vLLM's scheduling priority, lower runs first.
    #[serde(default)]
    pub priority: Option<i32>,
    /// Separates prefix caches.
    #[serde(default, borrow)]
    pub cache_salt: Option<Cow<'a, str>>,
}

/// Whether log probabilities are wanted, as chat asks, or with how many alternatives, as completions do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Logprobs {
    /// Chat.
    Wanted(bool),
    /// Completions.
    Alternatives(i64),
}

/// One text or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<'a> {
    /// One text.
    One(#[serde(borrow)] Cow<'a, str>),
    /// Several texts.
    Many(#[serde(borrow)] Vec<Cow<'a, str>>),
}

/// A chat message.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Message<'a> {
    /// `system`, `user`, `assistant`, ...
    #[serde(borrow)]
    pub role: Cow<'a, str>,
    /// Text, parts, or nothing (a tool call).
    #[serde(default)]
    pub content: Option<Content<'a>>,
}

/// The content of a chat message.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, bound(deserialize = "'de: 'a"))]
pub enum Content<'a> {
    /// Plain text.
    Text(#[serde(borrow)] Cow<'a, str>),
    /// Typed parts; those without text (images, audio) count as nothing.
    Parts(Vec<Part<'a>>),
}

/// A part of a message.
#[derive(Clone, Debug, Deserialize)]
pub struct Part<'a> {
    /// Present for parts of type `text`.
    #[serde(default, borrow)]
    pub text: Option<Cow<'a, str>>,
}

/// The prompt of a completion request.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt<'a> {
    /// Text.
    Text(#[serde(borrow)] Cow<'a, str>),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Several prompts.
    Texts(#[serde(borrow)] Vec<Cow<'a, str>>),
    /// Several prompts as token ids.
    TokenLists(Vec<Vec<u32>>),
}

/// Options of a streaming response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct StreamOptions {
    /// One more chunk with empty choices and the usage at the end.
    #[serde(default)]
    pub include_usage: bool,
    /// Usage on every chunk; only together with `include_usage`.
    #[serde(default)]
    pub continuous_usage_stats: bool,
}

/// Token counts of a finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Prompt and completion.
    pub total_tokens: u32,
    /// Tokens generated.
    #[serde(default)]
    pub completion_tokens: u32,
    /// Cached part of the prompt, where the server says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Details of [`Usage::prompt_tokens`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens found in the prefix cache.
    #[serde(default)]
    pub cached_tokens: u32,
}

/// The body of an error response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// An error as OpenAI and vLLM print it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// What is wrong.
    pub message: String,
    /// Class of the error, for example `BadRequestError`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault.
    pub param: Option<String>,
    /// The HTTP status again.
    pub code: u16,
}

impl Request<'_> {
    /// Appends the prompt's tokens to `out`: contents of the messages in order, or the prompt. Roles count for nothing.
    /// `None` if there is no prompt at all. Of several prompts only the first is taken.
    pub fn prompt_tokens(&self, out: &mut Vec<TokenId>) -> Option<()> {
        if let Some(messages) = &self.messages {
            let mut text = String::new();
            for m in messages {
                m.push_text(&mut text);
            }
            tokens::encode(&text, out);
            return Some(());
        }
        match self.prompt.as_ref()? {
            Prompt::Text(t) => tokens::encode(t, out),
            Prompt::Tokens(ids) => out.extend(ids.iter().copied().map(TokenId)),
            Prompt::Texts(texts) => tokens::encode(texts.first()?, out),
            Prompt::TokenLists(lists) => out.extend(lists.first()?.iter().copied().map(TokenId)),
        }
        Some(())
    }

    /// The texts that end the output.
    pub fn stop_texts(&self) -> &[Cow<'_, str>] {
        match &self.stop {
            None => &[],
            Some(OneOrMany::One(text)) => std::slice::from_ref(text),
            Some(OneOrMany::Many(texts)) => texts,
        }
    }

    /// The output limit asked for, under either name.
    pub fn output_limit(&self) -> Option<i64> {
        self.max_completion_tokens.or(self.max_tokens)
    }
}

impl Message<'_> {
    fn push_text(&self, out: &mut String) {
        match &self.content {
            None => {}
            Some(Content::Text(t)) => out.push_str(t),
            Some(Content::Parts(parts)) => parts.iter().filter_map(|p| p.text.as_deref()).for_each(|t| out.push_str(t)),
        }
    }
}

impl ErrorBody {
    /// An error with vLLM's fields.
    pub fn new(code: u16, kind: &str, message: impl Into<String>, param: Option<&str>) -> ErrorBody {
        let (kind, param) = (kind.to_owned(), param.map(str::to_owned));
        ErrorBody { error: ErrorDetail { message: message.into(), kind, param, code } }
    }
    /// The body as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain strings and numbers serialise")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens_of(body: &str) -> Option<usize> {
        let request: Request<'_> = serde_json::from_str(body).unwrap();
        let mut out = Vec::new();
        request.prompt_tokens(&mut out)?;
        Some(out.len())
    }

    #[test]
    fn prompts_of_every_shape_have_tokens() {
        let check = |body: &str, expect| assert_eq!(tokens_of(body), expect, "{body}");
        check(r#"{"prompt":"abcdefgh"}"#, Some(2));
        check(r#"{"prompt":[1,2,3]}"#, Some(3));
        check(r#"{"prompt":["abcd","zz"]}"#, Some(1));
        check(r#"{"prompt":[[1,2],[3]]}"#, Some(2));
        check(r#"{"messages":[{"role":"system","content":"abcd"},{"role":"user","content":"efg\n"}]}"#, Some(2));
        check(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"abcd"},{"type":"image_url"}]}]}"#,
            Some(1),
        );
        check(r#"{"messages":[{"role":"assistant","content":null}]}"#, Some(0));
        check(r#"{"model":"m"}"#, None);
    }
}
