//! The registry of spans, events, metrics and attributes: a reader of the Weaver YAML under `registry/`.
//!
//! Understood: `groups:` of type `attribute_group`, `span`, `event` and `metric` (semantic-convention schema, version 1), attributes by
//! `id` or `ref`, `extends`, enum members, and our annotations `level` and `parent`. What tools beside ours need is ignored.

mod markdown;

use std::collections::{BTreeMap, BTreeSet};

use saphyr::{LoadableYamlNode, Yaml};

use crate::metrics;
use crate::trace::span::{Kind, Value};

/// The registry's files, as they were when this was built.
pub const FILES: [(&str, &str); 7] = [
    ("registry/upstream.yaml", include_str!("../../../registry/upstream.yaml")),
    ("registry/gateway.yaml", include_str!("../../../registry/gateway.yaml")),
    ("registry/pd-proxy.yaml", include_str!("../../../registry/pd-proxy.yaml")),
    ("registry/kv-cache-manager.yaml", include_str!("../../../registry/kv-cache-manager.yaml")),
    ("registry/llm-d.yaml", include_str!("../../../registry/llm-d.yaml")),
    ("registry/vllm.yaml", include_str!("../../../registry/vllm.yaml")),
    ("registry/metrics.yaml", include_str!("../../../registry/metrics.yaml")),
];

/// Every span, event, metric and attribute the project may emit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Registry {
    /// Spans by name.
    pub spans: BTreeMap<String, SpanDef>,
    /// Events by name.
    pub events: BTreeMap<String, EventDef>,
    /// Metrics by name.
    pub metrics: BTreeMap<String, MetricDef>,
    /// Attributes by key.
    pub attributes: BTreeMap<String, AttributeDef>,
}

/// A registered metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricDef {
    /// What it says.
    pub brief: String,
    /// How it is counted.
    pub instrument: metrics::Kind,
    /// Its unit, in UCUM.
    pub unit: String,
    /// Attributes by key, and when each is set.
    pub attributes: BTreeMap<String, Requirement>,
}

/// A registered span.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanDef {
    /// What it stands for.
    pub brief: String,
    /// Kinds it may have; more than one only where the catalogue says so.
    pub kinds: Vec<Kind>,
    /// The detail level from which it is emitted.
    pub level: u8,
    /// Names of spans it may hang on; empty if that is left open.
    pub parents: Vec<String>,
    /// Attributes by key, and when each is set.
    pub attributes: BTreeMap<String, Requirement>,
    /// Events by name.
    pub events: BTreeSet<String>,
    /// Its place among the spans of the files.
    place: usize,
}

/// A registered event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventDef {
    /// What it stands for.
    pub brief: String,
    /// Attributes by key, and when each is set.
    pub attributes: BTreeMap<String, Requirement>,
}

/// When an attribute is set (`requirement_level`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Always.
    Required,
    /// Always under a condition, which is written down.
    Conditional(String),
    /// If it is known; the meaning of no level.
    Recommended,
    /// If the operator asks for it.
    OptIn,
}

/// A registered attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttributeDef {
    /// What it says, with its unit.
    pub brief: String,
    /// Its type.
    pub kind: AttributeType,
}

/// The type of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttributeType {
    /// `string`
    String,
    /// `int`
    Int,
    /// `double`
    Double,
    /// `boolean`
    Bool,
    /// `string[]`
    StringList,
    /// `double[]`
    DoubleList,
    /// A closed list of texts.
    Enum(Vec<String>),
}

impl AttributeType {
    /// Whether `value` has this type.
    pub fn accepts(&self, value: &Value) -> bool {
        match (self, value) {
            (AttributeType::String, Value::Str(_) | Value::Shared(_))
            | (AttributeType::Int, Value::Int(_))
            | (AttributeType::Double, Value::F64(_))
            | (AttributeType::Bool, Value::Bool(_))
            | (AttributeType::StringList, Value::StrList(_))
            | (AttributeType::DoubleList, Value::F64List(_)) => true,
            // An empty list has no element to tell its type by.
            (AttributeType::DoubleList, Value::StrList(list)) => list.is_empty(),
            (AttributeType::Enum(members), value) => {
                value.as_str().is_some_and(|text| members.iter().any(|m| m == text))
            }
            (
                AttributeType::String
                | AttributeType::Int
                | AttributeType::Double
                | AttributeType::Bool
                | AttributeType::StringList
                | AttributeType::DoubleList,
                _,
            ) => false,
        }
    }
}

/// A registry that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {place}: {problem}")]
pub struct RegistryError {
    /// The file.
    pub file: String,
    /// The group, attribute or line.
    pub place: String,
    /// What is wrong.
    pub problem: String,
}

impl Registry {
    /// The project's own registry, [`FILES`].
    ///
    /// # Errors
    /// Like [`Registry::parse`]; a test proves that the files are sound.
    pub fn builtin() -> Result<Registry, RegistryError> {
        Registry::parse(&FILES)
    }

    /// The span that is called `name`, or has a name with a part in braces that fits.
    pub fn span(&self, name: &str) -> Option<&SpanDef> {
        let fitting = || self.spans.iter().find(|(registered, _)| is_named(registered, name)).map(|(_, def)| def);
        self.spans.get(name).or_else(fitting)
    }

    /// Reads `files` (name and text) as one registry; references may cross files.
    ///
    /// # Errors
    /// On YAML that does not parse, unknown types, kinds and requirement levels, anything that is defined twice, and references to
    /// attributes or events that no file defines.
    pub fn parse(files: &[(&str, &str)]) -> Result<Registry, RegistryError> {
        let mut groups = Vec::new();
        for (file, text) in files {
            let fail = |problem: String| RegistryError { file: (*file).to_owned(), place: "YAML".to_owned(), problem };
            let documents = Yaml::load_from_str(text).map_err(|e| fail(e.to_string()))?;
            for document in &documents {
                let list = document.as_mapping_get("groups").and_then(Yaml::as_vec);
                for group in list.ok_or_else(|| fail("found no `groups:`".to_owned()))? {
                    groups.push(Group::read(file, group)?);
                }
            }
        }
        build(&groups)
    }
}

/// Whether a registered name, whose part in braces stands for anything, is that of `name`.
pub fn is_named(registered: &str, name: &str) -> bool {
    match registered.split_once('{') {
        Some((fixed, _)) => name.len() > fixed.len() && name.starts_with(fixed),
        None => registered == name,
    }
}

/// A group as it stands in a file, before references are followed.
#[derive(Debug)]
struct Group {
    file: String,
    id: String,
    kind: GroupKind,
    name: String,
    brief: String,
    extends: Option<String>,
    /// Attributes defined here.
    defined: Vec<(String, AttributeDef)>,
    /// Keys of attributes defined or referred to here, and when each is set.
    used: Vec<(String, Requirement)>,
}

#[derive(Debug)]
enum GroupKind {
    Attributes,
    Event,
    Span {
        kinds: Vec<Kind>,
        level: u8,
        parents: Vec<String>,
        events: Vec<String>,
    },
    Metric {
        instrument: metrics::Kind,
        unit: String,
    },
    /// Whatever else this reader has no use for.
    Other,
}

impl Group {
    fn read(file: &str, yaml: &Yaml<'_>) -> Result<Group, RegistryError> {
        let id = text(yaml, "id").unwrap_or_default();
        let fail = |problem: &str| RegistryError {
            file: file.to_owned(),
            place: format!("group `{id}`"),
            problem: problem.to_owned(),
        };
        if id.is_empty() {
            return Err(fail("`id` is missing"));
        }
        let kind = match text(yaml, "type").as_deref() {
            Some("attribute_group") | None => GroupKind::Attributes,
            Some("event") => GroupKind::Event,
            Some("span") => span_kind(yaml).map_err(|p| fail(&p))?,
            Some("metric") => metric_kind(yaml).map_err(|p| fail(&p))?,
            Some(_) => GroupKind::Other,
        };
        let named = if matches!(kind, GroupKind::Metric { .. }) { "metric_name" } else { "name" };
        let mut group = Group {
            file: file.to_owned(),
            name: text(yaml, named).unwrap_or_else(|| bare_name(&id)),
            brief: text(yaml, "brief").unwrap_or_default(),
            extends: text(yaml, "extends"),
            kind,
            id: id.clone(),
            defined: Vec::new(),
            used: Vec::new(),
        };
        for attribute in yaml.as_mapping_get("attributes").and_then(Yaml::as_vec).into_iter().flatten() {
            let (key, def) = match (text(attribute, "id"), text(attribute, "ref")) {
                (Some(key), None) => {
                    let kind = attribute_type(attribute).map_err(|p| fail(&format!("attribute `{key}`: {p}")))?;
                    let brief = text(attribute, "brief").unwrap_or_default();
                    (key, Some(AttributeDef { brief, kind }))
                }
                (None, Some(key)) => (key, None),
                (Some(_), Some(_)) | (None, None) => return Err(fail("an attribute needs either `id` or `ref`")),
            };
            let level = requirement(attribute).map_err(|p| fail(&format!("attribute `{key}`: {p}")))?;
            if group.used.iter().any(|(other, _)| *other == key) {
                return Err(fail(&format!("attribute `{key}` is listed twice")));
            }
            group.defined.extend(def.map(|def| (key.clone(), def)));
            group.used.push((key, level));
        }
        Ok(group)
    }

    fn error(&self, problem: String) -> RegistryError {
        RegistryError { file: self.file.clone(), place: format!("group `{}`", self.id), problem }
    }
}

fn build(groups: &[Group]) -> Result<Registry, RegistryError> {
    let mut registry = Registry::default();
    let mut definer: BTreeMap<&str, &Group> = BTreeMap::new();
    for (i, group) in groups.iter().enumerate() {
        if let Some(first) = groups[..i].iter().find(|g| g.id == group.id) {
            return Err(group.error(format!("is defined in {} already", first.file)));
        }
        for (key, def) in &group.defined {
            // Two definitions drift apart, and Weaver takes neither for the true one.
            if let Some(first) = definer.insert(key, group) {
                let (file, id) = (&first.file, &first.id);
                return Err(group
                    .error(format!("attribute `{key}` is defined in {file}, group `{id}`: refer to it with `ref`")));
            }
            registry.attributes.insert(key.clone(), def.clone());
        }
    }
    for group in groups {
        let attributes = used(group, groups, 0)?;
        if let Some(key) = attributes.keys().find(|k| !registry.attributes.contains_key(*k)) {
            return Err(group.error(format!("attribute `{key}` is defined nowhere")));
        }
        let brief = group.brief.clone();
        let twice = match &group.kind {
            GroupKind::Attributes | GroupKind::Other => false,
            GroupKind::Event => registry.events.insert(group.name.clone(), EventDef { brief, attributes }).is_some(),
            GroupKind::Metric { instrument, unit } => {
                let def = MetricDef { brief, instrument: *instrument, unit: unit.clone(), attributes };
                registry.metrics.insert(group.name.clone(), def).is_some()
            }
            GroupKind::Span { kinds, level, parents, events } => {
                let (kinds, parents) = (kinds.clone(), parents.clone());
                let events = events.iter().cloned().collect();
                let place = registry.spans.len();
                let def = SpanDef { brief, kinds, level: *level, parents, attributes, events, place };
                registry.spans.insert(group.name.clone(), def).is_some()
            }
        };
        if twice {
            return Err(group.error(format!("`{}` is defined twice", group.name)));
        }
    }
    for group in groups {
        let GroupKind::Span { events, .. } = &group.kind else { continue };
        if let Some(event) = events.iter().find(|e| !registry.events.contains_key(*e)) {
            return Err(group.error(format!("event `{event}` is defined nowhere")));
        }
    }
    Ok(registry)
}

/// The attributes of a group and of those it extends; its own entry wins.
fn used(group: &Group, groups: &[Group], depth: u8) -> Result<BTreeMap<String, Requirement>, RegistryError> {
    let mut all = BTreeMap::new();
    if let Some(base) = &group.extends {
        let base = groups.iter().find(|g| &g.id == base);
        let base = base.filter(|_| depth < 8).ok_or_else(|| group.error("`extends` leads nowhere".to_owned()))?;
        all = used(base, groups, depth + 1)?;
    }
    all.extend(group.used.iter().cloned());
    Ok(all)
}

fn span_kind(yaml: &Yaml<'_>) -> Result<GroupKind, String> {
    let kind = text(yaml, "span_kind").ok_or("`span_kind` is missing")?;
    let annotations = yaml.as_mapping_get("annotations");
    let mut kinds = vec![kind_of(&kind)?];
    // Weaver knows one kind per span; a span that is emitted with another kind elsewhere says so here.
    for other in annotations.map(|a| texts(a, "other_kinds")).unwrap_or_default() {
        kinds.push(kind_of(&other)?);
    }
    let level = annotations.and_then(|a| a.as_mapping_get("level")).and_then(Yaml::as_integer).unwrap_or(1);
    let level = u8::try_from(level).ok().filter(|l| (1..=3).contains(l)).ok_or("`level` must be 1, 2 or 3")?;
    let parents = annotations.map(|a| texts(a, "parent")).unwrap_or_default();
    Ok(GroupKind::Span { kinds, level, parents, events: texts(yaml, "events") })
}

fn metric_kind(yaml: &Yaml<'_>) -> Result<GroupKind, String> {
    let instrument = match text(yaml, "instrument").ok_or("`instrument` is missing")?.as_str() {
        "counter" => metrics::Kind::Counter,
        "updowncounter" => metrics::Kind::UpDownCounter,
        "gauge" => metrics::Kind::Gauge,
        "histogram" => metrics::Kind::Histogram,
        other => {
            return Err(format!("`instrument` is `{other}`: counter, updowncounter, gauge or histogram is allowed"));
        }
    };
    Ok(GroupKind::Metric { instrument, unit: text(yaml, "unit").ok_or("`unit` is missing")? })
}

fn kind_of(name: &str) -> Result<Kind, String> {
    match name {
        "internal" => Ok(Kind::Internal),
        "server" => Ok(Kind::Server),
        "client" => Ok(Kind::Client),
        other => Err(format!("`span_kind` is `{other}`: internal, server or client is allowed")),
    }
}

fn requirement(attribute: &Yaml<'_>) -> Result<Requirement, String> {
    let Some(level) = attribute.as_mapping_get("requirement_level") else { return Ok(Requirement::Recommended) };
    if let Some(condition) = text(level, "conditionally_required") {
        return Ok(Requirement::Conditional(condition));
    }
    // A recommendation may say for what case.
    if text(level, "recommended").is_some() {
        return Ok(Requirement::Recommended);
    }
    match level.as_str() {
        Some("required") => Ok(Requirement::Required),
        Some("recommended") => Ok(Requirement::Recommended),
        Some("opt_in") => Ok(Requirement::OptIn),
        other => Err(format!("unknown requirement level `{}`", other.unwrap_or("?"))),
    }
}

fn attribute_type(yaml: &Yaml<'_>) -> Result<AttributeType, String> {
    let kind = yaml.as_mapping_get("type").ok_or("`type` is missing")?;
    if let Some(members) = kind.as_mapping_get("members").and_then(Yaml::as_vec) {
        let values: Option<Vec<String>> = members.iter().map(|m| text(m, "value")).collect();
        return values.map(AttributeType::Enum).ok_or_else(|| "an enum member has no text `value`".to_owned());
    }
    match kind.as_str() {
        Some("string") => Ok(AttributeType::String),
        Some("int") => Ok(AttributeType::Int),
        Some("double") => Ok(AttributeType::Double),
        Some("boolean") => Ok(AttributeType::Bool),
        Some("string[]") => Ok(AttributeType::StringList),
        Some("double[]") => Ok(AttributeType::DoubleList),
        other => Err(format!("unknown type `{}`", other.unwrap_or("?"))),
    }
}

/// Group ids carry their type in front (`span.vllm.engine.request`), names do not.
fn bare_name(id: &str) -> String {
    let bare = ["span.", "event.", "metric."].iter().find_map(|kind| id.strip_prefix(kind));
    bare.unwrap_or(id).to_owned()
}

fn text(yaml: &Yaml<'_>, key: &str) -> Option<String> {
    yaml.as_mapping_get(key).and_then(Yaml::as_str).map(|t| t.trim().to_owned())
}

/// A list of texts, or one text.
fn texts(yaml: &Yaml<'_>, key: &str) -> Vec<String> {
    let Some(node) = yaml.as_mapping_get(key) else { return Vec::new() };
    match node.as_vec() {
        Some(list) => list.iter().filter_map(Yaml::as_str).map(str::to_owned).collect(),
        None => node.as_str().map(str::to_owned).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMON: &str = "
groups:
  - id: registry.common
    type: attribute_group
    brief: Shared
    attributes:
      - {id: error.type, type: string, brief: Class of the failure, stability: stable}
      - id: vllm.phase
        type:
          members:
            - {id: prefill, value: prefill}
            - {id: decode, value: decode}
        brief: Phase of a batch
";
    const SPANS: &str = "
groups:
  - id: span.base
    type: attribute_group
    attributes:
      - ref: error.type
        requirement_level: {conditionally_required: on failure}
  - id: event.vllm.first_token
    type: event
    name: vllm.first_token
    brief: First token
    attributes:
      - {id: vllm.index, type: int, brief: Index}
  - id: span.vllm.execute
    type: span
    name: vllm.execute
    extends: span.base
    span_kind: internal
    brief: Runs the model
    attributes:
      - {ref: vllm.phase, requirement_level: required}
    events: [vllm.first_token]
    annotations: {level: 2, parent: [vllm.engine.request]}
";

    #[test]
    fn the_projects_registry_is_sound() {
        let registry = Registry::builtin().unwrap_or_else(|e| panic!("{e}"));
        assert!(registry.spans.len() >= 18, "{:?}", registry.spans.keys());
        let parents = registry.spans.values().flat_map(|s| &s.parents);
        let unknown: Vec<_> = parents.filter(|p| !registry.spans.contains_key(*p)).collect();
        assert!(unknown.is_empty(), "parents that no file defines: {unknown:?}");
        // llm-d's two of this kind are what they are.
        let bare = ["target_model", "request_prio"];
        for key in registry.attributes.keys().filter(|key| !bare.contains(&key.as_str())) {
            assert!(key.contains('.'), "`{key}` has no namespace");
        }
    }

    #[test]
    fn spans_events_and_attributes_are_read_across_files() {
        let registry = Registry::parse(&[("spans.yaml", SPANS), ("common.yaml", COMMON)]).unwrap();
        let span = &registry.spans["vllm.execute"];
        assert_eq!((span.kinds.as_slice(), span.level), (&[Kind::Internal][..], 2));
        assert_eq!(span.parents, ["vllm.engine.request"]);
        assert_eq!(
            span.attributes.clone().into_iter().collect::<Vec<_>>(),
            [
                ("error.type".to_owned(), Requirement::Conditional("on failure".to_owned())),
                ("vllm.phase".to_owned(), Requirement::Required)
            ]
        );
        assert_eq!(
            registry.events["vllm.first_token"].attributes,
            [("vllm.index".to_owned(), Requirement::Recommended)].into()
        );
        let phase = &registry.attributes["vllm.phase"].kind;
        assert!(phase.accepts(&Value::from("decode")) && !phase.accepts(&Value::from("idle")));
    }

    #[test]
    fn metrics_have_an_instrument_and_a_unit() {
        let text = "groups: [{id: metric.m, type: metric, metric_name: a.b, brief: How long., instrument: histogram, \
            unit: s, attributes: [{id: k, type: string, requirement_level: required}]}]";
        let registry = Registry::parse(&[("r.yaml", text)]).unwrap();
        let metric = &registry.metrics["a.b"];
        assert_eq!((metric.instrument, metric.unit.as_str()), (metrics::Kind::Histogram, "s"));
        assert_eq!(metric.attributes, [("k".to_owned(), Requirement::Required)].into());
    }

    #[test]
    fn faults_name_file_and_group() {
        let check = |text: &str, expect: &str| {
            let error = Registry::parse(&[("r.yaml", text)]).unwrap_err().to_string();
            assert_eq!(error, expect);
        };
        check("a: 1", "r.yaml: YAML: found no `groups:`");
        check("groups:\n  - {type: span}", "r.yaml: group ``: `id` is missing");
        check("groups:\n  - {id: s, type: span}", "r.yaml: group `s`: `span_kind` is missing");
        check(
            "groups:\n  - {id: s, type: span, span_kind: producer}",
            "r.yaml: group `s`: `span_kind` is `producer`: internal, server or client is allowed",
        );
        check(
            "groups:\n  - {id: s, type: span, span_kind: client, annotations: {level: 4}}",
            "r.yaml: group `s`: `level` must be 1, 2 or 3",
        );
        check(
            "groups:\n  - {id: s, type: span, span_kind: client, attributes: [{ref: x}]}",
            "r.yaml: group `s`: attribute `x` is defined nowhere",
        );
        check(
            "groups:\n  - {id: s, type: span, span_kind: client, events: [e]}",
            "r.yaml: group `s`: event `e` is defined nowhere",
        );
        check(
            "groups:\n  - {id: metric.m, type: metric, instrument: meter, unit: s}",
            "r.yaml: group `metric.m`: `instrument` is `meter`: counter, updowncounter, gauge or histogram is allowed",
        );
        check(
            "groups:\n  - {id: metric.m, type: metric, instrument: counter}",
            "r.yaml: group `metric.m`: `unit` is missing",
        );
        check(
            "groups:\n  - {id: a, attributes: [{ref: k, requirement_level: always}]}",
            "r.yaml: group `a`: attribute `k`: unknown requirement level `always`",
        );
        check(
            "groups:\n  - {id: a, type: attribute_group, attributes: [{id: k, type: float}]}",
            "r.yaml: group `a`: attribute `k`: unknown type `float`",
        );
    }

    #[test]
    fn nothing_is_defined_twice() {
        let check = |first: &str, second: &str, expect: &str| {
            let files = [("one.yaml", format!("groups: [{first}]")), ("two.yaml", format!("groups: [{second}]"))];
            let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
            assert_eq!(Registry::parse(&files).unwrap_err().to_string(), expect);
        };
        // Two definitions are refused even if they say the same.
        check(
            "{id: a, attributes: [{id: k, type: int}]}",
            "{id: b, attributes: [{id: k, type: int}]}",
            "two.yaml: group `b`: attribute `k` is defined in one.yaml, group `a`: refer to it with `ref`",
        );
        check("{id: a}", "{id: a}", "two.yaml: group `a`: is defined in one.yaml already");
        check(
            "{id: e, type: event, name: first}",
            "{id: f, type: event, name: first}",
            "two.yaml: group `f`: `first` is defined twice",
        );
        check(
            "{id: s, type: span, name: work, span_kind: client}",
            "{id: t, type: span, name: work, span_kind: client}",
            "two.yaml: group `t`: `work` is defined twice",
        );
        check(
            "{id: a, attributes: [{id: k, type: int}]}",
            "{id: s, type: span, span_kind: client, attributes: [{ref: k}, {ref: k}]}",
            "two.yaml: group `s`: attribute `k` is listed twice",
        );
    }
}
