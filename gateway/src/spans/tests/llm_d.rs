//! The same requests with llm-d's names.

use super::*;
use crate::core::scheduler::registry::scorer_types;
use crate::spans::llm_d::scorer_span;

fn run(waiting: [u32; 2]) -> Run {
    let endpoints = ["a", "b"].map(|name| EndpointConfig::new(name, "10.0.0.1", 8000));
    Run::named(Naming::LlmD, GatewayConfig::default(), endpoints, 2, waiting)
}

#[test]
fn a_request_has_the_spans_of_llm_ds_endpoint_picker() {
    insta::assert_snapshot!(outline(&streams(run([3, 1]))));
}

#[test]
fn the_profile_handler_has_a_span_for_each_time_that_it_is_asked() {
    insta::assert_snapshot!(names(&disaggregates(Naming::LlmD, 2, 16)));
    let alone = disaggregates(Naming::LlmD, 2, 65);
    let decisions: Vec<_> =
        alone.iter().filter_map(|s| s.get("llm_d.epp.profile_handler.decision")?.as_str()).collect();
    assert_eq!(decisions, ["run_decode", "complete_decode-only"]);
    let prepared: Vec<_> = alone.iter().filter(|s| s.name == "prepare_disaggregation").collect();
    assert_eq!(prepared.len(), 1);
    assert_eq!(prepared[0].get("llm_d.epp.pd.disaggregation_used"), Some(&false.into()));
}

/// What is retried is the proxy's matter, and how it ends the model server's.
#[test]
fn a_failed_answer_is_an_error_of_the_request_only() {
    let mut run = run([0, 0]);
    let output = run.request(0);
    run.connect(output);
    run.end_attempt(Some(Failure::Connect));
    let spans = run.end(Some(502), Some(Failure::Connect));
    let failed: Vec<_> = spans.iter().filter(|s| s.status != shared::trace::Status::Unset).map(|s| &*s.name).collect();
    assert_eq!(failed, ["request"]);
    assert!(spans.iter().all(|s| s.get("error.type").is_none()));
}

#[test]
fn a_refused_request_fails_with_its_orchestration() {
    let endpoints = ["a", "b"].map(|name| EndpointConfig::new(name, "10.0.0.1", 8000));
    let config = GatewayConfig { profile: ProfileConfig::default(), ..GatewayConfig::default() };
    let mut run = Run::named(Naming::LlmD, config, endpoints, 2, [10_000, 10_000]);
    // Sheddable, and the pool is saturated.
    let output = run.request(-1);
    assert!(matches!(output, Output::Reject { .. }), "{output:?}");
    insta::assert_snapshot!(names(&run.end(Some(429), None)), @r"
    request!
    request_orchestration!
    ");
}

#[test]
fn every_scorer_has_its_span() {
    for kind in scorer_types() {
        assert_eq!(scorer_span(kind), format!("scorer.{kind}"));
    }
}
