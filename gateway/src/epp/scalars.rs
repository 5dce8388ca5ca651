//! Numbers as Kubernetes and Go write them.

use serde_json::Value;
use shared::time::Dur;
use shared::units::HumanDur;

/// What a quantity may be.
pub(super) const QUANTITY: &str = "a quantity of at least 0 such as 5000, 1k, 500M or 1Gi";
/// What a duration may be.
pub(super) const DURATION: &str = "a duration such as 60s, 1m30s or 200ms";

const SUFFIXES: [(&str, u64); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];

/// A Kubernetes quantity, rounded up to a whole number; exponents and thousandths are not read.
pub(super) fn quantity(value: &Value) -> Option<u64> {
    let Value::String(text) = value else { return value.as_u64() };
    let (suffix, scale) = SUFFIXES.into_iter().find(|(s, _)| text.ends_with(s))?;
    let number = text.strip_suffix(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let ten = 10u128.pow(fraction.len() as u32);
    let parts = whole.parse::<u128>().ok()?.checked_mul(ten)? + fraction.parse::<u128>().ok()?;
    u64::try_from(parts.checked_mul(u128::from(scale))?.div_ceil(ten)).ok()
}

/// A Go duration: one or more numbers with units, the largest first or not.
pub(crate) fn duration(text: &str) -> Option<HumanDur> {
    if text == "0" {
        return Some(HumanDur::default());
    }
    let (mut rest, mut total) = (text, 0u64);
    loop {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = rest[number..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| number + n);
        let part = rest[..unit].replace(['µ', 'μ'], "u");
        total = total.checked_add(part.parse::<HumanDur>().ok()?.get().as_nanos())?;
        rest = &rest[unit..];
        if rest.is_empty() {
            return Some(HumanDur(Dur::from_nanos(total)));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        let check = |value: Value, expect| assert_eq!(quantity(&value), expect, "{value}");
        check(json!(5000), Some(5000));
        check(json!("100"), Some(100));
        check(json!("1k"), Some(1000));
        check(json!("500M"), Some(500_000_000));
        check(json!("1Gi"), Some(1 << 30));
        check(json!("1.5Ki"), Some(1536));
        check(json!("0.0001"), Some(1));
        for bad in [json!(-1), json!("-1"), json!("1 Gi"), json!("Gi"), json!("1.Gi"), json!("99Ei"), json!(true)] {
            check(bad, None);
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        let check = |text: &str, millis: Option<u64>| {
            assert_eq!(duration(text).map(|d| d.get().as_nanos()), millis.map(|m| m * 1_000_000), "{text}");
        };
        check("60s", Some(60_000));
        check("1m30s", Some(90_000));
        check("1.5h", Some(5_400_000));
        check("200ms", Some(200));
        check("1000µs", Some(1));
        check("0", Some(0));
        check("0s", Some(0));
        for bad in ["", "60", "s", "-1s", "1 s 2", "1d"] {
            check(bad, None);
        }
    }
}
