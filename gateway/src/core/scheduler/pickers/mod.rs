//! Pickers: which of the scored candidates gets the request. llm-d's pickers hand out up to `maxNumOfEndpoints` of them; the first
//! is the one that is used, here and there.

mod max_score;
mod random;
mod round_robin;
mod weighted_random;

pub use max_score::MaxScore;
pub use random::Random;
pub use round_robin::RoundRobin;
pub use weighted_random::WeightedRandom;

#[cfg(test)]
mod testing {
    use shared::rng::Seed;

    use crate::core::scheduler::Picker;

    /// How often each of the candidates is picked in 10,000 draws.
    pub(super) fn shares<const N: usize>(picker: &dyn Picker, scores: [f64; N]) -> [u32; N] {
        let mut random = Seed(1).stream("pick");
        let mut shares = [0; N];
        for _ in 0..10_000 {
            shares[picker.pick(&scores, &mut random).index] += 1;
        }
        shares
    }

    pub(super) fn about(found: u32, expect: u32) -> bool {
        found.abs_diff(expect) < 200
    }
}
