//! What the telemetry path says of itself: spans made, exported and lost by reason, how long exports take, how long the queues are.
//!
//! The names are those of OpenTelemetry's semantic conventions for SDKs (`otel.sdk.*`), where they have one.

use std::borrow::Cow;
use std::sync::Arc;

use crate::metrics::{Def, Family, Key, Kind, Label, Point, Value};
use crate::trace::Stats;
use crate::trace::stats::ExporterCounters;

/// Bounds of the durations of exports in seconds, those of `http.client.request.duration`.
pub(crate) const EXPORT_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

const STARTED: Def = Def::new(Kind::Counter, "otel.sdk.span.started", "{span}", "Spans made of records.");
const RECORDS: Def = Def::new(
    Kind::Counter,
    "igsim.telemetry.records",
    "{record}",
    "Records of requests that ended, by what became of them.",
);
const ABANDONED: Def =
    Def::new(Kind::Counter, "igsim.telemetry.records.abandoned", "{record}", "Records that nobody finished.");
const FACTS_CUT: Def =
    Def::new(Kind::Counter, "igsim.telemetry.facts.cut", "{fact}", "Facts that did not fit into their record.");
const PROCESSED: Def = Def::new(
    Kind::Counter,
    "otel.sdk.processor.span.processed",
    "{span}",
    "Spans handed to an exporter, or dropped before it because its queue was full.",
);
const QUEUE_SIZE: Def = Def::new(
    Kind::UpDownCounter,
    "otel.sdk.processor.span.queue.size",
    "{span}",
    "Spans that wait for an exporter or are being exported.",
);
const QUEUE_CAPACITY: Def = Def::new(
    Kind::UpDownCounter,
    "otel.sdk.processor.span.queue.capacity",
    "{span}",
    "Spans that may wait for an exporter.",
);
const EXPORTED: Def =
    Def::new(Kind::Counter, "otel.sdk.exporter.span.exported", "{span}", "Spans whose export has ended, by how.");
const DURATION: Def =
    Def::new(Kind::Histogram, "otel.sdk.exporter.operation.duration", "s", "Time of one export, with its retries.");

const ERROR: Key = Key::of("error.type");
const NAME: Key = Key::of("otel.component.name");
const TYPE: Key = Key::of("otel.component.type");

/// All of it, as it is now.
pub(crate) fn families(stats: &Stats, exporters: &[Arc<ExporterCounters>]) -> Vec<Family> {
    let mut all = vec![
        STARTED.alone(stats.spans_created),
        RECORDS.family(vec![
            Point { labels: Vec::new(), value: stats.records_folded.into() },
            Point::with(ERROR, "queue_full", stats.records_dropped),
            Point::with(ERROR, "fold_failed", stats.records_failed),
        ]),
        ABANDONED.alone(stats.records_abandoned),
        FACTS_CUT.alone(stats.facts_cut),
    ];
    let each = |of: &dyn Fn(usize, &ExporterCounters, &mut Vec<Point>)| {
        let mut points = Vec::new();
        exporters.iter().enumerate().for_each(|(i, exporter)| of(i, exporter, &mut points));
        points
    };
    let point = |labels: Vec<Label>, value: Value| Point { labels, value };
    all.push(EXPORTED.family(each(&|i, exporter, points| {
        let stats = exporter.stats();
        points.push(point(exporter_labels(i, exporter), stats.exported.into()));
        for (why, n) in [("export_failed", stats.dropped.export_failed), ("shutdown", stats.dropped.shutdown)] {
            points.push(point(with(exporter_labels(i, exporter), ERROR, why), n.into()));
        }
    })));
    all.push(PROCESSED.family(each(&|i, exporter, points| {
        let stats = exporter.stats();
        let passed = stats.exported + stats.dropped.export_failed + stats.dropped.shutdown;
        points.push(point(processor_labels(i), passed.into()));
        points.push(point(with(processor_labels(i), ERROR, "queue_full"), stats.dropped.queue_full.into()));
    })));
    all.push(QUEUE_SIZE.family(each(&|i, exporter, points| {
        points.extend(exporter.queue().map(|(size, _)| point(processor_labels(i), size.into())));
    })));
    all.push(QUEUE_CAPACITY.family(each(&|i, exporter, points| {
        points.extend(exporter.queue().map(|(_, most)| point(processor_labels(i), most.into())));
    })));
    all.push(DURATION.family(each(&|i, exporter, points| {
        points.extend(exporter.durations().map(|d| point(exporter_labels(i, exporter), d.into())));
    })));
    all.retain(|family| !family.points.is_empty());
    all
}

/// The values are those that the semantic conventions ask for: the type, and the type with a number.
fn exporter_labels(i: usize, exporter: &ExporterCounters) -> Vec<Label> {
    let kind = match exporter.name() {
        name if name.starts_with("otlp grpc") => "otlp_grpc_span_exporter",
        name if name.starts_with("otlp ") => "otlp_http_span_exporter",
        name if name.starts_with("file ") => "otlp_file_span_exporter",
        name if name.starts_with("console") => "console_span_exporter",
        _ => "span_exporter",
    };
    component(kind, i)
}

fn processor_labels(i: usize) -> Vec<Label> {
    component("batching_span_processor", i)
}

fn component(kind: &'static str, i: usize) -> Vec<Label> {
    vec![(NAME, Cow::Owned(format!("{kind}/{i}"))), (TYPE, Cow::Borrowed(kind))]
}

fn with(mut labels: Vec<Label>, key: Key, value: &'static str) -> Vec<Label> {
    labels.push((key, Cow::Borrowed(value)));
    labels
}
