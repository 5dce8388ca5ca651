//! The endpoints of a pool and what the gateway knows of each: configuration, the last scrape, whether it may be used.
//!
//! It knows nothing of the engines beyond what they reported, however old that is.

use std::collections::BTreeMap;
use std::sync::Arc;

use shared::time::{Dur, Time};

pub use crate::core::role::Role;

/// An endpoint of the pool; ids are dense and never reused.
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

/// An endpoint and what is known of it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its configuration.
    pub config: EndpointConfig,
    /// The last successful scrape; `None` too for a server that has no metrics.
    pub metrics: Option<EndpointMetrics>,
    /// Whether it can be reached.
    pub health: Health,
    /// Whether it is on its way out: no new requests.
    pub draining: bool,
    /// Its LoRA adapters.
    pub adapters: Adapters,
    /// Requests sent to it and not finished, as the gateway counts them.
    pub in_flight: u32,
    /// Tokens of these that it still has to compute, as the gateway estimates them.
    pub in_flight_tokens: u64,
}

impl Endpoint {
    /// Whether new requests may go to it.
    pub fn is_available(&self) -> bool {
        let reachable = match self.health {
            Health::Up => true,
            Health::Failing(n) => n < MAX_FAILED_SCRAPES,
            Health::Unknown | Health::Ejected => false,
        };
        reachable && !self.draining
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

    /// All endpoints, by id.
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

    /// Adds an endpoint.
    pub fn add(&mut self, config: EndpointConfig) -> EndpointId {
        let id = EndpointId(u32::try_from(self.endpoints.len()).expect("fewer than 2^32 endpoints"));
        let (metrics, health) = (None, Health::Unknown);
        let (adapters, draining) = (Adapters::default(), false);
        let (in_flight, in_flight_tokens) = (0, 0);
        self.endpoints.push(Endpoint { config, metrics, health, draining, adapters, in_flight, in_flight_tokens });
        id
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

    /// Whether any endpoint serves `model`, as far as is known.
    pub fn serves(&self, model: &str) -> bool {
        self.endpoints.iter().any(|e| e.serves(model))
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
        pool.get_mut(a).draining = true;
        assert!(!pool.get(a).is_available());
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
