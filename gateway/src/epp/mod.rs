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

use std::path::{Path, PathBuf};

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
    let mut warnings = Vec::new();
    if let Some(path) = config.epp_config.take() {
        let epp = load(&found(path, beside), config.allow_unsupported)?;
        warnings = epp.apply(config);
    }
    for i in 0..config.pools.len() {
        let Some(path) = config.pools[i].epp_config.take() else { continue };
        // Where a kv-cache-manager is stands with the gateway.
        let mut own = GatewayConfig { precise_prefix: config.precise_prefix.clone(), ..GatewayConfig::default() };
        let said = load(&found(path, beside), config.allow_unsupported)?.apply(&mut own);
        warnings.extend(said.into_iter().map(|w| format!("pool {}: {w}", config.pools[i].name)));
        config.pools[i].take(own);
    }
    Ok(warnings)
}

/// Where a file is that is named in the file `beside`.
fn found(path: PathBuf, beside: Option<&Path>) -> PathBuf {
    match beside.and_then(Path::parent) {
        Some(folder) if path.is_relative() => folder.join(path),
        Some(_) | None => path,
    }
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
