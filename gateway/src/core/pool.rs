//! The endpoints of a pool and what the gateway knows of each: configuration, the last scrape, whether it may be used.
//!
//! Endpoints join, drain and leave while requests run. One that has left keeps its place until another one takes it, so an id means
//! the same endpoint for as long as a request is there. It knows nothing of the engines beyond what they reported, however old that
//! is.

use std::collections::BTreeMap;
use std::sync::Arc;

use shared::time::{Dur, Time};

use crate::core::outlier::Outlier;
pub use crate::core::role::Role;

/// An endpoint of the pool; ids are dense. One is given again only after its endpoint has left the pool and has no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

impl EndpointId {
    /// Its place in [`Pool::endpoints`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// An endpoint as it is configured or discovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Name, unique in the pool.
    pub name: Arc<str>,
    /// Host name or address.
    pub address: Arc<str>,
    /// Port.
    pub port: u16,
    /// Models it serves; empty means not known yet, and then every model is tried.
    pub models: Vec<Arc<str>>,
    labels: BTreeMap<String, String>,
    role: Role,
}

impl EndpointConfig {
    /// An unlabelled endpoint that serves any model.
    pub fn new(name: &str, address: &str, port: u16) -> EndpointConfig {
        let (role, labels, models) = (Role::Unlabelled, BTreeMap::new(), Vec::new());
        EndpointConfig { name: name.into(), address: address.into(), port, models, labels, role }
    }

    /// The same endpoint with these labels, which also give its role.
    #[must_use]
    pub fn with_labels(mut self, labels: BTreeMap<String, String>) -> EndpointConfig {
        self.role = Role::of(&labels);
        self.labels = labels;
        self
    }

    /// Its labels.
    pub const fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// What it is for, by its label.
    pub const fn role(&self) -> Role {
        self.role
    }
}

/// One scrape of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EndpointMetrics {
    /// Requests in the engine's queue (`vllm:num_requests_waiting`).
    pub waiting: u32,
    /// Requests in its batch (`vllm:num_requests_running`).
    pub running: u32,
    /// Used part of its KV cache, 0 to 1 (`vllm:kv_cache_usage_perc`).
    pub kv_usage: f64,
    /// Tokens in a KV block (`vllm:cache_config_info`), 0 if not reported.
    pub block_size: u32,
    /// KV blocks (`vllm:cache_config_info`), 0 if not reported.
    pub num_gpu_blocks: u32,
    /// When the engine answered.
    pub at: Time,
}

/// The LoRA adapters of an endpoint (`vllm:lora_requests_info`); all empty if it reports none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adapters {
    /// Adapters that may be in one batch.
    pub max: u32,
    /// Adapters of running requests: those on the GPU.
    pub running: Vec<Arc<str>>,
    /// Adapters of waiting requests.
    pub waiting: Vec<Arc<str>>,
}

/// How an endpoint stands to the adapter that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AdapterState {
    /// It is on the GPU.
    Running,
    /// There is room for one more.
    Room,
    /// No room, but requests for it wait already.
    Waiting,
    /// No room.
    #[default]
    Full,
}

impl Adapters {
    /// How the endpoint stands to `adapter`, in llm-d's order.
    pub fn state(&self, adapter: &str) -> AdapterState {
        let has = |list: &[Arc<str>]| list.iter().any(|a| &**a == adapter);
        if has(&self.running) {
            AdapterState::Running
        } else if self.running.len() + self.waiting.len() < self.max as usize {
            AdapterState::Room
        } else if has(&self.waiting) {
            AdapterState::Waiting
        } else {
            AdapterState::Full
        }
    }
}

/// Why a scrape failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrapeError {
    /// No connection, or it broke.
    Unreachable,
    /// No answer in time.
    TimedOut,
    /// The server answers and has none of the metrics that are read: any OpenAI-compatible server may be an endpoint.
    NoMetrics,
    /// A status that is no answer to the question.
    Status(u16),
    /// An answer that cannot be read.
    Malformed,
}

/// Whether new requests may go to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not scraped yet.
    Unknown,
    /// The last scrape was answered, with metrics or without.
    Up,
    /// So many scrapes failed in a row; what is known is from before.
    Failing(u32),
    /// A request could not be sent to it; the next successful scrape clears this.
    Ejected,
}

/// Failed scrapes in a row after which an endpoint gets no requests.
pub const MAX_FAILED_SCRAPES: u32 = 3;

/// Whether an endpoint belongs to the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It may get requests.
    Member,
    /// On its way out: it keeps the requests that it has and gets no new ones.
    Draining,
    /// Gone: it has no requests, and its place is free.
    Absent,
}

/// An endpoint and what is known of it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its configuration.
    pub config: EndpointConfig,
    /// The last successful scrape; `None` too for a server that has no metrics.
    pub metrics: Option<EndpointMetrics>,
    /// Whether it can be reached.
    pub health: Health,
    /// Whether it belongs to the pool.
    pub presence: Presence,
    /// Its failures in a row, and whether they keep it out for a while.
    pub outlier: Outlier,
    /// Its LoRA adapters.
    pub adapters: Adapters,
    /// Requests sent to it and not finished, as the gateway counts them.
    pub in_flight: u32,
    /// Tokens of these that it still has to compute, as the gateway estimates them.
    pub in_flight_tokens: u64,
}

impl Endpoint {
    /// An endpoint of which nothing is known yet.
    fn new(config: EndpointConfig) -> Endpoint {
        Endpoint {
            config,
            metrics: None,
            health: Health::Unknown,
            presence: Presence::Member,
            outlier: Outlier::default(),
            adapters: Adapters::default(),
            in_flight: 0,
            in_flight_tokens: 0,
        }
    }

    /// Whether it belongs to the pool and is not on its way out.
    pub const fn is_member(&self) -> bool {
        matches!(self.presence, Presence::Member)
    }

    /// Whether new requests may go to it, as far as scrapes and connections tell.
    pub fn is_available(&self) -> bool {
        let reachable = match self.health {
            Health::Up => true,
            Health::Failing(n) => n < MAX_FAILED_SCRAPES,
            Health::Unknown | Health::Ejected => false,
        };
        reachable && self.is_member()
    }

    /// Whether it serves `model`, as far as is known.
    pub fn serves(&self, model: &str) -> bool {
        self.config.models.is_empty() || self.config.models.iter().any(|m| &**m == model)
    }

    /// How old its metrics are; `None` if there are none.
    pub fn metrics_age(&self, now: Time) -> Option<Dur> {
        self.metrics.map(|m| now.since(m.at))
    }
}

/// The endpoints of a pool.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    endpoints: Vec<Endpoint>,
}

impl Pool {
    /// A pool of endpoints of which nothing is known yet.
    pub fn new(configs: Vec<EndpointConfig>) -> Pool {
        let mut pool = Pool::default();
        for config in configs {
            pool.add(config);
        }
        pool
    }

    /// All endpoints by id, with those that drain or have left.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint called `id`.
    pub fn get(&self, id: EndpointId) -> &Endpoint {
        &self.endpoints[id.index()]
    }

    /// The endpoint called `id`.
    pub fn get_mut(&mut self, id: EndpointId) -> &mut Endpoint {
        &mut self.endpoints[id.index()]
    }

    /// Those that may get requests.
    pub fn members(&self) -> impl Iterator<Item = (EndpointId, &Endpoint)> {
        let all = self.endpoints.iter().enumerate().map(|(i, e)| (EndpointId(i as u32), e));
        all.filter(|(_, e)| e.is_member())
    }

    /// Adds an endpoint, in the place of one that has left if there is one.
    pub fn add(&mut self, config: EndpointConfig) -> EndpointId {
        let endpoint = Endpoint::new(config);
        let free = self.endpoints.iter().position(|e| e.presence == Presence::Absent);
        let place = free.unwrap_or(self.endpoints.len());
        match self.endpoints.get_mut(place) {
            Some(left) => *left = endpoint,
            None => self.endpoints.push(endpoint),
        }
        EndpointId(u32::try_from(place).expect("fewer than 2^32 endpoints"))
    }

    /// The endpoint gets no new requests; whether it has left at once.
    pub fn drain(&mut self, id: EndpointId) -> bool {
        let endpoint = self.get_mut(id);
        if endpoint.is_member() {
            endpoint.presence = Presence::Draining;
        }
        self.settle(id)
    }

    /// A request left the endpoint; whether the endpoint leaves with it, as the last one that it waited for.
    pub fn settle(&mut self, id: EndpointId) -> bool {
        let endpoint = self.get_mut(id);
        let leaves = endpoint.presence == Presence::Draining && endpoint.in_flight == 0;
        if leaves {
            endpoint.presence = Presence::Absent;
        }
        leaves
    }

    /// An endpoint is back, or another one is there under its name: nothing is known of it but its configuration.
    pub fn renew(&mut self, id: EndpointId) {
        let endpoint = self.get_mut(id);
        let (in_flight, in_flight_tokens) = (endpoint.in_flight, endpoint.in_flight_tokens);
        *endpoint = Endpoint { in_flight, in_flight_tokens, ..Endpoint::new(endpoint.config.clone()) };
    }

    /// Takes the outcome of a scrape.
    pub fn scraped(&mut self, id: EndpointId, outcome: Result<EndpointMetrics, ScrapeError>) {
        let endpoint = self.get_mut(id);
        match outcome {
            Ok(metrics) => {
                endpoint.metrics = Some(metrics);
                endpoint.health = Health::Up;
            }
            Err(ScrapeError::NoMetrics) => {
                endpoint.metrics = None;
                endpoint.health = Health::Up;
            }
            Err(ScrapeError::Unreachable | ScrapeError::TimedOut | ScrapeError::Status(_) | ScrapeError::Malformed) => {
                endpoint.health = match endpoint.health {
                    Health::Failing(n) => Health::Failing(n.saturating_add(1)),
                    Health::Up => Health::Failing(1),
                    Health::Unknown => Health::Unknown,
                    Health::Ejected => Health::Ejected,
                };
            }
        }
    }

    /// Whether any endpoint serves `model`, as far as is known. Of an empty pool nothing is known.
    pub fn serves(&self, model: &str) -> bool {
        let mut members = self.members().peekable();
        members.peek().is_none() || members.any(|(_, e)| e.serves(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(at: u64) -> EndpointMetrics {
        let at = Time::from_nanos(at);
        EndpointMetrics { waiting: 1, running: 2, kv_usage: 0.5, block_size: 16, num_gpu_blocks: 100, at }
    }

    #[test]
    fn an_endpoint_is_available_from_its_first_scrape_until_three_fail() {
        let mut pool = Pool::new(vec![EndpointConfig::new("a", "127.0.0.1", 8000)]);
        let a = EndpointId(0);
        let mut step = |outcome| {
            pool.scraped(a, outcome);
            pool.get(a).is_available()
        };
        assert!(!step(Err(ScrapeError::Unreachable)));
        assert!(step(Ok(metrics(1))));
        assert!(step(Err(ScrapeError::TimedOut)));
        assert!(step(Err(ScrapeError::Status(500))));
        assert!(!step(Err(ScrapeError::Malformed)));
        assert!(step(Ok(metrics(2))));
        pool.get_mut(a).health = Health::Ejected;
        assert!(!pool.get(a).is_available());
        pool.scraped(a, Ok(metrics(3)));
        assert!(pool.drain(a));
        assert!(!pool.get(a).is_available());
    }

    #[test]
    fn an_endpoint_leaves_with_its_last_request_and_its_place_is_given_again() {
        let mut pool = Pool::new(["a", "b"].map(|name| EndpointConfig::new(name, "h", 1)).to_vec());
        let (a, b) = (EndpointId(0), EndpointId(1));
        pool.get_mut(a).in_flight = 1;
        assert!(!pool.drain(a) && !pool.settle(b));
        assert_eq!(pool.members().map(|(id, _)| id).collect::<Vec<_>>(), [b]);
        assert_eq!(pool.add(EndpointConfig::new("c", "h", 1)), EndpointId(2), "a still has a request");
        pool.get_mut(a).in_flight = 0;
        assert!(pool.settle(a));
        assert_eq!(pool.get(a).presence, Presence::Absent);
        assert_eq!(pool.add(EndpointConfig::new("d", "h", 1)), a);
        assert_eq!((&*pool.get(a).config.name, pool.get(a).health), ("d", Health::Unknown));
    }

    #[test]
    fn an_empty_pool_might_serve_anything() {
        let mut pool = Pool::new(vec![EndpointConfig { models: vec!["m".into()], ..EndpointConfig::new("a", "h", 1) }]);
        assert!(!pool.serves("x"));
        pool.drain(EndpointId(0));
        assert!(pool.serves("x"));
    }

    #[test]
    fn a_server_without_metrics_is_available_as_long_as_it_answers() {
        let mut pool = Pool::new(vec![EndpointConfig::new("a", "127.0.0.1", 8000)]);
        let a = EndpointId(0);
        let mut step = |outcome| {
            pool.scraped(a, outcome);
            (pool.get(a).is_available(), pool.get(a).metrics.is_some())
        };
        assert_eq!(step(Err(ScrapeError::NoMetrics)), (true, false));
        assert_eq!(step(Err(ScrapeError::TimedOut)), (true, false));
        assert_eq!(step(Err(ScrapeError::TimedOut)), (true, false));
        assert_eq!(step(Err(ScrapeError::Unreachable)), (false, false));
        assert_eq!(step(Ok(metrics(1))), (true, true));
        // Another server took its place: what the one before reported says nothing of it.
        assert_eq!(step(Err(ScrapeError::NoMetrics)), (true, false));
    }

    #[test]
    fn a_model_is_served_where_it_is_listed_or_nothing_is_known() {
        let mut listed = EndpointConfig::new("a", "127.0.0.1", 8000);
        listed.models = vec!["m".into()];
        let mut pool = Pool::new(vec![listed]);
        assert!(pool.serves("m") && !pool.serves("other"));
        pool.add(EndpointConfig::new("b", "127.0.0.1", 8001));
        assert!(pool.serves("other"));
    }
}
