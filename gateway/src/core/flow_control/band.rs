//! The requests of one priority: a queue for each flow, and whose turn it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use shared::time::Time;

use super::programs::Programs;
use crate::core::config::{BandConfig, FairnessPolicy, OrderingPolicy};
use crate::core::request::{RequestInfo, RequestKey};

/// A request's place in the queue of its flow: by the rank that its ordering gives it, then by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    rank: Time,
    /// The order of arrival in the whole gateway.
    pub(super) serial: u64,
    pub(super) key: RequestKey,
    pub(super) entered: Time,
}

/// One priority.
#[derive(Debug)]
pub(super) struct Band {
    config: BandConfig,
    /// Only those that have requests.
    flows: BTreeMap<Arc<str>, BTreeSet<Place>>,
    requests: u64,
    bytes: u64,
    /// The flow whose turn it was last.
    last: Option<Arc<str>>,
}

impl Band {
    pub(super) const fn new(config: BandConfig) -> Band {
        Band { config, flows: BTreeMap::new(), requests: 0, bytes: 0, last: None }
    }

    pub(super) const fn config(&self) -> &BandConfig {
        &self.config
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// Whether another request of so many bytes may wait here.
    pub(super) const fn has_room(&self, bytes: u64) -> bool {
        self.requests < self.config.max_requests && self.bytes.saturating_add(bytes) <= self.config.max_bytes
    }

    /// Requests of `flow` that wait.
    pub(super) fn waiting(&self, flow: &str) -> u32 {
        self.flows.get(flow).map_or(0, |queue| queue.len() as u32)
    }

    pub(super) fn add(&mut self, flow: &Arc<str>, place: Place, bytes: u64) {
        self.flows.entry(Arc::clone(flow)).or_default().insert(place);
        self.requests += 1;
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, flow: &str, place: Place, bytes: u64) {
        let queue = self.flows.get_mut(flow).expect("a flow with a request has a queue");
        assert!(queue.remove(&place), "a request leaves its queue once");
        if queue.is_empty() {
            self.flows.remove(flow);
        }
        self.requests -= 1;
        self.bytes -= bytes;
        if self.is_empty() {
            // llm-d looks at an empty band every tick and starts over.
            self.last = None;
        }
    }

    /// The request whose turn it is.
    pub(super) fn pick(&mut self, now: Time, programs: Option<&Programs>) -> Option<RequestKey> {
        let flow = match self.config.fairness {
            FairnessPolicy::GlobalStrictFairnessPolicy => {
                self.heads().min_by_key(|(_, head)| *head).map(|(flow, _)| flow)
            }
            FairnessPolicy::RoundRobinFairnessPolicy => self.next_in_turn(),
            FairnessPolicy::ProgramAwareFairness => {
                let heads = self.heads().map(|(flow, head)| (flow, head.entered));
                programs.and_then(|programs| programs.pick(heads, now))
            }
        }?;
        let (flow, head) = (Arc::clone(flow), *self.flows[flow].first()?);
        self.last = Some(flow);
        Some(head.key)
    }

    fn heads(&self) -> impl Iterator<Item = (&Arc<str>, Place)> + Clone {
        self.flows.iter().filter_map(|(flow, queue)| Some((flow, *queue.first()?)))
    }

    /// The flow after the last one in the order of names, which has no end.
    fn next_in_turn(&self) -> Option<&Arc<str>> {
        let after = |last: &Arc<str>| {
            self.flows.range::<Arc<str>, _>((Bound::Excluded(last), Bound::Unbounded)).map(|(f, _)| f).next()
        };
        self.last.as_ref().and_then(after).or_else(|| self.flows.keys().next())
    }
}

/// The place of a request that enters at `entered` and may wait until `expires`.
pub(super) fn place(
    ordering: OrderingPolicy,
    info: &RequestInfo,
    entered: Time,
    expires: Option<Time>,
    serial: u64,
) -> Place {
    let rank = match ordering {
        OrderingPolicy::FcfsOrderingPolicy => Time::ZERO,
        // What never expires comes after what does.
        OrderingPolicy::EdfOrderingPolicy => expires.unwrap_or(Time::MAX),
        OrderingPolicy::SloDeadlineOrderingPolicy => {
            info.deadlines.ttft.map_or(Time::MAX, |ttft| entered.saturating_add(ttft))
        }
    };
    Place { rank, serial, key: info.key, entered }
}
