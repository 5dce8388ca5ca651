//! Prometheus' text format, with numbers as vLLM's client library writes them (`floatToGoString` of prometheus_client).
//!
//! A gateway reads this page many times a second: everything goes straight into one text, which is allocated once.

use std::fmt::Write as _;

use super::help::help;
use crate::core::metrics::{Histogram, Unit};

/// A page in the making.
#[derive(Debug)]
pub struct Page {
    text: String,
    /// `model_name="..",engine="0"`.
    labels: String,
}

/// Of vLLM's own families.
const PREFIX: &str = "vllm:";

/// What a family is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Buckets, sum and count.
    Histogram,
    /// Sum and count.
    Summary,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
            Kind::Summary => "summary",
        }
    }
}

impl Page {
    /// An empty page of the engine that serves `model`. `like` is the length of a page before.
    pub fn new(model: &str, like: usize) -> Page {
        let mut labels = String::from("model_name=\"");
        push_escaped(model, &mut labels);
        labels.push_str("\",engine=\"0\"");
        Page { text: String::with_capacity(like + like / 8), labels }
    }

    /// The text.
    pub fn into_text(self) -> String {
        self.text
    }

    /// Announces a family of vLLM's, given without its prefix as everywhere here.
    pub fn head(&mut self, name: &str, kind: Kind) {
        self.announce(PREFIX, name, kind);
    }

    /// A sample with the engine's labels and, if given, one more.
    pub fn sample(&mut self, name: &str, more: Option<(&str, &str)>, value: f64) {
        self.part(name, "");
        if let Some((key, label)) = more {
            self.text.push(',');
            self.label(key, label);
        }
        self.close(value);
    }

    /// A sample of vLLM's with these labels only.
    pub fn labelled(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(PREFIX);
        self.bare(name, "", labels, value);
    }

    /// Announces a family that is not vLLM's own.
    pub fn bare_head(&mut self, name: &str, kind: Kind) {
        self.announce("", name, kind);
    }

    /// A sample of such a family, or of a part of it (`_sum`, `_count`, `_bucket`).
    pub fn bare(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        for (i, (key, label)) in labels.iter().enumerate() {
            self.text.push(if i == 0 { '{' } else { ',' });
            self.label(key, label);
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        self.text.push(' ');
        push_number(value, &mut self.text);
        self.text.push('\n');
    }

    /// A family with one sample.
    pub fn one(&mut self, name: &str, kind: Kind, value: f64) {
        self.head(name, kind);
        self.sample(name, None, value);
    }

    /// A family with a sample for each value of one label.
    pub fn by(&mut self, name: &str, kind: Kind, key: &str, samples: &[(&str, f64)]) {
        self.head(name, kind);
        for (label, value) in samples {
            self.sample(name, Some((key, label)), *value);
        }
    }

    /// A histogram.
    pub fn histogram(&mut self, name: &str, histogram: &Histogram) {
        self.head(name, Kind::Histogram);
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count;
            self.part(name, "_bucket");
            self.text.push_str(",le=\"");
            match histogram.unit {
                Unit::Time => push_seconds(*bound, &mut self.text),
                Unit::Count => push_whole(*bound, &mut self.text),
            }
            self.text.push('"');
            self.close_whole(below);
        }
        let count = histogram.count();
        self.part(name, "_bucket");
        self.text.push_str(",le=\"+Inf\"");
        self.close_whole(count);
        self.part(name, "_count");
        self.close_whole(count);
        self.part(name, "_sum");
        self.close(match histogram.unit {
            Unit::Time => histogram.sum as f64 / 1e9,
            Unit::Count => histogram.sum as f64,
        });
    }

    /// Text that is a family already.
    pub fn append(&mut self, text: &str) {
        self.text.push_str(text);
    }

    fn announce(&mut self, prefix: &str, name: &str, kind: Kind) {
        for (word, what) in [("# HELP ", help(name)), ("# TYPE ", kind.as_str())] {
            for part in [word, prefix, name, " ", what, "\n"] {
                self.text.push_str(part);
            }
        }
    }

    fn part(&mut self, name: &str, suffix: &str) {
        for part in [PREFIX, name, suffix, "{", &self.labels] {
            self.text.push_str(part);
        }
    }

    fn label(&mut self, key: &str, label: &str) {
        self.text.push_str(key);
        self.text.push_str("=\"");
        push_escaped(label, &mut self.text);
        self.text.push('"');
    }

    fn close(&mut self, value: f64) {
        self.text.push_str("} ");
        push_number(value, &mut self.text);
        self.text.push('\n');
    }

    fn close_whole(&mut self, value: u64) {
        self.text.push_str("} ");
        push_whole(value, &mut self.text);
        self.text.push('\n');
    }
}

fn push_escaped(label: &str, text: &mut String) {
    for c in label.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
}

/// From here on the client library writes `1.234567e+06`.
const LARGE: u64 = 1_000_000;

/// A number as the client library writes it: `3.0`, `0.25`, `1.5e+06`.
fn push_number(value: f64, text: &mut String) {
    if value >= 0.0 && value.fract() == 0.0 && value < 1e15 {
        push_whole(value as u64, text);
    } else if value >= LARGE as f64 && value.is_finite() {
        // Digits behind the point of a number this large are digits behind the point of its mantissa, too.
        let digits = format!("{value}");
        let point = digits.find('.').unwrap_or(digits.len());
        push_mantissa(&digits.replace('.', ""), point - 1, text);
    } else {
        let _ = write!(text, "{value:?}");
    }
}

fn push_whole(value: u64, text: &mut String) {
    if value < LARGE {
        let _ = write!(text, "{value}.0");
    } else {
        let digits = value.to_string();
        push_mantissa(&digits, digits.len() - 1, text);
    }
}

fn push_mantissa(digits: &str, exponent: usize, text: &mut String) {
    let (first, rest) = digits.split_at(1);
    let rest = rest.trim_end_matches('0');
    let point = if rest.is_empty() { "" } else { "." };
    let _ = write!(text, "{first}{point}{rest}e+{exponent:02}");
}

/// Nanoseconds as seconds, exactly: `0.02`, `1.0`.
fn push_seconds(nanos: u64, text: &mut String) {
    let (whole, mut part) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    if part == 0 {
        return push_whole(whole, text);
    }
    let mut width = 9;
    while part.is_multiple_of(10) {
        part /= 10;
        width -= 1;
    }
    let _ = write!(text, "{whole}.{part:0width$}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_look_as_the_client_library_writes_them() {
        // Left: `floatToGoString` of prometheus_client 0.26 for the number on the right.
        for (expect, value) in [
            ("0.0", 0.0),
            ("3.0", 3.0),
            ("0.25", 0.25),
            ("999999.0", 999_999.0),
            ("1e+06", 1_000_000.0),
            ("1.234567e+06", 1_234_567.0),
            ("1.5e+06", 1_500_000.0),
            ("1.2345678e+07", 12_345_678.0),
            ("1.2345675e+06", 1_234_567.5),
            ("1.79594528025e+09", 1_795_945_280.25),
        ] {
            let mut text = String::new();
            push_number(value, &mut text);
            assert_eq!(text, expect);
        }
    }

    #[test]
    fn bounds_are_exact_decimals() {
        for (expect, nanos) in [
            ("0.001", 1_000_000),
            ("0.02", 20_000_000),
            ("0.3", 300_000_000),
            ("1.0", 1_000_000_000),
            ("7.5", 7_500_000_000),
            ("2560.0", 2_560_000_000_000),
        ] {
            let mut text = String::new();
            push_seconds(nanos, &mut text);
            assert_eq!(text, expect);
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::new("a\"b\\c\nd", 0);
        page.sample("x", Some(("k", "v\"")), 1.0);
        assert_eq!(page.into_text(), "vllm:x{model_name=\"a\\\"b\\\\c\\nd\",engine=\"0\",k=\"v\\\"\"} 1.0\n");
    }
}
