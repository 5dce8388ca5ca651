//! Configuration files: YAML in, validated types out, and errors that say where, what was found and what is allowed.
//!
//! A file passes four stages: the marked tree (`document`), overrides of the command line (`overrides`), the JSON schema of
//! the target type (`schema`), which finds every wrong key, type and bound at once, and the type's own [`Validate`]. Problems
//! of one stage are all reported together; a later stage runs only when the earlier ones found nothing.
//!
//! This module knows no scenario, gateway or engine.

mod document;
mod emit;
mod error;
mod overrides;
mod schema;
mod suggest;

use std::path::Path;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

pub use emit::to_yaml;
pub use error::{ConfigErrors, ConfigProblem, Excerpt, Problem, Problems};
pub use suggest::{did_you_mean, one_of};

use document::Document;

/// The largest configuration file read, in bytes.
pub const MAX_FILE_BYTES: u64 = 4 << 20;

/// A value checks what its type cannot say: relations between fields, names that must be known, numbers that must be finite.
pub trait Validate {
    /// Adds everything that is wrong with this value, with paths relative to it.
    fn validate(&self, problems: &mut Problems);
}

/// A configuration that was read and found valid.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The typed configuration.
    pub config: T,
    /// The document with overrides applied, before defaults.
    pub value: serde_json::Value,
    /// What to call the source in messages: the file's path as given.
    pub source: String,
}

/// Reads the file at `path`, applies `overrides` (`path`, YAML value) left to right, and validates the result.
///
/// # Errors
/// All problems found, rendered with the lines of the file they are on.
pub fn load<T>(path: &Path, overrides: &[(String, String)]) -> Result<Loaded<T>, ConfigErrors>
where
    T: DeserializeOwned + Validate + JsonSchema,
{
    load_with(path, overrides, T::validate)
}

/// As [`load`], from text; `source` is what messages call it.
///
/// # Errors
/// All problems found.
pub fn load_str<T>(source: &str, text: &str, overrides: &[(String, String)]) -> Result<Loaded<T>, ConfigErrors>
where
    T: DeserializeOwned + Validate + JsonSchema,
{
    load_str_with(source, text, overrides, T::validate)
}

/// As [`load`], with `check` in place of the type's own validation.
///
/// # Errors
/// All problems found.
pub fn load_with<T>(
    path: &Path,
    overrides: &[(String, String)],
    check: impl FnOnce(&T, &mut Problems),
) -> Result<Loaded<T>, ConfigErrors>
where
    T: DeserializeOwned + JsonSchema,
{
    let source = path.display().to_string();
    let text = read(path).map_err(|p| ConfigErrors::new(&source, vec![p]))?;
    load_str_with(&source, &text, overrides, check)
}

/// As [`load_with`], from text; `source` is what messages call it.
///
/// # Errors
/// All problems found.
pub fn load_str_with<T>(
    source: &str,
    text: &str,
    overrides: &[(String, String)],
    check: impl FnOnce(&T, &mut Problems),
) -> Result<Loaded<T>, ConfigErrors>
where
    T: DeserializeOwned + JsonSchema,
{
    let fail = |problems| Err(ConfigErrors::new(source, problems));
    let root = schema::Root::of::<T>();

    let (mut document, mut problems) = match Document::parse(text) {
        Ok(parsed) => parsed,
        Err(problems) => return fail(problems),
    };
    for (path, value) in overrides {
        problems.extend(overrides::apply(&mut document, &root, path, value).err());
    }
    let known: Vec<String> = problems.iter().map(|p| p.path.clone()).collect();
    problems.extend(root.check(&document.value).into_iter().filter(|p| !known.contains(&p.path)));
    if !problems.is_empty() {
        return fail(document.locate(problems));
    }

    let config: T = match serde_path_to_error::deserialize(&document.value) {
        Ok(config) => config,
        Err(e) => return fail(document.locate(vec![refused(&root, &document, &e)])),
    };
    let mut problems = Problems::default();
    check(&config, &mut problems);
    match problems.into_vec() {
        none if none.is_empty() => Ok(Loaded { config, value: document.value, source: source.to_owned() }),
        some => fail(document.locate(some)),
    }
}

/// What the type's own `Deserialize` refused: it knows what is wrong, the schema knows what is allowed.
fn refused(root: &schema::Root, document: &Document, e: &serde_path_to_error::Error<serde_json::Error>) -> Problem {
    let mut problem = error::from_serde(e);
    if let Some(steps) = overrides::parse_path(&problem.path)
        && let Some(value) = overrides::lookup(&document.value, &steps)
        && let Some(expected) = root.expected_at(&steps)
    {
        problem.found = schema::describe(value);
        problem.expected = expected;
    }
    problem
}

fn read(path: &Path) -> Result<String, Problem> {
    let found = |found: String| Problem::new("", found, "a readable YAML file");
    let size = std::fs::metadata(path).map_err(|e| found(io_text(&e)))?.len();
    if size > MAX_FILE_BYTES {
        return Err(Problem::new(
            "",
            format!("{size} bytes"),
            format!("a YAML file of at most {MAX_FILE_BYTES} bytes"),
        ));
    }
    let bytes = std::fs::read(path).map_err(|e| found(io_text(&e)))?;
    String::from_utf8(bytes).map_err(|e| {
        Problem::new("", format!("a byte that is not UTF-8 at offset {}", e.utf8_error().valid_up_to()), "UTF-8 text")
    })
}

fn io_text(e: &std::io::Error) -> String {
    use std::io::ErrorKind;
    match e.kind() {
        ErrorKind::NotFound => "no such file".to_owned(),
        ErrorKind::PermissionDenied => "a file without permission to read it".to_owned(),
        ErrorKind::IsADirectory => "a directory".to_owned(),
        _ => format!("an I/O error ({e})"),
    }
}

#[cfg(test)]
mod tests;
