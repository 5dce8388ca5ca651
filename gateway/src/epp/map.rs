//! From the file to the gateway's types, with the rules of llm-d's loader:
//!
//! - a plugin without a name has its type for a name; names are unique;
//! - without profiles there is one, `default`, of all filters, scorers and pickers;
//! - a profile without a picker gets the file's first one, or `max-score-picker`; a scorer without a weight gets 1;
//! - without a profile handler a single profile gets `single-profile-handler`; several need a handler.
//!
//! Beyond that, `healthy-filter` comes first in every profile: llm-d's candidates are ready pods.

use std::collections::BTreeMap;

use shared::config::{Problems, did_you_mean, one_of};

use super::Epp;
use super::catalogue::{self, IN_FLIGHT_PRODUCER, LATENCY_PRODUCER, PREFIX_PRODUCER, Part};
use super::file::{API_VERSION, File, KIND, OLD_API_VERSION, Plugin, Profile, ProfilePlugin};
use super::{flow_control, handler, precise, producers};
use crate::core::config::{Parameters, PluginConfig, ProfileConfig, ScorerConfig, WEIGHT, is_weight};
use crate::core::scheduler::parameters::PluginError;
use crate::core::scheduler::registry;

/// A plugin of the file.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) kind: String,
    /// What it is here; `None` if it was left out.
    pub(super) part: Option<Part>,
    pub(super) parameters: Parameters,
    /// Its path in the file.
    pub(super) path: String,
}

/// What the mapping knows so far.
pub(super) struct Mapper<'p> {
    pub(super) declared: Vec<Declared>,
    pub(super) problems: &'p mut Problems,
    pub(super) warnings: Vec<String>,
    allow_unsupported: bool,
}

/// What lets an unsupported part pass.
const ALLOW: &str = "--allow-unsupported (gateway.allow_unsupported) leaves it out";
const HEALTHY: &str = "healthy-filter";

/// Maps a file; what is wrong goes to `problems`, and then the result means nothing.
pub(super) fn map(file: &File, allow_unsupported: bool, problems: &mut Problems) -> Epp {
    let mut m = Mapper { declared: Vec::new(), problems, warnings: Vec::new(), allow_unsupported };
    m.head(file);
    let flow_control_on = m.gates(file);
    m.declare(file.plugins.as_deref().unwrap_or_default());
    m.name_producers();
    let precise_prefix = precise::precise(&mut m);
    m.check_parameters();
    let profiles = m.profiles(file);
    let (profile, disaggregation) = handler::handler(&mut m, profiles);
    m.data_layer(file);
    m.parsers(file);
    let (prefix, in_flight) = producers::producers(&mut m);
    let saturation = producers::saturation(&mut m, file);
    let flow_control = flow_control::flow_control(&mut m, file, flow_control_on);
    let warnings = m.warnings;
    Epp { profile, disaggregation, prefix, precise_prefix, in_flight, saturation, flow_control, warnings }
}

impl Mapper<'_> {
    /// What is not supported at `path`: an error, or a warning where that is allowed.
    pub(super) fn unsupported(&mut self, path: &str, found: &str, instead: &str) {
        if self.allow_unsupported {
            self.warnings.push(format!("{path}: {found} is left out: not supported"));
        } else {
            self.problems.add(path, found, format!("{instead}; {ALLOW}"));
        }
    }

    /// What has no effect at `path`.
    pub(super) fn warn(&mut self, path: &str, text: &str) {
        self.warnings.push(format!("{path}: {text}"));
    }

    fn head(&mut self, file: &File) {
        match file.api_version.as_str() {
            API_VERSION => {}
            OLD_API_VERSION => self.warn("apiVersion", &format!("{OLD_API_VERSION} is deprecated: {API_VERSION}")),
            other => {
                self.problems.add("apiVersion", format!("{other:?}"), API_VERSION);
            }
        }
        self.problems.check(file.kind == KIND, "kind", format!("{:?}", file.kind), KIND);
    }

    /// Whether the gate `flowControl` is on.
    fn gates(&mut self, file: &File) -> bool {
        let mut flow_control = false;
        for (i, gate) in file.feature_gates.iter().flatten().enumerate() {
            let path = format!("featureGates[{i}]");
            let (name, value) = gate.split_once('=').map_or((gate.as_str(), "true"), |(n, v)| (n, v.trim()));
            let on = match value.to_ascii_lowercase().as_str() {
                "1" | "t" | "true" => true,
                "0" | "f" | "false" => false,
                _ => {
                    self.problems.add(&path, format!("{gate:?}"), "the name of a gate, or with =true or =false");
                    continue;
                }
            };
            match name {
                "flowControl" => flow_control = on,
                // Replicas of the endpoint picker, of which there is one.
                "haPopulateNonLeaderDatastore" => {}
                _ => self.unsupported(
                    &path,
                    &format!("the gate {name:?}"),
                    "flowControl or haPopulateNonLeaderDatastore",
                ),
            }
        }
        flow_control
    }

    fn declare(&mut self, plugins: &[Plugin]) {
        for (i, plugin) in plugins.iter().enumerate() {
            let path = format!("plugins[{i}]");
            let name = plugin.name.clone().filter(|n| !n.is_empty()).unwrap_or_else(|| plugin.kind.clone());
            if self.declared.iter().any(|d| d.name == name) {
                self.problems.add(&format!("{path}.name"), format!("{name:?} a second time"), "each name once");
            }
            let part = self.part(&path, &plugin.kind);
            let given = plugin.parameters.iter().flatten();
            let parameters = given.map(|(k, v)| (k.clone(), v.clone())).collect();
            self.declared.push(Declared { name, kind: plugin.kind.clone(), part, parameters, path });
        }
    }

    fn part(&mut self, path: &str, kind: &str) -> Option<Part> {
        let part = catalogue::part(kind);
        if part.is_some() {
            return part;
        }
        let path = format!("{path}.type");
        let why = catalogue::why_not(kind).map(|why| format!(" ({why})")).unwrap_or_default();
        self.unsupported(&path, &format!("{kind:?}{why}"), &one_of(catalogue::supported()));
        None
    }

    /// Producers are named by plugin in the file and by type in the gateway, where there is one of each.
    fn name_producers(&mut self) {
        let kinds: BTreeMap<String, (String, bool)> =
            self.declared.iter().map(|d| (d.name.clone(), (d.kind.clone(), d.part.is_some()))).collect();
        let mut gone = Vec::new();
        for d in &mut self.declared {
            for (key, stands_for) in [
                ("prefixMatchInfoProducerName", PREFIX_PRODUCER),
                ("inFlightLoadProducerName", IN_FLIGHT_PRODUCER),
                ("latencyPredictionInfoProducerName", LATENCY_PRODUCER),
            ] {
                let Some(named) = d.parameters.get(key).and_then(|v| v.as_str()).map(str::to_owned) else { continue };
                match kinds.get(&named) {
                    Some((kind, true)) => {
                        d.parameters.insert(key.to_owned(), kind.as_str().into());
                    }
                    Some((_, false)) => {
                        d.parameters.remove(key);
                        gone.push((format!("{}.parameters.{key}", d.path), named, stands_for));
                    }
                    None => {}
                }
            }
        }
        for (path, named, stands_for) in gone {
            self.warn(&path, &format!("{stands_for} takes the place of {named:?}"));
        }
    }

    fn check_parameters(&mut self) {
        let mut found = Vec::new();
        for d in &self.declared {
            let errors = match d.part {
                Some(Part::Plugin { filter, scorer }) => [
                    filter.then(|| registry::filter(&d.kind, &d.parameters).err()).flatten(),
                    scorer.then(|| registry::scorer(&d.kind, &d.parameters).err()).flatten(),
                ],
                Some(Part::Picker) => [registry::picker(&d.kind, &d.parameters).err(), None],
                Some(Part::Decider) => [registry::decider(&d.kind, &d.parameters).err(), None],
                Some(_) | None => [None, None],
            };
            found.extend(errors.into_iter().flatten().next().map(|e| (d.path.clone(), e)));
        }
        for (path, error) in found {
            self.refuse(&path, error);
        }
    }

    /// Says what is wrong with the parameters of the plugin at `path`.
    pub(super) fn refuse(&mut self, path: &str, error: PluginError) {
        match error {
            PluginError::Unknown { known } => {
                self.problems.add(&format!("{path}.type"), "an unknown type", one_of(known));
            }
            PluginError::Parameter { name, found, allowed } => {
                self.problems.add(&format!("{path}.parameters.{name}"), found, allowed);
            }
        }
    }

    /// The plugin called `name`, or a problem at `path`; `None` too for one that was left out.
    pub(super) fn find(&mut self, path: &str, name: &str) -> Option<usize> {
        let Some(i) = self.declared.iter().position(|d| d.name == name) else {
            let names: Vec<&str> = self.declared.iter().map(|d| d.name.as_str()).collect();
            let help = did_you_mean(name, names.iter().copied()).map(|n| format!("did you mean {n}?"));
            let expected = format!("the name of a plugin: {}", one_of(names));
            self.problems.add(path, format!("{name:?}"), expected).help = help;
            return None;
        };
        self.declared[i].part.map(|_| i)
    }

    fn profiles(&mut self, file: &File) -> Vec<ProfileConfig> {
        let given = file.scheduling_profiles.as_deref().unwrap_or_default();
        for (i, profile) in given.iter().enumerate() {
            let path = format!("schedulingProfiles[{i}].name");
            self.problems.check(!profile.name.is_empty(), &path, "no name", "a name");
            let twice = given[..i].iter().any(|p| p.name == profile.name);
            self.problems.check(!twice, &path, format!("{:?} a second time", profile.name), "each name once");
        }
        if given.is_empty() {
            return vec![self.default_profile()];
        }
        let all = given.iter().enumerate();
        all.map(|(i, p)| self.profile(|j| format!("schedulingProfiles[{i}].plugins[{j}]"), p)).collect()
    }

    fn default_profile(&mut self) -> ProfileConfig {
        let of_profile = |d: &&Declared| matches!(d.part, Some(Part::Plugin { .. } | Part::Picker));
        let all = self.declared.iter().filter(of_profile);
        let (paths, names): (Vec<_>, Vec<_>) = all.map(|d| (d.path.clone(), d.name.clone())).unzip();
        let plugins = names.into_iter().map(|plugin_ref| ProfilePlugin { plugin_ref, weight: None }).collect();
        self.profile(|j| paths[j].clone(), &Profile { name: "default".to_owned(), plugins: Some(plugins) })
    }

    /// A profile; `place` is the path of each of its plugins.
    fn profile(&mut self, place: impl Fn(usize) -> String, profile: &Profile) -> ProfileConfig {
        let mut out = ProfileConfig {
            name: profile.name.clone(),
            filters: vec![PluginConfig::of(HEALTHY)],
            scorers: Vec::new(),
            picker: self.default_picker(),
        };
        let mut picker = false;
        for (j, plugin) in profile.plugins.iter().flatten().enumerate() {
            let path = place(j);
            let Some(i) = self.find(&format!("{path}.pluginRef"), &plugin.plugin_ref) else { continue };
            match self.declared[i].part {
                Some(Part::Plugin { filter, scorer }) => {
                    let kind = self.declared[i].kind.as_str();
                    if filter && !(kind == HEALTHY && out.filters.iter().any(|f| f.kind == kind)) {
                        out.filters.push(self.config(i));
                    }
                    if scorer {
                        out.scorers.push(self.scorer(&path, i, plugin.weight));
                    }
                }
                Some(Part::Picker) => {
                    self.problems.check(!picker, &path, "a second picker", "one picker in a profile");
                    (out.picker, picker) = (self.config(i), true);
                }
                Some(_) | None => self.warn(&path, "it has no effect in a profile"),
            }
        }
        out
    }

    fn default_picker(&self) -> PluginConfig {
        let first = self.declared.iter().position(|d| d.part == Some(Part::Picker));
        first.map_or_else(|| PluginConfig::of("max-score-picker"), |i| self.config(i))
    }

    /// The plugin as the gateway configures it.
    pub(super) fn config(&self, i: usize) -> PluginConfig {
        let Declared { name, kind, parameters, .. } = &self.declared[i];
        let name = (name != kind).then(|| name.clone());
        PluginConfig { kind: kind.clone(), name, parameters: parameters.clone() }
    }

    fn scorer(&mut self, path: &str, i: usize, weight: Option<f64>) -> ScorerConfig {
        let weight = weight.unwrap_or(1.0);
        self.problems.check(is_weight(weight), &format!("{path}.weight"), weight, WEIGHT);
        let PluginConfig { kind, name, parameters } = self.config(i);
        ScorerConfig { kind, name, weight, parameters }
    }

    fn data_layer(&mut self, file: &File) {
        let Some(layer) = &file.data_layer else { return };
        if layer.inject_defaults == Some(false) && layer.sources.iter().flatten().next().is_none() {
            self.warn("dataLayer.injectDefaults", "metrics are read all the same");
        }
        for (i, source) in layer.sources.iter().flatten().enumerate() {
            let path = format!("dataLayer.sources[{i}]");
            self.find(&format!("{path}.pluginRef"), &source.plugin_ref);
            for (j, extractor) in source.extractors.iter().flatten().enumerate() {
                self.find(&format!("{path}.extractors[{j}].pluginRef"), &extractor.plugin_ref);
            }
        }
        let others = [
            ("dataLayer.discovery", layer.discovery.is_some(), "endpoints of the scenario or the command line"),
            ("dataLayer.peerDiscovery", layer.peer_discovery.is_some(), "one gateway"),
            ("dataLayer.crossReplicaSyncerPluginRef", layer.cross_replica_syncer_plugin_ref.is_some(), "one gateway"),
        ];
        for (path, _, instead) in others.iter().filter(|(_, given, _)| *given) {
            self.unsupported(path, "a plugin", instead);
        }
    }

    fn parsers(&mut self, file: &File) {
        let parsers = file.request_handler.iter().flat_map(|h| h.parsers.iter().flatten());
        let parsers = parsers.enumerate().map(|(i, p)| (format!("requestHandler.parsers[{i}].pluginRef"), p));
        let old = file.parser.iter().map(|p| ("parser.pluginRef".to_owned(), p));
        for (path, parser) in parsers.chain(old) {
            // llm-d makes parsers that are named and not declared.
            if self.declared.iter().any(|d| d.name == parser.plugin_ref) {
                self.find(&path, &parser.plugin_ref);
            } else if catalogue::part(&parser.plugin_ref) != Some(Part::BuiltIn) {
                let why = catalogue::why_not(&parser.plugin_ref).map(|w| format!(" ({w})")).unwrap_or_default();
                let found = format!("{:?}{why}", parser.plugin_ref);
                self.unsupported(&path, &found, "openai-parser or passthrough-parser");
            }
        }
    }
}
