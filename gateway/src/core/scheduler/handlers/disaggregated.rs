//! `disagg-profile-handler`: a decode endpoint, and a prefill endpoint for the requests that are worth it.
//!
//! Decode first: the decode profile runs, a decider looks at its choice, and the prefill profile runs if it says so. Prefill first:
//! both profiles run. Without a decode endpoint the request is refused; without a prefill endpoint the decode endpoint does it all.

use shared::time::{Stage, Time};

use crate::core::config::{DisaggregationConfig, ProfileConfig, StageOrder};
use crate::core::scheduler::handlers::Decision;
use crate::core::scheduler::profile::{Chosen, Profile};
use crate::core::scheduler::registry::{self, Reads};
use crate::core::scheduler::{Candidate, Decider, Room, Run, Verdict};
use crate::spans::GatewayFact;

/// The handler, its profiles and its decider.
pub(crate) struct Disaggregated {
    decode: Profile,
    prefill: Profile,
    decider: Box<dyn Decider>,
    order: StageOrder,
    reads: Reads,
    /// What both profiles choose from.
    gathered: Vec<Candidate>,
}

/// What is said of a request where nothing is decided because both profiles run.
const PREFILL_FIRST: Verdict =
    Verdict { disaggregate: true, reason: "prefill_first", uncached_tokens: None, threshold_tokens: None };

impl Disaggregated {
    pub(super) fn new(decode: &ProfileConfig, config: &DisaggregationConfig) -> Disaggregated {
        let decider = registry::decider(&config.decider.kind, &config.decider.parameters);
        let decider = decider.expect("the decider is validated before it is used");
        let (decode, prefill) = (Profile::new(decode), Profile::new(&config.profile));
        let reads = decode.reads().and(prefill.reads()).and(decider.reads);
        let (decider, order) = (decider.plugin, config.stage_order);
        Disaggregated { decode, prefill, decider, order, reads, gathered: Vec::new() }
    }

    pub(super) const fn reads(&self) -> Reads {
        self.reads
    }

    pub(super) fn schedule(&mut self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        std::mem::swap(&mut self.gathered, &mut room.candidates);
        match self.order {
            StageOrder::DecodeFirst => self.decode_first(at, room, run),
            StageOrder::PrefillFirst => self.prefill_first(at, room, run),
        }
    }

    fn decode_first(&self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        let (Some(decode), at) = self.run(&self.decode, at, room, run) else { return (None, at) };
        let verdict = self.decider.decide(&run.view, &decode.candidate);
        let decided = run.watch.lap(Stage::Decide);
        run.trail.note(decided, || GatewayFact::PdDecided { started: at, verdict });
        if !verdict.disaggregate {
            return (Some(Decision::alone(decode)), decided);
        }
        let (prefill, at) = self.run(&self.prefill, decided, room, run);
        (Some(together(&decode, prefill.as_ref(), prefill.as_ref())), at)
    }

    fn prefill_first(&self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        let (prefill, at) = self.run(&self.prefill, at, room, run);
        let (Some(decode), at) = self.run(&self.decode, at, room, run) else { return (None, at) };
        run.trail.note(at, || GatewayFact::PdDecided { started: at, verdict: PREFILL_FIRST });
        (Some(together(&decode, prefill.as_ref(), Some(&decode))), at)
    }

    fn run(&self, profile: &Profile, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Chosen>, Time) {
        room.candidates.clone_from(&self.gathered);
        profile.run(at, room, run)
    }
}

/// Both choices; what the producers remember is what the profile that ran last saw, as in llm-d.
fn together(decode: &Chosen, prefill: Option<&Chosen>, last: Option<&Chosen>) -> Decision {
    Decision {
        endpoint: decode.candidate,
        prefill: prefill.map(|p| p.candidate),
        cold: last.and_then(|c| c.cold).or(decode.cold).unwrap_or(false),
        session_present: decode.session_present,
    }
}

impl std::fmt::Debug for Disaggregated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Disaggregated { decode, prefill, order, .. } = self;
        f.debug_struct("Disaggregated")
            .field("decode", decode)
            .field("prefill", prefill)
            .field("order", order)
            .finish_non_exhaustive()
    }
}
