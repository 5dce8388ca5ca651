//! JSON values as YAML that people can read and [`super::load`] reads back as the same value.

use std::fmt::Write;

use serde_json::Value;

/// `value` as a YAML document.
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(map, 0, &mut out),
        Value::Array(items) if !items.is_empty() => list(items, 0, &mut out),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            scalar(value, &mut out);
            out.push('\n');
        }
    }
    out
}

fn mapping(map: &serde_json::Map<String, Value>, indent: usize, out: &mut String) {
    for (i, (key, value)) in map.iter().enumerate() {
        // The first key of a list's item stands on the line of its dash.
        if i > 0 || out.is_empty() || out.ends_with('\n') {
            push_indent(indent, out);
        }
        text(key, out);
        out.push(':');
        nested(value, indent, out);
    }
}

fn nested(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            mapping(map, indent + 2, out);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            list(items, indent + 2, out);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            out.push(' ');
            scalar(value, out);
            out.push('\n');
        }
    }
}

fn list(items: &[Value], indent: usize, out: &mut String) {
    for item in items {
        push_indent(indent, out);
        out.push('-');
        match item {
            Value::Object(map) if !map.is_empty() => {
                out.push(' ');
                mapping(map, indent + 2, out);
            }
            Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
                nested(item, indent, out);
            }
        }
    }
}

fn push_indent(indent: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', indent));
}

fn scalar(value: &Value, out: &mut String) {
    // Writing to a String does not fail.
    let _ = match value {
        Value::String(s) => return text(s, out),
        Value::Array(_) => write!(out, "[]"),
        Value::Object(_) => write!(out, "{{}}"),
        Value::Null | Value::Bool(_) | Value::Number(_) => write!(out, "{value}"),
    };
}

/// Plain where nobody could read it as anything else, else in double quotes: JSON strings are YAML strings.
fn text(s: &str, out: &mut String) {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let reserved = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"];
    let plain = s.starts_with(|c: char| c.is_ascii_alphabetic())
        && s.chars().all(|c| word(c) || c == ' ')
        && !s.ends_with(' ')
        && !reserved.contains(&s.to_ascii_lowercase().as_str());
    if plain {
        out.push_str(s);
    } else {
        let _ = write!(out, "{}", Value::from(s));
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Document;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn yaml_is_readable() {
        let value =
            json!({"name": "oak", "empty": {}, "none": null, "list": [1, {"a": 2, "b": [3]}, [4, 5], []], "odd": "no"});
        insta::assert_snapshot!(to_yaml(&value), @r#"
        empty: {}
        list:
          - 1
          - a: 2
            b:
              - 3
          -
            - 4
            - 5
          - []
        name: oak
        none: null
        odd: "no"
        "#);
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9f64..1e9).prop_map(|f| Value::from(f + 0.5)),
            "[ -~äß\n\t]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[ -~]{0,8}", inner, 0..5)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(value in any_value()) {
            let yaml = to_yaml(&value);
            let (document, problems) = Document::parse(&yaml).unwrap();
            prop_assert!(problems.is_empty(), "{yaml}");
            prop_assert_eq!(document.value, value, "{}", yaml);
        }
    }
}
