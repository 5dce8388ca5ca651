//! What lies in deploy/: files parse, images are pinned, ports are published on this machine only, what is mounted is there, and every
//! query of a dashboard is valid. TraceQL is asked of a real Tempo where `TEMPO_URL` names one.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::tempo::{Server, lately};
use common::{Place, http, traceql};
use saphyr::{LoadableYamlNode, Yaml};
use serde_json::Value;
use shared::trace::registry::Registry;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(deploy().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// `${NAME:-default}` and `${env:NAME:-default}` without an environment.
fn expanded(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (variable, after) = after.split_once('}').expect("a closing brace");
        out.push_str(before);
        out.push_str(variable.split_once(":-").map_or("unset", |(_, default)| default));
        rest = after;
    }
    out + rest
}

/// A YAML file as JSON; merge keys (`<<`) are followed.
fn yaml(path: &str) -> Value {
    let text = expanded(&read(path));
    let documents = Yaml::load_from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert_eq!(documents.len(), 1, "{path}");
    json(&documents[0])
}

fn json(yaml: &Yaml<'_>) -> Value {
    if let Some(list) = yaml.as_vec() {
        return list.iter().map(json).collect();
    }
    if let Some(map) = yaml.as_mapping() {
        let mut out = serde_json::Map::new();
        for (key, value) in map.iter() {
            let (key, value) = (key.as_str().expect("keys are text"), json(value));
            match value {
                Value::Object(merged) if key == "<<" => {
                    for (k, v) in merged {
                        out.entry(k).or_insert(v);
                    }
                }
                value => {
                    out.insert(key.to_owned(), value);
                }
            }
        }
        return Value::Object(out);
    }
    match (yaml.as_bool(), yaml.as_integer(), yaml.as_floating_point(), yaml.as_str()) {
        (Some(v), ..) => v.into(),
        (_, Some(v), ..) => v.into(),
        (_, _, Some(v), _) => v.into(),
        (.., Some(v)) => v.into(),
        _ => Value::Null,
    }
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

const COMPOSE: [&str; 2] = ["compose.yaml", "compose.tail-sampling.yaml"];
const COLLECTOR: [&str; 3] =
    ["collector/collector.yaml", "collector/tail-sampling.yaml", "collector/langfuse-jaeger.yaml"];

#[test]
fn compose_files_pin_images_publish_on_this_machine_only_and_mount_what_there_is() {
    let mut mounted = BTreeSet::new();
    for file in COMPOSE {
        let compose = yaml(file);
        for (name, service) in compose["services"].as_object().expect("services") {
            let image = service["image"].as_str();
            assert!(file != "compose.yaml" || image.is_some(), "{name} has no image");
            if let Some(image) = image {
                let tag = image.rsplit_once(':').map(|(_, tag)| tag).unwrap_or_default();
                let pinned = tag.chars().filter(|c| *c == '.').count() == 2 && tag != "latest";
                assert!(pinned, "{name}: {image} is not pinned");
            }
            for port in texts(&service["ports"]) {
                assert!(port.starts_with("127.0.0.1:"), "{name} publishes {port}");
            }
            for volume in texts(&service["volumes"]).into_iter().filter(|v| v.starts_with('.')) {
                let path = volume.split(':').next().expect("a path").trim_start_matches("./").to_owned();
                assert!(deploy().join(&path).exists(), "{name} mounts {path}");
                assert!(volume.ends_with(":ro"), "{name} may write to {path}");
                mounted.insert(path);
            }
            let known = |other: &str| compose["services"].get(other).is_some();
            assert!(texts(&service["depends_on"]).into_iter().all(known), "{name} waits for nobody");
        }
    }
    for needed in ["tempo/tempo.yaml", "prometheus/compose.yaml", "grafana/datasources.yaml", "grafana/dashboards"] {
        assert!(mounted.contains(needed), "{needed} is mounted nowhere: {mounted:?}");
    }
    let dockerfile = read("Dockerfile");
    let from: Vec<&str> = dockerfile.lines().filter_map(|l| l.strip_prefix("FROM ")).collect();
    assert!(from.len() == 2 && from.iter().all(|f| f.contains('.')), "{from:?}");
    let toolchain = std::fs::read_to_string(deploy().join("../rust-toolchain.toml")).unwrap();
    let version = toolchain.lines().find_map(|l| l.strip_prefix("channel = \"")).unwrap().trim_end_matches('"');
    assert!(from[0].contains(version), "{} builds with another Rust than {version}", from[0]);
}

#[test]
fn the_programs_take_the_options_that_compose_gives_them() {
    let compose = yaml("compose.yaml");
    let bins = Path::new(env!("CARGO_BIN_EXE_igsim")).parent().unwrap();
    for (name, service) in compose["services"].as_object().unwrap() {
        let command = texts(&service["command"]);
        let Some((program, options)) =
            command.split_first().filter(|(p, _)| matches!(**p, "gateway" | "engine-sim" | "igsim"))
        else {
            continue;
        };
        // What the image has of the repository is its scenarios.
        for scenario in options.iter().filter_map(|o| o.strip_prefix("/scenarios/")) {
            assert!(common::library().join(scenario).exists(), "{name} runs {scenario}, which is not there");
        }
        let program = bins.join(program);
        if !program.exists() {
            eprintln!("skipped: options of {name}: {} is not built", program.display());
            continue;
        }
        // With --help options are read up to it: one that there is not is an error.
        let ran = Command::new(program).args(options).arg("--help").output().unwrap();
        assert!(ran.status.success(), "{name}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

#[test]
fn collectors_use_what_they_define() {
    let base = yaml(COLLECTOR[0]);
    for file in COLLECTOR {
        let own = yaml(file);
        for (name, pipeline) in own["service"]["pipelines"].as_object().expect("pipelines") {
            for kind in ["receivers", "processors", "exporters"] {
                for used in texts(&pipeline[kind]) {
                    let defined = [&own, &base].iter().any(|f| f[kind].get(used).is_some());
                    assert!(defined, "{file}: {name} uses {used}, which is not among its {kind}");
                }
            }
            let processors = texts(&pipeline["processors"]);
            let limited = processors.first().is_none_or(|first| *first == "memory_limiter");
            assert!(limited && processors.last().is_none_or(|last| *last == "batch"), "{file}: {processors:?}");
        }
    }
    let registry = Registry::builtin().unwrap();
    for policy in yaml(COLLECTOR[1])["processors"]["tail_sampling"]["policies"].as_array().expect("policies") {
        let key = ["numeric_attribute", "string_attribute"].iter().find_map(|kind| policy[kind]["key"].as_str());
        assert!(key.is_none_or(|k| registry.attributes.contains_key(k)), "{policy}");
    }
}

#[test]
fn data_sources_and_tempo_and_prometheus_are_configured() {
    let sources = yaml("grafana/datasources.yaml");
    let uids: Vec<_> = sources["datasources"].as_array().unwrap().iter().map(|d| d["uid"].as_str().unwrap()).collect();
    assert_eq!(uids, ["tempo", "prometheus"]);
    let tempo = &sources["datasources"][0]["jsonData"];
    assert_eq!(
        (&tempo["serviceMap"]["datasourceUid"], &tempo["tracesToMetrics"]["datasourceUid"]),
        (&"prometheus".into(), &"prometheus".into())
    );
    let exemplars = &sources["datasources"][1]["jsonData"]["exemplarTraceIdDestinations"];
    assert!(exemplars.as_array().unwrap().iter().all(|e| e["datasourceUid"] == "tempo"));
    let config = yaml("tempo/tempo.yaml");
    assert_eq!(config["server"]["http_listen_address"], "127.0.0.1", "loopback unless told otherwise");
    let remote = &config["metrics_generator"]["storage"]["remote_write"][0];
    assert_eq!(remote["url"], "http://127.0.0.1:9090/api/v1/write");
    for file in ["prometheus/compose.yaml", "prometheus/loopback.yaml"] {
        assert!(yaml(file)["scrape_configs"].as_array().is_some_and(|jobs| jobs.len() == 4), "{file}");
        match Command::new("promtool").args(["check", "config"]).arg(deploy().join(file)).output() {
            Ok(ran) => assert!(ran.status.success(), "{file}: {}", String::from_utf8_lossy(&ran.stderr)),
            Err(_) => eprintln!("skipped: promtool check config {file}: no promtool on the PATH"),
        }
    }
}

/// The dashboards: name of the file and content.
fn dashboards() -> Vec<(String, Value)> {
    let dir = deploy().join("grafana/dashboards");
    let read = |name: &String| (name.clone(), serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap());
    common::names(&dir).iter().map(read).collect()
}

/// Place and query of every target with the data source `kind`.
fn queries(kind: &str, key: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().expect("panels") {
            for target in panel["targets"].as_array().expect("targets") {
                if let Some(query) = target[key].as_str().filter(|_| target["datasource"]["uid"] == kind) {
                    found.push((format!("{file}: {}", panel["title"]), query.to_owned()));
                }
            }
        }
    }
    assert!(found.len() > 10, "{found:?}");
    found
}

#[test]
fn dashboards_are_whole() {
    let all = dashboards();
    let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["engine.json", "requests.json", "scheduler.json", "tracing.json"]);
    for (name, dashboard) in &all {
        assert_eq!(dashboard["uid"], format!("igsim-{}", name.trim_end_matches(".json")));
        let ids: BTreeSet<u64> =
            dashboard["panels"].as_array().unwrap().iter().map(|p| p["id"].as_u64().unwrap()).collect();
        assert_eq!(ids.len(), dashboard["panels"].as_array().unwrap().len(), "{name}");
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let uid = target["datasource"]["uid"].as_str().unwrap();
                assert!(["tempo", "prometheus"].contains(&uid), "{name}: {panel}");
                let asks =
                    target["expr"].is_string() || target["query"].is_string() || target["queryType"] == "serviceMap";
                assert!(asks, "{name}: {panel}");
            }
        }
    }
}

#[test]
fn traceql_of_dashboards_names_what_is_registered_and_tempo_understands_it() {
    let registry = Registry::builtin().unwrap();
    let server = Server::given("TraceQL of the dashboards, asked of Tempo");
    for (place, query) in queries("tempo", "query") {
        assert_eq!(traceql::complaints(&query, &registry), Vec::<String>::new(), "{place}: {query}");
        let Some(server) = &server else { continue };
        let figures = query.contains("rate()") || query.contains("_over_time(");
        let answer = match figures {
            true => server.tempo.metrics(&query, lately()).map(drop),
            false => server.tempo.search(&query, lately(), 10).map(drop),
        };
        answer.unwrap_or_else(|e| panic!("{place}: {query}: {e}"));
    }
}

/// What Tempo (its metrics generator and its own page) and the Collector call what the dashboards show.
const OTHERS: [&str; 11] = [
    "traces_spanmetrics_calls_total",
    "traces_spanmetrics_latency_bucket",
    "traces_service_graph_request_total",
    "tempo_distributor_spans_received_total",
    "tempo_distributor_bytes_received_total",
    "tempo_discarded_spans_total",
    "otelcol_receiver_accepted_spans",
    "otelcol_receiver_refused_spans",
    "otelcol_exporter_sent_spans",
    "otelcol_exporter_send_failed_spans",
    "otelcol_exporter_queue_size",
];

/// Names of metrics in a PromQL query: what is no function, no label and no keyword.
fn metrics_named(query: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut rest = query;
    while let Some(first) = rest.chars().next() {
        let part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
        let skip = |open: char, close: char| (first == open).then(|| rest.find(close).expect("a closing bracket") + 1);
        if let Some(length) = skip('{', '}').or_else(|| skip('[', ']')) {
            rest = &rest[length..];
        } else if first.is_ascii_alphabetic() {
            let length = rest.find(|c| !part(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(length);
            let after = after.trim_start();
            if word == "by" {
                rest = &after[after.find(')').expect("labels in brackets") + 1..];
                continue;
            }
            // A function or an aggregation has brackets or `by` behind it.
            if !after.starts_with('(') && !after.starts_with("by ") {
                names.insert(word.to_owned());
            }
            rest = after;
        } else {
            rest = &rest[first.len_utf8()..];
        }
    }
    names
}

#[test]
fn names_are_found_in_promql() {
    let query = "histogram_quantile(0.99, sum by (le, x) (rate(a_bucket{b=\"c\"}[1m]))) / sum(rate(vllm:d_total[1m]))";
    assert_eq!(metrics_named(query), ["a_bucket", "vllm:d_total"].map(str::to_owned).into());
}

/// Names of the series on a page in the Prometheus text format.
fn served(page: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for line in page.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a kind");
        let suffixes: &[&str] = if kind.trim() == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        names.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
    }
    names
}

#[test]
fn promql_of_dashboards_names_what_gateway_engines_and_tempo_show() {
    let place = Place::with_tiny();
    let mut command = place.igsim();
    command.args(["up", "tiny.yaml", "--set", "gateway.flow_control.enabled=true"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the program starts");
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let welcome: Vec<String> = lines.take_while(|l| !l.starts_with("OpenAI clients")).collect();
    let mut known: BTreeSet<String> = OTHERS.iter().map(|n| (*n).to_owned()).collect();
    for name in ["gateway ", "engine-0 "] {
        let url = welcome.iter().find_map(|l| l.trim().strip_prefix(name)).unwrap_or_else(|| panic!("{welcome:?}"));
        let address = http::address(url.trim());
        if name == "gateway " {
            // What was served has histograms only once something was.
            let chat = r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":3,"stream":true,"stream_options":{"include_usage":true}}"#;
            assert_eq!(http::request(address, "POST", "/v1/chat/completions", &[], chat).0, 200);
        }
        let (status, page) = http::request(address, "GET", "/metrics", &[], "");
        assert_eq!(status, 200);
        known.extend(served(&page));
    }
    child.kill().and_then(|()| child.wait()).unwrap();
    let sources = yaml("grafana/datasources.yaml");
    let linked = sources["datasources"][0]["jsonData"]["tracesToMetrics"]["queries"].as_array().unwrap();
    let linked = linked.iter().map(|q| ("datasources.yaml".to_owned(), q["query"].as_str().unwrap().to_owned()));
    for (place, query) in queries("prometheus", "expr").into_iter().chain(linked) {
        let names = metrics_named(&query);
        assert!(!names.is_empty(), "{place}: {query}");
        let unknown: Vec<_> = names.difference(&known).collect();
        assert!(unknown.is_empty(), "{place}: nobody shows {unknown:?}: {query}");
    }
}

#[test]
fn scripts_are_valid_and_may_be_run() {
    use std::os::unix::fs::PermissionsExt;
    for (script, shell) in [("up.sh", "bash"), ("tempo/start.sh", "bash")] {
        let path = deploy().join(script);
        assert!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o100 != 0, "{script} cannot be run");
        let ran = Command::new(shell).arg("-n").arg(path).output().expect("a shell");
        assert!(ran.status.success(), "{script}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}
