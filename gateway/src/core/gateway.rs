//! The gateway's core: open requests, the pool and the director, behind one `handle`.
//!
//! It knows no sockets; a driver tells it what arrived and does what it answers.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::rng::Seed;
use shared::time::{Stopwatch, Time};

pub use crate::core::pool::{Endpoint, EndpointConfig, EndpointId, EndpointMetrics, ScrapeError};
pub use crate::core::request::{Output, Rejection, RequestInfo, RequestKey, SessionKey};

use crate::core::config::GatewayConfig;
use crate::core::director::Director;
use crate::core::pool::Health;
use crate::spans::{Failure, GatewayFact, bounded_name};

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A request was received and parsed.
    Request(Box<RequestInfo>),
    /// An endpoint was scraped.
    Metrics {
        /// The endpoint.
        endpoint: EndpointId,
        /// What it answered.
        metrics: Result<EndpointMetrics, ScrapeError>,
    },
    /// No byte of a response came back: another endpoint may be tried.
    AttemptFailed {
        /// The request.
        key: RequestKey,
        /// The endpoint that did not answer.
        endpoint: EndpointId,
        /// What went wrong.
        failure: Failure,
    },
    /// The head of a response arrived: from now on the request stays where it is.
    ResponseStarted {
        /// The request.
        key: RequestKey,
        /// The endpoint that answers.
        endpoint: EndpointId,
    },
    /// A dispatched request is over, well or badly.
    Finished {
        /// The request.
        key: RequestKey,
        /// The endpoint it was sent to last.
        endpoint: EndpointId,
    },
    /// The pool changed.
    Endpoint(EndpointChange),
}

/// A change of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointChange {
    /// A new endpoint; it gets the next id.
    Added(EndpointConfig),
    /// An endpoint gets no new requests, those it has go on.
    Draining(EndpointId),
    /// A draining endpoint is back, or one was replaced under its name: what its cache held is forgotten.
    Restarted(EndpointId),
    /// Which models an endpoint serves became known.
    Models(EndpointId, Vec<Arc<str>>),
}

/// The core of one gateway.
#[derive(Debug)]
pub struct Gateway {
    director: Director,
    open: FxHashMap<RequestKey, Open>,
    retries: u32,
    pool_name: (Arc<str>, Arc<str>),
}

/// A dispatched request.
#[derive(Debug)]
struct Open {
    info: Box<RequestInfo>,
    endpoint: EndpointId,
    attempt: u32,
    tried: Vec<EndpointId>,
}

impl Gateway {
    /// A gateway in front of `endpoints`, which get the ids 0, 1, ...
    ///
    /// # Panics
    /// If `config` has problems: they are found and shown by [`GatewayConfig::validate`].
    pub fn new(config: GatewayConfig, endpoints: Vec<EndpointConfig>, seed: Seed) -> Gateway {
        let problems = config.validate();
        assert!(problems.is_empty(), "the configuration is validated before it is used: {}", problems[0]);
        let retries = config.limits.retries;
        let pool_name = (config.pool.name.as_str().into(), config.pool.namespace.as_str().into());
        Gateway { director: Director::new(&config, endpoints, seed), open: FxHashMap::default(), retries, pool_name }
    }

    /// Takes what happened at `now` and appends what is to be done to `out`.
    ///
    /// `watch` times the stages of a decision; for a request that nobody records it should be [`shared::time::Stopped`].
    pub fn handle(&mut self, now: Time, input: Input, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        match input {
            Input::Request(info) => self.request(now, info, watch, out),
            Input::Metrics { endpoint, metrics } => self.director.pool.scraped(endpoint, metrics),
            Input::AttemptFailed { key, endpoint, failure } => {
                if means_unreachable(failure) {
                    self.director.pool.get_mut(endpoint).health = Health::Ejected;
                }
                self.attempt_failed(now, key, endpoint, watch, out);
            }
            Input::ResponseStarted { key, endpoint } => self.response_started(key, endpoint),
            Input::Finished { key, endpoint } => self.finished(key, endpoint),
            Input::Endpoint(change) => self.director.change(change),
        }
    }

    /// When the core wants to be advanced: never, as no request waits inside it.
    pub fn next_wakeup(&self) -> Option<Time> {
        None
    }

    /// Does what is due at `now`: nothing, see [`Gateway::next_wakeup`].
    pub fn advance(&mut self, _now: Time, _out: &mut Vec<Output>) {}

    /// Forgets the prefixes and sessions of earlier requests; what is known of endpoints and open requests stays.
    pub fn forget(&mut self) {
        self.director.forget();
    }

    /// All endpoints, by id.
    pub fn endpoints(&self) -> &[Endpoint] {
        self.director.pool.endpoints()
    }

    /// How many dispatched requests are not finished.
    pub fn open_requests(&self) -> usize {
        self.open.len()
    }

    fn request(&mut self, now: Time, mut info: Box<RequestInfo>, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        let key = info.key;
        assert!(!self.open.contains_key(&key), "request {key:?} is already open");
        self.director.prioritise(&mut info);
        self.describe(now, &info);
        match self.director.direct(now, &info, &[], watch) {
            Err(rejection) => out.push(Output::Reject { key, rejection }),
            Ok(endpoint) => {
                self.open.insert(key, Open { info, endpoint, attempt: 0, tried: Vec::new() });
                out.push(Output::Dispatch { key, endpoint, attempt: 0 });
            }
        }
    }

    /// Records what the request asks for.
    fn describe(&self, now: Time, info: &RequestInfo) {
        info.trail.annotate(now, || GatewayFact::Parsed {
            id: info.id.clone(),
            model: bounded_name(&info.model),
            size_bytes: info.size_bytes,
            priority: info.priority,
            streaming: info.streaming,
        });
        if info.objective.is_some() || info.fairness_id.is_some() {
            let (objective, fairness_id) = (&info.objective, &info.fairness_id);
            info.trail.annotate(now, || GatewayFact::Labels {
                objective: objective.clone(),
                fairness_id: fairness_id.clone(),
            });
        }
        let (name, namespace) = &self.pool_name;
        info.trail.annotate(now, || GatewayFact::Pool { name: Arc::clone(name), namespace: Arc::clone(namespace) });
    }

    fn attempt_failed(
        &mut self,
        now: Time,
        key: RequestKey,
        endpoint: EndpointId,
        watch: &mut dyn Stopwatch,
        out: &mut Vec<Output>,
    ) {
        let Some(mut open) = self.open.remove(&key) else { return };
        self.director.leave(open.endpoint);
        open.tried.push(endpoint);
        let next = if open.attempt < self.retries {
            self.director.direct(now, &open.info, &open.tried, watch)
        } else {
            Err(Rejection::Unreachable)
        };
        let Ok(next) = next else {
            return out.push(Output::Reject { key, rejection: Rejection::Unreachable });
        };
        open.attempt += 1;
        open.endpoint = next;
        let attempt = open.attempt;
        let failed = &self.director.pool.get(endpoint).config.name;
        open.info.trail.annotate(now, || GatewayFact::Retry { attempt, failed: Arc::clone(failed) });
        self.open.insert(key, open);
        out.push(Output::Dispatch { key, endpoint: next, attempt });
    }

    fn response_started(&mut self, key: RequestKey, endpoint: EndpointId) {
        if let Some(open) = self.open.get_mut(&key).filter(|o| o.endpoint == endpoint) {
            // Only a further attempt would need them.
            open.info.prefix = Vec::new();
        }
    }

    fn finished(&mut self, key: RequestKey, endpoint: EndpointId) {
        if let Some(open) = self.open.remove(&key) {
            assert_eq!(open.endpoint, endpoint, "{key:?} finished where it was not sent");
            self.director.leave(endpoint);
        }
    }
}

/// Whether a failure says that nobody is there. One broken connection does not: it may be the request that breaks it.
const fn means_unreachable(failure: Failure) -> bool {
    match failure {
        Failure::Connect | Failure::Timeout => true,
        Failure::Reset | Failure::Cancelled | Failure::Abandoned => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shared::ids::RequestId;
    use shared::time::{Dur, Stopped};
    use shared::trace::Trail;

    use crate::core::config::ScorerConfig;

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
            prompt_tokens_estimate: 4,
            prefix: Vec::new(),
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
        let only = vec![ScorerConfig::of("session-affinity-scorer", 1.0)];
        let mut g = gateway(8, |c| c.profile.scorers = only);
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
    }
}
