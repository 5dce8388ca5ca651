//! The served models: the base model, the adapters, and loading them while the server runs
//! (`vllm/entrypoints/openai/models`, `serve/lora`).

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::generate::read_json;
use super::{ApiError, json as answer};
use crate::server::App;
use crate::server::schema::{Errors, read};

/// All models that requests can name.
pub(super) async fn list(State(app): State<Arc<App>>) -> Response {
    let base = |name: &str| card(&app, name, &app.model, None, Some(app.max_model_len));
    let mut cards: Vec<Value> = vec![base(&app.model)];
    cards.extend(app.frontend.aliases.iter().map(|alias| base(alias)));
    for adapter in app.adapters.loaded() {
        let parent = adapter.base.as_deref().filter(|b| app.serves(b)).unwrap_or(&app.model);
        cards.push(card(&app, &adapter.name, &adapter.path, Some(parent), None));
    }
    answer(json!({"object": "list", "data": cards}).to_string())
}

fn card(app: &App, id: &str, root: &str, parent: Option<&str>, max_model_len: Option<u32>) -> Value {
    let created = app.started_unix;
    let permission = json!({
        "id": format!("modelperm-{}", app.fresh_id()), "object": "model_permission", "created": created,
        "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true, "allow_search_indices": false,
        "allow_view": true, "allow_fine_tuning": false, "organization": "*", "group": null, "is_blocking": false,
    });
    json!({
        "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
        "max_model_len": max_model_len, "permission": [permission],
    })
}

/// `POST /v1/load_lora_adapter`
pub(super) async fn load_adapter(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    change(&app, &headers, body, &["lora_name", "lora_path"], |request| {
        let (name, path) = (text(request, "lora_name"), text(request, "lora_path"));
        let in_place = request.get("load_inplace").and_then(Value::as_bool).unwrap_or(false);
        app.adapters.load(name, path, in_place, |name| app.serves(name)).map_err(ApiError::adapter)?;
        Ok(format!("Success: LoRA adapter '{name}' added successfully."))
    })
    .await
}

/// `POST /v1/unload_lora_adapter`
pub(super) async fn unload_adapter(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    change(&app, &headers, body, &["lora_name"], |request| {
        let name = text(request, "lora_name");
        app.adapters.unload(name).map_err(ApiError::adapter)?;
        Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
    })
    .await
}

/// Reads a request with texts in `fields` and answers with a plain text, as vLLM does.
async fn change(
    app: &App,
    headers: &HeaderMap,
    body: Body,
    fields: &[&str],
    then: impl FnOnce(&Value) -> Result<String, ApiError>,
) -> Response {
    let bytes = read_json(app, headers, body).await;
    let request = bytes.and_then(|bytes| read(&bytes)).and_then(|request| with_texts(request, fields));
    match request.and_then(|request| then(&request)) {
        Ok(text) => text.into_bytes().into_response(),
        Err(error) => error.into_response(),
    }
}

fn with_texts(request: Value, fields: &[&str]) -> Result<Value, ApiError> {
    let mut errors = Errors::default();
    if !request.is_object() {
        let text = "Input should be a valid dictionary or object to extract fields from";
        errors.add("model_attributes_type", "body", text, &request);
    } else {
        for field in fields {
            match request.get(field) {
                Some(Value::String(_)) => {}
                Some(other) => {
                    errors.add("string_type", &format!("body.{field}"), "Input should be a valid string", other);
                }
                None => errors.add("missing", &format!("body.{field}"), "Field required", &request),
            }
        }
    }
    errors.finish().map(|()| request)
}

fn text<'v>(request: &'v Value, field: &str) -> &'v str {
    request.get(field).and_then(Value::as_str).unwrap_or_default()
}
