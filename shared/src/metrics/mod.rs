//! Metrics: cumulative instruments that cost an atomic addition, and what is made of them when somebody asks.
//!
//! Whoever counts keeps [`Counter`]s and [`Histogram`]s; at a scrape or a push it turns them into [`Family`]s, which become
//! Prometheus text ([`text`]) or an OTLP request ([`otlp`], [`push`]). Names, units and labels are OpenTelemetry's; what Prometheus calls
//! them follows from the mapping in `names`. Nothing here reads a clock but the thread that pushes.

mod instruments;
mod names;
pub mod otlp;
pub mod push;
pub mod telemetry;
pub mod text;

use std::borrow::Cow;
use std::sync::Arc;

use crate::ids::{SpanId, TraceId};
use crate::time::Time;

pub use instruments::{Counter, Histogram};
pub use push::Pusher;

/// What a metric is, as `registry/metrics.yaml` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Def {
    /// OpenTelemetry name, for example `gen_ai.server.request.duration`.
    pub name: &'static str,
    /// Unit in UCUM, for example `s`, `By` or `{request}`.
    pub unit: &'static str,
    /// The instrument.
    pub kind: Kind,
    /// What it says, for people.
    pub brief: &'static str,
}

/// Instruments of OpenTelemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    UpDownCounter,
    /// A value of the moment.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// A metric with all of its series.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// What it is.
    pub def: Def,
    /// Its series, in a fixed order.
    pub points: Vec<Point>,
}

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// What tells it from the other series of its metric; few values each.
    pub labels: Vec<Label>,
    /// Its value.
    pub value: Value,
}

/// A label: its key, and a value of a bounded set.
pub type Label = (Key, Cow<'static, str>);

/// A label's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The attribute in OpenTelemetry.
    pub attribute: &'static str,
    /// The label in Prometheus, where it is not the attribute's name with underscores.
    pub label: Option<&'static str>,
}

impl Key {
    /// A key whose label follows from the attribute's name.
    pub const fn of(attribute: &'static str) -> Key {
        Key { attribute, label: None }
    }

    /// A key with a label of its own.
    pub const fn called(attribute: &'static str, label: &'static str) -> Key {
        Key { attribute, label: Some(label) }
    }
}

/// The value of a series.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// A histogram.
    Histogram(Distribution),
}

/// A histogram as it was at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Upper bounds of the buckets, each inclusive; a last bucket has no bound.
    pub bounds: &'static [f64],
    /// Counts by bucket, one more than there are bounds.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
    /// For some buckets, a value whose trace is kept: the bucket and the newest such value.
    pub exemplars: Vec<(usize, Exemplar)>,
}

impl Distribution {
    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A value and the trace it comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    /// Where to find it.
    pub place: Place,
    /// The value.
    pub value: f64,
    /// When it was recorded.
    pub at: Time,
}

/// A span of a trace that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The trace.
    pub trace_id: TraceId,
    /// The span.
    pub span_id: SpanId,
}

impl Place {
    /// Where a request is found that began like this; `None` if its trace is not kept.
    pub fn of(started: Option<&crate::trace::Started>) -> Option<Place> {
        let context = &started?.context;
        context.sampled.then_some(Place { trace_id: context.trace_id, span_id: context.span_id })
    }
}

/// Gives all metrics of a service at the moment of the call.
pub type Source = Arc<dyn Fn() -> Vec<Family> + Send + Sync>;

impl Def {
    /// A metric of this kind.
    pub const fn new(kind: Kind, name: &'static str, unit: &'static str, brief: &'static str) -> Def {
        Def { name, unit, kind, brief }
    }

    /// The metric with one series without labels.
    pub fn alone(self, value: impl Into<Value>) -> Family {
        self.family(vec![Point { labels: Vec::new(), value: value.into() }])
    }

    /// The metric with these series.
    pub fn family(self, points: Vec<Point>) -> Family {
        Family { def: self, points }
    }
}

impl Point {
    /// A series with one label.
    pub fn with(key: Key, label: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> Point {
        Point { labels: vec![(key, label.into())], value: value.into() }
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Value {
        Value::Int(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Value {
        Value::Double(value)
    }
}

impl From<Distribution> for Value {
    fn from(value: Distribution) -> Value {
        Value::Histogram(value)
    }
}
