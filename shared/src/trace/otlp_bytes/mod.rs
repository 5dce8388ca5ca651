//! Records straight to OTLP protobuf (`opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest`), without spans in between.
//!
//! [`Encoder`] is a [`Form`](crate::trace::Form) that a record folds into; [`Requests`] collects what it writes into requests of
//! a bounded number of spans. What comes out decodes to what the SDK's exporter sends for the same record, field order aside.
//! Knows no transport and no clock.

mod encoder;
mod requests;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

pub use encoder::{Encoder, SpanBytes};
pub use requests::{Encoded, Requests};
