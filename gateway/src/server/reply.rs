//! Answers the gateway gives itself: refusals as OpenAI errors, and which headers travel.

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use shared::openai::ErrorBody;

use crate::core::request::Rejection;
use crate::spans::Failure;

/// Names the endpoint that answered.
pub(crate) const SERVED_BY: HeaderName = HeaderName::from_static("x-gateway-destination-endpoint-served");
/// How long the request waited in the gateway, in whole milliseconds, where requests may wait.
pub(crate) const QUEUE_DURATION: HeaderName = HeaderName::from_static("x-llm-d-flow-queue-duration-ms");
/// Why no endpoint got the request.
const DROPPED_REASON: HeaderName = HeaderName::from_static("x-llm-d-request-dropped-reason");
/// Names the request.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The trace of the request, for the caller, if it is kept (W3C Trace Context level 2, draft).
pub(crate) const TRACERESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// Why a request is answered by the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The body is no JSON object. The text of it is not repeated.
    BadJson { line: usize, column: usize },
    /// The body broke off.
    BrokenBody,
    /// The body did not come in time.
    SlowBody,
    /// The body is too large.
    TooLarge { limit: usize },
    /// The core refused it.
    Rejected(Rejection),
    /// What went wrong at the last engine that was tried.
    Failed(Failure),
    /// No such path.
    NoRoute,
    /// The caller has no valid token.
    Unauthorized,
    /// There are too many headers, or they are too long.
    HeadersTooLarge,
}

impl Refusal {
    pub(crate) const fn status(self) -> u16 {
        match self {
            Refusal::BadJson { .. } | Refusal::BrokenBody => 400,
            Refusal::SlowBody => 408,
            Refusal::TooLarge { .. } => 413,
            Refusal::Rejected(rejection) => rejection.status(),
            Refusal::Failed(failure) => failed(failure).0,
            Refusal::NoRoute => 404,
            Refusal::Unauthorized => 401,
            Refusal::HeadersTooLarge => 431,
        }
    }

    /// What spans say of it, where the HTTP status does not say it all.
    pub(crate) const fn failure(self) -> Option<Failure> {
        match self {
            Refusal::Failed(failure) => Some(failure),
            Refusal::Rejected(Rejection::Unreachable) => Some(Failure::Connect),
            Refusal::Rejected(
                Rejection::Saturated
                | Rejection::QueueFull
                | Rejection::TtlExpired
                | Rejection::NoEndpointsInTime
                | Rejection::Cancelled
                | Rejection::NoEndpoints
                | Rejection::UnknownModel
                | Rejection::ShuttingDown,
            )
            | Refusal::BadJson { .. }
            | Refusal::BrokenBody
            | Refusal::SlowBody
            | Refusal::TooLarge { .. }
            | Refusal::NoRoute
            | Refusal::Unauthorized
            | Refusal::HeadersTooLarge => None,
        }
    }

    fn text(self, model: &str) -> (&'static str, String, Option<&'static str>) {
        match self {
            Refusal::BadJson { line, column } => {
                let message = format!("The body is no JSON object: error at line {line}, column {column}.");
                ("BadRequestError", message, None)
            }
            Refusal::BrokenBody => ("BadRequestError", "The body is incomplete.".to_owned(), None),
            Refusal::SlowBody => ("RequestTimeoutError", "The body did not come in time.".to_owned(), None),
            Refusal::TooLarge { limit } => {
                ("RequestEntityTooLargeError", format!("The body is larger than {limit} bytes."), None)
            }
            Refusal::Rejected(rejection) => rejected(rejection, model),
            Refusal::Failed(failure) => {
                let (_, kind, message) = failed(failure);
                (kind, message.to_owned(), None)
            }
            Refusal::NoRoute => ("NotFoundError", "There is nothing at this path.".to_owned(), None),
            Refusal::Unauthorized => ("AuthenticationError", "A valid bearer token is needed.".to_owned(), None),
            Refusal::HeadersTooLarge => (
                "RequestHeaderFieldsTooLargeError",
                "There are too many headers, or they are too long.".to_owned(),
                None,
            ),
        }
    }

    /// The answer.
    pub(crate) fn response(self, model: &str) -> Response {
        let (kind, message, param) = self.text(model);
        let body = ErrorBody::new(self.status(), kind, message, param).to_json();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self == Refusal::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Refusal::Rejected(rejection) = self
            && let Some(reason) = rejection.dropped()
        {
            headers.insert(DROPPED_REASON, HeaderValue::from_static(reason));
        }
        response
    }
}

/// Status, type and message where engines failed.
const fn failed(failure: Failure) -> (u16, &'static str, &'static str) {
    match failure {
        Failure::Connect => (502, "BadGatewayError", "The engine could not be reached."),
        Failure::Timeout => (504, "GatewayTimeoutError", "The engine did not answer in time."),
        Failure::Reset | Failure::Status(_) | Failure::Outrun | Failure::Cancelled | Failure::Abandoned => {
            (502, "BadGatewayError", "The engine broke off before it answered.")
        }
    }
}

fn rejected(rejection: Rejection, model: &str) -> (&'static str, String, Option<&'static str>) {
    match rejection {
        Rejection::Saturated => {
            ("TooManyRequestsError", "The pool is saturated and the request may be shed.".to_owned(), None)
        }
        Rejection::QueueFull => ("TooManyRequestsError", "The gateway's queue is full.".to_owned(), None),
        Rejection::TtlExpired => {
            ("TooManyRequestsError", "The request waited for a saturated pool as long as it may.".to_owned(), None)
        }
        Rejection::NoEndpointsInTime => {
            let message = "The request waited as long as it may, and no endpoint is available.".to_owned();
            ("ServiceUnavailableError", message, None)
        }
        Rejection::Cancelled => ("ServiceUnavailableError", "The caller gave the request up.".to_owned(), None),
        Rejection::NoEndpoints => ("ServiceUnavailableError", "No endpoint is available.".to_owned(), None),
        Rejection::UnknownModel => ("NotFoundError", format!("The model `{model}` does not exist."), Some("model")),
        Rejection::Unreachable => ("BadGatewayError", "The engine could not be reached.".to_owned(), None),
        Rejection::ShuttingDown => ("ServiceUnavailableError", "The gateway is shutting down.".to_owned(), None),
    }
}

/// How often an engine of ours preempted a request that may be kept for that: in the head of its answer or in its trailers.
pub(crate) const PREEMPTIONS: HeaderName = HeaderName::from_static(shared::trace::verdict::PREEMPTIONS);

/// Headers of one connection, which a proxy does not pass on (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The headers that travel on.
pub(crate) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let mut out = HeaderMap::with_capacity(headers.len() + 4);
    for (name, value) in headers {
        if !HOP_BY_HOP.contains(&name.as_str()) && !named.contains(name) {
            out.append(name.clone(), value.clone());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_a_connection_do_not_travel() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Hop"),
            ("x-hop", "1"),
            ("te", "trailers"),
            ("baggage", "a=b"),
            ("baggage", "c=d"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let out = end_to_end(&headers);
        assert_eq!(out.len(), 2);
        assert_eq!(out.get_all("baggage").iter().count(), 2);
    }
}
