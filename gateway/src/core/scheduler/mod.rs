//! Choosing an endpoint: filters, scorers and a picker over a snapshot of candidates.
//!
//! A plugin is a pure function of the snapshot behind a one-method trait; it sees neither sockets nor other requests.

pub mod filters;
pub mod pickers;
pub mod registry;
pub mod scorers;

use shared::rng::Stream;

use crate::core::pool::{EndpointId, Pool, Role};

/// What is known of one endpoint when a request is scheduled. Without metrics the loads are 0, as in llm-d.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The endpoint.
    pub id: EndpointId,
    /// Whether it may get new requests.
    pub available: bool,
    /// What it is for.
    pub role: Role,
    /// Requests in its queue.
    pub waiting: u32,
    /// Requests in its batch.
    pub running: u32,
    /// Used part of its KV cache, 0 to 1.
    pub kv_usage: f64,
    /// Leading blocks of the prompt that it was sent before.
    pub matched_blocks: u32,
    /// Whether the request's session was here last.
    pub had_session: bool,
}

/// What plugins see besides the candidates.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Configuration of the endpoints.
    pub pool: &'a Pool,
    /// Blocks in the prompt's prefix.
    pub prefix_blocks: u32,
}

/// Takes candidates out.
pub trait Filter: Send + Sync {
    /// Removes from `candidates` what must not be used, keeping the order.
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>);
}

/// Rates candidates.
pub trait Scorer: Send + Sync {
    /// Sets `scores[i]` for `candidates[i]`, 0 (worst) to 1 (best); what lies outside is clamped.
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]);
}

/// Chooses one of the candidates by their weighted scores.
pub trait Picker: Send + Sync {
    /// The chosen candidate's place in `scores`, which is not empty, and how many others were as good.
    fn pick(&self, scores: &[f64], random: &mut Stream) -> Picked;
}

/// A picker's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Place of the chosen candidate.
    pub index: usize,
    /// Other candidates between which and this one only chance decided.
    pub ties: u32,
}

/// Candidates for the tables of plugin tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn candidate(id: u32) -> Candidate {
        Candidate {
            id: EndpointId(id),
            available: true,
            role: Role::Both,
            waiting: 0,
            running: 0,
            kv_usage: 0.0,
            matched_blocks: 0,
            had_session: false,
        }
    }

    pub(crate) fn candidates(n: u32, change: impl Fn(usize, &mut Candidate)) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = (0..n).map(candidate).collect();
        all.iter_mut().enumerate().for_each(|(i, c)| change(i, c));
        all
    }
}
