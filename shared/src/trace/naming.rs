//! Whose names spans have: one fold of a component's facts for each naming, and the choice between them.

use std::fmt;
use std::str::FromStr;

use crate::time::Time;
use crate::trace::fold::{Cx, Fold, Form};
use crate::trace::record::Ending;

/// Whose names, kinds and topology the spans of a run have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Naming {
    /// Those of llm-d's tracing proposal, with what is added to it: the whole catalogue.
    #[default]
    Proposal,
    /// Those of llm-d's own components since September 2026: what an endpoint picker, a routing sidecar and vLLM emit, and no more.
    LlmD,
}

impl Naming {
    /// As it is written in files and on command lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Naming::Proposal => "proposal",
            Naming::LlmD => "llm-d",
        }
    }

    /// What a service is called that is `ours` in the catalogue, unless the operator names it.
    pub fn service(self, ours: &str) -> &str {
        match (self, ours) {
            (Naming::LlmD, "inference-gateway") => "llm-d-epp",
            (Naming::LlmD, "pd-proxy") => "llm-d-disagg-sidecar",
            (Naming::LlmD | Naming::Proposal, ours) => ours,
        }
    }
}

impl FromStr for Naming {
    type Err = String;

    fn from_str(text: &str) -> Result<Naming, String> {
        let all = [Naming::Proposal, Naming::LlmD];
        all.into_iter()
            .find(|n| n.as_str() == text)
            .ok_or_else(|| format!("found `{text}`, expected proposal or llm-d"))
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The fold under way of a record, by its naming.
#[derive(Debug)]
pub enum Named<P, L> {
    /// Into the catalogue's spans.
    Proposal(P),
    /// Into those of llm-d's components.
    LlmD(L),
}

impl<F, S: Form, P: Fold<F, S>, L: Fold<F, S>> Fold<F, S> for Named<P, L> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        match cx.head.naming {
            Naming::Proposal => Named::Proposal(P::begin(cx)),
            Naming::LlmD => Named::LlmD(L::begin(cx)),
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &F) {
        match self {
            Named::Proposal(fold) => fold.fact(cx, at, fact),
            Named::LlmD(fold) => fold.fact(cx, at, fact),
        }
    }

    fn end(self, cx: &mut Cx<'_, S>, ending: &Ending) {
        match self {
            Named::Proposal(fold) => fold.end(cx, ending),
            Named::LlmD(fold) => fold.end(cx, ending),
        }
    }
}
