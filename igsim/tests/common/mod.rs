//! What the end-to-end tests share: the program run as a user runs it, and what it leaves behind read back.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

#[path = "../../../shared/tests/support/collector.rs"]
pub mod collector;
pub mod http;
pub mod tempo;
pub mod traceql;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use igsim::inspect::TRACES_FILE;
use igsim::report::Report;
use shared::trace::check::{CheckOptions, Finding, check};
use shared::trace::registry::Registry;
use shared::trace::{Kind, Span, TraceSet, Value, otlp_json};

/// Spans of a request of the default gateway (two filters, four scorers) whose prompt is one prefill chunk.
pub const SPANS_PER_TRACE: usize = 24;

/// A scenario of a tenth of a second: ports that are free, every trace kept.
pub const TINY: &str = "\
name: tiny
requests: 12
engines:
  - { count: 2, profile: llama-3.1-8b-h100 }
workload:
  arrivals: { process: poisson, rate: 100 }
  prompt_tokens: 64
  output_tokens: 4
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
tracing: { ratio: 1.0 }
";

/// A folder of the test's own, in which the program runs.
pub struct Place(tempfile::TempDir);

/// What a program that ended has said.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Place {
    pub fn new() -> Place {
        Place(tempfile::tempdir().expect("a folder"))
    }

    /// A place with [`TINY`] as `tiny.yaml`.
    pub fn with_tiny() -> Place {
        let place = Place::new();
        place.write("tiny.yaml", TINY);
        place
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("the folder can be written");
    }

    /// Names of what lies in the place, sorted.
    pub fn names(&self) -> Vec<String> {
        names(self.dir())
    }

    /// The program, not started: nothing of the test's own environment reaches it.
    pub fn igsim(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_igsim"));
        command.current_dir(self.dir()).env_clear().env("NO_COLOR", "1").stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn ran(&self, args: &[&str]) -> Ran {
        Ran::of(self.igsim().args(args).output())
    }

    /// As [`Place::ran`], with environment variables.
    pub fn ran_with(&self, env: &[(&str, &str)], args: &[&str]) -> Ran {
        Ran::of(self.igsim().envs(env.iter().copied()).args(args).output())
    }

    /// Runs the program, which must succeed.
    pub fn good(&self, args: &[&str]) -> Ran {
        let ran = self.ran(args);
        assert_eq!(ran.code, 0, "{args:?}: {ran:#?}");
        ran
    }

    pub fn report(&self, run: &str) -> Report {
        report(&self.path(run))
    }

    pub fn traces(&self, run: &str) -> TraceSet {
        traces(&self.path(run))
    }
}

impl Ran {
    pub fn of(output: std::io::Result<Output>) -> Ran {
        let Output { status, stdout, stderr } = output.expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Ran { code: status.code().unwrap_or(-1), out: text(stdout), err: text(stderr) }
    }
}

/// Names of what lies in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a folder");
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The library of scenarios.
pub fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios")
}

/// A scenario of the library.
pub fn scenario(name: &str) -> String {
    library().join(format!("{name}.yaml")).display().to_string()
}

pub fn report(run: &Path) -> Report {
    let text = std::fs::read_to_string(run.join("report.json")).expect("a report");
    serde_json::from_str(&text).expect("the report's own type")
}

pub fn traces(run: &Path) -> TraceSet {
    otlp_json::read_file(run.join(TRACES_FILE)).expect("the run's own traces")
}

/// The rows of `requests.csv`, each by the names of its columns.
pub fn rows(run: &Path) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(run.join("requests.csv")).expect("the table of requests");
    reader.deserialize().map(|row| row.expect("a row")).collect()
}

/// What the checks find, with the registry.
pub fn findings(set: &TraceSet) -> Vec<Finding> {
    let registry = Registry::builtin().expect("the registry is sound");
    check(set, &CheckOptions { registry: Some(&registry), ..CheckOptions::default() })
}

/// The spans of each trace, by its id as text.
pub fn by_trace(set: &TraceSet) -> BTreeMap<String, Vec<&Span>> {
    let mut all: BTreeMap<String, Vec<&Span>> = BTreeMap::new();
    for span in &set.spans {
        all.entry(span.trace_id.to_string()).or_default().push(span);
    }
    all
}

/// Fails unless the spans are one tree: one root, which is the gateway's, and every parent there. Written without the checks of
/// the product, which have to agree.
pub fn assert_whole(spans: &[&Span]) {
    let ids: std::collections::BTreeSet<_> = spans.iter().map(|s| s.span_id).collect();
    assert_eq!(ids.len(), spans.len(), "ids are unique (I4)");
    let (roots, children): (Vec<&Span>, Vec<&Span>) = spans.iter().partition(|s| s.parent.is_none());
    let names: Vec<_> = roots.iter().map(|s| (s.name.as_ref(), s.kind)).collect();
    assert_eq!(names, [("gateway.request", Kind::Server)]);
    for child in children {
        let parent = spans.iter().find(|s| Some(s.span_id) == child.parent);
        let parent = parent.unwrap_or_else(|| panic!("{} has no parent (I4)", child.name));
        // Of an attempt that was given up, and says so.
        let late = ["vllm.late", "pd_proxy.late"].iter().any(|key| child.get(key) == Some(&Value::Bool(true)));
        let inside = parent.start <= child.start && (child.end <= parent.end || late);
        assert!(inside, "{} leaves {}", child.name, parent.name);
    }
}

/// The text of an answer: streamed or whole, from the content of its JSON.
pub fn words(answer: &str) -> impl Iterator<Item = String> {
    let content = answer.split("\"content\":\"").chain(answer.split("\"text\":\"")).skip(1);
    let texts = content.filter_map(|rest| rest.split('"').next()).map(str::to_owned);
    // Filler is words of three letters: a single one may stand anywhere by accident.
    texts.filter(|text| text.split_whitespace().count() > 1).collect::<Vec<_>>().into_iter()
}

/// What stands around a word of a text.
pub fn around<'a>(text: &'a str, word: &str) -> &'a str {
    let at = text.find(word).unwrap_or(0);
    let (from, to) = (text.floor_char_boundary(at.saturating_sub(200)), text.ceil_char_boundary(at + 100));
    &text[from..to]
}
