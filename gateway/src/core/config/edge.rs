//! Who may call the gateway, what is believed of them, and how engines are spoken to. Read by the server; the core ignores it.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;

use super::problem;

/// What is made of the trace context that callers send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrustInbound {
    /// The caller's trace goes on, and its decision about sampling holds.
    Always,
    /// Every request begins a trace; the caller's is forgotten.
    Never,
    /// Every request begins a trace, with a link to the caller's span.
    Link,
}

/// Who may call paths below `/v1/`: whoever has one of the tokens, as `Authorization: Bearer TOKEN`. The header does not travel on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// A file of tokens, one in a line; empty lines and those that begin with # are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bearer_tokens_file: Option<PathBuf>,
    /// The name of an environment variable with tokens, separated by commas or white space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bearer_tokens_env: Option<String>,
}

/// TLS towards callers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate and those that vouch for it, PEM.
    pub cert_file: PathBuf,
    /// Its private key, PEM.
    pub key_file: PathBuf,
}

/// How engines are spoken to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamConfig {
    /// The protocol.
    pub http: UpstreamHttp,
    /// Certificates (PEM) that vouch for engines at `https` addresses, in place of the usual authorities of the web.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// A version of HTTP towards engines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamHttp {
    /// HTTP/1.1; at `https` addresses HTTP/2 where the engine prefers it.
    #[default]
    Http1,
    /// HTTP/2, at `http` addresses with prior knowledge: no engine is asked whether it speaks it.
    Http2,
}

impl AuthConfig {
    pub(super) fn validate(&self, out: &mut Vec<ConfigProblem>) {
        if self.bearer_tokens_file.is_none() && self.bearer_tokens_env.is_none() {
            problem("auth", "neither file nor variable", "bearer_tokens_file or bearer_tokens_env".to_owned(), out);
        }
    }
}
