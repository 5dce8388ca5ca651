//! The file as it is written: llm-d's types (`apix/config/v1alpha1`), strict about unknown keys as Kubernetes is.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The `kind` of the file.
pub(super) const KIND: &str = "EndpointPickerConfig";
/// Its `apiVersion`.
pub(super) const API_VERSION: &str = "llm-d.ai/v1alpha1";
/// Its `apiVersion` before llm-d took it over, still read.
pub(super) const OLD_API_VERSION: &str = "inference.networking.x-k8s.io/v1alpha1";

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) feature_gates: Option<Vec<String>>,
    pub(super) plugins: Option<Vec<Plugin>>,
    pub(super) scheduling_profiles: Option<Vec<Profile>>,
    pub(super) data_layer: Option<DataLayer>,
    pub(super) flow_control: Option<FlowControl>,
    pub(super) request_handler: Option<RequestHandler>,
    /// Deprecated: `flowControl.saturationDetector`.
    pub(super) saturation_detector: Option<OptionalRef>,
    /// Deprecated: `requestHandler.parsers`.
    pub(super) parser: Option<Ref>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Plugin {
    pub(super) name: Option<String>,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) parameters: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Profile {
    pub(super) name: String,
    pub(super) plugins: Option<Vec<ProfilePlugin>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ProfilePlugin {
    pub(super) plugin_ref: String,
    pub(super) weight: Option<f64>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Ref {
    pub(super) plugin_ref: String,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct OptionalRef {
    pub(super) plugin_ref: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct DataLayer {
    pub(super) inject_defaults: Option<bool>,
    pub(super) sources: Option<Vec<Source>>,
    pub(super) discovery: Option<Ref>,
    pub(super) peer_discovery: Option<Ref>,
    pub(super) cross_replica_syncer_plugin_ref: Option<String>,
    /// Of no use without the syncer, which is not supported.
    #[expect(dead_code, reason = "llm-d's files may have it")]
    pub(super) cross_replica_sync_interval: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Source {
    pub(super) plugin_ref: String,
    pub(super) extractors: Option<Vec<Ref>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RequestHandler {
    pub(super) parsers: Option<Vec<Ref>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FlowControl {
    pub(super) max_bytes: Option<Value>,
    pub(super) max_requests: Option<Value>,
    #[serde(rename = "defaultRequestTTL")]
    pub(super) default_request_ttl: Option<String>,
    #[serde(rename = "noEndpointRequestTTL")]
    pub(super) no_endpoint_request_ttl: Option<String>,
    pub(super) default_priority_band: Option<Band>,
    pub(super) default_negative_priority_band: Option<Band>,
    pub(super) priority_bands: Option<Vec<Band>>,
    pub(super) usage_limit_policy_plugin_ref: Option<String>,
    pub(super) saturation_detector: Option<OptionalRef>,
    pub(super) enable_eviction: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Band {
    #[serde(default)]
    pub(super) priority: i32,
    pub(super) max_bytes: Option<Value>,
    pub(super) max_requests: Option<Value>,
    pub(super) fairness_policy_ref: Option<String>,
    pub(super) ordering_policy_ref: Option<String>,
}
