//! Faults of one engine: what goes wrong and when, decided here and acted out by the engine core and its driver.
//!
//! [`FaultRule`]s come with the scenario or are added while the engine runs. Conditions of the whole engine begin and end at times
//! ([`Faults::next_change`], [`Faults::change`]); faults of single requests and transfers are drawn when they are asked for. Every
//! rule draws from a stream of its own, so that the same seed gives the same faults and a further rule shifts none of the others.

mod rule;
#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use shared::rng::{Seed, Stream};
use shared::time::{Dur, Time};

use crate::core::engine::RequestKey;

pub use rule::{CutAfter, FaultKind, FaultRule, TokenRange};

/// The faults of one engine.
#[derive(Debug)]
pub struct Faults {
    seed: Seed,
    engine: String,
    /// Rules added so far: the number of the next one's stream.
    added: usize,
    conditions: Vec<Recurring>,
    strikes: Vec<Strike>,
    /// Conditions under way, in the order in which they began.
    active: Vec<Active>,
    /// Requests whose connection will break, and after how many tokens. Few, so a list.
    cuts: Vec<Cut>,
    by_header: bool,
    counts: FaultCounts,
}

/// A condition of the whole engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The engine is gone.
    Down(Down),
    /// No step starts or completes.
    Hang,
    /// Steps take so many thousandths of their time.
    Slow(u64),
    /// What the metrics page is like.
    Metrics(PageFault),
}

/// How an engine went down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// The whole process: connections are reset.
    Process,
    /// The engine core: its API server still answers open requests with an error and then stops.
    Core,
}

/// What is wrong with a metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// It stays as it was when first asked for, since this time.
    Stale(Time),
    /// It is an error with this status.
    Status(u16),
    /// It is not answered.
    Timeout,
}

/// Why an engine gives up a request in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The engine went down.
    Down(Down),
    /// The connection of the request breaks.
    Cut,
}

impl Lost {
    /// Whether the request's connection breaks. An engine core that dies has a server that still says so.
    pub const fn breaks_connection(self) -> bool {
        match self {
            Lost::Down(Down::Process) | Lost::Cut => true,
            Lost::Down(Down::Core) => false,
        }
    }

    /// Value of `error.type`.
    pub const fn error_type(self) -> &'static str {
        match self {
            Lost::Down(Down::Process) => "engine_crashed",
            Lost::Down(Down::Core) => "engine_dead",
            Lost::Cut => "stream_cut",
        }
    }
}

/// What happens to one request instead of being answered in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFault {
    /// It is refused with this HTTP status.
    Status(u16),
    /// Its connection breaks when so many tokens were written.
    Cut {
        /// Tokens written before.
        after_tokens: u32,
    },
}

impl RequestFault {
    /// Which kind of fault it is.
    pub const fn kind(self) -> FaultKind {
        match self {
            RequestFault::Status(_) => FaultKind::HttpError,
            RequestFault::Cut { .. } => FaultKind::CutStream,
        }
    }
}

/// A transfer of KV blocks that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvTransferFault {
    moved_thousandths: u32,
}

impl KvTransferFault {
    /// How many of `blocks` arrive before the transfer fails.
    pub const fn moved(self, blocks: u32) -> u32 {
        (blocks as u64 * self.moved_thousandths as u64 / 1000) as u32
    }
}

/// A condition begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It begins.
    Begin(Condition),
    /// It ends.
    End(Condition),
}

/// How often faults happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    by_kind: [u64; FaultKind::ALL.len()],
    /// Requests that were open in an engine when it went down.
    pub requests_lost: u64,
}

impl FaultCounts {
    /// How often faults of `kind` happened: conditions begun, requests and transfers struck.
    pub const fn of(&self, kind: FaultKind) -> u64 {
        self.by_kind[kind as usize]
    }

    /// Adds what another engine counted.
    pub fn add(&mut self, other: &FaultCounts) {
        self.by_kind.iter_mut().zip(other.by_kind).for_each(|(sum, n)| *sum += n);
        self.requests_lost += other.requests_lost;
    }

    fn count(&mut self, kind: FaultKind) {
        self.by_kind[kind as usize] += 1;
    }
}

/// A rule that makes conditions.
#[derive(Debug)]
struct Recurring {
    condition: Condition,
    next: Time,
    lasts: Option<Dur>,
    again: Option<(Dur, Stream)>,
}

/// A rule that strikes requests or transfers.
#[derive(Debug)]
struct Strike {
    from: Time,
    until: Option<Time>,
    rate: f64,
    stream: Stream,
    what: Struck,
}

#[derive(Clone, Copy, Debug)]
enum Struck {
    Status(u16),
    Cut(CutAfter),
    Transfer(KvTransferFault),
}

#[derive(Clone, Copy, Debug)]
struct Cut {
    key: RequestKey,
    after_tokens: u32,
    /// Whether it was in the engine when last looked for.
    seen: bool,
}

#[derive(Clone, Copy, Debug)]
struct Active {
    condition: Condition,
    until: Option<Time>,
}

impl Condition {
    /// Which kind of fault it is.
    pub const fn kind(self) -> FaultKind {
        match self {
            Condition::Down(Down::Process) => FaultKind::Crash,
            Condition::Down(Down::Core) => FaultKind::EngineDead,
            Condition::Hang => FaultKind::Hang,
            Condition::Slow(_) => FaultKind::Slow,
            Condition::Metrics(PageFault::Stale(_)) => FaultKind::MetricsStale,
            Condition::Metrics(PageFault::Status(_)) => FaultKind::MetricsError,
            Condition::Metrics(PageFault::Timeout) => FaultKind::MetricsTimeout,
        }
    }
}

impl Faults {
    /// What goes wrong now and goes on for its time, without anything that would begin later.
    pub(crate) fn under_way(&self) -> Faults {
        Faults {
            seed: self.seed,
            engine: self.engine.clone(),
            added: self.added,
            conditions: Vec::new(),
            strikes: Vec::new(),
            active: self.active.clone(),
            cuts: self.cuts.clone(),
            by_header: self.by_header,
            counts: self.counts,
        }
    }

    /// The faults of the engine called `engine`: `rules`, whose times count from the start of the run. Rules are valid
    /// ([`FaultRule::validate`]).
    pub fn new(seed: Seed, engine: &str, rules: &[FaultRule]) -> Faults {
        let mut faults = Faults {
            seed,
            engine: engine.to_owned(),
            added: 0,
            conditions: Vec::new(),
            strikes: Vec::new(),
            active: Vec::new(),
            cuts: Vec::new(),
            by_header: false,
            counts: FaultCounts::default(),
        };
        rules.iter().for_each(|rule| faults.add(Time::ZERO, rule));
        faults
    }

    /// Whether requests may ask for a fault of their own by a header.
    #[must_use]
    pub fn by_header(mut self, allowed: bool) -> Faults {
        self.by_header = allowed;
        self
    }

    /// Whether requests may ask for a fault of their own by a header.
    pub const fn are_asked_for_by_header(&self) -> bool {
        self.by_header
    }

    /// Adds a rule whose times count from `base`.
    pub fn add(&mut self, base: Time, rule: &FaultRule) {
        let stream = self.seed.stream(&format!("faults/{}/{}", self.engine, self.added));
        self.added += 1;
        match *rule {
            FaultRule::Crash { .. } => self.recurring(base, rule, stream, Condition::Down(Down::Process)),
            FaultRule::EngineDead { .. } => self.recurring(base, rule, stream, Condition::Down(Down::Core)),
            FaultRule::Hang { .. } => self.recurring(base, rule, stream, Condition::Hang),
            FaultRule::Slow { factor, .. } => {
                self.recurring(base, rule, stream, Condition::Slow((factor * 1000.0).round() as u64));
            }
            FaultRule::MetricsStale { .. } => {
                self.recurring(base, rule, stream, Condition::Metrics(PageFault::Stale(base)));
            }
            FaultRule::MetricsError { status, .. } => {
                self.recurring(base, rule, stream, Condition::Metrics(PageFault::Status(status)));
            }
            FaultRule::MetricsTimeout { .. } => {
                self.recurring(base, rule, stream, Condition::Metrics(PageFault::Timeout));
            }
            FaultRule::HttpError { rate, status, .. } => self.strike(base, rule, stream, rate, Struck::Status(status)),
            FaultRule::CutStream { rate, after_tokens, .. } => {
                self.strike(base, rule, stream, rate, Struck::Cut(after_tokens));
            }
            FaultRule::KvTransfer { rate, moved, .. } => {
                let fault = KvTransferFault { moved_thousandths: (moved * 1000.0).round() as u32 };
                self.strike(base, rule, stream, rate, Struck::Transfer(fault));
            }
        }
    }

    fn recurring(&mut self, base: Time, rule: &FaultRule, mut stream: Stream, condition: Condition) {
        let when = rule.when();
        let mean = when.mean_between.map(shared::units::HumanDur::get);
        let first = match (when.at, mean) {
            (Some(at), _) => at.get(),
            (None, Some(mean)) => exponential(&mut stream, mean),
            (None, None) => Dur::ZERO,
        };
        let lasts = when.lasts.map(shared::units::HumanDur::get);
        self.conditions.push(Recurring { condition, next: base + first, lasts, again: mean.map(|m| (m, stream)) });
    }

    fn strike(&mut self, base: Time, rule: &FaultRule, stream: Stream, rate: f64, what: Struck) {
        let when = rule.when();
        let from = base + when.at.unwrap_or_default().get();
        let until = when.lasts.map(|d| from + d.get());
        self.strikes.push(Strike { from, until, rate, stream, what });
    }

    /// Takes every rule back and ends what is under way, at `now`.
    pub fn clear(&mut self, now: Time) {
        self.conditions.clear();
        self.strikes.clear();
        self.active.iter_mut().for_each(|a| a.until = Some(a.until.map_or(now, |until| until.min(now))));
    }

    /// When a condition begins or ends next.
    pub fn next_change(&self) -> Option<Time> {
        let ends = self.active.iter().filter_map(|a| a.until);
        self.conditions.iter().map(|c| c.next).chain(ends).min()
    }

    /// Takes the next change that is due at `now`; of simultaneous ones ends come first, then beginnings in the order of the rules.
    pub fn change(&mut self, now: Time) -> Option<(Time, Change)> {
        let at = self.next_change().filter(|at| *at <= now)?;
        if let Some(i) = self.active.iter().position(|a| a.until == Some(at)) {
            return Some((at, Change::End(self.active.remove(i).condition)));
        }
        let i = self.conditions.iter().position(|c| c.next == at)?;
        let rule = &mut self.conditions[i];
        let condition = match rule.condition {
            Condition::Metrics(PageFault::Stale(_)) => Condition::Metrics(PageFault::Stale(at)),
            other @ (Condition::Down(_) | Condition::Hang | Condition::Slow(_) | Condition::Metrics(_)) => other,
        };
        let until = rule.lasts.map(|lasts| at + lasts);
        match &mut rule.again {
            Some((mean, stream)) => rule.next = until.unwrap_or(at) + exponential(stream, *mean),
            None => {
                self.conditions.remove(i);
            }
        }
        self.active.push(Active { condition, until });
        self.counts.count(condition.kind());
        Some((at, Change::Begin(condition)))
    }

    /// How the engine is down, if it is.
    pub fn down(&self) -> Option<Down> {
        self.active.iter().find_map(|a| match a.condition {
            Condition::Down(down) => Some(down),
            Condition::Hang | Condition::Slow(_) | Condition::Metrics(_) => None,
        })
    }

    /// When something planned for `at` can happen, as far as hangs under way are concerned; `None` if never.
    pub fn released(&self, at: Time) -> Option<Time> {
        let hangs = self.active.iter().filter(|a| a.condition == Condition::Hang);
        hangs.map(|a| a.until).try_fold(at, |at, until| Some(at.max(until?)))
    }

    /// How many thousandths of its usual time a step takes now.
    pub fn slowness(&self) -> u64 {
        self.active.iter().fold(1000, |product: u64, a| match a.condition {
            Condition::Slow(thousandths) => product.saturating_mul(thousandths) / 1000,
            Condition::Down(_) | Condition::Hang | Condition::Metrics(_) => product,
        })
    }

    /// What is wrong with the metrics page now; of several faults the newest.
    pub fn page(&self) -> Option<PageFault> {
        self.active.iter().rev().find_map(|a| match a.condition {
            Condition::Metrics(fault) => Some(fault),
            Condition::Down(_) | Condition::Hang | Condition::Slow(_) => None,
        })
    }

    /// Whether a request that arrives at `now` is struck. Every rule in force draws once for every request, the first that hits
    /// counts.
    pub fn request(&mut self, now: Time) -> Option<RequestFault> {
        let mut struck = None;
        for rule in self.strikes.iter_mut().filter(|r| r.is_in_force(now)) {
            let fault = match rule.what {
                Struck::Status(status) => rule.hits().then_some(RequestFault::Status(status)),
                Struck::Cut(after) => {
                    let after_tokens = rule.tokens(after);
                    rule.hits().then_some(RequestFault::Cut { after_tokens })
                }
                Struck::Transfer(_) => None,
            };
            struck = struck.or(fault);
        }
        struck
    }

    /// Whether a transfer of KV blocks that begins at `now` fails, asked once per transfer by the side that receives.
    pub fn kv_transfer(&mut self, now: Time) -> Option<KvTransferFault> {
        let mut struck = None;
        for rule in self.strikes.iter_mut().filter(|r| r.is_in_force(now)) {
            if let Struck::Transfer(fault) = rule.what {
                struck = struck.or(rule.hits().then_some(fault));
            }
        }
        if struck.is_some() {
            self.counts.count(FaultKind::KvTransfer);
        }
        struck
    }

    /// Takes note of what strikes a request, whether it was drawn or asked for.
    pub(crate) fn struck(&mut self, key: RequestKey, fault: RequestFault) {
        self.counts.count(fault.kind());
        if let RequestFault::Cut { after_tokens } = fault {
            self.cuts.push(Cut { key, after_tokens, seen: false });
        }
    }

    /// Requests whose connection breaks now; `tokens` says how many an open request has been given.
    pub(crate) fn cut(&mut self, tokens: impl Fn(RequestKey) -> Option<u32>) -> Vec<RequestKey> {
        let mut now = Vec::new();
        self.cuts.retain_mut(|cut| match tokens(cut.key) {
            Some(given) if given >= cut.after_tokens => {
                now.push(cut.key);
                false
            }
            Some(_) => {
                cut.seen = true;
                true
            }
            // It has ended before, or is on its way.
            None => !cut.seen,
        });
        now
    }

    /// Whether the connection of a request that arrives breaks before its first token.
    pub(crate) fn cut_at_once(&mut self, key: RequestKey) -> bool {
        let found = self.cuts.iter().position(|cut| cut.key == key && cut.after_tokens == 0);
        found.map(|i| self.cuts.swap_remove(i)).is_some()
    }

    /// Forgets a request that ended.
    pub(crate) fn spare(&mut self, key: RequestKey) {
        self.cuts.retain(|cut| cut.key != key);
    }

    /// Counts requests that were open when the engine went down.
    pub(crate) fn lost(&mut self, requests: u64) {
        self.counts.requests_lost += requests;
    }

    /// Conditions under way and when they end, oldest first.
    pub fn active(&self) -> impl Iterator<Item = (Condition, Option<Time>)> {
        self.active.iter().map(|a| (a.condition, a.until))
    }

    /// How often faults happened so far.
    pub const fn counts(&self) -> &FaultCounts {
        &self.counts
    }
}

impl Strike {
    fn is_in_force(&self, now: Time) -> bool {
        self.from <= now && self.until.is_none_or(|until| now < until)
    }

    fn hits(&mut self) -> bool {
        self.stream.unit() < self.rate
    }

    fn tokens(&mut self, after: CutAfter) -> u32 {
        match after {
            CutAfter::Tokens(n) => n,
            CutAfter::Between(TokenRange { min, max }) => min + self.stream.below((max - min) as usize + 1) as u32,
        }
    }
}

/// Value of `error.type` for an answer with this HTTP status: the status itself, as HTTP conventions have it.
pub fn http_error_type(status: u16) -> &'static str {
    static CODES: LazyLock<Vec<String>> = LazyLock::new(|| (0..1000).map(|code| format!("{code:03}")).collect());
    CODES.get(usize::from(status)).map_or("500", String::as_str)
}

/// An exponentially distributed time with this mean, at least a nanosecond.
fn exponential(stream: &mut Stream, mean: Dur) -> Dur {
    Dur::from_secs_f64(mean.as_secs_f64() * -(1.0 - stream.unit()).ln()).max(Dur::from_nanos(1))
}
