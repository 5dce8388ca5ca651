//! Models and pools: who asks for what, and whether the engines that are to answer have it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gateway::core::pool::Role;
use gateway::core::pools::{PoolId, PoolTable};
use shared::config::Problems;

use super::Scenario;
use super::fleet::EngineGroup;

/// A model that requests are sent to, and what says so.
type Wanted = BTreeMap<String, &'static str>;

impl Scenario {
    /// The models that requests are sent to: what tenants or the workload ask for, after it is rewritten.
    fn wanted(&self) -> Wanted {
        let tenants = &self.workload.tenants;
        let mut asked: Vec<(String, &'static str)> =
            tenants.iter().filter_map(|t| Some((t.model.clone()?, "the model of a tenant"))).collect();
        if tenants.is_empty() || tenants.iter().any(|t| t.model.is_none()) {
            let named = self.workload.model.is_some();
            asked.push((self.model(), if named { "workload.model model" } else { "the first group's model" }));
        }
        let mut wanted = Wanted::new();
        for (model, source) in asked {
            match self.gateway.model_rewrites.get(&model) {
                None => _ = wanted.insert(model, source),
                Some(targets) => {
                    let targets = targets.iter().map(|t| (t.model.clone(), "a target of gateway.model_rewrites"));
                    wanted.extend(targets);
                }
            }
        }
        wanted
    }

    /// Every engine serves every model that may be asked of it. What no pool has is answered with 404.
    pub(super) fn check_models(&self, p: &mut Problems) {
        let (wanted, table) = (self.wanted(), PoolTable::new(&self.gateway));
        let mut used: BTreeSet<PoolId> = BTreeSet::new();
        for (i, group) in self.engines.iter().enumerate() {
            let Some(pool) = table.of_labels(&group.endpoint_labels()) else {
                let found = format!("{:?}", group.endpoint_labels());
                p.add(&format!("engines[{i}].labels"), found, "labels that a pool of gateway.pools selects");
                continue;
            };
            used.insert(pool);
            let Some(own) = group.model_name() else { continue };
            let missing =
                wanted.iter().find(|(model, _)| self.is_asked_of(&table, pool, model) && !serves(group, model));
            if let Some((model, source)) = missing {
                p.add(&format!("engines[{i}].model"), format!("{own:?}"), format!("{model:?}, {source}"));
            }
        }
        if self.gateway.discovery.is_empty() {
            let pools = self.gateway.pools.iter().enumerate().filter(|(i, _)| !used.contains(&PoolId(*i as u32)));
            for (i, pool) in pools {
                let path = format!("gateway.pools[{i}].selector");
                p.add(&path, format!("{:?}, which selects no engine", pool.selector), "labels of engines");
            }
        }
        let decodes = self.engines.iter().any(|g| Role::of(&g.endpoint_labels()).decodes());
        p.check(decodes, "engines", "no engine that decodes", "an engine of role both or decode, or of none");
    }

    /// Whether requests for `model` go to `pool`, which is said to have it.
    fn is_asked_of(&self, table: &PoolTable, pool: PoolId, model: &str) -> bool {
        let listed =
            self.gateway.pools.is_empty() || self.gateway.pools.iter().any(|p| p.models.iter().any(|m| m == model));
        listed && table.of_model(model) == Some(pool)
    }

    /// The models that a gateway of several pools is told of an engine, which a live one learns from the engine. One with a single pool
    /// needs none: there is one model for all.
    pub(crate) fn models_of_endpoint(&self, group: &EngineGroup) -> Vec<Arc<str>> {
        if self.gateway.pools.is_empty() {
            return Vec::new();
        }
        let adapters = group.lora_modules.iter().map(|m| m.name.as_str().into());
        group.model_name().map(Arc::from).into_iter().chain(adapters).collect()
    }

    /// What KV events call the model of an engine, where that is not the one that all requests ask for.
    pub(crate) fn model_of_events(&self, group: &EngineGroup) -> Option<String> {
        if self.gateway.pools.is_empty() { None } else { group.model_name() }
    }
}

fn serves(group: &EngineGroup, model: &str) -> bool {
    group.model_name().is_some_and(|own| own == model) || group.lora_modules.iter().any(|m| m.name == model)
}
