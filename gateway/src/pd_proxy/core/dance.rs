//! One request on its way through the sidecar: prefill, if somebody else is to do it, then decode.
//!
//! ```text
//! arrived -> asked -> Prefill -> (answered) -> Decode -> (answer passes) -> ended
//!                       |  ^
//!                       v  |
//!                     BackOff
//! ```
//!
//! A refusal, or an answer of the prefilling engine that is an error, ends it early.

use std::sync::Arc;

use shared::ids::RequestId;
use shared::time::{Dur, Time};
use shared::trace::Trail;

use super::allowed::{Allowed, Target};
use super::config::PdProxyConfig;
use super::done::{Clocking, Done, Failure, Reason};
use crate::pd_proxy::spans::PdFact;

/// What a driver knows of a request once its body is there.
#[derive(Debug)]
pub struct Asked<'a> {
    /// Its id in spans.
    pub id: RequestId,
    /// Size of its body in bytes.
    pub size_bytes: u32,
    /// The header that names the engine which prefills.
    pub prefiller: Option<&'a str>,
    /// Whether its body is a JSON object; nobody looks at that without the header.
    pub readable: bool,
}

/// Which of its two engines a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// The one that prefills.
    Prefill,
    /// The one that decodes.
    Decode,
}

/// What a driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask this engine to prefill, then tell [`Dance::prefill_ended`].
    Prefill {
        /// Which.
        target: Target,
        /// 0 for the first attempt.
        attempt: u32,
    },
    /// Wait so long, then tell [`Dance::waited`].
    BackOff(Dur),
    /// Ask the own engine, with the parameters of the prefill or as the request came.
    Decode {
        /// Whether there are such parameters.
        transferred: bool,
    },
    /// Pass on what the prefilling engine answered.
    PassOn,
    /// Answer with an error.
    Refuse(Refusal),
}

/// How an attempt at a prefill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillEnd {
    /// With 200.
    Answered {
        /// Whether the answer says where the cache is.
        params: bool,
    },
    /// With another status.
    Status(u16),
    /// Without a whole answer.
    Failed(Failure),
}

/// Why the proxy answers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The prefill would go outside of the pool.
    Forbidden,
    /// The header names no engine.
    BadTarget,
    /// The body is no JSON object.
    BadBody,
    /// The prefill failed.
    Prefill(Failure),
}

impl Refusal {
    /// The HTTP status of the answer.
    pub const fn status(self) -> u16 {
        match self {
            Refusal::Forbidden => 403,
            Refusal::BadTarget | Refusal::BadBody => 400,
            Refusal::Prefill(failure) => failure.status(),
        }
    }
}

/// One request.
#[derive(Debug)]
pub struct Dance {
    trail: Trail<PdFact>,
    target: Option<Target>,
    reason: Reason,
    max_retries: u32,
    backoff: Dur,
    /// Where the span of the decode hangs.
    under_prefill: bool,
    attempts: u32,
    prefill_failed: bool,
    clock: Clocking,
    /// The call under way, and since when.
    call: Option<(Leg, Time)>,
    failure: Option<Failure>,
    over: bool,
}

/// What another server might cure (llm-d's sidecar tries these again).
const fn may_pass(status: u16) -> bool {
    matches!(status, 502..=504)
}

impl Dance {
    /// A request whose head arrived at `now`.
    pub fn arrived(now: Time, config: &PdProxyConfig, trail: Trail<PdFact>) -> Dance {
        Dance {
            trail,
            target: None,
            reason: Reason::Undecided,
            max_retries: config.prefill_max_retries,
            backoff: config.prefill_retry_backoff.get(),
            under_prefill: config.decode_under_prefill,
            attempts: 0,
            prefill_failed: false,
            clock: Clocking::from(now),
            call: None,
            failure: None,
            over: false,
        }
    }

    /// The body is there at `now`: what is to be done first.
    pub fn asked(&mut self, now: Time, asked: &Asked<'_>, pool: &Allowed) -> Step {
        let (reason, target, refusal) = judge(asked, pool);
        self.reason = reason;
        self.trail.note(now, || PdFact::Planned {
            id: asked.id.clone(),
            size_bytes: asked.size_bytes,
            target: target.as_ref().map(|t| t.to_string().into()),
        });
        match (refusal, target) {
            (Some(refusal), _) => Step::Refuse(refusal),
            (None, Some(target)) => {
                self.clock.prefill = Some((now, None));
                self.trail.note(now, || PdFact::PrefillStarted);
                self.target = Some(target.clone());
                self.prefill(target)
            }
            (None, None) => self.decode(now, false),
        }
    }

    /// An attempt at the prefill ended at `now`.
    pub fn prefill_ended(&mut self, now: Time, end: PrefillEnd) -> Step {
        let passing = match end {
            PrefillEnd::Answered { .. } => false,
            PrefillEnd::Status(status) => may_pass(status),
            PrefillEnd::Failed(failure) => failure.may_pass(),
        };
        if passing && self.attempts <= self.max_retries {
            return Step::BackOff(self.backoff);
        }
        let (status, failure) = match end {
            PrefillEnd::Answered { .. } => (Some(200), None),
            PrefillEnd::Status(status) => (Some(status), None),
            PrefillEnd::Failed(failure) => (None, Some(failure)),
        };
        self.end_prefill(now, status, failure);
        match end {
            PrefillEnd::Answered { params } => {
                if !params {
                    self.reason = Reason::NoTransferParams;
                }
                self.decode(now, params)
            }
            PrefillEnd::Status(_) => Step::PassOn,
            PrefillEnd::Failed(failure) => Step::Refuse(Refusal::Prefill(failure)),
        }
    }

    /// A pause is over: the next attempt.
    pub fn waited(&mut self) -> Step {
        let target = self.target.clone().expect("only a prefill is tried again");
        self.prefill(target)
    }

    fn prefill(&mut self, target: Target) -> Step {
        self.attempts += 1;
        Step::Prefill { target, attempt: self.attempts - 1 }
    }

    fn decode(&mut self, now: Time, transferred: bool) -> Step {
        self.clock.decode = Some(now);
        let under_prefill = self.under_prefill;
        self.trail.note(now, || PdFact::DecodeStarted { under_prefill });
        Step::Decode { transferred }
    }

    /// A call goes out at `now`, to this address.
    pub fn call_started(&mut self, now: Time, leg: Leg, attempt: u32, address: &Arc<str>, port: u16) {
        self.call = Some((leg, now));
        self.trail.note(now, || PdFact::CallStarted { leg, attempt, address: Arc::clone(address), port });
    }

    /// The head of its answer came at `now`.
    pub fn call_head(&mut self, now: Time, status: u16) {
        self.trail.note(now, || PdFact::CallHead { status });
    }

    /// It is over at `now`.
    pub fn call_ended(&mut self, now: Time, failure: Option<Failure>) {
        if let Some((leg, since)) = self.call.take() {
            if leg == Leg::Prefill {
                self.clock.calling += now.since(since);
            }
            self.trail.note(now, || PdFact::CallEnded { failure });
        }
    }

    /// The first byte of the answer's body is passed on at `now`.
    pub fn first_byte(&mut self, now: Time) {
        self.clock.first_byte.get_or_insert(now);
    }

    /// The caller went away at `now`: whichever call is under way is given up.
    pub fn disconnected(&mut self, now: Time, status: Option<u16>) -> Option<Done> {
        if !self.over {
            self.trail.note(now, || PdFact::Disconnected);
        }
        self.ended(now, status, Some(Failure::Cancelled))
    }

    /// The request is over at `now`, once: what is open ends with it. `failure` is what went wrong beyond the prefill.
    pub fn ended(&mut self, now: Time, status: Option<u16>, failure: Option<Failure>) -> Option<Done> {
        if std::mem::replace(&mut self.over, true) {
            return None;
        }
        self.call_ended(now, failure);
        if let Some((_, None)) = self.clock.prefill {
            self.end_prefill(now, None, failure);
        }
        let failure = failure.or(self.failure);
        let (reason, times) = (self.reason, self.clock.times(now));
        self.trail.note(now, || PdFact::Ended { reason, status, failure, times });
        std::mem::take(&mut self.trail).finish(now);
        let (prefill_attempts, prefill_failed) = (self.attempts, self.prefill_failed);
        Some(Done { reason, prefill_attempts, prefill_failed, status, failure, times })
    }

    fn end_prefill(&mut self, now: Time, status: Option<u16>, failure: Option<Failure>) {
        if let Some((_, end @ None)) = &mut self.clock.prefill {
            *end = Some(now);
        }
        self.prefill_failed = status != Some(200) && failure != Some(Failure::Cancelled);
        self.failure = failure;
        let attempts = self.attempts;
        self.trail.note(now, || PdFact::PrefillEnded { status, attempts, failure });
    }

    /// What it is at: nothing before its body is there.
    pub fn leg(&self) -> Option<Leg> {
        match (self.clock.decode, self.clock.prefill) {
            (Some(_), _) => Some(Leg::Decode),
            (None, Some(_)) => Some(Leg::Prefill),
            (None, None) => None,
        }
    }

    /// Whether its end was told.
    pub const fn is_over(&self) -> bool {
        self.over
    }
}

/// Whether and where a request is prefilled.
fn judge(asked: &Asked<'_>, pool: &Allowed) -> (Reason, Option<Target>, Option<Refusal>) {
    let Some(value) = asked.prefiller else { return (Reason::NoPrefillHeader, None, None) };
    let Ok(target) = Target::of_header(value) else { return (Reason::BadTarget, None, Some(Refusal::BadTarget)) };
    if !pool.permits(&target) {
        return (Reason::ForbiddenTarget, Some(target), Some(Refusal::Forbidden));
    }
    if !asked.readable {
        return (Reason::BadBody, Some(target), Some(Refusal::BadBody));
    }
    (Reason::PrefillHeader, Some(target), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::units::HumanDur;

    fn at(ms: u64) -> Time {
        Time::ZERO + Dur::from_millis(ms)
    }

    fn asked(prefiller: Option<&str>, readable: bool) -> Asked<'_> {
        Asked { id: RequestId::sanitise("r"), size_bytes: 10, prefiller, readable }
    }

    fn begin(retries: u32, prefiller: Option<&str>) -> (Dance, Step) {
        let config = PdProxyConfig { prefill_max_retries: retries, ..PdProxyConfig::default() };
        let mut dance = Dance::arrived(at(0), &config, Trail::off());
        let step = dance.asked(at(1), &asked(prefiller, true), &Allowed::these(["p:1"]).unwrap());
        (dance, step)
    }

    fn prefill(attempt: u32) -> Step {
        Step::Prefill { target: "p:1".parse().unwrap(), attempt }
    }

    #[test]
    fn what_is_done_first_is_what_header_pool_and_body_say() {
        let pool = Allowed::these(["p:1"]).unwrap();
        let check = |header: Option<&str>, readable: bool, expect: Step, reason: Reason| {
            let mut dance = Dance::arrived(at(0), &PdProxyConfig::default(), Trail::off());
            assert_eq!(dance.asked(at(1), &asked(header, readable), &pool), expect, "{header:?}");
            assert_eq!(dance.ended(at(2), None, None).unwrap().reason, reason);
        };
        check(None, false, Step::Decode { transferred: false }, Reason::NoPrefillHeader);
        check(Some("p:1"), true, prefill(0), Reason::PrefillHeader);
        check(Some("p:1"), false, Step::Refuse(Refusal::BadBody), Reason::BadBody);
        check(Some("q:1"), false, Step::Refuse(Refusal::Forbidden), Reason::ForbiddenTarget);
        check(Some("q"), true, Step::Refuse(Refusal::BadTarget), Reason::BadTarget);
    }

    #[test]
    fn a_prefill_is_tried_again_where_that_may_help() {
        let check = |end: PrefillEnd, again: bool| {
            let (mut dance, step) = begin(1, Some("p:1"));
            assert_eq!(step, prefill(0));
            let next = dance.prefill_ended(at(2), end);
            assert_eq!(matches!(next, Step::BackOff(_)), again, "{end:?}");
            if again {
                assert_eq!(next, Step::BackOff(HumanDur::millis(200).get()));
                assert_eq!(dance.waited(), prefill(1));
                assert!(!matches!(dance.prefill_ended(at(3), end), Step::BackOff(_)), "only once more");
            }
        };
        for status in [502, 503, 504] {
            check(PrefillEnd::Status(status), true);
        }
        for status in [400, 404, 429, 500, 501, 505] {
            check(PrefillEnd::Status(status), false);
        }
        for failure in [Failure::Connect, Failure::Reset, Failure::Timeout] {
            check(PrefillEnd::Failed(failure), true);
        }
        check(PrefillEnd::Failed(Failure::BadAnswer), false);
        check(PrefillEnd::Answered { params: true }, false);
        let (mut dance, _) = begin(0, Some("p:1"));
        assert_eq!(dance.prefill_ended(at(2), PrefillEnd::Status(503)), Step::PassOn, "llm-d's default is no retry");
    }

    #[test]
    fn a_prefill_that_fails_ends_the_request() {
        let (mut dance, _) = begin(0, Some("p:1"));
        let step = dance.prefill_ended(at(4), PrefillEnd::Failed(Failure::Connect));
        assert_eq!(step, Step::Refuse(Refusal::Prefill(Failure::Connect)));
        let done = dance.ended(at(5), Some(502), None).unwrap();
        assert_eq!((done.prefill_failed, done.failure, done.times.decode), (true, Some(Failure::Connect), None));
        assert_eq!(done.times.prefill, Some(Dur::from_millis(3)));
        assert_eq!(dance.ended(at(6), None, None), None, "a request ends once");
    }

    #[test]
    fn without_parameters_the_prompt_is_computed_again() {
        let (mut dance, _) = begin(0, Some("p:1"));
        let step = dance.prefill_ended(at(4), PrefillEnd::Answered { params: false });
        assert_eq!(step, Step::Decode { transferred: false });
        let done = dance.ended(at(9), Some(200), None).unwrap();
        assert_eq!((done.reason, done.prefill_failed), (Reason::NoTransferParams, false));
    }

    /// Coordination is what neither engine causes: reading and editing bodies, and pauses.
    #[test]
    fn the_parts_of_a_request_are_timed() {
        let (mut dance, _) = begin(1, Some("p:1"));
        let address: Arc<str> = "p".into();
        dance.call_started(at(2), Leg::Prefill, 0, &address, 1);
        dance.call_ended(at(5), None);
        dance.prefill_ended(at(5), PrefillEnd::Status(503));
        dance.waited();
        dance.call_started(at(205), Leg::Prefill, 1, &address, 1);
        dance.call_ended(at(235), None);
        dance.prefill_ended(at(236), PrefillEnd::Answered { params: true });
        dance.call_started(at(237), Leg::Decode, 0, &address, 1);
        dance.call_head(at(240), 200);
        dance.first_byte(at(250));
        dance.first_byte(at(260));
        let done = dance.ended(at(300), Some(200), None).unwrap();
        let ms = |dur: Option<Dur>| dur.map(|d| d.as_millis_f64());
        let t = done.times;
        assert_eq!((ms(Some(t.total)), ms(t.prefill), ms(t.decode)), (Some(300.0), Some(235.0), Some(64.0)));
        assert_eq!((ms(t.first_byte), ms(t.coordination)), (Some(250.0), Some(203.0)));
        assert_eq!(done.prefill_attempts, 2);
    }
}
