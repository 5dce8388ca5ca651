//! A second attempt beside one that does not answer.

use shared::units::HumanDur;

use super::*;
use crate::core::config::{HedgeAfter, HedgeConfig};

const KEY: RequestKey = RequestKey(1);

fn hedging(n: u32, change: impl FnOnce(&mut GatewayConfig)) -> Gateway {
    gateway(n, |c| {
        c.retry.hedge = Some(HedgeConfig { after: HedgeAfter::Fixed(HumanDur::millis(100)) });
        change(c);
    })
}

fn in_flight(g: &Gateway) -> Vec<u32> {
    g.endpoints().iter().map(|e| e.in_flight).collect()
}

/// A request, and where it is; a second attempt is due after 100 ms.
fn begun(g: &mut Gateway) -> EndpointId {
    let output = step(g, Input::Request(request(1)));
    assert!(
        matches!(output, Some(Output::Dispatch { hedge_after: Some(after), .. }) if after == Dur::from_millis(100))
    );
    EndpointId(endpoint(output))
}

/// Two attempts at a request.
fn both(g: &mut Gateway) -> (EndpointId, EndpointId) {
    let first = begun(g);
    let output = step(g, Input::Late { key: KEY });
    assert!(matches!(output, Some(Output::Dispatch { attempt: 1, hedge_after: None, .. })), "{output:?}");
    let second = EndpointId(endpoint(output));
    assert_ne!(first, second);
    assert_eq!((in_flight(g), g.hedges()), (vec![1, 1], 1));
    (first, second)
}

fn started(endpoint: EndpointId) -> Input {
    Input::ResponseStarted { key: KEY, endpoint, status: 200 }
}

#[test]
fn whoever_answers_first_has_the_request() {
    for second_wins in [false, true] {
        let mut g = hedging(2, |_| {});
        let (first, second) = both(&mut g);
        let (winner, loser) = if second_wins { (second, first) } else { (first, second) };
        assert_eq!(step(&mut g, started(winner)), None);
        assert_eq!(g.endpoints()[loser.index()].in_flight, 0, "the other one is free of it");
        assert_eq!(step(&mut g, Input::Late { key: KEY }), Some(Output::Stay { key: KEY }), "it has answered");
        step(&mut g, Input::Finished { key: KEY, endpoint: winner });
        assert_eq!((in_flight(&g), g.open_requests()), (vec![0, 0], 0));
    }
}

#[test]
fn one_that_fails_leaves_the_other() {
    let failure = Failure::Connect;
    for second_fails in [false, true] {
        let mut g = hedging(2, |_| {});
        let (first, second) = both(&mut g);
        let (failed, left) = if second_fails { (second, first) } else { (first, second) };
        let stays = step(&mut g, Input::AttemptFailed { key: KEY, endpoint: failed, failure });
        assert_eq!(stays, Some(Output::Stay { key: KEY }));
        assert_eq!(g.endpoints()[failed.index()].in_flight, 0);
        // The second attempt was the one retry there is.
        let last = step(&mut g, Input::AttemptFailed { key: KEY, endpoint: left, failure });
        assert_eq!(rejection(last), Rejection::Unreachable);
        assert_eq!((in_flight(&g), g.open_requests()), (vec![0, 0], 0));
    }
}

#[test]
fn a_request_that_ends_leaves_both() {
    for end in [
        |first| Input::Finished { key: KEY, endpoint: first },
        |first| Input::GivenUp { key: KEY, endpoint: first, failure: Failure::Timeout },
        |_| Input::Cancelled(KEY),
    ] {
        let mut g = hedging(2, |_| {});
        let (first, _) = both(&mut g);
        step(&mut g, end(first));
        assert_eq!((in_flight(&g), g.open_requests()), (vec![0, 0], 0));
    }
}

#[test]
fn without_another_endpoint_or_budget_it_stays() {
    let stays = Some(Output::Stay { key: KEY });
    let mut alone = hedging(1, |_| {});
    begun(&mut alone);
    assert_eq!(step(&mut alone, Input::Late { key: KEY }), stays);
    assert_eq!((in_flight(&alone), alone.retries_refused()), (vec![1], 0), "there was nothing to pay for");

    let mut poor = hedging(2, |c| (c.retry.budget_ratio, c.retry.budget_min_per_second) = (0.0, 0));
    begun(&mut poor);
    assert_eq!(step(&mut poor, Input::Late { key: KEY }), stays);
    assert_eq!((poor.retries_refused(), poor.hedges()), (1, 0));

    let mut none = hedging(2, |c| c.limits.retries = 0);
    begun(&mut none);
    assert_eq!(step(&mut none, Input::Late { key: KEY }), stays);
    assert_eq!(step(&mut none, Input::Late { key: RequestKey(9) }), Some(Output::Stay { key: RequestKey(9) }));
}

#[test]
fn a_third_attempt_is_not_made_beside_two() {
    let mut g = hedging(3, |c| c.limits.retries = 8);
    begun(&mut g);
    endpoint(step(&mut g, Input::Late { key: KEY }));
    assert_eq!(step(&mut g, Input::Late { key: KEY }), Some(Output::Stay { key: KEY }));
}

#[test]
fn the_time_may_follow_from_what_answers_took() {
    let mut g = gateway(2, |c| c.retry.hedge = Some(HedgeConfig { after: HedgeAfter::P95 }));
    let mut now = Time::ZERO;
    let mut after = None;
    for key in 0..20 {
        let output = step_at(&mut g, now, Input::Request(request(key)));
        let Some(Output::Dispatch { endpoint, hedge_after, .. }) = output else { panic!("{output:?}") };
        assert_eq!(hedge_after, None, "too few answers");
        now += Dur::from_millis(40);
        let key = RequestKey(key);
        step_at(&mut g, now, Input::ResponseStarted { key, endpoint, status: 200 });
        // Told twice, it counts once.
        now += Dur::from_secs(5);
        step_at(&mut g, now, Input::ResponseStarted { key, endpoint, status: 200 });
        step_at(&mut g, now, Input::Finished { key, endpoint });
    }
    if let Some(Output::Dispatch { hedge_after, .. }) = step_at(&mut g, now, Input::Request(request(99))) {
        after = hedge_after;
    }
    assert_eq!(after, Some(Dur::from_millis(40)));
}
