//! Metrics as text: Prometheus' own format, and OpenMetrics where the reader asks for it.
//!
//! Formats: Prometheus "Text-based format" 0.0.4, OpenMetrics 1.0.0. Only the second one has units, exemplars and an end.

use std::fmt::{Display, Write};

use http::HeaderMap;
use http::header::ACCEPT;

use crate::metrics::{Distribution, Exemplar, Family, Kind, Label, Value, names};
use crate::time::Anchor;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

/// The media type of OpenMetrics, without parameters.
const OPEN_METRICS: &str = "application/openmetrics-text";

impl Format {
    /// The format that a reader with these headers gets: OpenMetrics only if its `Accept` names it with a weight above 0.
    pub fn asked(headers: &HeaderMap) -> Format {
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
        let wanted = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let weight = |p: &str| p.strip_prefix("q=").and_then(|q| q.parse::<f64>().ok());
            parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case(OPEN_METRICS))
                && parts.find_map(weight).is_none_or(|q| q > 0.0)
        };
        if accepted.into_iter().any(wanted) { Format::OpenMetrics } else { Format::Prometheus }
    }

    /// The value of `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The metrics as text; `anchor` is where the exemplars' time zero lies.
    pub fn write(self, families: &[Family], anchor: Anchor) -> String {
        let mut page = Page { format: self, anchor, out: String::with_capacity(16 * 1024) };
        families.iter().for_each(|family| page.family(family));
        if self == Format::OpenMetrics {
            page.out.push_str("# EOF\n");
        }
        page.out
    }
}

struct Page {
    format: Format,
    anchor: Anchor,
    out: String,
}

impl Page {
    fn family(&mut self, family: &Family) {
        let def = &family.def;
        let name = names::family(def);
        let kind = match def.kind {
            Kind::Counter => "counter",
            Kind::UpDownCounter | Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let sample = if def.kind == Kind::Counter { format!("{name}_total") } else { name.clone() };
        let title = match self.format {
            Format::Prometheus => &sample,
            Format::OpenMetrics => &name,
        };
        // Writing to a string does not fail.
        let _ = writeln!(self.out, "# HELP {title} {}", escaped(def.brief, false));
        let _ = writeln!(self.out, "# TYPE {title} {kind}");
        if let (Format::OpenMetrics, Some(unit)) = (self.format, names::unit(def)) {
            let _ = writeln!(self.out, "# UNIT {title} {unit}");
        }
        for point in &family.points {
            match &point.value {
                Value::Int(v) => self.sample(&sample, &point.labels, None, v, None),
                Value::Double(v) => self.sample(&sample, &point.labels, None, v, None),
                Value::Histogram(h) => self.histogram(&name, &point.labels, h),
            }
        }
    }

    fn histogram(&mut self, name: &str, labels: &[Label], h: &Distribution) {
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (i, count) in h.counts.iter().enumerate() {
            below += count;
            let le = h.bounds.get(i).map_or_else(|| "+Inf".to_owned(), |bound| self.bound(*bound));
            let exemplar = h.exemplars.iter().find(|(place, _)| *place == i).map(|(_, e)| e);
            self.sample(&bucket, labels, Some(&le), below, exemplar);
        }
        self.sample(&format!("{name}_sum"), labels, None, h.sum, None);
        self.sample(&format!("{name}_count"), labels, None, below, None);
    }

    /// OpenMetrics wants the bounds as numbers with a point.
    fn bound(&self, bound: f64) -> String {
        match self.format {
            Format::OpenMetrics if bound.fract() == 0.0 => format!("{bound:.1}"),
            Format::OpenMetrics | Format::Prometheus => bound.to_string(),
        }
    }

    fn sample(
        &mut self,
        name: &str,
        labels: &[Label],
        le: Option<&str>,
        value: impl Display,
        exemplar: Option<&Exemplar>,
    ) {
        self.out.push_str(name);
        let mut separator = '{';
        let mut put = |out: &mut String, key: &str, value: &str| {
            let _ = write!(out, "{separator}{key}=\"{}\"", escaped(value, true));
            separator = ',';
        };
        labels.iter().for_each(|(key, value)| put(&mut self.out, &names::label(key), value));
        if let Some(le) = le {
            put(&mut self.out, "le", le);
        }
        if separator == ',' {
            self.out.push('}');
        }
        let _ = write!(self.out, " {value}");
        if let (Format::OpenMetrics, Some(e)) = (self.format, exemplar) {
            let (trace, span) = (e.place.trace_id, e.place.span_id);
            let ns = self.anchor.unix_nanos(e.at);
            let (s, ms) = (ns / 1_000_000_000, ns / 1_000_000 % 1_000);
            let _ = write!(self.out, " # {{trace_id=\"{trace}\",span_id=\"{span}\"}} {} {s}.{ms:03}", e.value);
        }
        self.out.push('\n');
    }
}

/// Text within a line, or within quotes.
fn escaped(text: &str, quoted: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quoted { text.replace('"', "\\\"") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{SpanId, TraceId};
    use crate::metrics::{Def, Histogram, Key, Place, Point};
    use crate::time::{Dur, Time};

    fn families() -> Vec<Family> {
        let histogram = Histogram::seconds(&[0.5, 1.0]);
        let place = Place { trace_id: TraceId::new(0xabc).unwrap(), span_id: SpanId::new(0xdef).unwrap() };
        histogram.record(Dur::from_millis(750), Some((place, Time::from_nanos(2_500_000_000))));
        histogram.record(Dur::from_secs(2), None);
        let counter = Def::new(Kind::Counter, "x.done", "{request}", "Done, by \\ route.");
        let points = vec![Point::with(Key::of("http.route"), "a \"b\"\n", 3u64)];
        vec![
            counter.family(points),
            Def::new(Kind::UpDownCounter, "x.open", "{request}", "Open.").alone(-1i64),
            Def::new(Kind::Histogram, "x.time", "s", "Time.").alone(histogram.read()),
        ]
    }

    #[test]
    fn prometheus() {
        let text = Format::Prometheus.write(&families(), Anchor::from_unix_nanos(0));
        insta::assert_snapshot!(text, @r#"
        # HELP x_done_total Done, by \\ route.
        # TYPE x_done_total counter
        x_done_total{http_route="a \"b\"\n"} 3
        # HELP x_open Open.
        # TYPE x_open gauge
        x_open -1
        # HELP x_time_seconds Time.
        # TYPE x_time_seconds histogram
        x_time_seconds_bucket{le="0.5"} 0
        x_time_seconds_bucket{le="1"} 1
        x_time_seconds_bucket{le="+Inf"} 2
        x_time_seconds_sum 2.75
        x_time_seconds_count 2
        "#);
    }

    #[test]
    fn open_metrics() {
        let text = Format::OpenMetrics.write(&families(), Anchor::from_unix_nanos(1_000_000_000));
        insta::assert_snapshot!(text, @r##"
        # HELP x_done Done, by \\ route.
        # TYPE x_done counter
        x_done_total{http_route="a \"b\"\n"} 3
        # HELP x_open Open.
        # TYPE x_open gauge
        x_open -1
        # HELP x_time_seconds Time.
        # TYPE x_time_seconds histogram
        # UNIT x_time_seconds seconds
        x_time_seconds_bucket{le="0.5"} 0
        x_time_seconds_bucket{le="1.0"} 1 # {trace_id="00000000000000000000000000000abc",span_id="0000000000000def"} 0.75 3.500
        x_time_seconds_bucket{le="+Inf"} 2
        x_time_seconds_sum 2.75
        x_time_seconds_count 2
        # EOF
        "##);
    }

    #[test]
    fn the_reader_says_what_it_understands() {
        let check = |accept: Option<&str>, expect: Format| {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(ACCEPT, accept.parse().unwrap());
            }
            assert_eq!(Format::asked(&headers), expect, "{accept:?}");
        };
        check(None, Format::Prometheus);
        check(Some("*/*"), Format::Prometheus);
        check(Some("text/plain;version=0.0.4"), Format::Prometheus);
        check(Some("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2"), Format::OpenMetrics);
        check(Some("text/plain, application/openmetrics-text"), Format::OpenMetrics);
        check(Some("application/openmetrics-text;q=0"), Format::Prometheus);
    }
}
