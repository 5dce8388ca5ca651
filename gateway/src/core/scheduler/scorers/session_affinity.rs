//! `session-affinity-scorer`: 1 for the endpoint that the session is bound to, else 0.
//!
//! `strategy: encoded_endpoint_header` (the default) binds by a token that the gateway hands out in a response header and the caller
//! sends back; `strategy: session_id` by an id of the caller's, remembered for `evictionTtlSeconds`.

use serde_json::Value;
use shared::time::Dur;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers the session's endpoint.
#[derive(Debug)]
pub struct SessionAffinity;

/// How a session is told, and how long it is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionStrategy {
    /// By a token in this header, which names the endpoint.
    EncodedEndpointHeader {
        /// The header, in lower case.
        header: String,
    },
    /// By an id in the first of these headers that is there.
    SessionId {
        /// The headers, in lower case.
        headers: Vec<String>,
        /// How long a binding lasts unused.
        ttl: Dur,
    },
}

const TOKEN_HEADER: &str = "x-session-token";
const ID_HEADER: &str = "x-session-id";
const TTL_SECONDS: f64 = 300.0;
/// Longer than any session.
const MAX_TTL_SECONDS: f64 = 1e9;
const SOURCES: &str = "a list of {header: NAME}; attributes of requests are not supported";

impl SessionAffinity {
    /// From the parameters of llm-d; the strategy is the producer's.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<SessionAffinity, PluginError> {
        SessionAffinity::strategy(p).map(|_| SessionAffinity)
    }

    /// The strategy.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn strategy(p: &mut Reader<'_>) -> Result<SessionStrategy, PluginError> {
        if !p.text("profileName")?.is_empty() {
            return Err(p.refuse("profileName", "nothing: a session is bound to the endpoint that decodes"));
        }
        let word = p.word("strategy", "encoded_endpoint_header", &["encoded_endpoint_header", "session_id"])?;
        let (by_id, by_token) = (session_id(p)?, encoded_endpoint(p)?);
        Ok(if word == "session_id" { by_id } else { by_token })
    }
}

fn session_id(p: &mut Reader<'_>) -> Result<SessionStrategy, PluginError> {
    p.nested("sessionIdConfig", |p| {
        let sources = p.list("sources", SOURCES)?;
        let headers: Option<Vec<String>> = sources.iter().map(header).collect();
        let mut headers = headers.ok_or_else(|| p.refuse("sources", SOURCES))?;
        if headers.is_empty() {
            headers.push(ID_HEADER.to_owned());
        }
        let seconds = p.number("evictionTtlSeconds", TTL_SECONDS, 0.0, MAX_TTL_SECONDS)?;
        p.number("evictionSweepSeconds", 10.0, 0.0, MAX_TTL_SECONDS)?;
        let seconds = if seconds == 0.0 { TTL_SECONDS } else { seconds };
        Ok(SessionStrategy::SessionId { headers, ttl: Dur::from_nanos((seconds * 1e9) as u64) })
    })
}

fn encoded_endpoint(p: &mut Reader<'_>) -> Result<SessionStrategy, PluginError> {
    p.nested("encodedEndpointHeaderConfig", |p| {
        let given = p.text("header")?;
        let header = if given.trim().is_empty() { TOKEN_HEADER } else { given.trim() };
        if !is_header(header) {
            return Err(p.refuse("header", "the name of a header"));
        }
        Ok(SessionStrategy::EncodedEndpointHeader { header: header.to_ascii_lowercase() })
    })
}

fn header(source: &Value) -> Option<String> {
    let fields = source.as_object().filter(|f| f.len() == 1)?;
    let name = fields.get("header")?.as_str()?.trim();
    is_header(name).then(|| name.to_ascii_lowercase())
}

fn is_header(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

impl Scorer for SessionAffinity {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = f64::from(u8::from(c.had_session));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn the_bound_endpoint_gets_all() {
        let pool = Pool::default();
        check(&SessionAffinity, &view(&pool), candidates(3, |i, c| c.had_session = i == 1), [0.0, 1.0, 0.0]);
    }

    #[test]
    fn strategies_are_read_with_llm_ds_defaults() {
        let check = |parameters: Value, expect: SessionStrategy| {
            assert_eq!(read(parameters.clone(), SessionAffinity::strategy).unwrap(), expect, "{parameters}");
        };
        let token = |header: &str| SessionStrategy::EncodedEndpointHeader { header: header.to_owned() };
        let id = |header: &str, seconds| SessionStrategy::SessionId {
            headers: vec![header.to_owned()],
            ttl: Dur::from_secs(seconds),
        };
        check(json!({}), token("x-session-token"));
        check(json!({"encodedEndpointHeaderConfig": {"header": "X-Pod"}}), token("x-pod"));
        check(json!({"strategy": "session_id"}), id("x-session-id", 300));
        let config = json!({"sources": [{"header": "X-User"}], "evictionTtlSeconds": 60});
        check(json!({"strategy": "session_id", "sessionIdConfig": config}), id("x-user", 60));
    }

    #[test]
    fn what_is_not_built_is_refused() {
        for bad in [
            json!({"strategy": "cookie"}),
            json!({"profileName": "prefill"}),
            json!({"sessionIdConfig": {"sources": [{"attribute": "agent-identity"}]}}),
            json!({"sessionIdConfig": {"source": []}}),
        ] {
            assert!(read(bad.clone(), SessionAffinity::read).is_err(), "{bad}");
        }
    }
}
