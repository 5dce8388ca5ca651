//! The network between the KV connectors of a virtual run: every message takes the same time, none is lost.
//!
//! What the live side channel does over HTTP (`engine-sim/src/server/kv`), with an event queue instead.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_sim::core::engine::Engine;
use engine_sim::core::kv_transfer::{KvInput, KvOutput, LoadId, Notice, Peer, Pull, PullKey, TransferError};
use engine_sim::spans::transfer_span_id;
use shared::time::{Dur, Time};
use shared::trace::{TraceContext, Tracer, Trail};

/// A message under way.
#[derive(Debug)]
pub(super) struct Message {
    /// When it arrives.
    pub(super) at: Time,
    /// At which engine.
    pub(super) to: usize,
    /// What it says.
    pub(super) input: KvInput,
}

/// The engines of a run by their names among KV connectors, and what is between them.
pub(super) struct PeerNetwork {
    peers: Vec<Arc<Peer>>,
    by_id: BTreeMap<Arc<str>, usize>,
    delay: Dur,
    /// Who waits for the end of a pull.
    pulls: BTreeMap<PullKey, (usize, LoadId)>,
    /// Places in traces of pulls that have not arrived.
    contexts: BTreeMap<PullKey, TraceContext>,
    next_key: u64,
    said: Vec<KvOutput>,
}

impl PeerNetwork {
    /// A network of these engines, in their order. An engine that is not named by its configuration is called like its instance.
    pub(super) fn new<'a>(engines: impl Iterator<Item = &'a Engine>, delay: Dur) -> PeerNetwork {
        let peer = |(i, engine): (usize, &Engine)| {
            let own = engine.config().kv_transfer.as_ref().and_then(|kv| kv.engine_id.as_deref());
            let engine_id = own.map_or_else(|| format!("engine-{i}").into(), Arc::from);
            Arc::new(Peer { engine_id, host: format!("engine-{i}").into(), port: SIDE_CHANNEL_PORT })
        };
        let peers: Vec<Arc<Peer>> = engines.enumerate().map(peer).collect();
        let by_id = peers.iter().enumerate().map(|(i, peer)| (Arc::clone(&peer.engine_id), i)).collect();
        let (pulls, contexts) = (BTreeMap::new(), BTreeMap::new());
        PeerNetwork { peers, by_id, delay, pulls, contexts, next_key: 0, said: Vec::new() }
    }

    /// Takes what engine `from` says by now.
    pub(super) fn carry(&mut self, from: usize, engine: &mut Engine) -> Vec<Message> {
        let mut said = std::mem::take(&mut self.said);
        engine.drain_kv(&mut said);
        let messages = said.drain(..).filter_map(|output| self.route(from, output)).collect();
        self.said = said;
        messages
    }

    fn route(&mut self, from: usize, output: KvOutput) -> Option<Message> {
        let at = output.at() + self.delay;
        match output {
            KvOutput::Pull { load, remote, blocks, ranks, breaks_after, caller, .. } => {
                let trail = Trail::off();
                let (request, peer) = (Arc::clone(&remote.request), Arc::clone(&self.peers[from].engine_id));
                let pull = Pull { key: self.key(), request, blocks, ranks, breaks_after, peer, trail };
                Some(self.pull(at, (from, load), &remote.peer, pull, caller))
            }
            KvOutput::Notify { peer, what, requests, .. } => {
                let Some(to) = self.find(&peer) else {
                    return Some(Message { at: at + self.delay, to: from, input: KvInput::NotReached });
                };
                let input = match what {
                    Notice::Heartbeat => KvInput::Heartbeat(requests),
                    Notice::Done => KvInput::Done(requests),
                };
                Some(Message { at, to, input })
            }
            KvOutput::Sent { key, outcome, .. } => {
                let (to, load) = self.pulls.remove(&key)?;
                Some(Message { at, to, input: KvInput::Received { load, outcome } })
            }
        }
    }

    /// An engine as others know it.
    pub(super) fn peer(&self, engine: usize) -> Arc<Peer> {
        Arc::clone(&self.peers[engine])
    }

    fn find(&self, peer: &Peer) -> Option<usize> {
        self.by_id.get(&peer.engine_id).copied()
    }

    fn pull(
        &mut self,
        at: Time,
        (from, load): (usize, LoadId),
        peer: &Peer,
        pull: Pull,
        caller: Option<TraceContext>,
    ) -> Message {
        let Some(to) = self.find(peer) else {
            let outcome = Err(TransferError::Unreachable);
            return Message { at: at + self.delay, to: from, input: KvInput::Received { load, outcome } };
        };
        self.pulls.insert(pull.key, (from, load));
        if let Some(caller) = caller {
            self.contexts.insert(pull.key, caller.child(transfer_span_id(caller.span_id)));
        }
        Message { at, to, input: KvInput::Pull(pull) }
    }

    fn key(&mut self) -> PullKey {
        self.next_key += 1;
        PullKey(self.next_key)
    }

    /// Opens the sender's record of a pull that arrives at `now`, if the request that reads is recorded.
    pub(super) fn record(&mut self, input: &mut KvInput, tracer: &Tracer, now: Time) {
        if let KvInput::Pull(pull) = input
            && let Some(context) = self.contexts.remove(&pull.key)
        {
            pull.trail = tracer.open(&tracer.begin(Some(context)), now);
        }
    }
}

/// vLLM's default (`VLLM_NIXL_SIDE_CHANNEL_PORT`).
const SIDE_CHANNEL_PORT: u16 = 5600;

#[cfg(test)]
mod tests;
