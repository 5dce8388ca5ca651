//! The registry against what surrounds it: the folder it stands in, the code that names its entries, the document made from it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use shared::trace::registry::{FILES, Registry};

/// The files in which spans are folded: the only ones that name spans, events and attributes.
const FOLDS: [&str; 16] = [
    "gateway/src/spans.rs",
    "gateway/src/spans/arrival.rs",
    "gateway/src/spans/collect.rs",
    "gateway/src/spans/decision.rs",
    "gateway/src/pd_proxy/spans.rs",
    "gateway/src/spans/flow_control.rs",
    "gateway/src/spans/kv_cache.rs",
    "gateway/src/spans/llm_d.rs",
    "gateway/src/pd_proxy/spans/llm_d.rs",
    "engine-sim/src/spans/llm_d.rs",
    "engine-sim/src/spans.rs",
    "engine-sim/src/spans/fine.rs",
    "engine-sim/src/spans/langfuse.rs",
    "engine-sim/src/spans/pass.rs",
    "engine-sim/src/spans/step.rs",
    "engine-sim/src/spans/transfer.rs",
];

/// The files in which metrics and their attributes are named.
const METRICS: [&str; 5] = [
    "gateway/src/pd_proxy/server/metrics.rs",
    "gateway/src/server/metrics.rs",
    "gateway/src/server/metrics/served.rs",
    "gateway/src/server/pool_metrics.rs",
    "shared/src/metrics/telemetry.rs",
];

/// Registered, yet not written out in any fold.
const NOT_IN_FOLDS: [&str; 0] = [];

/// Above what is generated.
const HEAD: &str = "# Span catalogue

<!-- Generated from registry/. `UPDATE_DOCS=1 cargo test -p shared --test registry` writes it anew. -->

Every span, event, metric and attribute that the gateway, the routing sidecars and the engines emit, made from [registry/](../registry/README.md). A span appears
from its detail level on: 1 is the lifecycle of a request, 2 (the default) adds decisions, 3 the parts of executions and how requests arrive. \"Set\" says when an attribute is there:
always (required), under the condition given, if it is known (recommended), or only if the operator asks for it (opt-in).
Spans without a dot in their names, `POST {http.route}` and `scorer.{type}` come with `naming: llm-d` only, and then no others ([telemetry.md](telemetry.md#names)).

";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn builtin() -> Registry {
    Registry::builtin().unwrap_or_else(|e| panic!("{e}"))
}

/// The texts of a source.
fn texts(code: &str) -> impl Iterator<Item = &str> {
    let lines = code.lines().filter(|l| !l.trim_start().starts_with("//"));
    lines.flat_map(|l| l.split('"').skip(1).step_by(2))
}

/// Those that look like names of spans, events or attributes: `a.b_c.d2`.
fn names(code: &str) -> BTreeSet<String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_');
    texts(code).filter(|t| t.contains('.') && t.bytes().all(plain)).map(str::to_owned).collect()
}

#[test]
fn names_are_found_in_code() {
    let code = "// \"no.comment\"\n\"a.b_2\", \"Not.This\" => x(\"c.d\", \"no_dot\", \"/v1/e.f\")";
    assert_eq!(names(code), ["a.b_2", "c.d"].map(str::to_owned).into());
}

/// A source without the tests at its end.
fn before_tests(code: &str) -> &str {
    code.split("#[cfg(test)]").next().unwrap_or_default()
}

/// Name, unit, instrument and brief of the metrics that a source defines, as they stand in it.
fn metrics(code: &str) -> Vec<[String; 4]> {
    let flat = before_tests(code).split_whitespace().collect::<Vec<_>>().join(" ");
    let definitions = flat.split(": Def = ").skip(1).filter_map(|rest| rest.split_once(';')).map(|(text, _)| text);
    let definition = |text: &str| {
        let kind = match text.split_once("Kind::") {
            Some((_, rest)) => rest.split(',').next().unwrap_or_default().to_lowercase(),
            None => "counter".to_owned(),
        };
        let texts: Vec<&str> = text.split('"').skip(1).step_by(2).collect();
        match texts[..] {
            [name, unit, brief] => [name, unit, &kind, brief].map(str::to_owned),
            _ => panic!("a metric has a name, a unit and a brief: {text}"),
        }
    };
    definitions.map(definition).collect()
}

#[test]
fn metrics_are_what_the_registry_says() {
    let registry = builtin();
    let mut defined: Vec<_> = METRICS.iter().flat_map(|file| metrics(&read(file))).collect();
    defined.sort();
    let registered = registry.metrics.iter().map(|(name, def)| {
        let kind = format!("{:?}", def.instrument).to_lowercase();
        [name.clone(), def.unit.clone(), kind, def.brief.clone()]
    });
    assert_eq!(defined, registered.collect::<Vec<_>>());
}

#[test]
fn code_and_registry_name_the_same() {
    let registry = builtin();
    let mut registered: BTreeSet<String> = registry.spans.keys().cloned().collect();
    registered.extend(registry.events.keys().chain(registry.attributes.keys()).cloned());
    registered.extend(registry.metrics.keys().cloned());
    let sources: Vec<String> = FOLDS.iter().chain(&METRICS).map(|file| before_tests(&read(file)).to_owned()).collect();
    let named: BTreeSet<String> = sources.iter().flat_map(|code| names(code)).collect();

    // Names of spans may have a part that code puts together.
    let unregistered = |name: &&String| !registered.contains(*name) && registry.span(name).is_none();
    let unregistered: Vec<_> = named.iter().filter(unregistered).collect();
    assert!(unregistered.is_empty(), "named in {FOLDS:?} or {METRICS:?} and not registered: {unregistered:?}");
    let written: BTreeSet<&str> = sources.iter().flat_map(|code| texts(code)).collect();
    let is_written = |name: &str| match name.split_once('{') {
        Some((fixed, _)) => written.iter().any(|text| text.starts_with(fixed)),
        None => written.contains(name),
    };
    let unnamed: Vec<_> = registered.iter().map(String::as_str).filter(|name| !is_written(name)).collect();
    assert_eq!(unnamed, NOT_IN_FOLDS, "left: registered and never named in {FOLDS:?} or {METRICS:?}");
}

#[test]
fn every_attribute_is_used() {
    let registry = builtin();
    let spans = registry.spans.values().flat_map(|s| s.attributes.keys());
    let metrics = registry.metrics.values().flat_map(|m| m.attributes.keys());
    let events = registry.events.values().flat_map(|e| e.attributes.keys());
    let used: BTreeSet<_> = spans.chain(events).chain(metrics).collect();
    let unused: Vec<_> = registry.attributes.keys().filter(|k| !used.contains(k)).collect();
    assert!(unused.is_empty(), "defined and on no span or event: {unused:?}");
    let events: BTreeSet<_> = registry.spans.values().flat_map(|s| &s.events).collect();
    let unused: Vec<_> = registry.events.keys().filter(|e| !events.contains(e)).collect();
    assert!(unused.is_empty(), "events on no span: {unused:?}");
}

/// Attributes whose first word is not ours are OpenTelemetry's or Langfuse's and stand in one file; what vLLM adds to `gen_ai` on
/// its own stands with vLLM's.
#[test]
fn each_file_defines_its_own_attributes() {
    for (file, text) in FILES {
        let defined = text.lines().filter_map(|l| l.strip_prefix("      - id: "));
        for key in defined {
            let owner = match key.split('.').next().unwrap_or_default() {
                "gateway" if METRICS_OWN.contains(&key) => "registry/metrics.yaml",
                "gateway" | "sampling" => "registry/gateway.yaml",
                "pd_proxy" => "registry/pd-proxy.yaml",
                "vllm" => "registry/vllm.yaml",
                _ if key.starts_with("llm_d.kv_cache.") => "registry/kv-cache-manager.yaml",
                "llm_d" | "target_model" | "request_prio" => "registry/llm-d.yaml",
                _ if key.starts_with("gen_ai.latency.") || VLLMS_OWN.contains(&key) => "registry/vllm.yaml",
                _ => "registry/upstream.yaml",
            };
            assert_eq!(file, owner, "{key}");
        }
    }
}

/// Attributes that only metrics have.
const METRICS_OWN: [&str; 3] = ["gateway.response.status_class", "gateway.rejection.reason", "gateway.endpoint.state"];

/// Keys of vLLM's `llm_request` span that OpenTelemetry does not define under these names.
const VLLMS_OWN: [&str; 4] =
    ["gen_ai.request.id", "gen_ai.request.n", "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"];

#[test]
fn the_folder_holds_the_files_that_are_read_and_a_manifest() {
    let folder = std::fs::read_dir(root().join("registry")).expect("registry/ is there");
    let found: BTreeSet<String> = folder
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    let read_in: BTreeSet<String> = FILES.iter().map(|(name, _)| name.replace("registry/", "")).collect();
    let others: Vec<_> = found.symmetric_difference(&read_in).map(String::as_str).collect();
    assert_eq!(others, ["manifest.yaml"]);

    let manifest = read("registry/manifest.yaml");
    let keys: Vec<_> = manifest.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split(':').next()).collect();
    assert_eq!(keys, ["name", "description", "semconv_version", "schema_base_url"]);
    let version = format!("semconv_version: {}", env!("CARGO_PKG_VERSION"));
    assert!(manifest.lines().any(|l| l == version), "expected {version}");
}

#[test]
fn the_document_is_what_the_registry_says() {
    let path = root().join("docs/spans.md");
    let expect = format!("{HEAD}{}", builtin().to_markdown());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &expect).expect("docs/spans.md can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let line = found.lines().zip(expect.lines()).take_while(|(f, e)| f == e).count() + 1;
    assert!(
        found == expect,
        "docs/spans.md is not what the registry says, from line {line} on: UPDATE_DOCS=1 cargo test -p shared --test registry writes it"
    );
}
