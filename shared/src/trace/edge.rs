//! The decision at the edge of a system, where traces begin: [`Policy`] on top of the sampler.
//!
//! An unsampled request that may be kept for what becomes of it is a candidate: its flag is 00, so that nobody else records it, and
//! the member `igsim=c` of its trace state tells our own services to hold what they record until the edge has judged. Reads no
//! clock; `now` is an argument.

use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderName};

use crate::ids::TraceId;
use crate::time::Time;
use crate::trace::context::{MAX_STATE_BYTES, MAX_STATE_MEMBERS, TraceContext};
use crate::trace::policy::{Force, Keep, Labels, Policy, Reason, Rule};
use crate::trace::sampler::{Decision, Ratio, Root, Sampler, with_threshold};

/// The member of the trace state that marks a candidate.
const MARK: &str = "igsim=c";
/// Its key, with which no other member begins.
const KEY: &str = "igsim=";

/// What is decided of a request when its record may begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Whether it is recorded is in its context.
    #[default]
    Decided,
    /// It is not sampled, and held until its edge has judged.
    Candidate,
    /// The rules need to know more of it; until then it is not recorded.
    Pending {
        /// Whether its caller asked for a trace.
        forced: bool,
    },
}

/// What was decided at the edge.
#[derive(Debug)]
pub(super) struct Decided {
    pub(super) decision: Decision,
    pub(super) candidate: bool,
    pub(super) reason: Option<Reason>,
}

/// A policy at work.
#[derive(Debug)]
pub(super) struct Edge {
    rules: Vec<(Rule, Sampler)>,
    force: Option<HeaderName>,
    bucket: Option<Mutex<Bucket>>,
    keep: Option<Keep>,
    mark: Arc<str>,
}

impl Edge {
    /// The edge that follows `policy`, which is valid; `None` if nothing is asked for.
    pub(super) fn of(policy: &Policy) -> Option<Edge> {
        let rule = |rule: &Rule| {
            let ratio = Ratio::new(rule.ratio).unwrap_or(Ratio::NONE);
            (rule.clone(), Sampler { parent_based: false, root: Root::Ratio(ratio) })
        };
        (!policy.is_empty()).then(|| Edge {
            rules: policy.rules.iter().map(rule).collect(),
            force: policy.force.as_ref().and_then(|Force { header }| header.parse().ok()),
            bucket: policy.rate_limit.map(|rate| Mutex::new(Bucket::new(rate))),
            keep: policy.keep.clone(),
            mark: MARK.into(),
        })
    }

    /// Whether the decision waits until the labels of a request are known.
    pub(super) fn needs_labels(&self) -> bool {
        !self.rules.is_empty()
    }

    /// What is worth keeping.
    pub(super) fn keep(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    /// Whether a trusted caller asks for a trace.
    pub(super) fn is_forced(&self, headers: &HeaderMap) -> bool {
        let asked = self.force.as_ref().and_then(|name| headers.get(name));
        asked.is_some_and(|value| value.as_bytes() == b"1")
    }

    /// Decides on the trace `trace_id`, for which no caller has: `own` says otherwise what `sampler` says.
    pub(super) fn decide(
        &self,
        sampler: &Sampler,
        caller: Option<&TraceContext>,
        trace_id: TraceId,
        (forced, labels, now): (bool, &Labels<'_>, Time),
    ) -> Decided {
        let state = caller.and_then(|c| c.tracestate.as_ref());
        let (mut decision, mut reason) = if forced {
            (Decision { sampled: true, tracestate: with_threshold(state, None) }, Some(Reason::Forced))
        } else {
            let rule = self.rules.iter().find(|(rule, _)| rule.matches(labels)).map(|(_, ratio)| ratio);
            (rule.unwrap_or(sampler).sample(caller, trace_id), None)
        };
        if decision.sampled
            && let Some(bucket) = &self.bucket
        {
            decision.sampled = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now);
            // A count of these traces cannot be scaled by any ratio.
            decision.tracestate = with_threshold(decision.tracestate.as_ref(), None);
            reason = decision.sampled.then_some(reason.unwrap_or(Reason::RateLimit));
        }
        let candidate = !decision.sampled && self.keep.is_some();
        if candidate {
            decision.tracestate = Some(marked(decision.tracestate.as_ref(), &self.mark));
        }
        Decided { decision, candidate, reason }
    }
}

/// A sampler and a policy, to ask what they would do.
#[derive(Debug)]
pub struct Decider {
    sampler: Sampler,
    edge: Option<Edge>,
}

/// What would be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its trace is kept from the start.
    Kept,
    /// It is recorded, and its trace kept or not for what becomes of it.
    Held,
    /// It is not recorded.
    Dropped,
}

impl Decider {
    /// What `sampler` and a valid `policy` do together.
    pub fn new(sampler: Sampler, policy: &Policy) -> Decider {
        Decider { sampler, edge: Edge::of(policy) }
    }

    /// Decides on a trace that begins at `now`; to be asked in the order of time.
    pub fn decide(&self, trace_id: TraceId, labels: &Labels<'_>, now: Time) -> Fate {
        let (sampled, candidate) = match &self.edge {
            None => (self.sampler.sample(None, trace_id).sampled, false),
            Some(edge) => {
                let Decided { decision, candidate, .. } =
                    edge.decide(&self.sampler, None, trace_id, (false, labels, now));
                (decision.sampled, candidate)
            }
        };
        match (sampled, candidate) {
            (true, _) => Fate::Kept,
            (false, true) => Fate::Held,
            (false, false) => Fate::Dropped,
        }
    }
}

/// Whether a trace state marks a candidate.
pub(super) fn is_marked(state: Option<&Arc<str>>) -> bool {
    state.is_some_and(|state| state.split(',').any(|member| member == MARK))
}

/// A caller's context without the mark: at the edge nobody is believed who says that a trace may be kept later.
pub(super) fn unmarked(caller: TraceContext) -> TraceContext {
    let Some(state) = caller.tracestate.as_ref().filter(|s| s.contains(KEY)) else { return caller };
    let others: Vec<&str> = state.split(',').filter(|member| !member.starts_with(KEY)).collect();
    let tracestate = (!others.is_empty()).then(|| others.join(",").into());
    TraceContext { tracestate, ..caller }
}

/// A trace state with the mark in front (W3C 3.3.1.4); the last members give way to it.
fn marked(state: Option<&Arc<str>>, mark: &Arc<str>) -> Arc<str> {
    let Some(state) = state else { return Arc::clone(mark) };
    let mut out = MARK.to_owned();
    for member in state.split(',').filter(|m| !m.starts_with(KEY)).take(MAX_STATE_MEMBERS - 1) {
        if out.len() + 1 + member.len() > MAX_STATE_BYTES {
            break;
        }
        out.push(',');
        out.push_str(member);
    }
    out.into()
}

/// Traces that may begin: as many as come in a second, at least one, can be saved up.
#[derive(Debug)]
struct Bucket {
    rate: f64,
    tokens: f64,
    at: Time,
}

impl Bucket {
    fn new(rate: f64) -> Bucket {
        Bucket { rate, tokens: rate.max(1.0), at: Time::ZERO }
    }

    fn take(&mut self, now: Time) -> bool {
        let gained = now.since(self.at).as_secs_f64() * self.rate;
        self.tokens = (self.tokens + gained).min(self.rate.max(1.0));
        self.at = self.at.max(now);
        let there = self.tokens >= 1.0;
        if there {
            self.tokens -= 1.0;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::SpanId;
    use crate::rng::Seed;
    use crate::time::Dur;

    fn ids(seed: u64) -> impl Iterator<Item = TraceId> {
        let mut draws = Seed(seed).stream("edge-test");
        std::iter::repeat_with(move || {
            TraceId::new(u128::from(draws.next_u64()) << 64 | u128::from(draws.next_u64())).unwrap()
        })
    }

    fn tenant(ratio: f64, tenant: &str) -> Rule {
        Rule { tenant: Some(tenant.to_owned()), ratio, ..Rule::default() }
    }

    fn edge(policy: Policy) -> Edge {
        assert_eq!(policy.problems(), []);
        Edge::of(&policy).unwrap()
    }

    fn sampler(ratio: f64) -> Sampler {
        Sampler::parent_based_ratio(Ratio::new(ratio).unwrap())
    }

    /// Whether `kept` of `n` draws at `p` is inside the 99 % interval, by the normal approximation.
    fn plausible(kept: usize, n: usize, p: f64) -> bool {
        let (kept, n) = (kept as f64, n as f64);
        (kept - n * p).abs() <= 2.576 * (n * p * (1.0 - p)).sqrt() + 0.5
    }

    #[test]
    fn every_rule_keeps_its_share() {
        let rules = vec![tenant(0.5, "half"), tenant(0.02, "few"), tenant(1.0, "all*"), tenant(0.0, "none")];
        let edge = edge(Policy { rules, ..Policy::default() });
        let n = 20_000;
        for (name, p) in [("half", 0.5), ("few", 0.02), ("all-of-them", 1.0), ("none", 0.0), ("other", 0.1)] {
            let labels = Labels { tenant: Some(name), ..Labels::default() };
            let kept = |id: &TraceId| {
                let made = edge.decide(&sampler(0.1), None, *id, (false, &labels, Time::ZERO));
                assert_eq!((made.candidate, made.reason), (false, None));
                let threshold = made.decision.tracestate.as_deref().is_some_and(|s| s.starts_with("ot=th:"));
                assert_eq!(threshold, made.decision.sampled && p < 1.0);
                made.decision.sampled
            };
            // The seed is fixed, so this never flickers.
            let kept = ids(7).take(n).filter(kept).count();
            assert!(plausible(kept, n, p), "{name}: {kept} of {n}");
        }
    }

    #[test]
    fn the_rate_is_a_limit_and_its_traces_have_no_threshold() {
        let edge = edge(Policy { rate_limit: Some(10.0), ..Policy::default() });
        let decide = |id, at| edge.decide(&sampler(0.5), None, id, (false, &Labels::default(), at));
        // A thousand requests in ten seconds, half of which the ratio wants.
        let kept: Vec<_> = ids(3)
            .take(1000)
            .enumerate()
            .map(|(i, id)| decide(id, Time::from_nanos(i as u64 * 10_000_000)))
            .filter(|made| made.decision.sampled)
            .collect();
        assert!((108..=110).contains(&kept.len()), "ten at once and ten in each second: {}", kept.len());
        assert!(kept.iter().all(|made| made.decision.tracestate.is_none() && made.reason == Some(Reason::RateLimit)));
    }

    #[test]
    fn force_goes_before_the_rules_and_within_the_limit() {
        let policy = Policy {
            rules: vec![tenant(0.0, "*")],
            force: Some(Force::default()),
            rate_limit: Some(2.0),
            ..Policy::default()
        };
        let edge = edge(policy);
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(HeaderName::from_static("x-igsim-trace"), value.parse().unwrap())])
        };
        assert!(edge.is_forced(&headers("1")));
        assert!(!edge.is_forced(&headers("0")) && !edge.is_forced(&HeaderMap::new()));
        let labels = Labels { tenant: Some("a"), ..Labels::default() };
        let id = ids(1).next().unwrap();
        let reasons: Vec<_> = [true, true, true, false]
            .map(|forced| edge.decide(&sampler(1.0), None, id, (forced, &labels, Time::ZERO)).reason)
            .into();
        assert_eq!(reasons, [Some(Reason::Forced), Some(Reason::Forced), None, None]);
    }

    #[test]
    fn candidates_are_marked_and_nobody_else_is_believed() {
        let edge = edge(Policy { keep: Some(Keep::default()), ..Policy::default() });
        let id = TraceId::new(7).unwrap();
        let caller = |state: Option<&str>| TraceContext {
            trace_id: id,
            span_id: SpanId::new(1).unwrap(),
            sampled: false,
            random: false,
            tracestate: state.map(Into::into),
        };
        let state = |caller: Option<&TraceContext>| {
            let off = Sampler { parent_based: false, root: Root::Off };
            let made = edge.decide(&off, caller, id, (false, &Labels::default(), Time::ZERO));
            assert!(made.candidate && !made.decision.sampled && is_marked(made.decision.tracestate.as_ref()));
            made.decision.tracestate.unwrap().to_string()
        };
        assert_eq!(state(None), "igsim=c");
        assert_eq!(state(Some(&caller(Some("a=1,ot=th:8,b=2")))), "igsim=c,a=1,b=2");
        let full = vec!["a=1"; MAX_STATE_MEMBERS].join(",");
        assert_eq!(state(Some(&caller(Some(&full)))).split(',').count(), MAX_STATE_MEMBERS);
        let unmarked = |state: &str| unmarked(caller(Some(state))).tracestate.map(|s| s.to_string());
        assert_eq!(unmarked("igsim=c"), None);
        assert_eq!(unmarked("a=1,igsim=c,b=2").as_deref(), Some("a=1,b=2"));
        assert_eq!(unmarked("a=igsim").as_deref(), Some("a=igsim"));
        assert!(!is_marked(Some(&"igsim=cc,a=igsim=c".into())));
    }

    proptest! {
        #[test]
        fn a_bucket_never_gives_more_than_it_got(rate in 0.1f64..50.0, gaps in proptest::collection::vec(0u64..2_000_000_000, 1..200)) {
            let mut bucket = Bucket::new(rate);
            let (mut now, mut taken) = (Time::ZERO, 0.0);
            for gap in gaps {
                now = now.saturating_add(Dur::from_nanos(gap));
                taken += f64::from(u8::from(bucket.take(now)));
            }
            prop_assert!(taken <= rate.max(1.0) + rate * now.as_secs_f64() + 1e-6);
        }
    }
}
