//! What Langfuse wants to know of a generation beside OpenTelemetry's attributes: prices, and times as text.
//!
//! Langfuse reads OTLP traces; how is written down in docs/langfuse.md. Its time to first token comes from a text in ISO 8601, so the wall
//! clock has to be known where spans are folded, and what shifts the times of spans has to shift that text too.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::{ConfigErrors, Problems, Validate};
use crate::time::Anchor;

/// The attribute that says when the first token was there.
pub const COMPLETION_START: &str = "langfuse.observation.completion_start_time";

/// The model that stands for all others in a table of prices.
const ANY: &str = "*";

/// What spans say to Langfuse.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Langfuse {
    prices: BTreeMap<String, Price>,
}

/// A table of prices.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PriceTable {
    /// Prices by model; `*` stands for all models that are not named.
    prices: BTreeMap<String, Price>,
}

/// What a model costs, in US dollars per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Tokens of prompts.
    pub input: f64,
    /// Tokens of outputs.
    pub output: f64,
    /// Tokens of prompts that were found in the cache; as much as others when absent.
    #[serde(default)]
    pub cached_input: Option<f64>,
}

/// How a request is a generation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generation {
    /// Where the record's time zero lies.
    pub anchor: Anchor,
    /// What its tokens cost, if that is known.
    pub price: Option<Price>,
    /// Whether it only prefills for another engine, whose request is the generation then.
    pub prefills: bool,
}

impl Validate for PriceTable {
    fn validate(&self, problems: &mut Problems) {
        for (model, price) in &self.prices {
            for (name, usd) in
                [("input", Some(price.input)), ("output", Some(price.output)), ("cached_input", price.cached_input)]
            {
                let good = usd.is_none_or(|usd| usd.is_finite() && usd >= 0.0);
                let found = usd.unwrap_or_default();
                problems.check(good, &format!("prices.{model}.{name}"), found, "dollars per million tokens, 0 or more");
            }
        }
    }
}

impl Langfuse {
    /// Without prices.
    pub fn new() -> Langfuse {
        Langfuse::default()
    }

    /// With the prices in a YAML file.
    ///
    /// # Errors
    /// If the file cannot be read or has prices that are none.
    pub fn with_prices(path: &Path) -> Result<Langfuse, ConfigErrors> {
        let table = crate::config::load::<PriceTable>(path, &[])?.config;
        Ok(Langfuse { prices: table.prices })
    }

    /// What a model's tokens cost.
    pub fn price(&self, model: &str) -> Option<Price> {
        self.prices.get(model).or_else(|| self.prices.get(ANY)).copied()
    }
}

/// What the parts of a generation cost, in US dollars.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// The part of the prompt that was computed.
    pub input: f64,
    /// The part of the prompt that was in the cache.
    pub cached: f64,
    /// The output.
    pub output: f64,
}

impl Price {
    /// What so many tokens cost; `cached` of the `input` tokens were in the cache.
    pub fn of(&self, input: u32, cached: u32, output: u32) -> Cost {
        let cached = cached.min(input);
        let million = |tokens: u32, usd: f64| f64::from(tokens) * usd / 1e6;
        Cost {
            input: million(input - cached, self.input),
            cached: million(cached, self.cached_input.unwrap_or(self.input)),
            output: million(output, self.output),
        }
    }
}

/// A moment as ISO 8601 with nanoseconds, in UTC.
pub fn iso8601(unix_nanos: u64) -> String {
    let (days, of_day) = (unix_nanos / DAY, unix_nanos % DAY);
    let (year, month, day) = civil(days);
    let (seconds, nanos) = (of_day / 1_000_000_000, of_day % 1_000_000_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// The same moment after times were shifted from one anchor to another; `None` if it is not as [`iso8601`] writes it.
pub fn shifted(moment: &str, from: Anchor, to: Anchor) -> Option<String> {
    let numbers: Vec<&str> = moment.strip_suffix('Z')?.split(['-', 'T', ':', '.']).collect();
    let [year, month, day, hour, minute, second, nanos] = numbers[..] else { return None };
    let number = |text: &str| text.parse::<u64>().ok();
    let days = days_of(number(year)?, number(month)?, number(day)?)?;
    let seconds = number(hour)? * 3_600 + number(minute)? * 60 + number(second)?;
    let nanos = days * DAY + seconds * 1_000_000_000 + number(nanos)?;
    let zero = crate::time::Time::ZERO;
    Some(iso8601(nanos.saturating_sub(from.unix_nanos(zero)) + to.unix_nanos(zero)))
}

/// A day in nanoseconds.
const DAY: u64 = 86_400_000_000_000;

/// The date so many days after 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to a date from then on (`days_from_civil`).
fn days_of(year: u64, month: u64, day: u64) -> Option<u64> {
    let year = if month <= 2 { year.checked_sub(1)? } else { year };
    let (era, of_era) = (year / 400, year % 400);
    let month = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * month + 2) / 5 + day.checked_sub(1)?;
    (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year).checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_and_shifted() {
        let check = |seconds: u64, expect: &str| assert_eq!(iso8601(seconds * 1_000_000_000), expect);
        check(0, "1970-01-01T00:00:00.000000000Z");
        check(951_782_399, "2000-02-28T23:59:59.000000000Z");
        check(951_782_400, "2000-02-29T00:00:00.000000000Z");
        check(1_767_225_600, "2026-01-01T00:00:00.000000000Z");
        check(4_107_542_400, "2100-03-01T00:00:00.000000000Z");
        let at = |ns| Anchor::from_unix_nanos(ns);
        let moment = iso8601(1_767_225_600_000_000_005);
        assert_eq!(shifted(&moment, Anchor::VIRTUAL, Anchor::VIRTUAL).as_ref(), Some(&moment));
        assert_eq!(shifted(&moment, Anchor::VIRTUAL, at(DAY)).as_deref(), Some("1970-01-02T00:00:00.000000005Z"));
        assert_eq!(shifted("yesterday", at(0), at(0)), None);
        for days in (0..60_000).step_by(7) {
            let (year, month, day) = civil(days);
            assert_eq!(days_of(year, month, day), Some(days));
        }
    }

    #[test]
    fn prices_are_per_million_tokens() {
        let price = Price { input: 2.0, output: 10.0, cached_input: Some(0.5) };
        assert_eq!(price.of(1_000, 400, 100), Cost { input: 0.0012, cached: 0.0002, output: 0.001 });
        let price = Price { cached_input: None, ..price };
        assert_eq!(price.of(1_000, 5_000, 0), Cost { input: 0.0, cached: 0.002, output: 0.0 });
    }

    #[test]
    fn a_table_names_models_or_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prices.yaml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Langfuse::with_prices(&path)
        };
        let table = read("prices:\n  m: { input: 1, output: 2 }\n  '*': { input: 3, output: 4 }\n").unwrap();
        assert_eq!((table.price("m").unwrap().input, table.price("x").unwrap().input), (1.0, 3.0));
        assert_eq!(read("prices: { m: { input: 1, output: 2 } }").unwrap().price("x"), None);
        let told = read("prices: { m: { input: -1, output: 2 } }").unwrap_err().to_string();
        assert!(told.contains("prices.m.input") && told.contains("dollars per million tokens"), "{told}");
        assert!(read("models: {}").is_err());
    }
}
