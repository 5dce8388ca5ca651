//! The strategies, and what each of them would have done with the requests of a run.

use shared::time::Dur;
use shared::trace::edge::{Decider, Fate};
use shared::trace::{Keep, Labels, Policy, Ratio, Sampler, SamplerKind};
use shared::units::HumanDur;

use super::{Compared, Interesting, Kept, Seen};
use crate::scenario::Scenario;
use crate::virtual_time::world::path_of;

/// Traces in a second, where the scenario names no limit.
const RATE: f64 = 1.0;

/// A way to sample.
#[derive(Clone, Debug)]
pub struct Strategy {
    /// What it is called.
    pub name: String,
    sampler: Sampler,
    policy: Policy,
}

impl Strategy {
    fn new(name: impl Into<String>, ratio: f64, policy: Policy) -> Strategy {
        let sampler = Sampler::parent_based_ratio(Ratio::new(ratio).unwrap_or(Ratio::NONE));
        Strategy { name: name.into(), sampler, policy }
    }
}

/// Those that are compared: the usual ones, with the rules, the limit and the bounds of the scenario where it has some.
fn all(scenario: &Scenario, keep: &Keep) -> Vec<Strategy> {
    let tracing = &scenario.tracing;
    let ratio = tracing.ratio.unwrap_or(shared::trace::config::DEFAULT_RATIO);
    let (none, keep) = (Policy::default(), Policy { keep: Some(keep.clone()), ..Policy::default() });
    let rate = tracing.rate_limit.unwrap_or(RATE);
    let mut all = vec![
        Strategy::new("head 1 %", 0.01, none.clone()),
        Strategy::new("head 10 %", 0.1, none.clone()),
        Strategy::new(format!("rate limit {rate}/s"), 1.0, Policy { rate_limit: Some(rate), ..none.clone() }),
    ];
    if !tracing.rules.is_empty() {
        let name = format!("rules, else {} %", 100.0 * ratio);
        all.push(Strategy::new(name, ratio, Policy { rules: tracing.rules.clone(), ..none }));
    }
    all.push(Strategy::new("keep on outcome", 0.0, keep.clone()));
    all.push(Strategy::new("head 1 % + keep on outcome", 0.01, keep));
    let sampler = SamplerKind::AlwaysOn.with(Ratio::ALL);
    all.push(Strategy { name: "always on".to_owned(), sampler, policy: Policy::default() });
    all
}

/// The value that 99 % of the requests do not exceed.
fn p99<T: Copy + Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    values.get((values.len() * 99).div_ceil(100).checked_sub(1)?).copied()
}

/// What makes a request worth looking at.
#[derive(Clone, Copy)]
struct Bounds {
    slow: Dur,
    expensive: u64,
}

impl Interesting {
    fn add(&mut self, seen: &Seen, bounds: Bounds) {
        let Seen { outcome, failed, .. } = seen;
        self.failed += u64::from(*failed);
        self.slow += u64::from(outcome.took > bounds.slow);
        self.expensive += u64::from(outcome.tokens > bounds.expensive);
        self.disturbed += u64::from(outcome.preempted || outcome.retried);
    }
}

/// Asks every strategy about the requests of a run, which are in the order in which they came.
pub(super) fn ask(scenario: &Scenario, seen: &[Seen]) -> Compared {
    let bounds = Bounds {
        slow: p99(seen.iter().map(|s| s.outcome.took)).unwrap_or(Dur::ZERO),
        expensive: p99(seen.iter().map(|s| s.outcome.tokens)).unwrap_or(0),
    };
    let keep = scenario.tracing.keep.clone().unwrap_or_else(|| Keep {
        slower_than: Some(HumanDur(bounds.slow)),
        more_tokens_than: Some(bounds.expensive),
        ..Keep::default()
    });
    let mut interesting = Interesting::default();
    seen.iter().for_each(|s| interesting.add(s, bounds));
    Compared {
        scenario: scenario.name.clone(),
        seed: scenario.seed,
        requests: seen.len() as u64,
        interesting,
        slow_ms: bounds.slow.as_millis_f64(),
        expensive_tokens: bounds.expensive,
        strategies: all(scenario, &keep).iter().map(|strategy| kept(scenario, strategy, seen, bounds)).collect(),
    }
}

fn kept(scenario: &Scenario, strategy: &Strategy, seen: &[Seen], bounds: Bounds) -> Kept {
    let decider = Decider::new(strategy.sampler.clone(), &strategy.policy);
    let (model, tenants) = (scenario.model(), &scenario.workload.tenants);
    let (recorded, interesting) = (0, Interesting::default());
    let name = strategy.name.clone();
    let mut kept = Kept { strategy: name, recorded, traces: 0, interesting, spans: 0, bytes: 0 };
    for request in seen {
        let tenant = tenants.get(usize::from(request.tenant));
        let labels = Labels {
            model: Some(model.as_str()),
            tenant: tenant.map(|t| t.name.as_str()),
            route: Some(path_of(scenario.workload.api)),
            objective: tenant.and_then(|t| t.objective_name()),
        };
        let fate = decider.decide(request.trace_id, &labels, request.at);
        let judged = || strategy.policy.keep.as_ref().and_then(|keep| keep.judge(&request.outcome));
        let stays = match fate {
            Fate::Kept => true,
            Fate::Held => judged().is_some(),
            Fate::Dropped => false,
        };
        kept.recorded += u64::from(fate != Fate::Dropped);
        if stays {
            kept.traces += 1;
            kept.spans += request.spans;
            kept.bytes += request.bytes;
            kept.interesting.add(request, bounds);
        }
    }
    kept
}
