//! Checks a request as vLLM 0.33 does, in its order, and says no in vLLM's words: first what its protocol classes check
//! (`protocol.py`), then the model, the length (`renderers/params.py`), the sampling parameters (`sampling_params.py`), the engine's input
//! (`v1/engine/input_processor.py`).

use std::borrow::Cow;
use std::fmt::Display;
use std::sync::Arc;

use axum::http::HeaderMap;
use shared::block_hash::ExtraKeys;
use shared::openai::{Content, Message, Prompt};
use shared::rng::mix64;
use shared::tokens::{ContentId, TokenId};

use super::App;
use super::api::{Api, ApiError};
use super::logprobs::MAX_LOGPROBS;
use super::lora::Adapter;
use super::request::Body;
use super::shape::Details;
use super::stop::Stops;
use crate::core::facts::{DecodingFact, EngineFact};
use crate::core::filler::{natural_length, output_content};
use crate::core::sequence::{Parallel, SamplingParams};
use crate::core::tokenizer::Tokenizer;

/// vLLM's default for completions; chat has the rest of the context.
const COMPLETION_MAX_TOKENS: i64 = 16;
/// Choices of one prompt (`VLLM_MAX_N_SEQUENCES`).
const MAX_N: i64 = 16_384;
/// Prompts of one request (`VLLM_MAX_COMPLETION_PROMPTS`).
const MAX_PROMPTS: usize = 1024;
/// Choices of one request in all. vLLM has no such limit; an answer looks at all of its choices whenever one has news.
const MAX_CHOICES: usize = 16_384;

/// A request that may go to the engine.
pub(super) struct Plan {
    pub(super) prompts: Prompts,
    pub(super) n: u32,
    pub(super) priority: i32,
    pub(super) extra: ExtraKeys,
    pub(super) lora: Option<Adapter>,
    pub(super) streaming: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) details: Option<Box<Details>>,
    /// For the finest detail of its spans; where a stop string ends is for each choice to say.
    pub(super) decoding: DecodingFact,
    fact: EngineFact,
}

/// One choice.
pub(super) struct Part {
    pub(super) prompt: usize,
    pub(super) params: SamplingParams,
    pub(super) content: ContentId,
    pub(super) stops: Stops,
}

/// Tokens of each prompt.
#[derive(Debug, Default)]
pub(super) struct Prompts {
    pub(super) first: Vec<TokenId>,
    pub(super) rest: Vec<Vec<TokenId>>,
}

impl Prompts {
    pub(super) fn get(&self, i: usize) -> &[TokenId] {
        i.checked_sub(1).map_or(&self.first, |i| &self.rest[i])
    }

    fn len(&self) -> usize {
        1 + self.rest.len()
    }

    fn iter(&self) -> impl Iterator<Item = &Vec<TokenId>> {
        std::iter::once(&self.first).chain(&self.rest)
    }
}

impl Plan {
    /// What the request's span says about it.
    pub(super) fn fact(&self) -> EngineFact {
        self.fact.clone()
    }
}

/// Checks `body`. Besides what holds for all of them there are its choices, the first and the others: those of the first prompt, then
/// those of the second, and so on.
pub(super) fn accept(
    app: &App,
    api: Api,
    headers: &HeaderMap,
    body: &Body<'_>,
) -> Result<(Plan, Part, Vec<Part>), ApiError> {
    check_protocol(api, body)?;
    let lora = check_model(app, body.model.as_deref())?;
    let details = details(api, body);
    check_limit(app, body)?;
    let tokenizer = app.engine_config.tokenizer;
    let prompts = tokens(app, api, tokenizer, body)?;
    let n = u32::try_from(body.n.unwrap_or(1)).unwrap_or(0);
    let header = headers.get("x-vllm-priority").and_then(|v| v.to_str().ok()?.parse::<i64>().ok());
    let given_priority = header.or(body.priority).map(|p| p.clamp(i32::MIN.into(), i32::MAX.into()) as i32);
    let chooser = Chooser { app, api, body, tokenizer, details: details.as_deref(), n };
    let (first, rest) = chooser.choose(&prompts)?;
    let usage = body.stream_options.unwrap_or_default();
    let forced = app.frontend.force_include_usage;
    let with_tokens = |mut details: Box<Details>| {
        details.tokens = prompts.iter().cloned().collect();
        if details.echo {
            details.texts = echoes(api, body, tokenizer, &prompts);
        }
        details
    };
    let plan = Plan {
        n,
        priority: given_priority.unwrap_or(0),
        extra: ExtraKeys {
            lora: lora.as_ref().map(|a| (a.name.to_string(), a.path.to_string())),
            cache_salt: body.cache_salt.as_deref().map(str::to_owned),
        },
        lora,
        streaming: body.stream.unwrap_or(false),
        include_usage: forced || usage.include_usage,
        continuous_usage: forced || usage.include_usage && usage.continuous_usage_stats,
        decoding: DecodingFact {
            top_k: body.top_k.and_then(|k| u32::try_from(k).ok()).filter(|k| *k > 0),
            logprobs: details.as_deref().and_then(|d| d.logprobs),
            stop_string_at: None,
        },
        details: details.map(with_tokens),
        prompts,
        fact: EngineFact::Asked {
            max_tokens: body.most_tokens().and_then(|n| u32::try_from(n).ok()),
            temperature: body.temperature.map(|t| t as f32),
            top_p: body.top_p.map(|p| p as f32),
            n: body.n.and_then(|n| u32::try_from(n).ok()),
            priority: given_priority,
        },
    };
    Ok((plan, first, rest))
}

/// What the protocol classes refuse before they look at the model.
fn check_protocol(api: Api, body: &Body<'_>) -> Result<(), ApiError> {
    if api == Api::Completions {
        check_prompt_given(body.prompt.as_ref())?;
    }
    if body.stream_options.is_some() && body.stream != Some(true) {
        let text = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::about(text, "stream_options"));
    }
    check_logprobs(api, body)?;
    check_salt(body.cache_salt.as_deref())
}

fn check_prompt_given(prompt: Option<&Prompt<'_>>) -> Result<(), ApiError> {
    let prompts = match prompt {
        None => 0,
        Some(Prompt::Text(text)) => usize::from(!text.is_empty()),
        Some(Prompt::Tokens(_)) => 1,
        Some(Prompt::Texts(texts)) => texts.len(),
        Some(Prompt::TokenLists(lists)) => lists.len(),
    };
    if prompts == 0 {
        return Err(ApiError::about("Either prompt or prompt_embeds must be provided and non-empty.", "prompt"));
    }
    if prompts > MAX_PROMPTS {
        let text = format!(
            "prompt list length {prompts} exceeds the maximum allowed count of {MAX_PROMPTS}. To increase this limit, set the \
             VLLM_MAX_COMPLETION_PROMPTS environment variable."
        );
        return Err(ApiError::about(&text, "prompt"));
    }
    Ok(())
}

fn check_logprobs(api: Api, body: &Body<'_>) -> Result<(), ApiError> {
    let positive = |n: Option<i64>, name: &str| match n.filter(|n| *n < -1) {
        Some(n) => Err(ApiError::parameter(&format!("`{name}` must be a positive value or -1."), name, n)),
        None => Ok(()),
    };
    if let Some(n) = body.prompt_logprobs {
        if body.stream == Some(true) && (n > 0 || n == -1) {
            let text = "`prompt_logprobs` are not available when `stream=True`.";
            return Err(ApiError::about(text, "prompt_logprobs"));
        }
        positive(Some(n), "prompt_logprobs")?;
    }
    match api {
        Api::Completions => positive(body.logprobs.map(|l| l.count()), "logprobs"),
        Api::Chat => {
            positive(body.top_logprobs, "top_logprobs")?;
            let told = body.logprobs.is_some_and(|l| l.count() == 1);
            if body.top_logprobs.is_some_and(|n| n != 0) && !told {
                let text = "when using `top_logprobs`, `logprobs` must be set to true.";
                return Err(ApiError::about(text, "top_logprobs"));
            }
            Ok(())
        }
    }
}

fn check_salt(salt: Option<&str>) -> Result<(), ApiError> {
    let Some(salt) = salt else { return Ok(()) };
    if salt.is_empty() {
        return Err(ApiError::about("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt"));
    }
    if salt.chars().count() > 128 || salt.contains(['@', '/', '\\', '\0']) {
        let text =
            "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\\\', or NUL.";
        return Err(ApiError::about(text, "cache_salt"));
    }
    Ok(())
}

/// The adapter that the model's name chooses; none for a served model.
pub(super) fn check_model(app: &App, model: Option<&str>) -> Result<Option<Adapter>, ApiError> {
    match model {
        None | Some("") => Ok(None),
        Some(model) if app.serves(model) => Ok(None),
        Some(model) => match app.adapters.find(model) {
            Some(adapter) => Ok(Some(adapter)),
            None => Err(ApiError::unknown_model(model, &app.served_names())),
        },
    }
}

/// What is asked for besides the text; `None` for most requests.
fn details(api: Api, body: &Body<'_>) -> Option<Box<Details>> {
    let echo = body.echo.unwrap_or(false);
    let token_ids = body.return_token_ids.unwrap_or(false);
    let told = match (api, body.logprobs) {
        (Api::Completions, logprobs) => logprobs.map(|l| l.count()),
        (Api::Chat, logprobs) => logprobs.filter(|l| l.count() == 1).map(|_| body.top_logprobs.unwrap_or(0)),
    };
    let of_prompt = match api {
        Api::Completions => body.prompt_logprobs.or(told.filter(|_| echo)),
        Api::Chat => body.prompt_logprobs.or(echo.then(|| body.top_logprobs.unwrap_or(0))),
    };
    if !(echo || token_ids || told.is_some() || of_prompt.is_some()) {
        return None;
    }
    // -1 asks for the whole vocabulary, which is more than is allowed.
    let count = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    Some(Box::new(Details {
        echo,
        only_prompt: api == Api::Completions && echo && body.max_tokens == Some(0),
        logprobs: told.map(count),
        prompt_logprobs: of_prompt.map(count),
        token_ids,
        as_ids: body.return_tokens_as_token_ids.unwrap_or(false),
        ..Details::default()
    }))
}

fn check_limit(app: &App, body: &Body<'_>) -> Result<(), ApiError> {
    let (limit, (asked, name)) = (app.max_model_len, body.output_limit());
    let Some(asked) = asked.filter(|n| *n > i64::from(limit)) else { return Ok(()) };
    let text =
        format!("{name}={asked} cannot be greater than max_model_len={limit}. Please request fewer output tokens.");
    Err(ApiError::parameter(&text, name, asked))
}

fn tokens(app: &App, api: Api, tokenizer: Tokenizer, body: &Body<'_>) -> Result<Prompts, ApiError> {
    let mut prompts = Prompts::default();
    match api {
        Api::Chat => {
            let messages = body.messages.as_deref().unwrap_or_default();
            check_text(app, messages.iter().map(bytes_of).sum(), || messages.iter().map(chars_of).sum())?;
            let prompting = body.add_generation_prompt.unwrap_or(true);
            tokenize_chat(tokenizer, messages, prompting, &mut prompts.first);
            check_tokens(app, prompts.first.len(), true)?;
        }
        Api::Completions => {
            let text = |text: &str, out: &mut Vec<TokenId>| {
                check_text(app, text.len(), || text.chars().count())?;
                tokenizer.encode(text, out);
                check_tokens(app, out.len(), true)
            };
            let ids = |ids: &[u32], out: &mut Vec<TokenId>| {
                out.extend(ids.iter().copied().map(TokenId));
                check_tokens(app, out.len(), false)
            };
            match body.prompt.as_ref() {
                None => {}
                Some(Prompt::Text(t)) => text(t, &mut prompts.first)?,
                Some(Prompt::Tokens(list)) => ids(list, &mut prompts.first)?,
                Some(Prompt::Texts(texts)) => several(texts, &mut prompts, |t, out| text(t, out))?,
                Some(Prompt::TokenLists(lists)) => several(lists, &mut prompts, |l, out| ids(l, out))?,
            }
        }
    }
    Ok(prompts)
}

fn several<T>(
    items: &[T],
    prompts: &mut Prompts,
    mut read: impl FnMut(&T, &mut Vec<TokenId>) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    for (i, item) in items.iter().enumerate() {
        if i == 0 {
            read(item, &mut prompts.first)?;
        } else {
            let mut tokens = Vec::new();
            read(item, &mut tokens)?;
            prompts.rest.push(tokens);
        }
    }
    Ok(())
}

/// Appends the tokens of a chat.
pub(super) fn tokenize_chat(tokenizer: Tokenizer, messages: &[Message<'_>], prompting: bool, out: &mut Vec<TokenId>) {
    tokenizer.encode_chat(messages.iter().map(|m| (&*m.role, text_of(m))), prompting, out);
}

/// The text of a message; parts that are no text count for nothing.
fn text_of<'m>(message: &'m Message<'_>) -> Cow<'m, str> {
    match &message.content {
        None => Cow::Borrowed(""),
        Some(Content::Text(text)) => Cow::Borrowed(text),
        Some(Content::Parts(parts)) => Cow::Owned(parts.iter().filter_map(|p| p.text.as_deref()).collect()),
    }
}

fn bytes_of(message: &Message<'_>) -> usize {
    text_of(message).len()
}

fn chars_of(message: &Message<'_>) -> usize {
    text_of(message).chars().count()
}

/// Refuses a text that is too long for any tokens, before it is read.
fn check_text(app: &App, bytes: usize, chars: impl Fn() -> usize) -> Result<(), ApiError> {
    let limit = app.max_model_len;
    let most = limit as usize * Tokenizer::MAX_CHARS;
    if bytes <= most || chars() <= most {
        return Ok(());
    }
    let chars = chars();
    let text = format!(
        "This model's maximum context length is {limit} tokens. However, your prompt contains {chars} characters (more than {most} \
         characters, which is the upper bound for {limit} input tokens). Please reduce the length of the input prompt."
    );
    Err(ApiError::parameter(&text, "input_text", chars))
}

fn check_tokens(app: &App, tokens: usize, of_text: bool) -> Result<(), ApiError> {
    let limit = app.max_model_len as usize;
    if tokens <= limit {
        return Ok(());
    }
    // vLLM makes no more tokens of a text than it needs to see that there are too many.
    let seen = if of_text { limit + 1 } else { tokens };
    let at_least = if seen == limit + 1 { "at least " } else { "" };
    let text = format!(
        "This model's maximum context length is {limit} tokens. However, your prompt contains {at_least}{seen} input tokens, which \
         exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    );
    Err(ApiError::parameter(&text, "input_tokens", seen))
}

/// What stands before an echoed answer: the prompt, or in a chat what the assistant said last.
fn echoes(api: Api, body: &Body<'_>, tokenizer: Tokenizer, prompts: &Prompts) -> Vec<String> {
    match (api, body.prompt.as_ref()) {
        (Api::Chat, _) => {
            let last = body.messages.as_deref().and_then(|m| m.last()).filter(|m| m.role == "assistant");
            vec![last.map(|m| text_of(m).into_owned()).unwrap_or_default()]
        }
        (Api::Completions, Some(Prompt::Text(text))) => vec![text.to_string()],
        (Api::Completions, Some(Prompt::Texts(texts))) => texts.iter().map(|t| t.to_string()).collect(),
        (Api::Completions, Some(Prompt::Tokens(_) | Prompt::TokenLists(_)) | None) => {
            let text = |ids: &Vec<TokenId>| {
                let mut text = String::new();
                tokenizer.push_text(ids, &mut text);
                text
            };
            prompts.iter().map(text).collect()
        }
    }
}

/// Makes choices of a checked body.
struct Chooser<'a> {
    app: &'a App,
    api: Api,
    body: &'a Body<'a>,
    tokenizer: Tokenizer,
    details: Option<&'a Details>,
    n: u32,
}

impl Chooser<'_> {
    fn choose(&self, prompts: &Prompts) -> Result<(Part, Vec<Part>), ApiError> {
        let mut max_tokens = Vec::new();
        let first_most = self.max_tokens(prompts.first.len());
        for prompt in &prompts.rest {
            max_tokens.push(self.max_tokens(prompt.len()));
        }
        let least = max_tokens.iter().copied().chain([first_most]).min().unwrap_or(first_most);
        self.check_sampling(least)?;
        self.check_input(prompts)?;
        let choices = prompts.len() * self.n as usize;
        if choices > MAX_CHOICES {
            return Err(ApiError::bad(&format!("This emulator makes at most {MAX_CHOICES} choices per request.")));
        }
        let parent = if choices > 1 { self.app.next_parents(prompts.len()) } else { 0 };
        let first = self.part(prompts, 0, 0, first_most, parent);
        let mut rest = Vec::with_capacity(choices - 1);
        for prompt in 0..prompts.len() {
            let most = prompt.checked_sub(1).map_or(first_most, |i| max_tokens[i]);
            rest.extend(
                (0..self.n).filter(|j| prompt > 0 || *j > 0).map(|j| self.part(prompts, prompt, j, most, parent)),
            );
        }
        Ok((first, rest))
    }

    /// The output limit for a prompt of this length: what was asked for, as far as there is room.
    fn max_tokens(&self, prompt: usize) -> i64 {
        let room = i64::from(self.app.max_model_len) - prompt as i64;
        let asked = match (self.body.most_tokens(), self.api) {
            // With echo, 0 is vLLM's word for the prompt alone; it makes one token and does not tell it.
            (Some(0), Api::Completions) if self.details.is_some_and(|d| d.only_prompt) => 1,
            (Some(n), _) => n,
            (None, Api::Completions) => COMPLETION_MAX_TOKENS,
            (None, Api::Chat) => room,
        };
        asked.min(room)
    }

    fn part(&self, prompts: &Prompts, prompt: usize, choice: u32, max_tokens: i64, parents: u64) -> Part {
        let tokens = prompts.get(prompt);
        let max_tokens = u32::try_from(max_tokens).unwrap_or(1);
        let min_tokens = self.body.min_tokens.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        // vLLM counts the seed up from choice to choice; without one every choice is drawn anew.
        let seed = match (self.body.seed, choice) {
            (Some(seed), j) => Some(seed.wrapping_add(i64::from(j))),
            (None, 0) => None,
            (None, j) => Some(mix64(u64::from(j)) as i64),
        };
        let content = output_content(tokens, seed);
        let natural =
            (!self.body.ignore_eos.unwrap_or(false)).then(|| natural_length(content).max(min_tokens.saturating_add(1)));
        let looked_at = min_tokens..natural.map_or(max_tokens, |n| max_tokens.min(n - 1));
        let stops = Stops::new(self.body, self.tokenizer, content, looked_at);
        let eos_at = stops.found_at().or(natural);
        let several = self.n > 1 || prompts.len() > 1;
        Part {
            prompt,
            params: SamplingParams {
                max_tokens,
                min_tokens,
                ignore_eos: eos_at.is_none(),
                stop_token_ids: self.body.stop_token_ids.iter().flatten().copied().map(TokenId).collect(),
                eos_at,
                skip_reading_prefix_cache: self.details.is_some_and(|d| d.prompt_logprobs.is_some()),
                parallel: several.then(|| Parallel {
                    parent: parents + prompt as u64,
                    n: self.n,
                    first: prompt == 0 && choice == 0,
                }),
            },
            content,
            stops,
        }
    }

    /// `SamplingParams._verify_args` and `_verify_greedy_sampling`.
    fn check_sampling(&self, max_tokens: i64) -> Result<(), ApiError> {
        let body = self.body;
        check_n(body.n.unwrap_or(1))?;
        within(body.presence_penalty, "presence_penalty", "in [-2, 2]", |p| (-2.0..=2.0).contains(&p))?;
        within(body.frequency_penalty, "frequency_penalty", "in [-2, 2]", |p| (-2.0..=2.0).contains(&p))?;
        within(body.repetition_penalty, "repetition_penalty", "greater than zero", |p| p > 0.0)?;
        if let Some(t) = body.temperature.filter(|t| *t < 0.0) {
            let text = format!("temperature must be non-negative, got {}.", Float(t));
            return Err(ApiError::parameter(&text, "temperature", Float(t)));
        }
        if let Some(t) = body.temperature.filter(|t| *t > 2.0) {
            let text = format!("temperature must be in [0, 2], got {}.", Float(t));
            return Err(ApiError::parameter(&text, "temperature", Float(t)));
        }
        if let Some(p) = body.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Err(ApiError::parameter(&format!("top_p must be in (0, 1], got {}.", Float(p)), "top_p", Float(p)));
        }
        if let Some(k) = body.top_k.filter(|k| *k < -1) {
            return Err(ApiError::bad(&format!("top_k must be 0 (disable), or at least 1, got {k}.")));
        }
        within(body.min_p, "min_p", "in [0, 1]", |p| (0.0..=1.0).contains(&p))?;
        if max_tokens < 1 {
            let text = format!("max_tokens must be at least 1, got {max_tokens}.");
            return Err(ApiError::parameter(&text, "max_tokens", max_tokens));
        }
        check_least(body.min_tokens.unwrap_or(0), max_tokens)?;
        if body.stop_texts().iter().any(|s| s.is_empty()) {
            return Err(ApiError::bad("stop cannot contain an empty string."));
        }
        let greedy = body.temperature.is_some_and(|t| t < 1e-5);
        if greedy && self.n > 1 {
            return Err(ApiError::bad(&format!("n must be 1 when using greedy sampling, got {}.", self.n)));
        }
        Ok(())
    }

    /// What the engine refuses.
    fn check_input(&self, prompts: &Prompts) -> Result<(), ApiError> {
        for (name, asked) in [
            ("sample logprobs", self.details.and_then(|d| d.logprobs)),
            ("prompt logprobs", self.details.and_then(|d| d.prompt_logprobs)),
        ] {
            let asked = asked.map(|n| if n == u32::MAX { self.tokenizer.vocabulary() } else { u64::from(n) });
            if let Some(n) = asked.filter(|n| *n > u64::from(MAX_LOGPROBS)) {
                let text = format!("Requested {name} of {n}, which is greater than max allowed: {MAX_LOGPROBS}");
                let param = if name == "sample logprobs" { "logprobs" } else { "prompt_logprobs" };
                return Err(ApiError::parameter(&text, param, n));
            }
        }
        for prompt in prompts.iter() {
            if prompt.is_empty() {
                return Err(ApiError::bad("The decoder prompt cannot be empty"));
            }
            let over = |t: &&TokenId| u64::from(t.0) >= self.tokenizer.vocabulary();
            if let Some(TokenId(id)) = prompt.iter().filter(over).max() {
                return Err(ApiError::bad(&format!("Token id {id} is out of vocabulary")));
            }
        }
        Ok(())
    }
}

fn check_n(n: i64) -> Result<(), ApiError> {
    if n < 1 {
        return Err(ApiError::bad(&format!("n must be at least 1, got {n}.")));
    }
    if n > MAX_N {
        let text = format!(
            "n must be at most {MAX_N}, got {n}. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        );
        return Err(ApiError::bad(&text));
    }
    Ok(())
}

/// How many tokens there must be at least.
fn check_least(least: i64, max_tokens: i64) -> Result<(), ApiError> {
    if least < 0 {
        return Err(ApiError::bad(&format!("min_tokens must be greater than or equal to 0, got {least}.")));
    }
    if least > max_tokens {
        let text = format!("min_tokens must be less than or equal to max_tokens={max_tokens}, got {least}.");
        return Err(ApiError::bad(&text));
    }
    Ok(())
}

fn within(value: Option<f64>, name: &str, range: &str, holds: impl Fn(f64) -> bool) -> Result<(), ApiError> {
    match value.filter(|v| !holds(*v)) {
        Some(v) => Err(ApiError::bad(&format!("{name} must be {range}, got {}.", Float(v)))),
        None => Ok(()),
    }
}

/// A number as Python prints a float: vLLM's schema makes one of `-1`, too.
struct Float(f64);

impl Display for Float {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// The name that an answer calls its model by.
pub(super) fn model_name(app: &App, lora: Option<&Adapter>) -> Arc<str> {
    lora.map_or_else(|| Arc::clone(&app.model), |a| Arc::clone(&a.name))
}
