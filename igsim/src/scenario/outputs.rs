//! Where spans and metrics go: collectors, and files of bounded size.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::units::HumanDur;

/// An OTLP receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Otlp {
    /// Its address, for example `http://localhost:4317`.
    pub url: String,
    /// The protocol; by the port when absent: 4317 is gRPC, everything else HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<OtlpProtocol>,
    /// What encodes the spans: `direct` from the record where there are records, `sdk` under the eager recorder, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<OtlpEncoding>,
    /// How bodies are compressed; `OTEL_EXPORTER_OTLP_COMPRESSION` decides when absent, else not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Headers of every request beside those of `OTEL_EXPORTER_OTLP_HEADERS`, for example `authorization: "Basic ${LANGFUSE_AUTH}"`. Every
    /// value takes something from the environment, `${NAME}`: secrets do not stand in files.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// PEM file with the only certificate authorities that are believed; those of the web when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// How bodies are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// With gzip.
    Gzip,
    /// Not at all.
    None,
}

/// What turns spans into OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpEncoding {
    /// opentelemetry-otlp.
    Sdk,
    /// Straight from the record; not with the eager recorder.
    Direct,
}

/// How OTLP is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// Protobuf over HTTP.
    #[serde(rename = "http/protobuf")]
    HttpProtobuf,
}

/// Trace files of bounded size: `traces.otlp.jsonl`, and full ones beside it, `traces.otlp.jsonl.1` the newest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RotatingFile {
    /// The most bytes of a file.
    #[schemars(range(min = 1))]
    pub max_bytes: u64,
    /// How many full files are kept.
    #[serde(default = "five")]
    #[schemars(range(max = 1000))]
    pub keep: u32,
}

/// Where metrics are pushed to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// OTLP receivers; `OTEL_METRICS_EXPORTER` decides when absent, else there are none. They have no encoding of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp: Option<Vec<Otlp>>,
    /// Time between two pushes: `OTEL_METRIC_EXPORT_INTERVAL` when absent, else 60s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<HumanDur>,
}

fn five() -> u32 {
    5
}
