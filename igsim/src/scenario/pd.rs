//! Routing sidecars: which engines have one, and what is wrong with one.

use gateway::pd_proxy::core::PdProxyConfig;
use shared::config::Problems;

use super::Scenario;
use super::fleet::{EngineGroup, Role};

impl Scenario {
    /// The sidecar in front of each engine of `group`: the one it asks for, else, behind a gateway that has others prefill, one with
    /// defaults for engines that decode and can read others' caches.
    pub fn pd_proxy_of(&self, group: &EngineGroup) -> Option<PdProxyConfig> {
        let reads = group.kv_transfer.as_ref().is_some_and(|kv| kv.kv_role.consumes());
        let wanted = reads && group.role == Some(Role::Decode) && self.gateway.disaggregates(&group.endpoint_labels());
        let config = group.pd_proxy.clone().or_else(|| wanted.then(PdProxyConfig::default))?;
        Some(PdProxyConfig { decode_under_prefill: self.nests_decode(), ..config })
    }

    pub(super) fn check_pd_proxy(&self, group: &EngineGroup, p: &mut Problems) {
        let Some(config) = &group.pd_proxy else { return };
        for found in config.validate() {
            p.add(&format!("pd_proxy.{}", found.path), found.found, found.allowed);
        }
        let decodes = group.role == Some(Role::Decode);
        p.check(decodes, "pd_proxy", "a sidecar of engines of another role", "role: decode beside it");
        // What a real server does with parameters is its own affair.
        let reads = group.url.is_some() || group.kv_transfer.as_ref().is_some_and(|kv| kv.kv_role.consumes());
        p.check(
            reads,
            "pd_proxy",
            "a sidecar of engines that read nobody's cache",
            "kv_transfer with kv_role: kv_consumer or kv_both beside it",
        );
        let asked = self.gateway.may_disaggregate(&group.endpoint_labels());
        p.check(
            asked,
            "pd_proxy",
            "a sidecar behind a gateway that has nobody else prefill",
            "gateway.disaggregation, or an epp_config with disagg-profile-handler",
        );
    }
}
