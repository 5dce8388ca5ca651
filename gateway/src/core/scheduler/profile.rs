//! One profile: its filters in order, then its scorers, then its picker.

use std::sync::Arc;

use shared::rng::Stream;
use shared::time::{Dur, Stage, Stopwatch, Time};
use shared::trace::Trail;

use crate::core::config::ProfileConfig;
use crate::core::scheduler::explain;
use crate::core::scheduler::registry::{self, Reads};
use crate::core::scheduler::{Candidate, Filter, MAX_TOP, Picked, Picker, Scorer, View};
use crate::spans::{GatewayFact, PluginName};

/// The plugins of a profile.
pub(crate) struct Profile {
    name: Arc<str>,
    filters: Vec<(Arc<PluginName>, Box<dyn Filter>)>,
    scorers: Vec<(Arc<PluginName>, f64, Box<dyn Scorer>)>,
    picker: (Arc<PluginName>, Box<dyn Picker>),
    reads: Reads,
}

/// What the profiles work in, kept from request to request.
#[derive(Debug)]
pub(crate) struct Room {
    /// The candidates; filters take from them.
    pub(crate) candidates: Vec<Candidate>,
    scores: Vec<f64>,
    totals: Vec<f64>,
    random: Stream,
}

/// The request that is scheduled.
pub(crate) struct Run<'a> {
    /// When it came in: ages of metrics are measured from it.
    pub(crate) now: Time,
    pub(crate) view: View<'a>,
    pub(crate) trail: &'a Trail<GatewayFact>,
    pub(crate) watch: &'a mut dyn Stopwatch,
}

/// What a profile chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    pub(crate) candidate: Candidate,
    /// Whether no candidate had any block of the prompt, if a plugin of the profile asks that.
    pub(crate) cold: Option<bool>,
    /// Whether the endpoint that the session is bound to was among the candidates.
    pub(crate) session_present: bool,
}

/// How clear a choice was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Weighted score of the chosen endpoint.
    pub score: f64,
    /// The best weighted score of the others, if there are any.
    pub runner_up: Option<f64>,
}

impl Room {
    pub(crate) const fn new(random: Stream) -> Room {
        Room { candidates: Vec::new(), scores: Vec::new(), totals: Vec::new(), random }
    }
}

impl Profile {
    /// The profile of a valid configuration.
    pub(crate) fn new(config: &ProfileConfig) -> Profile {
        const VALID: &str = "the profile is validated before it is used";
        let mut reads = Reads::METRICS;
        let filters = config.filters.iter().map(|c| {
            let made = registry::filter(&c.kind, &c.parameters).expect(VALID);
            reads = reads.and(made.reads);
            (PluginName::new(made.kind, c.name.as_deref()), made.plugin)
        });
        let filters = filters.collect();
        let scorers = config.scorers.iter().map(|c| {
            let made = registry::scorer(&c.kind, &c.parameters).expect(VALID);
            reads = reads.and(made.reads);
            (PluginName::new(made.kind, c.name.as_deref()), c.weight, made.plugin)
        });
        let scorers = scorers.collect();
        let picker = registry::picker(&config.picker.kind, &config.picker.parameters).expect(VALID);
        let picker = (PluginName::new(picker.kind, config.picker.name.as_deref()), picker.plugin);
        Profile { name: config.name.as_str().into(), filters, scorers, picker, reads }
    }

    pub(crate) const fn reads(&self) -> Reads {
        self.reads
    }

    /// Chooses one of the candidates in the room, starting at `at`; also returns when it was done.
    pub(crate) fn run(&self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Chosen>, Time) {
        let initial = room.candidates.len() as u32;
        run.trail.note(at, || GatewayFact::Scheduling { profile: Arc::clone(&self.name), candidates: initial });
        let explained = explain::wanted(run.trail);
        if explained {
            explain::candidates(at, &room.candidates, run);
        }
        let filtered = self.filter(at, room, run, explained);
        if room.candidates.is_empty() {
            run.trail.note(filtered, || GatewayFact::Scheduled { choice: None, metrics_age: None, candidates: 0 });
            return (None, filtered);
        }
        self.score(room, run, explained);
        let (picked, at) = self.pick(room, run);
        let chosen = self.chosen(room, picked);
        run.trail.note(at, || GatewayFact::Scheduled {
            choice: run.trail.is_recording().then(|| room.choice(picked)),
            metrics_age: if run.trail.is_recording() { room.oldest_metrics(run) } else { None },
            candidates: room.candidates.len() as u32,
        });
        (Some(chosen), at)
    }

    fn filter(&self, mut at: Time, room: &mut Room, run: &mut Run<'_>, explained: bool) -> Time {
        for (name, plugin) in &self.filters {
            let before = room.candidates.len() as u32;
            let all = explained.then(|| explain::before(&room.candidates));
            plugin.filter(&run.view, &mut room.candidates, &mut room.random);
            at = run.watch.lap(Stage::Filter { endpoints: before });
            let after = room.candidates.len() as u32;
            if let Some(all) = all {
                explain::removed(at, &all, &room.candidates, run);
            }
            run.trail.note(at, || GatewayFact::Filtered { plugin: Arc::clone(name), before, after });
            if after == 0 {
                break;
            }
        }
        at
    }

    fn score(&self, room: &mut Room, run: &mut Run<'_>, explained: bool) {
        let n = room.candidates.len();
        room.totals.clear();
        room.totals.resize(n, 0.0);
        room.scores.clear();
        room.scores.resize(n, 0.0);
        for (name, weight, plugin) in &self.scorers {
            room.scores.fill(0.0);
            plugin.score(&run.view, &room.candidates, &mut room.scores);
            for (score, total) in room.scores.iter_mut().zip(&mut room.totals) {
                *score = if score.is_nan() { 0.0 } else { score.clamp(0.0, 1.0) };
                *total += *score * weight;
            }
            let at = run.watch.lap(Stage::Score { endpoints: n as u32 });
            if explained {
                explain::scores(at, &room.candidates, &room.scores, *weight, run);
            }
            run.trail.note(at, || {
                let recording = run.trail.is_recording();
                let (min, max, avg) = if recording { spread(&room.scores) } else { Default::default() };
                GatewayFact::Scored { plugin: Arc::clone(name), weight: *weight, min, max, avg }
            });
        }
    }

    fn pick(&self, room: &mut Room, run: &mut Run<'_>) -> (Picked, Time) {
        let picked = self.picker.1.pick(&room.totals, &mut room.random);
        let at = run.watch.lap(Stage::Pick { endpoints: room.candidates.len() as u32 });
        if run.trail.is_recording() {
            for i in room.top() {
                let name = &run.view.pool.get(room.candidates[i].id).config.name;
                run.trail.note(at, || GatewayFact::Top { endpoint: Arc::clone(name), score: room.totals[i] });
            }
        }
        run.trail.note(at, || GatewayFact::Picked {
            plugin: Arc::clone(&self.picker.0),
            endpoint: Arc::clone(&run.view.pool.get(room.candidates[picked.index].id).config.name),
            index: picked.index as u32,
            ties: picked.ties,
        });
        (picked, at)
    }

    /// The choice, with what the producers remember of it; only looked at where a plugin reads it.
    fn chosen(&self, room: &Room, picked: Picked) -> Chosen {
        let all = &room.candidates;
        Chosen {
            candidate: all[picked.index],
            cold: self
                .reads
                .contains(Reads::COLD)
                .then(|| all.iter().all(|c| c.matched_blocks == 0 && c.kv.blocks == 0)),
            session_present: self.reads.contains(Reads::SESSION) && all.iter().any(|c| c.had_session),
        }
    }
}

impl Room {
    /// The best candidates, best first; equals in the order of their ids.
    fn top(&self) -> Vec<usize> {
        let best_first = |a: &usize, b: &usize| self.totals[*b].total_cmp(&self.totals[*a]).then(a.cmp(b));
        let mut order: Vec<usize> = (0..self.totals.len()).collect();
        if order.len() > MAX_TOP {
            order.select_nth_unstable_by(MAX_TOP, best_first);
            order.truncate(MAX_TOP);
        }
        order.sort_unstable_by(best_first);
        order
    }

    /// The choice and the best of the others.
    fn choice(&self, picked: Picked) -> Choice {
        let others = self.totals.iter().enumerate().filter(|(i, _)| *i != picked.index).map(|(_, s)| *s);
        Choice { score: self.totals[picked.index], runner_up: others.reduce(f64::max) }
    }

    fn oldest_metrics(&self, run: &Run<'_>) -> Option<Dur> {
        self.candidates.iter().filter_map(|c| run.view.pool.get(c.id).metrics_age(run.now)).max()
    }
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Profile").field("name", &self.name).finish_non_exhaustive()
    }
}

fn spread(scores: &[f64]) -> (f64, f64, f64) {
    let (min, max) = scores.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), s| (lo.min(*s), hi.max(*s)));
    (min, max, scores.iter().sum::<f64>() / scores.len() as f64)
}
