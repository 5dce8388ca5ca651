//! `igsim explain`: the figures of a decision agree with each other, and hindsight with what really happened.

mod common;

use common::{Place, rows};
use serde_json::Value;

/// Requests so far apart that nothing disturbs the one that is looked at.
const QUIET: &str = "\
name: quiet
mode: virtual
requests: 40
engines:
  - { count: 3, profile: llama-3.1-8b-h100 }
workload:
  arrivals: { process: poisson, rate: 0.5 }
  prompt_tokens: 2000
  output_tokens: 4
  prefixes: { groups: 4, tokens: 1024, share: 0.8 }
";

fn explained(place: &Place, args: &[&str]) -> Value {
    let out = place.good(&[&["explain", "out", "--format", "json"], args].concat()).out;
    serde_json::from_str(&out).expect("JSON")
}

fn quiet(detail: &str) -> Place {
    let place = Place::new();
    place.write("quiet.yaml", QUIET);
    place.good(&["run", "quiet.yaml", "--sampling", "1", "--detail", detail, "--out", "out"]);
    place
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is a number"))
}

#[test]
fn the_scores_of_a_decision_add_up_to_its_choice() {
    let place = quiet("3");
    let all = explained(&place, &[]);
    let decisions: Vec<&Value> =
        all.as_array().unwrap().iter().flat_map(|e| e["decisions"].as_array().unwrap()).collect();
    assert_eq!(decisions.len(), 40);
    for d in decisions {
        assert_eq!(d["known"].as_array().unwrap().len(), 3);
        let mut totals = std::collections::BTreeMap::<&str, f64>::new();
        for scorer in d["scorers"].as_array().unwrap() {
            for cell in scorer["endpoints"].as_array().unwrap() {
                let (raw, weighted) = (number(&cell[1]), number(&cell[2]));
                assert!((raw * number(&scorer["weight"]) - weighted).abs() < 1e-9);
                *totals.entry(cell[0].as_str().unwrap()).or_default() += weighted;
            }
        }
        let chosen = d["chosen"].as_str().unwrap();
        assert!((totals[chosen] - number(&d["score"])).abs() < 1e-9, "{d}");
        let others = totals.iter().filter(|(e, _)| **e != chosen).map(|(_, s)| *s).fold(f64::MIN, f64::max);
        assert!((others - number(&d["runner_up"])).abs() < 1e-9, "{d}");
        assert!((number(&d["score"]) - others - number(&d["margin"])).abs() < 1e-9, "{d}");
    }
}

#[test]
fn hindsight_of_the_chosen_endpoint_is_what_happened() {
    let place = quiet("3");
    let rows = rows(&place.path("out"));
    let (mut told, mut regretted) = (0, 0);
    for explanation in explained(&place, &[]).as_array().unwrap() {
        let row = rows.iter().find(|r| r["trace_id"] == explanation["trace_id"].as_str().unwrap()).unwrap();
        let hindsight = explanation["hindsight"].as_array().unwrap();
        let chosen = hindsight.iter().find(|h| h["chosen"] == true).unwrap();
        let happened: f64 = row["ttft_ms"].parse().unwrap();
        assert!((number(&chosen["ttft_ms"]) - happened).abs() < 0.001, "{explanation} and {happened}");
        let least = hindsight.iter().map(|h| number(&h["ttft_ms"])).fold(f64::MAX, f64::min);
        let regret = number(&explanation["regret_ms"]);
        assert!((number(&chosen["ttft_ms"]) - least - regret).abs() < 1e-6 && regret >= 0.0, "{explanation}");
        told += 1;
        regretted += u32::from(regret > 0.0);
    }
    assert_eq!(told, 40);
    // The first requests of a prefix find it nowhere: not all is a matter of indifference, nor is every choice wrong.
    assert!(regretted < 40, "{regretted}");
}

#[test]
fn without_every_endpoint_the_stages_are_told_and_the_rest_is_said_to_be_missing() {
    let place = quiet("2");
    let text = place.good(&["explain", "out"]).out;
    assert!(text.starts_with("40 requests with 40 decisions\n"), "{text}");
    assert!(text.contains("regret          n/a"), "{text}");
    let id = rows(&place.path("out"))[0]["trace_id"].clone();
    let text = place.good(&["explain", "out", "--trace", &id[..8]]).out;
    assert!(text.contains("decision 1 of 1  profile default  3 candidates, 3 left  -> engine-"), "{text}");
    assert!(text.contains("scorer prefix-cache-scorer x "), "{text}");
    assert!(text.contains("regret n/a"), "{text}");
}

#[test]
fn a_trace_that_is_not_there_is_an_error() {
    let place = quiet("2");
    let ran = place.ran(&["explain", "out", "--trace", "zz"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("--trace zz: no trace of out has this id"), "{}", ran.err);
}
