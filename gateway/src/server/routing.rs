//! The headers by which caller, gateway and engine talk about where a request goes: sessions, a caller's selection of endpoints, the
//! endpoint that prefills.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use crate::core::config::GatewayConfig;
use crate::core::scheduler::scorers::SessionStrategy;
use crate::server::backend::Backend;

/// Tells the engine that decodes who prefills (llm-d `pkg/common/routing`).
pub(crate) const PREFILLER: HeaderName = HeaderName::from_static("x-prefiller-host-port");
/// The session, unless a scorer reads it elsewhere.
const SESSION_ID: HeaderName = HeaderName::from_static("x-session-id");
/// Endpoints that a caller allows.
const SELECTION: HeaderName = HeaderName::from_static("test-epp-endpoint-selection");
const SELECTION_FILTER: &str = "header-based-testing-filter";
/// Longer tokens name no endpoint.
const MAX_TOKEN: usize = 512;

/// What the scheduler wants to know of headers, and what it says in them.
#[derive(Debug)]
pub(crate) struct Routing {
    session_ids: Vec<HeaderName>,
    /// The header of session tokens.
    session_tokens: Option<HeaderName>,
    namespace: String,
    selection: bool,
    /// The header that names users, where spans do.
    user: Option<HeaderName>,
}

/// What headers say of an endpoint.
#[derive(Debug)]
pub(crate) struct Labels {
    /// `host:port`.
    address: Option<HeaderValue>,
    /// The token of sessions that are bound to it.
    session_token: HeaderValue,
}

impl Routing {
    /// What a gateway of this configuration reads and writes.
    pub(crate) fn new(config: &GatewayConfig) -> Routing {
        let (mut session_ids, mut session_tokens) = (vec![SESSION_ID], None);
        match config.sessions() {
            None => {}
            Some(SessionStrategy::SessionId { headers, .. }) => {
                session_ids = headers.iter().filter_map(|h| h.parse().ok()).collect();
            }
            Some(SessionStrategy::EncodedEndpointHeader { header }) => {
                session_tokens = header.parse().ok();
            }
        }
        Routing {
            session_ids,
            session_tokens,
            namespace: config.pool.namespace.clone(),
            user: config.user_header.as_ref().and_then(|h| h.parse().ok()),
            selection: config.profiles().flat_map(|p| &p.filters).any(|f| f.kind == SELECTION_FILTER),
        }
    }

    /// What headers say of this endpoint.
    pub(crate) fn labels(&self, backend: &Backend) -> Labels {
        let config = &backend.config;
        let address = HeaderValue::from_str(&format!("{}:{}", config.address, config.port)).ok();
        Labels { address, session_token: token(&self.namespace, &config.name) }
    }

    /// The caller's session id: of the first header that has one.
    pub(crate) fn session_id<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        let ids = self.session_ids.iter().filter_map(|name| headers.get(name)?.to_str().ok());
        ids.map(str::trim).find(|id| !id.is_empty())
    }

    /// The caller's user, where spans name it.
    pub(crate) fn user_id<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        let id = headers.get(self.user.as_ref()?)?.to_str().ok()?.trim();
        (!id.is_empty()).then_some(id)
    }

    /// The endpoint that the caller's session token names, as `namespace/name`.
    pub(crate) fn session_endpoint(&self, headers: &HeaderMap) -> Option<String> {
        let name = self.session_tokens.as_ref()?;
        let token = headers.get(name)?.as_bytes();
        if token.len() > MAX_TOKEN {
            return None;
        }
        String::from_utf8(STANDARD.decode(token).ok()?).ok()
    }

    /// The endpoints that the caller allows, where a filter looks at that.
    pub(crate) fn selection<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        if self.selection { headers.get(SELECTION)?.to_str().ok() } else { None }
    }

    /// Says on the way to the engine who prefills. Only the gateway says that.
    pub(crate) fn set_prefiller(headers: &mut HeaderMap, prefill: Option<&Labels>) {
        match prefill.and_then(|labels| labels.address.clone()) {
            Some(address) => headers.insert(PREFILLER, address),
            None => headers.remove(PREFILLER),
        };
    }

    /// Gives the caller the token of its endpoint.
    pub(crate) fn set_session_token(&self, headers: &mut HeaderMap, endpoint: &Labels) {
        if let Some(name) = &self.session_tokens {
            headers.insert(name, endpoint.session_token.clone());
        }
    }
}

/// The token of an endpoint: its name and namespace in base64, as llm-d writes it.
fn token(namespace: &str, name: &str) -> HeaderValue {
    let text = STANDARD.encode(format!("{namespace}/{name}"));
    HeaderValue::from_str(&text).expect("base64 is a header value")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::config::{Parameters, PluginConfig, ScorerConfig};

    fn routing(change: impl FnOnce(&mut GatewayConfig)) -> Routing {
        let mut config = GatewayConfig::default();
        change(&mut config);
        Routing::new(&config)
    }

    fn labels(routing: &Routing, name: &str) -> Labels {
        routing.labels(&Backend::new(name, "http://10.0.0.1:8000").unwrap())
    }

    fn sessions(parameters: serde_json::Value) -> Routing {
        let parameters: Parameters = serde_json::from_value(parameters).unwrap();
        let scorer = ScorerConfig { parameters, ..ScorerConfig::of("session-affinity-scorer", 1.0) };
        routing(|c| c.profile.scorers.push(scorer))
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_str(v).unwrap())).collect()
    }

    #[test]
    fn tokens_name_endpoints() {
        let routing = sessions(json!({}));
        let mut answer = HeaderMap::new();
        routing.set_session_token(&mut answer, &labels(&routing, "b"));
        // "default/b"
        assert_eq!(answer.get("x-session-token").unwrap(), "ZGVmYXVsdC9i");
        assert_eq!(routing.session_endpoint(&answer).as_deref(), Some("default/b"));
        assert_eq!(routing.session_endpoint(&headers(&[("x-session-token", "?")])), None);
        assert_eq!(routing.session_endpoint(&HeaderMap::new()), None);
    }

    #[test]
    fn ids_are_read_from_the_headers_that_are_configured() {
        let given = headers(&[("x-session-id", "s"), ("x-user", " u ")]);
        assert_eq!(routing(|_| {}).session_id(&given), Some("s"));
        let sources = json!([{"header": "X-Empty"}, {"header": "X-User"}]);
        let routing = sessions(json!({"strategy": "session_id", "sessionIdConfig": {"sources": sources}}));
        assert_eq!(routing.session_id(&given), Some("u"));
        let mut answer = HeaderMap::new();
        routing.set_session_token(&mut answer, &labels(&routing, "a"));
        assert!(answer.is_empty());
    }

    #[test]
    fn a_selection_is_read_only_for_the_filter() {
        let given = headers(&[("test-epp-endpoint-selection", "10.0.0.1")]);
        assert_eq!(routing(|_| {}).selection(&given), None);
        let with = routing(|c| c.profile.filters.push(PluginConfig::of("header-based-testing-filter")));
        assert_eq!(with.selection(&given), Some("10.0.0.1"));
    }

    #[test]
    fn only_the_gateway_names_a_prefiller() {
        let routing = routing(|_| {});
        let mut sent = headers(&[("x-prefiller-host-port", "evil:1")]);
        Routing::set_prefiller(&mut sent, None);
        assert!(sent.is_empty());
        Routing::set_prefiller(&mut sent, Some(&labels(&routing, "a")));
        assert_eq!(sent.get(PREFILLER).unwrap(), "10.0.0.1:8000");
    }
}
