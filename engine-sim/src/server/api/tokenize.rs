//! `/tokenize` and `/detokenize` (`vllm/entrypoints/serve/tokenize`).

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::openai::Message;
use shared::tokens::TokenId;

use super::generate::read_json;
use super::{ApiError, json as answer};
use crate::server::App;
use crate::server::logprobs::Names;
use crate::server::schema::{Errors, read};
use crate::server::validate::{check_model, tokenize_chat};

/// `POST /tokenize`: of a prompt, or of a chat in its template.
pub(super) async fn tokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    exchange(&app, &headers, body, |request| {
        let tokenizer = app.engine_config.tokenizer;
        let mut tokens = Vec::new();
        match (request.get("prompt"), request.get("messages")) {
            (Some(Value::String(prompt)), _) => tokenizer.encode(prompt, &mut tokens),
            (_, Some(messages)) => {
                let messages = Vec::<Message<'_>>::deserialize(messages).map_err(|_| malformed(request, "messages"))?;
                let prompting = request.get("add_generation_prompt").and_then(Value::as_bool).unwrap_or(true);
                tokenize_chat(tokenizer, &messages, prompting, &mut tokens);
            }
            (_, None) => return Err(malformed(request, "prompt")),
        }
        let told = request.get("return_token_strs").and_then(Value::as_bool).unwrap_or(false);
        let names = Names { tokenizer, ids: false };
        let strings = told.then(|| tokens.iter().map(|t| names.of(*t)).collect::<Vec<_>>());
        let ids: Vec<u32> = tokens.iter().map(|t| t.0).collect();
        let (count, longest) = (ids.len(), app.max_model_len);
        Ok(json!({"count": count, "max_model_len": longest, "tokens": ids, "token_strs": strings}))
    })
    .await
}

/// `POST /detokenize`
pub(super) async fn detokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    exchange(&app, &headers, body, |request| {
        let Some(Value::Array(list)) = request.get("tokens") else { return Err(malformed(request, "tokens")) };
        let ids: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
        let ids = ids.ok_or_else(|| malformed(request, "tokens"))?;
        let tokenizer = app.engine_config.tokenizer;
        let known = |id: &u64| *id < tokenizer.vocabulary();
        if let Some(id) = ids.iter().find(|id| !known(id)) {
            return Err(ApiError::bad(&format!("Token id {id} is out of vocabulary")));
        }
        let ids: Vec<TokenId> = ids.into_iter().map(|id| TokenId(id as u32)).collect();
        let mut prompt = String::new();
        tokenizer.push_text(&ids, &mut prompt);
        Ok(json!({"prompt": prompt}))
    })
    .await
}

async fn exchange(
    app: &App,
    headers: &HeaderMap,
    body: Body,
    then: impl FnOnce(&Value) -> Result<Value, ApiError>,
) -> Response {
    let bytes = read_json(app, headers, body).await;
    let result = bytes.and_then(|bytes| read(&bytes)).and_then(|request| {
        check_model(app, request.get("model").and_then(Value::as_str))?;
        then(&request)
    });
    match result {
        Ok(value) => answer(value.to_string()),
        Err(error) => error.into_response(),
    }
}

/// A field is missing or no such thing.
fn malformed(request: &Value, field: &str) -> ApiError {
    let mut errors = Errors::default();
    match request.get(field) {
        None if request.is_object() => errors.add("missing", &format!("body.{field}"), "Field required", request),
        None => {
            let text = "Input should be a valid dictionary or object to extract fields from";
            errors.add("model_attributes_type", "body", text, request);
        }
        Some(other) => {
            let (kind, text) = match field {
                "prompt" => ("string_type", "Input should be a valid string"),
                _ => ("list_type", "Input should be a valid list"),
            };
            errors.add(kind, &format!("body.{field}"), text, other);
        }
    }
    errors.finish().err().unwrap_or_else(|| ApiError::bad("There was an error parsing the body"))
}
