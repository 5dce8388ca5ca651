//! Checks a JSON value against the JSON schema of the type it is meant for, and says everything that is wrong at once.
//!
//! The schema is the one `schemars` derives and we publish, so what an error calls allowed is what the documentation says.
//! Only the keywords that derived schemas use are read; what is not understood is left to the type's own `Deserialize`.

use std::cmp::Ordering;

use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::error::{Problem, join};
use super::suggest::{did_you_mean, one_of};

type Object = Map<String, Value>;

/// A schema with its definitions.
#[derive(Debug)]
pub(super) struct Root(Value);

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A key of a mapping.
    Key(String),
    /// An index of a list.
    Index(usize),
}

impl Root {
    /// The schema of `T`.
    pub(super) fn of<T: JsonSchema>() -> Root {
        Root(schemars::SchemaGenerator::default().into_root_schema_for::<T>().to_value())
    }

    /// Everything in `value` that the schema does not allow.
    pub(super) fn check(&self, value: &Value) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.node(&self.0, value, "", &mut problems);
        problems
    }

    /// Whether the schema has a field at `steps`.
    ///
    /// # Errors
    /// The path of the first step that does not exist, and the names that exist there.
    pub(super) fn knows(&self, steps: &[Step]) -> Result<(), (String, Vec<String>)> {
        self.walk(steps).map(|_| ())
    }

    /// What is allowed at `steps`, where the schema says it in words of its own (`x-expected`).
    pub(super) fn expected_at(&self, steps: &[Step]) -> Option<String> {
        let schemas = self.walk(steps).ok()?;
        let named = |s: &&Value| {
            let own = s.get("x-expected").or_else(|| self.resolve(s)?.get("x-expected"));
            own.and_then(Value::as_str).map(str::to_owned)
        };
        let branches = self.branches_of_all(&schemas);
        let inner = || branches.iter().find_map(|b| b.get("x-expected")?.as_str().map(str::to_owned));
        schemas.iter().find_map(named).or_else(inner)
    }

    fn walk<'s>(&'s self, steps: &[Step]) -> Result<Vec<&'s Value>, (String, Vec<String>)> {
        let mut here = vec![&self.0];
        let mut path = String::new();
        for step in steps {
            let open = self.branches_of_all(&here);
            here = open.iter().flat_map(|s| self.child(s, step)).collect();
            path = match step {
                Step::Key(k) => join(&path, k),
                Step::Index(i) => format!("{path}[{i}]"),
            };
            if here.is_empty() {
                let names = open.iter().filter_map(|s| properties(s)).flat_map(|p| p.keys().cloned()).collect();
                return Err((path, names));
            }
        }
        Ok(here)
    }

    fn child<'s>(&'s self, schema: &'s Object, step: &Step) -> Option<&'s Value> {
        match step {
            Step::Key(k) => properties(schema)
                .and_then(|p| p.get(k))
                .or_else(|| schema.get("additionalProperties").filter(|a| **a != Value::Bool(false))),
            Step::Index(_) => schema.get("items"),
        }
    }

    fn branches_of_all<'s>(&'s self, schemas: &[&'s Value]) -> Vec<&'s Object> {
        schemas.iter().flat_map(|s| self.branches(s)).collect()
    }

    /// The alternatives of a schema, with references followed.
    fn branches<'s>(&'s self, schema: &'s Value) -> Vec<&'s Object> {
        let Some(object) = self.resolve(schema) else { return Vec::new() };
        let parts = ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|k| object.get(k)?.as_array()).flatten();
        let mut all: Vec<&Object> = parts.flat_map(|s| self.branches(s)).collect();
        if all.is_empty() || properties(object).is_some() {
            all.push(object);
        }
        all
    }

    fn resolve<'s>(&'s self, schema: &'s Value) -> Option<&'s Object> {
        let mut object = schema.as_object()?;
        // A chain of references is short; a cycle of them alone describes nothing.
        for _ in 0..16 {
            let Some(name) = object.get("$ref").and_then(Value::as_str) else { return Some(object) };
            object = self.0.pointer(name.strip_prefix('#')?)?.as_object()?;
        }
        None
    }

    fn node(&self, schema: &Value, value: &Value, path: &str, out: &mut Vec<Problem>) {
        let Some(object) = self.resolve(schema) else { return };
        if let Some(parts) = object.get("allOf").and_then(Value::as_array) {
            parts.iter().for_each(|p| self.node(p, value, path, out));
        }
        if object.contains_key("anyOf") || object.contains_key("oneOf") {
            return self.union(&self.branches(schema), value, path, out);
        }
        self.plain(object, value, path, out);
    }

    fn plain(&self, schema: &Object, value: &Value, path: &str, out: &mut Vec<Problem>) {
        if !fits_type(schema, value) || !fits_enum(schema, value) || !fits_bounds(schema, value) {
            let (_, width) = width(schema);
            let too_big = value.as_f64().is_some_and(|v| width.is_some_and(|w| v > w));
            let most = width.filter(|_| too_big).map(|w| format!(" and at most {w}")).unwrap_or_default();
            let mut problem = Problem::new(path, describe(value), self.expected(schema) + &most);
            problem.help =
                value.as_str().and_then(|v| did_you_mean(v, words(schema))).map(|c| format!("did you mean {c}?"));
            out.push(problem);
            return;
        }
        match value {
            Value::Object(map) => self.mapping(schema, map, path, out),
            Value::Array(items) => self.list(schema, items, path, out),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    fn mapping(&self, schema: &Object, map: &Object, path: &str, out: &mut Vec<Problem>) {
        let fields = properties(schema);
        for (key, value) in map {
            let child = join(path, key);
            match (fields.and_then(|f| f.get(key)), schema.get("additionalProperties")) {
                (Some(field), _) => {
                    let before = out.len();
                    self.node(field, value, &child, out);
                    out[before..].iter_mut().filter(|p| p.path == child).for_each(|p| hint_default(p, field));
                }
                (None, Some(Value::Bool(false))) => out.push(unknown_key(&child, key, fields)),
                (None, Some(any)) => self.node(any, value, &child, out),
                (None, None) => {}
            }
        }
        let required = schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        for name in required.filter(|name| !map.contains_key(*name)) {
            let expected = fields.and_then(|f| f.get(name)).map_or("a value".to_owned(), |f| self.expected_of(f));
            out.push(Problem::new(join(path, name), "nothing", expected));
        }
    }

    fn list(&self, schema: &Object, items: &[Value], path: &str, out: &mut Vec<Problem>) {
        if let Some(min) = schema.get("minItems").and_then(Value::as_u64).filter(|&m| (items.len() as u64) < m) {
            out.push(Problem::new(path, format!("{} items", items.len()), format!("a list of at least {min}")));
        }
        let Some(each) = schema.get("items") else { return };
        for (i, item) in items.iter().enumerate() {
            self.node(each, item, &format!("{path}[{i}]"), out);
        }
    }

    /// One of several shapes: picks the one that is meant, so that its problems are told and not all alternatives.
    fn union(&self, branches: &[&Object], value: &Value, path: &str, out: &mut Vec<Problem>) {
        let typed: Vec<&Object> = branches.iter().copied().filter(|b| fits_type(b, value)).collect();
        if let Some(map) = value.as_object() {
            if let Some((tag, known)) = tag_of(&typed) {
                let given = map.get(tag).unwrap_or(&Value::Null);
                match typed.iter().find(|b| constant(b, tag) == given.as_str()) {
                    Some(meant) if given.is_string() => return self.plain(meant, value, path, out),
                    _ => return out.push(unknown_word(&join(path, tag), given, &known)),
                }
            }
            let outer =
                |b: &&&Object| map.keys().next().is_some_and(|k| properties(b).is_some_and(|p| p.contains_key(k)));
            if let Some(meant) = typed.iter().find(outer) {
                return self.plain(meant, value, path, out);
            }
        }
        if let [only] = typed.as_slice() {
            return self.plain(only, value, path, out);
        }
        let fits = |b: &&Object| {
            let mut problems = Vec::new();
            self.plain(b, value, path, &mut problems);
            problems.is_empty()
        };
        if !typed.iter().any(fits) {
            let known: Vec<&str> = branches.iter().flat_map(|b| words(b)).collect();
            out.push(match value.as_str() {
                Some(_) if !known.is_empty() => unknown_word(path, value, &known),
                _ => Problem::new(path, describe(value), self.expected_any(branches)),
            });
        }
    }

    fn expected_of(&self, schema: &Value) -> String {
        self.expected_any(&self.branches(schema))
    }

    fn expected_any(&self, branches: &[&Object]) -> String {
        let known: Vec<&str> = branches.iter().flat_map(|b| words(b)).collect();
        let mut parts = Vec::new();
        if !known.is_empty() {
            parts.push(one_of(known));
        }
        let others = branches.iter().filter(|b| words(b).is_empty() && b.get("type") != Some(&Value::from("null")));
        parts.extend(others.map(|b| self.expected(b)));
        parts.dedup();
        parts.join(" or ")
    }

    /// What the schema allows, in words.
    fn expected(&self, schema: &Object) -> String {
        if let Some(text) = schema.get("x-expected").and_then(Value::as_str) {
            return text.to_owned();
        }
        let known = words(schema);
        if !known.is_empty() {
            return one_of(known);
        }
        let (low, high) = (bounds(schema).0, limit(schema, "maximum", "exclusiveMaximum"));
        match types(schema).find(|t| *t != "null").unwrap_or("any") {
            "integer" => format!("an integer{}", range(low, high)),
            "number" => format!("a number{}", range(low, high)),
            "string" => "text".to_owned(),
            "boolean" => "true or false".to_owned(),
            "array" => "a list".to_owned(),
            "object" => match properties(schema).filter(|p| !p.is_empty() && p.len() <= 8) {
                Some(fields) => format!("a mapping with {}", fields.keys().cloned().collect::<Vec<_>>().join(", ")),
                None => "a mapping".to_owned(),
            },
            _ => "a value".to_owned(),
        }
    }
}

/// A value as an error shows it.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("{s:?}"),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

fn hint_default(problem: &mut Problem, field: &Value) {
    let plain = |v: &&Value| matches!(v, Value::Bool(_) | Value::Number(_) | Value::String(_));
    if let Some(default) = field.get("default").filter(plain)
        && problem.help.is_none()
    {
        problem.help = Some(format!("the default is {}", default.as_str().map_or(default.to_string(), str::to_owned)));
    }
}

fn unknown_key(path: &str, key: &str, fields: Option<&Object>) -> Problem {
    let names: Vec<&str> = fields.into_iter().flat_map(|f| f.keys()).map(String::as_str).collect();
    let mut problem = Problem::new(path, "an unknown key", one_of(names.iter().copied()));
    problem.help = did_you_mean(key, names).map(|c| format!("did you mean {c}?"));
    problem.at_key = true;
    problem
}

fn unknown_word(path: &str, given: &Value, known: &[&str]) -> Problem {
    let mut problem = Problem::new(path, describe(given), one_of(known.iter().copied()));
    problem.help =
        given.as_str().and_then(|g| did_you_mean(g, known.iter().copied())).map(|c| format!("did you mean {c}?"));
    problem
}

fn properties(schema: &Object) -> Option<&Object> {
    schema.get("properties")?.as_object()
}

/// The field that tells the branches apart, with its values.
fn tag_of<'s>(branches: &[&'s Object]) -> Option<(&'s str, Vec<&'s str>)> {
    let first = branches.first()?;
    let tag = properties(first)?.keys().find(|k| branches.iter().all(|b| constant(b, k).is_some()))?;
    Some((tag, branches.iter().filter_map(|b| constant(b, tag)).collect()))
}

fn constant<'s>(schema: &'s Object, field: &str) -> Option<&'s str> {
    properties(schema)?.get(field)?.get("const")?.as_str()
}

fn types(schema: &Object) -> impl Iterator<Item = &str> {
    let (one, many) = match schema.get("type") {
        Some(Value::String(t)) => (Some(t.as_str()), None),
        Some(Value::Array(ts)) => (None, Some(ts)),
        _ => (None, None),
    };
    one.into_iter().chain(many.into_iter().flatten().filter_map(Value::as_str))
}

/// The words an enumeration allows.
fn words(schema: &Object) -> Vec<&str> {
    let many = schema.get("enum").and_then(Value::as_array).into_iter().flatten();
    many.chain(schema.get("const")).filter_map(Value::as_str).collect()
}

fn fits_type(schema: &Object, value: &Value) -> bool {
    let mut types = types(schema).peekable();
    types.peek().is_none()
        || types.any(|t| match (t, value) {
            ("null", Value::Null)
            | ("boolean", Value::Bool(_))
            | ("number", Value::Number(_))
            | ("string", Value::String(_))
            | ("array", Value::Array(_))
            | ("object", Value::Object(_)) => true,
            ("integer", Value::Number(n)) => n.is_i64() || n.is_u64(),
            _ => false,
        })
}

fn fits_enum(schema: &Object, value: &Value) -> bool {
    let listed = schema.get("enum").and_then(Value::as_array).is_none_or(|all| all.contains(value));
    listed && schema.get("const").is_none_or(|c| c == value)
}

/// A bound and whether it is itself allowed.
type Bound = Option<(f64, bool)>;

fn bounds(schema: &Object) -> (Bound, Bound) {
    let (low, high) = width(schema);
    let closed = |v| (v, true);
    let low = limit(schema, "minimum", "exclusiveMinimum").or(low.map(closed));
    (low, limit(schema, "maximum", "exclusiveMaximum").or(high.map(closed)))
}

fn limit(schema: &Object, closed: &str, open: &str) -> Bound {
    let get = |key: &str| schema.get(key).and_then(Value::as_f64);
    get(open).map(|v| (v, false)).or(get(closed).map(|v| (v, true)))
}

/// What the integer type itself can hold: said only to those who exceed it.
fn width(schema: &Object) -> (Option<f64>, Option<f64>) {
    match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => (Some(0.0), Some(f64::from(u8::MAX))),
        Some("uint16") => (Some(0.0), Some(f64::from(u16::MAX))),
        Some("uint32") => (Some(0.0), Some(f64::from(u32::MAX))),
        Some("int32") => (Some(f64::from(i32::MIN)), Some(f64::from(i32::MAX))),
        Some("uint64" | "uint") => (Some(0.0), None),
        _ => (None, None),
    }
}

fn fits_bounds(schema: &Object, value: &Value) -> bool {
    let Some(v) = value.as_f64() else { return true };
    let (low, high) = bounds(schema);
    let within = |bound: Bound, wanted: Ordering| {
        bound.is_none_or(|(b, closed)| match v.partial_cmp(&b) {
            Some(Ordering::Equal) => closed,
            Some(order) => order == wanted,
            None => false,
        })
    };
    within(low, Ordering::Greater) && within(high, Ordering::Less)
}

fn range(low: Bound, high: Bound) -> String {
    match (low, high) {
        (None, None) => String::new(),
        (Some((l, true)), Some((h, true))) => format!(" from {l} to {h}"),
        (Some((l, false)), Some((h, true))) => format!(" above {l} and at most {h}"),
        (Some((l, true)), Some((h, false))) => format!(" of at least {l} and below {h}"),
        (Some((l, false)), Some((h, false))) => format!(" between {l} and {h}"),
        (Some((l, true)), None) => format!(" of at least {l}"),
        (Some((l, false)), None) => format!(" above {l}"),
        (None, Some((h, true))) => format!(" of at most {h}"),
        (None, Some((h, false))) => format!(" below {h}"),
    }
}
