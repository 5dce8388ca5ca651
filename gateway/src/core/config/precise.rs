//! The index of KV events.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::{at_least, problem};
use crate::core::kv_index::events::Tier;
use crate::core::prefix_index::{MAX_BLOCK_TOKENS, PrefixHasher};

/// The index of the blocks that engines say they hold (llm-d's `precise-prefix-cache-producer`). It is kept where a plugin reads it:
/// `precise-prefix-cache-scorer`, or one whose `prefixMatchInfoProducerName` is `precise-prefix-cache-producer`. Engines have to
/// publish KV events for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreciseConfig {
    /// Tokens in a block; must be the engines' own.
    #[schemars(range(min = 1, max = 256))]
    pub block_tokens: u32,
    /// Longest part of a prompt that is matched, in tokens.
    pub max_prefix_tokens: u32,
    /// Blocks that are remembered; further ones are not.
    pub max_blocks: u32,
    /// Endpoints that are remembered for each block, the newest ones.
    pub max_endpoints_per_block: u32,
    /// What a block counts for in the memory of a GPU.
    pub gpu_weight: f64,
    /// What a block counts for in the memory of a host.
    pub cpu_weight: f64,
    /// Whether the blocks of a request are expected where it was sent, until events say so.
    pub speculative: bool,
    /// For how long.
    pub speculative_ttl: HumanDur,
    /// Live: the port at which an engine publishes, if it does not say so itself (`GET /kv_event_sources`).
    pub events_port: u16,
    /// Live: topics begin with this.
    pub topic_filter: String,
    /// Live: URL of a kv-cache-manager that keeps the index instead of the gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manager: Option<String>,
    /// How long the gateway waits for its answer; then it decides without.
    pub manager_timeout: HumanDur,
}

impl Default for PreciseConfig {
    /// llm-d's `precise-prefix-cache-producer`; the bound of a prompt is that of its approximate one, and the time limit of the
    /// manager is its own for a producer.
    fn default() -> PreciseConfig {
        PreciseConfig {
            block_tokens: 16,
            max_prefix_tokens: 131_072,
            max_blocks: 100_000_000,
            max_endpoints_per_block: 10,
            gpu_weight: 1.0,
            cpu_weight: 0.8,
            speculative: false,
            speculative_ttl: HumanDur::secs(2),
            events_port: 5557,
            topic_filter: "kv@".to_owned(),
            manager: None,
            manager_timeout: HumanDur::millis(400),
        }
    }
}

impl PreciseConfig {
    /// Names the blocks of prompts to `model`; `salt` separates caches.
    pub fn hasher(&self, model: &str, salt: Option<&str>) -> PrefixHasher {
        PrefixHasher::with_blocks(model, salt, self.max_prefix_tokens, self.block_tokens)
    }

    /// What a block counts for in a tier.
    pub const fn weight(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Gpu => self.gpu_weight,
            Tier::Cpu => self.cpu_weight,
        }
    }

    /// Whether it says no more than where the index and its events are: what llm-d's files do not say, and may stand beside one.
    pub(super) fn is_where_only(&self, default: &PreciseConfig) -> bool {
        let PreciseConfig { manager, manager_timeout, .. } = self;
        *self == PreciseConfig { manager: manager.clone(), manager_timeout: *manager_timeout, ..default.clone() }
    }

    pub(super) fn validate(&self, p: &mut Vec<ConfigProblem>) {
        if !(1..=MAX_BLOCK_TOKENS).contains(&(self.block_tokens as usize)) {
            let allowed = format!("a number from 1 to {MAX_BLOCK_TOKENS}");
            problem("precise_prefix.block_tokens", self.block_tokens, allowed, p);
        }
        at_least("precise_prefix.max_prefix_tokens", self.max_prefix_tokens, 1, p);
        at_least("precise_prefix.max_blocks", self.max_blocks, 1, p);
        at_least("precise_prefix.max_endpoints_per_block", self.max_endpoints_per_block, 1, p);
        for (path, weight) in
            [("precise_prefix.gpu_weight", self.gpu_weight), ("precise_prefix.cpu_weight", self.cpu_weight)]
        {
            if !(0.0..=1.0).contains(&weight) {
                problem(path, weight, "a number from 0 to 1".to_owned(), p);
            }
        }
        at_least("precise_prefix.speculative_ttl", self.speculative_ttl, HumanDur::millis(1), p);
        at_least("precise_prefix.manager_timeout", self.manager_timeout, HumanDur::millis(1), p);
        if let Some(url) = &self.manager {
            let host = url.strip_prefix("http://").filter(|host| !host.is_empty());
            if host.is_none() {
                let allowed = "an address such as http://127.0.0.1:8200".to_owned();
                problem("precise_prefix.manager", format!("{url:?}"), allowed, p);
            }
        }
    }
}
