//! Expectations: bounds on figures of the report, judged after the run.
//!
//! A bound on a figure that the report does not have fails: a misspelt expectation must not pass for ever.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::figures::Report;
use super::tenants::TenantFigures;

/// What a figure must keep to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// Smallest value allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Largest value allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

/// A judged expectation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    /// Path of the figure in the report.
    pub path: String,
    /// The figure; absent when the report has none at that path.
    pub value: Option<f64>,
    /// The bound.
    pub bound: Bound,
    /// Whether it holds.
    pub pass: bool,
}

/// Judges `bounds`, in their order, against `report`.
pub fn evaluate<'a>(report: &Report, bounds: impl IntoIterator<Item = (&'a str, Bound)>) -> Vec<Verdict> {
    let json = report.known();
    let judge = |(path, bound): (&str, Bound)| {
        let value = figure(&json, path);
        let holds = |v: f64| bound.min.is_none_or(|m| v >= m) && bound.max.is_none_or(|m| v <= m);
        Verdict { path: path.to_owned(), value, bound, pass: value.is_some_and(holds) }
    };
    bounds.into_iter().map(judge).collect()
}

/// Whether a report has a figure at `path`; `errors_by_kind` has one for every kind, `dropped_by_reason` for every reason, `tenants` for
/// every tenant.
pub fn figure_exists(path: &str) -> bool {
    if let Some((_, of_tenant)) = path.strip_prefix("tenants.").and_then(|rest| rest.split_once('.')) {
        let json = serde_json::to_value(TenantFigures::default()).unwrap_or(Value::Null);
        return figure(&json, of_tenant).is_some();
    }
    let json = serde_json::to_value(Report::default()).unwrap_or(Value::Null);
    figure(&json, path).is_some()
}

const COUNTED: [&str; 2] = ["errors_by_kind.", "dropped_by_reason."];

fn figure(report: &Value, path: &str) -> Option<f64> {
    let value = path.split('.').try_fold(report, |here, key| here.get(key));
    match value {
        Some(Value::Bool(b)) => Some(f64::from(u8::from(*b))),
        Some(Value::Number(n)) => n.as_f64(),
        // A list counts its items, so that `invalid: {max: 0}` can be asked for.
        Some(Value::Array(items)) => Some(items.len() as f64),
        Some(Value::Null | Value::String(_) | Value::Object(_)) => None,
        // An error that did not happen happened zero times.
        None => COUNTED.iter().any(|map| path.strip_prefix(map).is_some_and(|kind| !kind.is_empty())).then_some(0.0),
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.min, self.max) {
            (Some(low), Some(high)) => write!(f, "from {low} to {high}"),
            (Some(low), None) => write!(f, "at least {low}"),
            (None, Some(high)) => write!(f, "at most {high}"),
            (None, None) => f.write_str("any"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_judged_by_their_path() {
        let mut report = Report { errors: 2, ..Report::default() };
        report.ttft_ms.p99 = 480.0;
        report.errors_by_kind.insert("http_429".into(), 2);
        let check = |path, min, max, value: Option<f64>, pass| {
            let verdict = &evaluate(&report, [(path, Bound { min, max })])[0];
            assert_eq!((verdict.value, verdict.pass), (value, pass), "{path}");
        };
        check("ttft_ms.p99", None, Some(500.0), Some(480.0), true);
        check("ttft_ms.p99", Some(481.0), None, Some(480.0), false);
        check("errors", None, Some(0.0), Some(2.0), false);
        check("errors_by_kind.http_429", Some(1.0), None, Some(2.0), true);
        check("errors_by_kind.timeout", None, Some(0.0), Some(0.0), true);
        check("invalid", None, Some(0.0), Some(0.0), true);
        check("engines.fell_behind", None, Some(0.0), Some(0.0), true);
        check("no.such", None, Some(0.0), None, false);
        check("scenario", None, Some(0.0), None, false);
    }

    #[test]
    fn paths_are_known_before_the_run() {
        for path in [
            "errors",
            "ttft_ms.p99",
            "traces.incomplete",
            "errors_by_kind.http_503",
            "dropped_by_reason.rejected-saturated",
            "tenants.chat.ttft_ms.p99",
            "invalid",
        ] {
            assert!(figure_exists(path), "{path}");
        }
        for path in
            ["error", "ttft_ms.p98", "ttft_ms", "scenario", "errors_by_kind.", "tenants.chat", "tenants.chat.name", ""]
        {
            assert!(!figure_exists(path), "{path}");
        }
    }
}
