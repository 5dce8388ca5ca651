//! What a configuration error looks like to the person who has to fix it.
//!
//! This file knows how problems print; it does not know how they are found.

use std::fmt;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, for example `engines[1].scheduler.max_num_seqs`; empty for the whole file.
    pub path: String,
    /// What was found.
    pub found: String,
    /// What is allowed there.
    pub expected: String,
    /// How to mend it, where there is something to say.
    pub help: Option<String>,
    /// Where it stands.
    pub excerpt: Option<Box<Excerpt>>,
    /// Whether the key is wrong, not its value.
    pub(super) at_key: bool,
}

/// A value that a core cannot run with, by its path below that core; whoever read the file adds where that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// Path of the field, for example `scheduler.max_num_seqs`.
    pub path: String,
    /// What was found.
    pub found: String,
    /// What is allowed.
    pub allowed: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: found {}, expected {}", self.path, self.found, self.allowed)
    }
}

/// A line of the source with the part that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// What stands before the bar: the line number, or `--set`.
    pub label: String,
    /// The line.
    pub line: String,
    /// First column that is wrong, counted in characters from 0.
    pub column: usize,
    /// How many characters are wrong, at least 1.
    pub width: usize,
}

impl Problem {
    /// A problem at `path`.
    pub fn new(path: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Problem {
        let (path, found, expected) = (path.into(), found.into(), expected.into());
        Problem { path, found, expected, help: None, excerpt: None, at_key: false }
    }

    /// The same problem with a hint.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Problem {
        self.help = Some(help.into());
        self
    }
}

/// Problems under construction: [`crate::config::Validate`] adds to it with paths relative to the value it looks at.
#[derive(Debug, Default)]
pub struct Problems {
    prefix: String,
    found: Vec<Problem>,
}

impl Problems {
    /// Adds a problem at `path`, relative to the current prefix.
    pub fn add(&mut self, path: &str, found: impl fmt::Display, expected: impl Into<String>) -> &mut Problem {
        let problem = Problem::new(join(&self.prefix, path), found.to_string(), expected);
        self.found.push(problem);
        let last = self.found.len() - 1;
        &mut self.found[last]
    }

    /// Adds a problem at `path` unless `ok`.
    pub fn check(&mut self, ok: bool, path: &str, found: impl fmt::Display, expected: &str) {
        if !ok {
            self.add(path, found, expected);
        }
    }

    /// Lets `inner` add problems with paths relative to `path`.
    pub fn at(&mut self, path: &str, inner: impl FnOnce(&mut Problems)) {
        let outer = std::mem::take(&mut self.prefix);
        self.prefix = join(&outer, path);
        inner(self);
        self.prefix = outer;
    }

    /// Whether nothing was found so far.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The problems in the order in which they were added.
    pub fn into_vec(self) -> Vec<Problem> {
        self.found
    }
}

/// `a` and `b` as one path; `[3]` needs no dot.
pub(super) fn join(a: &str, b: &str) -> String {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.to_owned(),
        (_, true) => a.to_owned(),
        _ if b.starts_with('[') => format!("{a}{b}"),
        _ => format!("{a}.{b}"),
    }
}

/// Everything wrong with one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    source: String,
    problems: Vec<Problem>,
}

impl ConfigErrors {
    /// Errors of `source`; there is at least one.
    pub fn new(source: &str, problems: Vec<Problem>) -> ConfigErrors {
        assert!(!problems.is_empty(), "errors need a problem");
        ConfigErrors { source: source.to_owned(), problems }
    }

    /// The problems, in the order of the file where it is known.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl std::error::Error for ConfigErrors {}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            render(f, &self.source, problem)?;
        }
        Ok(())
    }
}

fn render(f: &mut fmt::Formatter<'_>, source: &str, p: &Problem) -> fmt::Result {
    write!(f, "error: {source}: ")?;
    if !p.path.is_empty() {
        write!(f, "{}: ", p.path)?;
    }
    write!(f, "found {}, expected {}", p.found, p.expected)?;
    if let Some(Excerpt { label, line, column, width }) = p.excerpt.as_deref() {
        let gutter = label.chars().count().max(4);
        write!(f, "\n{label:>gutter$} | {}", line.replace('\t', " "))?;
        write!(f, "\n{:gutter$} | {:column$}{}", "", "", "^".repeat((*width).max(1)))?;
    }
    if let Some(help) = &p.help {
        write!(f, "\nhelp: {help}")?;
    }
    Ok(())
}

/// What serde says where the schema said nothing: the type's own `Deserialize` refused the value.
pub(super) fn from_serde(e: &serde_path_to_error::Error<serde_json::Error>) -> Problem {
    let path = e.path().to_string();
    let path = if path == "." { String::new() } else { path };
    let text = e.inner().to_string();
    match text.split_once(", expected ") {
        Some((found, expected)) => Problem::new(path, found, expected),
        None => Problem::new(path, "a value that does not fit", text),
    }
}
