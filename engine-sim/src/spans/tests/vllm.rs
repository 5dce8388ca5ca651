//! The span of a request beside the one that vLLM itself emits, as it was recorded.

use super::*;

fn fixture() -> serde_json::Value {
    serde_json::from_str(include_str!("../../../tests/fixtures/llm_request.json")).unwrap()
}

fn keys_of(fixture: &serde_json::Value, part: &str) -> BTreeSet<String> {
    fixture[part].as_object().unwrap().keys().cloned().collect()
}

/// `vllm.engine.request` has what vLLM's own span has: the keys, always or if they say anything, the types and the units.
#[test]
fn a_request_has_the_attributes_of_vllms_own_span() {
    let fixture = fixture();
    let (always, if_truthy) = (keys_of(&fixture, "always"), keys_of(&fixture, "if_truthy"));
    let run = |temperature: Option<f32>| {
        let mut rig = Rig::new(2, |_| ());
        rig.temperature = temperature;
        rig.add(0, 100, 5);
        rig.run().remove(0)
    };
    let vllms = |span: &Span| {
        let own = span.attrs.iter().map(|(k, _)| k.to_string()).filter(|k| k.starts_with("gen_ai."));
        own.filter(|k| !CONVENTIONS.contains(&k.as_str())).collect::<BTreeSet<String>>()
    };
    // Not given: vLLM samples with its own defaults, and tells them.
    let span = run(None);
    assert_eq!(vllms(&span), &always | &if_truthy);
    assert_eq!(span.get("gen_ai.request.temperature"), Some(&Value::F64(1.0)));
    assert_eq!(run(Some(0.7)).get("gen_ai.request.temperature"), Some(&Value::F64(0.7)), "as it was written");
    // Greedy: zero is left out.
    let mut without = &always | &if_truthy;
    without.remove("gen_ai.request.temperature");
    assert_eq!(vllms(&run(Some(0.0))), without);
    for (key, kind) in fixture["always"].as_object().unwrap().iter().chain(fixture["if_truthy"].as_object().unwrap()) {
        let (value, kind) = (span.get(key).unwrap(), kind.as_str().unwrap());
        let fits = match value {
            Value::F64(v) => kind == "double" || kind == "double, seconds" && (0.0..0.1).contains(v),
            Value::Int(_) => kind == "int",
            Value::Str(_) | Value::Shared(_) => kind == "string",
            Value::Bool(_) | Value::StrList(_) | Value::F64List(_) => false,
        };
        assert!(fits, "{key} is {value:?}, not {kind}");
    }
    assert_eq!((fixture["kind"].as_str(), span.kind), (Some("server"), Kind::Server));
    let never = fixture["defined_and_never_set"].as_array().unwrap();
    assert!(never.iter().all(|key| span.get(key.as_str().unwrap()).is_none()));
}

/// Keys of OpenTelemetry's conventions that vLLM's span does not have.
const CONVENTIONS: [&str; 6] = [
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.model",
    "gen_ai.response.finish_reasons",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
];

/// With llm-d's names it has these keys and no others.
#[test]
fn with_llm_ds_names_a_request_has_vllms_own_span() {
    let mut rig = Rig::new(2, |_| ());
    rig.naming = Naming::LlmD;
    rig.temperature = None;
    rig.add(0, 40, 3);
    let spans = rig.run();
    let keys: BTreeSet<String> = spans[0].attrs.iter().map(|(key, _)| key.to_string()).collect();
    let [always, if_truthy] = ["always", "if_truthy"].map(|part| keys_of(&fixture(), part));
    assert_eq!(keys, &always | &if_truthy);
    insta::assert_snapshot!(shared::trace::tree::outline(&spans));
}
