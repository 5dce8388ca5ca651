//! What holds for every plugin there is.

use proptest::prelude::*;
use serde_json::json;
use shared::rng::Seed;

use super::*;
use crate::core::kv_index::Match;
use crate::core::pool::{AdapterState, EndpointConfig, EndpointId, Pool, Role};
use crate::core::scheduler::{Candidate, Prediction, View};

/// Parameters that a plugin cannot do without.
fn parameters(kind: &str) -> Parameters {
    let value = match kind {
        "by-label" => json!({"label": "gpu", "validValues": ["h100"]}),
        "label-selector-filter" => json!({"matchLabels": {"gpu": "h100"}}),
        "utilization-filter" => json!({"conditions": [{"metric": "waiting-queue", "maxValue": 5}]}),
        "context-length-aware" => json!({"enableFiltering": true}),
        "prefix-cache-affinity-filter" => json!({"explorationProbability": 0.5}),
        "slo-headroom-tier-filter" => json!({"epsilonExploreNeg": 0.5}),
        "prefix-cache-scorer" => json!({"matchLengthWeight": 0.5}),
        _ => json!({}),
    };
    serde_json::from_value(value).unwrap()
}

const BLOCKS: u32 = 20;

fn candidate(id: u32) -> impl Strategy<Value = Candidate> {
    let loads = (any::<u32>(), 0u32..2000, 0u32..100_000, 0..=BLOCKS, 0.0f64..=1.0, any::<u64>());
    let rest = (proptest::option::of(0u32..2000), any::<bool>(), any::<bool>(), 0usize..4, 0usize..3);
    (loads, rest).prop_map(move |((waiting, running, in_flight, matched_blocks, kv_usage, tokens), rest)| {
        let (cold_position, available, had_session, adapter, role) = rest;
        let adapters = [AdapterState::Running, AdapterState::Room, AdapterState::Waiting, AdapterState::Full];
        Candidate {
            id: EndpointId(id),
            waiting,
            running,
            matched_blocks,
            kv: Match { blocks: matched_blocks / 2, score: f64::from(matched_blocks / 2) },
            kv_usage,
            in_flight_tokens: tokens,
            in_flight,
            cold_position,
            role: [Role::Unlabelled, Role::Prefill, Role::PrefillDecode][role],
            adapter: adapters[adapter],
            available,
            had_session,
        }
    })
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    (1u32..12).prop_flat_map(|n| (0..n).map(candidate).collect::<Vec<_>>())
}

fn predictions() -> impl Strategy<Value = Vec<Option<Prediction>>> {
    let one = (-1e6f64..1e6, -1e6f64..1e6, 0.0f64..1e6, 0u32..3).prop_map(|(ttft, tpot, ttft_ms, dispatched)| {
        Prediction { ttft_ms, ttft_headroom_ms: ttft, tpot_headroom_ms: tpot, dispatched }
    });
    proptest::collection::vec(proptest::option::of(one), 0..12)
}

/// Twelve endpoints, some with labels.
fn pool() -> Pool {
    let labels = |i: u32| match i % 3 {
        0 => vec![("gpu", "h100")],
        1 => vec![("llm-d.ai/context-length-range", "0-2048")],
        _ => vec![],
    };
    let endpoint = |i| {
        let labels = labels(i).into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        EndpointConfig::new(&format!("e{i}"), &format!("10.0.0.{i}"), 8000).with_labels(labels)
    };
    Pool::new((0..12).map(endpoint).collect())
}

fn view<'a>(pool: &'a Pool, predictions: &'a [Option<Prediction>], prompt_tokens: u32) -> View<'a> {
    View {
        pool,
        model: "m",
        prompt_tokens,
        prefix_blocks: BLOCKS,
        block_tokens: 64,
        kv_blocks: BLOCKS,
        kv_block_tokens: 16,
        output_tokens: 7,
        selection: Some("10.0.0.1,10.0.0.4:8000"),
        predictions,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Invariant I12: every score is finite and from 0 to 1, before it is clamped.
    #[test]
    fn scores_are_between_0_and_1(all in candidates(), predictions in predictions(), prompt in any::<u32>()) {
        let pool = pool();
        let view = view(&pool, &predictions, prompt);
        for kind in scorers() {
            let made = scorer(kind, &parameters(kind)).unwrap();
            let mut scores = vec![0.0; all.len()];
            made.plugin.score(&view, &all, &mut scores);
            prop_assert!(scores.iter().all(|s| (0.0..=1.0).contains(s)), "{}: {:?}", kind, scores);
        }
    }

    /// Invariant I13: a filter only takes candidates out, and keeps the order of the others.
    #[test]
    fn filters_never_add(all in candidates(), predictions in predictions(), prompt in 0u32..5000, seed in any::<u64>()) {
        let pool = pool();
        let view = view(&pool, &predictions, prompt);
        for kind in filters() {
            let made = filter(kind, &parameters(kind)).unwrap();
            let mut kept = all.clone();
            made.plugin.filter(&view, &mut kept, &mut Seed(seed).stream("filter"));
            let mut rest = all.iter();
            prop_assert!(kept.iter().all(|k| rest.any(|c| c == k)), "{}: {:?} of {:?}", kind, kept, all);
            let mut again = all.clone();
            made.plugin.filter(&view, &mut again, &mut Seed(seed).stream("filter"));
            prop_assert_eq!(kept, again, "the same seed decides the same");
        }
    }

    /// A picker takes one of the candidates, the same for the same seed.
    #[test]
    fn pickers_pick_what_is_there(scores in proptest::collection::vec(0.0f64..9.0, 1..40), seed in any::<u64>()) {
        for kind in pickers() {
            // Anew each time: one that takes turns remembers whose turn it was.
            let pick = || picker(kind, &Parameters::new()).unwrap().plugin.pick(&scores, &mut Seed(seed).stream("pick"));
            prop_assert!(pick().index < scores.len());
            prop_assert_eq!(pick(), pick());
        }
    }
}

#[test]
fn an_unknown_type_lists_what_there_is() {
    let Err(PluginError::Unknown { known }) = decider("oracle", &Parameters::new()) else { panic!("there is none") };
    assert_eq!(known, ["prefix-based-pd-decider", "always-disagg-pd-decider"]);
}

#[test]
fn plugins_without_parameters_take_none() {
    let some: Parameters = serde_json::from_value(json!({"a": true})).unwrap();
    for kind in ["queue-scorer", "lora-affinity-scorer"] {
        assert!(matches!(scorer(kind, &some), Err(PluginError::Parameter { .. })), "{kind}");
    }
    assert!(picker("max-score-picker", &serde_json::from_value(json!({"maxNumOfEndpoints": 3})).unwrap()).is_ok());
}

/// The table in docs/gateway.md has a line for every plugin.
#[test]
fn every_plugin_is_documented() {
    let document = include_str!("../../../../../docs/gateway.md");
    for kind in filters().chain(scorers()).chain(pickers()).chain(deciders()) {
        assert!(document.contains(&format!("| `{kind}`")), "{kind} has no line");
    }
}
