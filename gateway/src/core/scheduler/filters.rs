//! Filters: which endpoints may be used at all.

use std::collections::BTreeMap;

use crate::core::pool::Role;
use crate::core::scheduler::{Candidate, Filter, View};

/// `healthy-filter`: keeps endpoints that were scraped successfully and are neither ejected nor draining.
#[derive(Debug)]
pub struct Healthy;

impl Filter for Healthy {
    fn filter(&self, _: &View<'_>, candidates: &mut Vec<Candidate>) {
        candidates.retain(|c| c.available);
    }
}

/// `decode-filter` and `prefill-filter`: keep endpoints of a role (llm-d's label `llm-d.ai/role`).
///
/// Endpoints that do both count for either stage.
#[derive(Debug)]
pub struct ByRole {
    /// The role refused.
    pub refused: Role,
}

impl Filter for ByRole {
    fn filter(&self, _: &View<'_>, candidates: &mut Vec<Candidate>) {
        candidates.retain(|c| c.role != self.refused);
    }
}

/// `label-selector-filter`: keeps endpoints that carry every one of the labels.
#[derive(Debug)]
pub struct LabelSelector {
    /// Labels and the values they must have.
    pub labels: BTreeMap<String, String>,
}

impl Filter for LabelSelector {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>) {
        candidates.retain(|c| {
            let labels = &view.pool.get(c.id).config.labels;
            self.labels.iter().all(|(k, v)| labels.get(k) == Some(v))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::{EndpointConfig, Pool};
    use crate::core::scheduler::testing::candidates;

    fn kept(filter: &dyn Filter, pool: &Pool, mut all: Vec<Candidate>) -> Vec<u32> {
        filter.filter(&View { pool, prefix_blocks: 0 }, &mut all);
        all.iter().map(|c| c.id.0).collect()
    }

    #[test]
    fn healthy_keeps_available_endpoints_in_order() {
        let pool = Pool::default();
        assert_eq!(kept(&Healthy, &pool, candidates(4, |i, c| c.available = i % 2 == 1)), [1, 3]);
    }

    #[test]
    fn roles_keep_their_stage_and_the_unlabelled() {
        let pool = Pool::default();
        let roles = [Role::Both, Role::Decode, Role::Prefill];
        let all = || candidates(3, |i, c| c.role = roles[i]);
        assert_eq!(kept(&ByRole { refused: Role::Prefill }, &pool, all()), [0, 1]);
        assert_eq!(kept(&ByRole { refused: Role::Decode }, &pool, all()), [0, 2]);
    }

    #[test]
    fn the_label_selector_wants_every_label() {
        let endpoint = |labels: &[(&str, &str)]| {
            let mut e = EndpointConfig::new("e", "127.0.0.1", 1);
            e.labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            e
        };
        let pool =
            Pool::new(vec![endpoint(&[]), endpoint(&[("gpu", "h100")]), endpoint(&[("gpu", "h100"), ("zone", "a")])]);
        let select = |labels: &[(&str, &str)]| LabelSelector { labels: endpoint(labels).labels };
        let all = || candidates(3, |_, _| {});
        assert_eq!(kept(&select(&[("gpu", "h100")]), &pool, all()), [1, 2]);
        assert_eq!(kept(&select(&[("gpu", "h100"), ("zone", "a")]), &pool, all()), [2]);
        assert_eq!(kept(&select(&[("gpu", "a100")]), &pool, all()), [0; 0]);
    }
}
