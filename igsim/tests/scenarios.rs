//! The library of scenarios: each is valid, is listed, reads back from its resolved form, and has requests to send.

use std::path::{Path, PathBuf};

use igsim::scenario::{self, Scenario};
use igsim::workload::Plan;
use shared::rng::Seed;

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n";
const MOONCAKE: &str = "{\"timestamp\": 0, \"input_length\": 3, \"output_length\": 5, \"hash_ids\": [0]}\n";

fn library() -> Vec<PathBuf> {
    let dir = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios");
    let listed =
        |dir: PathBuf| std::fs::read_dir(dir).expect("the library is there").map(|e| e.expect("it can be read").path());
    let entries = listed(dir.to_path_buf()).chain(listed(dir.join("epp"))).chain(listed(dir.join("ladders")));
    let scenario = |p: &PathBuf| {
        p.extension().is_some_and(|e| e == "yaml")
            && ![".epp.", ".ladder."].iter().any(|k| p.to_string_lossy().contains(k))
    };
    let mut files: Vec<PathBuf> = entries.filter(scenario).collect();
    files.sort();
    assert!(files.len() >= 8, "{files:?}");
    files
}

/// Loads a scenario; a replay gets a tiny trace in place of the one that is not in the repository.
fn load(path: &Path, trace_dir: &Path) -> Scenario {
    let text = std::fs::read_to_string(path).unwrap();
    let tiny = [("format: azure", "azure.csv", AZURE), ("format: mooncake", "mooncake.jsonl", MOONCAKE)];
    let set: Vec<(String, String)> = tiny
        .iter()
        .filter(|(format, ..)| text.contains(format))
        .map(|(_, file, content)| {
            let file = trace_dir.join(file);
            std::fs::write(&file, content).unwrap();
            ("trace.path".to_owned(), file.display().to_string())
        })
        .collect();
    scenario::load(path, &set).unwrap_or_else(|e| panic!("{e}")).config
}

#[test]
fn every_scenario_is_valid_and_can_be_planned() {
    let dir = tempfile::tempdir().unwrap();
    for path in library() {
        let scenario = load(&path, dir.path());
        assert_eq!(Some(scenario.name.as_str()), path.file_stem().and_then(|s| s.to_str()));
        let mut plan = Plan::new(&scenario, Seed(scenario.seed)).unwrap();
        assert!(plan.next_arrival().unwrap().is_some(), "{path:?} sends nothing");
    }
}

#[test]
fn the_resolved_form_is_the_same_scenario() {
    let dir = tempfile::tempdir().unwrap();
    for path in library() {
        let mut scenario = load(&path, dir.path());
        // What was said of a file that is named is said once: the resolved form names none.
        scenario.warnings.clear();
        let resolved = dir.path().join("resolved.yaml");
        std::fs::write(&resolved, scenario.to_yaml()).unwrap();
        let again = scenario::load(&resolved, &[]).unwrap_or_else(|e| panic!("{e}")).config;
        assert_eq!(again, scenario, "{path:?}");
    }
}

#[test]
fn the_readme_lists_every_scenario() {
    let readme = include_str!("../../scenarios/README.md");
    for path in library() {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap().to_owned();
        assert!(readme.contains(&format!("| `{name}` |")), "{name} is not listed");
    }
}

#[test]
fn quickstart_sends_300_requests_in_15_to_20_seconds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/quickstart.yaml");
    let scenario = scenario::load(&path, &[]).unwrap_or_else(|e| panic!("{e}")).config;
    let mut plan = Plan::new(&scenario, Seed(scenario.seed)).unwrap();
    let requests: Vec<_> = std::iter::from_fn(|| plan.next_arrival().unwrap()).collect();
    let last = requests.last().unwrap().intended.as_secs_f64();
    assert_eq!(requests.len(), 300);
    assert!((14.0..19.0).contains(&last), "the last is sent after {last} s");
    assert!(requests.iter().all(|r| r.streaming && (32..=64).contains(&r.output_tokens)));
}
