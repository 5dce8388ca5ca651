//! Answers the sidecar gives itself, as OpenAI errors.

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::header::{self, HeaderValue};
use shared::openai::ErrorBody;

use crate::pd_proxy::core::{Failure, Refusal};
use crate::server::reply;

/// Why a request is answered by the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum No {
    /// The body did not come, or is too large.
    Body(reply::Refusal),
    /// The core refused it.
    Refused(Refusal),
    /// What went wrong at the engine that decodes.
    Decode(Failure),
}

impl No {
    pub(super) const fn status(self) -> u16 {
        match self {
            No::Body(refusal) => refusal.status(),
            No::Refused(refusal) => refusal.status(),
            No::Decode(failure) => failure.status(),
        }
    }

    /// What spans say of it, where the HTTP status and the core's own notes do not say it all.
    pub(super) const fn failure(self) -> Option<Failure> {
        match self {
            No::Decode(failure) => Some(failure),
            No::Body(_) | No::Refused(_) => None,
        }
    }

    fn text(self) -> (&'static str, &'static str) {
        match self {
            No::Body(_) => ("BadRequestError", "The body is incomplete."),
            No::Refused(Refusal::Forbidden) => ("ForbiddenError", "The engine named to prefill is not in the pool."),
            No::Refused(Refusal::BadTarget) => ("BadRequestError", "x-prefiller-host-port names no engine."),
            No::Refused(Refusal::BadBody) => ("BadRequestError", "The body is no JSON object."),
            No::Refused(Refusal::Prefill(failure)) => failed(failure, true),
            No::Decode(failure) => failed(failure, false),
        }
    }

    /// The answer.
    pub(super) fn response(self) -> Response {
        if let No::Body(refusal) = self {
            return refusal.response("");
        }
        let (kind, message) = self.text();
        let body = ErrorBody::new(self.status(), kind, message, None).to_json();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

/// Type and message where an engine failed.
const fn failed(failure: Failure, prefill: bool) -> (&'static str, &'static str) {
    match (failure, prefill) {
        (Failure::Connect, true) => ("BadGatewayError", "The engine that prefills could not be reached."),
        (Failure::Connect, false) => ("BadGatewayError", "The engine could not be reached."),
        (Failure::Timeout, true) => ("GatewayTimeoutError", "The engine that prefills did not answer in time."),
        (Failure::Timeout, false) => ("GatewayTimeoutError", "The engine did not answer in time."),
        (Failure::BadAnswer, _) => ("BadGatewayError", "The answer of the engine that prefills cannot be read."),
        (Failure::Reset | Failure::Cancelled | Failure::Abandoned, true) => {
            ("BadGatewayError", "The engine that prefills broke off before it answered.")
        }
        (Failure::Reset | Failure::Cancelled | Failure::Abandoned, false) => {
            ("BadGatewayError", "The engine broke off before it answered.")
        }
    }
}
