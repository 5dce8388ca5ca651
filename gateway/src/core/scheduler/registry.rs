//! The plugins by name: one line each. Adding a plugin touches its own section and its line here.

use std::collections::BTreeMap;

use crate::core::config::Parameters;
use crate::core::pool::Role;
use crate::core::scheduler::{Filter, Picker, Scorer, filters, pickers, scorers};

type Build<T> = fn(&mut Reader<'_>) -> Result<Box<T>, PluginError>;

/// What a scorer reads that is looked up only if some scorer wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Metrics, which every candidate has.
    Metrics,
    /// The prefix index.
    Prefix,
    /// The table of sessions.
    Session,
}

const FILTERS: &[(&str, Build<dyn Filter>)] = &[
    ("healthy-filter", |_| Ok(Box::new(filters::Healthy))),
    ("decode-filter", |_| Ok(Box::new(filters::ByRole { refused: Role::Prefill }))),
    ("prefill-filter", |_| Ok(Box::new(filters::ByRole { refused: Role::Decode }))),
    ("label-selector-filter", |p| Ok(Box::new(filters::LabelSelector { labels: p.labels("labels")? }))),
];

const SCORERS: &[(&str, Reads, Build<dyn Scorer>)] = &[
    ("queue-scorer", Reads::Metrics, |_| Ok(Box::new(scorers::Queue))),
    ("running-requests-size-scorer", Reads::Metrics, |_| Ok(Box::new(scorers::RunningRequests))),
    ("kv-cache-utilization-scorer", Reads::Metrics, |_| Ok(Box::new(scorers::KvCacheUtilization))),
    ("load-aware-scorer", Reads::Metrics, |p| {
        Ok(Box::new(scorers::LoadAware { threshold: p.count("threshold", 128)? }))
    }),
    ("prefix-cache-scorer", Reads::Prefix, |p| {
        Ok(Box::new(scorers::PrefixCache { match_length_weight: p.share("matchLengthWeight", 0.0)? }))
    }),
    ("session-affinity-scorer", Reads::Session, |_| Ok(Box::new(scorers::SessionAffinity))),
];

const PICKERS: &[(&str, Build<dyn Picker>)] = &[
    ("max-score-picker", |_| Ok(Box::new(pickers::MaxScore))),
    ("random-picker", |_| Ok(Box::new(pickers::Random))),
    ("weighted-random-picker", |_| Ok(Box::new(pickers::WeightedRandom))),
];

/// Why a plugin cannot be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PluginError {
    /// No plugin of this type.
    Unknown {
        /// The types there are.
        known: Vec<&'static str>,
    },
    /// A parameter that is not allowed.
    Parameter {
        /// Its name.
        name: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: String,
    },
}

/// A plugin made from its registry line, which gives its type a static name.
#[derive(Debug)]
pub struct Made<T> {
    /// The type.
    pub kind: &'static str,
    /// The plugin.
    pub plugin: T,
}

/// Makes a filter.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn filter(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Filter>>, PluginError> {
    let line = FILTERS.iter().find(|l| l.0 == kind);
    let (kind, build) = line.ok_or_else(|| unknown(FILTERS.iter().map(|l| l.0)))?;
    Ok(Made { kind, plugin: made(*build, parameters)? })
}

/// Makes a scorer and says what it reads.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn scorer(kind: &str, parameters: &Parameters) -> Result<(Made<Box<dyn Scorer>>, Reads), PluginError> {
    let line = SCORERS.iter().find(|l| l.0 == kind);
    let (kind, reads, build) = line.ok_or_else(|| unknown(SCORERS.iter().map(|l| l.0)))?;
    Ok((Made { kind, plugin: made(*build, parameters)? }, *reads))
}

/// Makes a picker.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn picker(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Picker>>, PluginError> {
    let line = PICKERS.iter().find(|l| l.0 == kind);
    let (kind, build) = line.ok_or_else(|| unknown(PICKERS.iter().map(|l| l.0)))?;
    Ok(Made { kind, plugin: made(*build, parameters)? })
}

fn unknown(known: impl Iterator<Item = &'static str>) -> PluginError {
    PluginError::Unknown { known: known.collect() }
}

fn made<T: ?Sized>(build: Build<T>, parameters: &Parameters) -> Result<Box<T>, PluginError> {
    let mut reader = Reader { parameters, read: Vec::new() };
    let plugin = build(&mut reader)?;
    reader.nothing_unread()?;
    Ok(plugin)
}

/// Reads parameters and remembers which, so that misspelt ones are refused.
struct Reader<'a> {
    parameters: &'a Parameters,
    read: Vec<&'static str>,
}

impl Reader<'_> {
    fn get(&mut self, name: &'static str) -> Option<&serde_json::Value> {
        self.read.push(name);
        self.parameters.get(name)
    }

    fn count(&mut self, name: &'static str, default: u32) -> Result<u32, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        number.ok_or_else(|| refused(name, value, "a whole number of at least 1"))
    }

    fn share(&mut self, name: &'static str, default: f64) -> Result<f64, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let number = value.as_f64().filter(|x| (0.0..=1.0).contains(x));
        number.ok_or_else(|| refused(name, value, "a number from 0 to 1"))
    }

    fn labels(&mut self, name: &'static str) -> Result<BTreeMap<String, String>, PluginError> {
        const ALLOWED: &str = "a map of at least one label to its value";
        let Some(value) = self.get(name) else {
            return Err(refused(name, &serde_json::Value::Null, ALLOWED));
        };
        let map = value.as_object().filter(|m| !m.is_empty()).ok_or_else(|| refused(name, value, ALLOWED))?;
        map.iter()
            .map(|(k, v)| v.as_str().map(|v| (k.clone(), v.to_owned())).ok_or_else(|| refused(name, value, ALLOWED)))
            .collect()
    }

    fn nothing_unread(&self) -> Result<(), PluginError> {
        let Some((name, value)) = self.parameters.iter().find(|(n, _)| !self.read.contains(&n.as_str())) else {
            return Ok(());
        };
        let allowed = match self.read.as_slice() {
            [] => "no parameter".to_owned(),
            names => format!("one of the parameters {}", names.join(", ")),
        };
        Err(refused(name, value, &allowed))
    }
}

fn refused(name: &str, found: &serde_json::Value, allowed: &str) -> PluginError {
    PluginError::Parameter { name: name.to_owned(), found: found.to_string(), allowed: allowed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parameters(value: serde_json::Value) -> Parameters {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn parameters_are_checked() {
        let check = |kind: &str, value: serde_json::Value, expect: Option<&str>| {
            let error = scorer(kind, &parameters(value)).err().map(|e| match e {
                PluginError::Parameter { name, found, allowed } => format!("{name}: {found}: {allowed}"),
                PluginError::Unknown { known } => known.join(" "),
            });
            assert_eq!(error.as_deref(), expect);
        };
        check("load-aware-scorer", json!({"threshold": 64}), None);
        check("load-aware-scorer", json!({"threshold": 0}), Some("threshold: 0: a whole number of at least 1"));
        check("load-aware-scorer", json!({"treshold": 1}), Some("treshold: 1: one of the parameters threshold"));
        check(
            "prefix-cache-scorer",
            json!({"matchLengthWeight": 2}),
            Some("matchLengthWeight: 2: a number from 0 to 1"),
        );
        check("queue-scorer", json!({"a": true}), Some("a: true: no parameter"));
    }

    #[test]
    fn the_label_selector_needs_labels() {
        assert!(filter("label-selector-filter", &parameters(json!({"labels": {"gpu": "h100"}}))).is_ok());
        assert!(filter("label-selector-filter", &parameters(json!({}))).is_err());
        assert!(filter("label-selector-filter", &parameters(json!({"labels": {"gpu": 1}}))).is_err());
    }
}
