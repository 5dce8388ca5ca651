//! What TraceQL says, as far as the registry has to agree with it: names of spans and events, keys, the types they are compared with.

use std::collections::BTreeSet;

use shared::trace::Resource;
use shared::trace::registry::{AttributeType, Registry};

/// Keys of resources, which are OpenTelemetry's and stand in `Resource`.
fn resource_keys() -> BTreeSet<String> {
    let some = || Some("x".to_owned());
    let (version, namespace, environment, host_name) = (some(), some(), some(), some());
    let (service_name, instance_id) = ("x".to_owned(), "x".to_owned());
    let extra = Vec::new();
    let all =
        Resource { service_name, instance_id, version, namespace, environment, host_name, extra, clock_skew_ns: 0 };
    all.attributes().into_iter().map(|(key, _)| key.into_owned()).collect()
}

/// A word of a query.
#[derive(Clone, Debug, PartialEq)]
enum Word {
    /// A name, a key with its scope, a keyword, a number.
    Plain(String),
    /// Text in quotes.
    Quoted(String),
    /// Everything else.
    Sign(String),
}

fn words(query: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut rest = query.trim_start();
    while let Some(first) = rest.chars().next() {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':');
        let length = if first == '"' {
            rest[1..].find('"').expect("a closing quote") + 2
        } else if plain(first) {
            rest.find(|c| !plain(c)).unwrap_or(rest.len())
        } else if matches!(first, '{' | '}' | '(' | ')' | ',') {
            1
        } else {
            let sign = |c: char| !plain(c) && !c.is_whitespace() && !matches!(c, '"' | '{' | '}' | '(' | ')' | ',');
            rest.find(|c| !sign(c)).unwrap_or(rest.len())
        };
        let word = &rest[..length];
        words.push(match first {
            '"' => Word::Quoted(word.trim_matches('"').to_owned()),
            c if plain(c) => Word::Plain(word.to_owned()),
            _ => Word::Sign(word.to_owned()),
        });
        rest = rest[length..].trim_start();
    }
    words
}

/// What is wrong with `query` by the registry; empty if nothing is.
pub fn complaints(query: &str, registry: &Registry) -> Vec<String> {
    let mut found = Vec::new();
    let words = words(query);
    let names = spans_named(&words);
    for name in names.iter().filter(|n| !registry.spans.contains_key(*n)) {
        found.push(format!("no span is called {name}"));
    }
    let mut inside: Vec<String> = Vec::new();
    for (i, word) in words.iter().enumerate() {
        match word {
            Word::Sign(sign) if sign == "{" => {
                let end = words[i..].iter().position(|w| *w == Word::Sign("}".into())).unwrap_or(words.len() - i);
                inside = spans_named(&words[i..i + end]);
            }
            Word::Sign(sign) if sign == "}" => inside.clone_from(&names),
            Word::Plain(key) => {
                let compared = (words.get(i + 1), words.get(i + 2));
                found.extend(of_key(key, &inside, compared, registry));
            }
            Word::Sign(_) | Word::Quoted(_) => {}
        }
    }
    found
}

/// Names of spans that the words ask for: `name = "a"`, `name =~ "a|b"`.
fn spans_named(words: &[Word]) -> Vec<String> {
    let mut names = Vec::new();
    for three in words.windows(3) {
        if let [Word::Plain(key), Word::Sign(sign), Word::Quoted(text)] = three
            && key == "name"
            && matches!(sign.as_str(), "=" | "=~")
        {
            names.extend(text.split('|').map(str::to_owned));
        }
    }
    names
}

fn of_key(
    key: &str,
    spans: &[String],
    compared: (Option<&Word>, Option<&Word>),
    registry: &Registry,
) -> Option<String> {
    let comparison = match compared {
        (Some(Word::Sign(sign)), Some(with)) if is_comparison(sign) => Some(with),
        _ => None,
    };
    if key == "event:name" {
        return match comparison {
            Some(Word::Quoted(name)) if !registry.events.contains_key(name) => {
                Some(format!("no event is called {name}"))
            }
            _ => None,
        };
    }
    if let Some(key) = key.strip_prefix("resource.") {
        return (!resource_keys().contains(key)).then(|| format!("no resource has {key}"));
    }
    let (key, on_spans) = match (key.strip_prefix("span."), key.strip_prefix("event.")) {
        (Some(key), _) => (key, true),
        (None, Some(key)) => (key, false),
        (None, None) => return None,
    };
    let Some(attribute) = registry.attributes.get(key) else { return Some(format!("{key} is not registered")) };
    let has = |name: &String| registry.spans.get(name).is_some_and(|s| s.attributes.contains_key(key));
    if on_spans && !spans.is_empty() && !spans.iter().any(has) {
        return Some(format!("{key} is on none of {spans:?}"));
    }
    let with = comparison?;
    let fits = match (with, &attribute.kind) {
        (Word::Plain(word), _) if word == "nil" => true,
        (Word::Plain(word), AttributeType::Bool) => word == "true" || word == "false",
        (Word::Plain(word), AttributeType::Int) => word.parse::<i64>().is_ok(),
        (Word::Plain(word), AttributeType::Double) => word.contains('.') && word.parse::<f64>().is_ok(),
        (Word::Quoted(text), AttributeType::Enum(members)) => members.contains(text),
        (Word::Quoted(_), AttributeType::String | AttributeType::StringList) => true,
        _ => false,
    };
    (!fits).then(|| format!("{key} is compared with {with:?}, its type is {:?}", attribute.kind))
}

fn is_comparison(sign: &str) -> bool {
    matches!(sign, "=" | "!=" | "<" | "<=" | ">" | ">=" | "=~" | "!~")
}
