//! Whether a trace is recorded: decided once, at the edge, from the trace id or the caller's flag.
//!
//! Ratios follow OpenTelemetry's consistent probability sampling (specification, `trace/tracestate-probability-sampling`): a
//! trace is kept if its randomness R (the low 56 bits of the trace id, or `rv` of the `ot` trace state) is at least the
//! threshold T = (1 - p) * 2^56, so that two services with ratios p < q never keep a trace at p that is lost at q. The
//! threshold travels as `ot=th:<T in hex without trailing zeros>`, from which backends scale counts. Draws no randomness.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::ids::TraceId;
use crate::trace::context::{MAX_STATE_BYTES, MAX_STATE_MEMBERS, TraceContext};

/// The number of values of the randomness: 2^56.
const RANGE: u64 = 1 << 56;

/// A sampling probability with its threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Ratio {
    probability: f64,
    /// Traces whose randomness is at least this are kept.
    threshold: u64,
    /// `th:<hex>` if the ratio is neither 0 nor 1.
    th: Option<Arc<str>>,
}

impl Ratio {
    /// Keeps every trace.
    pub const ALL: Ratio = Ratio { probability: 1.0, threshold: 0, th: None };
    /// Keeps none.
    pub const NONE: Ratio = Ratio { probability: 0.0, threshold: RANGE, th: None };

    /// The ratio `p`; `None` unless 0 <= p <= 1.
    pub fn new(p: f64) -> Option<Ratio> {
        if !(0.0..=1.0).contains(&p) {
            return None;
        }
        let threshold = RANGE - (p * RANGE as f64).round() as u64;
        let th = (0 < threshold && threshold < RANGE).then(|| {
            let digits = format!("{threshold:014x}");
            format!("th:{}", digits.trim_end_matches('0')).into()
        });
        Some(Ratio { probability: p, threshold, th })
    }

    /// The probability that was asked for.
    pub fn probability(&self) -> f64 {
        self.probability
    }
}

/// What decides for a request without a caller's context.
#[derive(Clone, Debug, PartialEq)]
pub enum Root {
    /// Every trace.
    On,
    /// No trace.
    Off,
    /// A share of the traces.
    Ratio(Ratio),
}

/// A sampler as `OTEL_TRACES_SAMPLER` names them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// Whether a caller's decision is followed.
    pub parent_based: bool,
    /// What decides otherwise.
    pub root: Root,
}

/// The outcome of [`Sampler::sample`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// The trace state to carry on.
    pub tracestate: Option<Arc<str>>,
}

impl Sampler {
    /// Follows the caller, and keeps `ratio` of the traces that start here.
    pub fn parent_based_ratio(ratio: Ratio) -> Sampler {
        Sampler { parent_based: true, root: Root::Ratio(ratio) }
    }

    /// Share of the traces that start here which is kept, 0 to 1.
    pub fn root_ratio(&self) -> f64 {
        match &self.root {
            Root::On => 1.0,
            Root::Off => 0.0,
            Root::Ratio(ratio) => ratio.probability(),
        }
    }

    /// Decides about the trace `trace_id`, which is the parent's if there is one.
    pub fn sample(&self, parent: Option<&TraceContext>, trace_id: TraceId) -> Decision {
        let state = parent.and_then(|p| p.tracestate.as_ref());
        match parent {
            Some(parent) if self.parent_based => Decision { sampled: parent.sampled, tracestate: state.cloned() },
            Some(_) | None => match &self.root {
                Root::On => Decision { sampled: true, tracestate: with_threshold(state, None) },
                Root::Off => Decision { sampled: false, tracestate: with_threshold(state, None) },
                Root::Ratio(ratio) => {
                    let sampled = randomness(trace_id, state) >= ratio.threshold;
                    let th = ratio.th.as_ref().filter(|_| sampled);
                    Decision { sampled, tracestate: with_threshold(state, th) }
                }
            },
        }
    }
}

/// The names that `OTEL_TRACES_SAMPLER` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// `always_on`
    AlwaysOn,
    /// `always_off`
    AlwaysOff,
    /// `traceidratio`
    TraceIdRatio,
    /// `parentbased_always_on`
    ParentBasedAlwaysOn,
    /// `parentbased_always_off`
    ParentBasedAlwaysOff,
    /// `parentbased_traceidratio`
    ParentBasedTraceIdRatio,
}

impl SamplerKind {
    /// Every kind, in the order of the OpenTelemetry specification.
    pub const ALL: [SamplerKind; 6] = [
        SamplerKind::AlwaysOn,
        SamplerKind::AlwaysOff,
        SamplerKind::TraceIdRatio,
        SamplerKind::ParentBasedAlwaysOn,
        SamplerKind::ParentBasedAlwaysOff,
        SamplerKind::ParentBasedTraceIdRatio,
    ];

    /// The name in `OTEL_TRACES_SAMPLER` and in scenario files.
    pub const fn name(self) -> &'static str {
        match self {
            SamplerKind::AlwaysOn => "always_on",
            SamplerKind::AlwaysOff => "always_off",
            SamplerKind::TraceIdRatio => "traceidratio",
            SamplerKind::ParentBasedAlwaysOn => "parentbased_always_on",
            SamplerKind::ParentBasedAlwaysOff => "parentbased_always_off",
            SamplerKind::ParentBasedTraceIdRatio => "parentbased_traceidratio",
        }
    }

    /// Whether the sampler needs a ratio.
    pub const fn takes_ratio(self) -> bool {
        matches!(self, SamplerKind::TraceIdRatio | SamplerKind::ParentBasedTraceIdRatio)
    }

    /// The sampler of this kind; `ratio` matters only where [`SamplerKind::takes_ratio`].
    pub fn with(self, ratio: Ratio) -> Sampler {
        let (parent_based, root) = match self {
            SamplerKind::AlwaysOn => (false, Root::On),
            SamplerKind::AlwaysOff => (false, Root::Off),
            SamplerKind::TraceIdRatio => (false, Root::Ratio(ratio)),
            SamplerKind::ParentBasedAlwaysOn => (true, Root::On),
            SamplerKind::ParentBasedAlwaysOff => (true, Root::Off),
            SamplerKind::ParentBasedTraceIdRatio => (true, Root::Ratio(ratio)),
        };
        Sampler { parent_based, root }
    }
}

/// A name that no sampler has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown sampler `{0}`: use always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or parentbased_traceidratio"
)]
pub struct UnknownSampler(pub String);

impl FromStr for SamplerKind {
    type Err = UnknownSampler;
    fn from_str(name: &str) -> Result<SamplerKind, UnknownSampler> {
        let found = SamplerKind::ALL.into_iter().find(|k| k.name() == name);
        found.ok_or_else(|| UnknownSampler(name.to_owned()))
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `rv` of the `ot` member if the trace state has one, else the low 56 bits of the trace id.
pub(crate) fn randomness(trace_id: TraceId, state: Option<&Arc<str>>) -> u64 {
    let explicit = state.and_then(|s| ot_fields(s)).and_then(|fields| {
        let rv = fields.split(';').find_map(|f| f.strip_prefix("rv:"))?;
        if rv.len() == 14 { u64::from_str_radix(rv, 16).ok() } else { None }
    });
    explicit.unwrap_or(trace_id.get() as u64 & (RANGE - 1))
}

/// The value of the `ot` member.
pub(crate) fn ot_fields(state: &str) -> Option<&str> {
    state.split(',').find_map(|m| m.strip_prefix("ot="))
}

/// The trace state with the threshold set to `th`, or taken out; a changed member moves to the front (W3C 3.3.1.4).
pub(super) fn with_threshold(state: Option<&Arc<str>>, th: Option<&Arc<str>>) -> Option<Arc<str>> {
    let Some(state) = state else {
        return th.map(|th| format!("ot={th}").into());
    };
    let old = ot_fields(state).unwrap_or_default();
    let kept = old.split(';').filter(|f| !f.is_empty() && !f.starts_with("th:"));
    let ot = th.map(|t| &**t).into_iter().chain(kept).collect::<Vec<_>>().join(";");
    if ot == old {
        return Some(Arc::clone(state));
    }
    let others = state.split(',').filter(|m| !m.starts_with("ot="));
    let ot = if ot.is_empty() { None } else { Some(format!("ot={ot}")) };
    let members: Vec<&str> = ot.as_deref().into_iter().chain(others).collect();
    let joined = members.join(",");
    if joined.is_empty() {
        None
    } else if joined.len() > MAX_STATE_BYTES || members.len() > MAX_STATE_MEMBERS {
        Some(Arc::clone(state))
    } else {
        Some(joined.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SpanId;
    use crate::rng::Seed;

    fn ratio(p: f64) -> Ratio {
        Ratio::new(p).unwrap()
    }

    fn parent(sampled: bool, state: Option<&str>) -> TraceContext {
        let ids = (TraceId::new(7).unwrap(), SpanId::new(8).unwrap());
        TraceContext { trace_id: ids.0, span_id: ids.1, sampled, random: false, tracestate: state.map(Into::into) }
    }

    #[test]
    fn thresholds_are_those_of_the_specification() {
        for (p, th) in [
            (0.1, Some("th:e6666666666666")),
            (0.01, Some("th:fd70a3d70a3d71")),
            (0.25, Some("th:c")),
            (0.5, Some("th:8")),
            (1.0 / 3.0, Some("th:aaaaaaaaaaaaac")),
            (1.0, None),
            (0.0, None),
        ] {
            assert_eq!(ratio(p).th.as_deref(), th, "{p}");
        }
        assert_eq!(Ratio::new(1.0), Some(Ratio::ALL));
        for bad in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert_eq!(Ratio::new(bad), None);
        }
    }

    #[test]
    fn the_boundary_of_the_threshold_is_kept() {
        let sampler = SamplerKind::TraceIdRatio.with(ratio(0.25));
        let at = |low: u64| sampler.sample(None, TraceId::new(0xff << 56 | u128::from(low)).unwrap()).sampled;
        assert!(at(0xc0_0000_0000_0000) && at(RANGE - 1));
        assert!(!at(0xbf_ffff_ffff_ffff) && !at(0));
    }

    #[test]
    fn every_kind_decides_as_named() {
        let check = |kind: SamplerKind, p: f64, parent: Option<TraceContext>, expect: bool| {
            let id = TraceId::new(u128::from(RANGE / 2)).unwrap();
            assert_eq!(kind.with(ratio(p)).sample(parent.as_ref(), id).sampled, expect, "{kind} {p} {parent:?}");
        };
        let (yes, no) = (|| Some(parent(true, None)), || Some(parent(false, None)));
        check(SamplerKind::AlwaysOn, 0.0, no(), true);
        check(SamplerKind::AlwaysOff, 1.0, yes(), false);
        check(SamplerKind::TraceIdRatio, 0.5, no(), true);
        check(SamplerKind::TraceIdRatio, 0.49, yes(), false);
        check(SamplerKind::ParentBasedAlwaysOn, 0.0, None, true);
        check(SamplerKind::ParentBasedAlwaysOn, 0.0, no(), false);
        check(SamplerKind::ParentBasedAlwaysOff, 1.0, None, false);
        check(SamplerKind::ParentBasedAlwaysOff, 1.0, yes(), true);
        check(SamplerKind::ParentBasedTraceIdRatio, 0.5, None, true);
        check(SamplerKind::ParentBasedTraceIdRatio, 0.0, None, false);
        check(SamplerKind::ParentBasedTraceIdRatio, 1.0, no(), false);
        check(SamplerKind::ParentBasedTraceIdRatio, 0.0, yes(), true);
    }

    #[test]
    fn the_kept_share_is_the_ratio_and_lower_ratios_keep_a_subset() {
        let mut ids = Seed(11).stream("sampler-test");
        let ids: Vec<TraceId> = (0..40_000)
            .map(|_| TraceId::new(u128::from(ids.next_u64()) << 64 | u128::from(ids.next_u64())).unwrap())
            .collect();
        let kept =
            |p: f64| ids.iter().filter(move |id| Sampler::parent_based_ratio(ratio(p)).sample(None, **id).sampled);
        for p in [0.01f64, 0.1, 0.5, 0.9] {
            let (n, got) = (ids.len() as f64, kept(p).count() as f64);
            // The 99 % interval of a binomial, normal approximation; the seed is fixed, so this never flickers.
            let half = 2.576 * (n * p * (1.0 - p)).sqrt();
            assert!((got - n * p).abs() < half, "{p}: {got} of {n}");
        }
        let at_half: std::collections::HashSet<_> = kept(0.5).collect();
        assert!(kept(0.1).all(|id| at_half.contains(id)));
    }

    #[test]
    fn the_threshold_travels_in_the_trace_state() {
        let id = TraceId::new(u128::from(RANGE - 1)).unwrap();
        let check = |kind: SamplerKind, state: Option<&str>, expect: Option<&str>| {
            let parent = parent(true, state);
            let found = kind.with(ratio(0.5)).sample(Some(&parent), id);
            assert_eq!(found.tracestate.as_deref(), expect, "{kind} {state:?}");
        };
        let root = Sampler::parent_based_ratio(ratio(0.1)).sample(None, id);
        assert_eq!(root.tracestate.as_deref(), Some("ot=th:e6666666666666"));
        let lost = Sampler::parent_based_ratio(ratio(0.1)).sample(None, TraceId::new(1).unwrap());
        assert_eq!(lost, Decision { sampled: false, tracestate: None });
        check(SamplerKind::ParentBasedTraceIdRatio, Some("a=1,ot=th:c"), Some("a=1,ot=th:c"));
        check(SamplerKind::TraceIdRatio, Some("a=1"), Some("ot=th:8,a=1"));
        check(SamplerKind::TraceIdRatio, Some("a=1,ot=th:c"), Some("ot=th:8,a=1"));
        check(SamplerKind::TraceIdRatio, Some("ot=rv:00000000000001,a=1"), Some("ot=rv:00000000000001,a=1"));
        check(SamplerKind::TraceIdRatio, Some("ot=th:8;rv:00000000000001"), Some("ot=rv:00000000000001"));
        check(SamplerKind::TraceIdRatio, Some("ot=rv:80000000000000"), Some("ot=th:8;rv:80000000000000"));
        check(SamplerKind::AlwaysOff, Some("ot=th:8"), None);
    }

    #[test]
    fn names_parse_back() {
        for kind in SamplerKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("jaeger_remote".parse::<SamplerKind>().is_err());
    }
}
