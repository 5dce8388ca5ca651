//! The gateway's core: open requests, the pool and the director, behind one `handle`.
//!
//! It knows no sockets; a driver tells it what arrived and does what it answers.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::rng::Seed;
use shared::time::{Dur, Stopwatch, Time};

pub use crate::core::pool::{Adapters, Endpoint, EndpointConfig, EndpointId, EndpointMetrics, ScrapeError};
pub use crate::core::request::{Deadlines, Output, Rejection, RequestInfo, RequestKey, SessionKey};

use crate::core::config::GatewayConfig;
use crate::core::director::Director;
use crate::core::flow_control::FlowControl;
use crate::core::hedge::Hedging;
use crate::core::kv_index::Applied;
use crate::core::kv_index::events::Batch;
use crate::core::pool::Health;
use crate::core::producers::Placed;
use crate::core::retry_budget::RetryBudget;
use crate::core::rewrite::Rewrites;
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
    /// No byte of a response was passed on: another endpoint may be tried. While a second attempt is under way the answer is
    /// [`Output::Stay`].
    AttemptFailed {
        /// The request.
        key: RequestKey,
        /// The endpoint that did not answer.
        endpoint: EndpointId,
        /// What went wrong.
        failure: Failure,
    },
    /// No head of a response came within the time that [`Output::Dispatch`] named: a second endpoint may be asked beside the first. The
    /// answer is another dispatch, or [`Output::Stay`].
    Late {
        /// The request.
        key: RequestKey,
    },
    /// The head of a response arrived: from now on the request stays where it is.
    ResponseStarted {
        /// The request.
        key: RequestKey,
        /// The endpoint that answers.
        endpoint: EndpointId,
        /// The status of the response.
        status: u16,
    },
    /// The first chunk of a response's body came. Told only where [`Gateway::reads_first_chunks`] says so.
    FirstChunk {
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
    /// A dispatched request is over because its endpoint failed.
    GivenUp {
        /// The request.
        key: RequestKey,
        /// The endpoint it was sent to last.
        endpoint: EndpointId,
        /// What went wrong.
        failure: Failure,
    },
    /// What the engine says that a dispatched request took. Told only where [`Gateway::reads_usage`] says so.
    Used {
        /// The request.
        key: RequestKey,
        /// Tokens of its prompt.
        prompt_tokens: u32,
        /// Tokens generated.
        output_tokens: u32,
    },
    /// The caller of a request went away, or gave it up, before it was told where the request goes. There is no output.
    Cancelled(RequestKey),
    /// The gateway stops: what waits in it is refused, and nothing may wait any more.
    ShutDown,
    /// The pool changed.
    Endpoint(EndpointChange),
}

/// A change of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointChange {
    /// A new endpoint. Who needs its id calls [`Gateway::join`].
    Added(EndpointConfig),
    /// An endpoint gets no new requests; it leaves the pool when those that it has are over.
    Draining(EndpointId),
    /// A draining endpoint is back, or one was replaced under its name: what its cache held is forgotten.
    Restarted(EndpointId),
    /// Which models an endpoint serves became known.
    Models(EndpointId, Vec<Arc<str>>),
    /// An endpoint's LoRA adapters changed.
    Adapters(EndpointId, Adapters),
}

/// The core of one gateway.
#[derive(Debug)]
pub struct Gateway {
    director: Director,
    open: FxHashMap<RequestKey, Open>,
    /// Where requests wait, with flow control.
    flow: Option<Box<FlowControl>>,
    retries: u32,
    budget: RetryBudget,
    hedging: Hedging,
    /// Second attempts beside a first one.
    hedges: u64,
    pool_name: (Arc<str>, Arc<str>),
    rewrites: Arc<Rewrites>,
}

/// A dispatched request.
#[derive(Debug)]
struct Open {
    info: Box<RequestInfo>,
    placed: Placed,
    /// Where a second attempt is under way, as long as nobody has answered.
    second: Option<Placed>,
    /// The last attempt.
    attempt: u32,
    tried: Vec<EndpointId>,
    /// When it was dispatched first.
    sent: Time,
    /// Whether the head of a response came.
    answered: bool,
}

impl Open {
    const fn new(info: Box<RequestInfo>, placed: Placed, sent: Time) -> Open {
        Open { info, placed, second: None, attempt: 0, tried: Vec::new(), sent, answered: false }
    }
}

impl Gateway {
    /// A gateway in front of `endpoints`, which get the ids 0, 1, ...
    ///
    /// # Panics
    /// If `config` has problems: they are found and shown by [`GatewayConfig::validate`]; or if it names a file: [`crate::epp`] reads it.
    pub fn new(config: GatewayConfig, endpoints: Vec<EndpointConfig>, seed: Seed) -> Gateway {
        let problems = config.validate();
        assert!(problems.is_empty(), "the configuration is validated before it is used: {}", problems[0]);
        assert!(config.epp_config.is_none(), "the file is read before the gateway is made");
        let retries = config.limits.retries;
        let pool_name = (config.pool.name.as_str().into(), config.pool.namespace.as_str().into());
        let budget = RetryBudget::new(config.retry.budget_ratio, config.retry.budget_min_per_second);
        let flow = config.flow_control.clone().filter(|f| f.enabled).map(|f| Box::new(FlowControl::new(f)));
        let director = Director::new(&config, endpoints, seed);
        let rewrites = Arc::new(Rewrites::new(&config.model_rewrites, seed));
        let hedging = Hedging::new(config.retry.hedge.as_ref());
        let open = FxHashMap::default();
        Gateway { director, open, flow, retries, budget, hedging, hedges: 0, pool_name, rewrites }
    }

    /// Takes what happened at `now` and appends what is to be done to `out`.
    ///
    /// Without flow control a request and a failed attempt are answered at once and nothing else is. With it, a request may be
    /// answered later, by another call or by [`Gateway::advance`]; the outputs of a call name the requests they are for.
    ///
    /// `watch` times the stages of a decision; for a request that nobody records it should be [`shared::time::Stopped`].
    pub fn handle(&mut self, now: Time, input: Input, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        match input {
            Input::Request(info) => self.request(now, info, watch, out),
            Input::Metrics { endpoint, metrics } => {
                self.director.scraped(endpoint, metrics);
                self.stir(now);
            }
            Input::AttemptFailed { key, endpoint, failure } => {
                if means_unreachable(failure) {
                    self.director.pool.get_mut(endpoint).health = Health::Ejected;
                }
                self.failed(now, endpoint, failure);
                self.attempt_failed(now, key, endpoint, watch, out);
            }
            Input::Late { key } => self.hedge(now, key, watch, out),
            Input::ResponseStarted { key, endpoint, status } => {
                self.response_started(now, key, endpoint);
                self.answered(now, endpoint, status);
            }
            Input::FirstChunk { key, endpoint } => {
                self.first_chunk(key, endpoint);
                self.stir(now);
            }
            Input::Used { key, prompt_tokens, output_tokens } => self.used(now, key, prompt_tokens, output_tokens),
            Input::Finished { key, endpoint } => self.finished(now, key, endpoint),
            Input::GivenUp { key, endpoint, failure } => {
                self.failed(now, endpoint, failure);
                self.finished(now, key, endpoint);
            }
            Input::Cancelled(key) => self.cancelled(now, key),
            Input::ShutDown => self.shut_down(now, out),
            Input::Endpoint(change) => {
                self.director.change(change);
                self.stir(now);
            }
        }
    }

    /// When the core wants to be advanced; never, as long as no request waits inside it.
    pub fn next_wakeup(&self) -> Option<Time> {
        self.flow.as_ref()?.next_wakeup()
    }

    /// Does what is due at `now`, see [`Gateway::next_wakeup`], and appends what is to be done to `out`.
    pub fn advance(&mut self, now: Time, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        self.waited(now, watch, out);
    }

    /// Whether requests may wait, so that their outputs may come later.
    pub const fn has_flow_control(&self) -> bool {
        self.flow.is_some()
    }

    /// Requests that wait, and bytes of their bodies.
    pub fn queued(&self) -> (usize, u64) {
        self.flow.as_ref().map_or((0, 0), |flow| (flow.len(), flow.bytes()))
    }

    /// Whether [`Input::Used`] is wanted: flows share by what they were served.
    pub fn reads_usage(&self) -> bool {
        self.flow.as_ref().is_some_and(|flow| flow.reads_usage())
    }

    /// Whether [`Input::FirstChunk`] is wanted: some plugin looks at tokens in flight.
    pub fn reads_first_chunks(&self) -> bool {
        self.director.reads_first_chunks()
    }

    /// Whether [`EndpointChange::Adapters`] is of use: some plugin looks at them.
    pub const fn reads_adapters(&self) -> bool {
        self.director.reads_adapters()
    }

    /// Whether some plugin reads the index of KV events, so that prompts have to be named and events to be told.
    pub const fn reads_kv_events(&self) -> bool {
        self.director.reads_kv_events()
    }

    /// Takes a batch of KV events of an endpoint that serves `model`, if that is not known of the endpoint itself; one after a gap
    /// that cannot be filled if `after_gap`.
    pub fn kv_events(&mut self, endpoint: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied {
        self.director.kv_events(endpoint, model, batch, after_gap)
    }

    /// The number of the batch of KV events that is expected next of an endpoint.
    pub fn next_kv_batch(&self, endpoint: EndpointId) -> u64 {
        self.director.kv_index().map_or(0, |index| index.next_batch(endpoint))
    }

    /// Forgets the prefixes and sessions of earlier requests; what is known of endpoints and open requests stays.
    pub fn forget(&mut self) {
        self.director.forget();
    }

    /// Which models requests are sent to. The driver applies it before it tells of a request, as the body has to say so too.
    pub fn rewrites(&self) -> Arc<Rewrites> {
        Arc::clone(&self.rewrites)
    }

    /// All endpoints by id, with those that drain or have left.
    pub fn endpoints(&self) -> &[Endpoint] {
        self.director.pool.endpoints()
    }

    /// Adds an endpoint, which gets requests from its first good scrape on.
    pub fn join(&mut self, config: EndpointConfig) -> EndpointId {
        self.director.join(config)
    }

    /// Attempts that were not made because the retry budget was spent.
    pub const fn retries_refused(&self) -> u64 {
        self.budget.refused()
    }

    /// Second attempts that were made because the first one did not answer in time.
    pub const fn hedges(&self) -> u64 {
        self.hedges
    }

    /// How often an endpoint was left out for a while because it failed several times in a row.
    pub const fn ejections(&self) -> u64 {
        self.director.ejections
    }

    /// How many dispatched requests are not finished.
    pub fn open_requests(&self) -> usize {
        self.open.len()
    }

    fn request(&mut self, now: Time, mut info: Box<RequestInfo>, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        let key = info.key;
        assert!(!self.open.contains_key(&key), "request {key:?} is already open");
        self.budget.request(now);
        self.director.prioritise(&mut info);
        self.describe(now, &info);
        if let Some(flow) = &self.flow {
            assert!(!flow.contains(key), "request {key:?} waits already");
            return self.enter(now, info, watch, out);
        }
        match self.director.direct(now, &info, &[], watch) {
            Err(rejection) => out.push(Output::Reject { key, rejection }),
            Ok(placed) => {
                self.open.insert(key, Open::new(info, placed, now));
                out.push(dispatch(key, placed, 0, self.hedging.after()));
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
        open.tried.push(endpoint);
        if let Some(lost) = open.lose(endpoint) {
            self.director.leave(lost);
            self.stir(now);
            self.open.insert(key, open);
            return out.push(Output::Stay { key });
        }
        self.director.leave(open.placed);
        self.stir(now);
        let next = if open.attempt < self.retries && self.may_retry(now, &open.info) {
            self.director.direct(now, &open.info, &open.tried, watch)
        } else {
            Err(Rejection::Unreachable)
        };
        let Ok(next) = next else {
            self.ended(now, &open.info);
            return out.push(Output::Reject { key, rejection: Rejection::Unreachable });
        };
        open.attempt += 1;
        open.placed = next;
        let attempt = open.attempt;
        let failed = &self.director.pool.get(endpoint).config.name;
        open.info.trail.annotate(now, || GatewayFact::Retry { attempt, failed: Arc::clone(failed) });
        self.open.insert(key, open);
        out.push(dispatch(key, next, attempt, self.hedging.after()));
    }

    /// Whether the budget has one more attempt.
    fn may_retry(&mut self, now: Time, info: &RequestInfo) -> bool {
        let may = self.budget.withdraw(now);
        if !may {
            info.trail.annotate(now, || GatewayFact::RetryRefused);
        }
        may
    }

    /// What the head of a response says of its endpoint.
    fn answered(&mut self, now: Time, endpoint: EndpointId, status: u16) {
        match status {
            500 | 502 | 504 => self.director.failed(now, endpoint),
            // Refusals for load: neither good nor bad.
            429 | 503 => {}
            _ => self.director.succeeded(endpoint),
        }
    }

    /// What a failure says of an endpoint.
    fn failed(&mut self, now: Time, endpoint: EndpointId, failure: Failure) {
        match failure {
            Failure::Connect | Failure::Timeout | Failure::Reset => self.director.failed(now, endpoint),
            Failure::Status(status) => self.answered(now, endpoint, status),
            Failure::Outrun | Failure::Cancelled | Failure::Abandoned => {}
        }
    }

    fn first_chunk(&mut self, key: RequestKey, endpoint: EndpointId) {
        if let Some(open) = self.open.get_mut(&key).filter(|o| o.placed.endpoint == endpoint) {
            self.director.first_chunk(&mut open.placed);
        }
    }

    fn used(&mut self, now: Time, key: RequestKey, prompt_tokens: u32, output_tokens: u32) {
        if let (Some(flow), Some(open)) = (&mut self.flow, self.open.get(&key)) {
            flow.served(&open.info, now, prompt_tokens, output_tokens);
        }
    }

    fn finished(&mut self, now: Time, key: RequestKey, endpoint: EndpointId) {
        if let Some(open) = self.open.remove(&key) {
            let places = std::iter::once(open.placed).chain(open.second);
            assert!(places.clone().any(|p| p.endpoint == endpoint), "{key:?} finished where it was not sent");
            places.for_each(|place| self.director.leave(place));
            self.ended(now, &open.info);
        }
    }
}

const fn dispatch(key: RequestKey, placed: Placed, attempt: u32, hedge_after: Option<Dur>) -> Output {
    Output::Dispatch { key, endpoint: placed.endpoint, prefill: placed.prefill, attempt, hedge_after }
}

/// Whether a failure says that nobody is there. One broken connection does not: it may be the request that breaks it.
const fn means_unreachable(failure: Failure) -> bool {
    match failure {
        Failure::Connect | Failure::Timeout => true,
        Failure::Reset | Failure::Status(_) | Failure::Outrun | Failure::Cancelled | Failure::Abandoned => false,
    }
}

mod hedging;
mod waiting;

#[cfg(test)]
mod tests;
