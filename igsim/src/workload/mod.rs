//! The requests of a run, one after the other: a plan made of a scenario and a seed, in bounded memory.
//!
//! A driver asks [`Plan::next_arrival`] for what comes by itself, and tells [`Plan::finished`] about every request that ended;
//! what that sets off (the next turn of a conversation, the next request of a closed-loop client) is its answer. The plan reads
//! no clock and sends nothing. Prompts are names of content; [`PlannedRequest::tokens`] makes tokens of them.

mod arrivals;
mod compose;
mod draws;

use std::sync::Arc;

use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};

use crate::replay::{Reader, ReplayError};
use crate::scenario::{Arrivals, Scenario};

use arrivals::Process;
use compose::Composer;

/// A conversation, or a single request that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A piece of a prompt: `tokens` tokens of `content`, from token `from` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Whose text.
    pub content: ContentId,
    /// First token.
    pub from: u64,
    /// How many.
    pub tokens: u32,
}

/// A request as it should be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedRequest {
    /// Number in the order of planning, from 0.
    pub index: u64,
    /// Index into the scenario's tenants; 0 when there are none.
    pub tenant: u16,
    /// The closed-loop client that sends it.
    pub client: Option<u32>,
    /// When to send it.
    pub intended: Time,
    /// The conversation and the turn in it from 0, when the scenario has conversations.
    pub session: Option<(SessionId, u32)>,
    /// The prompt.
    pub prompt: Vec<Segment>,
    /// Its length.
    pub prompt_tokens: u32,
    /// How long the answer is to be.
    pub output_tokens: u32,
    /// What the answer says, where the engine leaves that to the plan.
    pub output: ContentId,
    /// Whether the answer streams.
    pub streaming: bool,
    /// Its priority in llm-d's sense: higher is more important.
    pub priority: i32,
    /// The objective it names.
    pub objective: Option<Arc<str>>,
    /// What its draws are keyed by.
    key: u64,
    /// Its turn, also where there are no conversations.
    turn: u32,
}

/// The answer to a request, as the next turn has to repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What it says.
    pub content: ContentId,
    /// How long it is.
    pub tokens: u32,
}

impl PlannedRequest {
    /// Appends the tokens of the prompt.
    pub fn tokens(&self, out: &mut Vec<TokenId>) {
        out.reserve(self.prompt_tokens as usize);
        for s in &self.prompt {
            s.content.extend(s.from, s.from + u64::from(s.tokens), out);
        }
    }

    /// Whether it begins a conversation, or is none.
    pub fn is_first_turn(&self) -> bool {
        self.turn == 0
    }

    /// The answer as planned.
    pub fn planned_answer(&self) -> Answer {
        Answer { content: self.output, tokens: self.output_tokens }
    }
}

/// The plan of a run.
#[derive(Debug)]
pub struct Plan {
    source: Source,
    composer: Composer,
    planned: u64,
    requests: u64,
    end: Time,
}

#[derive(Debug)]
enum Source {
    /// Sessions that start by themselves; the next one's number.
    Open(Box<Process>, u64),
    /// Clients that wait; how many have started, and how many sessions each has had.
    Closed { started: u32, sessions: Vec<u64> },
    /// A recorded trace.
    Replay(Box<Reader>),
}

impl Plan {
    /// The plan of a valid scenario. Opens the trace where there is one.
    ///
    /// # Errors
    /// The trace cannot be opened.
    pub fn new(scenario: &Scenario, seed: Seed) -> Result<Plan, ReplayError> {
        let source = match (&scenario.trace, &scenario.workload.arrivals) {
            (Some(trace), _) => Source::Replay(Box::new(Reader::open(trace, seed)?)),
            (None, Some(Arrivals::Closed { concurrency, .. })) => {
                Source::Closed { started: 0, sessions: vec![0; *concurrency as usize] }
            }
            (None, Some(open)) => Source::Open(Box::new(Process::new(open, seed)), 0),
            // Validation asks for arrivals; without any, nothing comes.
            (None, None) => Source::Closed { started: 0, sessions: Vec::new() },
        };
        Ok(Plan {
            source,
            composer: Composer::new(scenario, seed),
            planned: 0,
            requests: scenario.requests.unwrap_or(u64::MAX),
            end: scenario.duration.map_or(Time::MAX, |d| Time::ZERO + d.get()),
        })
    }

    /// The next request that comes by itself, in order of time; `None` when no more do. Closed-loop clients' first requests
    /// come at the start of the run.
    ///
    /// # Errors
    /// A line of the trace that cannot be read.
    pub fn next_arrival(&mut self) -> Result<Option<PlannedRequest>, ReplayError> {
        if self.planned >= self.requests {
            return Ok(None);
        }
        let next = match &mut self.source {
            Source::Open(process, session) => {
                let at = process.next_arrival();
                (at < self.end).then(|| {
                    *session += 1;
                    self.composer.first(*session - 1, None, at)
                })
            }
            Source::Closed { started, sessions } => ((*started as usize) < sessions.len()).then(|| {
                let client = *started;
                *started += 1;
                sessions[client as usize] = 1;
                self.composer.first(u64::from(client), Some(client), Time::ZERO)
            }),
            Source::Replay(reader) => {
                let recorded = reader.next().transpose()?.filter(|r| r.at < self.end);
                recorded.map(|r| self.composer.recorded(self.planned, r))
            }
        };
        Ok(next.map(|r| self.number(r)))
    }

    /// What the end of `request` at `at` sets off, if anything. `answer` is `None` when the request failed: a conversation
    /// ends there, a closed-loop client goes on with its next one.
    pub fn finished(&mut self, request: &PlannedRequest, at: Time, answer: Option<Answer>) -> Option<PlannedRequest> {
        if self.planned >= self.requests {
            return None;
        }
        let end = self.end;
        let after = |pause: Dur| Some(at.saturating_add(pause)).filter(|&t| t < end);
        if let Some(turn) = answer.and_then(|a| self.composer.next_turn(request, a)) {
            let intended = after(self.composer.turn_pause(request))?;
            return Some(self.number(PlannedRequest { intended, ..turn }));
        }
        let (Source::Closed { sessions, .. }, Some(client)) = (&mut self.source, request.client) else { return None };
        let intended = after(self.composer.client_pause(request))?;
        let clients = sessions.len() as u64;
        let had = sessions.get_mut(client as usize)?;
        let key = *had * clients + u64::from(client);
        *had += 1;
        let next = self.composer.first(key, Some(client), intended);
        Some(self.number(next))
    }

    /// How many requests have been planned.
    pub fn planned(&self) -> u64 {
        self.planned
    }

    fn number(&mut self, mut request: PlannedRequest) -> PlannedRequest {
        request.index = self.planned;
        self.planned += 1;
        request
    }
}

#[cfg(test)]
mod tests;
