//! `label-selector-filter`: endpoints that a Kubernetes label selector matches, all of `matchLabels` and of `matchExpressions`. An
//! empty selector matches everything.

use std::collections::BTreeMap;

use serde_json::Value;
use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what the selector matches.
#[derive(Debug)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

#[derive(Debug)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Debug)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

const EXPRESSIONS: &str =
    "a list of {key, operator, values}: In and NotIn with at least one value, Exists and DoesNotExist with none";

impl LabelSelector {
    /// From `matchLabels` and `matchExpressions`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<LabelSelector, PluginError> {
        let labels = p.labels("matchLabels")?;
        let equal = labels.into_iter().map(|(key, value)| Requirement { key, operator: Operator::In(vec![value]) });
        let mut requirements: Vec<Requirement> = equal.collect();
        for expression in p.list("matchExpressions", EXPRESSIONS)? {
            requirements.push(requirement(&expression).ok_or_else(|| p.refuse("matchExpressions", EXPRESSIONS))?);
        }
        Ok(LabelSelector { requirements })
    }
}

fn requirement(expression: &Value) -> Option<Requirement> {
    let fields = expression.as_object()?;
    if fields.keys().any(|k| !["key", "operator", "values"].contains(&k.as_str())) {
        return None;
    }
    let values = fields.get("values").filter(|v| !v.is_null()).map(Value::as_array);
    let values: Vec<String> =
        values.unwrap_or(Some(&Vec::new()))?.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<_>>()?;
    let operator = match (fields.get("operator")?.as_str()?, values.is_empty()) {
        ("In", false) => Operator::In(values),
        ("NotIn", false) => Operator::NotIn(values),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        _ => return None,
    };
    Some(Requirement { key: fields.get("key")?.as_str()?.to_owned(), operator })
}

impl Requirement {
    /// As Kubernetes: what has no label at all is not in any list of values.
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|v| values.contains(v)),
            Operator::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl Filter for LabelSelector {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        candidates.retain(|c| {
            let labels = view.pool.get(c.id).config.labels();
            self.requirements.iter().all(|r| r.holds(labels))
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
    fn every_requirement_counts() {
        let pool = pool(&[&[], &[("gpu", "h100")], &[("gpu", "h100"), ("zone", "a")], &[("gpu", "a100")]]);
        let check = |parameters: Value, expect: &[u32]| {
            let filter = read(parameters.clone(), LabelSelector::read).unwrap();
            assert_eq!(kept(&filter, &view(&pool), candidates(4, |_, _| {})), expect, "{parameters}");
        };
        let expression = |e: Value| json!({"matchExpressions": [e]});
        check(json!({}), &[0, 1, 2, 3]);
        check(json!({"matchLabels": {"gpu": "h100"}}), &[1, 2]);
        check(json!({"matchLabels": {"gpu": "h100", "zone": "a"}}), &[2]);
        check(json!({"matchLabels": {"gpu": "b200"}}), &[]);
        check(expression(json!({"key": "gpu", "operator": "In", "values": ["h100", "a100"]})), &[1, 2, 3]);
        check(expression(json!({"key": "gpu", "operator": "NotIn", "values": ["h100"]})), &[0, 3]);
        check(expression(json!({"key": "zone", "operator": "Exists"})), &[2]);
        check(expression(json!({"key": "zone", "operator": "DoesNotExist"})), &[0, 1, 3]);
        let both = json!({"matchLabels": {"gpu": "h100"}, "matchExpressions": [{"key": "zone", "operator": "Exists"}]});
        check(both, &[2]);
    }

    #[test]
    fn half_an_expression_is_refused() {
        for e in [
            json!({"key": "gpu", "operator": "In"}),
            json!({"key": "gpu", "operator": "Exists", "values": ["x"]}),
            json!({"key": "gpu", "operator": "Like", "values": ["x"]}),
            json!({"operator": "Exists"}),
            json!({"key": "gpu", "operator": "Exists", "value": "x"}),
            json!("gpu"),
        ] {
            assert!(read(json!({"matchExpressions": [e.clone()]}), LabelSelector::read).is_err(), "{e}");
        }
        assert!(read(json!({"matchLabels": {"gpu": 1}}), LabelSelector::read).is_err());
    }
}
