//! llm-d's EndpointPickerConfig as the configuration of the gateway: read, checked, and turned into the gateway's own types.
//!
//! A file means what llm-d's loader makes of it (llm-d-router `pkg/epp/config/loader`, August 2026), defaults included. What has no
//! counterpart here is an error that says what there is, or, where the operator allows it, left out with a warning.

mod catalogue;
mod file;
mod flow_control;
mod handler;
mod map;
mod precise;
mod producers;
mod scalars;

use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;
use shared::config::{ConfigErrors, Problems};

use crate::core::config::{
    DisaggregationConfig, FlowControlConfig, GatewayConfig, InFlightConfig, PreciseConfig, PrefixConfig, ProfileConfig,
    SaturationConfig,
};
use file::File;
pub(crate) use scalars::duration;

/// What an EndpointPickerConfig says.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Epp {
    /// The profile that chooses the endpoint, or the one that decodes.
    pub profile: ProfileConfig,
    /// The profile that chooses the prefill endpoint, and when.
    pub disaggregation: Option<DisaggregationConfig>,
    /// The approximate prefix index.
    pub prefix: PrefixConfig,
    /// The index of KV events.
    pub precise_prefix: PreciseConfig,
    /// What counts as in flight.
    pub in_flight: InFlightConfig,
    /// The saturation detector.
    pub saturation: SaturationConfig,
    /// Flow control, if the file has such a section.
    pub flow_control: Option<FlowControlConfig>,
    /// What the operator should know: what was left out, and what has no effect.
    pub warnings: Vec<String>,
}

/// Reads the file at `path`; what is not supported is left out if `allow_unsupported`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path, allow_unsupported: bool) -> Result<Epp, ConfigErrors> {
    let mut epp = Epp::default();
    shared::config::load_with(path, &[], |file: &File, p| epp = map::map(file, allow_unsupported, p))?;
    Ok(epp)
}

/// As [`load`], from text; `source` is what messages call it.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load_str(source: &str, text: &str, allow_unsupported: bool) -> Result<Epp, ConfigErrors> {
    let mut epp = Epp::default();
    let check = |file: &File, p: &mut Problems| epp = map::map(file, allow_unsupported, p);
    shared::config::load_str_with(source, text, &[], check)?;
    Ok(epp)
}

/// Reads the file that `config` names and puts what it says in its place; `beside` is the file that names it. Returns warnings.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn resolve(config: &mut GatewayConfig, beside: Option<&Path>) -> Result<Vec<String>, ConfigErrors> {
    let Some(path) = config.epp_config.take() else { return Ok(Vec::new()) };
    let path = match beside.and_then(Path::parent) {
        Some(folder) if path.is_relative() => folder.join(path),
        Some(_) | None => path,
    };
    let epp = load(&path, config.allow_unsupported)?;
    Ok(epp.apply(config))
}

/// Whether the file at `path` is an EndpointPickerConfig, by its `kind`. What cannot be read is for others to complain about.
pub fn is_epp(path: &Path) -> bool {
    #[derive(Deserialize, JsonSchema)]
    struct Kind {
        #[serde(default)]
        kind: Option<String>,
    }
    let kind = shared::config::load_with::<Kind>(path, &[], |_, _| {}).ok().and_then(|l| l.config.kind);
    kind.as_deref() == Some(file::KIND)
}

impl Epp {
    /// Puts what the file says into `config`, and returns the warnings.
    pub fn apply(self, config: &mut GatewayConfig) -> Vec<String> {
        config.profile = self.profile;
        config.disaggregation = self.disaggregation;
        config.prefix = self.prefix;
        let PreciseConfig { manager, manager_timeout, .. } = std::mem::take(&mut config.precise_prefix);
        config.precise_prefix = PreciseConfig { manager, manager_timeout, ..self.precise_prefix };
        config.in_flight = self.in_flight;
        config.saturation = self.saturation;
        config.flow_control = self.flow_control;
        self.warnings
    }
}

#[cfg(test)]
mod tests;
