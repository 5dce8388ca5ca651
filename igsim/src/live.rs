//! Live
use shared::trace::{Stats, TelemetryConfig};
use crate::report::EngineFigures;
use crate::run::collect::Collector;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;
use crate::workload::Plan;
/// What
pub struct Ended {
    /// e
    pub engines: EngineFigures,
    /// i
    pub interrupted: bool,
    /// c
    pub collector: Collector,
    /// s
    pub stats: Stats,
}
/// run
pub fn run(_: &Scenario, _: Plan, _: TelemetryConfig, _: Collector, _: &Interrupt) -> Result<Ended, std::io::Error> { Err(std::io::Error::other("not yet")) }
