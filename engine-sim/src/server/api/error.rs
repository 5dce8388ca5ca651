//! Errors in vLLM's words and shape.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use shared::openai::ErrorBody;

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

    /// A parameter out of range: vLLM appends which one and what was found.
    pub(in crate::server) fn parameter(message: &str, param: &str, found: impl std::fmt::Display) -> ApiError {
        let text = format!("{message} (parameter={param}, value={found})");
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some(param))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, [(CONTENT_TYPE, "application/json")], self.body.to_json()).into_response()
    }
}
