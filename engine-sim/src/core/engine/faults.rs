//! What faults do to the engine: it goes down and comes back empty, stops, or takes longer.

use shared::time::Time;

use super::{Engine, Input, NewRequest, Output, Plan, RequestKey};
use crate::core::facts::EngineFact;
use crate::core::faults::{
    Change, Condition, Down, FaultCounts, FaultKind, FaultRule, Faults, KvTransferFault, PageFault, RequestFault,
};

impl Engine {
    /// The engine with these faults before it.
    #[must_use]
    pub fn with_faults(mut self, faults: Faults) -> Engine {
        self.faults = Some(Box::new(faults));
        self
    }

    /// Adds a fault at `now`; the rule's times count from there. False for an engine that was made without faults: its driver does
    /// not act on any. The rule is valid.
    pub fn inject(&mut self, now: Time, rule: &FaultRule) -> bool {
        let now = now.max(self.core_time);
        self.faults.as_deref_mut().map(|f| f.add(now, rule)).is_some()
    }

    /// Takes every fault back at `now`: one that is down starts again.
    pub fn clear_faults(&mut self, now: Time) {
        let now = now.max(self.core_time);
        if let Some(faults) = self.faults.as_deref_mut() {
            faults.clear(now);
        }
    }

    /// How the engine is down, as of [`Engine::core_time`].
    pub fn down(&self) -> Option<Down> {
        self.faults.as_deref()?.down()
    }

    /// What is wrong with the metrics page, as of [`Engine::core_time`].
    pub fn page_fault(&self) -> Option<PageFault> {
        self.faults.as_deref()?.page()
    }

    /// Whether a request that the front end received at `now` is struck by a fault; asked once for each, before [`Engine::handle`].
    pub fn request_fault(&mut self, now: Time) -> Option<RequestFault> {
        self.faults.as_deref_mut()?.request(now)
    }

    /// Counts a fault that the request itself asked for. False, and it is not to be acted out, where no faults are wanted.
    pub fn fault_asked_for(&mut self, fault: RequestFault) -> bool {
        self.faults.as_deref_mut().map(|f| f.asked_for(fault)).is_some()
    }

    /// Whether a transfer of KV blocks to this engine that begins at `now` fails; asked once for each.
    pub fn kv_transfer_fault(&mut self, now: Time) -> Option<KvTransferFault> {
        self.faults.as_deref_mut()?.kv_transfer(now)
    }

    /// The faults, for whoever shows them.
    pub fn faults(&self) -> Option<&Faults> {
        self.faults.as_deref()
    }

    /// How often faults happened.
    pub fn fault_counts(&self) -> FaultCounts {
        self.faults.as_deref().map(|f| *f.counts()).unwrap_or_default()
    }

    /// When the next condition begins or ends.
    pub(super) fn next_fault(&self) -> Option<Time> {
        self.faults.as_deref()?.next_change()
    }

    /// Lets one condition begin or end that is due at `by`; false if none is.
    pub(super) fn suffer(&mut self, by: Time) -> bool {
        let Some((at, change)) = self.faults.as_deref_mut().and_then(|f| f.change(by)) else { return false };
        self.core_time = self.core_time.max(at);
        match change {
            Change::Begin(condition) => {
                match condition {
                    Condition::Down(_) | Condition::Hang | Condition::Slow(_) => self.tell_all(at, condition.kind()),
                    Condition::Metrics(_) => {}
                }
                if let Condition::Down(down) = condition {
                    self.go_down(self.core_time, down);
                }
            }
            // What was deferred happens now; an engine that comes back is empty since it went down.
            Change::End(Condition::Down(_) | Condition::Hang | Condition::Slow(_) | Condition::Metrics(_)) => {}
        }
        true
    }

    /// Every recorded request that is open learns of the fault.
    fn tell_all(&self, at: Time, kind: FaultKind) {
        let running = self.open.iter().flatten().map(|open| &open.trail);
        let queued = self.inbox.iter().filter_map(|(_, input)| added(input)).map(|request| &request.trail);
        running.chain(queued).for_each(|trail| trail.note(at, || EngineFact::Fault(kind)));
    }

    /// A request that arrives while the engine hangs or is slow learns of it.
    pub(super) fn tell(&self, now: Time, request: &NewRequest) {
        let Some(faults) = self.faults.as_deref() else { return };
        for (condition, _) in faults.active() {
            match condition {
                Condition::Down(_) | Condition::Hang | Condition::Slow(_) => {
                    request.trail.note(now, || EngineFact::Fault(condition.kind()));
                }
                Condition::Metrics(_) => {}
            }
        }
    }

    /// Everything in the engine is lost: requests, cache, counters, and what was planned to be handed over later.
    fn go_down(&mut self, at: Time, down: Down) {
        let lost = self.unfinished(at);
        let mut fresh = self.renewed();
        fresh.core_time = at;
        fresh.taken = self.taken;
        fresh.faults = self.faults.take();
        fresh.outbox = self.outbox.drain(..).filter(|output| output.at() <= at).collect();
        fresh.plan = Plan::Idle;
        if let Some(faults) = fresh.faults.as_deref_mut() {
            faults.lost(lost.len() as u64);
        }
        lost.into_iter().for_each(|key| fresh.emit(Output::Broken { key, at, down }));
        *self = fresh;
    }

    /// Requests that nobody was told the end of by `at`.
    fn unfinished(&self, at: Time) -> Vec<RequestKey> {
        let running = self.open.iter().flatten().map(|open| open.key);
        let queued = self.inbox.iter().filter_map(|(_, input)| added(input)).map(|request| request.key);
        let untold = self.outbox.iter().filter(|output| output.at() > at && output.is_last()).map(Output::key);
        running.chain(queued).chain(untold).collect()
    }
}

fn added(input: &Input) -> Option<&NewRequest> {
    match input {
        Input::Add(request) => Some(request),
        Input::Abort(_) => None,
    }
}

/// `ps` picoseconds of a step as long as they take now.
pub(super) fn slowed(faults: Option<&Faults>, ps: u64) -> u64 {
    faults.map_or(ps, |f| u64::try_from(u128::from(ps) * u128::from(f.slowness()) / 1000).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
