//! The plugins by name: one line each. Adding a plugin touches its own file and its line here.

use crate::core::config::Parameters;
use crate::core::scheduler::parameters::Reader;
use crate::core::scheduler::precise::{self, Precise};
use crate::core::scheduler::{Decider, Filter, Picker, Scorer, deciders, filters, pickers, scorers};

pub use crate::core::scheduler::parameters::PluginError;

/// What plugins read that is looked up or kept only if some plugin wants it. Metrics and requests in flight always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reads(u8);

impl Reads {
    /// Nothing but metrics.
    pub const METRICS: Reads = Reads(0);
    /// The prefix index.
    pub const PREFIX: Reads = Reads(1);
    /// The endpoint of the session.
    pub const SESSION: Reads = Reads(1 << 1);
    /// Which endpoints were sent requests that nobody had cached.
    pub const COLD: Reads = Reads(1 << 2);
    /// LoRA adapters.
    pub const ADAPTERS: Reads = Reads(1 << 3);
    /// Tokens in flight.
    pub const TOKENS: Reads = Reads(1 << 4);
    /// The addresses in `test-epp-endpoint-selection`.
    pub const SELECTION: Reads = Reads(1 << 5);
    /// The index of KV events.
    pub const KV: Reads = Reads(1 << 6);

    /// What either reads.
    #[must_use]
    pub const fn and(self, other: Reads) -> Reads {
        Reads(self.0 | other.0)
    }

    /// The index of KV events where this says the approximate one.
    const fn precise(self) -> Reads {
        if self.contains(Reads::PREFIX) { Reads(self.0 & !Reads::PREFIX.0 | Reads::KV.0) } else { self }
    }

    /// Whether all of `other` is read.
    pub const fn contains(self, other: Reads) -> bool {
        self.0 & other.0 == other.0
    }
}

type Build<T> = fn(&mut Reader<'_>) -> Result<Box<T>, PluginError>;
type Line<T> = (&'static str, Reads, Build<T>);

const TOKENS_AND_PREFIX: Reads = Reads::TOKENS.and(Reads::PREFIX);

const FILTERS: &[Line<dyn Filter>] = &[
    ("healthy-filter", Reads::METRICS, |_| Ok(Box::new(filters::Healthy))),
    ("decode-filter", Reads::METRICS, |_| Ok(Box::new(filters::ByRole(filters::Stage::Decode)))),
    ("prefill-filter", Reads::METRICS, |_| Ok(Box::new(filters::ByRole(filters::Stage::Prefill)))),
    ("encode-filter", Reads::METRICS, |_| Ok(Box::new(filters::ByRole(filters::Stage::Encode)))),
    ("label-selector-filter", Reads::METRICS, |p| Ok(Box::new(filters::LabelSelector::read(p)?))),
    ("by-label-selector", Reads::METRICS, |p| Ok(Box::new(filters::LabelSelector::read(p)?))),
    ("by-label", Reads::METRICS, |p| Ok(Box::new(filters::ByLabel::read(p)?))),
    ("prefix-cache-affinity-filter", TOKENS_AND_PREFIX, |p| Ok(Box::new(filters::PrefixCacheAffinity::read(p)?))),
    ("slo-headroom-tier-filter", Reads::METRICS, |p| Ok(Box::new(filters::SloHeadroomTier::read(p)?))),
    ("utilization-filter", Reads::METRICS, |p| Ok(Box::new(filters::Utilization::read(p)?))),
    ("context-length-aware", Reads::METRICS, |p| Ok(Box::new(scorers::ContextLengthAware::read(p)?))),
    ("header-based-testing-filter", Reads::SELECTION, |_| Ok(Box::new(filters::HeaderBasedTesting))),
    ("lora-residency-filter", Reads::ADAPTERS, |p| Ok(Box::new(filters::LoraResidency::read(p)?))),
];

const SCORERS: &[Line<dyn Scorer>] = &[
    ("queue-scorer", Reads::METRICS, |_| Ok(Box::new(scorers::Queue))),
    ("running-requests-size-scorer", Reads::METRICS, |_| Ok(Box::new(scorers::RunningRequests))),
    ("kv-cache-utilization-scorer", Reads::METRICS, |_| Ok(Box::new(scorers::KvCacheUtilization))),
    ("load-aware-scorer", Reads::METRICS, |p| Ok(Box::new(scorers::LoadAware::read(p)?))),
    ("lora-affinity-scorer", Reads::ADAPTERS, |_| Ok(Box::new(scorers::LoraAffinity))),
    ("active-request-scorer", Reads::METRICS, |p| Ok(Box::new(scorers::ActiveRequest::read(p)?))),
    ("token-load-scorer", TOKENS_AND_PREFIX, |p| Ok(Box::new(scorers::TokenLoad::read(p)?))),
    ("prefix-cache-scorer", Reads::PREFIX, |p| Ok(Box::new(scorers::PrefixCache::read(p)?))),
    (PRECISE_PREFIX, Reads::KV, |_| Ok(Box::new(scorers::PrecisePrefixCache))),
    (NO_HIT_LRU, Reads::PREFIX.and(Reads::COLD), |p| Ok(Box::new(scorers::NoHitLru::read(p)?))),
    (SESSION_AFFINITY, Reads::SESSION, |p| Ok(Box::new(scorers::SessionAffinity::read(p)?))),
    ("context-length-aware", Reads::METRICS, |p| Ok(Box::new(scorers::ContextLengthAware::read(p)?))),
    ("latency-scorer", Reads::PREFIX, |p| Ok(Box::new(scorers::Latency::read(p)?))),
];

const PICKERS: &[Line<dyn Picker>] = &[
    ("max-score-picker", Reads::METRICS, |p| endpoints(p).map(|()| Box::new(pickers::MaxScore) as _)),
    ("random-picker", Reads::METRICS, |p| endpoints(p).map(|()| Box::new(pickers::Random) as _)),
    ("weighted-random-picker", Reads::METRICS, |p| endpoints(p).map(|()| Box::new(pickers::WeightedRandom) as _)),
    ("round-robin-picker", Reads::METRICS, |p| endpoints(p).map(|()| Box::new(pickers::RoundRobin::default()) as _)),
];

const DECIDERS: &[Line<dyn Decider>] = &[
    ("prefix-based-pd-decider", Reads::PREFIX, |p| Ok(Box::new(deciders::PrefixBased::read(p)?))),
    ("always-disagg-pd-decider", Reads::METRICS, |_| Ok(Box::new(deciders::Always))),
];

/// The types of all scorers.
#[cfg(test)]
pub(crate) fn scorer_types() -> impl Iterator<Item = &'static str> {
    SCORERS.iter().map(|(kind, _, _)| *kind)
}

/// The scorer that reads the index of KV events by itself.
pub const PRECISE_PREFIX: &str = "precise-prefix-cache-scorer";
/// The scorer whose parameters are its producer's: the least recent cold requests.
pub const NO_HIT_LRU: &str = "no-hit-lru-scorer";
/// The scorer whose parameters are its producer's: the table of sessions.
pub const SESSION_AFFINITY: &str = "session-affinity-scorer";

/// Only the first of several endpoints is used.
fn endpoints(p: &mut Reader<'_>) -> Result<(), PluginError> {
    p.count_from("maxNumOfEndpoints", 1, 1).map(|_| ())
}

/// A plugin made from its registry line, which gives its type a static name.
#[derive(Debug)]
pub struct Made<T> {
    /// The type.
    pub kind: &'static str,
    /// What it reads.
    pub reads: Reads,
    /// The plugin.
    pub plugin: T,
}

/// Makes a filter.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn filter(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Filter>>, PluginError> {
    make(FILTERS, kind, parameters, |plugin| Box::new(Precise(plugin)))
}

/// Makes a scorer.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn scorer(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Scorer>>, PluginError> {
    make(SCORERS, kind, parameters, |plugin| Box::new(Precise(plugin)))
}

/// Makes a picker.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn picker(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Picker>>, PluginError> {
    make(PICKERS, kind, parameters, |plugin| plugin)
}

/// Makes a decider.
///
/// # Errors
/// If the type is unknown or a parameter is not allowed.
pub fn decider(kind: &str, parameters: &Parameters) -> Result<Made<Box<dyn Decider>>, PluginError> {
    make(DECIDERS, kind, parameters, |plugin| Box::new(Precise(plugin)))
}

/// The types of filters.
pub fn filters() -> impl Iterator<Item = &'static str> {
    FILTERS.iter().map(|l| l.0)
}

/// The types of scorers.
pub fn scorers() -> impl Iterator<Item = &'static str> {
    SCORERS.iter().map(|l| l.0)
}

/// The types of pickers.
pub fn pickers() -> impl Iterator<Item = &'static str> {
    PICKERS.iter().map(|l| l.0)
}

/// The types of deciders.
pub fn deciders() -> impl Iterator<Item = &'static str> {
    DECIDERS.iter().map(|l| l.0)
}

/// Makes a plugin; `wrap` lets it see precise matches, if it asks for them.
fn make<T: ?Sized>(
    lines: &[Line<T>],
    kind: &str,
    parameters: &Parameters,
    wrap: fn(Box<T>) -> Box<T>,
) -> Result<Made<Box<T>>, PluginError> {
    let line = lines.iter().find(|l| l.0 == kind);
    let (kind, reads, build) =
        line.ok_or_else(|| PluginError::Unknown { known: lines.iter().map(|l| l.0).collect() })?;
    let plugin = Reader::all(parameters, *build)?;
    if precise::asked(parameters) {
        return Ok(Made { kind, reads: reads.precise(), plugin: wrap(plugin) });
    }
    Ok(Made { kind, reads: *reads, plugin })
}

#[cfg(test)]
mod tests;
