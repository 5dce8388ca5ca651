//! Plans: the same seed gives the same plan, figures are those asked for, and what is shared is shared.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn scenario(workload: &str, extent: &str) -> Scenario {
    let text = format!("name: t\n{extent}\nengines: [{{ profile: llama-3.1-8b-h100 }}]\nworkload: {workload}\n");
    shared::config::load_str::<Scenario>("t.yaml", &text, &[]).unwrap_or_else(|e| panic!("{e}")).config
}

fn arrivals(scenario: &Scenario, seed: u64) -> Vec<PlannedRequest> {
    let mut plan = Plan::new(scenario, Seed(seed)).unwrap();
    std::iter::from_fn(|| plan.next_arrival().unwrap()).collect()
}

/// Mean and coefficient of variation of the gaps, in seconds.
fn gaps(requests: &[PlannedRequest]) -> (f64, f64) {
    let gaps: Vec<f64> = requests.windows(2).map(|w| (w[1].intended - w[0].intended).as_secs_f64()).collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
    (mean, variance.sqrt() / mean)
}

#[test]
fn arrivals_have_the_rate_and_the_variation_asked_for() {
    let check = |arrivals_text: &str, rate: f64, cv: f64| {
        let s = scenario(&format!("{{ arrivals: {arrivals_text} }}"), "requests: 20000");
        let requests = arrivals(&s, 7);
        assert!(requests.is_sorted_by_key(|r| r.intended));
        let (mean, found) = gaps(&requests);
        assert!((mean * rate - 1.0).abs() < 0.04, "{arrivals_text}: mean gap {mean}");
        assert!((found - cv).abs() < 0.04 * cv.max(0.02), "{arrivals_text}: cv {found}");
    };
    check("{ process: poisson, rate: 50 }", 50.0, 1.0);
    check("{ process: gamma, rate: 50, cv: 2 }", 50.0, 2.0);
    check("{ process: gamma, rate: 0.2, cv: 0.5 }", 0.2, 0.5);
    check("{ process: constant, rate: 3 }", 3.0, 0.0);
}

#[test]
fn duration_and_requests_end_a_plan() {
    let open = "{ arrivals: { process: constant, rate: 10 } }";
    assert_eq!(arrivals(&scenario(open, "duration: 2s"), 1).len(), 20);
    assert_eq!(arrivals(&scenario(open, "requests: 7"), 1).len(), 7);
}

#[test]
fn changing_one_concern_moves_no_other() {
    let base = "arrivals: { process: poisson, rate: 9 }, output_tokens: { distribution: azure-conv }";
    let one = arrivals(&scenario(&format!("{{ {base}, prompt_tokens: 100 }}"), "requests: 200"), 3);
    let more = "prompt_tokens: { distribution: sharegpt }, prefixes: { groups: 4, tokens: 512, share: 0.5 }, \
        streaming: 0.5, tenants: [{ name: a }, { name: b, weight: 2 }]";
    let two = arrivals(&scenario(&format!("{{ {base}, {more} }}"), "requests: 200"), 3);
    for (a, b) in one.iter().zip(&two) {
        assert_eq!((a.intended, a.output_tokens, a.output), (b.intended, b.output_tokens, b.output));
        let own = |r: &PlannedRequest| r.prompt.last().map(|s| s.content);
        assert_eq!(own(a), own(b));
    }
    let total = |all: &[PlannedRequest]| all.iter().map(|r| r.prompt_tokens).sum::<u32>();
    assert_ne!(total(&one), total(&two));
}

#[test]
fn shares_are_those_asked_for() {
    let text = "{ arrivals: { process: constant, rate: 1 }, streaming: 0.25, system_prompt: { tokens: 32 }, \
        prefixes: { groups: 10, tokens: 1000, share: 0.6, skew: 1 }, \
        tenants: [{ name: a, weight: 3 }, { name: b, weight: 1, priority: -1 }] }";
    let requests = arrivals(&scenario(text, "requests: 20000"), 11);
    let share =
        |f: &dyn Fn(&PlannedRequest) -> bool| requests.iter().filter(|r| f(r)).count() as f64 / requests.len() as f64;
    let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 0.014, "{found}, not {wanted}");
    near(share(&|r| r.streaming), 0.25);
    near(share(&|r| r.prompt.len() == 3), 0.6);
    near(share(&|r| r.tenant == 1 && r.priority == -1), 0.25);
    near(share(&|r| r.tenant == 0 && r.priority == 0), 0.75);
    let mut groups: BTreeMap<u64, u32> = BTreeMap::new();
    for r in requests.iter().filter(|r| r.prompt.len() == 3) {
        *groups.entry(r.prompt[1].content.0).or_default() += 1;
    }
    // Zipf with exponent 1 over 10 groups: the first has 1/2.929 of the requests.
    let most = f64::from(*groups.values().max().unwrap());
    near(most / share(&|r| r.prompt.len() == 3) / requests.len() as f64, 0.341);
    assert_eq!(groups.len(), 10);
}

#[test]
fn requests_of_a_group_share_exactly_their_prefix() {
    let text = "{ arrivals: { process: constant, rate: 1 }, system_prompt: { tokens: 8 }, prompt_tokens: 5, \
        prefixes: { groups: 1, tokens: 16 } }";
    let requests = arrivals(&scenario(text, "requests: 2"), 1);
    let tokens = |r: &PlannedRequest| {
        let mut out = Vec::new();
        r.tokens(&mut out);
        out
    };
    let (a, b) = (tokens(&requests[0]), tokens(&requests[1]));
    assert_eq!((a.len(), requests[0].prompt_tokens), (29, 29));
    assert_eq!(a[..24], b[..24]);
    assert!(a[24..].iter().zip(&b[24..]).any(|(x, y)| x != y));
}

#[test]
fn a_closed_loop_keeps_its_clients_busy_and_thinking() {
    let text = "{ arrivals: { process: closed, concurrency: 3, think_time: 150ms } }";
    let mut plan = Plan::new(&scenario(text, "requests: 8"), Seed(1)).unwrap();
    let first: Vec<PlannedRequest> = std::iter::from_fn(|| plan.next_arrival().unwrap()).collect();
    let starts: Vec<_> = first.iter().map(|r| (r.client, r.intended)).collect();
    assert_eq!(starts, [0, 1, 2].map(|c| (Some(c), Time::ZERO)));
    let at = Time::from_nanos(1_000_000_000);
    let next = plan.finished(&first[1], at, Some(first[1].planned_answer())).unwrap();
    assert_eq!((next.client, next.index, next.intended), (Some(1), 3, at + Dur::from_millis(150)));
    assert_ne!(next.prompt, first[1].prompt);
    assert!(plan.finished(&next, at, None).is_some(), "a failure does not stop a client");
    let rest = std::iter::from_fn(|| plan.finished(&first[0], at, None)).count();
    assert_eq!(rest, 3, "eight requests in all");
}

#[test]
fn closed_loop_content_does_not_depend_on_the_order_of_answers() {
    let text = "{ arrivals: { process: closed, concurrency: 2 }, prompt_tokens: { distribution: azure-conv } }";
    let run = |order: [usize; 2]| {
        let mut plan = Plan::new(&scenario(text, "requests: 4"), Seed(5)).unwrap();
        let first: Vec<PlannedRequest> = std::iter::from_fn(|| plan.next_arrival().unwrap()).collect();
        let mut next = order.map(|i| plan.finished(&first[i], Time::ZERO, None).unwrap());
        next.sort_by_key(|r| r.client);
        next.map(|r| (r.client, r.prompt, r.output_tokens))
    };
    assert_eq!(run([0, 1]), run([1, 0]));
}

#[test]
fn a_turn_repeats_what_was_said_and_waits_for_it() {
    let text = "{ arrivals: { process: constant, rate: 1 }, prompt_tokens: 10, output_tokens: 4, \
        sessions: { turns: 3, turn_tokens: 6, think_time: 2s } }";
    let mut plan = Plan::new(&scenario(text, "requests: 100"), Seed(1)).unwrap();
    let first = plan.next_arrival().unwrap().unwrap();
    assert_eq!(first.session, Some((SessionId(0), 0)));
    let at = Time::from_nanos(5_000_000_000);
    let answer = Answer { content: ContentId(77), tokens: 3 };
    let second = plan.finished(&first, at, Some(answer)).unwrap();
    assert_eq!((second.session, second.intended), (Some((SessionId(0), 1)), at + Dur::from_secs(2)));
    assert_eq!(second.prompt[..1], first.prompt[..]);
    assert_eq!(second.prompt[1], Segment { content: ContentId(77), from: 0, tokens: 3 });
    assert_eq!((second.prompt_tokens, second.prompt[2].tokens), (19, 6));
    let third = plan.finished(&second, at, Some(second.planned_answer())).unwrap();
    assert_eq!(plan.finished(&third, at, Some(third.planned_answer())), None, "three turns were asked for");
    assert_eq!(plan.finished(&second, at, None), None, "a failed turn ends the conversation");
}

#[test]
fn conversations_end_before_they_outgrow_the_context() {
    let text = "{ arrivals: { process: constant, rate: 1 }, prompt_tokens: 60000, output_tokens: 100, \
        sessions: { turns: 9 } }";
    let mut plan = Plan::new(&scenario(text, "requests: 100"), Seed(1)).unwrap();
    let mut last = plan.next_arrival().unwrap().unwrap();
    let mut turns = 1;
    while let Some(next) = plan.finished(&last, Time::ZERO, Some(last.planned_answer())) {
        (last, turns) = (next, turns + 1);
    }
    assert_eq!(turns, 2);
}

#[test]
fn pauses_have_the_mean_asked_for() {
    let text = "{ arrivals: { process: closed, concurrency: 1, think_time: { mean: 2s } } }";
    let mut plan = Plan::new(&scenario(text, "requests: 5000"), Seed(1)).unwrap();
    let mut last = plan.next_arrival().unwrap().unwrap();
    let mut sum = 0.0;
    while let Some(next) = plan.finished(&last, Time::ZERO, None) {
        sum += next.intended.as_secs_f64();
        last = next;
    }
    let mean = sum / 4999.0;
    assert!((mean / 2.0 - 1.0).abs() < 0.05, "{mean}");
}

#[test]
fn a_million_requests_are_planned_lazily_and_fit_the_context() {
    let text = "{ arrivals: { process: poisson, rate: 1000 }, prompt_tokens: { distribution: mooncake-conv } }";
    let s = scenario(text, "requests: 1000000");
    let mut plan = Plan::new(&s, Seed(1)).unwrap();
    let mut sum = 0u64;
    while let Some(r) = plan.next_arrival().unwrap() {
        sum += u64::from(r.prompt_tokens);
        assert!(r.prompt_tokens + r.output_tokens <= s.context_limit());
    }
    let mean = sum as f64 / 1e6;
    assert!((mean / 12_035.0 - 1.0).abs() < 0.025, "{mean}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_same_seed_gives_the_same_plan(seed: u64, rate in 0.1f64..1000.0, cv in 0.3f64..4.0, share in 0.0f64..1.0) {
        let text = format!(
            "{{ arrivals: {{ process: gamma, rate: {rate}, cv: {cv} }}, prompt_tokens: {{ distribution: azure-conv }}, \
             prefixes: {{ groups: 7, tokens: {{ distribution: uniform, min: 10, max: 90 }}, share: {share} }} }}"
        );
        let s = scenario(&text, "requests: 60");
        let plan = arrivals(&s, seed);
        prop_assert_eq!(&plan, &arrivals(&s, seed));
        prop_assert_ne!(&plan, &arrivals(&s, seed ^ 1));
        prop_assert!(plan.iter().enumerate().all(|(i, r)| r.index == i as u64 && r.output_tokens > 0));
        prop_assert!(plan.iter().all(|r| r.prompt_tokens == r.prompt.iter().map(|s| s.tokens).sum::<u32>()));
    }
}
