//! Flow control, as a driver sees it: outputs that come later, and for whom.

use std::collections::BTreeMap;

use super::*;
use crate::core::config::{
    BandConfig, ConcurrencyConfig, Detector, FairnessPolicy, FlowControlConfig, SaturationConfig,
};
use shared::units::HumanDur;

/// A gateway that dispatches while its endpoints have fewer than `most` requests each, by the gateway's own count.
fn holding(n: u32, most: u32, change: impl FnOnce(&mut FlowControlConfig)) -> Gateway {
    let mut flow_control = FlowControlConfig { enabled: true, ..FlowControlConfig::default() };
    change(&mut flow_control);
    gateway(n, |c| {
        let concurrency = ConcurrencyConfig { max_requests: most, ..ConcurrencyConfig::default() };
        let detector = Detector::ConcurrencyDetector;
        c.saturation = SaturationConfig { detector, concurrency, ..SaturationConfig::default() };
        c.flow_control = Some(flow_control);
        c.objectives = [("high".into(), 1), ("batch".into(), -1)].into();
    })
}

fn ms(n: u64) -> Time {
    Time::ZERO + Dur::from_millis(n)
}

fn told(g: &mut Gateway, now: Time, input: Input) -> Vec<Output> {
    let mut out = Vec::new();
    g.handle(now, input, &mut Stopped(now), &mut out);
    out
}

fn advanced(g: &mut Gateway, now: Time) -> Vec<Output> {
    let mut out = Vec::new();
    g.advance(now, &mut Stopped(now), &mut out);
    out
}

fn ask(g: &mut Gateway, now: Time, key: u64) -> Vec<Output> {
    told(g, now, Input::Request(request(key)))
}

fn finished(key: u64, endpoint: u32) -> Input {
    Input::Finished { key: RequestKey(key), endpoint: EndpointId(endpoint) }
}

fn keys(out: &[Output]) -> Vec<u64> {
    out.iter().map(|o| o.key().0).collect()
}

#[test]
fn a_request_waits_for_room_and_goes_on_the_next_tick() {
    let mut g = holding(1, 1, |_| {});
    assert_eq!(endpoint(ask(&mut g, ms(0), 1).pop()), 0);
    assert_eq!((ask(&mut g, ms(2), 2), g.queued()), (vec![], (1, 10)));
    assert_eq!(g.next_wakeup(), Some(ms(60_002)), "nothing but its expiry");
    assert_eq!(told(&mut g, ms(7), finished(1, 0)), []);
    assert_eq!(g.next_wakeup(), Some(ms(8)));
    let out = advanced(&mut g, ms(8));
    assert_eq!((keys(&out), endpoint(out.first().copied())), (vec![2], 0));
    assert_eq!((g.queued(), g.next_wakeup(), g.open_requests()), ((0, 0), None, 1));
}

#[test]
fn a_request_that_comes_may_let_a_better_one_go() {
    let mut g = holding(1, 1, |_| {});
    ask(&mut g, ms(0), 1);
    let mut high = request(2);
    high.objective = Some("high".into());
    told(&mut g, ms(1), Input::Request(high));
    told(&mut g, ms(2), finished(1, 0));
    assert_eq!(keys(&ask(&mut g, ms(2), 3)), [2]);
    assert_eq!(g.queued().0, 1);
}

#[test]
fn one_request_goes_each_tick() {
    let mut g = holding(1, 3, |_| {});
    (0..6).for_each(|key| _ = ask(&mut g, ms(0), key));
    (0..3).for_each(|key| _ = told(&mut g, ms(1), finished(key, 0)));
    assert_eq!(keys(&advanced(&mut g, ms(2))), [3]);
    assert_eq!(g.next_wakeup(), Some(ms(3)));
    // A late driver makes up for the ticks it missed.
    assert_eq!(keys(&advanced(&mut g, ms(5))), [4, 5]);
    assert_eq!(g.next_wakeup(), None);
}

#[test]
fn a_sheddable_request_waits_too() {
    let mut g = holding(1, 1, |_| {});
    ask(&mut g, ms(0), 1);
    let mut batch = request(2);
    batch.objective = Some("batch".into());
    assert_eq!(told(&mut g, ms(1), Input::Request(batch)), []);
    told(&mut g, ms(2), finished(1, 0));
    assert_eq!(keys(&advanced(&mut g, ms(3))), [2]);
}

#[test]
fn refusals_of_the_queue_are_data() {
    let of = |out: Vec<Output>| rejection(out.first().copied());
    let mut g = holding(1, 1, |f| {
        f.default_request_ttl = HumanDur::secs(1);
        f.no_endpoint_request_ttl = HumanDur::secs(2);
        f.default_band = BandConfig { max_requests: 2, ..BandConfig::default() };
    });
    (1..=3).for_each(|key| _ = ask(&mut g, ms(0), key));
    assert_eq!(of(ask(&mut g, ms(0), 4)), Rejection::QueueFull);
    assert_eq!(g.next_wakeup(), Some(ms(1000)));
    let out = advanced(&mut g, ms(1000));
    assert_eq!(keys(&out), [2, 3]);
    assert_eq!(of(out), Rejection::TtlExpired);

    ask(&mut g, ms(1000), 5);
    told(&mut g, ms(1001), Input::Endpoint(EndpointChange::Draining(EndpointId(0))));
    assert_eq!(advanced(&mut g, ms(1002)), []);
    assert_eq!((g.next_wakeup(), advanced(&mut g, ms(2999))), (Some(ms(3000)), vec![]));
    assert_eq!(of(advanced(&mut g, ms(3000))), Rejection::NoEndpointsInTime);

    ask(&mut g, ms(3000), 6);
    assert_eq!(of(told(&mut g, ms(3001), Input::ShutDown)), Rejection::ShuttingDown);
    assert_eq!(of(ask(&mut g, ms(3002), 7)), Rejection::ShuttingDown);

    let unknown = EndpointChange::Models(EndpointId(0), vec!["other".into()]);
    let mut g = holding(1, 1, |_| {});
    told(&mut g, ms(0), Input::Endpoint(unknown));
    assert_eq!(of(ask(&mut g, ms(0), 1)), Rejection::UnknownModel);
}

#[test]
fn codes_and_reasons_are_those_of_llm_d() {
    let check = |rejection: Rejection, status, reason| {
        assert_eq!((rejection.status(), rejection.dropped()), (status, reason), "{rejection:?}");
    };
    check(Rejection::Saturated, 429, Some("rejected-saturated"));
    check(Rejection::QueueFull, 429, Some("rejected-saturated"));
    check(Rejection::TtlExpired, 429, Some("rejected-ttl-expired"));
    check(Rejection::NoEndpointsInTime, 503, Some("rejected-no-endpoints"));
    check(Rejection::NoEndpoints, 503, Some("rejected-no-endpoints"));
    check(Rejection::Cancelled, 503, Some("rejected-context-cancelled"));
    check(Rejection::ShuttingDown, 503, Some("rejected-shutting-down"));
    check(Rejection::UnknownModel, 404, None);
    check(Rejection::Unreachable, 502, None);
}

#[test]
fn a_caller_may_go_away_while_it_waits_and_just_after() {
    let mut g = holding(1, 1, |_| {});
    (1..=3).for_each(|key| _ = ask(&mut g, ms(0), key));
    assert_eq!(told(&mut g, ms(1), Input::Cancelled(RequestKey(2))), []);
    told(&mut g, ms(1), finished(1, 0));
    assert_eq!(keys(&advanced(&mut g, ms(2))), [3]);
    // It was let go, and its caller had gone already.
    told(&mut g, ms(2), Input::Cancelled(RequestKey(3)));
    assert_eq!((g.open_requests(), g.queued().0, g.endpoints()[0].in_flight), (0, 0, 0));
    told(&mut g, ms(2), Input::Cancelled(RequestKey(3)));
}

#[test]
fn a_retry_does_not_wait_again() {
    let mut g = holding(2, 1, |_| {});
    let first = endpoint(ask(&mut g, ms(0), 1).pop());
    ask(&mut g, ms(0), 2);
    ask(&mut g, ms(0), 3);
    let failed = Input::AttemptFailed { key: RequestKey(1), endpoint: EndpointId(first), failure: Failure::Reset };
    assert!(matches!(told(&mut g, ms(1), failed)[..], [Output::Dispatch { key: RequestKey(1), attempt: 1, .. }]));
}

#[test]
fn stale_metrics_hold_until_new_ones_come() {
    let mut g =
        gateway(1, |c| c.flow_control = Some(FlowControlConfig { enabled: true, ..FlowControlConfig::default() }));
    // Reported at 0; after 200 ms nothing is known.
    assert_eq!(ask(&mut g, ms(201), 1), []);
    let m = EndpointMetrics { waiting: 0, running: 0, kv_usage: 0.0, block_size: 16, num_gpu_blocks: 9, at: ms(250) };
    told(&mut g, ms(250), Input::Metrics { endpoint: EndpointId(0), metrics: Ok(m) });
    assert_eq!(keys(&advanced(&mut g, ms(251))), [1]);
}

/// What a driver may see of one request, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Waits,
    At(EndpointId),
    Over,
}

/// A driver that does everything wrong that it may.
struct Driver {
    gateway: Gateway,
    now: Time,
    seen: BTreeMap<u64, Seen>,
}

impl Driver {
    fn take(&mut self, out: Vec<Output>) {
        for output in out {
            let seen = self.seen.get_mut(&output.key().0).expect("an output is for a request that came");
            assert_eq!(*seen, Seen::Waits, "{output:?}");
            *seen = match output {
                Output::Dispatch { endpoint, .. } => Seen::At(endpoint),
                Output::Reject { .. } => Seen::Over,
                Output::Stay { .. } => panic!("nobody hedges: {output:?}"),
            };
        }
    }

    fn tell(&mut self, input: Input) {
        let out = told(&mut self.gateway, self.now, input);
        self.take(out);
    }

    /// The nth request in this state, going round.
    fn nth(&self, which: usize, of: impl Fn(Seen) -> bool) -> Option<(u64, Seen)> {
        let all: Vec<(u64, Seen)> = self.seen.iter().map(|(k, s)| (*k, *s)).filter(|(_, s)| of(*s)).collect();
        all.get(which % all.len().max(1)).copied()
    }

    fn step(&mut self, key: u64, action: u8, which: usize) {
        match action {
            0..=3 => {
                let mut r = request(key);
                r.objective = ["high", "batch", "unknown"].get(which % 4).map(|o| (*o).into());
                r.fairness_id = Some(["a", "b", "c"][which % 3].into());
                r.deadlines.ttl = which.is_multiple_of(5).then(|| Dur::from_millis(which as u64 % 40));
                self.seen.insert(key, Seen::Waits);
                self.tell(Input::Request(r));
            }
            4 | 5 => {
                if let Some((key, Seen::At(endpoint))) = self.nth(which, |s| matches!(s, Seen::At(_))) {
                    self.seen.insert(key, Seen::Over);
                    self.tell(Input::Finished { key: RequestKey(key), endpoint });
                }
            }
            6 => {
                if let Some((key, _)) = self.nth(which, |s| s != Seen::Over) {
                    self.seen.insert(key, Seen::Over);
                    self.tell(Input::Cancelled(RequestKey(key)));
                }
            }
            7 => {
                if let Some((key, Seen::At(endpoint))) = self.nth(which, |s| matches!(s, Seen::At(_))) {
                    // It is answered at once, one way or the other.
                    self.seen.insert(key, Seen::Waits);
                    self.tell(Input::AttemptFailed { key: RequestKey(key), endpoint, failure: Failure::Reset });
                    assert_ne!(self.seen[&key], Seen::Waits);
                }
            }
            8 => {
                let endpoint = EndpointId(which as u32 % 3);
                let change = if which.is_multiple_of(2) {
                    EndpointChange::Draining(endpoint)
                } else {
                    EndpointChange::Restarted(endpoint)
                };
                self.tell(Input::Endpoint(change));
            }
            9 => {
                let (endpoint, at) = (EndpointId(which as u32 % 3), self.now);
                let waiting = which as u32 % 9;
                let m = EndpointMetrics { waiting, running: 0, kv_usage: 0.0, block_size: 16, num_gpu_blocks: 9, at };
                self.tell(Input::Metrics { endpoint, metrics: Ok(m) });
            }
            _ => self.pass(Dur::from_micros(which as u64 * 300)),
        }
        self.check();
    }

    /// Time passes; the core is looked at whenever it wants to be.
    fn pass(&mut self, time: Dur) {
        let end = self.now + time;
        let mut looks = 0;
        while let Some(at) = self.gateway.next_wakeup().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            let mut out = Vec::new();
            self.gateway.advance(self.now, &mut Stopped(self.now), &mut out);
            self.take(out);
            looks += 1;
            assert!(looks < 10_000, "the core does not come to rest");
        }
        self.now = end;
    }

    fn check(&self) {
        let count = |of: &dyn Fn(&Seen) -> bool| self.seen.values().filter(|s| of(s)).count();
        assert_eq!(self.gateway.queued().0, count(&|s| *s == Seen::Waits));
        assert_eq!(self.gateway.open_requests(), count(&|s| matches!(s, Seen::At(_))));
        for (i, e) in self.gateway.endpoints().iter().enumerate() {
            assert_eq!(e.in_flight as usize, count(&|s| *s == Seen::At(EndpointId(i as u32))));
        }
    }
}

proptest! {
    /// I1. No request is lost or dispatched twice, whatever comes in whatever order: each waits until it is dispatched or refused once.
    #[test]
    fn waiting_requests_are_conserved(
        steps in proptest::collection::vec((0u8..12, 0usize..40), 0..250),
        concurrency in any::<bool>(),
        fairness in 0usize..3,
    ) {
        use FairnessPolicy as F;
        let band = BandConfig {
            fairness: [F::GlobalStrictFairnessPolicy, F::RoundRobinFairnessPolicy, F::ProgramAwareFairness][fairness],
            max_requests: 7,
            ..BandConfig::default()
        };
        let flow = FlowControlConfig {
            enabled: true,
            default_request_ttl: HumanDur::millis(30),
            no_endpoint_request_ttl: HumanDur::millis(50),
            max_requests: Some(12),
            default_band: band,
            ..FlowControlConfig::default()
        };
        let gateway = gateway(3, |c| {
            if concurrency {
                c.saturation.detector = Detector::ConcurrencyDetector;
                c.saturation.concurrency.max_requests = 2;
            }
            c.flow_control = Some(flow);
            c.objectives = [("high".into(), 1), ("batch".into(), -1)].into();
        });
        let mut driver = Driver { gateway, now: Time::ZERO, seen: BTreeMap::new() };
        for (key, (action, which)) in steps.into_iter().enumerate() {
            driver.step(key as u64, action, which);
        }
        // Everything that waits ends by its time to live, at the latest.
        driver.pass(Dur::from_secs(1));
        driver.check();
        prop_assert_eq!(driver.gateway.queued(), (0, 0));
        prop_assert_eq!(driver.gateway.next_wakeup(), None);
    }
}
