//! Metrics straight to OTLP protobuf (`opentelemetry.proto.collector.metrics.v1.ExportMetricsServiceRequest`).
//!
//! Field numbers are those of opentelemetry-proto 1.x (`metrics/v1/metrics.proto`). All series are cumulative from the service's start,
//! which the instruments are too, so nothing is kept between two pushes.

use crate::metrics::{Distribution, Exemplar, Family, Kind, Label, Point, Value};
use crate::time::{Anchor, Time};
use crate::trace::Resource;
use crate::trace::fold::Val;
use crate::trace::otlp_bytes::wire;
use crate::trace::otlp_json::SCOPE_NAME;

/// `ExportMetricsServiceRequest.resource_metrics`, and its first field, `ResourceMetrics.resource`
const FIRST: u8 = 0x0a;
/// `ResourceMetrics.scope_metrics`, and `ScopeMetrics.metrics`
const SECOND: u8 = 0x12;
/// `Metric.unit`
const UNIT: u8 = 0x1a;
/// `Metric.gauge`
const GAUGE: u8 = 0x2a;
/// `Metric.sum`
const SUM: u8 = 0x3a;
/// `Metric.histogram`
const HISTOGRAM: u8 = 0x4a;
/// `Sum.aggregation_temporality` and `Histogram.aggregation_temporality`, cumulative
const CUMULATIVE: [u8; 2] = [0x10, 2];
/// `Sum.is_monotonic`, true
const MONOTONIC: [u8; 2] = [0x18, 1];
/// `NumberDataPoint.start_time_unix_nano` and `HistogramDataPoint.start_time_unix_nano`
const START: u8 = 0x11;
/// `NumberDataPoint.time_unix_nano` and `HistogramDataPoint.time_unix_nano`
const TIME: u8 = 0x19;
/// `NumberDataPoint.as_double`
const AS_DOUBLE: u8 = 0x21;
/// `NumberDataPoint.as_int`
const AS_INT: u8 = 0x31;
/// `NumberDataPoint.attributes`
const NUMBER_ATTRIBUTE: u8 = 0x3a;
/// `HistogramDataPoint.count`
const COUNT: u8 = 0x21;
/// `HistogramDataPoint.sum`
const TOTAL: u8 = 0x29;
/// `HistogramDataPoint.bucket_counts`
const BUCKETS: u8 = 0x32;
/// `HistogramDataPoint.explicit_bounds`
const BOUNDS: u8 = 0x3a;
/// `HistogramDataPoint.exemplars`
const EXEMPLAR: u8 = 0x42;
/// `HistogramDataPoint.attributes`
const HISTOGRAM_ATTRIBUTE: u8 = 0x4a;
/// `Exemplar.time_unix_nano`
const EXEMPLAR_TIME: u8 = 0x11;
/// `Exemplar.as_double`
const EXEMPLAR_VALUE: u8 = 0x19;
/// `Exemplar.span_id`
const EXEMPLAR_SPAN: u8 = 0x22;
/// `Exemplar.trace_id`
const EXEMPLAR_TRACE: u8 = 0x2a;

/// A request with `families` as they are at `now`; time zero is at `anchor` and is when the counting began.
pub fn encode(families: &[Family], resource: &Resource, anchor: Anchor, now: Time) -> Vec<u8> {
    let writer = Writer { start: anchor.unix_nanos(Time::ZERO), now: anchor.unix_nanos(now), anchor };
    let mut out = Vec::with_capacity(16 * 1024);
    wire::message(&mut out, FIRST, |out| {
        wire::message(out, FIRST, |out| {
            let attributes = resource.attributes();
            attributes.iter().for_each(|(key, value)| wire::owned_attribute(out, FIRST, key, value));
        });
        wire::message(out, SECOND, |out| {
            wire::message(out, FIRST, |out| {
                wire::text(out, FIRST, SCOPE_NAME);
                wire::text(out, SECOND, env!("CARGO_PKG_VERSION"));
            });
            families.iter().for_each(|family| writer.metric(out, family));
        });
    });
    out
}

/// How many series there are.
pub fn points(families: &[Family]) -> usize {
    families.iter().map(|f| f.points.len()).sum()
}

struct Writer {
    start: u64,
    now: u64,
    anchor: Anchor,
}

impl Writer {
    fn metric(&self, out: &mut Vec<u8>, family: &Family) {
        let def = &family.def;
        wire::message(out, SECOND, |out| {
            wire::text(out, FIRST, def.name);
            wire::text(out, SECOND, def.brief);
            wire::text(out, UNIT, def.unit);
            let (tag, after): (u8, &[&[u8]]) = match def.kind {
                Kind::Gauge => (GAUGE, &[]),
                Kind::Counter => (SUM, &[&CUMULATIVE, &MONOTONIC]),
                Kind::UpDownCounter => (SUM, &[&CUMULATIVE]),
                Kind::Histogram => (HISTOGRAM, &[&CUMULATIVE]),
            };
            wire::message(out, tag, |out| {
                family.points.iter().for_each(|point| self.point(out, point));
                after.iter().for_each(|field| out.extend_from_slice(field));
            });
        });
    }

    fn point(&self, out: &mut Vec<u8>, point: &Point) {
        wire::message(out, FIRST, |out| {
            fixed(out, START, self.start);
            fixed(out, TIME, self.now);
            match &point.value {
                Value::Int(v) => fixed(out, AS_INT, *v as u64),
                Value::Double(v) => fixed(out, AS_DOUBLE, v.to_bits()),
                Value::Histogram(h) => self.histogram(out, h),
            }
            let tag = match point.value {
                Value::Int(_) | Value::Double(_) => NUMBER_ATTRIBUTE,
                Value::Histogram(_) => HISTOGRAM_ATTRIBUTE,
            };
            point.labels.iter().for_each(|label| attribute(out, tag, label));
        });
    }

    fn histogram(&self, out: &mut Vec<u8>, h: &Distribution) {
        fixed(out, COUNT, h.count());
        fixed(out, TOTAL, h.sum.to_bits());
        packed(out, BUCKETS, h.counts.iter().copied());
        packed(out, BOUNDS, h.bounds.iter().map(|b| b.to_bits()));
        h.exemplars.iter().for_each(|(_, e)| self.exemplar(out, e));
    }

    fn exemplar(&self, out: &mut Vec<u8>, exemplar: &Exemplar) {
        wire::message(out, EXEMPLAR, |out| {
            fixed(out, EXEMPLAR_TIME, self.anchor.unix_nanos(exemplar.at));
            fixed(out, EXEMPLAR_VALUE, exemplar.value.to_bits());
            let (trace, span) = (exemplar.place.trace_id.get(), exemplar.place.span_id.get());
            out.extend_from_slice(&[EXEMPLAR_SPAN, 8]);
            out.extend_from_slice(&span.to_be_bytes());
            out.extend_from_slice(&[EXEMPLAR_TRACE, 16]);
            out.extend_from_slice(&trace.to_be_bytes());
        });
    }
}

/// Eight bytes.
fn fixed(out: &mut Vec<u8>, tag: u8, value: u64) {
    out.push(tag);
    out.extend_from_slice(&value.to_le_bytes());
}

fn packed(out: &mut Vec<u8>, tag: u8, values: impl ExactSizeIterator<Item = u64>) {
    wire::prefix(out, tag, values.len() * 8);
    values.for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn attribute(out: &mut Vec<u8>, tag: u8, (key, value): &Label) {
    wire::attribute(out, tag, key.attribute, Val::Text(value));
}
