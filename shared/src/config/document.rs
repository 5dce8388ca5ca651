//! A YAML document as JSON, with the place of every value in the text.
//!
//! This file knows YAML and positions; it knows no schema.

use std::collections::BTreeMap;

use saphyr::{LoadableYamlNode, MarkedYaml, Marker, Scalar, YamlData};
use serde_json::{Map, Number, Value};

use super::error::{Excerpt, Problem, join};

/// The document and where its parts stand.
#[derive(Debug)]
pub(super) struct Document {
    /// The values.
    pub(super) value: Value,
    lines: Vec<String>,
    places: BTreeMap<String, Place>,
    /// Overrides by path, newest last: their values stand on the command line.
    pub(super) set: Vec<(String, String)>,
}

/// Where a value stands: line from 1, column and width in characters.
#[derive(Clone, Copy, Debug)]
struct Spot {
    line: usize,
    column: usize,
    width: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    key: Option<Spot>,
    value: Option<Spot>,
}

impl Document {
    /// Parses `text`. `Ok` may come with problems of single values (`.nan`), `Err` means there is no tree.
    pub(super) fn parse(text: &str) -> Result<(Document, Vec<Problem>), Vec<Problem>> {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let docs = match MarkedYaml::load_from_str(text) {
            Ok(docs) => docs,
            Err(e) if e.info().contains("duplicated key") => return Err(duplicates(text, &lines, *e.marker())),
            Err(e) => return Err(vec![syntax(&lines, e.info(), *e.marker())]),
        };
        let root = match docs.as_slice() {
            [] => return Err(vec![Problem::new("", "an empty document", "a mapping")]),
            [one] => one,
            [_, second, ..] => return Err(vec![second_document(&lines, second)]),
        };
        let mut walk = Walk { text, places: BTreeMap::new(), problems: Vec::new() };
        let value = walk.convert("", None, root);
        let Walk { places, problems, .. } = walk;
        Ok((Document { value, lines, places, set: Vec::new() }, problems))
    }

    /// Adds to each problem the line it is on and sorts them as in the text.
    pub(super) fn locate(&self, mut problems: Vec<Problem>) -> Vec<Problem> {
        problems.sort_by_key(|p| self.order(&p.path));
        for p in &mut problems {
            if p.excerpt.is_none() {
                p.excerpt = self.excerpt(&p.path, p.at_key).map(Box::new);
            }
        }
        problems
    }

    fn order(&self, path: &str) -> (usize, usize) {
        self.spot(path, true).map_or((usize::MAX, 0), |s| (s.line, s.column))
    }

    fn excerpt(&self, path: &str, at_key: bool) -> Option<Excerpt> {
        let under = |set: &str| path == set || path.strip_prefix(set).is_some_and(|r| r.starts_with(['.', '[']));
        if let Some((path, text)) = self.set.iter().rev().find(|(set, _)| under(set)) {
            let column = path.chars().count() + 1;
            let (line, width) = (format!("{path}={text}"), text.chars().count());
            return Some(Excerpt { label: "--set".to_owned(), line, column, width });
        }
        let spot = self.spot(path, at_key)?;
        Some(excerpt(&self.lines, spot))
    }

    /// The value's own place, else its key's, else that of the nearest mapping around it.
    fn spot(&self, path: &str, at_key: bool) -> Option<Spot> {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return if at_key { place.key.or(place.value) } else { place.value.or(place.key) };
            }
            if path.is_empty() {
                return None;
            }
            path = parent(path);
        }
    }
}

/// `a.b[1]` → `a.b` → `a` → ``.
fn parent(path: &str) -> &str {
    path.rfind(['.', '[']).map_or("", |i| &path[..i])
}

fn excerpt(lines: &[String], spot: Spot) -> Excerpt {
    let line = lines.get(spot.line - 1).cloned().unwrap_or_default();
    Excerpt { label: spot.line.to_string(), line, column: spot.column, width: spot.width }
}

struct Walk<'a> {
    text: &'a str,
    places: BTreeMap<String, Place>,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn convert(&mut self, path: &str, key: Option<Spot>, node: &MarkedYaml<'_>) -> Value {
        let scalar = matches!(node.data, YamlData::Value(_) | YamlData::Representation(..));
        let value = (scalar || node.span.start.line() == node.span.end.line()).then(|| spot(node)).flatten();
        self.places.insert(path.to_owned(), Place { key, value });
        match &node.data {
            YamlData::Value(scalar) => self.scalar(path, scalar, node),
            YamlData::Representation(text, ..) => Value::String(text.to_string()),
            YamlData::Sequence(items) => {
                let item = |(i, n)| self.convert(&format!("{path}[{i}]"), spot(n), n);
                Value::Array(items.iter().enumerate().map(item).collect())
            }
            YamlData::Mapping(map) => self.mapping(path, map.iter()),
            YamlData::Tagged(tag, inner) => {
                self.problems.push(Problem::new(path, format!("the tag !{}", tag.suffix), "a value without a tag"));
                self.convert(path, key, inner)
            }
            YamlData::Alias(_) | YamlData::BadValue => {
                self.problems.push(Problem::new(path, "a value that cannot be read", "a plain YAML value"));
                Value::Null
            }
        }
    }

    fn mapping<'n, 'i: 'n>(
        &mut self,
        path: &str,
        entries: impl Iterator<Item = (&'n MarkedYaml<'i>, &'n MarkedYaml<'i>)>,
    ) -> Value {
        let mut out = Map::new();
        for (key, value) in entries {
            let Some(name) = key_text(key) else {
                self.problems.push(Problem::new(path, "a key that is not text", "keys that are names"));
                continue;
            };
            let child = self.convert(&join(path, &name), spot(key), value);
            out.insert(name, child);
        }
        Value::Object(out)
    }

    fn scalar(&mut self, path: &str, scalar: &Scalar<'_>, node: &MarkedYaml<'_>) -> Value {
        match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(b) => Value::Bool(*b),
            Scalar::Integer(i) => Value::Number((*i).into()),
            Scalar::String(s) => Value::String(s.to_string()),
            Scalar::FloatingPoint(f) => {
                let (from, to) = (node.span.start.index(), node.span.end.index());
                let raw: String = self.text.chars().skip(from).take(to.saturating_sub(from)).collect();
                // Integers beyond i64 reach us as floats; seeds use all 64 bits.
                if let Ok(big) = raw.trim().parse::<u64>() {
                    return Value::Number(big.into());
                }
                Number::from_f64(f.into_inner()).map_or_else(
                    || {
                        self.problems.push(Problem::new(path, raw.trim(), "a finite number"));
                        Value::Null
                    },
                    Value::Number,
                )
            }
        }
    }
}

fn key_text(key: &MarkedYaml<'_>) -> Option<String> {
    match &key.data {
        YamlData::Value(Scalar::String(s)) => Some(s.to_string()),
        YamlData::Value(Scalar::Integer(i)) => Some(i.to_string()),
        YamlData::Value(Scalar::Boolean(b)) => Some(b.to_string()),
        YamlData::Value(Scalar::FloatingPoint(f)) => Some(f.to_string()),
        YamlData::Value(Scalar::Null)
        | YamlData::Representation(..)
        | YamlData::Sequence(_)
        | YamlData::Mapping(_)
        | YamlData::Tagged(..)
        | YamlData::Alias(_)
        | YamlData::BadValue => None,
    }
}

fn spot(node: &MarkedYaml<'_>) -> Option<Spot> {
    let (start, end) = (node.span.start, node.span.end);
    if start.line() == 0 {
        return None;
    }
    let width = if end.line() == start.line() { end.col().saturating_sub(start.col()) } else { 1 };
    Some(Spot { line: start.line(), column: start.col(), width: width.max(1) })
}

fn at(marker: Marker) -> Spot {
    Spot { line: marker.line().max(1), column: marker.col(), width: 1 }
}

fn syntax(lines: &[String], info: &str, marker: Marker) -> Problem {
    // The scanner notices a tab only where it stops; the tab itself is what the reader has to see.
    let mut spot = at(marker);
    if lines.get(spot.line - 1).is_none() {
        spot = Spot { line: lines.len().max(1), column: lines.last().map_or(0, |l| l.chars().count()), width: 1 };
    }
    let line = &lines.get(spot.line - 1).map_or("", String::as_str);
    let indent = line.len() - line.trim_start().len();
    let tab = line[..indent].find('\t');
    let (found, expected) = match tab {
        Some(column) => {
            spot.column = column;
            ("a tab in the indentation".to_owned(), "spaces".to_owned())
        }
        None => (format!("a syntax error ({info})"), "YAML".to_owned()),
    };
    let mut problem = Problem::new(format!("line {}", spot.line), found, expected);
    problem.excerpt = Some(Box::new(excerpt(lines, spot)));
    problem
}

fn second_document(lines: &[String], second: &MarkedYaml<'_>) -> Problem {
    let mut problem = Problem::new("", "a second document", "one document in the file");
    problem.excerpt = spot(second).map(|s| Box::new(excerpt(lines, s)));
    problem
}

/// Every duplicate key, with its path.
///
/// The parser stops at the first one and does not say under which path it stands. Renaming it to a key of the same width, and
/// parsing again, shows both its path and the next duplicate.
fn duplicates(text: &str, lines: &[String], first: Marker) -> Vec<Problem> {
    const AT_MOST: usize = 20;
    let mut chars: Vec<char> = text.chars().collect();
    let mut problems = Vec::new();
    let mut renamed: Vec<(String, String, Marker)> = Vec::new();
    let mut marker = first;
    for n in 0..AT_MOST {
        let Some((original, alias)) = rename(&mut chars, marker.index(), n) else { break };
        renamed.push((alias, original, marker));
        let patched: String = chars.iter().collect();
        match MarkedYaml::load_from_str(&patched) {
            Err(e) if e.info().contains("duplicated key") => marker = *e.marker(),
            Err(e) => {
                problems.push(syntax(lines, e.info(), *e.marker()));
                break;
            }
            Ok(docs) => {
                problems.extend(renamed.iter().map(|r| duplicate(lines, docs.first(), r)));
                return problems;
            }
        }
    }
    let unlocated = renamed.iter().map(|r| duplicate(lines, None, r));
    problems.splice(0..0, unlocated);
    if problems.is_empty() {
        problems.push(syntax(lines, "duplicated key in mapping", marker));
    }
    problems
}

/// Overwrites the key that starts at `index` with private-use characters; gives the old and the new name.
fn rename(chars: &mut [char], index: usize, n: usize) -> Option<(String, String)> {
    let quoted = |c: char| matches!(c, '"' | '\'');
    let start = index + usize::from(chars.get(index).is_some_and(|&c| quoted(c)));
    let end = start + chars.get(start..)?.iter().position(|&c| c == ':' || c == '\n' || quoted(c))?;
    let original: String = chars[start..end].iter().collect();
    let filler = char::from_u32(0xE000 + u32::try_from(n).ok()?)?;
    chars[start..end].fill(filler);
    let alias: String = chars[start..end].iter().collect();
    (!alias.is_empty()).then_some((original.trim().to_owned(), alias))
}

fn duplicate(lines: &[String], root: Option<&MarkedYaml<'_>>, renamed: &(String, String, Marker)) -> Problem {
    let (alias, original, marker) = renamed;
    let around = root.and_then(|r| path_of_key(r, alias.trim(), "")).unwrap_or_default();
    let mut problem = Problem::new(join(&around, original), "the same key a second time", "each key once");
    problem.excerpt = Some(Box::new(excerpt(lines, Spot { width: original.chars().count(), ..at(*marker) })));
    problem
}

fn path_of_key(node: &MarkedYaml<'_>, name: &str, path: &str) -> Option<String> {
    match &node.data {
        YamlData::Mapping(map) => map.iter().find_map(|(key, value)| {
            let key = key_text(key)?;
            if key == name { Some(path.to_owned()) } else { path_of_key(value, name, &join(path, &key)) }
        }),
        YamlData::Sequence(items) => {
            items.iter().enumerate().find_map(|(i, item)| path_of_key(item, name, &format!("{path}[{i}]")))
        }
        YamlData::Tagged(_, inner) => path_of_key(inner, name, path),
        YamlData::Value(_) | YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => None,
    }
}
