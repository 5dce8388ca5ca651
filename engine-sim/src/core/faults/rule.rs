//! What a scenario says about faults: the rules as they are written, and what is wrong with them.
//!
//! The doc comments are the descriptions of the published JSON schema. Nothing here happens by itself: [`super::Faults`] follows
//! the rules.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

/// A fault that an engine suffers. Conditions of the whole engine (crash, engine_dead, hang, slow, metrics_*) begin at a time or
/// again and again; faults of single requests (http_error, cut_stream, kv_transfer) strike a share of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FaultRule {
    /// The process is gone: connections are reset, new ones refused. After `for` it is back with an empty cache.
    Crash {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long until it is back; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
    },
    /// The engine core dies under its API server: open requests are answered with vLLM's engine-dead error, then the server shuts
    /// down. After `for` it is back with an empty cache.
    EngineDead {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long until it is back; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
    },
    /// Steps stop while sockets stay open: requests are taken and wait. `/health` says 200, as vLLM's does.
    Hang {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
    },
    /// Every step takes `factor` times as long.
    Slow {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
        /// How many times as long, 1 to 1000, in steps of a thousandth.
        #[schemars(range(min = 1, max = 1000))]
        factor: f64,
    },
    /// The metrics page stops changing: it stays as it is when it is first asked for.
    MetricsStale {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
    },
    /// The metrics page is answered with an error.
    MetricsError {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
        /// The HTTP status, 400 to 599; 500 when absent.
        #[serde(default = "internal")]
        #[schemars(range(min = 400, max = 599))]
        status: u16,
    },
    /// The metrics page is not answered at all.
    MetricsTimeout {
        /// When, from the start of the run; at once when neither this nor `mean_between` is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; for ever when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Instead of `at`: mean time from one to the next, exponentially distributed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mean_between: Option<HumanDur>,
    },
    /// Requests are answered with an HTTP error instead of being taken.
    HttpError {
        /// Since when, from the start of the run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; to the end when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Share of requests, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        rate: f64,
        /// The HTTP status, 400 to 599.
        #[schemars(range(min = 400, max = 599))]
        status: u16,
    },
    /// The connection breaks in the middle of an answer; the engine sees a caller that is gone.
    CutStream {
        /// Since when, from the start of the run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; to the end when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Share of requests, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        rate: f64,
        /// After how many tokens: a number, or `{min, max}` to draw one. An answer that is over before is not cut.
        after_tokens: CutAfter,
    },
    /// The transfer of a prompt's KV blocks from the engine that prefilled it fails.
    KvTransfer {
        /// Since when, from the start of the run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<HumanDur>,
        /// How long; to the end when absent.
        #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
        lasts: Option<HumanDur>,
        /// Share of transfers, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        rate: f64,
        /// Share of the blocks that arrives before it fails, 0 to 1; none when absent.
        #[serde(default)]
        #[schemars(range(min = 0, max = 1))]
        moved: f64,
    },
}

/// After how many tokens a stream is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum CutAfter {
    /// Always so many.
    Tokens(u32),
    /// Uniformly drawn.
    Between(TokenRange),
}

/// A range of token counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRange {
    /// Fewest.
    pub min: u32,
    /// Most.
    pub max: u32,
}

/// Kinds of faults, as reports, spans and rules name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultKind {
    /// The process is gone.
    Crash,
    /// The engine core died under its server.
    EngineDead,
    /// Steps stop.
    Hang,
    /// Steps take longer.
    Slow,
    /// The metrics page stops changing.
    MetricsStale,
    /// The metrics page is an error.
    MetricsError,
    /// The metrics page is not answered.
    MetricsTimeout,
    /// A request is answered with an error.
    HttpError,
    /// A connection breaks in the middle of an answer.
    CutStream,
    /// A transfer of KV blocks fails.
    KvTransfer,
}

impl FaultKind {
    /// Every kind, in the order of reports.
    pub const ALL: [FaultKind; 10] = [
        FaultKind::Crash,
        FaultKind::EngineDead,
        FaultKind::Hang,
        FaultKind::Slow,
        FaultKind::MetricsStale,
        FaultKind::MetricsError,
        FaultKind::MetricsTimeout,
        FaultKind::HttpError,
        FaultKind::CutStream,
        FaultKind::KvTransfer,
    ];

    /// The name, as in `kind` of a rule.
    pub const fn as_str(self) -> &'static str {
        match self {
            FaultKind::Crash => "crash",
            FaultKind::EngineDead => "engine_dead",
            FaultKind::Hang => "hang",
            FaultKind::Slow => "slow",
            FaultKind::MetricsStale => "metrics_stale",
            FaultKind::MetricsError => "metrics_error",
            FaultKind::MetricsTimeout => "metrics_timeout",
            FaultKind::HttpError => "http_error",
            FaultKind::CutStream => "cut_stream",
            FaultKind::KvTransfer => "kv_transfer",
        }
    }
}

/// The longest time in a rule: a run of years is a typing mistake, and sums of two stay far inside 64 bits.
const LONGEST: HumanDur = HumanDur::secs(366 * 86_400);

impl FaultRule {
    /// Everything that is wrong with the rule, with paths below it.
    pub fn validate(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut check = |holds: bool, path: &str, found: String, allowed: &str| {
            if !holds {
                problems.push(ConfigProblem { path: path.into(), found, allowed: allowed.into() });
            }
        };
        let When { at, lasts, mean_between } = self.when();
        for (path, value, least) in [("at", at, 0), ("for", lasts, 1), ("mean_between", mean_between, 1)] {
            let ok = value.is_none_or(|d| d <= LONGEST && d.get().as_nanos() >= least);
            let allowed =
                if least == 0 { "a duration of at most 366 days" } else { "a duration above 0, at most 366 days" };
            check(ok, path, value.unwrap_or_default().to_string(), allowed);
        }
        let both = at.is_some() && mean_between.is_some();
        check(!both, "mean_between", "both at and mean_between".into(), "one of the two");
        let endless = mean_between.is_some() && lasts.is_none();
        check(!endless, "for", "mean_between without for".into(), "a duration, so that it can happen again");
        let share = |v: f64| (0.0..=1.0).contains(&v);
        match self {
            FaultRule::Slow { factor, .. } => {
                check((1.0..=1000.0).contains(factor), "factor", factor.to_string(), "a number in 1..=1000");
            }
            FaultRule::MetricsError { status, .. } => check_status(&mut check, *status),
            FaultRule::HttpError { rate, status, .. } => {
                check(share(*rate), "rate", rate.to_string(), "a share in 0..=1");
                check_status(&mut check, *status);
            }
            FaultRule::CutStream { rate, after_tokens, .. } => {
                check(share(*rate), "rate", rate.to_string(), "a share in 0..=1");
                if let CutAfter::Between(TokenRange { min, max }) = after_tokens {
                    check(min <= max, "after_tokens.max", max.to_string(), "a number that is not below min");
                }
            }
            FaultRule::KvTransfer { rate, moved, .. } => {
                check(share(*rate), "rate", rate.to_string(), "a share in 0..=1");
                check(share(*moved), "moved", moved.to_string(), "a share in 0..=1");
            }
            FaultRule::Crash { .. }
            | FaultRule::EngineDead { .. }
            | FaultRule::Hang { .. }
            | FaultRule::MetricsStale { .. }
            | FaultRule::MetricsTimeout { .. } => {}
        }
        problems
    }

    /// The kind of fault.
    pub const fn kind(&self) -> FaultKind {
        match self {
            FaultRule::Crash { .. } => FaultKind::Crash,
            FaultRule::EngineDead { .. } => FaultKind::EngineDead,
            FaultRule::Hang { .. } => FaultKind::Hang,
            FaultRule::Slow { .. } => FaultKind::Slow,
            FaultRule::MetricsStale { .. } => FaultKind::MetricsStale,
            FaultRule::MetricsError { .. } => FaultKind::MetricsError,
            FaultRule::MetricsTimeout { .. } => FaultKind::MetricsTimeout,
            FaultRule::HttpError { .. } => FaultKind::HttpError,
            FaultRule::CutStream { .. } => FaultKind::CutStream,
            FaultRule::KvTransfer { .. } => FaultKind::KvTransfer,
        }
    }

    /// When it happens.
    pub(super) const fn when(&self) -> When {
        match *self {
            FaultRule::Crash { at, lasts, mean_between }
            | FaultRule::EngineDead { at, lasts, mean_between }
            | FaultRule::Hang { at, lasts, mean_between }
            | FaultRule::Slow { at, lasts, mean_between, .. }
            | FaultRule::MetricsStale { at, lasts, mean_between }
            | FaultRule::MetricsError { at, lasts, mean_between, .. }
            | FaultRule::MetricsTimeout { at, lasts, mean_between } => When { at, lasts, mean_between },
            FaultRule::HttpError { at, lasts, .. }
            | FaultRule::CutStream { at, lasts, .. }
            | FaultRule::KvTransfer { at, lasts, .. } => When { at, lasts, mean_between: None },
        }
    }
}

fn check_status(check: &mut impl FnMut(bool, &str, String, &str), status: u16) {
    check((400..600).contains(&status), "status", status.to_string(), "an HTTP status in 400..=599");
}

/// The times of a rule.
#[derive(Clone, Copy, Debug)]
pub(super) struct When {
    pub(super) at: Option<HumanDur>,
    pub(super) lasts: Option<HumanDur>,
    pub(super) mean_between: Option<HumanDur>,
}

const fn all() -> f64 {
    1.0
}

const fn internal() -> u16 {
    500
}
