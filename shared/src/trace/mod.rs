//! The one telemetry path: facts recorded where they happen, folded into spans in the background.
//!
//! A sampled request owns a [`Trail`]; an unsampled one carries [`Trail::off`], one branch at every recording site. When the
//! request ends its record goes through the pipeline to a worker, which folds it into [`span::Span`]s and hands them to the
//! exporters. Nothing in here reads a clock or blocks the request.

pub mod record;
pub mod span;

pub use record::{Fact, Head, Record, Sink, Trail};
pub use span::{Event, Kind, Link, Span, Status, Value};
