//! Which model a request is sent to when that is not the one it asks for (llm-d's InferenceModelRewrite): weighted targets for a name.
//!
//! The draw is a function of the seed and the request's id: the same request gets the same model, and no state is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use shared::ids::RequestId;
use shared::rng::{Seed, mix64};
use xxhash_rust::xxh3::xxh3_64;

use crate::core::config::ModelTarget;

/// All rules, by the model that is asked for.
#[derive(Debug, Default)]
pub struct Rewrites {
    rules: BTreeMap<Arc<str>, Vec<(Arc<str>, u64)>>,
    seed: u64,
}

impl Rewrites {
    /// The rules of a valid configuration.
    pub(crate) fn new(rules: &BTreeMap<String, Vec<ModelTarget>>, seed: Seed) -> Rewrites {
        let target = |t: &ModelTarget| (Arc::from(t.model.as_str()), u64::from(t.weight));
        let rules = rules.iter().map(|(model, targets)| (model.as_str().into(), targets.iter().map(target).collect()));
        Rewrites { rules: rules.collect(), seed: seed.stream("gateway/rewrite").next_u64() }
    }

    /// The model that the request `id` for `model` is sent to: a target in proportion to its weight, or without a rule the one
    /// that its caller names in `header`. `None` if it stays as it is.
    pub fn target(&self, model: &str, header: Option<&str>, id: &RequestId) -> Option<Arc<str>> {
        let target = match self.rules.get(model) {
            Some(targets) => self.draw(targets, id),
            None => header.filter(|h| !h.is_empty()).map(Arc::from),
        };
        target.filter(|target| **target != *model)
    }

    fn draw(&self, targets: &[(Arc<str>, u64)], id: &RequestId) -> Option<Arc<str>> {
        let total: u64 = targets.iter().map(|(_, weight)| weight).sum();
        let mut point = mix64(self.seed ^ xxh3_64(id.as_str().as_bytes())) % total.max(1);
        for (model, weight) in targets {
            if point < *weight {
                return Some(Arc::clone(model));
            }
            point -= weight;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrites(targets: &[(&str, u32)]) -> Rewrites {
        let targets = targets.iter().map(|(m, weight)| ModelTarget { model: (*m).into(), weight: *weight }).collect();
        Rewrites::new(&[("chat".to_owned(), targets)].into(), Seed(7))
    }

    fn id(n: u32) -> RequestId {
        RequestId::sanitise(&format!("req-{n}"))
    }

    #[test]
    fn targets_are_drawn_by_weight_and_stay_with_a_request() {
        let rewrites = rewrites(&[("stable", 9), ("canary", 1), ("off", 0)]);
        let draw = |n| rewrites.target("chat", Some("ignored"), &id(n)).unwrap();
        let canaries = (0..10_000).filter(|n| &*draw(*n) == "canary").count();
        // Five standard deviations of a binomial distribution.
        assert!((850..1150).contains(&canaries), "{canaries}");
        assert!((0..10_000).all(|n| &*draw(n) != "off"));
        assert_eq!(draw(3), draw(3));
    }

    #[test]
    fn without_a_rule_the_header_names_the_target() {
        let rewrites = rewrites(&[("chat", 1)]);
        let target = |model, header| rewrites.target(model, header, &id(1));
        assert_eq!(target("other", None), None);
        assert_eq!(target("other", Some("")), None);
        assert_eq!(target("other", Some("adapter")).as_deref(), Some("adapter"));
        assert_eq!(target("other", Some("other")), None);
        assert_eq!(target("chat", Some("adapter")), None, "its target is what it asks for");
    }
}
