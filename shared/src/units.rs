//! Units as people write them in configuration files: durations such as `50ms`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::time::Dur;

/// A duration in a configuration file: a number and a unit, for example `50ms`, `1.5s` or `10m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HumanDur(pub Dur);

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not a duration: expected a number and a unit of ns, us, ms, s, m or h, for example 50ms or 1.5s")]
pub struct BadDuration {
    found: String,
}

/// Units and their length in nanoseconds, longest first.
const UNITS: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl HumanDur {
    /// A duration of `ms` milliseconds.
    pub const fn millis(ms: u64) -> HumanDur {
        HumanDur(Dur::from_millis(ms))
    }
    /// A duration of `s` seconds.
    pub const fn secs(s: u64) -> HumanDur {
        HumanDur(Dur::from_secs(s))
    }
    /// The duration itself.
    pub const fn get(self) -> Dur {
        self.0
    }
}

impl FromStr for HumanDur {
    type Err = BadDuration;

    fn from_str(text: &str) -> Result<HumanDur, BadDuration> {
        parse(text.trim()).map(|ns| HumanDur(Dur::from_nanos(ns))).ok_or_else(|| BadDuration { found: text.to_owned() })
    }
}

/// Nanoseconds of `12ms`, `1.5 s`; parts of a nanosecond are refused rather than rounded.
fn parse(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = (&text[..split], text[split..].trim_start());
    let scale = UNITS.iter().find(|(name, _)| *name == unit)?.1;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let dangling = whole.is_empty() || (number.contains('.') && fraction.is_empty());
    if dangling || fraction.len() > 13 || fraction.contains('.') {
        return None;
    }
    let digits = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = whole.parse::<u128>().ok()?.checked_mul(digits)? + fraction.parse::<u128>().unwrap_or(0);
    let ns = numerator.checked_mul(u128::from(scale))?;
    if ns.is_multiple_of(digits) { u64::try_from(ns / digits).ok() } else { None }
}

impl fmt::Display for HumanDur {
    /// In the largest unit that keeps it a whole number: what [`FromStr`] reads back exactly.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos();
        let (unit, scale) =
            UNITS.into_iter().find(|(_, scale)| ns.is_multiple_of(*scale) && ns > 0).unwrap_or(("s", 1));
        write!(f, "{}{unit}", ns / scale)
    }
}

impl fmt::Debug for HumanDur {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for HumanDur {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDur {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<HumanDur, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for HumanDur {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A number and a unit (ns, us, ms, s, m, h), for example 50ms or 1.5s.",
            "x-expected": "a duration such as 50ms or 1.5s",
            "pattern": "^[0-9]+(\\.[0-9]+)? ?(ns|us|ms|s|m|h)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_exactly_and_print_as_they_are_read() {
        let check = |text: &str, ns: u64, printed: &str| {
            let d: HumanDur = text.parse().unwrap();
            assert_eq!((d.0.as_nanos(), d.to_string().as_str()), (ns, printed), "{text}");
            assert_eq!(printed.parse::<HumanDur>().unwrap(), d);
        };
        check("50ms", 50_000_000, "50ms");
        check("1.5s", 1_500_000_000, "1500ms");
        check("0.25 us", 250, "250ns");
        check("90s", 90_000_000_000, "90s");
        check("120s", 120_000_000_000, "2m");
        check("2h", 7_200_000_000_000, "2h");
        check("0ms", 0, "0s");
    }

    #[test]
    fn anything_else_is_refused_with_what_is_allowed() {
        for bad in ["", "50", "ms", "-1s", "1.s", ".5s", "1.2.3s", "0.5ns", "5 days", "1e3s", "99999999999999h"] {
            let error = bad.parse::<HumanDur>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?} is not a duration: expected a number and a unit")), "{error}");
        }
    }
}
