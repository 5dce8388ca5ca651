//! What happens when engines fail: retries, and endpoints that are left out for a while.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::{at_least, problem};

/// When another endpoint is asked. How often at most is `limits.retries`. Nothing is ever asked again once the head of a response was
/// passed on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Retries that each request of the last ten seconds pays for.
    #[schemars(range(min = 0, max = 10))]
    pub budget_ratio: f64,
    /// Retries per second, over ten seconds, that are there besides.
    pub budget_min_per_second: u32,
    /// Whether an attempt without an answer within `timeouts.response_head` is made elsewhere. The engine may have been about to
    /// answer, so the work is done twice.
    pub on_timeout: bool,
    /// Statuses of engines that are asked for elsewhere, for example `[502, 503, 504]`; without another endpoint or budget the
    /// engine's answer is passed on.
    #[schemars(length(max = 32))]
    pub on_status: Vec<u16>,
    /// A second attempt while the first one has not answered; none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hedge: Option<HedgeConfig>,
}

/// A second attempt at another endpoint while no head of a response has come. Whichever answers first is passed on, the other one is
/// cancelled. It is one of `limits.retries` and takes from the retry budget. Not with disaggregated prefill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HedgeConfig {
    /// How long the first attempt may take: a duration, or `p95`, what 95 % of the last answers took to begin.
    #[schemars(with = "String", extend("x-expected" = "a duration such as 500ms, or p95"))]
    pub after: HedgeAfter,
}

/// When a second attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HedgeAfter {
    /// After this time.
    Fixed(HumanDur),
    /// After what 95 % of the last answers took.
    P95,
}

/// The word for [`HedgeAfter::P95`].
const P95: &str = "p95";

impl TryFrom<String> for HedgeAfter {
    type Error = String;

    fn try_from(text: String) -> Result<HedgeAfter, String> {
        if text == P95 {
            return Ok(HedgeAfter::P95);
        }
        text.parse().map(HedgeAfter::Fixed).map_err(|e| format!("{e}, or {P95}"))
    }
}

impl From<HedgeAfter> for String {
    fn from(after: HedgeAfter) -> String {
        match after {
            HedgeAfter::Fixed(after) => after.to_string(),
            HedgeAfter::P95 => P95.to_owned(),
        }
    }
}

/// Endpoints that fail several times in a row get no requests for a while (Envoy's outlier detection). Connections that fail or break,
/// answers that do not come in time and the statuses 500, 502 and 504 count; 503 and 429 are refusals for load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierConfig {
    /// So many failures without a good answer between them; 0 turns it off.
    pub consecutive_failures: u32,
    /// How long an endpoint is left out the first time; twice as long the second time, and so on.
    pub base_time: HumanDur,
    /// The longest time; an endpoint that was back for so long starts again with the first.
    pub max_time: HumanDur,
    /// The largest share of the pool that is left out.
    #[schemars(range(min = 0, max = 1))]
    pub max_share: f64,
}

impl Default for RetryConfig {
    /// The budget is Finagle's and Linkerd's.
    fn default() -> RetryConfig {
        RetryConfig {
            budget_ratio: 0.2,
            budget_min_per_second: 10,
            on_timeout: false,
            on_status: Vec::new(),
            hedge: None,
        }
    }
}

impl Default for OutlierConfig {
    /// Envoy's, but for the share, which is 10 % there: pools of engines are small.
    fn default() -> OutlierConfig {
        OutlierConfig {
            consecutive_failures: 5,
            base_time: HumanDur::secs(30),
            max_time: HumanDur::secs(300),
            max_share: 0.5,
        }
    }
}

impl RetryConfig {
    pub(super) fn validate(&self, out: &mut Vec<ConfigProblem>) {
        if !(0.0..=10.0).contains(&self.budget_ratio) {
            problem("retry.budget_ratio", self.budget_ratio, "a number from 0 to 10".to_owned(), out);
        }
        for (i, status) in self.on_status.iter().enumerate().filter(|(_, s)| !(400..600).contains(*s)) {
            problem(&format!("retry.on_status[{i}]"), status, "a status from 400 to 599".to_owned(), out);
        }
        if let Some(HedgeConfig { after: HedgeAfter::Fixed(after) }) = &self.hedge {
            at_least("retry.hedge.after", *after, HumanDur::millis(1), out);
        }
    }
}

impl OutlierConfig {
    pub(super) fn validate(&self, out: &mut Vec<ConfigProblem>) {
        at_least("outlier_ejection.base_time", self.base_time, HumanDur::millis(1), out);
        at_least("outlier_ejection.max_time", self.max_time, self.base_time, out);
        if !(0.0..=1.0).contains(&self.max_share) {
            problem("outlier_ejection.max_share", self.max_share, "a number from 0 to 1".to_owned(), out);
        }
    }
}
