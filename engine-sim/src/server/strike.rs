//! Faults of single requests at the server: what a request asks for by header, and how one is refused.

use axum::http::{HeaderMap, StatusCode};
use shared::time::Time;
use shared::trace::Trail;

use super::App;
use super::api::ApiError;
use super::condition::Doomed;
use crate::core::engine::RequestKey;
use crate::core::facts::EngineFact;
use crate::core::faults::{RequestFault, http_error_type};

/// The header by which a request asks for a fault of its own: `http_error=503` or `cut_stream=5` (tokens).
const FAULT: &str = "x-igsim-fault";
/// llm-d-inference-sim's header: the HTTP status to answer with.
const RETURN_ERROR: &str = "x-return-error";

/// Asks which fault strikes a request that is about to be handed to the engine.
///
/// # Errors
/// The answer of a request that is refused.
pub(super) fn strike(
    app: &App,
    headers: &HeaderMap,
    key: RequestKey,
    trail: &Trail<EngineFact>,
    now: Time,
) -> Result<Option<Doomed>, ApiError> {
    if !app.faulty {
        return Ok(None);
    }
    let (fault, doomed) = app.engine.strike(now, key, asked_for(headers));
    match fault {
        Some(fault @ RequestFault::Status(status)) => {
            trail.note(now, || EngineFact::Fault(fault.kind()));
            trail.note(now, || EngineFact::Failed { error_type: http_error_type(status), http_status: status });
            Err(refusal(status))
        }
        Some(RequestFault::Cut { .. }) | None => Ok(doomed),
    }
}

/// The fault a request asks for; whether that is allowed the engine knows. What cannot be read asks for nothing.
fn asked_for(headers: &HeaderMap) -> Option<RequestFault> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let status = |text: &str| text.trim().parse().ok().filter(|s| (400..600).contains(s)).map(RequestFault::Status);
    if let Some(found) = text(RETURN_ERROR).and_then(status) {
        return Some(found);
    }
    let (kind, value) = text(FAULT)?.split_once('=')?;
    match kind.trim() {
        "http_error" => status(value),
        "cut_stream" => Some(RequestFault::Cut { after_tokens: value.trim().parse().ok()? }),
        _ => None,
    }
}

/// The answer with this status in vLLM's words, where it has some; otherwise as its handler of HTTP exceptions answers.
pub(super) fn refusal(status: u16) -> ApiError {
    let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let phrase = code.canonical_reason().unwrap_or("Error");
    let busy = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.";
    match code {
        StatusCode::INTERNAL_SERVER_ERROR => ApiError::new(code, "InternalServerError", "Internal server error", None),
        StatusCode::SERVICE_UNAVAILABLE => ApiError::new(code, "Service Unavailable", busy, None),
        _ => ApiError::new(code, phrase, phrase, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_ask_for_faults() {
        let check = |name: &'static str, value: &'static str, expect: Option<RequestFault>| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            assert_eq!(asked_for(&headers), expect, "{name}: {value}");
        };
        check("x-return-error", "429", Some(RequestFault::Status(429)));
        check("x-return-error", "200", None);
        check("x-return-error", "none", None);
        check("x-igsim-fault", "http_error=503", Some(RequestFault::Status(503)));
        check("x-igsim-fault", "cut_stream = 5", Some(RequestFault::Cut { after_tokens: 5 }));
        check("x-igsim-fault", "cut_stream=-1", None);
        check("x-igsim-fault", "crash", None);
        check("x-other", "429", None);
    }

    #[test]
    fn refusals_have_vllms_form() {
        let check = |status, kind: &str, message: &str| {
            let error = refusal(status);
            assert_eq!((error.status.as_u16(), &*error.body.error.kind), (status, kind));
            assert!(error.body.error.message.starts_with(message), "{:?}", error.body.error.message);
        };
        check(429, "Too Many Requests", "Too Many Requests");
        check(500, "InternalServerError", "Internal server error");
        check(502, "Bad Gateway", "Bad Gateway");
        check(503, "Service Unavailable", "The engine is currently busy");
        check(599, "Error", "Error");
    }
}
