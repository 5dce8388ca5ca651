//! The one telemetry path: facts recorded where they happen, folded into spans in the background.
//!
//! A sampled request owns a [`Trail`]; an unsampled one carries [`Trail::off`], one branch at every recording site. When the
//! request ends its record goes through the [`pipeline`] to a worker, which folds it into [`span::Span`]s and hands them to the
//! exporters. Nothing in here reads a clock or blocks the request.

mod arrival;
mod cell;
pub mod check;
pub mod config;
pub mod context;
mod eager;
pub mod edge;
mod env;
pub mod exporter;
pub mod fold;
mod handover;
mod held;
mod id_source;
pub mod langfuse;
pub mod naming;
pub mod otlp_bytes;
pub mod otlp_json;
mod otlp_url;
mod own;
mod panic;
pub mod pipeline;
pub mod policy;
pub mod record;
pub mod registry;
pub mod resource;
pub mod sampler;
pub mod set;
mod sinks;
pub mod span;
mod spares;
pub mod stats;
pub mod tree;
pub mod verdict;
mod worker;

pub use cell::TracerCell;
pub use config::TelemetryConfig;
pub use context::TraceContext;
pub use edge::Standing;
pub use fold::{Cx, Draft, Fold, Form, Inner, LinkTo, Val};
pub use handover::{Handover, HandoverFault};
pub use naming::{Named, Naming};
pub use own::OwnTraces;
pub use panic::fold_on_panic;
pub use pipeline::{Started, Telemetry, TelemetryError, Tracer};
pub use policy::{Keep, Labels, Policy, Reason};
pub use record::{Ending, Fact, Head, Record, Sink, Trail};
pub use resource::Resource;
pub use sampler::{Ratio, Sampler, SamplerKind};
pub use set::TraceSet;
pub use span::{Event, Kind, Link, Span, Status, Value};
pub use stats::Stats;
