//! Several pools of engines behind one gateway: which requests and endpoints are whose, and what differs between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ConfigProblem, DisaggregationConfig, FlowControlConfig, GatewayConfig, InFlightConfig, PoolConfig, PreciseConfig,
    PrefixConfig, ProfileConfig, SaturationConfig, problem,
};

/// Pools of one gateway: metrics have a label for each.
const MAX_POOLS: usize = 64;

/// One of several pools. Sections that stand here hold in place of the gateway's own.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolEntry {
    /// Name of the pool, unique.
    pub name: String,
    /// Namespace of the pool; `default` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Models, or LoRA adapters, whose requests go to it, as the rules of an HTTPRoute say. Each belongs to one pool.
    pub models: Vec<String>,
    /// Whether requests for models that no pool lists go to it; without such a pool they are answered with 404.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
    /// Labels that its endpoints have (`matchLabels` of an InferencePool's selector); empty is all endpoints. An endpoint belongs to the
    /// first pool that selects it.
    pub selector: BTreeMap<String, String>,
    /// An EndpointPickerConfig of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epp_config: Option<PathBuf>,
    /// How an endpoint is chosen. With a profile of its own a pool has only a disaggregation of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileConfig>,
    /// Prefill by an endpoint of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disaggregation: Option<DisaggregationConfig>,
    /// When the pool is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saturation: Option<SaturationConfig>,
    /// Queues in the gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow_control: Option<FlowControlConfig>,
    /// The approximate index of prompt prefixes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<PrefixConfig>,
    /// The index of the blocks that engines say they hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precise_prefix: Option<PreciseConfig>,
    /// What counts as in flight at an endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<InFlightConfig>,
    /// Priorities of objectives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objectives: Option<BTreeMap<String, i32>>,
}

impl PoolEntry {
    /// The gateway's configuration `whole` as it is for this pool, which is then the only one.
    pub(crate) fn config(&self, whole: &GatewayConfig) -> GatewayConfig {
        fn own<T: Clone>(own: Option<&T>, place: &mut T) {
            if let Some(own) = own {
                place.clone_from(own);
            }
        }
        let pool = PoolConfig {
            name: self.name.clone(),
            namespace: self.namespace.clone().unwrap_or_else(|| PoolConfig::default().namespace),
        };
        let mut config = GatewayConfig { pool, pools: Vec::new(), ..whole.clone() };
        own(self.profile.as_ref(), &mut config.profile);
        config.disaggregation = self.disaggregation(whole).cloned();
        own(self.saturation.as_ref(), &mut config.saturation);
        if self.flow_control.is_some() {
            config.flow_control.clone_from(&self.flow_control);
        }
        own(self.prefix.as_ref(), &mut config.prefix);
        own(self.precise_prefix.as_ref(), &mut config.precise_prefix);
        own(self.in_flight.as_ref(), &mut config.in_flight);
        own(self.objectives.as_ref(), &mut config.objectives);
        config
    }

    /// Whether an endpoint with these labels belongs to it, unless it belongs to one before it.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector.iter().all(|(name, value)| labels.get(name) == Some(value))
    }

    fn disaggregation<'a>(&'a self, whole: &'a GatewayConfig) -> Option<&'a DisaggregationConfig> {
        let inherited = whole.disaggregation.as_ref().filter(|_| self.profile.is_none());
        self.disaggregation.as_ref().or(inherited)
    }

    /// The sections of its own, by name.
    fn sections(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("profile", self.profile.is_some()),
            ("disaggregation", self.disaggregation.is_some()),
            ("saturation", self.saturation.is_some()),
            ("flow_control", self.flow_control.is_some()),
            ("prefix", self.prefix.is_some()),
            ("precise_prefix", self.precise_prefix.is_some()),
            ("in_flight", self.in_flight.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name)
    }

    /// Puts what an EndpointPickerConfig said, which is in `read`, in place of its name.
    pub(crate) fn take(&mut self, read: GatewayConfig) {
        self.epp_config = None;
        self.profile = Some(read.profile);
        self.disaggregation = read.disaggregation;
        self.saturation = Some(read.saturation);
        self.flow_control = Some(read.flow_control.unwrap_or_default());
        self.prefix = Some(read.prefix);
        self.precise_prefix = Some(read.precise_prefix);
        self.in_flight = Some(read.in_flight);
    }
}

impl GatewayConfig {
    /// The configuration of each pool, in order; this one if it has a single pool.
    pub fn pool_configs(&self) -> Vec<GatewayConfig> {
        if self.pools.is_empty() {
            return vec![self.clone()];
        }
        self.pools.iter().map(|pool| pool.config(self)).collect()
    }

    /// Whether endpoints with these labels are in a pool that has others prefill.
    pub fn disaggregates(&self, labels: &BTreeMap<String, String>) -> bool {
        match self.pools.iter().find(|pool| pool.selects(labels)) {
            Some(pool) => pool.disaggregation(self).is_some(),
            None => self.disaggregation.is_some(),
        }
    }

    /// Whether a file that is not read yet may say that such endpoints are.
    pub fn may_disaggregate(&self, labels: &BTreeMap<String, String>) -> bool {
        let pool = self.pools.iter().find(|pool| pool.selects(labels));
        let unread = self.epp_config.is_some() || pool.is_some_and(|pool| pool.epp_config.is_some());
        unread || self.disaggregates(labels)
    }

    /// Has every pool ask a kv-cache-manager at `url`.
    pub fn ask_manager(&mut self, url: &str) {
        let own = self.pools.iter_mut().filter_map(|pool| pool.precise_prefix.as_mut());
        own.chain([&mut self.precise_prefix]).for_each(|precise| precise.manager = Some(url.to_owned()));
    }

    /// Has every pool keep its index itself.
    pub fn ask_nobody(&mut self) {
        let own = self.pools.iter_mut().filter_map(|pool| pool.precise_prefix.as_mut());
        own.chain([&mut self.precise_prefix]).for_each(|precise| precise.manager = None);
    }

    /// What the gateway writes into the body of a request with this objective, where it does: engines run the lowest priority first,
    /// llm-d the highest.
    pub fn priority_of_engines(&self, objective: Option<&str>) -> Option<i32> {
        let priority = objective.filter(|_| self.engine_priority).and_then(|o| self.objectives.get(o))?;
        Some(priority.saturating_neg())
    }

    pub(super) fn check_pools(&self, p: &mut Vec<ConfigProblem>) {
        if self.pools.is_empty() {
            return;
        }
        if self.pool != PoolConfig::default() {
            problem("pool", "a section beside pools", "one of the two".to_owned(), p);
        }
        if self.pools.len() > MAX_POOLS {
            problem("pools", format!("{} pools", self.pools.len()), format!("at most {MAX_POOLS}"), p);
        }
        let (mut names, mut models, mut defaults) = (BTreeSet::new(), BTreeSet::new(), 0);
        for (i, pool) in self.pools.iter().enumerate() {
            let path = |field: &str| format!("pools[{i}].{field}");
            if pool.name.is_empty() {
                problem(&path("name"), "no name", "a name".to_owned(), p);
            }
            if !names.insert(&pool.name) {
                problem(&path("name"), format!("{:?} a second time", pool.name), "each name once".to_owned(), p);
            }
            if pool.models.is_empty() && !pool.default {
                let allowed = "a model, or default: true".to_owned();
                problem(&path("models"), "no model", allowed, p);
            }
            for (m, model) in pool.models.iter().enumerate().filter(|(_, model)| !models.insert(*model)) {
                let allowed = "each model in one pool".to_owned();
                problem(&path(&format!("models[{m}]")), format!("{model:?} a second time"), allowed, p);
            }
            defaults += u32::from(pool.default);
            if pool.default && defaults > 1 {
                problem(&path("default"), "a second default pool", "one at most".to_owned(), p);
            }
            self.check_sections(i, pool, p);
        }
    }

    fn check_sections(&self, i: usize, pool: &PoolEntry, p: &mut Vec<ConfigProblem>) {
        if pool.epp_config.is_some() {
            for section in pool.sections() {
                let allowed = "nothing: the file says it".to_owned();
                problem(&format!("pools[{i}].{section}"), "a section beside epp_config", allowed, p);
            }
            return;
        }
        // What is wrong with the sections of all is told once.
        let own: BTreeSet<&str> = pool.sections().collect();
        let whole = GatewayConfig { epp_config: None, ..pool.config(self) };
        for found in
            whole.validate().into_iter().filter(|f| own.contains(f.path.split(['.', '[']).next().unwrap_or("")))
        {
            p.push(ConfigProblem { path: format!("pools[{i}].{}", found.path), ..found });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::ScorerConfig;

    fn config(yaml: &serde_json::Value) -> GatewayConfig {
        serde_json::from_value(yaml.clone()).unwrap()
    }

    fn problems(pools: serde_json::Value) -> String {
        let config = config(&serde_json::json!({ "pools": pools }));
        config.validate().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_pool_has_its_own_sections_and_else_the_gateways() {
        let whole = config(&serde_json::json!({
            "objectives": {"batch": -1},
            "disaggregation": {"profile": {"name": "prefill"}, "decider": {"type": "always-disagg-pd-decider"}},
            "pools": [
                {"name": "a", "models": ["m"], "objectives": {"batch": 3}},
                {"name": "b", "default": true, "namespace": "n", "profile": {"scorers": [{"type": "queue-scorer"}]}},
            ],
        }));
        assert_eq!(whole.validate(), []);
        let [a, b] = &whole.pool_configs()[..] else { panic!("two pools") };
        assert_eq!((&*a.pool.name, &*a.pool.namespace, a.objectives["batch"]), ("a", "default", 3));
        assert_eq!((&a.profile, &a.disaggregation), (&whole.profile, &whole.disaggregation));
        assert_eq!((&*b.pool.name, &*b.pool.namespace, b.objectives["batch"]), ("b", "n", -1));
        assert_eq!(b.profile.scorers, [ScorerConfig::of("queue-scorer", 1.0)]);
        assert_eq!(b.disaggregation, None, "it goes with the profile");
        assert!(a.pools.is_empty() && b.pools.is_empty());
        assert_eq!(GatewayConfig::default().pool_configs(), [GatewayConfig::default()]);
    }

    #[test]
    fn what_is_wrong_with_pools_is_told() {
        let check = |pools: serde_json::Value, expect: &str| assert_eq!(problems(pools), expect);
        check(serde_json::json!([{"name": "a", "default": true}]), "");
        check(
            serde_json::json!([{"models": ["m"]}, {"name": "b"}]),
            "pools[0].name: found no name, expected a name\n\
             pools[1].models: found no model, expected a model, or default: true",
        );
        check(
            serde_json::json!([{"name": "a", "models": ["m"], "default": true}, {"name": "a", "models": ["m"], "default": true}]),
            "pools[1].name: found \"a\" a second time, expected each name once\n\
             pools[1].models[0]: found \"m\" a second time, expected each model in one pool\n\
             pools[1].default: found a second default pool, expected one at most",
        );
        check(
            serde_json::json!([{"name": "a", "default": true, "prefix": {"block_tokens": 7}}]),
            "pools[0].prefix.block_tokens: found 7, expected a number from 64 to 256",
        );
        check(
            serde_json::json!([{"name": "a", "default": true, "epp_config": "x", "prefix": {}}]),
            "pools[0].prefix: found a section beside epp_config, expected nothing: the file says it",
        );
    }

    #[test]
    fn engines_run_the_lowest_priority_first() {
        let of = |on: bool, objective| {
            let config =
                config(&serde_json::json!({"engine_priority": on, "objectives": {"premium": 10, "batch": -1}}));
            config.priority_of_engines(objective)
        };
        assert_eq!((of(true, Some("premium")), of(true, Some("batch"))), (Some(-10), Some(1)));
        assert_eq!((of(true, Some("other")), of(true, None), of(false, Some("premium"))), (None, None, None));
    }
}
