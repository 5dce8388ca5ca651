//! What waits, who is next, and what is given up.

use proptest::prelude::*;
use shared::ids::RequestId;
use shared::trace::Trail;
use shared::units::HumanDur;

use super::*;
use crate::core::request::Deadlines;

const FREE: Pressure = Pressure { saturation: 0.0, ready: true, changes: None };
const FULL: Pressure = Pressure { saturation: 1.0, ready: true, changes: None };
const EMPTY: Pressure = Pressure { saturation: 1.0, ready: false, changes: None };

fn at(ms: u64) -> Time {
    Time::ZERO + Dur::from_millis(ms)
}

fn flow_control(change: impl FnOnce(&mut FlowControlConfig)) -> FlowControl {
    let mut config = FlowControlConfig { enabled: true, ..FlowControlConfig::default() };
    change(&mut config);
    FlowControl::new(config)
}

fn request(key: u64, priority: i32, flow: &str) -> Box<RequestInfo> {
    Box::new(RequestInfo {
        key: RequestKey(key),
        id: RequestId::sanitise("r"),
        model: "m".into(),
        streaming: false,
        size_bytes: 10,
        priority,
        objective: None,
        fairness_id: (!flow.is_empty()).then(|| flow.into()),
        session: None,
        session_endpoint: None,
        selection: None,
        prompt_tokens_estimate: 4,
        max_output_tokens: None,
        deadlines: Deadlines::default(),
        prefix: Vec::new(),
        kv: Default::default(),
        trail: Trail::off(),
    })
}

/// Puts requests in at one time, given by priority and flow; their keys count from 0.
fn fill(f: &mut FlowControl, requests: &[(i32, &str)]) {
    for (key, (priority, flow)) in requests.iter().enumerate() {
        let (entry, returned) = f.enter(at(0), request(key as u64, *priority, flow));
        assert!(entry.position.is_some() && returned.is_none());
    }
}

/// The keys in the order in which they go.
fn drain(f: &mut FlowControl) -> Vec<u64> {
    std::iter::from_fn(|| f.next(at(1), &FREE)).map(|taken| taken.info.key.0).collect()
}

fn fair(fairness: FairnessPolicy) -> FlowControl {
    flow_control(|c| c.default_band.fairness = fairness)
}

#[test]
fn bands_are_strict() {
    let mut f = flow_control(|_| {});
    fill(&mut f, &[(0, "a"), (-1, "a"), (5, "a"), (0, "b"), (5, "b")]);
    assert_eq!(drain(&mut f), [2, 4, 0, 3, 1]);
    assert_eq!((f.len(), f.bytes()), (0, 0));
}

#[test]
fn flows_take_turns_or_do_not_matter() {
    let requests = [(0, "a"), (0, "a"), (0, "a"), (0, "c"), (0, "b"), (0, "b")];
    let mut strict = fair(FairnessPolicy::GlobalStrictFairnessPolicy);
    fill(&mut strict, &requests);
    assert_eq!(drain(&mut strict), [0, 1, 2, 3, 4, 5]);
    let mut turns = fair(FairnessPolicy::RoundRobinFairnessPolicy);
    fill(&mut turns, &requests);
    assert_eq!(drain(&mut turns), [0, 4, 3, 1, 5, 2]);
}

#[test]
fn a_turn_is_remembered_while_the_band_is_not_empty() {
    let mut f = fair(FairnessPolicy::RoundRobinFairnessPolicy);
    fill(&mut f, &[(0, "a"), (0, "b"), (0, "b")]);
    assert_eq!(f.next(at(1), &FREE).unwrap().info.key, RequestKey(0));
    f.enter(at(1), request(7, 0, "a"));
    assert_eq!(drain(&mut f), [1, 7, 2]);
}

#[test]
fn the_flow_that_was_served_least_goes_first() {
    let mut f = fair(FairnessPolicy::ProgramAwareFairness);
    assert!(f.reads_usage());
    fill(&mut f, &[(0, "a"), (0, "b"), (0, "a"), (0, "b")]);
    let first = f.next(at(1), &FREE).unwrap();
    assert_eq!(first.info.key, RequestKey(0));
    f.served(&first.info, at(1), 100, 50);
    f.ended(&first.info);
    assert_eq!(drain(&mut f), [1, 3, 2]);
}

#[test]
fn a_flow_is_ordered_by_arrival_by_expiry_or_by_objective() {
    let check = |ordering, expect: [u64; 4]| {
        let mut f = flow_control(|c| c.default_band.ordering = ordering);
        // By time to live and objective.
        let wishes = [(None, Some(900)), (Some(400), None), (Some(300), Some(100)), (Some(90_000), Some(500))];
        for (key, (ttl, ttft)) in wishes.into_iter().enumerate() {
            let mut r = request(key as u64, 0, "a");
            r.deadlines = Deadlines { ttl: ttl.map(Dur::from_millis), ttft: ttft.map(Dur::from_millis), tpot: None };
            f.enter(at(key as u64), r);
        }
        assert_eq!(drain(&mut f), expect, "{ordering:?}");
    };
    check(OrderingPolicy::FcfsOrderingPolicy, [0, 1, 2, 3]);
    // The last one may not wait longer than the gateway allows, and came after the first.
    check(OrderingPolicy::EdfOrderingPolicy, [2, 1, 0, 3]);
    check(OrderingPolicy::SloDeadlineOrderingPolicy, [2, 3, 0, 1]);
}

#[test]
fn what_has_no_room_is_given_back() {
    let enter = |f: &mut FlowControl, key, priority| f.enter(at(0), request(key, priority, "a")).1.is_none();
    let mut f = flow_control(|c| {
        c.max_requests = Some(4);
        c.default_band.max_requests = 2;
        c.default_negative_band = Some(BandConfig { max_requests: 1, ..BandConfig::default() });
        c.priority_bands = vec![BandConfig { priority: 9, max_bytes: 25, ..BandConfig::default() }];
    });
    let taken: Vec<bool> =
        [0, 0, 0, -1, -1, 9, 9].into_iter().enumerate().map(|(key, p)| enter(&mut f, key as u64, p)).collect();
    assert_eq!(taken, [true, true, false, true, false, true, false]);
    assert_eq!((f.len(), f.bytes()), (4, 40));
    let mut f =
        flow_control(|c| c.priority_bands = vec![BandConfig { priority: 9, max_bytes: 25, ..BandConfig::default() }]);
    let taken: Vec<bool> = (0..4).map(|key| enter(&mut f, key, 9)).collect();
    assert_eq!(taken, [true, true, false, false]);
    let mut f = flow_control(|c| c.max_bytes = Some(9));
    assert!(!enter(&mut f, 0, 0));
    assert_eq!(f.next_wakeup(), None);
}

#[test]
fn entering_tells_what_was_there() {
    let mut f = flow_control(|_| {});
    fill(&mut f, &[(0, "a"), (0, "b"), (0, "a")]);
    let (entry, _) = f.enter(at(0), request(9, 0, "a"));
    assert_eq!((entry.position, entry.size, entry.ttl), (Some(2), 3, Some(Dur::from_secs(60))));
    let (entry, _) = f.enter(at(0), request(10, 0, ""));
    assert_eq!((&*entry.flow, entry.position), ("default-flow", Some(0)));
}

#[test]
fn a_full_pool_holds_everything() {
    let mut f = flow_control(|c| c.usage_limit = 0.9);
    fill(&mut f, &[(0, "a")]);
    let held = Pressure { saturation: 0.9, changes: Some(at(7) + Dur::from_nanos(1)), ..FREE };
    assert!(f.next(at(1), &held).is_none());
    assert_eq!(f.next_wakeup(), Some(at(8)), "when the pressure changes by itself, on a tick");
    let below = Pressure { saturation: 0.89, ..FREE };
    let taken = f.next(at(8), &below).unwrap();
    assert_eq!(taken.hold, Some(Hold { saturation: 0.9, ceiling: 0.9 }));
    assert_eq!(taken.waited, Dur::from_millis(8));
    f.enter(at(9), request(3, 0, "a"));
    assert_eq!(f.next(at(9), &FREE).unwrap().hold, None, "it was held before this one came");
}

#[test]
fn ticks_are_whole_milliseconds() {
    let mut f = flow_control(|_| {});
    f.stir(at(1));
    assert_eq!(f.next_wakeup(), None, "nobody waits");
    fill(&mut f, &[(0, "a")]);
    f.stir(at(5));
    assert_eq!(f.next_wakeup(), Some(at(6)));
    f.stir(at(5) + Dur::from_micros(100));
    assert_eq!((f.ticks(at(5)), f.ticks(at(6)), f.ticks(at(6))), (0, 1, 0));
    f.stir(at(6) + Dur::from_micros(1));
    assert_eq!(f.ticks(at(10)), 4, "a driver that is late is told so");
}

#[test]
fn waiting_ends_by_the_budget_of_the_pool_as_it_is() {
    let expire = |f: &mut FlowControl, now| {
        std::iter::from_fn(|| f.expired(now)).map(|(t, ready)| (t.info.key.0, ready)).collect::<Vec<_>>()
    };
    let mut f = flow_control(|c| {
        c.default_request_ttl = HumanDur::secs(1);
        c.no_endpoint_request_ttl = HumanDur::secs(3);
    });
    fill(&mut f, &[(0, "a"), (0, "b")]);
    let mut soon = request(2, 0, "a");
    soon.deadlines.ttl = Some(Dur::from_millis(200));
    f.enter(at(0), soon);
    f.next(at(0), &FULL);
    assert_eq!(f.next_wakeup(), Some(at(200)));
    assert_eq!(expire(&mut f, at(999)), [(2, true)]);
    // Without endpoints they may wait longer.
    f.next(at(999), &EMPTY);
    assert_eq!((f.next_wakeup(), expire(&mut f, at(1000)).len()), (Some(at(3000)), 0));
    assert_eq!(expire(&mut f, at(3000)), [(0, false), (1, false)]);
    let mut f = flow_control(|c| (c.default_request_ttl, c.no_endpoint_request_ttl) = Default::default());
    fill(&mut f, &[(0, "a")]);
    assert_eq!((f.next_wakeup(), expire(&mut f, at(1 << 40)).len()), (None, 0), "0 is for ever");
}

#[test]
fn a_caller_that_goes_away_and_a_gateway_that_stops_leave_nothing() {
    let mut f = flow_control(|_| {});
    fill(&mut f, &[(0, "a"), (1, "b"), (0, "c")]);
    assert_eq!(f.cancel(at(1), RequestKey(1)).map(|t| t.info.key), Some(RequestKey(1)));
    assert!(f.cancel(at(1), RequestKey(1)).is_none());
    let rest: Vec<u64> = std::iter::from_fn(|| f.close(at(2))).map(|t| t.info.key.0).collect();
    assert_eq!(rest, [0, 2]);
    assert!(f.is_closed());
    assert_eq!((f.len(), f.bytes(), f.next_wakeup()), (0, 0, None));
}

proptest! {
    /// Backlogged flows of one band are served equally, whatever they ask for, to within one request.
    #[test]
    fn turns_are_fair(sizes in proptest::collection::vec(10usize..40, 2..6), served in 1usize..40) {
        let mut f = fair(FairnessPolicy::RoundRobinFairnessPolicy);
        let mut key = 0;
        for (flow, size) in sizes.iter().enumerate() {
            for _ in 0..*size {
                f.enter(at(0), request(key, 0, &flow.to_string()));
                key += 1;
            }
        }
        let mut counts = vec![0usize; sizes.len()];
        let backlogged = 10 * sizes.len();
        for _ in 0..served.min(backlogged) {
            let taken = f.next(at(1), &FREE).unwrap();
            counts[taken.info.fairness_id.unwrap().parse::<usize>().unwrap()] += 1;
        }
        let (low, high) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        prop_assert!(high - low <= 1, "{:?}", counts);
    }
}
