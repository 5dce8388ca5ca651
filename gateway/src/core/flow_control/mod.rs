//! Queues in the gateway, as llm-d's flow control has them: strict priority bands, flows that share a band fairly, an order inside
//! each flow, bounds on all of it, and a time after which nobody waits any more.
//!
//! One request leaves at a time: when a request enters, and on a tick of one millisecond, as long as the pool is less full than the
//! ceiling (llm-d-router `pkg/epp/flowcontrol/controller/internal/processor.go`). A full queue refuses; nobody is pushed out for
//! another. Where a request goes is not known here.

mod band;
mod programs;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::time::{Dur, Time};

use crate::core::config::{BandConfig, FairnessPolicy, FlowControlConfig, OrderingPolicy};
use crate::core::request::{RequestInfo, RequestKey};
use crate::core::saturation::Pressure;
use crate::spans::Hold;
use band::{Band, Place};
use programs::Programs;

/// llm-d's dispatch ticker.
pub(crate) const TICK: Dur = Dur::from_millis(1);
/// The flow of requests that name none.
const DEFAULT_FLOW: &str = "default-flow";

/// All queues.
#[derive(Debug)]
pub(crate) struct FlowControl {
    config: FlowControlConfig,
    /// Highest priority first; only those that have requests.
    bands: BTreeMap<Reverse<i32>, Band>,
    waiting: FxHashMap<RequestKey, Waiting>,
    /// Everything that waits, by arrival.
    by_age: BTreeMap<u64, RequestKey>,
    /// What expires while the pool has endpoints.
    expiring: BTreeSet<(Time, u64)>,
    bytes: u64,
    serials: u64,
    /// Least attained service, if a band asks for it.
    programs: Option<Programs>,
    default_flow: Arc<str>,
    /// When the next tick is worth anything.
    tick: Option<Time>,
    /// Whether the pool had endpoints when it was looked at last.
    ready: bool,
    /// When the pool was too full last, and how full.
    held: Option<(Time, Hold)>,
    closed: bool,
}

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    info: Box<RequestInfo>,
    flow: Arc<str>,
    place: Place,
    expires: Option<Time>,
}

/// What a request found when it entered, for its trace.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) flow: Arc<str>,
    /// Requests of its flow that waited already; `None` if there was no room for it.
    pub(crate) position: Option<u32>,
    /// All requests that waited already.
    pub(crate) size: u32,
    /// How long it may wait; `None` is for ever.
    pub(crate) ttl: Option<Dur>,
}

/// A request that was taken out.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) info: Box<RequestInfo>,
    pub(crate) waited: Dur,
    pub(crate) fairness: FairnessPolicy,
    pub(crate) ordering: OrderingPolicy,
    /// What held it, if anything did.
    pub(crate) hold: Option<Hold>,
}

impl FlowControl {
    pub(crate) fn new(config: FlowControlConfig) -> FlowControl {
        FlowControl {
            programs: shares_by_service(&config).then(Programs::default),
            config,
            bands: BTreeMap::new(),
            waiting: FxHashMap::default(),
            by_age: BTreeMap::new(),
            expiring: BTreeSet::new(),
            bytes: 0,
            serials: 0,
            default_flow: DEFAULT_FLOW.into(),
            tick: None,
            ready: true,
            held: None,
            closed: false,
        }
    }

    /// Requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of their bodies.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn contains(&self, key: RequestKey) -> bool {
        self.waiting.contains_key(&key)
    }

    /// Whether nobody may enter any more.
    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether somebody has to say what requests were served.
    pub(crate) const fn reads_usage(&self) -> bool {
        self.programs.is_some()
    }

    /// Puts a request into its queue at `now`, or gives it back if there is no room.
    pub(crate) fn enter(&mut self, now: Time, info: Box<RequestInfo>) -> (Entry, Option<Box<RequestInfo>>) {
        let flow = info.fairness_id.as_ref().unwrap_or(&self.default_flow);
        let flow = Arc::clone(flow);
        let ttl = self.ttl(&info);
        let mut entry = Entry { flow: Arc::clone(&flow), position: None, size: self.waiting.len() as u32, ttl };
        if !self.has_room(&info) {
            return (entry, Some(info));
        }
        let serial = self.serials;
        self.serials += 1;
        let expires = ttl.map(|ttl| now.saturating_add(ttl));
        let config = &self.config;
        let band =
            self.bands.entry(Reverse(info.priority)).or_insert_with(|| Band::new(band_config(config, info.priority)));
        entry.position = Some(band.waiting(&flow));
        let place = band::place(band.config().ordering, &info, now, expires, serial);
        band.add(&flow, place, u64::from(info.size_bytes));
        if let Some(programs) = &mut self.programs {
            programs.enter(&flow, now);
        }
        self.bytes += u64::from(info.size_bytes);
        self.by_age.insert(serial, info.key);
        self.expiring.extend(expires.map(|at| (at, serial)));
        self.waiting.insert(info.key, Waiting { info, flow, place, expires });
        (entry, None)
    }

    /// The caller may want less than the gateway allows, not more.
    fn ttl(&self, info: &RequestInfo) -> Option<Dur> {
        let own = info.deadlines.ttl.filter(|d| *d > Dur::ZERO);
        let most = Some(self.config.default_request_ttl.get()).filter(|d| *d > Dur::ZERO);
        own.into_iter().chain(most).min()
    }

    fn has_room(&self, info: &RequestInfo) -> bool {
        let size = u64::from(info.size_bytes);
        let config = &self.config;
        let in_all = config.max_requests.is_none_or(|most| (self.waiting.len() as u64) < most)
            && config.max_bytes.is_none_or(|most| self.bytes.saturating_add(size) <= most);
        in_all
            && match self.bands.get(&Reverse(info.priority)) {
                Some(band) => band.has_room(size),
                None => Band::new(band_config(config, info.priority)).has_room(size),
            }
    }

    /// Takes the next request out, unless the pool is too full for it.
    pub(crate) fn next(&mut self, now: Time, pressure: &Pressure) -> Option<Taken> {
        self.ready = pressure.ready;
        let hold = Hold { saturation: pressure.saturation, ceiling: self.config.usage_limit };
        if hold.saturation >= hold.ceiling {
            self.held = Some((now, hold));
            // Until something happens, which plans a tick again.
            self.tick = pressure.changes.map(tick_from);
            return None;
        }
        let programs = self.programs.as_ref();
        let key = self.bands.values_mut().find_map(|band| band.pick(now, programs))?;
        Some(self.take(now, key, true))
    }

    /// Takes a request out whose caller waits no more.
    pub(crate) fn cancel(&mut self, now: Time, key: RequestKey) -> Option<Taken> {
        self.contains(key).then(|| self.take(now, key, false))
    }

    /// Takes a request out whose time is over; whether the pool had endpoints.
    pub(crate) fn expired(&mut self, now: Time) -> Option<(Taken, bool)> {
        let (_, key) = self.first_to_expire().filter(|(at, _)| *at <= now)?;
        Some((self.take(now, key, false), self.ready))
    }

    /// Lets nobody in any more, and takes the oldest request out.
    pub(crate) fn close(&mut self, now: Time) -> Option<Taken> {
        self.closed = true;
        let key = *self.by_age.first_key_value()?.1;
        Some(self.take(now, key, false))
    }

    /// A dispatched request was served so many tokens.
    pub(crate) fn served(&mut self, info: &RequestInfo, now: Time, prompt: u32, output: u32) {
        if let Some(programs) = &mut self.programs {
            programs.served(info.fairness_id.as_ref().unwrap_or(&self.default_flow), now, prompt, output);
        }
    }

    /// A dispatched request is over.
    pub(crate) fn ended(&mut self, info: &RequestInfo) {
        if let Some(programs) = &mut self.programs {
            programs.end(info.fairness_id.as_ref().unwrap_or(&self.default_flow));
        }
    }

    fn take(&mut self, now: Time, key: RequestKey, dispatched: bool) -> Taken {
        let Waiting { info, flow, place, expires } = self.waiting.remove(&key).expect("the request waits");
        let band = self.bands.get_mut(&Reverse(info.priority)).expect("a request that waits has a band");
        let BandConfig { fairness, ordering, .. } = *band.config();
        band.remove(&flow, place, u64::from(info.size_bytes));
        if let Some(programs) = &mut self.programs {
            programs.leave(&flow, dispatched);
        }
        self.bytes -= u64::from(info.size_bytes);
        self.by_age.remove(&place.serial);
        if let Some(at) = expires {
            self.expiring.remove(&(at, place.serial));
        }
        if self.waiting.is_empty() {
            // Bands keep whose turn it is as long as anything waits.
            self.bands.clear();
            self.tick = None;
        }
        let hold = self.held.filter(|(at, _)| *at >= place.entered).map(|(_, hold)| hold);
        Taken { info, waited: now.since(place.entered), fairness, ordering, hold }
    }

    /// Something happened at `now` that may let a request go: it is looked at on the next tick.
    pub(crate) fn stir(&mut self, now: Time) {
        if !self.waiting.is_empty() {
            let next = tick_after(now);
            self.tick = Some(self.tick.map_or(next, |tick| tick.min(next)));
        }
    }

    /// How many ticks are over at `now`, of which none counts twice.
    pub(crate) fn ticks(&mut self, now: Time) -> u64 {
        match self.tick.take_if(|tick| *tick <= now) {
            Some(tick) => 1 + now.since(tick).as_nanos() / TICK.as_nanos(),
            None => 0,
        }
    }

    /// When something is to be done: a tick, or a request expires.
    pub(crate) fn next_wakeup(&self) -> Option<Time> {
        let expiry = self.first_to_expire().map(|(at, _)| at);
        self.tick.into_iter().chain(expiry).min()
    }

    fn first_to_expire(&self) -> Option<(Time, RequestKey)> {
        if self.ready {
            return self.expiring.first().map(|(at, serial)| (*at, self.by_age[serial]));
        }
        let ttl = Some(self.config.no_endpoint_request_ttl.get()).filter(|d| *d > Dur::ZERO)?;
        let oldest = *self.by_age.first_key_value()?.1;
        Some((self.waiting[&oldest].place.entered.saturating_add(ttl), oldest))
    }
}

fn shares_by_service(config: &FlowControlConfig) -> bool {
    let mut bands = config.priority_bands.iter().chain([&config.default_band]).chain(&config.default_negative_band);
    bands.any(|b| b.fairness == FairnessPolicy::ProgramAwareFairness)
}

/// What the band of this priority is like.
fn band_config(config: &FlowControlConfig, priority: i32) -> BandConfig {
    let own = config.priority_bands.iter().find(|b| b.priority == priority);
    let negative = config.default_negative_band.as_ref().filter(|_| priority < 0);
    let like = own.or(negative).unwrap_or(&config.default_band);
    BandConfig { priority, ..like.clone() }
}

/// The first tick after `now`.
fn tick_after(now: Time) -> Time {
    tick_from(now + Dur::from_nanos(1))
}

/// The first tick not before `at`.
fn tick_from(at: Time) -> Time {
    Time::from_nanos(at.as_nanos().div_ceil(TICK.as_nanos()).saturating_mul(TICK.as_nanos()))
}

#[cfg(test)]
mod tests;
