//! Which of several pools gets a request, and which one an endpoint belongs to: what the rules of an HTTPRoute and the selectors of
//! InferencePools say (Gateway API inference extension). Each pool decides for itself; they share nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::rng::{Seed, mix64};

use crate::core::config::{GatewayConfig, PoolEntry};

/// A pool, by its place in the configuration; ids are dense.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

impl PoolId {
    /// Its place.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The seed of its draws: the gateway's own for the first pool, so that a single one draws as it would without a table.
    pub fn seed(self, gateway: Seed) -> Seed {
        if self.0 == 0 { gateway } else { Seed(mix64(gateway.0 ^ u64::from(self.0))) }
    }
}

/// The rules between pools.
#[derive(Clone, Debug, Default)]
pub struct PoolTable {
    /// Empty if there is a single pool, which gets everything.
    pools: Vec<PoolEntry>,
    models: FxHashMap<Arc<str>, PoolId>,
    default: Option<PoolId>,
}

impl PoolTable {
    /// The rules of a valid configuration.
    pub fn new(config: &GatewayConfig) -> PoolTable {
        let mut table = PoolTable { pools: config.pools.clone(), ..PoolTable::default() };
        for (pool, id) in config.pools.iter().zip((0..).map(PoolId)) {
            table.models.extend(pool.models.iter().map(|model| (model.as_str().into(), id)));
            if pool.default {
                table.default = Some(id);
            }
        }
        table
    }

    /// The pool of requests for `model`; `None` if no pool has it. A single pool has every model, as far as its endpoints serve it.
    pub fn of_model(&self, model: &str) -> Option<PoolId> {
        if self.pools.is_empty() {
            return Some(PoolId(0));
        }
        self.models.get(model).copied().or(self.default)
    }

    /// The pool of endpoints with these labels; `None` if no pool selects them.
    pub fn of_labels(&self, labels: &BTreeMap<String, String>) -> Option<PoolId> {
        if self.pools.is_empty() {
            return Some(PoolId(0));
        }
        self.pools.iter().zip((0..).map(PoolId)).find(|(pool, _)| pool.selects(labels)).map(|(_, id)| id)
    }

    /// The pool of requests that name no model: the default one, else the first.
    pub fn of_nothing(&self) -> PoolId {
        self.default.unwrap_or_default()
    }

    /// The first model that a pool lists.
    pub fn first_model(&self, pool: PoolId) -> Option<&str> {
        self.pools.get(pool.index())?.models.first().map(String::as_str)
    }

    /// Whether there are several pools, or one that is told which models it has.
    pub fn is_split(&self) -> bool {
        !self.pools.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(default: bool) -> PoolTable {
        let pools = serde_json::json!({"pools": [
            {"name": "small", "models": ["s", "adapter"], "selector": {"size": "small"}},
            {"name": "large", "models": ["l"], "selector": {"size": "large"}, "default": default},
        ]});
        PoolTable::new(&serde_json::from_value(pools).unwrap())
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_request_goes_where_its_model_is() {
        let (small, large) = (Some(PoolId(0)), Some(PoolId(1)));
        let with = table(true);
        assert_eq!(["s", "adapter", "l", "x"].map(|m| with.of_model(m)), [small, small, large, large]);
        assert_eq!((with.of_nothing(), with.first_model(PoolId(1))), (PoolId(1), Some("l")));
        let without = table(false);
        assert_eq!(["s", "l", "x", ""].map(|m| without.of_model(m)), [small, large, None, None]);
        assert_eq!(without.of_nothing(), PoolId(0));
    }

    #[test]
    fn an_endpoint_belongs_to_the_first_pool_that_selects_it() {
        let table = table(true);
        assert_eq!(table.of_labels(&labels(&[("size", "large"), ("zone", "a")])), Some(PoolId(1)));
        assert_eq!(table.of_labels(&labels(&[("size", "medium")])), None);
        assert_eq!(table.of_labels(&labels(&[])), None);
    }

    #[test]
    fn a_single_pool_has_everything() {
        let table = PoolTable::new(&GatewayConfig::default());
        assert_eq!((table.of_model("x"), table.of_labels(&labels(&[]))), (Some(PoolId(0)), Some(PoolId(0))));
        assert!(!table.is_split());
    }
}
