//! Questions about traces, and the TraceQL that answers them in Grafana Tempo.
//!
//! `library` is the one place where they stand: `igsim query` runs them, docs/queries.md is made from them, and a test asks a
//! real Tempo each of them and compares its answer with one computed from the spans.

mod library;

use std::fmt::Write as _;

use shared::units::HumanDur;

pub use library::QUERIES;

/// A question and its query.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// What it is called on the command line.
    pub name: &'static str,
    /// The question.
    pub question: &'static str,
    /// The query; `$NAME` stands for a parameter. Every `{` begins the conditions of a set of spans.
    pub traceql: &'static str,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// What to look at in the answer.
    pub reads: &'static str,
    /// Where it has an answer.
    pub answers: Answers,
}

/// A parameter of a query.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Its name, without `$`.
    pub name: &'static str,
    /// Its type, and its value unless it is set.
    pub default: Preset,
    /// What it bounds.
    pub meaning: &'static str,
}

/// The type of a parameter with its default. TraceQL compares a whole number with whole numbers only and a decimal one with decimal
/// ones only, so a parameter has the type of the attribute it is compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Preset {
    /// A duration such as `100ms`, compared with the duration of a span.
    Duration(&'static str),
    /// A decimal number.
    Number(f64),
    /// A whole number.
    Int(i64),
    /// Text.
    Text(&'static str),
    /// A trace id. Tempo compares it without its leading zeros.
    TraceId(&'static str),
}

/// A run whose traces have an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// `igsim run` with these arguments, in virtual time.
    Run(&'static str),
    /// What else to do.
    Else(&'static str),
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Traces, each with the spans that match.
    Spans,
    /// Figures.
    Figures,
}

/// A value that does not fit, or a name that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadParameter(String);

/// The query of this name.
pub fn named(name: &str) -> Option<&'static Query> {
    QUERIES.iter().find(|q| q.name == name)
}

impl Query {
    /// What comes back.
    pub fn shape(&self) -> Shape {
        if self.traceql.contains("_over_time(") { Shape::Figures } else { Shape::Spans }
    }

    /// The query with `set` (name and value) and defaults filled in. `only` is a further condition on every span, for example
    /// `resource.deployment.environment.name = "staging"`.
    ///
    /// # Errors
    /// On a parameter that the query does not have, or a value of another type than its own.
    pub fn render(&self, set: &[(String, String)], only: Option<&str>) -> Result<String, BadParameter> {
        if let Some((name, _)) = set.iter().find(|(name, _)| !self.parameters.iter().any(|p| p.name == name)) {
            let names: Vec<&str> = self.parameters.iter().map(|p| p.name).collect();
            let allowed = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(BadParameter(format!("{}: found the parameter {name}, expected {allowed}", self.name)));
        }
        let mut text = self.traceql.to_owned();
        // Longer names first: `$over` is the start of `$over_ms`.
        let mut parameters: Vec<&Parameter> = self.parameters.iter().collect();
        parameters.sort_by_key(|p| std::cmp::Reverse(p.name.len()));
        for parameter in parameters {
            let given = set.iter().rev().find(|(name, _)| name == parameter.name).map(|(_, value)| value.as_str());
            let value = parameter.literal(given).map_err(|expected| {
                let found = given.unwrap_or_default();
                BadParameter(format!("{}: {}: found {found:?}, expected {expected}", self.name, parameter.name))
            })?;
            text = text.replace(&format!("${}", parameter.name), &value);
        }
        Ok(match only {
            Some(condition) => text.replace("{ ", &format!("{{ ({condition}) && (")).replace(" }", ") }"),
            None => text,
        })
    }
}

impl Parameter {
    /// The value as TraceQL writes it; on an error what is allowed.
    fn literal(&self, given: Option<&str>) -> Result<String, &'static str> {
        match self.default {
            Preset::Duration(default) => {
                let expected = "a number and a unit of ns, us, ms, s, m or h";
                given.unwrap_or(default).parse::<HumanDur>().map(|d| d.to_string()).map_err(|_| expected)
            }
            Preset::Number(default) => {
                let number = given.map_or(Ok(default), str::parse).map_err(|_| "a number")?;
                if number.is_finite() { Ok(format!("{number:?}")) } else { Err("a finite number") }
            }
            Preset::Int(default) => {
                let number: i64 = given.map_or(Ok(default), str::parse).map_err(|_| "a whole number")?;
                Ok(number.to_string())
            }
            Preset::Text(default) => {
                let text = given.unwrap_or(default);
                if text.contains(['{', '}', '$']) || text.chars().any(char::is_control) {
                    return Err("a text without braces, dollar and control characters");
                }
                Ok(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
            }
            Preset::TraceId(default) => {
                let text = given.unwrap_or(default);
                let digits = text.trim_start_matches('0').to_ascii_lowercase();
                let good = (1..=32).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
                if good { Ok(format!("\"{digits}\"")) } else { Err("a trace id, 32 hexadecimal digits") }
            }
        }
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Preset::Duration(text) | Preset::Text(text) | Preset::TraceId(text) => f.write_str(text),
            Preset::Number(number) => write!(f, "{number:?}"),
            Preset::Int(number) => write!(f, "{number}"),
        }
    }
}

/// The library as a document: what docs/queries.md holds below its head.
pub fn markdown() -> String {
    let mut out = String::from("| query | question |\n|---|---|\n");
    // Writing to a string does not fail.
    for query in QUERIES {
        let _ = writeln!(out, "| [`{0}`](#{0}) | {1} |", query.name, query.question);
    }
    for query in QUERIES {
        let defaults = query.render(&[], None).unwrap_or_default();
        let _ = write!(out, "\n## {}\n\n{}\n\n```traceql\n{defaults}\n```\n\n", query.name, query.question);
        for p in query.parameters {
            let _ = writeln!(out, "- `--set {}={}`: {}", p.name, p.default, p.meaning);
        }
        if !query.parameters.is_empty() {
            out.push('\n');
        }
        let _ = writeln!(out, "{}\n", query.reads);
        let _ = match query.answers {
            Answers::Run(run) => writeln!(out, "Answers on: `igsim run {run} --otlp http://127.0.0.1:4317`"),
            Answers::Else(what) => writeln!(out, "Answers on: {what}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: Query = Query {
        name: "q",
        question: "?",
        traceql: "{ name = $name && duration > $over } >> { span.a.ms > $over_ms && span.n > $n && link:traceID = $id }",
        parameters: &[
            Parameter { name: "name", default: Preset::Text("a.b"), meaning: "" },
            Parameter { name: "over", default: Preset::Duration("1500ms"), meaning: "" },
            Parameter { name: "over_ms", default: Preset::Number(2.0), meaning: "" },
            Parameter { name: "n", default: Preset::Int(3), meaning: "" },
            Parameter { name: "id", default: Preset::TraceId("0a1B"), meaning: "" },
        ],
        reads: "",
        answers: Answers::Else(""),
    };

    fn check(set: &[(&str, &str)], only: Option<&str>, expect: Result<&str, &str>) {
        let set: Vec<_> = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let found = QUERY.render(&set, only).map_err(|e| e.to_string());
        assert_eq!(found.as_deref().map_err(String::as_str), expect);
    }

    #[test]
    fn parameters_are_filled_in_by_type() {
        check(
            &[],
            None,
            Ok(
                "{ name = \"a.b\" && duration > 1500ms } >> { span.a.ms > 2.0 && span.n > 3 && link:traceID = \"a1b\" }",
            ),
        );
        let set = [("over", "2s"), ("over_ms", "5"), ("n", "1"), ("n", "7"), ("name", "say \"x\\\"")];
        check(
            &set,
            None,
            Ok(
                r#"{ name = "say \"x\\\"" && duration > 2s } >> { span.a.ms > 5.0 && span.n > 7 && link:traceID = "a1b" }"#,
            ),
        );
        let only = Ok(
            "{ (resource.a = 1) && (name = \"a.b\" && duration > 1500ms) } >> { (resource.a = 1) && (span.a.ms > 2.0 && span.n > 3 && link:traceID = \"a1b\") }",
        );
        check(&[], Some("resource.a = 1"), only);
    }

    #[test]
    fn a_wrong_value_is_refused() {
        check(&[("x", "1")], None, Err("q: found the parameter x, expected name, over, over_ms, n, id"));
        check(
            &[("over", "1")],
            None,
            Err("q: over: found \"1\", expected a number and a unit of ns, us, ms, s, m or h"),
        );
        check(&[("over_ms", "NaN")], None, Err("q: over_ms: found \"NaN\", expected a finite number"));
        check(&[("id", "xyz")], None, Err("q: id: found \"xyz\", expected a trace id, 32 hexadecimal digits"));
        check(&[("n", "1.5")], None, Err("q: n: found \"1.5\", expected a whole number"));
        let text = "q: name: found \"{}\", expected a text without braces, dollar and control characters";
        check(&[("name", "{}")], None, Err(text));
    }

    #[test]
    fn every_query_is_whole() {
        let mut names: Vec<_> = QUERIES.iter().map(|q| q.name).collect();
        names.sort_unstable();
        names.dedup();
        assert!(names.len() == QUERIES.len() && names.len() >= 20, "{} names", names.len());
        for query in QUERIES {
            let text = query.render(&[], None).unwrap();
            assert!(!text.contains('$'), "{}: {text}", query.name);
            let unused = query.parameters.iter().find(|p| !query.traceql.contains(&format!("${}", p.name)));
            assert!(unused.is_none(), "{}: {unused:?}", query.name);
            assert!(query.question.ends_with('?') && query.reads.ends_with('.'), "{}", query.name);
        }
    }
}
