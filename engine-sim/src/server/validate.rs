//! Checks a request as vLLM 0.33 does and says no in vLLM's words.

use axum::http::{HeaderMap, StatusCode};
use shared::block_hash::ExtraKeys;
use shared::openai::{Logprobs, Prompt, Request, StreamOptions};
use shared::tokens::{ContentId, TokenId};

use super::App;
use super::api::{Api, ApiError};
use super::stop::Stops;
use crate::core::facts::{DecodingFact, EngineFact};
use crate::core::filler::{natural_length, output_content};
use crate::core::sequence::SamplingParams;

/// vLLM's default for completions; chat has the rest of the context.
const COMPLETION_MAX_TOKENS: u32 = 16;
/// Stop strings of one request; vLLM has no limit.
const MAX_STOPS: usize = 64;

/// A request that may go to the engine.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) prompt_tokens: u32,
    pub(super) params: SamplingParams,
    pub(super) priority: i32,
    pub(super) content: ContentId,
    pub(super) extra: ExtraKeys,
    pub(super) streaming: bool,
    pub(super) options: StreamOptions,
    pub(super) stops: Stops,
    /// For the finest detail of its spans.
    pub(super) decoding: DecodingFact,
    asked: u32,
    temperature: Option<f64>,
    top_p: Option<f64>,
    n: Option<u32>,
    given_priority: Option<i32>,
}

impl Accepted {
    /// What the request's span says about it.
    pub(super) fn fact(&self) -> EngineFact {
        EngineFact::Asked {
            max_tokens: Some(self.asked),
            temperature: self.temperature.map(|t| t as f32),
            top_p: self.top_p.map(|p| p as f32),
            n: self.n,
            priority: self.given_priority,
        }
    }
}

/// Checks `request` and appends its prompt to `tokens`.
pub(super) fn accept(
    app: &App,
    api: Api,
    headers: &HeaderMap,
    request: &Request<'_>,
    tokens: &mut Vec<TokenId>,
) -> Result<Accepted, ApiError> {
    check_model(app, request)?;
    check_sampling(request)?;
    check_prompt(api, request, tokens)?;
    let prompt_tokens = tokens.len() as u32;
    let room = check_length(app, prompt_tokens, request.output_limit())?;
    let asked = request.output_limit().and_then(|n| u32::try_from(n).ok());
    let max_tokens = match (asked, api) {
        (Some(n), _) => n.min(room),
        (None, Api::Completions) => COMPLETION_MAX_TOKENS.min(room),
        (None, Api::Chat) => room,
    };
    let min_tokens = check_least(request, max_tokens)?;
    let content = output_content(tokens, request.seed);
    let natural = (!request.ignore_eos.unwrap_or(false)).then(|| natural_length(content).max(min_tokens + 1));
    let stops = Stops::new(request, content, min_tokens..natural.map_or(max_tokens, |n| max_tokens.min(n - 1)));
    let eos_at = stops.found_at().or(natural);
    let decoding = DecodingFact {
        top_k: request.top_k.and_then(|k| u32::try_from(k).ok()).filter(|k| *k > 0),
        logprobs: logprobs(request),
        stop_string_at: stops.found_at(),
    };
    let header = headers.get("x-vllm-priority").and_then(|v| v.to_str().ok()?.parse().ok());
    Ok(Accepted {
        prompt_tokens,
        params: SamplingParams {
            max_tokens,
            min_tokens,
            ignore_eos: eos_at.is_none(),
            stop_token_ids: request.stop_token_ids.iter().flatten().copied().map(TokenId).collect(),
            eos_at,
        },
        stops,
        decoding,
        priority: header.or(request.priority).unwrap_or(0),
        asked: max_tokens,
        n: request.n,
        given_priority: header.or(request.priority),
        content,
        extra: ExtraKeys { lora: None, cache_salt: request.cache_salt.as_deref().map(str::to_owned) },
        streaming: request.stream.unwrap_or(false),
        options: request.stream_options.unwrap_or_default(),
        temperature: request.temperature,
        top_p: request.top_p,
    })
}

/// How many alternatives to each token are asked for; `None` without log probabilities.
fn logprobs(request: &Request<'_>) -> Option<u32> {
    match request.logprobs? {
        // Chat.
        Logprobs::Wanted(wanted) => wanted.then(|| request.top_logprobs.unwrap_or(0)),
        // Completions; vLLM takes -1 for the whole vocabulary.
        Logprobs::Alternatives(n) => Some(u32::try_from(n).unwrap_or(u32::MAX)),
    }
}

fn check_model(app: &App, request: &Request<'_>) -> Result<(), ApiError> {
    match request.model.as_deref() {
        None | Some("") => Ok(()),
        Some(model) if model == &*app.model => Ok(()),
        Some(model) => {
            // A model name is no content, but it is the caller's text: keep it short.
            let shown: String = model.chars().take(128).collect();
            let text = format!("The model `{shown}` does not exist. Valid aliases: {}.", app.model);
            Err(ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", text, Some("model")))
        }
    }
}

fn check_sampling(request: &Request<'_>) -> Result<(), ApiError> {
    if let Some(t) = request.temperature.filter(|t| *t < 0.0) {
        return Err(ApiError::parameter(
            &format!("temperature must be non-negative, got {}.", Float(t)),
            "temperature",
            Float(t),
        ));
    }
    if let Some(p) = request.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        return Err(ApiError::parameter(&format!("top_p must be in (0, 1], got {}.", Float(p)), "top_p", Float(p)));
    }
    if let Some(n) = request.output_limit().filter(|n| *n < 1) {
        return Err(ApiError::parameter(&format!("max_tokens must be at least 1, got {n}."), "max_tokens", n));
    }
    if let Some(n) = request.n.filter(|n| *n != 1) {
        return Err(ApiError::parameter("This emulator generates one choice per request: n must be 1.", "n", n));
    }
    if request.stream_options.is_some() && request.stream != Some(true) {
        let text = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some("stream_options")));
    }
    check_stops(request)
}

fn check_stops(request: &Request<'_>) -> Result<(), ApiError> {
    let bad = |text: &str| Err(ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, None));
    let stops = request.stop_texts();
    if stops.iter().any(|s| s.is_empty()) {
        return bad("stop cannot contain an empty string.");
    }
    if stops.len() > MAX_STOPS {
        return bad("This emulator takes at most 64 stop strings.");
    }
    Ok(())
}

/// How many tokens there must be at least.
fn check_least(request: &Request<'_>, max_tokens: u32) -> Result<u32, ApiError> {
    let least = request.min_tokens.unwrap_or(0);
    if least > max_tokens {
        let text = format!("min_tokens must be less than or equal to max_tokens={max_tokens}, got {least}.");
        return Err(ApiError::parameter(&text, "min_tokens", least));
    }
    Ok(least)
}

/// A number as Python prints a float: vLLM's schema makes one of `-1`, too.
struct Float(f64);

impl std::fmt::Display for Float {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

fn check_prompt(api: Api, request: &Request<'_>, tokens: &mut Vec<TokenId>) -> Result<(), ApiError> {
    let bad = |text: &str, param| Err(ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some(param)));
    match api {
        Api::Chat if request.messages.is_none() => bad("Field required: messages", "messages"),
        Api::Completions if request.messages.is_some() => bad("messages are for /v1/chat/completions", "messages"),
        Api::Completions if several(request.prompt.as_ref()) => bad(
            "This emulator takes one prompt per request: prompt must be one text or one list of token ids.",
            "prompt",
        ),
        Api::Chat | Api::Completions => match request.prompt_tokens(tokens) {
            Some(()) if !tokens.is_empty() => Ok(()),
            Some(()) | None => bad("Either prompt or prompt_embeds must be provided and non-empty.", "prompt"),
        },
    }
}

fn several(prompt: Option<&Prompt<'_>>) -> bool {
    match prompt {
        Some(Prompt::Texts(texts)) => texts.len() > 1,
        Some(Prompt::TokenLists(lists)) => lists.len() > 1,
        Some(Prompt::Text(_) | Prompt::Tokens(_)) | None => false,
    }
}

/// The room left for output tokens.
fn check_length(app: &App, prompt: u32, asked: Option<i64>) -> Result<u32, ApiError> {
    let limit = app.max_model_len;
    if let Some(asked) = asked.filter(|n| *n > i64::from(limit)) {
        let text = format!(
            "max_tokens={asked} cannot be greater than max_model_len={limit}. Please request fewer output tokens."
        );
        return Err(ApiError::parameter(&text, "max_tokens", asked));
    }
    if prompt >= limit {
        let text = format!(
            "This model's maximum context length is {limit} tokens. However, your prompt contains {prompt} input tokens, which \
             exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
        );
        return Err(ApiError::parameter(&text, "input_tokens", prompt));
    }
    Ok(limit - prompt)
}
