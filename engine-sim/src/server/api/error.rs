//! Errors in vLLM's words and shape (`vllm/entrypoints/serve/exception_handling`).

use std::fmt::Display;

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use shared::openai::ErrorBody;

use crate::core::engine::RejectReason;
use crate::server::lora::Refused;

/// An error as vLLM answers it.
#[derive(Debug)]
pub(in crate::server) struct ApiError {
    pub(in crate::server) status: StatusCode,
    pub(in crate::server) body: ErrorBody,
}

impl ApiError {
    pub(in crate::server) fn new(
        status: StatusCode,
        kind: &str,
        message: impl Into<String>,
        param: Option<&str>,
    ) -> ApiError {
        ApiError { status, body: ErrorBody::new(status.as_u16(), kind, message, param) }
    }

    /// A request that vLLM refuses after it was read.
    pub(in crate::server) fn bad(message: &str) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", message, None)
    }

    /// The same, with the parameter at fault. vLLM appends its name.
    pub(in crate::server) fn about(message: &str, param: &str) -> ApiError {
        let text = format!("{message} (parameter={param})");
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some(param))
    }

    /// A parameter out of range: vLLM appends which one and what was found.
    pub(in crate::server) fn parameter(message: &str, param: &str, found: impl Display) -> ApiError {
        let text = format!("{message} (parameter={param}, value={found})");
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some(param))
    }

    /// The model is not served.
    pub(in crate::server) fn unknown_model(model: &str, served: &str) -> ApiError {
        // A model name is no content, but it is the caller's text: keep it short.
        let shown: String = model.chars().take(128).collect();
        let text = format!("The model `{shown}` does not exist. Valid aliases: {served}.");
        ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", text, Some("model"))
    }

    /// The engine is dead.
    pub(in crate::server) fn dead() -> ApiError {
        let text = "The server had an error while processing your request.";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", text, None)
    }

    /// A request failed in the engine (`finish_reason` `error`).
    pub(in crate::server) fn failed() -> ApiError {
        let text = "Internal server error";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", text, None)
    }

    /// The engine did not take a request.
    pub(in crate::server) fn rejected(reason: RejectReason) -> ApiError {
        let later = "Please try again later or on a different instance.";
        let busy = |what: &str| {
            let text = format!("{what} {later}");
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable", text, None)
        };
        match reason {
            RejectReason::QueueFull { .. } => busy("The engine is currently busy and cannot accept new requests."),
            RejectReason::BacklogFull { .. } => busy("The engine has reached its prefill token backlog limit."),
            RejectReason::Paused => {
                let text = "Generation is paused. Please retry after it resumes.";
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", text, None)
            }
            RejectReason::TooLong { max_model_len } => {
                let text = format!("This model's maximum context length is {max_model_len} tokens.");
                ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some("input_tokens"))
            }
            RejectReason::EmptyPrompt => ApiError::bad("The decoder prompt cannot be empty"),
        }
    }

    /// An adapter was not loaded or unloaded.
    pub(in crate::server) fn adapter(refused: Refused) -> ApiError {
        match refused {
            Refused::Bad(text) => ApiError::new(StatusCode::BAD_REQUEST, "InvalidUserInput", text, None),
            Refused::Unknown(text) => ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", text, None),
            Refused::Engine(text) => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", text, None)
            }
        }
    }

    /// Value of `error.type`: the status, as HTTP conventions have it.
    pub(in crate::server) fn error_type(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_REQUEST => "400",
            StatusCode::NOT_FOUND => "404",
            StatusCode::PAYLOAD_TOO_LARGE => "413",
            StatusCode::SERVICE_UNAVAILABLE => "503",
            _ => "500",
        }
    }

    /// The events of a stream that ends with this error.
    pub(in crate::server) fn events(&self) -> String {
        format!("data: {}\n\ndata: [DONE]\n\n", self.body.to_json())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, [(CONTENT_TYPE, "application/json")], self.body.to_json()).into_response()
    }
}
