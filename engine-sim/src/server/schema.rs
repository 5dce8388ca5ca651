//! Bodies that are not what they should be, told as vLLM tells them (pydantic's errors, put together by vLLM's
//! `exception_handling/handlers/validation.py`), and values that pydantic takes in another type, such as `"5"` for 5.
//!
//! Only read when a body does not fit [`Body`]. Unlike vLLM no text of the caller is repeated: of a text its length is told.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::api::{Api, ApiError};
use super::request::Body;

/// Errors that are told; more are counted.
const MAX_SHOWN: usize = 10;

/// Reads a body and hands it to `then`.
pub(super) fn with_body<R>(
    api: Api,
    bytes: &[u8],
    then: impl FnOnce(&Body<'_>) -> Result<R, ApiError>,
) -> Result<R, ApiError> {
    match serde_json::from_slice::<Body<'_>>(bytes) {
        Ok(body) if fits(api, &body) => then(&body),
        Ok(_) | Err(_) => {
            let mut value = read(bytes)?;
            let mut errors = Errors::default();
            coerce(api, &mut value, &mut errors);
            errors.finish()?;
            check_ids(&value)?;
            match Body::deserialize(&value) {
                Ok(body) => then(&body),
                Err(_) => Err(unreadable()),
            }
        }
    }
}

/// Whether what serde took is what pydantic takes.
fn fits(api: Api, body: &Body<'_>) -> bool {
    use super::request::Logprobs;
    let logprobs = match (api, body.logprobs) {
        (_, None) | (Api::Chat, Some(Logprobs::Told(_))) | (Api::Completions, Some(_)) => true,
        (Api::Chat, Some(Logprobs::Count(_))) => false,
    };
    logprobs && body.stop_texts().len() <= MAX_STOPS && (api == Api::Completions || body.messages.is_some())
}

/// Stop strings of one request (`VLLM_MAX_STOP_STRINGS`).
const MAX_STOPS: usize = 4;

/// The JSON of a body.
pub(super) fn read(bytes: &[u8]) -> Result<Value, ApiError> {
    if bytes.is_empty() {
        let mut errors = Errors::default();
        errors.add("missing", "body", "Field required", &Value::Null);
        errors.finish()?;
    }
    if std::str::from_utf8(bytes).is_err() {
        return Err(unreadable());
    }
    serde_json::from_slice(bytes).map_err(|error| {
        if error.to_string().starts_with("recursion limit") {
            return unreadable();
        }
        let at = offset(bytes, error.line(), error.column());
        let text = error.to_string();
        // Errors of syntax say what is expected and repeat nothing.
        let reason = text.split(" at line ").next().unwrap_or_default();
        let mut errors = Errors::default();
        errors.list.push(format!(
            "{{'type': 'json_invalid', 'loc': 'body.{at}', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', \
             'ctx': {{'error': '{reason}'}}}}"
        ));
        errors.first = Some(format!("body.{at}"));
        errors.finish().map_or_else(|e| e, |()| unreadable())
    })
}

/// What vLLM says of a body that its parser cannot read, such as one that is no UTF-8 or nested too deeply.
fn unreadable() -> ApiError {
    ApiError::new(axum::http::StatusCode::BAD_REQUEST, "Bad Request", "There was an error parsing the body", None)
}

fn offset(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize = bytes.split_inclusive(|b| *b == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    (before + column).saturating_sub(1)
}

/// Validation errors of one body.
#[derive(Default)]
pub(super) struct Errors {
    list: Vec<String>,
    count: usize,
    first: Option<String>,
}

impl Errors {
    /// Adds an error at `at`, a dotted path from `body`.
    pub(super) fn add(&mut self, kind: &str, at: &str, message: &str, input: &Value) {
        self.add_with(kind, at, message, input, "");
    }

    fn add_with(&mut self, kind: &str, at: &str, message: &str, input: &Value, more: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| at.to_owned());
        if self.list.len() < MAX_SHOWN {
            let input = summary(input);
            self.list.push(format!("{{'type': '{kind}', 'loc': '{at}', 'msg': '{message}', 'input': {input}{more}}}"));
        }
    }

    /// The answer, if there is an error.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        let count = self.count.max(self.list.len());
        if count == 0 {
            return Ok(());
        }
        let label = if count == 1 { "error" } else { "errors" };
        let mut text = format!("{count} validation {label}:");
        self.list.iter().for_each(|e| text.extend(["\n  ", e]));
        if count > self.list.len() {
            text.push_str(&format!("\n  ...and {} more {label}", count - self.list.len()));
        }
        Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "Bad Request", text, self.first.as_deref()))
    }
}

/// A value as Python prints it; of texts and containers only the size.
fn summary(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(n) => n.to_string(),
        Value::String(text) => format!("'<str of {} characters>'", text.chars().count()),
        Value::Array(items) => format!("'<list of {} items>'", items.len()),
        Value::Object(items) => format!("'<dict of {} items>'", items.len()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int,
    Float,
    Bool,
    Text,
}

/// Scalar fields: name, type, whether null is allowed.
const SCALARS: [(&str, Kind, bool); 23] = [
    ("model", Kind::Text, true),
    ("stream", Kind::Bool, true),
    ("max_tokens", Kind::Int, true),
    ("max_completion_tokens", Kind::Int, true),
    ("min_tokens", Kind::Int, false),
    ("temperature", Kind::Float, true),
    ("top_p", Kind::Float, true),
    ("top_k", Kind::Int, true),
    ("min_p", Kind::Float, true),
    ("presence_penalty", Kind::Float, true),
    ("frequency_penalty", Kind::Float, true),
    ("repetition_penalty", Kind::Float, true),
    ("n", Kind::Int, true),
    ("seed", Kind::Int, true),
    ("ignore_eos", Kind::Bool, false),
    ("include_stop_str_in_output", Kind::Bool, false),
    ("priority", Kind::Int, false),
    ("cache_salt", Kind::Text, true),
    ("echo", Kind::Bool, true),
    ("top_logprobs", Kind::Int, true),
    ("prompt_logprobs", Kind::Int, true),
    ("return_token_ids", Kind::Bool, true),
    ("return_tokens_as_token_ids", Kind::Bool, true),
];

fn coerce(api: Api, value: &mut Value, errors: &mut Errors) {
    let Value::Object(body) = value else {
        let text = "Input should be a valid dictionary or object to extract fields from";
        errors.add("model_attributes_type", "body", text, value);
        return;
    };
    match api {
        Api::Chat => messages(body, errors),
        Api::Completions => prompt(body, errors),
    }
    for (name, kind, nullable) in SCALARS {
        scalar(body, name, kind, nullable, errors);
    }
    let kind = if api == Api::Chat { Kind::Bool } else { Kind::Int };
    scalar(body, "logprobs", kind, true, errors);
    // The other API's prompt is an extra field here.
    body.remove(if api == Api::Chat { "prompt" } else { "messages" });
    stop(body, errors);
    ids(body, errors);
    stream_options(body, errors);
}

fn scalar(body: &mut Map<String, Value>, name: &str, kind: Kind, nullable: bool, errors: &mut Errors) {
    let Some(value) = body.get_mut(name) else { return };
    if value.is_null() && nullable {
        return;
    }
    match convert(value, kind) {
        Ok(converted) => *value = converted,
        Err((error, message)) => errors.add(error, &format!("body.{name}"), message, value),
    }
}

/// A value in the type asked for, as pydantic's lax mode converts it.
fn convert(value: &Value, kind: Kind) -> Result<Value, (&'static str, &'static str)> {
    match kind {
        Kind::Int => match value {
            Value::Number(n) if n.is_i64() => Ok(value.clone()),
            Value::Number(n) => match n.as_f64() {
                Some(f) if f.fract() == 0.0 && f.abs() < 9.0e15 => Ok(Value::from(f as i64)),
                Some(f) if f.fract() == 0.0 => {
                    Err(("int_parsing_size", "Unable to parse input string as an integer, exceeded maximum size"))
                }
                _ => Err(("int_from_float", "Input should be a valid integer, got a number with a fractional part")),
            },
            Value::Bool(b) => Ok(Value::from(i64::from(*b))),
            Value::String(text) => {
                text.trim().parse::<i64>().map(Value::from).map_err(|_| {
                    ("int_parsing", "Input should be a valid integer, unable to parse string as an integer")
                })
            }
            Value::Null | Value::Array(_) | Value::Object(_) => Err(("int_type", "Input should be a valid integer")),
        },
        Kind::Float => match value {
            Value::Number(_) => Ok(value.clone()),
            Value::Bool(b) => Ok(Value::from(f64::from(u8::from(*b)))),
            Value::String(text) => text
                .trim()
                .parse::<f64>()
                .ok()
                .filter(|f| f.is_finite())
                .map(Value::from)
                .ok_or(("float_parsing", "Input should be a valid number, unable to parse string as a number")),
            Value::Null | Value::Array(_) | Value::Object(_) => Err(("float_type", "Input should be a valid number")),
        },
        Kind::Bool => match value {
            Value::Bool(_) => Ok(value.clone()),
            Value::Number(n) if n.as_f64() == Some(0.0) => Ok(Value::Bool(false)),
            Value::Number(n) if n.as_f64() == Some(1.0) => Ok(Value::Bool(true)),
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "t" | "yes" | "y" | "on" | "1" => Ok(Value::Bool(true)),
                "false" | "f" | "no" | "n" | "off" | "0" => Ok(Value::Bool(false)),
                _ => Err(("bool_parsing", "Input should be a valid boolean, unable to interpret input")),
            },
            Value::Number(_) => Err(("bool_parsing", "Input should be a valid boolean, unable to interpret input")),
            Value::Null | Value::Array(_) | Value::Object(_) => Err(("bool_type", "Input should be a valid boolean")),
        },
        Kind::Text if value.is_string() => Ok(value.clone()),
        Kind::Text => Err(("string_type", "Input should be a valid string")),
    }
}

const LIST: (&str, &str) = ("list_type", "Input should be a valid list");
const TEXT: (&str, &str) = ("string_type", "Input should be a valid string");

fn messages(body: &Map<String, Value>, errors: &mut Errors) {
    let Some(messages) = body.get("messages") else {
        return errors.add("missing", "body.messages", "Field required", &Value::Object(body.clone()));
    };
    let Value::Array(list) = messages else { return errors.add(LIST.0, "body.messages", LIST.1, messages) };
    for (i, message) in list.iter().enumerate() {
        let at = format!("body.messages.{i}");
        let Value::Object(fields) = message else {
            errors.add("dict_type", &at, "Input should be a valid dictionary", message);
            continue;
        };
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => errors.add(TEXT.0, &format!("{at}.role"), TEXT.1, other),
            None => errors.add("missing", &format!("{at}.role"), "Field required", message),
        }
        content(fields.get("content").unwrap_or(&Value::Null), &format!("{at}.content"), errors);
    }
}

fn content(value: &Value, at: &str, errors: &mut Errors) {
    match value {
        Value::Null | Value::String(_) => {}
        Value::Array(parts) => {
            for (i, part) in parts.iter().enumerate() {
                match part.get("text") {
                    None if part.is_object() || part.is_string() => {}
                    Some(Value::String(_) | Value::Null) => {}
                    Some(text) => errors.add(TEXT.0, &format!("{at}.{i}.text"), TEXT.1, text),
                    None => errors.add("dict_type", &format!("{at}.{i}"), "Input should be a valid dictionary", part),
                }
            }
        }
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            errors.add(TEXT.0, at, TEXT.1, value);
            errors.add(LIST.0, at, LIST.1, value);
        }
    }
}

/// Every member of the union has its say: token ids, lists of them, a text, texts.
fn prompt(body: &Map<String, Value>, errors: &mut Errors) {
    let Some(prompt) = body.get("prompt") else { return };
    let Value::Array(items) = prompt else {
        if !prompt.is_null() && !prompt.is_string() {
            for (kind, message) in [LIST, LIST, TEXT, LIST] {
                errors.add(kind, "body.prompt", message, prompt);
            }
        }
        return;
    };
    let is_id = |v: &Value| convert(v, Kind::Int).is_ok_and(|v| v.as_i64().is_some_and(|n| n >= 0));
    let ids = |v: &Value| v.as_array().is_some_and(|list| list.iter().all(is_id));
    if items.iter().all(is_id) || items.iter().all(ids) || items.iter().all(Value::is_string) {
        return;
    }
    for (i, item) in items.iter().enumerate() {
        let at = format!("body.prompt.{i}");
        match convert(item, Kind::Int) {
            Err((kind, message)) => errors.add(kind, &at, message, item),
            Ok(_) if is_id(item) => {}
            Ok(_) => errors.add_with(
                "greater_than_equal",
                &at,
                "Input should be greater than or equal to 0",
                item,
                ", 'ctx': {'ge': 0}",
            ),
        }
        if !item.is_array() {
            errors.add(LIST.0, &at, LIST.1, item);
        }
        if !item.is_string() {
            errors.add(TEXT.0, &at, TEXT.1, item);
        }
    }
}

fn stop(body: &Map<String, Value>, errors: &mut Errors) {
    let (at, Some(value)) = ("body.stop", body.get("stop")) else { return };
    match value {
        Value::Null | Value::String(_) => {}
        Value::Array(list) if list.len() > MAX_STOPS => {
            errors.add(TEXT.0, at, TEXT.1, value);
            let n = list.len();
            let text = format!("List should have at most {MAX_STOPS} items after validation, not {n}");
            let more = format!(", 'ctx': {{'field_type': 'List', 'max_length': {MAX_STOPS}, 'actual_length': {n}}}");
            errors.add_with("too_long", at, &text, value, &more);
        }
        Value::Array(list) => {
            let wrong: Vec<_> = list.iter().enumerate().filter(|(_, v)| !v.is_string()).collect();
            if !wrong.is_empty() {
                errors.add(TEXT.0, at, TEXT.1, value);
            }
            wrong.into_iter().for_each(|(i, v)| errors.add(TEXT.0, &format!("{at}.{i}"), TEXT.1, v));
        }
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            errors.add(TEXT.0, at, TEXT.1, value);
            errors.add(LIST.0, at, LIST.1, value);
        }
    }
}

fn ids(body: &mut Map<String, Value>, errors: &mut Errors) {
    let at = "body.stop_token_ids";
    match body.get_mut("stop_token_ids") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) => {
            for (i, value) in list.iter_mut().enumerate() {
                match convert(value, Kind::Int) {
                    Ok(converted) => *value = converted,
                    Err((kind, message)) => errors.add(kind, &format!("{at}.{i}"), message, value),
                }
            }
        }
        Some(other) => errors.add(LIST.0, at, LIST.1, other),
    }
}

fn stream_options(body: &mut Map<String, Value>, errors: &mut Errors) {
    let at = "body.stream_options";
    match body.get_mut("stream_options") {
        None | Some(Value::Null) => {}
        Some(Value::Object(options)) => {
            for name in ["include_usage", "continuous_usage_stats"] {
                if options.get(name).is_some_and(Value::is_null) {
                    options.remove(name);
                }
                let Some(value) = options.get_mut(name) else { continue };
                match convert(value, Kind::Bool) {
                    Ok(converted) => *value = converted,
                    Err((kind, message)) => errors.add(kind, &format!("{at}.{name}"), message, value),
                }
            }
        }
        Some(other) => {
            let text = "Input should be a valid dictionary or object to extract fields from";
            errors.add("model_attributes_type", at, text, other);
        }
    }
}

/// Ids that no vocabulary has: vLLM refuses them with words of its own.
fn check_ids(body: &Value) -> Result<(), ApiError> {
    let lists = ["prompt", "stop_token_ids"].map(|name| body.get(name).and_then(Value::as_array));
    let ids = lists.into_iter().flatten().flatten().flat_map(|v| match v {
        Value::Array(list) => list.as_slice(),
        other => std::slice::from_ref(other),
    });
    let over = ids.filter_map(Value::as_i64).find(|id| u32::try_from(*id).is_err());
    match over {
        Some(id) => Err(ApiError::bad(&format!("Token id {id} is out of vocabulary"))),
        None => Ok(()),
    }
}
