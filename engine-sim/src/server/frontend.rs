//! Options of vLLM's API server (`vllm/entrypoints/common/cli_args.py`) and what follows from them.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use shared::time::Dur;

use super::VLLM_VERSION;
use crate::core::config::EngineConfig;
use crate::core::latency::LatencyProfile;

/// What a server does differently from vLLM's defaults; all off by default.
#[derive(Clone, Debug, Default)]
pub struct Frontend {
    /// Further names of the served model.
    pub aliases: Vec<Arc<str>>,
    /// Keys, one of which a caller must have (`--api-key`).
    pub api_keys: ApiKeys,
    /// Whether there are endpoints to pause, sleep, reset and abort (`VLLM_SERVER_DEV_MODE`).
    pub dev_mode: bool,
    /// Whether adapters can be loaded and unloaded (`VLLM_ALLOW_RUNTIME_LORA_UPDATING`).
    pub runtime_lora: bool,
    /// Whether answers carry `X-Request-Id` (`--enable-request-id-headers`).
    pub request_id_headers: bool,
    /// Whether answers carry the times of the request (`--enable-per-request-metrics`).
    pub per_request_metrics: bool,
    /// Whether every stream tells its usage all the time (`--enable-force-include-usage`).
    pub force_include_usage: bool,
    /// Whether `/load` counts (`--enable-server-load-tracking`).
    pub server_load_tracking: bool,
    /// Whether a line at level info is logged for every request for a generation.
    pub access_log: bool,
    /// After how long without an event a stream gets a comment (`--sse-keep-alive-interval`); never when absent.
    pub sse_keep_alive: Option<Dur>,
}

/// Keys as digests: the keys themselves are not kept.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// Keys; empty ones are none.
    pub fn new<'k>(keys: impl IntoIterator<Item = &'k str>) -> ApiKeys {
        ApiKeys(keys.into_iter().filter(|k| !k.is_empty()).map(|k| Sha256::digest(k).into()).collect())
    }

    /// Whether there are none, so that everybody may call.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a value of `Authorization` holds one of them. How long that takes says nothing about the keys.
    pub fn allow(&self, authorization: &[u8]) -> bool {
        let split = authorization.iter().position(|b| *b == b' ').unwrap_or(authorization.len());
        let (scheme, key) = authorization.split_at(split);
        let key: [u8; 32] = Sha256::digest(key.get(1..).unwrap_or_default()).into();
        let equal = |own: &[u8; 32]| own.iter().zip(&key).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0;
        scheme.eq_ignore_ascii_case(b"bearer") & self.0.iter().fold(false, |any, own| any | equal(own))
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

/// `system_fingerprint`: version, degree of parallelism and a hash of the configuration, as vLLM's mode `full` has it.
pub(super) fn fingerprint(config: &EngineConfig, model: &str) -> Arc<str> {
    let text = serde_json::to_string(config).expect("a configuration serialises");
    let hash = Sha256::new().chain_update(text).chain_update(model).finalize();
    let short: String = hash[..4].iter().map(|b| format!("{b:02x}")).collect();
    let parallel = LatencyProfile::named(&config.profile).map_or(1, |p| p.tensor_parallel);
    let parallel = if parallel > 1 { format!("-tp{parallel}") } else { String::new() };
    format!("vllm-{VLLM_VERSION}{parallel}-{short}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_the_keys_opens() {
        let keys = ApiKeys::new(["", "one", "two"]);
        let check = |value: &str, expect: bool| assert_eq!(keys.allow(value.as_bytes()), expect, "{value}");
        check("Bearer one", true);
        check("bearer two", true);
        for wrong in ["", "Bearer", "Bearer ", "Bearer three", "Basic one", "one", "Bearer one ", "Bearer  one"] {
            check(wrong, false);
        }
        assert!(ApiKeys::new([""]).is_empty());
        assert_eq!(format!("{keys:?}"), "2 keys");
    }
}
