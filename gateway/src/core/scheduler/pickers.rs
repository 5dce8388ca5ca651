//! Pickers: which of the scored candidates gets the request.

use shared::rng::Stream;

use crate::core::scheduler::{Picked, Picker};

/// `max-score-picker`: the highest score; chance decides between equals (llm-d shuffles, then sorts).
#[derive(Debug)]
pub struct MaxScore;

impl Picker for MaxScore {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut equal = scores.iter().enumerate().filter(|&(_, s)| *s == best).map(|(i, _)| i);
        let count = equal.clone().count();
        let nth = if count > 1 { random.below(count) } else { 0 };
        let index = equal.nth(nth).expect("the best score is one of the scores");
        Picked { index, ties: count as u32 - 1 }
    }
}

/// `random-picker`: any candidate, whatever its score.
#[derive(Debug)]
pub struct Random;

impl Picker for Random {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        Picked { index: random.below(scores.len()), ties: scores.len() as u32 - 1 }
    }
}

/// `weighted-random-picker`: with a probability proportional to the score.
///
/// A-Res (Efraimidis and Spirakis 2006): the greatest of U^(1/score), compared here as ln(U)/score. If no score is above 0, all
/// candidates are equal.
#[derive(Debug)]
pub struct WeightedRandom;

impl Picker for WeightedRandom {
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked {
        let mut best: Option<(usize, f64)> = None;
        for (i, &score) in scores.iter().enumerate().filter(|(_, s)| **s > 0.0) {
            let key = (1.0 - random.unit()).ln() / score;
            if best.is_none_or(|(_, k)| key > k) {
                best = Some((i, key));
            }
        }
        best.map_or_else(|| Random.pick(scores, random), |(index, _)| Picked { index, ties: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::rng::Seed;

    /// How often each of the candidates is picked in 10,000 draws.
    fn shares<const N: usize>(picker: &dyn Picker, scores: [f64; N]) -> [u32; N] {
        let mut random = Seed(1).stream("pick");
        let mut shares = [0; N];
        for _ in 0..10_000 {
            shares[picker.pick(&scores, &mut random).index] += 1;
        }
        shares
    }

    fn about(found: u32, expect: u32) -> bool {
        found.abs_diff(expect) < 200
    }

    #[test]
    fn max_score_takes_the_best_and_shares_ties_evenly() {
        assert_eq!(shares(&MaxScore, [0.5, 0.9, 0.2]), [0, 10_000, 0]);
        let tied = shares(&MaxScore, [0.9, 0.1, 0.9]);
        assert!(about(tied[0], 5000) && tied[1] == 0, "{tied:?}");
        let picked = MaxScore.pick(&[1.0, 1.0, 1.0], &mut Seed(1).stream("pick"));
        assert_eq!(picked.ties, 2);
    }

    #[test]
    fn random_ignores_scores() {
        let found = shares(&Random, [0.0, 9.0]);
        assert!(about(found[0], 5000), "{found:?}");
    }

    #[test]
    fn weighted_random_follows_scores() {
        let found = shares(&WeightedRandom, [1.0, 0.0, 3.0]);
        assert!(about(found[0], 2500) && found[1] == 0, "{found:?}");
        let zero = shares(&WeightedRandom, [0.0, 0.0]);
        assert!(about(zero[0], 5000), "{zero:?}");
    }
}
