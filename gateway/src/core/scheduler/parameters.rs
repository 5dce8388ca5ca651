//! Reading a plugin's parameters: each is checked, and one that nobody read is refused.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::core::config::Parameters;

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
        /// Its name, with those of the mappings around it.
        name: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: String,
    },
}

/// Reads parameters and remembers which, so that misspelt ones are refused.
#[derive(Debug)]
pub struct Reader<'a> {
    parameters: &'a Parameters,
    /// Path of the mapping that is read, with a dot at its end.
    prefix: String,
    read: Vec<&'static str>,
}

/// The parameter that says which of the two prefix producers a plugin reads.
pub(crate) const PREFIX_PRODUCER_NAME: &str = "prefixMatchInfoProducerName";
/// The producers that plugins may name.
const PREFIX_PRODUCER: &str = "approx-prefix-cache-producer";
pub(crate) const PRECISE_PRODUCER: &str = "precise-prefix-cache-producer";
const IN_FLIGHT_PRODUCER: &str = "inflight-load-producer";
const LATENCY_PRODUCER: &str = "predicted-latency-producer";

impl<'a> Reader<'a> {
    /// Reads with `read`, and refuses what it left.
    ///
    /// # Errors
    /// What is not allowed.
    pub fn all<T>(
        parameters: &'a Parameters,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, PluginError>,
    ) -> Result<T, PluginError> {
        let mut reader = Reader { parameters, prefix: String::new(), read: Vec::new() };
        let value = read(&mut reader)?;
        reader.nothing_unread()?;
        Ok(value)
    }

    /// A parameter that is given and not null.
    fn get(&mut self, name: &'static str) -> Option<&'a Value> {
        self.read.push(name);
        self.parameters.get(name).filter(|v| !v.is_null())
    }

    /// That a parameter is not what is allowed.
    pub fn refuse(&self, name: &str, allowed: &str) -> PluginError {
        let found = self.parameters.get(name).map_or("nothing".to_owned(), Value::to_string);
        PluginError::Parameter { name: format!("{}{name}", self.prefix), found, allowed: allowed.to_owned() }
    }

    /// Whatever stands there does not matter.
    pub fn ignored(&mut self, name: &'static str) {
        self.get(name);
    }

    /// A whole number of at least `least`.
    ///
    /// # Errors
    /// If it is none.
    pub fn count_from(&mut self, name: &'static str, default: u32, least: u32) -> Result<u32, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n >= least);
        number.ok_or_else(|| self.refuse(name, &format!("a whole number of at least {least}")))
    }

    /// A number from `least` to `most`.
    ///
    /// # Errors
    /// If it is none.
    pub fn number(&mut self, name: &'static str, default: f64, least: f64, most: f64) -> Result<f64, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let number = value.as_f64().filter(|x| (least..=most).contains(x));
        number.ok_or_else(|| self.refuse(name, &numbers(least, most)))
    }

    /// A number from 0 to 1.
    ///
    /// # Errors
    /// If it is none.
    pub fn share(&mut self, name: &'static str, default: f64) -> Result<f64, PluginError> {
        self.number(name, default, 0.0, 1.0)
    }

    /// Yes or no.
    ///
    /// # Errors
    /// If it is neither.
    pub fn flag(&mut self, name: &'static str, default: bool) -> Result<bool, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.refuse(name, "true or false"))
    }

    /// Text; empty if there is none.
    ///
    /// # Errors
    /// If it is something else.
    pub fn text(&mut self, name: &'static str) -> Result<&'a str, PluginError> {
        let Some(value) = self.get(name) else { return Ok("") };
        value.as_str().ok_or_else(|| self.refuse(name, "text"))
    }

    /// Text, or `default`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn text_or(&mut self, name: &'static str, default: &str) -> Result<String, PluginError> {
        let text = self.text(name)?;
        Ok(if self.parameters.get(name).is_none_or(Value::is_null) { default } else { text }.to_owned())
    }

    /// Text that must be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn required_text(&mut self, name: &'static str) -> Result<String, PluginError> {
        let text = self.text(name)?;
        if text.is_empty() { Err(self.refuse(name, "text")) } else { Ok(text.to_owned()) }
    }

    /// One of some words.
    ///
    /// # Errors
    /// If it is another.
    pub fn word(
        &mut self,
        name: &'static str,
        default: &'static str,
        known: &[&'static str],
    ) -> Result<&'static str, PluginError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let word = known.iter().find(|k| value.as_str() == Some(k));
        word.copied().ok_or_else(|| self.refuse(name, &shared::config::one_of(known.iter().copied())))
    }

    /// A list of whatever; `allowed` says what.
    ///
    /// # Errors
    /// If it is no list.
    pub fn list(&mut self, name: &'static str, allowed: &str) -> Result<Vec<Value>, PluginError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        value.as_array().cloned().ok_or_else(|| self.refuse(name, allowed))
    }

    /// A list of texts.
    ///
    /// # Errors
    /// If it is something else.
    pub fn texts(&mut self, name: &'static str) -> Result<Vec<String>, PluginError> {
        const ALLOWED: &str = "a list of texts";
        let list = self.list(name, ALLOWED)?;
        let texts: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
        texts.ok_or_else(|| self.refuse(name, ALLOWED))
    }

    /// Labels and their values.
    ///
    /// # Errors
    /// If it is something else.
    pub fn labels(&mut self, name: &'static str) -> Result<BTreeMap<String, String>, PluginError> {
        let Some(value) = self.get(name) else { return Ok(BTreeMap::new()) };
        let pairs = value.as_object().into_iter().flatten();
        let labels: Option<_> = pairs.map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect();
        labels.filter(|_| value.is_object()).ok_or_else(|| self.refuse(name, "a map of labels to their values"))
    }

    /// A mapping of parameters, read to its end.
    ///
    /// # Errors
    /// What `read` refuses, or leaves.
    pub fn nested<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, PluginError>,
    ) -> Result<T, PluginError> {
        let map = match self.get(name) {
            None => Parameters::new(),
            Some(Value::Object(map)) => map.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            Some(_) => return Err(self.refuse(name, "a mapping")),
        };
        let prefix = format!("{}{name}.", self.prefix);
        let mut inner = Reader { parameters: &map, prefix, read: Vec::new() };
        let value = read(&mut inner)?;
        inner.nothing_unread()?;
        Ok(value)
    }

    /// `prefixMatchInfoProducerName`, by type: the approximate producer, or the precise one.
    ///
    /// # Errors
    /// If it is another.
    pub fn prefix_producer(&mut self) -> Result<(), PluginError> {
        match self.text(PREFIX_PRODUCER_NAME)? {
            "" | PREFIX_PRODUCER | PRECISE_PRODUCER => Ok(()),
            _ => Err(self.refuse(PREFIX_PRODUCER_NAME, &format!("{PREFIX_PRODUCER} or {PRECISE_PRODUCER}"))),
        }
    }

    /// `inFlightLoadProducerName`, by type: there is one.
    ///
    /// # Errors
    /// If it is another.
    pub fn in_flight_producer(&mut self) -> Result<(), PluginError> {
        self.producer("inFlightLoadProducerName", IN_FLIGHT_PRODUCER)
    }

    /// `latencyPredictionInfoProducerName`, by type: there is none that runs.
    ///
    /// # Errors
    /// If it is another.
    pub fn latency_producer(&mut self) -> Result<(), PluginError> {
        self.producer("latencyPredictionInfoProducerName", LATENCY_PRODUCER)
    }

    fn producer(&mut self, name: &'static str, kind: &str) -> Result<(), PluginError> {
        let given = self.text(name)?;
        if given.is_empty() || given == kind { Ok(()) } else { Err(self.refuse(name, kind)) }
    }

    fn nothing_unread(&self) -> Result<(), PluginError> {
        let Some(name) = self.parameters.keys().find(|n| !self.read.contains(&n.as_str())) else { return Ok(()) };
        let allowed = match self.read.as_slice() {
            [] => "no parameter".to_owned(),
            names => format!("one of the parameters {}", names.join(", ")),
        };
        Err(self.refuse(name, &allowed))
    }
}

fn numbers(least: f64, most: f64) -> String {
    match (least.is_finite(), most < f64::MAX) {
        (true, true) => format!("a number from {least} to {most}"),
        (true, false) => format!("a number of at least {least}"),
        (false, true) => format!("a number of at most {most}"),
        (false, false) => "a number".to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Reads parameters given as JSON.
    pub(crate) fn read<T>(
        parameters: Value,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, PluginError>,
    ) -> Result<T, PluginError> {
        let parameters: Parameters = serde_json::from_value(parameters).expect("parameters are a mapping");
        Reader::all(&parameters, read)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::testing::read;
    use super::*;

    fn told<T>(result: Result<T, PluginError>) -> String {
        match result.err() {
            Some(PluginError::Parameter { name, found, allowed }) => format!("{name}: {found}: {allowed}"),
            Some(PluginError::Unknown { known }) => known.join(" "),
            None => "good".to_owned(),
        }
    }

    #[test]
    fn each_kind_of_parameter_is_checked() {
        let check = |value: Value, expect: &str| {
            let found = read(json!({ "x": value }), |p| {
                p.count_from("x", 1, 1)?;
                p.number("x", 1.0, 0.5, 9.0)
            });
            assert_eq!(told(found), expect);
        };
        check(json!(2), "good");
        check(Value::Null, "good");
        check(json!(0), "x: 0: a whole number of at least 1");
        check(json!("2"), "x: \"2\": a whole number of at least 1");
        check(json!(10), "x: 10: a number from 0.5 to 9");
        assert_eq!(told(read(json!({"x": 2}), |p| p.flag("x", true))), "x: 2: true or false");
        assert_eq!(told(read(json!({"x": 2}), |p| p.word("x", "a", &["a", "b"]))), "x: 2: one of a, b");
        assert_eq!(told(read(json!({}), |p| p.required_text("x"))), "x: nothing: text");
        assert_eq!(told(read(json!({"x": [1]}), |p| p.texts("x"))), "x: [1]: a list of texts");
    }

    #[test]
    fn what_is_not_read_is_refused_with_its_path() {
        assert_eq!(told(read(json!({"y": 1}), |p| p.flag("x", true))), "y: 1: one of the parameters x");
        assert_eq!(told(read(json!({"y": 1}), |_| Ok(()))), "y: 1: no parameter");
        let inner = read(json!({"a": {"y": 1}}), |p| p.nested("a", |p| p.flag("x", true)));
        assert_eq!(told(inner), "a.y: 1: one of the parameters x");
        assert_eq!(told(read(json!({"a": 1}), |p| p.nested("a", |p| p.flag("x", true)))), "a: 1: a mapping");
    }

    #[test]
    fn producers_are_named_by_type() {
        let check = |name: &str, expect: &str| {
            let found = read(json!({"prefixMatchInfoProducerName": name}), |p| p.prefix_producer());
            assert_eq!(told(found), expect);
        };
        check("approx-prefix-cache-producer", "good");
        check("", "good");
        check("precise-prefix-cache-producer", "good");
        check(
            "other",
            "prefixMatchInfoProducerName: \"other\": approx-prefix-cache-producer or precise-prefix-cache-producer",
        );
    }
}
