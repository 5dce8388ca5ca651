//! `latency-scorer`: by what a predictor says the objectives leave; without any prediction by cache, queue and prefix.
//!
//! Candidates that meet both objectives (or of which nothing is predicted) are rated, all others get 0. If none does, the idle ones
//! are, else those that miss only the time per token, else only the time to first token, else both. Within such a group each
//! headroom is normalised to its span, weighted (`ttftWeight` 0.8, `tpotWeight` 0.2; a span of 0 has no weight if the other has
//! one), and rated in hundredths: the least headroom is best (`headroomSelectionStrategy: least`), or the most; the least deficit
//! always. Without predictions: the weighted mean of free cache, (max - waiting) / max and matched / total blocks.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints by predicted latency.
#[derive(Debug)]
pub struct Latency {
    ttft_weight: f64,
    tpot_weight: f64,
    most: bool,
    kv: f64,
    queue: f64,
    prefix: f64,
}

/// Steps of a score.
const STEPS: f64 = 100.0;
/// Spans up to this count as none.
const NO_SPAN: f64 = 1e-9;

impl Latency {
    /// From llm-d's parameters.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<Latency, PluginError> {
        p.prefix_producer()?;
        p.latency_producer()?;
        let mut weight = |name, default| p.number(name, default, 0.0, f64::MAX);
        let (ttft, tpot) = (weight("ttftWeight", 0.8)?, weight("tpotWeight", 0.2)?);
        let kv = weight("compositeKVWeight", 1.0)?;
        let (queue, prefix) = (weight("compositeQueueWeight", 1.0)?, weight("compositePrefixWeight", 1.0)?);
        let strategy = p.word("headroomSelectionStrategy", "least", &["least", "most"])?;
        let (ttft_weight, tpot_weight) = normalised([ttft, tpot]).map_or((1.0, 0.0), |[a, b]| (a, b));
        let [kv, queue, prefix] = normalised([kv, queue, prefix]).unwrap_or([1.0, 0.0, 0.0]);
        Ok(Latency { ttft_weight, tpot_weight, most: strategy == "most", kv, queue, prefix })
    }

    /// The scores where nothing is predicted.
    fn composite(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let longest = candidates.iter().map(|c| c.waiting).max().unwrap_or(0);
        for (score, c) in scores.iter_mut().zip(candidates) {
            let queue = if longest == 0 { 1.0 } else { f64::from(longest - c.waiting) / f64::from(longest) };
            let sum = self.kv * (1.0 - c.kv_usage) + self.queue * queue + self.prefix * view.matched_share(c);
            *score = (sum * STEPS).round() / STEPS;
        }
    }

    /// Rates the candidates of one group; the others keep their 0.
    fn rate(
        &self,
        all: &[Candidate],
        scores: &mut [f64],
        most: bool,
        headroom: impl Fn(&Candidate) -> Option<[f64; 2]>,
    ) {
        let mut spans = [Span::NONE; 2];
        for values in all.iter().filter_map(&headroom) {
            spans.iter_mut().zip(values).for_each(|(span, v)| span.take(v.abs()));
        }
        let weights = match spans.map(|s| s.width() > NO_SPAN) {
            [false, true] => [0.0, 1.0],
            [true, false] => [1.0, 0.0],
            [true, true] | [false, false] => [self.ttft_weight, self.tpot_weight],
        };
        for (score, c) in scores.iter_mut().zip(all) {
            let Some(values) = headroom(c) else { continue };
            let parts = spans.iter().zip(values).zip(weights).map(|((span, v), w)| w * span.place(v.abs()));
            let combined: f64 = parts.sum();
            let better = if most { combined } else { 1.0 - combined };
            // llm-d's hundredths begin at 1 and end at 101; what is above 1 is clamped there as here.
            *score = (((better * STEPS).trunc() + 1.0) / STEPS).min(1.0);
        }
    }
}

/// The least and the greatest of some values.
#[derive(Clone, Copy)]
struct Span {
    min: f64,
    max: f64,
}

impl Span {
    const NONE: Span = Span { min: f64::MAX, max: f64::MIN };

    fn take(&mut self, v: f64) {
        (self.min, self.max) = (self.min.min(v), self.max.max(v));
    }

    fn width(self) -> f64 {
        self.max - self.min
    }

    /// Where `v` lies, 0 to 1.
    fn place(self, v: f64) -> f64 {
        if self.width() > NO_SPAN { (v - self.min) / self.width() } else { 0.5 }
    }
}

fn normalised<const N: usize>(weights: [f64; N]) -> Option<[f64; N]> {
    let sum: f64 = weights.iter().sum();
    (sum > 0.0 && sum.is_finite()).then(|| weights.map(|w| w / sum))
}

/// How an endpoint stands to the objectives, the best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    Meets,
    Idle,
    MissesTpot,
    MissesTtft,
    MissesBoth,
}

fn tier(view: &View<'_>, c: &Candidate) -> (Tier, [f64; 2]) {
    let Some(p) = view.prediction(c) else { return (Tier::Meets, [0.0; 2]) };
    let headroom = [p.ttft_headroom_ms, p.tpot_headroom_ms];
    let tier = match headroom.map(|h| h < 0.0) {
        [false, false] => Tier::Meets,
        _ if p.dispatched == 0 => Tier::Idle,
        [false, true] => Tier::MissesTpot,
        [true, false] => Tier::MissesTtft,
        [true, true] => Tier::MissesBoth,
    };
    (tier, headroom)
}

impl Scorer for Latency {
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        if !candidates.iter().any(|c| view.prediction(c).is_some()) {
            return self.composite(view, candidates, scores);
        }
        scores.fill(0.0);
        let Some(best) = candidates.iter().map(|c| tier(view, c).0).min() else { return };
        let most = self.most && best == Tier::Meets;
        self.rate(candidates, scores, most, |c| {
            let (tier, headroom) = tier(view, c);
            (tier == best).then_some(headroom)
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::Prediction;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, view};

    fn predicted(parameters: Value, predictions: [Option<(f64, f64, u32)>; 4], expect: [f64; 4]) {
        let pool = Pool::default();
        let predictions = predictions.map(|p| {
            p.map(|(ttft_headroom_ms, tpot_headroom_ms, dispatched)| Prediction {
                ttft_ms: 0.0,
                ttft_headroom_ms,
                tpot_headroom_ms,
                dispatched,
            })
        });
        let view = View { predictions: &predictions, ..view(&pool) };
        check(&read(parameters, Latency::read).unwrap(), &view, candidates(4, |_, _| {}), expect);
    }

    #[test]
    fn the_least_headroom_is_best_or_the_most() {
        let all = [Some((0.0, 0.0, 1)), Some((100.0, 50.0, 1)), Some((200.0, 100.0, 1)), Some((-1.0, 0.0, 1))];
        // Hundredths of 1 - (0, 0.5, 1), each a step above.
        predicted(json!({}), all, [1.0, 0.51, 0.01, 0.0]);
        predicted(json!({"headroomSelectionStrategy": "most"}), all, [0.01, 0.51, 1.0, 0.0]);
    }

    #[test]
    fn a_dimension_without_a_span_has_no_weight() {
        let all = [Some((5.0, 0.0, 1)), Some((5.0, 50.0, 1)), Some((5.0, 100.0, 1)), Some((5.0, 100.0, 1))];
        predicted(json!({}), all, [1.0, 0.51, 0.01, 0.01]);
        // Neither has one: both lie in the middle.
        predicted(json!({}), [Some((5.0, 5.0, 1)); 4], [0.51; 4]);
    }

    #[test]
    fn deficits_are_graded() {
        let (idle, tpot, ttft, both) = ((-9.0, -9.0, 0), (1.0, -1.0, 1), (-1.0, 1.0, 1), (-1.0, -1.0, 1));
        predicted(json!({}), [Some(idle), Some(tpot), Some(ttft), Some(both)], [0.51, 0.0, 0.0, 0.0]);
        predicted(json!({}), [Some(both), Some(tpot), Some(ttft), Some(both)], [0.0, 0.51, 0.0, 0.0]);
        predicted(json!({}), [Some(both), Some(both), Some(ttft), Some(both)], [0.0, 0.0, 0.51, 0.0]);
        // The least deficit is best whatever the strategy.
        let all = [Some((-10.0, -1.0, 1)), Some((-20.0, -1.0, 1)), Some((-30.0, -1.0, 1)), Some((-30.0, -1.0, 1))];
        predicted(json!({"headroomSelectionStrategy": "most"}), all, [1.0, 0.51, 0.01, 0.01]);
    }

    #[test]
    fn what_nobody_predicts_counts_as_meeting_them() {
        predicted(json!({}), [None, Some((-1.0, -1.0, 1)), None, Some((-1.0, -1.0, 1))], [0.51, 0.0, 0.51, 0.0]);
    }

    #[test]
    fn without_predictions_cache_queue_and_prefix_count() {
        let pool = Pool::default();
        let view = View { prefix_blocks: 10, ..view(&pool) };
        let all = || {
            candidates(3, |i, c| {
                (c.kv_usage, c.waiting, c.matched_blocks) = ([0.1, 0.5, 0.9][i], [0, 5, 10][i], [0, 6, 10][i]);
            })
        };
        let scores = |parameters, expect| check(&read(parameters, Latency::read).unwrap(), &view, all(), expect);
        scores(json!({}), [0.63, 0.53, 0.37]);
        scores(json!({"compositeQueueWeight": 0, "compositePrefixWeight": 0}), [0.9, 0.5, 0.1]);
        let none = json!({"compositeKVWeight": 0, "compositeQueueWeight": 0, "compositePrefixWeight": 0});
        scores(none, [0.9, 0.5, 0.1]);
    }
}
