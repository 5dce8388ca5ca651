//! The registry as a document: an overview of the spans, then each span, event and metric with its attributes.
//!
//! Only what the registry says; a pure function, so that a test can compare the committed document with it.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::metrics;
use crate::trace::registry::{AttributeType, Registry, Requirement, SpanDef};
use crate::trace::tree::kind_name;

impl Registry {
    /// The registry in Markdown. Spans stand below their first parent, otherwise in the order of the files.
    pub fn to_markdown(&self) -> String {
        let mut out = String::from("## Overview\n\n| span | kind | level | parent | events |\n|---|---|---|---|---|\n");
        let spans = self.in_tree_order();
        for (depth, name, def) in &spans {
            let indent = "&emsp;".repeat(*depth);
            let (kinds, parents, events) = (kinds(def), list(&def.parents), list(&def.events));
            line(&mut out, &format!("| {indent}`{name}` | {kinds} | {} | {parents} | {events} |", def.level));
        }
        out.push_str("\n## Spans\n");
        for (_, name, def) in &spans {
            let level = def.level;
            line(&mut out, &format!("\n### {name}\n\n{}\nKind {}, level {level}.", def.brief, kinds(def)));
            self.attribute_table(&def.attributes, &mut out);
        }
        out.push_str("\n## Events\n");
        for (name, def) in &self.events {
            line(&mut out, &format!("\n### {name}\n\n{}", def.brief));
            self.attribute_table(&def.attributes, &mut out);
        }
        if !self.metrics.is_empty() {
            out.push_str("\n## Metrics\n");
        }
        for (name, def) in &self.metrics {
            let (instrument, unit) = (instrument(def.instrument), &def.unit);
            line(&mut out, &format!("\n### {name}\n\n{}\n{instrument} in `{unit}`.", def.brief));
            self.attribute_table(&def.attributes, &mut out);
        }
        out
    }

    /// All spans with their depth, each below its first parent.
    fn in_tree_order(&self) -> Vec<(usize, &str, &SpanDef)> {
        let mut places: Vec<_> = self.spans.iter().map(|(name, def)| (name.as_str(), def)).collect();
        places.sort_by_key(|(_, def)| def.place);
        let mut order = Vec::with_capacity(places.len());
        let known = |def: &SpanDef| def.parents.first().is_some_and(|p| self.spans.contains_key(p));
        for (name, def) in places.iter().filter(|(_, def)| !known(def)) {
            order.push((0, *name, *def));
            below(name, 1, &places, &mut order);
        }
        order
    }

    fn attribute_table(&self, attributes: &BTreeMap<String, Requirement>, out: &mut String) {
        if attributes.is_empty() {
            return;
        }
        out.push_str("\n| attribute | type | set | meaning |\n|---|---|---|---|\n");
        for (key, requirement) in attributes {
            // Whoever builds a registry proves that its references lead somewhere.
            let Some(def) = self.attributes.get(key) else { continue };
            let (kind, set, brief) = (type_text(&def.kind), requirement_text(requirement), cell(&def.brief));
            line(out, &format!("| `{key}` | {kind} | {set} | {brief} |"));
        }
    }
}

fn below<'a>(
    parent: &str,
    depth: usize,
    spans: &[(&'a str, &'a SpanDef)],
    order: &mut Vec<(usize, &'a str, &'a SpanDef)>,
) {
    for (name, def) in spans.iter().filter(|(_, def)| def.parents.first().is_some_and(|p| p == parent)) {
        order.push((depth, name, def));
        below(name, depth + 1, spans, order);
    }
}

fn line(out: &mut String, text: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{text}");
}

fn kinds(def: &SpanDef) -> String {
    def.kinds.iter().map(|k| kind_name(*k)).collect::<Vec<_>>().join(" or ")
}

fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    names.into_iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

fn instrument(kind: metrics::Kind) -> &'static str {
    match kind {
        metrics::Kind::Counter => "Counter",
        metrics::Kind::UpDownCounter => "Up-down counter",
        metrics::Kind::Gauge => "Gauge",
        metrics::Kind::Histogram => "Histogram",
    }
}

fn type_text(kind: &AttributeType) -> String {
    match kind {
        AttributeType::String => "string".to_owned(),
        AttributeType::Int => "int".to_owned(),
        AttributeType::Double => "double".to_owned(),
        AttributeType::Bool => "boolean".to_owned(),
        AttributeType::StringList => "string[]".to_owned(),
        AttributeType::DoubleList => "double[]".to_owned(),
        AttributeType::Enum(members) => list(members),
    }
}

fn requirement_text(requirement: &Requirement) -> String {
    match requirement {
        Requirement::Required => "required".to_owned(),
        Requirement::Conditional(condition) => {
            let mut letters = condition.trim_end_matches('.').chars();
            let first = letters.next().map(|c| c.to_ascii_lowercase());
            cell(&first.into_iter().chain(letters).collect::<String>())
        }
        Requirement::Recommended => "recommended".to_owned(),
        Requirement::OptIn => "opt-in".to_owned(),
    }
}

/// Text that stays in its cell.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_becomes_tables() {
        let registry = Registry::parse(&[(
            "r.yaml",
            "
groups:
  - id: a
    type: attribute_group
    attributes:
      - {id: x.n, type: int, brief: 'A | B,
          in tokens.'}
      - {id: x.mode, type: {members: [{id: on, value: on_it}, {id: off, value: off_it}]}, brief: Mode.}
      - {id: user.id, type: string, brief: User.}
  - {id: event.late, type: event, name: late, brief: Too late.}
  - {id: metric.took, type: metric, metric_name: took, brief: Time taken., instrument: histogram, unit: s, attributes: [{ref: x.n}]}
  - {id: event.chosen, type: event, name: chosen, brief: Chosen., attributes: [{ref: x.n, requirement_level: required}]}
  - {id: span.leaf, type: span, name: leaf, brief: A leaf., span_kind: client, annotations: {level: 2, parent: [root]}}
  - id: span.root
    type: span
    name: root
    span_kind: server
    brief: The root.
    events: [late, chosen]
    attributes:
      - {ref: x.n, requirement_level: {conditionally_required: If there is one.}}
      - {ref: x.mode}
      - {ref: user.id, requirement_level: opt_in}
",
        )])
        .unwrap();
        insta::assert_snapshot!(registry.to_markdown(), @r"
        ## Overview

        | span | kind | level | parent | events |
        |---|---|---|---|---|
        | `root` | server | 1 |  | `chosen`, `late` |
        | &emsp;`leaf` | client | 2 | `root` |  |

        ## Spans

        ### root

        The root.
        Kind server, level 1.

        | attribute | type | set | meaning |
        |---|---|---|---|
        | `user.id` | string | opt-in | User. |
        | `x.mode` | `on_it`, `off_it` | recommended | Mode. |
        | `x.n` | int | if there is one | A \| B, in tokens. |

        ### leaf

        A leaf.
        Kind client, level 2.

        ## Events

        ### chosen

        Chosen.

        | attribute | type | set | meaning |
        |---|---|---|---|
        | `x.n` | int | required | A \| B, in tokens. |

        ### late

        Too late.

        ## Metrics

        ### took

        Time taken.
        Histogram in `s`.

        | attribute | type | set | meaning |
        |---|---|---|---|
        | `x.n` | int | recommended | A \| B, in tokens. |
        ");
    }
}
