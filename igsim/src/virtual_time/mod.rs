//! Virtual time: the same cores as in a live run, on one thread, driven by an event queue.
//!
//! Deterministic: the same scenario and seed give the same bytes. Nothing here reads a clock; what the gateway's and the
//! engine's own code would cost comes from [`cost`], the network is a constant delay each way.

mod arrivals;
pub mod cost;
mod engines;
mod event;
mod flight;
mod gate;
mod hedge;
mod hindsight;
mod judging;
mod kv_events;
mod loss;
mod membership;
mod peers;
mod pools;
mod prefill;
pub mod queue;
mod scrapes;
mod sidecar;
pub(crate) mod world;

use shared::rng::Seed;
use shared::time::Time;
use shared::trace::Telemetry;

use crate::replay::ReplayError;
use crate::report::{EngineFigures, RequestRow};
use crate::scenario::Scenario;
use crate::workload::Plan;

/// What a virtual run tells while it goes on.
pub trait Observer {
    /// A request ended; `gaps` are the times between its tokens.
    fn request(&mut self, row: &RequestRow, gaps: &[shared::time::Dur]);
    /// Whether to go on; asked now and then.
    fn go_on(&mut self, now: Time) -> bool;
}

/// What a virtual run knows at its end besides the rows.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// What the engines count.
    pub engines: EngineFigures,
    /// Time of the last event.
    pub at: Time,
    /// Whether [`Observer::go_on`] stopped it.
    pub interrupted: bool,
}

/// Runs `scenario` with the requests of `plan`.
///
/// # Errors
/// A line of the trace that cannot be read; nothing is reported of a plan that cannot be followed.
pub fn run(
    scenario: &Scenario,
    plan: Plan,
    seed: Seed,
    telemetry: &Telemetry,
    observer: &mut dyn Observer,
) -> Result<Ended, ReplayError> {
    world::World::new(scenario, plan, seed, telemetry).run(observer)
}
