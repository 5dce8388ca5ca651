//! OTLP in JSON: one `TracesData` object per line, as the OpenTelemetry Collector's file exporter writes it.
//!
//! Ids are lower-case hex, 64-bit integers are strings, enums are numbers (OTLP specification, JSON protobuf encoding).
//! [`write()`] makes our own lines; [`read_file`] takes those of a Collector and the answers of Tempo's API as well.

mod read;
mod write;

pub use read::{ReadError, read_file, read_str};
pub(crate) use write::{HAS_IS_REMOTE, IS_REMOTE, SAMPLED, kind_number};
pub use write::{SCOPE_NAME, write};
