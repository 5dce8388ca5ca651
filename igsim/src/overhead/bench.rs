//! What a regime runs: its fleet, its load, and how much of it makes a block.
//!
//! Lengths and arrival times are the same in every block of a regime; only the text of prompts differs.

use http::HeaderMap;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::trace::Telemetry;

use super::fleet::Fleet;
use super::load::{Lengths, LoadError, LoadSpec, Loader, Pattern};
use super::model::{Regime, Summary};
use crate::replay::ReplayError;
use crate::report::{Outcome, RequestRow};
use crate::scenario::{Arrivals, EngineGroup, Scenario, ThinkTime};
use crate::virtual_time::{self, Observer, world::path_of};
use crate::workload::Plan;

/// Share of the fleet's capacity that `realistic` asks for.
const UTILISATION: f64 = 0.6;
/// Requests in flight in `saturation`, unless told otherwise.
pub const IN_FLIGHT: u32 = 16;
/// What `floor` and `saturation` send.
const SMALL: Lengths = Lengths { prompt: 64, output: 8 };
/// `floor` sends a request when one would have been over so many times: one is in flight at a time, and queues do not form.
const ROOM: f64 = 2.5;
/// Requests that find the capacity of a fleet, in virtual time.
const PROBE: u64 = 1_200;
/// Requests that find how fast `floor` and `saturation` are, after as many that are not looked at.
const TUNING: u64 = 400;
/// The fewest requests of a block: below that its mean says little.
const MIN_REQUESTS: u64 = 20;
/// The longest wait for an answer.
const TIMEOUT: Dur = Dur::from_secs(60);
/// What of a wait is spent looking at the clock: the 50 us by which the kernel wakes late, and something.
const SPIN: Dur = Dur::from_micros(80);

/// The load of a regime.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Fleet as started.
    pub scenario: Scenario,
    /// What a block sends.
    pub pattern: Pattern,
    /// The same in words.
    pub words: String,
}

/// The fleet of `regime`: the scenario's own, or with engines that answer at once.
pub fn fleet_of(regime: Regime, scenario: &Scenario) -> Scenario {
    let mut fleet = scenario.clone();
    match regime {
        Regime::Realistic => {}
        Regime::Floor | Regime::FloorUnpinned | Regime::Saturation => {
            for group in &mut fleet.engines {
                let model = group.model_name();
                *group = EngineGroup { model, ..EngineGroup::of(group.count, "instant") };
            }
        }
    }
    fleet
}

/// How much of the load of a regime is not left to the lab.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Requests of a block, instead of as many as fill its time.
    pub requests: Option<u64>,
    /// Requests in flight in `saturation`.
    pub in_flight: u32,
}

/// Finds out what a block of `regime` sends so that its load lasts about `block`, as far as `amount` leaves that open.
///
/// # Errors
/// If the load cannot be sent, or a recorded trace cannot be read.
pub async fn tune(
    regime: Regime,
    fleet: &Fleet,
    scenario: &Scenario,
    clock: RunClock,
    block: Dur,
    amount: Amount,
) -> Result<Bench, BenchError> {
    let Amount { requests, in_flight } = amount;
    let scenario = fleet_of(regime, scenario);
    let seconds = block.as_secs_f64();
    let many = |per_second: f64| requests.unwrap_or(((per_second * seconds).round() as u64).max(MIN_REQUESTS));
    let (pattern, words) = match regime {
        Regime::Floor | Regime::FloorUnpinned => {
            let (mean, _) = closed(fleet, &scenario, clock, 1).await?;
            // Whole tens, so that two runs on one machine mostly ask for the same.
            let per_second = (1e6 / (mean * ROOM) / 10.0).floor().max(1.0) * 10.0;
            let requests = many(per_second);
            let words = format!("one request at a time, {per_second} a second");
            (Pattern::FixedRate { per_second, requests, lengths: SMALL }, words)
        }
        Regime::Saturation => {
            let (_, per_second) = closed(fleet, &scenario, clock, in_flight).await?;
            let words = format!("{in_flight} requests in flight");
            (Pattern::Closed { in_flight, requests: many(per_second), lengths: SMALL }, words)
        }
        Regime::Realistic => {
            let capacity = capacity(&scenario)?;
            let per_second = capacity * UTILISATION;
            let share = UTILISATION * 100.0;
            let words = format!("Poisson, {per_second:.1} requests a second, {share:.0} % of {capacity:.1}");
            let mut arrivals = scenario.clone();
            arrivals.workload.arrivals = Some(Arrivals::Poisson { rate: per_second });
            // How many and for how long is the lab's to say.
            (arrivals.requests, arrivals.duration) = (None, None);
            (Pattern::of_scenario(&arrivals, Seed(scenario.seed), many(per_second))?, words)
        }
    };
    Ok(Bench { scenario, pattern, words })
}

/// Why a load cannot be found or sent.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It cannot be sent.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It cannot be planned.
    #[error(transparent)]
    Plan(#[from] ReplayError),
    /// Nothing is answered.
    #[error("{failed} of {sent} requests failed before anything was measured: {example}")]
    Broken {
        /// How many failed.
        failed: usize,
        /// How many were sent.
        sent: usize,
        /// How one of them failed.
        example: String,
    },
}

/// What sends `pattern` to the gateway of `fleet`.
///
/// # Errors
/// If it cannot be sent.
pub fn loader(fleet: &Fleet, scenario: &Scenario, clock: RunClock, pattern: Pattern) -> Result<Loader, LoadError> {
    let api = scenario.workload.api;
    let spec = LoadSpec {
        uri: fleet.uri(path_of(api)),
        api,
        model: scenario.model(),
        headers: HeaderMap::new(),
        pattern,
        timeout: TIMEOUT,
        spin: SPIN,
        seed: Seed(scenario.seed),
    };
    Loader::new(clock, spec)
}

/// A short load that touches everything once.
pub fn warm_up(regime: Regime) -> Pattern {
    let (requests, lengths) = match regime {
        Regime::Realistic => (32, Lengths { prompt: 512, output: 32 }),
        Regime::Floor | Regime::FloorUnpinned | Regime::Saturation => (200, SMALL),
    };
    Pattern::Closed { in_flight: 8, requests, lengths }
}

/// Mean latency in microseconds and answers per second with so many requests in flight.
async fn closed(fleet: &Fleet, scenario: &Scenario, clock: RunClock, in_flight: u32) -> Result<(f64, f64), BenchError> {
    let pattern = Pattern::Closed { in_flight, requests: TUNING, lengths: SMALL };
    let loader = loader(fleet, scenario, clock, pattern)?;
    let mut seen = (0.0, 0.0);
    // The second time connections are made and code is warm. Numbers that no block of the run has.
    for block in [u64::MAX - 1, u64::MAX] {
        let samples = loader.run(block).await?;
        if let Some(failure) = samples.iter().find_map(|s| s.failure) {
            let failed = samples.iter().filter(|s| !s.ok()).count();
            return Err(BenchError::Broken { failed, sent: samples.len(), example: format!("{failure:?}") });
        }
        let first = samples.iter().map(|s| s.intended).min().unwrap_or(Time::ZERO);
        let last = samples.iter().map(|s| s.last).max().unwrap_or(Time::ZERO);
        let mean = Summary::of(samples.iter().map(|s| s.e2e().as_micros_f64()).collect()).mean;
        seen = (mean, samples.len() as f64 / last.since(first).as_secs_f64().max(1e-6));
    }
    Ok(seen)
}

/// Requests per second that the fleet answers with as many requests in flight as its batches hold: a closed loop in virtual time.
///
/// # Errors
/// If the scenario replays a trace that cannot be read.
pub fn capacity(scenario: &Scenario) -> Result<f64, ReplayError> {
    let mut closed = scenario.clone();
    let full: u32 = scenario.engines.iter().map(|g| g.count.saturating_mul(g.scheduler.max_num_seqs)).sum();
    let think_time = ThinkTime::Constant(shared::units::HumanDur(Dur::ZERO));
    closed.workload.arrivals = Some(Arrivals::Closed { concurrency: full.clamp(1, MAX_FULL), think_time });
    closed.trace = None;
    closed.duration = None;
    closed.requests = Some(PROBE.max(u64::from(full.min(MAX_FULL)) * 6));
    let seed = Seed(scenario.seed);
    let mut ends = Ends::default();
    virtual_time::run(&closed, Plan::new(&closed, seed)?, seed, &Telemetry::off(), &mut ends)?;
    Ok(ends.rate())
}

/// More requests in flight than this are not needed to fill any fleet that one machine can carry.
const MAX_FULL: u32 = 2_048;

/// When requests of a closed loop ended well.
#[derive(Default)]
struct Ends(Vec<Time>);

impl Ends {
    /// In the middle: batches fill at the start and empty at the end.
    fn rate(&mut self) -> f64 {
        self.0.sort();
        let n = self.0.len();
        let (from, to) = (n / 4, n.saturating_sub(n / 4 + 1));
        let seconds = self.0.get(to).zip(self.0.get(from)).map_or(0.0, |(to, from)| to.since(*from).as_secs_f64());
        if seconds > 0.0 { (to - from) as f64 / seconds } else { 0.0 }
    }
}

impl Observer for Ends {
    fn request(&mut self, row: &RequestRow, _: &[Dur]) {
        if row.outcome == Outcome::Ok {
            self.0.extend(row.done);
        }
    }

    fn go_on(&mut self, _: Time) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(count: u32, seqs: u32) -> Scenario {
        let yaml = format!(
            "name: t\nengines: [{{count: {count}, scheduler: {{max_num_seqs: {seqs}}}}}]\nworkload:\n  arrivals: {{process: \
             poisson, rate: 1}}\n  prompt_tokens: 64\n  output_tokens: 40\nrequests: 1\n"
        );
        shared::config::load_str::<Scenario>("t", &yaml, &[]).unwrap().config
    }

    #[test]
    fn capacity_grows_with_the_fleet_and_never_changes() {
        let one = capacity(&scenario(1, 4)).unwrap();
        let two = capacity(&scenario(2, 4)).unwrap();
        assert!(one > 0.0);
        // Not twice: a full fleet is not full everywhere at every moment, and that is part of what it can do.
        assert!((1.2..2.1).contains(&(two / one)), "{one} {two}");
        assert_eq!(capacity(&scenario(1, 4)).unwrap(), one);
        assert!(capacity(&scenario(1, 8)).unwrap() > 1.2 * one);
    }

    #[test]
    fn fast_regimes_put_instant_engines_behind_the_same_model() {
        let own = scenario(3, 4);
        let instant = fleet_of(Regime::Saturation, &own);
        assert_eq!((instant.model(), instant.engine_count()), (own.model(), 3));
        assert!(instant.engines.iter().all(|g| g.profile == "instant"));
        assert_eq!(fleet_of(Regime::Realistic, &own), own);
    }
}
