//! A ladder: one workload at one rate after the other, under several routing policies, in virtual time.
//!
//! Every policy climbs every rung with caches that a first phase has filled, as benchmarks of gateways do it (llm-d's, with
//! inference-perf). What is measured is the rung alone. The figures can stand next to published ones.

mod published;
mod table;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::{ConfigErrors, Problems, Validate};
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::trace::Telemetry;
use shared::units::HumanDur;

use crate::replay::ReplayError;
use crate::report::{Outcome, RequestRow};
use crate::scenario::{self, Scenario, Step};
use crate::virtual_time::{self, Observer};
use crate::workload::Plan;

pub use published::{Published, PublishedError};
pub use table::table;

/// A ladder file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ladder {
    /// The scenario: engines, workload and network. Relative to this file, as all paths here.
    pub scenario: PathBuf,
    /// What fills the caches before each rung; its pause lets all answers end.
    pub warm_up: Step,
    /// The rungs, from the lowest rate to the highest.
    pub rungs: Vec<Step>,
    /// The policies.
    pub policies: Vec<Policy>,
    /// Mean time to first token up to which a policy keeps up: above lies its knee.
    pub knee: HumanDur,
    /// The two policies whose throughput is compared at every rung, by name.
    pub compare: [String; 2],
}

/// A routing policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Its EndpointPickerConfig.
    pub epp_config: PathBuf,
    /// What a table of published figures calls it, or the nearest to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<String>,
}

/// What one policy did on one rung.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rung {
    /// Arrivals per second.
    pub rate: f64,
    /// Requests of the rung.
    pub requests: u64,
    /// Of these, those without a good answer.
    pub errors: u64,
    /// Tokens of all answers, per second from the first arrival possible to the last token.
    pub output_tokens_per_s: f64,
    /// Mean time to first token, in seconds.
    pub ttft_mean_s: f64,
    /// Its 90th percentile, in seconds.
    pub ttft_p90_s: f64,
    /// Mean time per output token after the first, in seconds.
    pub per_token_mean_s: f64,
    /// Part of the prompts' tokens that engines had cached.
    pub cached_share: f64,
}

/// A policy and its rungs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Climb {
    /// The policy's name.
    pub policy: String,
    /// One for each rung of the ladder.
    pub rungs: Vec<Rung>,
}

/// Why a ladder cannot be climbed.
#[derive(Debug, thiserror::Error)]
pub enum LadderError {
    /// The ladder, its scenario or a policy.
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    /// The workload.
    #[error("error: {0}")]
    Replay(#[from] ReplayError),
}

impl Validate for Ladder {
    fn validate(&self, p: &mut Problems) {
        for (i, step) in std::iter::once(&self.warm_up).chain(&self.rungs).enumerate() {
            let path = if i == 0 { "warm_up".to_owned() } else { format!("rungs[{}]", i - 1) };
            let positive = step.rate.is_finite() && step.rate > 0.0 && step.duration > HumanDur::default();
            p.check(positive, &path, "no rate or no duration", "a rate and a duration above 0");
        }
        p.check(!self.rungs.is_empty(), "rungs", "no rung", "one at least");
        p.check(!self.policies.is_empty(), "policies", "no policy", "one at least");
        for (i, name) in self.compare.iter().enumerate() {
            let known = self.policies.iter().any(|p| p.name == *name);
            p.check(known, &format!("compare[{i}]"), format!("{name:?}"), "the name of a policy");
        }
    }
}

impl Ladder {
    /// Reads a ladder; its paths are then meant from the working directory.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(path: &Path, overrides: &[(String, String)]) -> Result<Ladder, ConfigErrors> {
        let mut ladder = shared::config::load::<Ladder>(path, overrides)?.config;
        let beside = |p: &Path| path.parent().unwrap_or(Path::new("")).join(p);
        ladder.scenario = beside(&ladder.scenario);
        for policy in &mut ladder.policies {
            policy.epp_config = beside(&policy.epp_config);
        }
        Ok(ladder)
    }

    /// Climbs it with every policy; `done` is told of each rung.
    ///
    /// # Errors
    /// If the scenario or a policy is not valid.
    pub fn climb(&self, seed: Option<u64>, mut done: impl FnMut(&str, &Rung)) -> Result<Vec<Climb>, LadderError> {
        let all: Vec<Vec<Scenario>> = self
            .policies
            .iter()
            .map(|policy| self.rungs.iter().map(|rung| self.scenario(policy, rung, seed)).collect())
            .collect::<Result<_, ConfigErrors>>()?;
        let mut climbs = Vec::new();
        for (policy, scenarios) in self.policies.iter().zip(all) {
            let mut rungs = Vec::new();
            for (step, scenario) in self.rungs.iter().zip(&scenarios) {
                let rung = self.rung(step, scenario)?;
                done(&policy.name, &rung);
                rungs.push(rung);
            }
            climbs.push(Climb { policy: policy.name.clone(), rungs });
        }
        Ok(climbs)
    }

    /// When a rung begins: after the warm-up and its pause.
    fn start(&self) -> Time {
        Time::ZERO + self.warm_up.duration.get() + self.warm_up.pause.get()
    }

    /// The scenario of one rung.
    fn scenario(&self, policy: &Policy, rung: &Step, seed: Option<u64>) -> Result<Scenario, ConfigErrors> {
        let steps = serde_json::json!({ "process": "steps", "steps": [self.warm_up, rung] });
        let end = HumanDur(self.start().since(Time::ZERO) + rung.duration.get());
        let mut set = vec![
            ("mode".to_owned(), "virtual".to_owned()),
            ("gateway.epp_config".to_owned(), policy.epp_config.display().to_string()),
            ("workload.arrivals".to_owned(), steps.to_string()),
            ("duration".to_owned(), end.to_string()),
        ];
        set.extend(seed.map(|seed| ("seed".to_owned(), seed.to_string())));
        Ok(scenario::load(&self.scenario, &set)?.config)
    }

    fn rung(&self, step: &Step, scenario: &Scenario) -> Result<Rung, ReplayError> {
        let seed = Seed(scenario.seed);
        let plan = Plan::new(scenario, seed)?;
        let mut measured = Measured::new(self.start());
        virtual_time::run(scenario, plan, seed, &Telemetry::off(), &mut measured)?;
        Ok(measured.rung(step.rate))
    }
}

/// What is measured of a rung: requests that were meant for it, not those of the warm-up.
struct Measured {
    start: Time,
    last: Time,
    rung: Rung,
    ttft: Vec<Dur>,
    per_token: Vec<Dur>,
    output: u64,
    prompt: u64,
    cached: u64,
}

impl Measured {
    fn new(start: Time) -> Measured {
        let rung = Rung::default();
        let (ttft, per_token) = (Vec::new(), Vec::new());
        Measured { start, last: start, rung, ttft, per_token, output: 0, prompt: 0, cached: 0 }
    }

    fn rung(mut self, rate: f64) -> Rung {
        self.ttft.sort_unstable();
        let seconds = self.last.since(self.start).as_secs_f64();
        let mean = |all: &[Dur]| all.iter().map(|d| d.as_secs_f64()).sum::<f64>() / all.len().max(1) as f64;
        // The nearest rank, as reports have it.
        let p90 = (self.ttft.len() * 9).div_ceil(10).checked_sub(1).and_then(|i| self.ttft.get(i));
        Rung {
            rate,
            output_tokens_per_s: if seconds > 0.0 { self.output as f64 / seconds } else { 0.0 },
            ttft_mean_s: mean(&self.ttft),
            ttft_p90_s: p90.map_or(0.0, |d| d.as_secs_f64()),
            per_token_mean_s: mean(&self.per_token),
            cached_share: self.cached as f64 / self.prompt.max(1) as f64,
            ..self.rung
        }
    }
}

impl Observer for Measured {
    fn request(&mut self, row: &RequestRow, _: &[Dur]) {
        if row.intended < self.start {
            return;
        }
        self.rung.requests += 1;
        self.rung.errors += u64::from(row.outcome != Outcome::Ok);
        self.last = row.done.map_or(self.last, |done| done.max(self.last));
        self.output += u64::from(row.output_tokens);
        self.prompt += u64::from(row.prompt_tokens);
        self.cached += u64::from(row.cached_tokens);
        self.ttft.extend(row.ttft());
        self.per_token.extend(row.per_token());
    }

    fn go_on(&mut self, _: Time) -> bool {
        true
    }
}
