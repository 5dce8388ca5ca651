//! What each flow has been served: the memory of `program-aware-fairness` in its strategy `las`, least attained service.
//!
//! Service is counted in tokens when a request ends: prompt + 2 × output (llm-d-router
//! `pkg/epp/framework/plugins/flowcontrol/fairness/program-aware/strategy_las.go`). It halves every minute while the flow has nothing
//! waiting and nothing in flight.

use std::collections::BTreeMap;
use std::sync::Arc;

use shared::time::{Dur, Time};

const HALF_LIFE: Dur = Dur::from_secs(60);
const SERVICE_WEIGHT: f64 = 0.8;
const WAIT_WEIGHT: f64 = 0.2;
/// With more flows than this, those that are idle are forgotten.
const MAX_PROGRAMS: usize = 10_000;

/// All flows that were seen.
#[derive(Debug, Default)]
pub(super) struct Programs(BTreeMap<Arc<str>, Program>);

#[derive(Debug, Default)]
struct Program {
    service: f64,
    /// When service was added or decayed last.
    since: Time,
    waiting: u32,
    in_flight: u32,
}

impl Program {
    const fn is_idle(&self) -> bool {
        self.waiting == 0 && self.in_flight == 0
    }
}

impl Programs {
    /// A request of `flow` begins to wait.
    pub(super) fn enter(&mut self, flow: &Arc<str>, now: Time) {
        if self.0.len() >= MAX_PROGRAMS && !self.0.contains_key(flow) {
            self.0.retain(|_, p| !p.is_idle());
        }
        let program = self.0.entry(Arc::clone(flow)).or_default();
        if program.is_idle() {
            let halves = now.since(program.since).as_secs_f64() / HALF_LIFE.as_secs_f64();
            program.service *= 0.5f64.powf(halves);
            program.since = now;
        }
        program.waiting += 1;
    }

    /// It waits no more.
    pub(super) fn leave(&mut self, flow: &str, dispatched: bool) {
        if let Some(program) = self.0.get_mut(flow) {
            program.waiting -= 1;
            program.in_flight += u32::from(dispatched);
        }
    }

    /// A request of `flow` was served so many tokens.
    pub(super) fn served(&mut self, flow: &str, now: Time, prompt: u32, output: u32) {
        if let Some(program) = self.0.get_mut(flow) {
            program.service += f64::from(prompt) + 2.0 * f64::from(output);
            program.since = now;
        }
    }

    /// A dispatched request of `flow` is over.
    pub(super) fn end(&mut self, flow: &str) {
        if let Some(program) = self.0.get_mut(flow) {
            program.in_flight = program.in_flight.saturating_sub(1);
        }
    }

    /// The flow whose turn it is, of flows with the time at which their next request came: the highest
    /// 0.8 × (1 - service) + 0.2 × wait, both as parts of their range among these flows. The one that waits longest wins a tie.
    pub(super) fn pick<'a>(
        &self,
        flows: impl Iterator<Item = (&'a Arc<str>, Time)> + Clone,
        now: Time,
    ) -> Option<&'a Arc<str>> {
        let service = |flow: &str| self.0.get(flow).map_or(0.0, |p| p.service);
        let waited = |at: Time| (now.since(at).as_nanos() / 1_000_000) as f64;
        let services = Range::of(flows.clone().map(|(f, _)| service(f)));
        let waits = Range::of(flows.clone().map(|(_, at)| waited(at)));
        let scored = flows.map(|(flow, at)| {
            let score = SERVICE_WEIGHT * (1.0 - services.part(service(flow))) + WAIT_WEIGHT * waits.part(waited(at));
            (score, at, flow)
        });
        scored.reduce(|a, b| if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a }).map(|(_, _, flow)| flow)
    }
}

struct Range(f64, f64);

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Range {
        values.fold(Range(f64::INFINITY, f64::NEG_INFINITY), |r, v| Range(r.0.min(v), r.1.max(v)))
    }

    fn part(&self, value: f64) -> f64 {
        if self.1 > self.0 { (value - self.0) / (self.1 - self.0) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::ZERO + Dur::from_millis(ms)
    }

    #[test]
    fn the_flow_that_was_served_least_is_next() {
        let [a, b, c] = ["a", "b", "c"].map(Arc::<str>::from);
        let mut programs = Programs::default();
        [&a, &b, &c].into_iter().for_each(|f| programs.enter(f, at(0)));
        programs.served(&a, at(0), 1000, 0);
        programs.served(&b, at(0), 100, 200);
        programs.served(&c, at(0), 0, 490);
        let pick = |came: [u64; 3]| {
            programs.pick([(&a, at(came[0])), (&b, at(came[1])), (&c, at(came[2]))].into_iter(), at(100))
        };
        // 1000, 500 and 980 tokens.
        assert_eq!(pick([0, 0, 0]), Some(&b));
        // Waiting counts a fifth: it decides between a and c only.
        assert_eq!(pick([0, 100, 100]), Some(&b));
        assert_eq!(programs.pick([(&a, at(0)), (&c, at(100))].into_iter(), at(100)), Some(&c));
        assert_eq!(programs.pick(std::iter::empty(), at(0)), None);
    }

    #[test]
    fn service_is_forgotten_by_halves_while_the_flow_is_idle() {
        let flow = Arc::<str>::from("a");
        let mut programs = Programs::default();
        programs.enter(&flow, at(0));
        programs.leave(&flow, true);
        programs.served(&flow, at(0), 800, 0);
        let service = |p: &Programs| p.0["a"].service;
        programs.enter(&flow, at(60_000));
        assert_eq!(service(&programs), 800.0, "something was in flight");
        programs.leave(&flow, false);
        programs.end(&flow);
        programs.enter(&flow, at(120_000));
        assert_eq!(service(&programs), 200.0);
    }

    #[test]
    fn idle_flows_are_forgotten_when_there_are_too_many() {
        let mut programs = Programs::default();
        for i in 0..MAX_PROGRAMS + 5 {
            let flow = Arc::<str>::from(i.to_string());
            programs.enter(&flow, at(0));
            programs.leave(&flow, false);
        }
        assert!(programs.0.len() <= MAX_PROGRAMS);
    }
}
