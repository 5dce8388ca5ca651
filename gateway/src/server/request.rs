//! Reading a request: its body within limits, and what the core has to know of it. The content stays in the body.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use shared::ids::RequestId;
use shared::openai::{Content, Prompt};
use shared::time::Dur;
use shared::tokens::TokenId;
use shared::units::HumanDur;
use xxhash_rust::xxh3::xxh3_64;

use crate::core::config::{LimitConfig, PreciseConfig, PrefixConfig};
use crate::core::prefix_index::PrefixHasher;
use crate::core::request::{Deadlines, SessionKey};
use crate::epp::duration;
use crate::pd_proxy::core::Object;
use crate::server::reply::Refusal;
use crate::server::routing::Routing;
use crate::spans::Arrived;

/// The model that a request is sent to, where no rule says so.
pub(crate) const MODEL_REWRITE: HeaderName = HeaderName::from_static("x-llm-d-model-name-rewrite");

/// What a path stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// Anything else below `/v1`.
    Other,
}

impl Route {
    /// The route as spans and metrics name it.
    pub(crate) const fn template(self) -> &'static str {
        match self {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
            Route::Other => "/v1/{*path}",
        }
    }
}

/// What a body says.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) streaming: bool,
    pub(crate) prompt_tokens: u32,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) prefix: Vec<u64>,
    /// Keys of the prompt's blocks in the index of KV events, where that is read.
    pub(crate) kv_keys: Vec<u64>,
}

/// What headers say.
#[derive(Debug, Default)]
pub(crate) struct Caller {
    pub(crate) objective: Option<Arc<str>>,
    pub(crate) fairness_id: Option<Arc<str>>,
    pub(crate) session_id: Option<Arc<str>>,
    /// Read only where spans say it.
    pub(crate) user_id: Option<Arc<str>>,
    pub(crate) session_endpoint: Option<Arc<str>>,
    pub(crate) selection: Option<Arc<str>>,
    pub(crate) deadlines: Deadlines,
}

impl Caller {
    pub(crate) fn of(headers: &HeaderMap, routing: &Routing) -> Caller {
        let label = |names: &[&str]| names.iter().find_map(|n| headers.get(*n)?.to_str().ok()).map(clean);
        Caller {
            objective: label(&["x-llm-d-inference-objective", "x-gateway-inference-objective"]),
            fairness_id: label(&["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"]),
            session_id: routing.session_id(headers).map(clean),
            user_id: None,
            session_endpoint: routing.session_endpoint(headers).map(Arc::from),
            selection: routing.selection(headers).map(Arc::from),
            deadlines: Deadlines::default(),
        }
    }

    pub(crate) fn session(&self) -> Option<SessionKey> {
        self.session_id.as_ref().map(|id| SessionKey(xxh3_64(id.as_bytes())))
    }
}

/// What the caller says of its deadlines, where anybody looks at that. The newer name of a header wins; what is no number counts as absent, as in llm-d.
pub(crate) fn deadlines(headers: &HeaderMap) -> Deadlines {
    let text = |names: &[&str]| names.iter().find_map(|n| headers.get(*n)?.to_str().ok());
    let millis = |names: &[&str]| text(names)?.trim().parse::<u32>().ok().map(|ms| Dur::from_millis(u64::from(ms)));
    Deadlines {
        ttft: millis(&["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"]),
        tpot: millis(&["x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"]),
        ttl: text(&["x-llm-d-inference-ttl"]).and_then(|t| duration(t.trim())).map(HumanDur::get),
    }
}

/// A header's text as it may appear in a span: bounded and of plain characters.
pub(crate) fn clean(raw: &str) -> Arc<str> {
    RequestId::sanitise(raw).as_str().into()
}

/// Whether the headers are within their limits.
pub(crate) fn headers_fit(headers: &HeaderMap, limits: &LimitConfig) -> bool {
    let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
    headers.len() <= limits.max_headers as usize && bytes <= limits.max_header_bytes as usize
}

/// Whether a header says how the request is to be treated: for spans of the finest detail only.
pub(crate) fn has_metadata(headers: &HeaderMap) -> bool {
    const BEGIN: [&str; 3] = ["x-llm-d-", "x-gateway-inference-", "x-slo-"];
    const NAMES: [&str; 3] = ["x-session-id", "x-session-token", "test-epp-endpoint-selection"];
    let says = |name: &str| BEGIN.iter().any(|b| name.starts_with(b)) || NAMES.contains(&name);
    headers.keys().any(|name| says(name.as_str()))
}

/// As [`body`], and tells what came, however it ends.
pub(crate) async fn counted_body(
    all: axum::body::Body,
    headers: &HeaderMap,
    limit: u32,
    arrived: &mut Arrived,
) -> Result<Bytes, Refusal> {
    let counting = all.map_frame(|frame| {
        arrived.chunks += 1;
        arrived.bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
        frame
    });
    body(counting, headers, limit).await
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn body<B>(body: B, headers: &HeaderMap, limit: u32) -> Result<Bytes, Refusal>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<axum::BoxError>,
{
    let limit = limit as usize;
    let announced = headers.get(http::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(Refusal::TooLarge { limit });
    }
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(Refusal::TooLarge { limit }),
        Err(_) => Err(Refusal::BrokenBody),
    }
}

/// A body that was read, before its prompt is looked at: how that is done depends on the model.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    /// The model that it names.
    pub(crate) model: Option<Arc<str>>,
    /// `None` if it is no inference request.
    request: Option<Request<'a>>,
}

impl<'a> Asked<'a> {
    /// Reads a body. Whether the request is a good one is for the engine to say: what is not understood counts as absent, and only the
    /// body of an inference request that is no JSON object is refused.
    pub(crate) fn read(route: Route, body: &'a [u8]) -> Result<Asked<'a>, Refusal> {
        let request = match route {
            Route::Other => return Ok(Asked { model: model_only(body), request: None }),
            Route::Chat | Route::Completions => Request::read(body)?,
        };
        Ok(Asked { model: request.model.as_deref().map(Arc::from), request: Some(request) })
    }

    /// Hashes the prompt.
    pub(crate) fn parsed(&self, prefix: &PrefixConfig, precise: Option<&PreciseConfig>) -> Parsed {
        self.request.as_ref().map(|request| parsed(request, prefix, precise)).unwrap_or_default()
    }
}

fn parsed(request: &Request<'_>, prefix: &PrefixConfig, precise: Option<&PreciseConfig>) -> Parsed {
    let model = request.model.as_deref().unwrap_or_default();
    let (salt, most) = (request.cache_salt.as_deref(), prefix.max_prefix_tokens);
    let mut hasher = PrefixHasher::with_blocks(model, salt, most, prefix.block_tokens);
    hash_prompt(request, &mut hasher);
    let kv_keys = precise.map(|p| {
        let mut hasher = p.hasher(model, salt);
        hash_prompt(request, &mut hasher);
        hasher.finish()
    });
    Parsed {
        streaming: request.stream == Some(true),
        prompt_tokens: u32::try_from(hasher.token_count()).unwrap_or(u32::MAX),
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
        prefix: hasher.finish(),
        kv_keys: kv_keys.unwrap_or_default(),
    }
}

/// The body with this priority in it, whatever its caller wrote; as it is if it is no object.
pub(crate) fn with_priority(body: Bytes, priority: i32) -> Bytes {
    Object::read(body.clone()).map_or(body, |object| object.with_priority(priority))
}

/// The body with another model in it, encoded anew as llm-d does; `None` if it is no object.
pub(crate) fn with_model(body: &[u8], model: &str) -> Option<Bytes> {
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body).ok()?;
    object.insert("model".to_owned(), model.into());
    serde_json::to_vec(&object).ok().map(Bytes::from)
}

/// What the gateway reads of a request.
#[derive(Debug, serde::Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct Request<'a> {
    #[serde(default, borrow)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    messages: Option<Vec<Message<'a>>>,
    #[serde(default)]
    prompt: Option<Prompt<'a>>,
    #[serde(default)]
    max_tokens: Option<u32>,
    #[serde(default)]
    max_completion_tokens: Option<u32>,
    #[serde(default, borrow)]
    cache_salt: Option<Cow<'a, str>>,
}

/// What the gateway reads of a chat message.
#[derive(Debug, serde::Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct Message<'a> {
    #[serde(default)]
    content: Option<Content<'a>>,
}

impl<'a> Request<'a> {
    fn read(body: &'a [u8]) -> Result<Request<'a>, Refusal> {
        // A list would be read as the fields in their order.
        let object = body.trim_ascii_start().starts_with(b"{");
        match serde_json::from_slice(body) {
            Ok(request) if object => Ok(request),
            Ok(_) | Err(_) => Request::lenient(body),
        }
    }

    /// Each field for itself, where they cannot be read together.
    fn lenient(body: &'a [u8]) -> Result<Request<'a>, Refusal> {
        // With every field ignored, it only looks whether the body is an object.
        field::<IgnoredAny>(body, "").map_err(|e| Refusal::BadJson { line: e.line(), column: e.column() })?;
        Ok(Request {
            model: known(body, "model").map(Cow::Owned),
            stream: known(body, "stream"),
            messages: known(body, "messages"),
            prompt: known(body, "prompt"),
            max_tokens: known(body, "max_tokens"),
            max_completion_tokens: known(body, "max_completion_tokens"),
            cache_salt: known(body, "cache_salt").map(Cow::Owned),
        })
    }
}

/// A field of an object; `None` if it is absent or not what is expected.
fn known<'a, T: Deserialize<'a>>(body: &'a [u8], name: &str) -> Option<T> {
    field::<Option<T>>(body, name).ok().flatten().flatten()
}

/// A field of an object, the last one of its name.
fn field<'a, T: Deserialize<'a>>(body: &'a [u8], name: &str) -> Result<Option<T>, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let found = reader.deserialize_map(Field { name, kind: PhantomData })?;
    reader.end().map(|()| found)
}

struct Field<'n, T> {
    name: &'n str,
    kind: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Field<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<T>, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == self.name {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// The same bytes in the same order as [`shared::openai::Request::prompt_tokens`], without making tokens of them.
fn hash_prompt(request: &Request<'_>, hasher: &mut PrefixHasher) {
    for message in request.messages.iter().flatten() {
        match &message.content {
            None => {}
            Some(Content::Text(text)) => hasher.text(text.as_bytes()),
            Some(Content::Parts(parts)) => {
                parts.iter().filter_map(|p| p.text.as_deref()).for_each(|text| hasher.text(text.as_bytes()));
            }
        }
    }
    if request.messages.is_some() {
        return;
    }
    match &request.prompt {
        None => {}
        Some(Prompt::Text(text)) => hasher.text(text.as_bytes()),
        Some(Prompt::Tokens(ids)) => hasher.tokens(ids.iter().copied().map(TokenId)),
        Some(Prompt::Texts(texts)) => texts.first().into_iter().for_each(|text| hasher.text(text.as_bytes())),
        Some(Prompt::TokenLists(lists)) => {
            hasher.tokens(lists.first().into_iter().flatten().copied().map(TokenId));
        }
    }
}

/// Other paths are passed on whatever their body is; one with a model goes where the model is.
fn model_only(body: &[u8]) -> Option<Arc<str>> {
    #[derive(Default, serde::Deserialize)]
    struct Model {
        model: Option<String>,
    }
    serde_json::from_slice::<Model>(body).unwrap_or_default().model.map(Arc::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::GatewayConfig;
    use crate::core::prefix_index::prefix_hashes_of_tokens;

    /// What a body says, with the model that it names.
    fn parse(
        route: Route,
        body: &[u8],
        prefix: &PrefixConfig,
        precise: Option<&PreciseConfig>,
    ) -> Result<(Option<Arc<str>>, Parsed), Refusal> {
        Asked::read(route, body).map(|asked| (asked.model.clone(), asked.parsed(prefix, precise)))
    }

    fn blocks(max_prefix_tokens: u32) -> PrefixConfig {
        PrefixConfig { max_prefix_tokens, ..PrefixConfig::default() }
    }

    #[test]
    fn the_newer_name_of_a_limit_wins() {
        let check = |body: &str, expect| {
            assert_eq!(parse(Route::Chat, body.as_bytes(), &blocks(64), None).unwrap().1.max_tokens, expect, "{body}");
        };
        check(r#"{"model":"m"}"#, None);
        check(r#"{"max_tokens":7}"#, Some(7));
        check(r#"{"max_tokens":7,"max_completion_tokens":8}"#, Some(8));
        check(r#"{"max_tokens":-1}"#, None);
    }

    #[test]
    fn the_prompt_hashes_like_its_tokens() {
        let long = "word ".repeat(120);
        let check = |route, body: String| {
            let (_, parsed) = parse(route, body.as_bytes(), &blocks(u32::MAX), None).unwrap();
            let request: shared::openai::Request<'_> = serde_json::from_str(&body).unwrap();
            let mut tokens = Vec::new();
            request.prompt_tokens(&mut tokens).unwrap();
            assert!(parsed.prefix.len() >= 2, "{body}");
            assert_eq!(parsed.prompt_tokens as usize, tokens.len());
            assert_eq!(parsed.prefix, prefix_hashes_of_tokens("m", None, &tokens, u32::MAX));
        };
        let content = format!(r#"[{{"type":"text","text":"{long}"}},{{"type":"image_url"}}]"#);
        check(
            Route::Chat,
            format!(
                r#"{{"model":"m","messages":[{{"role":"system","content":"{long}"}},{{"role":"user","content":{content}}}]}}"#
            ),
        );
        check(Route::Completions, format!(r#"{{"model":"m","prompt":"{long}"}}"#));
        check(Route::Completions, format!(r#"{{"model":"m","prompt":["{long}","x"]}}"#));
        check(Route::Completions, format!(r#"{{"model":"m","prompt":{:?}}}"#, (0..200).collect::<Vec<u32>>()));
    }

    #[test]
    fn what_is_not_understood_is_left_to_the_engine() {
        let check = |body: &str, expect: Option<(&str, bool, u32)>| {
            for route in [Route::Chat, Route::Completions] {
                let found = parse(route, body.as_bytes(), &blocks(64), None).ok();
                let found = found.as_ref().map(|(m, p)| (m.as_deref().unwrap_or("-"), p.streaming, p.prompt_tokens));
                assert_eq!(found, expect, "{body}");
            }
        };
        check(r#"{"model":"m","stream":true,"prompt":"12345678"}"#, Some(("m", true, 2)));
        check(r#"{"model":"m","prompt":"12345678","max_tokens":"4","stop":7,"n":-1}"#, Some(("m", false, 2)));
        check(r#"{"model":"m","messages":[{"content":"12345678"}]}"#, Some(("m", false, 2)));
        check(r#"{"model":"m","stream":"yes","prompt":"12345678"}"#, Some(("m", false, 2)));
        check(r#"{"model":"m","stream":true,"messages":[{"role":"user","content":7}]}"#, Some(("m", true, 0)));
        check(r#"{"model":"m","prompt":"\ud800"}"#, Some(("m", false, 0)));
        check(r#"{"model":7,"prompt_embeds":"x"}"#, Some(("-", false, 0)));
        check(r#"{"model":"a","model":"m","prompt":null}"#, Some(("m", false, 0)));
        check("{}", Some(("-", false, 0)));
        for no_object in ["", "{", "[]", r#"["m"]"#, "7", "{} x", r#"{"model":"m"#] {
            check(no_object, None);
        }
    }

    #[test]
    fn other_paths_need_no_json() {
        let model = |body: &[u8]| parse(Route::Other, body, &blocks(64), None).unwrap().0;
        assert_eq!(model(b"not json"), None);
        assert_eq!(model(br#"{"model":"m","input":"x"}"#).as_deref(), Some("m"));
    }

    #[test]
    fn metadata_is_what_says_how_to_treat_a_request() {
        let check = |name: &'static str, expect| {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(name), "x".parse().unwrap())]);
            assert_eq!(has_metadata(&headers), expect, "{name}");
        };
        check("x-llm-d-inference-objective", true);
        check("x-session-id", true);
        check("content-type", false);
        check("traceparent", false);
    }

    #[tokio::test]
    async fn what_came_of_a_body_is_told_however_it_ends() {
        let check = async |limit, expect: Option<usize>, arrived: (u32, u64)| {
            let body = axum::body::Body::from("12345678");
            let mut found = Arrived::default();
            let read = counted_body(body, &HeaderMap::new(), limit, &mut found).await;
            assert_eq!(read.ok().map(|b| b.len()), expect);
            assert_eq!((found.chunks, found.bytes), arrived);
        };
        check(8, Some(8), (1, 8)).await;
        check(7, None, (1, 8)).await;
    }

    #[test]
    fn a_priority_takes_the_place_of_the_callers() {
        let check = |body: &'static str, expect: &str| {
            assert_eq!(with_priority(Bytes::from_static(body.as_bytes()), -10), expect, "{body}");
        };
        check(r#"{"model":"m","priority": 99,"n":1.0e0}"#, r#"{"model":"m","n":1.0e0,"priority":-10}"#);
        check("{}", r#"{"priority":-10}"#);
        check("no object", "no object");
    }

    #[test]
    fn labels_from_headers_are_plain() {
        let mut headers = HeaderMap::new();
        headers.insert("x-llm-d-inference-objective", "chat".parse().unwrap());
        headers.insert("x-gateway-inference-fairness-id", "tell me a secret".parse().unwrap());
        let caller = Caller::of(&headers, &Routing::new(&GatewayConfig::default()));
        assert_eq!(caller.objective.as_deref(), Some("chat"));
        assert!(caller.fairness_id.unwrap().starts_with("h-"));
        assert_eq!(caller.session_id, None);
    }
}
