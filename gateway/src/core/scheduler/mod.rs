//! Choosing an endpoint: filters, scorers and a picker over a snapshot of candidates.
//!
//! A plugin is a pure function of the snapshot behind a one-method trait; it sees neither sockets nor other requests.

pub mod filters;
pub mod pickers;
pub mod registry;
pub mod scorers;

use std::sync::Arc;

use shared::rng::Stream;
use shared::time::{Dur, Stage, Stopwatch, Time};
use shared::trace::Trail;

use crate::core::config::ProfileConfig;
use crate::core::pool::{EndpointId, Pool, Role};
use crate::core::scheduler::registry::Reads;
use crate::spans::{GatewayFact, PluginName};

/// What is known of one endpoint when a request is scheduled. Without metrics the loads are 0, as in llm-d.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The endpoint.
    pub id: EndpointId,
    /// Whether it may get new requests.
    pub available: bool,
    /// What it is for.
    pub role: Role,
    /// Requests in its queue.
    pub waiting: u32,
    /// Requests in its batch.
    pub running: u32,
    /// Used part of its KV cache, 0 to 1.
    pub kv_usage: f64,
    /// Leading blocks of the prompt that it was sent before.
    pub matched_blocks: u32,
    /// Whether the request's session was here last.
    pub had_session: bool,
}

/// What plugins see besides the candidates.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Configuration of the endpoints.
    pub pool: &'a Pool,
    /// Blocks in the prompt's prefix.
    pub prefix_blocks: u32,
}

/// Takes candidates out.
pub trait Filter: Send + Sync {
    /// Removes from `candidates` what must not be used, keeping the order.
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>);
}

/// Rates candidates.
pub trait Scorer: Send + Sync {
    /// Sets `scores[i]` for `candidates[i]`, 0 (worst) to 1 (best); what lies outside is clamped.
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]);
}

/// Chooses one of the candidates by their weighted scores.
pub trait Picker: Send + Sync {
    /// The chosen candidate's place in `scores`, which is not empty, and how many others were as good.
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked;
}

/// A picker's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Place of the chosen candidate.
    pub index: usize,
    /// Other candidates between which and this one only chance decided.
    pub ties: u32,
}

/// The most endpoints that are recorded with their scores.
pub const MAX_TOP: usize = 5;

/// One profile: its plugins, and room for their work.
pub struct Scheduler {
    profile: Arc<str>,
    filters: Vec<(Arc<PluginName>, Box<dyn Filter>)>,
    scorers: Vec<(Arc<PluginName>, f64, Box<dyn Scorer>)>,
    picker: (Arc<PluginName>, Box<dyn Picker>),
    reads_prefix: bool,
    reads_session: bool,
    random: Stream,
    /// The candidates of the next decision; filters take from it.
    pub(crate) candidates: Vec<Candidate>,
    scores: Vec<f64>,
    totals: Vec<f64>,
}

impl Scheduler {
    /// A scheduler for a valid profile; `random` breaks ties.
    pub fn new(config: &ProfileConfig, random: Stream) -> Scheduler {
        const VALID: &str = "the profile is validated before it is used";
        let mut reads = Vec::new();
        let filters = config.filters.iter().map(|c| {
            let made = registry::filter(&c.kind, &c.parameters).expect(VALID);
            (PluginName::new(made.kind, c.name.as_deref()), made.plugin)
        });
        let scorers = config.scorers.iter().map(|c| {
            let (made, read) = registry::scorer(&c.kind, &c.parameters).expect(VALID);
            reads.push(read);
            (PluginName::new(made.kind, c.name.as_deref()), c.weight, made.plugin)
        });
        let (filters, scorers) = (filters.collect(), scorers.collect());
        let picker = registry::picker(&config.picker.kind, &config.picker.parameters).expect(VALID);
        Scheduler {
            profile: config.name.as_str().into(),
            filters,
            scorers,
            picker: (PluginName::new(picker.kind, config.picker.name.as_deref()), picker.plugin),
            reads_prefix: reads.contains(&Reads::Prefix),
            reads_session: reads.contains(&Reads::Session),
            random,
            candidates: Vec::new(),
            scores: Vec::new(),
            totals: Vec::new(),
        }
    }

    pub(crate) const fn reads_prefix(&self) -> bool {
        self.reads_prefix
    }

    pub(crate) const fn reads_session(&self) -> bool {
        self.reads_session
    }

    /// Chooses one of `candidates`, starting at `at`; also returns when it was done.
    ///
    /// `now` is when the request came in: ages of metrics are measured from it.
    pub(crate) fn schedule(
        &mut self,
        now: Time,
        at: Time,
        view: &View<'_>,
        trail: &Trail<GatewayFact>,
        watch: &mut dyn Stopwatch,
    ) -> (Option<EndpointId>, Time) {
        let initial = self.candidates.len() as u32;
        trail.note(at, || GatewayFact::Scheduling { profile: self.profile.clone(), candidates: initial });
        let filtered = self.filter(at, view, trail, watch);
        if self.candidates.is_empty() {
            trail.note(filtered, || GatewayFact::Scheduled { choice: None, metrics_age: None, candidates: 0 });
            return (None, filtered);
        }
        let metrics_age = if trail.is_recording() { self.oldest_metrics(view, now) } else { None };
        self.score(view, trail, watch);
        let (picked, at) = self.pick(view, trail, watch);
        let candidates = self.candidates.len() as u32;
        let choice = trail.is_recording().then(|| self.choice(picked));
        trail.note(at, || GatewayFact::Scheduled { choice, metrics_age, candidates });
        (Some(self.candidates[picked.index].id), at)
    }

    fn filter(&mut self, mut at: Time, view: &View<'_>, trail: &Trail<GatewayFact>, watch: &mut dyn Stopwatch) -> Time {
        for (name, plugin) in &self.filters {
            let before = self.candidates.len() as u32;
            plugin.filter(view, &mut self.candidates);
            at = watch.lap(Stage::Filter { endpoints: before });
            let after = self.candidates.len() as u32;
            trail.note(at, || GatewayFact::Filtered { plugin: Arc::clone(name), before, after });
            if after == 0 {
                break;
            }
        }
        at
    }

    fn score(&mut self, view: &View<'_>, trail: &Trail<GatewayFact>, watch: &mut dyn Stopwatch) {
        let n = self.candidates.len();
        self.totals.clear();
        self.totals.resize(n, 0.0);
        self.scores.clear();
        self.scores.resize(n, 0.0);
        for (name, weight, plugin) in &self.scorers {
            self.scores.fill(0.0);
            plugin.score(view, &self.candidates, &mut self.scores);
            for (score, total) in self.scores.iter_mut().zip(&mut self.totals) {
                *score = if score.is_nan() { 0.0 } else { score.clamp(0.0, 1.0) };
                *total += *score * weight;
            }
            let at = watch.lap(Stage::Score { endpoints: n as u32 });
            trail.note(at, || {
                let (min, max, avg) = if trail.is_recording() { spread(&self.scores) } else { Default::default() };
                GatewayFact::Scored { plugin: Arc::clone(name), weight: *weight, min, max, avg }
            });
        }
    }

    fn pick(&mut self, view: &View<'_>, trail: &Trail<GatewayFact>, watch: &mut dyn Stopwatch) -> (Picked, Time) {
        let picked = self.picker.1.pick(&self.totals, &mut self.random);
        let at = watch.lap(Stage::Pick { endpoints: self.candidates.len() as u32 });
        if trail.is_recording() {
            for i in self.top() {
                let name = &view.pool.get(self.candidates[i].id).config.name;
                trail.note(at, || GatewayFact::Top { endpoint: Arc::clone(name), score: self.totals[i] });
            }
        }
        trail.note(at, || GatewayFact::Picked {
            plugin: Arc::clone(&self.picker.0),
            index: picked.index as u32,
            ties: picked.ties,
        });
        (picked, at)
    }

    /// The best candidates, best first; equals in the order of their ids.
    fn top(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.totals.len()).collect();
        order.sort_by(|a, b| self.totals[*b].total_cmp(&self.totals[*a]));
        order.truncate(MAX_TOP);
        order
    }

    /// The choice and the best of the others.
    fn choice(&self, picked: Picked) -> Choice {
        let others = self.totals.iter().enumerate().filter(|(i, _)| *i != picked.index).map(|(_, s)| *s);
        Choice { score: self.totals[picked.index], runner_up: others.reduce(f64::max) }
    }

    fn oldest_metrics(&self, view: &View<'_>, now: Time) -> Option<Dur> {
        self.candidates.iter().filter_map(|c| view.pool.get(c.id).metrics_age(now)).max()
    }
}

/// How clear a choice was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Weighted score of the chosen endpoint.
    pub score: f64,
    /// The best weighted score of the others, if there are any.
    pub runner_up: Option<f64>,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").field("profile", &self.profile).finish_non_exhaustive()
    }
}

fn spread(scores: &[f64]) -> (f64, f64, f64) {
    let (min, max) = scores.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), s| (lo.min(*s), hi.max(*s)));
    (min, max, scores.iter().sum::<f64>() / scores.len() as f64)
}

/// Candidates for the tables of plugin tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn candidate(id: u32) -> Candidate {
        Candidate {
            id: EndpointId(id),
            available: true,
            role: Role::Both,
            waiting: 0,
            running: 0,
            kv_usage: 0.0,
            matched_blocks: 0,
            had_session: false,
        }
    }

    pub(crate) fn candidates(n: u32, change: impl Fn(usize, &mut Candidate)) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = (0..n).map(candidate).collect();
        all.iter_mut().enumerate().for_each(|(i, c)| change(i, c));
        all
    }
}
