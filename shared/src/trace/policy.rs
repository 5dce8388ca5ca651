//! What a user may ask of sampling beyond a ratio: rules, a header, a rate, and keeping what turned out to be worth it.
//!
//! Plain data, read from scenarios and configurations; the edge of a system follows it ([`super::edge`]).

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigProblem, Problems, Validate};
use crate::time::Dur;
use crate::trace::sampler::Ratio;
use crate::units::HumanDur;

/// More rules than this are a mistake: each is compared with every request that none before it matches.
const MAX_RULES: usize = 64;
/// The header that asks for a trace, unless another one is named.
pub const FORCE_HEADER: &str = "x-igsim-trace";

/// What the edge does beyond its sampler; nothing unless something is asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Ratios for some of the requests, in order: the first rule that matches decides in place of the sampler's ratio.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// Lets callers ask for a trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force: Option<Force>,
    /// The most traces in a second, of those that begin here and are kept from the start. Without a ratio all of them are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub rate_limit: Option<f64>,
    /// Keeps traces that were not sampled for what became of their requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
}

/// A ratio for requests that match every field that is given. A `*` at the end of a text stands for anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The model that the caller asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The tenant: the fairness id of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The route, for example /v1/completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The inference objective of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// Share of these traces to keep, 0 to 1.
    #[schemars(range(min = 0, max = 1))]
    pub ratio: f64,
}

/// A header by which a trusted caller asks for a trace, with the value 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Force {
    /// Its name.
    pub header: String,
}

impl Default for Force {
    fn default() -> Force {
        Force { header: FORCE_HEADER.to_owned() }
    }
}

/// Which requests are worth a trace once they are over, and how much may be held until that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// Those that fail: answered with 429 or 5xx, broken off, ended by an error in the stream.
    pub errors: bool,
    /// Those that take longer than this, from their head to the last byte of their answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slower_than: Option<HumanDur>,
    /// Those with more tokens than this, prompt and answer together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more_tokens_than: Option<u64>,
    /// Those that an engine preempted.
    pub preempted: bool,
    /// Those that needed more than one attempt.
    pub retried: bool,
    /// The most bytes of records that a process holds; the oldest ones go first.
    pub hold_bytes: u64,
    /// The longest time that a record is held.
    pub hold_for: HumanDur,
}

impl Default for Keep {
    fn default() -> Keep {
        let Hold { bytes, time } = Hold::default();
        Keep {
            errors: true,
            slower_than: None,
            more_tokens_than: None,
            preempted: true,
            retried: true,
            hold_bytes: bytes as u64,
            hold_for: HumanDur(time),
        }
    }
}

/// How much of what may be kept later a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The most bytes of records.
    pub bytes: usize,
    /// The longest time a record is held after it was closed.
    pub time: Dur,
}

impl Default for Hold {
    fn default() -> Hold {
        Hold { bytes: 64 << 20, time: Dur::from_secs(60) }
    }
}

/// Why a trace is kept that no ratio chose: the value of `sampling.reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A trusted caller asked for it.
    Forced,
    /// It came within the limit of traces in a second.
    RateLimit,
    /// The request failed.
    Error,
    /// An engine preempted it.
    Preempted,
    /// It needed more than one attempt.
    Retried,
    /// It took long.
    Slow,
    /// It had many tokens.
    Tokens,
}

impl Reason {
    /// Its name in spans and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Forced => "forced",
            Reason::RateLimit => "rate_limit",
            Reason::Error => "error",
            Reason::Preempted => "preempted",
            Reason::Retried => "retried",
            Reason::Slow => "slow",
            Reason::Tokens => "tokens",
        }
    }
}

/// What became of a request, as its edge saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it failed.
    pub error: bool,
    /// From its head to the last byte of its answer.
    pub took: Dur,
    /// Tokens of prompt and answer.
    pub tokens: u64,
    /// Whether an engine says that it preempted it.
    pub preempted: bool,
    /// Whether it needed more than one attempt.
    pub retried: bool,
}

impl Outcome {
    /// Whether an answer with this status is a failure of the system rather than of its caller.
    pub const fn is_failure(status: u16) -> bool {
        status == 429 || status >= 500
    }
}

impl Keep {
    /// Why a request that ended so is kept, if it is: the first reason in the order of [`Reason`].
    pub fn judge(&self, outcome: &Outcome) -> Option<Reason> {
        let slow = self.slower_than.is_some_and(|bound| outcome.took > bound.get());
        let tokens = self.more_tokens_than.is_some_and(|bound| outcome.tokens > bound);
        [
            (self.errors && outcome.error, Reason::Error),
            (self.preempted && outcome.preempted, Reason::Preempted),
            (self.retried && outcome.retried, Reason::Retried),
            (slow, Reason::Slow),
            (tokens, Reason::Tokens),
        ]
        .into_iter()
        .find_map(|(applies, reason)| applies.then_some(reason))
    }

    /// How much to hold for it.
    pub fn hold(&self) -> Hold {
        Hold { bytes: usize::try_from(self.hold_bytes).unwrap_or(usize::MAX), time: self.hold_for.get() }
    }
}

/// What rules match on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Labels<'a> {
    /// The model that is asked for.
    pub model: Option<&'a str>,
    /// The fairness id.
    pub tenant: Option<&'a str>,
    /// The route.
    pub route: Option<&'a str>,
    /// The objective.
    pub objective: Option<&'a str>,
}

impl Rule {
    /// Whether it is about such a request.
    pub fn matches(&self, labels: &Labels<'_>) -> bool {
        let fits = |wanted: &Option<String>, found: Option<&str>| match wanted {
            None => true,
            Some(wanted) => found.is_some_and(|found| match wanted.strip_suffix('*') {
                Some(start) => found.starts_with(start),
                None => found == wanted,
            }),
        };
        fits(&self.model, labels.model)
            && fits(&self.tenant, labels.tenant)
            && fits(&self.route, labels.route)
            && fits(&self.objective, labels.objective)
    }

    fn is_about_everything(&self) -> bool {
        self.model.is_none() && self.tenant.is_none() && self.route.is_none() && self.objective.is_none()
    }
}

impl Policy {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Policy::default()
    }

    /// What of it the eager recorder cannot do, if anything: it hands spans to the SDK as they begin, and the SDK's samplers decide
    /// by ids alone.
    pub fn needs_records(&self) -> Option<&'static str> {
        let parts = [
            (!self.rules.is_empty(), "tracing.rules"),
            (self.force.is_some(), "tracing.force"),
            (self.rate_limit.is_some(), "tracing.rate_limit"),
            (self.keep.is_some(), "tracing.keep"),
        ];
        parts.into_iter().find_map(|(asked, name)| asked.then_some(name))
    }

    /// What is wrong with it.
    pub fn problems(&self) -> Vec<ConfigProblem> {
        let mut out = Vec::new();
        let mut add = |path: String, found: String, allowed: &str| {
            out.push(ConfigProblem { path, found, allowed: allowed.to_owned() });
        };
        if self.rules.len() > MAX_RULES {
            add("rules".to_owned(), format!("{} rules", self.rules.len()), "at most 64");
        }
        for (i, rule) in self.rules.iter().enumerate() {
            if Ratio::new(rule.ratio).is_none() {
                add(format!("rules[{i}].ratio"), rule.ratio.to_string(), "a number from 0 to 1");
            }
            if rule.is_about_everything() {
                let allowed = "model, tenant, route or objective; the ratio of all others is tracing.ratio";
                add(format!("rules[{i}]"), "a rule about every request".to_owned(), allowed);
            }
        }
        if let Some(force) = &self.force
            && force.header.parse::<HeaderName>().is_err()
        {
            add("force.header".to_owned(), format!("{:?}", force.header), "the name of a header");
        }
        if let Some(rate) = self.rate_limit
            && !(rate > 0.0 && rate <= 1e6)
        {
            add("rate_limit".to_owned(), rate.to_string(), "a number above 0, of traces in a second, at most 1000000");
        }
        if let Some(keep) = &self.keep {
            let nothing = Keep { errors: false, preempted: false, retried: false, ..Keep::default() };
            if (Keep { hold_bytes: nothing.hold_bytes, hold_for: nothing.hold_for, ..keep.clone() }) == nothing {
                add("keep".to_owned(), "no reason to keep anything".to_owned(), "at least one");
            }
            if keep.hold_bytes < 1 << 20 {
                add("keep.hold_bytes".to_owned(), keep.hold_bytes.to_string(), "at least 1048576");
            }
            if keep.hold_for.get() == Dur::ZERO || keep.hold_for.get() > Dur::from_secs(3600) {
                add("keep.hold_for".to_owned(), keep.hold_for.to_string(), "a duration above 0 and at most 1h");
            }
        }
        out
    }
}

impl Validate for Policy {
    fn validate(&self, problems: &mut Problems) {
        for ConfigProblem { path, found, allowed } in self.problems() {
            problems.add(&path, found, &allowed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_matches_what_it_names() {
        let rule = |model: Option<&str>, tenant: Option<&str>| Rule {
            model: model.map(str::to_owned),
            tenant: tenant.map(str::to_owned),
            ratio: 1.0,
            ..Rule::default()
        };
        let labels = Labels { model: Some("llama-8b"), tenant: None, route: Some("/v1/completions"), objective: None };
        for (rule, expect) in [
            (rule(Some("llama-8b"), None), true),
            (rule(Some("llama-*"), None), true),
            (rule(Some("*"), None), true),
            (rule(Some("llama"), None), false),
            (rule(None, Some("a")), false),
            (rule(None, Some("*")), false),
            (rule(Some("llama-8b"), Some("a")), false),
            (Rule { route: Some("/v1/completions".to_owned()), ..rule(None, None) }, true),
            (Rule { objective: Some("chat".to_owned()), ..rule(None, None) }, false),
        ] {
            assert_eq!(rule.matches(&labels), expect, "{rule:?}");
        }
    }

    #[test]
    fn the_first_reason_is_the_one_that_is_told() {
        let keep = Keep { slower_than: Some(HumanDur::secs(5)), more_tokens_than: Some(100), ..Keep::default() };
        let judge = |outcome: Outcome| keep.judge(&outcome).map(Reason::name);
        let good = Outcome { took: Dur::from_secs(5), tokens: 100, ..Outcome::default() };
        assert_eq!(judge(good), None, "bounds are not outcomes");
        assert_eq!(judge(Outcome { tokens: 101, ..good }), Some("tokens"));
        assert_eq!(judge(Outcome { took: Dur::from_secs(6), tokens: 101, ..good }), Some("slow"));
        assert_eq!(judge(Outcome { retried: true, took: Dur::from_secs(6), ..good }), Some("retried"));
        assert_eq!(judge(Outcome { retried: true, preempted: true, ..good }), Some("preempted"));
        assert_eq!(judge(Outcome { error: true, preempted: true, ..good }), Some("error"));
        let deaf = Keep { errors: false, ..keep.clone() };
        assert_eq!(deaf.judge(&Outcome { error: true, ..good }), None);
    }

    #[test]
    fn what_cannot_be_meant_is_told() {
        let told = |policy: Policy| policy.problems().iter().map(|p| p.path.clone()).collect::<Vec<_>>();
        assert_eq!(told(Policy::default()), [""; 0]);
        let rule = Rule { tenant: Some("a".to_owned()), ratio: 0.5, ..Rule::default() };
        let good = Policy {
            rules: vec![rule.clone()],
            force: Some(Force::default()),
            rate_limit: Some(0.5),
            keep: Some(Keep::default()),
        };
        assert_eq!((told(good.clone()), good.needs_records()), (Vec::new(), Some("tracing.rules")));
        let bad = Policy {
            rules: vec![Rule { ratio: 1.5, ..rule }, Rule { ratio: 1.0, ..Rule::default() }],
            force: Some(Force { header: "not a name".to_owned() }),
            rate_limit: Some(0.0),
            keep: Some(Keep {
                errors: false,
                preempted: false,
                retried: false,
                hold_bytes: 1,
                hold_for: HumanDur::secs(0),
                ..Keep::default()
            }),
        };
        let expect =
            ["rules[0].ratio", "rules[1]", "force.header", "rate_limit", "keep", "keep.hold_bytes", "keep.hold_for"];
        assert_eq!(told(bad), expect);
    }
}
