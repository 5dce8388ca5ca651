//! Lengths in tokens: fixed, drawn from a distribution, or as in a real trace.
//!
//! Every length is the quantile of one uniform number, so that changing a distribution changes no other draw.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A length: a number, or a distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Length {
    /// Always the same.
    Fixed(#[schemars(range(min = 1))] u32),
    /// Drawn.
    Drawn(Shape),
}

/// A distribution of lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "distribution", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Shape {
    /// Every length from `min` to `max` alike.
    Uniform {
        /// Shortest.
        #[schemars(range(min = 1))]
        min: u32,
        /// Longest.
        #[schemars(range(min = 1))]
        max: u32,
    },
    /// Log-normal, given by `median` and `sigma`, or by `mean` and `p99`.
    Lognormal {
        /// Median; with `sigma`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        median: Option<f64>,
        /// Standard deviation of the logarithm; with `median`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sigma: Option<f64>,
        /// Mean; with `p99`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean: Option<f64>,
        /// 99th percentile; with `mean`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        p99: Option<f64>,
        /// Longest; longer ones are cut.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        max: Option<u32>,
    },
    /// Conversations of the Azure LLM inference trace 2023.
    AzureConv {},
    /// Code completion: long prompts, short answers. A model after published medians, not fitted to a trace.
    AzureLikeCode {},
    /// Conversations of the Mooncake trace: long contexts.
    MooncakeConv {},
    /// Requests sampled from ShareGPT, long answers.
    Sharegpt {},
}

/// Which side of a request a length is of: the profiles of real traces have one table for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// The prompt.
    Prompt,
    /// The answer.
    Output,
}

impl Length {
    /// The length at quantile `u` in `[0, 1)`, at least 1.
    pub fn at(&self, u: f64, side: Builtin) -> u32 {
        match self {
            Length::Fixed(tokens) => *tokens,
            Length::Drawn(shape) => shape.at(u, side),
        }
    }

    /// The longest that can be drawn, where there is a longest.
    pub fn longest(&self, side: Builtin) -> Option<u32> {
        match self {
            Length::Fixed(tokens) => Some(*tokens),
            Length::Drawn(Shape::Uniform { max, .. }) => Some(*max),
            Length::Drawn(Shape::Lognormal { max, .. }) => *max,
            Length::Drawn(shape) => shape.table(side).map(|t| t[t.len() - 1]),
        }
    }
}

impl Shape {
    fn at(&self, u: f64, side: Builtin) -> u32 {
        let drawn = match self {
            Shape::Uniform { min, max } => f64::from(*min) + (u * (f64::from(*max) - f64::from(*min) + 1.0)).floor(),
            Shape::Lognormal { max, .. } => {
                let (mu, sigma) = self.log_parameters().unwrap_or_default();
                let drawn = (mu + sigma * normal_quantile(u)).exp().round();
                max.map_or(drawn, |max| drawn.min(f64::from(max)))
            }
            Shape::AzureLikeCode {} => {
                // The medians are those of the coding service in Splitwise (ISCA 2024, section III): 1,500 prompt and 13
                // output tokens. The spreads are a model: they put the means at about 2,000 and 28.
                let (median, sigma, max): (f64, f64, f64) = match side {
                    Builtin::Prompt => (1500.0, 0.79, 7_500.0),
                    Builtin::Output => (13.0, 1.24, 2_000.0),
                };
                (median.ln() + sigma * normal_quantile(u)).exp().round().min(max)
            }
            Shape::AzureConv {} | Shape::MooncakeConv {} | Shape::Sharegpt {} => {
                self.table(side).map_or(1.0, |table| interpolate(table, u).round())
            }
        };
        drawn.clamp(1.0, f64::from(u32::MAX)) as u32
    }

    /// Mean and standard deviation of the logarithm of a log-normal shape.
    ///
    /// From mean m and 99th percentile q: `mu + sigma^2/2 = ln m` and `mu + z sigma = ln q` with z the normal quantile of 0.99,
    /// so `sigma^2/2 - z sigma + ln(q/m) = 0`; the smaller root is the distribution with the lighter tail. There is none when
    /// q/m is beyond exp(z^2/2), about 15.
    pub(super) fn log_parameters(&self) -> Option<(f64, f64)> {
        let Shape::Lognormal { median, sigma, mean, p99, .. } = self else { return None };
        match (*median, *sigma, *mean, *p99) {
            (Some(median), Some(sigma), None, None) => Some((median.ln(), sigma)),
            (None, None, Some(mean), Some(p99)) => {
                let z = normal_quantile(0.99);
                let root = z * z - 2.0 * (p99 / mean).ln();
                let sigma = z - (root >= 0.0).then(|| root.sqrt())?;
                Some((mean.ln() - sigma * sigma / 2.0, sigma))
            }
            _ => None,
        }
    }

    fn table(&self, side: Builtin) -> Option<&'static Table> {
        match (self, side) {
            (Shape::AzureConv {}, Builtin::Prompt) => Some(&AZURE_CONV_PROMPT),
            (Shape::AzureConv {}, Builtin::Output) => Some(&AZURE_CONV_OUTPUT),
            (Shape::MooncakeConv {}, Builtin::Prompt) => Some(&MOONCAKE_CONV_PROMPT),
            (Shape::MooncakeConv {}, Builtin::Output) => Some(&MOONCAKE_CONV_OUTPUT),
            (Shape::Sharegpt {}, Builtin::Prompt) => Some(&SHAREGPT_PROMPT),
            (Shape::Sharegpt {}, Builtin::Output) => Some(&SHAREGPT_OUTPUT),
            (Shape::Uniform { .. } | Shape::Lognormal { .. } | Shape::AzureLikeCode {}, _) => None,
        }
    }
}

/// Quantiles at [`LEVELS`]; between them the inverse distribution function is taken as linear.
type Table = [u32; 26];

const LEVELS: [f64; 26] = [
    0.0, 0.01, 0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80,
    0.85, 0.90, 0.95, 0.98, 0.99, 0.995, 1.0,
];

// AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset (CC-BY-4.0; Patel et al., Splitwise, ISCA 2024): 19,366 requests,
// means 1,154.7 and 211.1.
const AZURE_CONV_PROMPT: Table = [
    2, 29, 91, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1876, 2734, 4083,
    4098, 4142, 4831, 14050,
];
const AZURE_CONV_OUTPUT: Table = [
    7, 16, 24, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 451, 540, 601, 643,
    1000,
];

// conversation_trace.jsonl of kvcache-ai/Mooncake (Apache-2.0; Qin et al., FAST 2025): 12,031 requests, means 12,035.1 and 342.6.
const MOONCAKE_CONV_PROMPT: Table = [
    891, 894, 896, 901, 964, 1261, 1662, 2306, 3263, 4251, 4993, 5870, 6909, 8187, 9570, 11238, 13196, 15367, 17869,
    21464, 27367, 39550, 66449, 85400, 100810, 126195,
];
const MOONCAKE_CONV_OUTPUT: Table = [
    1, 3, 3, 10, 24, 46, 100, 156, 213, 256, 291, 322, 350, 375, 399, 423, 447, 472, 504, 543, 597, 698, 892, 1119,
    1568, 2000,
];

// The three ShareGPT samples of 300 requests in casys-kaist/LLMServingSim (MIT), together: means 860.7 and 660.8. They leave
// out short conversations: no prompt is below 257 and no answer below 512 tokens.
const SHAREGPT_PROMPT: Table = [
    257, 262, 266, 298, 359, 385, 416, 477, 519, 575, 620, 647, 729, 793, 839, 897, 1034, 1122, 1222, 1354, 1460, 1789,
    2387, 2768, 3473, 4570,
];
const SHAREGPT_OUTPUT: Table = [
    512, 513, 518, 525, 533, 542, 551, 565, 575, 588, 597, 609, 634, 673, 701, 731, 760, 767, 769, 772, 779, 797, 868,
    926, 1107, 1224,
];

fn interpolate(table: &Table, u: f64) -> f64 {
    let above = LEVELS.partition_point(|&p| p <= u).clamp(1, LEVELS.len() - 1);
    let (low, high) = (LEVELS[above - 1], LEVELS[above]);
    let (from, to) = (f64::from(table[above - 1]), f64::from(table[above]));
    from + (to - from) * ((u - low) / (high - low)).clamp(0.0, 1.0)
}

/// The quantile function of the standard normal distribution, by Acklam's rational approximation (relative error 1.15e-9).
pub(crate) fn normal_quantile(u: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 5] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 4] =
        [7.784_695_709_041_462e-3, 3.224_671_290_700_398e-1, 2.445_134_137_142_996, 3.754_408_661_907_416];
    let poly = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    // 2^-54 keeps both ends finite; a unit draw has 53 bits.
    let u = u.clamp(5.55e-17, 1.0 - 1.2e-16);
    let tail = |p: f64| {
        let q = (-2.0 * p.ln()).sqrt();
        poly(&C, q) / (poly(&D, q) * q + 1.0)
    };
    if u < 0.024_25 {
        tail(u)
    } else if u > 1.0 - 0.024_25 {
        -tail(1.0 - u)
    } else {
        let q = u - 0.5;
        let r = q * q;
        poly(&A, r) * q / (poly(&B, r) * r + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: usize = 100_000;

    fn mean(length: &Length, side: Builtin) -> f64 {
        let at = |i: usize| f64::from(length.at((i as f64 + 0.5) / GRID as f64, side));
        (0..GRID).map(at).sum::<f64>() / GRID as f64
    }

    #[test]
    fn quantiles_of_the_normal_distribution_are_those_of_the_tables() {
        let check = |u, z: f64| assert!((normal_quantile(u) - z).abs() < 1e-7, "{u}");
        check(0.5, 0.0);
        check(0.99, 2.326_347_874);
        check(0.975, 1.959_963_985);
        check(0.001, -3.090_232_306);
        assert!(normal_quantile(0.0).is_finite() && normal_quantile(1.0).is_finite());
    }

    #[test]
    fn profiles_have_the_figures_of_their_traces() {
        let check = |shape: Shape, side, median: u32, trace_mean: f64| {
            let length = Length::Drawn(shape);
            assert_eq!(length.at(0.5, side), median);
            let found = mean(&length, side);
            assert!((found / trace_mean - 1.0).abs() < 0.02, "{length:?}: {found}, not {trace_mean}");
        };
        check(Shape::AzureConv {}, Builtin::Prompt, 1020, 1154.7);
        check(Shape::AzureConv {}, Builtin::Output, 129, 211.1);
        check(Shape::MooncakeConv {}, Builtin::Prompt, 6909, 12_035.1);
        check(Shape::MooncakeConv {}, Builtin::Output, 350, 342.6);
        check(Shape::Sharegpt {}, Builtin::Prompt, 729, 860.7);
        check(Shape::Sharegpt {}, Builtin::Output, 634, 660.8);
        check(Shape::AzureLikeCode {}, Builtin::Prompt, 1500, 1988.0);
        check(Shape::AzureLikeCode {}, Builtin::Output, 13, 28.0);
    }

    #[test]
    fn a_lognormal_is_given_in_two_ways() {
        let by = |median, sigma, mean, p99| Length::Drawn(Shape::Lognormal { median, sigma, mean, p99, max: None });
        let one = by(Some(500.0), Some(0.8), None, None);
        assert_eq!(one.at(0.5, Builtin::Prompt), 500);
        assert_eq!(one.at(0.841_344_746, Builtin::Prompt), (500.0f64 * 0.8f64.exp()).round() as u32);
        let two = by(None, None, Some(1000.0), Some(5000.0));
        assert!((mean(&two, Builtin::Prompt) / 1000.0 - 1.0).abs() < 0.01);
        assert!((f64::from(two.at(0.99, Builtin::Prompt)) / 5000.0 - 1.0).abs() < 0.001);
    }

    #[test]
    fn uniform_lengths_reach_both_ends_alike() {
        let length = Length::Drawn(Shape::Uniform { min: 32, max: 34 });
        let mut seen = [0; 3];
        (0..3000).for_each(|i| seen[length.at(f64::from(i) / 3000.0, Builtin::Output) as usize - 32] += 1);
        assert!(seen.iter().all(|n| (999..=1001).contains(n)), "{seen:?}");
    }
}
