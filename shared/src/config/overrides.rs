//! `--set path=value`: changes one value of a document before it is checked.
//!
//! Only paths that exist in the document or in the schema may be set, so a misspelt one is an error and never ignored.

use serde_json::{Map, Value};

use super::document::Document;
use super::error::{Excerpt, Problem};
use super::schema::{Root, Step};
use super::suggest::{did_you_mean, one_of};

/// Sets the value at `path` to `text`, read as YAML.
pub(super) fn apply(document: &mut Document, schema: &Root, path: &str, text: &str) -> Result<(), Problem> {
    let wrong = |mut problem: Problem, from: usize, width: usize| {
        let line = format!("{path}={text}");
        problem.excerpt = Some(Box::new(Excerpt { label: "--set".to_owned(), line, column: from, width }));
        problem
    };
    let whole = path.chars().count();
    let steps = parse_path(path)
        .ok_or_else(|| Problem::new("--set", format!("the path {path:?}"), "a path such as engines[0].count"))
        .map_err(|p| wrong(p, 0, whole))?;
    if lookup(&document.value, &steps).is_none()
        && let Err((at, names)) = schema.knows(&steps)
    {
        return Err(wrong(unknown(&at, &names), 0, whole));
    }
    let value = parse_value(path, text).map_err(|p| wrong(p, whole + 1, text.chars().count()))?;
    insert(&mut document.value, &steps, value).map_err(|p| wrong(p, 0, whole))?;
    document.set.push((path.to_owned(), text.to_owned()));
    Ok(())
}

fn unknown(at: &str, names: &[String]) -> Problem {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let last = at.rsplit(['.', '[']).next().unwrap_or(at);
    let mut problem = Problem::new(at, "an unknown key", one_of(names.iter().copied()));
    problem.help = did_you_mean(last, names).map(|c| format!("did you mean {c}?"));
    problem
}

fn parse_value(path: &str, text: &str) -> Result<Value, Problem> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    match Document::parse(text) {
        Ok((document, problems)) if problems.is_empty() => Ok(document.value),
        Ok((_, problems)) | Err(problems) => {
            let first = problems.into_iter().next();
            Err(first.map_or_else(
                || Problem::new(path, "a value that cannot be read", "YAML"),
                |p| Problem::new(path, p.found, p.expected),
            ))
        }
    }
}

/// `engines[1].scheduler.policy` as steps.
pub(super) fn parse_path(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    for part in path.split('.') {
        let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if name.is_empty() {
            return None;
        }
        steps.push(Step::Key(name.to_owned()));
        while let Some(inner) = rest.strip_prefix('[') {
            let (index, after) = inner.split_once(']')?;
            steps.push(Step::Index(index.parse().ok()?));
            rest = after;
        }
        if !rest.is_empty() {
            return None;
        }
    }
    Some(steps)
}

/// The value at `steps`.
pub(super) fn lookup<'v>(value: &'v Value, steps: &[Step]) -> Option<&'v Value> {
    steps.iter().try_fold(value, |here, step| match step {
        Step::Key(k) => here.get(k),
        Step::Index(i) => here.get(i),
    })
}

/// Walks to `steps`, making mappings on the way; a list grows by one item at most.
fn insert(root: &mut Value, steps: &[Step], value: Value) -> Result<(), Problem> {
    let mut here = root;
    for step in steps {
        if here.is_null() {
            *here = match step {
                Step::Key(_) => Value::Object(Map::new()),
                Step::Index(_) => Value::Array(Vec::new()),
            };
        }
        here = match (step, here) {
            (Step::Key(k), Value::Object(map)) => map.entry(k.clone()).or_insert(Value::Null),
            (Step::Index(i), Value::Array(items)) => slot(items, *i)?,
            (Step::Key(k), _) => return Err(Problem::new("--set", format!("the key {k}"), "a path into a mapping")),
            (Step::Index(i), _) => return Err(Problem::new("--set", format!("[{i}]"), "a path into a list")),
        };
    }
    *here = value;
    Ok(())
}

fn slot(items: &mut Vec<Value>, i: usize) -> Result<&mut Value, Problem> {
    if i > items.len() {
        return Err(Problem::new("--set", format!("index {i}"), format!("an index of at most {}", items.len())));
    }
    if i == items.len() {
        items.push(Value::Null);
    }
    Ok(&mut items[i])
}
