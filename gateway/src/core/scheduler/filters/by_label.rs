//! `by-label`: endpoints whose label has one of the given values; deprecated in llm-d, and still in many files.

use std::collections::BTreeSet;

use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what has the label.
#[derive(Debug)]
pub struct ByLabel {
    label: String,
    valid: BTreeSet<String>,
    allows_none: bool,
}

impl ByLabel {
    /// From `label`, `validValues` and `allowsNoLabel`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<ByLabel, PluginError> {
        let label = p.required_text("label")?;
        let valid: BTreeSet<String> = p.texts("validValues")?.into_iter().collect();
        let allows_none = p.flag("allowsNoLabel", false)?;
        if valid.is_empty() && !allows_none {
            return Err(p.refuse("validValues", "at least one value, or allowsNoLabel: true"));
        }
        Ok(ByLabel { label, valid, allows_none })
    }
}

impl Filter for ByLabel {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        candidates.retain(|c| match view.pool.get(c.id).config.labels().get(&self.label) {
            Some(value) => self.valid.contains(value),
            None => self.allows_none,
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, kept, pool, view};

    #[test]
    fn values_decide() {
        let pool = pool(&[&[], &[("gpu", "h100")], &[("gpu", "a100")]]);
        let check = |parameters, expect: &[u32]| {
            let filter = read(parameters, ByLabel::read).unwrap();
            assert_eq!(kept(&filter, &view(&pool), candidates(3, |_, _| {})), expect);
        };
        check(json!({"label": "gpu", "validValues": ["h100"]}), &[1]);
        check(json!({"label": "gpu", "validValues": ["h100", "a100"]}), &[1, 2]);
        check(json!({"label": "gpu", "validValues": ["h100"], "allowsNoLabel": true}), &[0, 1]);
        check(json!({"label": "gpu", "allowsNoLabel": true}), &[0]);
    }

    #[test]
    fn what_keeps_nothing_is_refused() {
        assert!(read(json!({"label": "gpu"}), ByLabel::read).is_err());
        assert!(read(json!({"validValues": ["x"]}), ByLabel::read).is_err());
    }
}
