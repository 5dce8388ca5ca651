//! Answers and chunks as vLLM writes them, field by field and in its order (`protocol.py` of its two generation endpoints): a
//! whole answer with every null, a chunk with the fields that were set.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use shared::ids::RequestId;
use shared::tokens::TokenId;

use super::App;
use super::api::Api;
use super::choice::{Choice, Finish};
use super::logprobs::{self, CompletionLogprobs, Names};
use super::stop::{Keep, TextEnd};
use crate::core::engine::RequestStats;
use crate::core::tokenizer::Tokenizer;

/// What few requests ask for.
#[derive(Debug, Default)]
pub(super) struct Details {
    /// The prompt is part of the answer.
    pub(super) echo: bool,
    /// Nothing but the prompt is.
    pub(super) only_prompt: bool,
    /// Log probabilities of output tokens, and of how many alternatives.
    pub(super) logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub(super) prompt_logprobs: Option<u32>,
    /// Token ids.
    pub(super) token_ids: bool,
    /// Tokens are called by their ids.
    pub(super) as_ids: bool,
    /// What stands before an echoed answer: the prompt, or the last message of a chat; per prompt.
    pub(super) texts: Vec<String>,
    /// Tokens per prompt.
    pub(super) tokens: Vec<Vec<TokenId>>,
}

/// How an answer is wrapped.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) api: Api,
    pub(super) streaming: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    /// Choices per prompt.
    pub(super) n: u32,
    pub(super) prompt_tokens: PromptTokens,
    pub(super) details: Option<Box<Details>>,
    pub(super) tokenizer: Tokenizer,
    /// Whether usage says how much of the prompt was cached (`--enable-prompt-tokens-details`).
    cached_told: bool,
    /// Whether the times of a request for one choice are told (`--enable-per-request-metrics`).
    metrics_told: bool,
    fingerprint: Arc<str>,
    pub(super) id: RequestId,
    /// `"id":..,"object":..,"created":..,"model":..` as every chunk carries it.
    head: String,
}

/// Length of each prompt, in tokens.
#[derive(Debug)]
pub(super) struct PromptTokens {
    pub(super) first: u32,
    pub(super) rest: Vec<u32>,
}

impl PromptTokens {
    fn of(&self, prompt: usize) -> u32 {
        prompt.checked_sub(1).map_or(self.first, |i| self.rest[i])
    }

    fn sum(&self) -> u32 {
        self.first + self.rest.iter().sum::<u32>()
    }
}

/// What a [`Shape`] is made of besides the server.
pub(super) struct Asked {
    pub(super) api: Api,
    pub(super) streaming: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) n: u32,
    pub(super) prompt_tokens: PromptTokens,
    pub(super) details: Option<Box<Details>>,
    pub(super) model: Arc<str>,
}

impl Shape {
    pub(super) fn new(app: &App, id: &RequestId, asked: Asked) -> Shape {
        let object = match (asked.api, asked.streaming) {
            (Api::Completions, _) => "text_completion",
            (Api::Chat, true) => "chat.completion.chunk",
            (Api::Chat, false) => "chat.completion",
        };
        let model = serde_json::to_string(&*asked.model).expect("text serialises");
        let created = app.unix_seconds();
        let head = format!("\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":{model}");
        Shape {
            api: asked.api,
            streaming: asked.streaming,
            include_usage: asked.include_usage,
            continuous_usage: asked.continuous_usage,
            n: asked.n,
            prompt_tokens: asked.prompt_tokens,
            details: asked.details,
            tokenizer: app.engine_config.tokenizer,
            cached_told: app.prompt_tokens_details,
            metrics_told: app.frontend.per_request_metrics,
            fingerprint: Arc::clone(&app.fingerprint),
            id: id.clone(),
            head,
        }
    }

    /// Whether the answer is of one request in the engine.
    fn single(&self) -> bool {
        self.n == 1 && self.prompt_tokens.rest.is_empty()
    }

    fn names(&self) -> Names {
        Names { tokenizer: self.tokenizer, ids: self.details.as_ref().is_some_and(|d| d.as_ids) }
    }

    /// The chunks before the first token of a chat: the role, and the message that is continued.
    pub(super) fn write_opening(&self, choices: u32, out: &mut String) {
        if self.api != Api::Chat {
            return;
        }
        let (head, usage) = (&self.head, self.running_usage(0, 0));
        let told = self.details.as_ref().filter(|d| d.token_ids);
        let tokens = told.map_or(Cow::Borrowed("null"), |d| Cow::Owned(ids(&d.tokens[0])));
        for index in 0..choices {
            let _ = write!(
                out,
                "data: {{{head},\"choices\":[{{\"index\":{index},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\
                 \"logprobs\":null,\"finish_reason\":null}}]{usage},\"prompt_token_ids\":{tokens},\"prompt_text\":null}}\n\n"
            );
        }
        let Some(text) = self.details.as_ref().filter(|d| d.echo).map(|d| &d.texts[0]).filter(|t| !t.is_empty()) else {
            return;
        };
        for index in 0..choices {
            let _ = write!(
                out,
                "data: {{{head},\"choices\":[{{\"index\":{index},\"delta\":{{\"content\":{}}},\"logprobs\":null,\
                 \"finish_reason\":null}}]{usage}}}\n\n",
                quoted(text)
            );
        }
    }

    /// The chunk with the newest tokens of a choice, and its end.
    pub(super) fn write_chunk(&self, index: u32, choice: &mut Choice, out: &mut String) {
        let end = choice.text_end();
        let (from, to) = (choice.text.tokens, choice.tokens);
        let head = &self.head;
        let _ = write!(out, "data: {{{head},\"choices\":[{{\"index\":{index},");
        match self.api {
            Api::Completions => out.push_str("\"text\":\""),
            Api::Chat => out.push_str("\"delta\":{\"content\":\""),
        }
        self.write_delta(choice, from, to, end.as_ref(), out);
        out.push_str(if self.api == Api::Chat { "\"},\"logprobs\":" } else { "\",\"logprobs\":" });
        self.write_logprobs(choice, from, to, out);
        match (&choice.end, &end) {
            (Some(Finish { reason, .. }), Some(TextEnd { stop_reason, .. })) => {
                let _ = write!(out, ",\"finish_reason\":\"{}\",\"stop_reason\":{stop_reason}", reason.as_str());
            }
            _ if self.api == Api::Completions => out.push_str(",\"finish_reason\":null,\"stop_reason\":null"),
            _ => out.push_str(",\"finish_reason\":null"),
        }
        self.write_ids(choice, from, to, out);
        if self.api == Api::Completions || end.is_some() {
            out.push_str(",\"weight_versions\":null");
        }
        out.push_str("}]");
        out.push_str(&self.running_usage(self.prompt_tokens.of(choice.prompt), to));
        if end.is_some() && !self.include_usage {
            let _ = write!(out, ",\"system_fingerprint\":\"{}\"", self.fingerprint);
        }
        out.push_str(",\"kv_transfer_params\":null}\n\n");
    }

    fn write_delta(&self, choice: &mut Choice, from: u32, to: u32, end: Option<&TextEnd>, out: &mut String) {
        let keep = end.map(|e| e.keep);
        match self.details.as_ref().filter(|d| self.api == Api::Completions && d.echo && from == 0) {
            None => choice.text.write(to, keep, out),
            Some(details) => {
                let prompt = quoted(details.echoed(choice.prompt));
                out.push_str(&prompt[1..prompt.len() - 1]);
                let mut unshown = String::new();
                choice.text.write(to, keep, if details.only_prompt { &mut unshown } else { out });
            }
        }
    }

    fn write_logprobs(&self, choice: &mut Choice, from: u32, to: u32, out: &mut String) {
        match self.details.as_deref() {
            Some(details @ Details { logprobs: Some(told), .. }) => match self.api {
                Api::Chat => self.write_chat_logprobs(choice, from, to, *told, out),
                Api::Completions => self.write_completion_logprobs(details, choice, from, to, *told, out),
            },
            None | Some(Details { logprobs: None, .. }) => out.push_str("null"),
        }
    }

    fn write_chat_logprobs(&self, choice: &Choice, from: u32, to: u32, told: u32, out: &mut String) {
        let content = choice.text.content;
        let scored = (from..to).map(|i| logprobs::output(self.tokenizer, content, i, told.max(1)));
        logprobs::write_chat(self.names(), scored, told, out);
    }

    fn write_completion_logprobs(
        &self,
        details: &Details,
        choice: &mut Choice,
        from: u32,
        to: u32,
        told: u32,
        out: &mut String,
    ) {
        let (names, mut all) = (self.names(), CompletionLogprobs::default());
        let (content, mut offset) = (choice.text.content, choice.text.offset);
        if details.echo && from == 0 {
            for (i, token) in details.tokens[choice.prompt].iter().enumerate() {
                let scored = (i > 0).then(|| logprobs::prompt(self.tokenizer, *token, i, told));
                all.push(names, *token, scored.as_ref(), told, &mut offset);
            }
        }
        for i in (from..to).take_while(|_| !details.only_prompt) {
            let scored = logprobs::output(self.tokenizer, content, i, told);
            all.push(names, scored.token, Some(&scored), told, &mut offset);
        }
        choice.text.offset = offset;
        all.write(names, out);
    }

    /// The token ids of a chunk's choice; those of the prompt with the first one.
    fn write_ids(&self, choice: &Choice, from: u32, to: u32, out: &mut String) {
        let prompt = self.api == Api::Completions;
        match self.details.as_ref().filter(|d| d.token_ids || d.echo) {
            None if prompt => out.push_str(",\"prompt_token_ids\":null,\"token_ids\":null"),
            None => out.push_str(",\"token_ids\":null"),
            Some(details) => {
                if prompt {
                    let first = if from == 0 { ids(&details.tokens[choice.prompt]) } else { "null".into() };
                    let _ = write!(out, ",\"prompt_token_ids\":{first}");
                }
                let own = if details.token_ids { list(choice.text.ids(from, to)) } else { "null".into() };
                let _ = write!(out, ",\"token_ids\":{own}");
            }
        }
    }

    /// What follows the last choice of a stream.
    pub(super) fn write_closing<'c>(&self, choices: impl Iterator<Item = &'c Choice>, out: &mut String) {
        if self.include_usage {
            let (mut output, mut stats) = (0, None);
            for choice in choices {
                output += choice.tokens;
                stats = choice.end.as_ref().map(|e| &*e.stats).or(stats);
            }
            let (head, prompt) = (&self.head, self.prompt_tokens.sum());
            let total = prompt + output;
            let _ = write!(
                out,
                "data: {{{head},\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\
                 \"completion_tokens\":{output}"
            );
            if let Some(stats) = stats.filter(|_| self.cached_told) {
                let _ = write!(out, ",\"prompt_tokens_details\":{{\"cached_tokens\":{}}}", stats.cached_tokens);
            }
            let _ = write!(out, "}},\"system_fingerprint\":\"{}\"", self.fingerprint);
            if let Some(stats) = stats.filter(|_| self.metrics_told && self.single()) {
                let told = times(stats).into_iter().filter_map(|(name, v)| Some(format!("\"{name}\":{}", v?)));
                let _ = write!(out, ",\"metrics\":{{{}}}", told.collect::<Vec<_>>().join(","));
            }
            out.push_str("}\n\n");
        }
        out.push_str("data: [DONE]\n\n");
    }

    fn running_usage(&self, prompt: u32, output: u32) -> String {
        if !self.continuous_usage {
            return String::new();
        }
        // The role is told before anything of a chat's one prompt is said.
        let prompt = if prompt == 0 { self.prompt_tokens.first } else { prompt };
        let total = prompt + output;
        let details = if self.api == Api::Chat { ",\"completion_tokens_details\":null" } else { "" };
        format!(
            ",\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\"completion_tokens\":{output}{details}}}"
        )
    }

    /// The whole answer, with the nulls vLLM writes.
    pub(super) fn body<'c>(&self, choices: impl Iterator<Item = &'c mut Choice>) -> String {
        let mut out = format!("{{{},\"choices\":[", self.head);
        let (mut output, mut stats) = (0, None);
        for (index, choice) in choices.enumerate() {
            out.push_str(if index == 0 { "" } else { "," });
            self.write_choice(index, choice, &mut out);
            output += choice.tokens;
            stats = choice.end.as_ref().map(|e| &*e.stats).or(stats);
        }
        let prompt = self.prompt_tokens.sum();
        let cached = stats.filter(|_| self.cached_told).map_or_else(
            || "null".to_owned(),
            |s| {
                let cached = s.cached_tokens;
                format!("{{\"cached_tokens\":{cached},\"created_cache_tokens\":null,\"multimodal_tokens\":null}}")
            },
        );
        let _ = write!(
            out,
            "],\"service_tier\":null,\"system_fingerprint\":\"{}\",\"usage\":{{\"prompt_tokens\":{prompt},\
             \"total_tokens\":{},\"completion_tokens\":{output},\"prompt_tokens_details\":{cached},\
             \"completion_tokens_details\":null}}",
            self.fingerprint,
            prompt + output
        );
        if self.api == Api::Chat {
            out.push_str(",\"prompt_logprobs\":");
            self.write_prompt_logprobs(0, &mut out);
            out.push_str(",\"prompt_token_ids\":");
            self.write_prompt_ids(0, &mut out);
            out.push_str(",\"prompt_text\":null");
        }
        out.push_str(",\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":");
        match stats.filter(|_| self.metrics_told && self.single()) {
            None => out.push_str("null}"),
            Some(stats) => {
                let all = times(stats).map(|(name, v)| {
                    let v = v.map_or_else(|| "null".to_owned(), |v| v.to_string());
                    format!("\"{name}\":{v}")
                });
                let _ = write!(out, "{{{},\"speculative_decoding\":null}}}}", all.join(","));
            }
        }
        out
    }

    fn write_choice(&self, index: usize, choice: &mut Choice, out: &mut String) {
        let end = choice.text_end().unwrap_or(TextEnd { keep: Keep::All, stop_reason: "null".into() });
        let to = choice.tokens;
        let _ = write!(out, "{{\"index\":{index},");
        let message = "\"message\":{\"role\":\"assistant\",\"content\":\"";
        out.push_str(if self.api == Api::Chat { message } else { "\"text\":\"" });
        if self.api == Api::Chat
            && let Some(details) = self.details.as_ref().filter(|d| d.echo)
        {
            let text = quoted(&details.texts[0]);
            out.push_str(&text[1..text.len() - 1]);
        }
        self.write_delta(choice, 0, to, Some(&end), out);
        let message =
            "\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":null}";
        out.push_str(if self.api == Api::Chat { message } else { "\"" });
        out.push_str(",\"logprobs\":");
        self.write_logprobs(choice, 0, to, out);
        let reason = choice.end.as_ref().map_or("stop", |e| e.reason.as_str());
        let _ = write!(out, ",\"finish_reason\":\"{reason}\",\"stop_reason\":{},\"token_ids\":", end.stop_reason);
        match self.details.as_ref().filter(|d| d.token_ids) {
            None => out.push_str("null"),
            Some(_) => out.push_str(&list(choice.text.ids(0, to))),
        }
        if self.api == Api::Completions {
            out.push_str(",\"prompt_logprobs\":");
            self.write_prompt_logprobs(choice.prompt, out);
            out.push_str(",\"prompt_token_ids\":");
            self.write_prompt_ids(choice.prompt, out);
        }
        out.push_str(",\"routed_experts\":null,\"weight_versions\":null}");
    }

    fn write_prompt_logprobs(&self, prompt: usize, out: &mut String) {
        match self.details.as_deref() {
            Some(Details { prompt_logprobs: Some(k), tokens, .. }) => {
                logprobs::write_prompt(self.tokenizer, &tokens[prompt], *k, out);
            }
            None | Some(Details { prompt_logprobs: None, .. }) => out.push_str("null"),
        }
    }

    fn write_prompt_ids(&self, prompt: usize, out: &mut String) {
        match self.details.as_ref().filter(|d| d.token_ids) {
            None => out.push_str("null"),
            Some(details) => out.push_str(&ids(&details.tokens[prompt])),
        }
    }
}

impl Details {
    /// The text of a prompt that is repeated; with token ids vLLM leaves it out.
    fn echoed(&self, prompt: usize) -> &str {
        if self.token_ids { "" } else { &self.texts[prompt] }
    }
}

/// A request's times in milliseconds, as `build_per_request_timing_metrics` of vLLM computes them.
fn times(stats: &RequestStats) -> [(&'static str, Option<f64>); 5] {
    let between = |from: Option<_>, to: Option<shared::time::Time>| -> Option<f64> {
        Some(to?.since(from?).as_nanos() as f64 / 1e6)
    };
    let decode = between(stats.first_token, stats.last_token);
    let inference = between(stats.first_scheduled, stats.last_token);
    let output = f64::from(stats.output_tokens);
    [
        ("time_to_first_token_ms", between(stats.first_scheduled, stats.first_token)),
        ("generation_time_ms", decode),
        ("queue_time_ms", between(Some(stats.queued), stats.first_scheduled)),
        ("mean_itl_ms", decode.filter(|_| output > 1.0).map(|d| d / (output - 1.0))),
        ("tokens_per_second", inference.filter(|i| *i > 0.0).map(|i| output / i * 1000.0)),
    ]
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("text serialises")
}

fn ids(tokens: &[TokenId]) -> String {
    list(tokens.iter().copied())
}

fn list(tokens: impl Iterator<Item = TokenId>) -> String {
    let mut out = String::from("[");
    for (i, token) in tokens.enumerate() {
        let _ = write!(out, "{}{}", if i == 0 { "" } else { "," }, token.0);
    }
    out.push(']');
    out
}
