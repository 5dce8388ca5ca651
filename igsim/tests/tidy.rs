//! Keeps the shape of the workspace: pure cores, one clock, dependencies that point one way, no leftovers.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

/// Every Rust file below `dir`, with its text. An empty answer would make a check pass for nothing.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        let mut entries: Vec<_> = fs::read_dir(dir).expect("readable folder").map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("readable file");
                out.push((path, text));
            }
        }
    }
    let mut out = Vec::new();
    walk(&root().join(dir), &mut out);
    assert!(!out.is_empty(), "no Rust file below {dir}");
    out
}

/// Lines of code that contain one of `words`, comments left out.
fn mentions(files: &[(PathBuf, String)], words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in files {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = words.iter().find(|w| code.contains(**w)) {
                found.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    found
}

const IO: &[&str] = &["tokio", "axum", "hyper", "opentelemetry", "std::net", "std::thread", "thread_local"];
const CLOCKS: &[&str] = &["Instant", "SystemTime", "RunClock", "rand::rng", "thread_rng", "from_os"];

#[test]
fn cores_are_sans_io() {
    for core in ["engine-sim/src/core", "gateway/src/core", "gateway/src/pd_proxy/core"] {
        let files = sources(core);
        assert_eq!(mentions(&files, IO), Vec::<String>::new(), "{core} does input or output");
        assert_eq!(mentions(&files, CLOCKS), Vec::<String>::new(), "{core} reads a clock or hidden randomness");
    }
}

#[test]
fn folding_is_pure() {
    for crate_dir in ["engine-sim", "gateway"] {
        // `spans.rs` and the folder of its parts.
        let folds = |path: &Path| {
            let in_folder = path.parent().is_some_and(|p| p.ends_with("src/spans"));
            path.ends_with("spans.rs") || in_folder && !path.ends_with("tests.rs")
        };
        let files: Vec<_> = sources(&format!("{crate_dir}/src")).into_iter().filter(|(p, _)| folds(p)).collect();
        assert!(!files.is_empty(), "one place where {crate_dir}'s spans are named");
        assert_eq!(mentions(&files, IO), Vec::<String>::new());
        assert_eq!(mentions(&files, CLOCKS), Vec::<String>::new());
    }
}

#[test]
fn one_file_reads_the_real_clock() {
    let mut found = Vec::new();
    for dir in ["shared/src", "engine-sim/src", "gateway/src", "igsim/src"] {
        let files: Vec<_> = sources(dir).into_iter().filter(|(p, _)| !p.ends_with("shared/src/clock.rs")).collect();
        found.extend(mentions(&files, &["Instant::now", "SystemTime::now", "rand::rng()", "rand::random"]));
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn the_telemetry_path_takes_its_time_from_its_caller() {
    let files = sources("shared/src/trace");
    assert_eq!(mentions(&files, &["Instant::now", "SystemTime::now", "elapsed()"]), Vec::<String>::new());
}

#[test]
fn dependencies_point_one_way() {
    let members = ["shared", "engine-sim", "gateway", "igsim", "benches"];
    let allowed = |name: &str| -> &[&str] {
        match name {
            "shared" => &[],
            "engine-sim" | "gateway" => &["shared"],
            "igsim" => &["shared", "engine-sim", "gateway"],
            _ => &["shared", "engine-sim", "gateway", "igsim"],
        }
    };
    for member in members {
        let manifest = fs::read_to_string(root().join(member).join("Cargo.toml")).unwrap();
        for other in members.iter().filter(|m| **m != member) {
            let depends =
                manifest.lines().any(|l| l.starts_with(&format!("{other}.")) || l.starts_with(&format!("{other} =")));
            assert!(!depends || allowed(member).contains(other), "{member} must not depend on {other}");
        }
    }
}

#[test]
fn nothing_is_left_undone() {
    for dir in ["shared", "engine-sim", "gateway", "igsim", "benches"] {
        let files: Vec<_> = sources(dir).into_iter().filter(|(p, _)| !p.ends_with("tidy.rs")).collect();
        assert_eq!(
            mentions(&files, &[concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!(")]),
            Vec::<String>::new()
        );
    }
}

#[test]
fn local_links_of_the_documents_lead_somewhere() {
    let mut documents: Vec<PathBuf> = Vec::new();
    for dir in ["", "docs", "docs/decisions", "scenarios", "deploy", "registry"] {
        let Ok(entries) = fs::read_dir(root().join(dir)) else { continue };
        documents.extend(entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "md")));
    }
    assert!(documents.len() >= 5, "documents: {documents:?}");
    let mut broken = Vec::new();
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap_or_default();
            let local = !target.is_empty() && !target.contains("://");
            if local && !document.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: {target}", document.display()));
            }
        }
    }
    assert_eq!(broken, Vec::<String>::new());
}
