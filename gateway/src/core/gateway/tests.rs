//! What the core answers, as a driver sees it.

use super::*;
use proptest::prelude::*;
use shared::ids::RequestId;
use shared::time::{Dur, Stopped};
use shared::trace::Trail;

use crate::core::config::{DisaggregationConfig, PluginConfig, ProfileConfig, ScorerConfig, StageOrder};

fn gateway(n: u32, change: impl FnOnce(&mut GatewayConfig)) -> Gateway {
    let mut config = GatewayConfig::default();
    change(&mut config);
    let endpoints = (0..n).map(|i| EndpointConfig::new(&format!("e{i}"), "127.0.0.1", 8000)).collect();
    let mut gateway = Gateway::new(config, endpoints, Seed(3));
    (0..n).for_each(|i| report(&mut gateway, i, 0));
    gateway
}

fn report(gateway: &mut Gateway, endpoint: u32, waiting: u32) {
    let at = Time::ZERO;
    let m = EndpointMetrics { waiting, running: 0, kv_usage: 0.0, block_size: 16, num_gpu_blocks: 9, at };
    step(gateway, Input::Metrics { endpoint: EndpointId(endpoint), metrics: Ok(m) });
}

fn step(gateway: &mut Gateway, input: Input) -> Option<Output> {
    step_at(gateway, Time::ZERO, input)
}

fn step_at(gateway: &mut Gateway, now: Time, input: Input) -> Option<Output> {
    let mut out = Vec::new();
    gateway.handle(now, input, &mut Stopped(now), &mut out);
    assert!(out.len() <= 1);
    out.pop()
}

fn request(key: u64) -> Box<RequestInfo> {
    Box::new(RequestInfo {
        key: RequestKey(key),
        id: RequestId::sanitise("r"),
        model: "m".into(),
        streaming: false,
        size_bytes: 10,
        priority: 0,
        objective: None,
        fairness_id: None,
        session: None,
        session_endpoint: None,
        selection: None,
        prompt_tokens_estimate: 4,
        max_output_tokens: None,
        deadlines: Default::default(),
        prefix: Vec::new(),
        kv: Default::default(),
        trail: Trail::off(),
    })
}

fn endpoint(output: Option<Output>) -> u32 {
    let Some(Output::Dispatch { endpoint, .. }) = output else { panic!("{output:?}") };
    endpoint.0
}

fn rejection(output: Option<Output>) -> Rejection {
    let Some(Output::Reject { rejection, .. }) = output else { panic!("{output:?}") };
    rejection
}

#[test]
fn requests_with_a_common_prefix_go_where_it_was_sent() {
    let mut g = gateway(4, |_| {});
    let mut ask = |key, prefix: &[u64]| {
        let mut r = request(key);
        r.prefix = prefix.to_vec();
        endpoint(step(&mut g, Input::Request(r)))
    };
    let first = ask(1, &[1, 2, 3]);
    assert!((2..20).all(|key| ask(key, &[1, 2, 3, key]) == first));
    assert!((20..40).any(|key| ask(key, &[key]) != first));
}

#[test]
fn a_session_stays_until_it_expires() {
    let mut scorer = ScorerConfig::of("session-affinity-scorer", 1.0);
    scorer.parameters.insert("strategy".into(), "session_id".into());
    let mut g = gateway(8, |c| c.profile.scorers = vec![scorer]);
    let mut ask = |key, at| {
        let mut r = request(key);
        r.session = Some(SessionKey(5));
        endpoint(step_at(&mut g, Time::ZERO + at, Input::Request(r)))
    };
    let first = ask(0, Dur::ZERO);
    assert!((1..50).all(|key| ask(key, Dur::from_secs(key)) == first));
    assert!((50..80).any(|key| ask(key, Dur::from_secs(400 * key)) != first));
}

#[test]
fn refusals_are_data() {
    let mut g = gateway(2, |c| {
        c.objectives.insert("batch".into(), -1);
    });
    let unknown = EndpointChange::Models(EndpointId(0), vec!["m".into()]);
    step(&mut g, Input::Endpoint(unknown));
    step(&mut g, Input::Endpoint(EndpointChange::Models(EndpointId(1), vec!["m".into()])));
    let mut other = request(1);
    other.model = "x".into();
    assert_eq!(rejection(step(&mut g, Input::Request(other))), Rejection::UnknownModel);

    (0..2).for_each(|i| report(&mut g, i, 9));
    let mut sheddable = request(2);
    sheddable.objective = Some("batch".into());
    assert_eq!(rejection(step(&mut g, Input::Request(sheddable))), Rejection::Saturated);
    endpoint(step(&mut g, Input::Request(request(3))));

    (0..2).for_each(|i| {
        step(&mut g, Input::Endpoint(EndpointChange::Draining(EndpointId(i))));
    });
    assert_eq!(rejection(step(&mut g, Input::Request(request(4)))), Rejection::NoEndpoints);
    assert_eq!(g.open_requests(), 1);
}

#[test]
fn an_endpoint_that_cannot_be_reached_is_left_out_until_it_answers_a_scrape() {
    let mut g = gateway(2, |_| {});
    let (key, failure) = (RequestKey(1), Failure::Connect);
    let first = EndpointId(endpoint(step(&mut g, Input::Request(request(1)))));
    let second = EndpointId(endpoint(step(&mut g, Input::AttemptFailed { key, endpoint: first, failure })));
    assert_ne!(first, second);
    // One retry is all there is.
    let last = step(&mut g, Input::AttemptFailed { key, endpoint: second, failure });
    assert_eq!(rejection(last), Rejection::Unreachable);
    assert_eq!(rejection(step(&mut g, Input::Request(request(2)))), Rejection::NoEndpoints);
    report(&mut g, first.0, 0);
    assert_eq!(endpoint(step(&mut g, Input::Request(request(3)))), first.0);
    assert_eq!(g.endpoints().iter().map(|e| e.in_flight).sum::<u32>(), 1);
}

#[test]
fn an_endpoint_that_breaks_one_connection_stays() {
    let mut g = gateway(2, |_| {});
    let key = RequestKey(1);
    let first = EndpointId(endpoint(step(&mut g, Input::Request(request(1)))));
    let second = step(&mut g, Input::AttemptFailed { key, endpoint: first, failure: Failure::Reset });
    assert_ne!(endpoint(second), first.0);
    assert!(g.endpoints().iter().all(Endpoint::is_available));
}

#[test]
fn a_new_endpoint_gets_requests_once_it_is_scraped() {
    let mut g = gateway(0, |_| {});
    step(&mut g, Input::Endpoint(EndpointChange::Added(EndpointConfig::new("new", "h", 1))));
    assert_eq!(rejection(step(&mut g, Input::Request(request(1)))), Rejection::NoEndpoints);
    report(&mut g, 0, 0);
    assert_eq!(endpoint(step(&mut g, Input::Request(request(2)))), 0);
}

#[test]
fn a_draining_endpoint_leaves_with_its_last_request() {
    let mut g = gateway(1, |_| {});
    endpoint(step(&mut g, Input::Request(request(1))));
    step(&mut g, Input::Endpoint(EndpointChange::Draining(EndpointId(0))));
    assert_eq!(rejection(step(&mut g, Input::Request(request(2)))), Rejection::NoEndpoints);
    assert_eq!(g.join(EndpointConfig::new("b", "h", 1)), EndpointId(1), "the request still has its place");
    step(&mut g, Input::Finished { key: RequestKey(1), endpoint: EndpointId(0) });
    assert_eq!(g.join(EndpointConfig::new("c", "h", 1)), EndpointId(0), "now it is free");
    report(&mut g, 0, 0);
    assert_eq!(endpoint(step(&mut g, Input::Request(request(3)))), 0);
}

#[test]
fn what_was_known_of_an_endpoint_that_left_is_not_known_of_the_next() {
    let mut g = gateway(2, |c| {
        c.profile.scorers = vec![ScorerConfig::of("prefix-cache-scorer", 3.0), ScorerConfig::of("queue-scorer", 1.0)];
    });
    let ask = |g: &mut Gateway, key| {
        let mut r = request(key);
        r.prefix = vec![1, 2, 3];
        let chosen = EndpointId(endpoint(step(g, Input::Request(r))));
        step(g, Input::Finished { key: RequestKey(key), endpoint: chosen });
        chosen
    };
    let first = ask(&mut g, 0);
    let other = EndpointId(1 - first.0);
    // It is asked again for the prefix, however long its queue.
    report(&mut g, first.0, 9);
    assert_eq!(ask(&mut g, 1), first);
    step(&mut g, Input::Endpoint(EndpointChange::Draining(first)));
    assert_eq!(g.join(EndpointConfig::new("new", "h", 1)), first);
    report(&mut g, first.0, 9);
    assert_eq!(ask(&mut g, 2), other);
}

#[test]
fn an_endpoint_that_fails_in_a_row_is_left_out_and_comes_back() {
    let mut g = gateway(2, |c| {
        c.outlier_ejection.consecutive_failures = 3;
        c.outlier_ejection.base_time = shared::units::HumanDur::secs(10);
    });
    let at = |s| Time::ZERO + Dur::from_secs(s);
    let failed = EndpointId(0);
    for status in [500, 503, 502, 429, 504] {
        step_at(&mut g, at(0), Input::ResponseStarted { key: RequestKey(99), endpoint: failed, status });
    }
    assert_eq!(g.ejections(), 1, "refusals for load do not count");
    let asked = |g: &mut Gateway, key, now| {
        let chosen = endpoint(step_at(g, now, Input::Request(request(key))));
        step_at(g, now, Input::Finished { key: RequestKey(key), endpoint: EndpointId(chosen) });
        chosen
    };
    assert!((0..40).all(|key| asked(&mut g, key, at(9)) == 1));
    assert!((40..80).any(|key| asked(&mut g, key, at(10)) == 0));
    // Half of the pool may be out, and no more.
    for endpoint in [0, 1].map(EndpointId) {
        for _ in 0..9 {
            step_at(&mut g, at(20), Input::GivenUp { key: RequestKey(99), endpoint, failure: Failure::Reset });
        }
    }
    assert_eq!(g.ejections(), 2);
}

#[test]
fn retries_stop_where_their_budget_does() {
    let mut g = gateway(3, |c| {
        (c.retry.budget_ratio, c.retry.budget_min_per_second) = (0.5, 0);
        c.limits.retries = 8;
    });
    let failure = Failure::Reset;
    let mut retried = 0;
    for key in 0..10 {
        let first = EndpointId(endpoint(step(&mut g, Input::Request(request(key)))));
        let next = step(&mut g, Input::AttemptFailed { key: RequestKey(key), endpoint: first, failure });
        if let Some(Output::Dispatch { endpoint, .. }) = next {
            retried += 1;
            step(&mut g, Input::Finished { key: RequestKey(key), endpoint });
        }
    }
    assert_eq!((retried, g.retries_refused(), g.open_requests()), (5, 5, 0));
}

/// Endpoints of these roles behind a gateway that disaggregates from 16 uncached tokens on.
fn disaggregating(roles: &[&str], order: StageOrder) -> Gateway {
    let profile = |name: &str, filter| ProfileConfig {
        name: name.to_owned(),
        filters: vec![PluginConfig::of(filter)],
        scorers: vec![ScorerConfig::of("prefix-cache-scorer", 2.0), ScorerConfig::of("queue-scorer", 1.0)],
        ..ProfileConfig::default()
    };
    let mut decider = PluginConfig::of("prefix-based-pd-decider");
    decider.parameters.insert("nonCachedTokens".into(), 16.into());
    let disaggregation =
        Some(DisaggregationConfig { profile: profile("prefill", "prefill-filter"), decider, stage_order: order });
    let config =
        GatewayConfig { profile: profile("decode", "decode-filter"), disaggregation, ..GatewayConfig::default() };
    let endpoints = roles.iter().enumerate().map(|(i, role)| {
        let labels = [("llm-d.ai/role".to_owned(), (*role).to_owned())].into();
        EndpointConfig::new(&format!("e{i}"), "127.0.0.1", 8000).with_labels(labels)
    });
    let mut gateway = Gateway::new(config, endpoints.collect(), Seed(3));
    (0..roles.len() as u32).for_each(|i| report(&mut gateway, i, 0));
    gateway
}

/// A request of `tokens`, of which full blocks are the same for all.
fn long(key: u64, tokens: u32) -> Input {
    let mut r = request(key);
    r.prompt_tokens_estimate = tokens;
    r.prefix = (0..u64::from(tokens / 64)).collect();
    Input::Request(r)
}

fn placed(output: Option<Output>) -> (u32, Option<u32>) {
    let Some(Output::Dispatch { endpoint, prefill, .. }) = output else { panic!("{output:?}") };
    (endpoint.0, prefill.map(|p| p.0))
}

fn in_flight(gateway: &Gateway) -> Vec<(u32, u64)> {
    gateway.endpoints().iter().map(|e| (e.in_flight, e.in_flight_tokens)).collect()
}

#[test]
fn a_prompt_that_is_not_cached_is_prefilled_elsewhere() {
    let mut g = disaggregating(&["prefill", "decode"], StageOrder::DecodeFirst);
    assert_eq!(placed(step(&mut g, long(1, 15))), (1, None), "shorter than the threshold");
    assert_eq!(placed(step(&mut g, long(2, 128))), (1, Some(0)));
    // Now both have the two blocks.
    assert_eq!(placed(step(&mut g, long(3, 128))), (1, None));
    assert_eq!(placed(step(&mut g, long(4, 143))), (1, None));
    assert_eq!(placed(step(&mut g, long(5, 144))), (1, Some(0)));
}

#[test]
fn without_a_prefill_endpoint_the_other_does_it_all_and_without_a_decode_endpoint_nobody_does() {
    let mut g = disaggregating(&["decode", "decode"], StageOrder::DecodeFirst);
    assert_eq!(placed(step(&mut g, long(1, 128))).1, None);
    for order in [StageOrder::DecodeFirst, StageOrder::PrefillFirst] {
        let mut g = disaggregating(&["prefill", "prefill"], order);
        assert_eq!(rejection(step(&mut g, long(1, 128))), Rejection::NoEndpoints);
        assert_eq!(in_flight(&g), [(0, 0), (0, 0)]);
    }
}

#[test]
fn prefill_first_asks_nobody() {
    let mut g = disaggregating(&["prefill", "decode"], StageOrder::PrefillFirst);
    assert_eq!(placed(step(&mut g, long(1, 4))), (1, Some(0)));
    assert_eq!(placed(step(&mut g, long(2, 4))), (1, Some(0)));
}

#[test]
fn a_prefill_endpoint_is_free_after_the_first_chunk() {
    let mut g = disaggregating(&["prefill", "decode"], StageOrder::DecodeFirst);
    let (key, endpoint) = (RequestKey(1), EndpointId(1));
    step(&mut g, long(1, 128));
    assert_eq!(in_flight(&g), [(1, 128), (1, 128)]);
    step(&mut g, Input::FirstChunk { key, endpoint });
    assert_eq!(in_flight(&g), [(0, 0), (1, 0)]);
    step(&mut g, Input::FirstChunk { key, endpoint });
    step(&mut g, Input::Finished { key, endpoint });
    assert_eq!(in_flight(&g), [(0, 0), (0, 0)]);
    // A failed attempt leaves nothing behind.
    step(&mut g, long(2, 200));
    step(&mut g, Input::AttemptFailed { key: RequestKey(2), endpoint, failure: Failure::Reset });
    assert_eq!(in_flight(&g), [(0, 0), (0, 0)]);
}

#[test]
fn cold_requests_go_round() {
    let mut g = gateway(3, |c| c.profile.scorers = vec![ScorerConfig::of("no-hit-lru-scorer", 1.0)]);
    let mut ask = |key: u64, prefix: u64| {
        let mut r = request(key);
        r.prefix = vec![prefix];
        endpoint(step(&mut g, Input::Request(r)))
    };
    let round: Vec<u32> = (0..9).map(|key| ask(key, key)).collect();
    assert_eq!(round, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[test]
fn adapters_draw_their_requests() {
    let mut g = gateway(3, |c| c.profile.scorers = vec![ScorerConfig::of("lora-affinity-scorer", 1.0)]);
    assert!(g.reads_adapters() && !g.reads_first_chunks());
    let adapters = Adapters { max: 1, running: vec!["m".into()], waiting: Vec::new() };
    step(&mut g, Input::Endpoint(EndpointChange::Adapters(EndpointId(2), adapters)));
    assert!((0..9).all(|key| endpoint(step(&mut g, Input::Request(request(key)))) == 2));
}

#[test]
fn a_token_names_the_endpoint_of_a_session() {
    let mut g = gateway(4, |c| c.profile.scorers = vec![ScorerConfig::of("session-affinity-scorer", 1.0)]);
    let mut ask = |key, token: &str| {
        let mut r = request(key);
        r.session_endpoint = Some(token.into());
        endpoint(step(&mut g, Input::Request(r)))
    };
    assert!((0..20).all(|key| ask(key, "default/e3") == 3));
    assert!((20..60).any(|key| ask(key, "other/e3") != 3), "another namespace is another endpoint");
}

proptest! {
    /// Invariant: requests are conserved. Each is refused at once, or open at one endpoint until it is finished or refused.
    #[test]
    fn requests_are_conserved(steps in proptest::collection::vec((0u8..4, 0usize..4), 0..200)) {
        let mut g = gateway(3, |_| {});
        let mut open: Vec<(RequestKey, EndpointId)> = Vec::new();
        for (next_key, (action, which)) in steps.into_iter().enumerate() {
            let chosen = which.min(open.len().saturating_sub(1));
            let output = match action {
                0 => step(&mut g, Input::Request(request(next_key as u64))),
                1 if !open.is_empty() => {
                    let (key, endpoint) = open.swap_remove(chosen);
                    step(&mut g, Input::Finished { key, endpoint })
                }
                2 if !open.is_empty() => {
                    let (key, endpoint) = open.swap_remove(chosen);
                    step(&mut g, Input::AttemptFailed { key, endpoint, failure: Failure::Connect })
                }
                _ => { report(&mut g, which as u32 % 3, 1); None }
            };
            if let Some(Output::Dispatch { key, endpoint, .. }) = output {
                open.push((key, endpoint));
            }
            prop_assert_eq!(g.open_requests(), open.len());
            for (i, e) in g.endpoints().iter().enumerate() {
                prop_assert_eq!(e.in_flight as usize, open.iter().filter(|(_, at)| at.index() == i).count());
            }
        }
    }

    /// Invariant: the same seed decides the same, whatever plugins take part.
    #[test]
    fn the_same_seed_decides_the_same(seed in any::<u64>(), prompts in proptest::collection::vec(0u32..300, 1..40)) {
        let run = || {
            let mut config = GatewayConfig::default();
            let scorers = ["no-hit-lru-scorer", "token-load-scorer", "active-request-scorer", "latency-scorer"];
            config.profile.scorers.extend(scorers.map(|kind| ScorerConfig::of(kind, 1.0)));
            config.profile.filters.push(PluginConfig::of("prefix-cache-affinity-filter"));
            config.profile.picker = PluginConfig::of("weighted-random-picker");
            let endpoints = (0..5).map(|i| EndpointConfig::new(&format!("e{i}"), "h", 1)).collect();
            let mut g = Gateway::new(config, endpoints, Seed(seed));
            (0..5).for_each(|i| report(&mut g, i, i));
            prompts.iter().enumerate().map(|(key, tokens)| step(&mut g, long(key as u64, *tokens))).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }
}

mod hedging;
mod waiting;
