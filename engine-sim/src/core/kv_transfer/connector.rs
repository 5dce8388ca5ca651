//! The connector of one engine: leases and sends on P's side, loads and heartbeats on D's.
//!
//! Decides nothing about blocks: it says which pinned ones are free ([`Freed`]) and the engine frees them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use shared::ids::{SpanId, TraceId};
use shared::time::Time;
use shared::trace::{TraceContext, Trail};

use super::lease::Leases;
use super::receive::Wanted;
use super::{
    KvInput, KvMetrics, KvOutput, KvTransferConfig, LinkKind, LoadFailurePolicy, LoadId, Notice, Pull, PullKey,
    RemoteBlocks, SendFact, Shipment, Transfer, TransferError,
};
use crate::core::latency::LatencyProfile;
use crate::core::scheduler::{LoadStart, PinId};
use crate::core::sequence::SeqIx;

/// Pins that nobody needs any more.
pub(crate) type Freed = Vec<PinId>;

/// A request whose blocks are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) pin: PinId,
    pub(crate) blocks: u32,
    /// Its place in its trace, if it was recorded.
    pub(crate) span: Option<(TraceId, SpanId)>,
}

/// A load under way.
#[derive(Clone, Debug)]
struct Load {
    remote: Arc<RemoteBlocks>,
    ix: SeqIx,
    /// Blocks that arrive before the link breaks, if it does.
    breaks_after: Option<u32>,
}

/// A send under way.
#[derive(Clone, Debug)]
struct Sending {
    request: Arc<str>,
    transfer: Transfer,
    /// Whether the link breaks then.
    breaks: bool,
    trail: Trail<SendFact>,
}

#[derive(Clone, Debug)]
pub(crate) struct Connector {
    config: KvTransferConfig,
    profile: Arc<LatencyProfile>,
    block_size: u32,
    leases: Leases<Request>,
    /// By the time at which the last block is sent.
    sends: BTreeMap<(Time, PullKey), Sending>,
    wanted: Wanted,
    /// Loads under way.
    loads: BTreeMap<LoadId, Load>,
    /// Not handed over, in time order.
    outbox: VecDeque<KvOutput>,
    /// Handed over by the engine's last advance, not taken by the driver.
    due: Vec<KvOutput>,
    pub(crate) metrics: KvMetrics,
}

impl Connector {
    pub(crate) fn new(config: KvTransferConfig, profile: Arc<LatencyProfile>, block_size: u32) -> Connector {
        Connector {
            wanted: Wanted::new(config.heartbeat_interval()),
            config,
            profile,
            block_size,
            leases: Leases::default(),
            sends: BTreeMap::new(),
            loads: BTreeMap::new(),
            outbox: VecDeque::new(),
            due: Vec::new(),
            metrics: KvMetrics::default(),
        }
    }

    pub(crate) fn link(&self) -> LinkKind {
        self.config.kv_connector_extra_config.link
    }

    pub(crate) fn policy(&self) -> LoadFailurePolicy {
        self.config.kv_load_failure_policy
    }

    /// Grants the lease of a request that ended at `now`. A lease under the same name ends.
    pub(crate) fn keep(&mut self, now: Time, name: Arc<str>, request: Request) -> Option<PinId> {
        self.leases.grant(name, now.saturating_add(self.config.lease()), request).map(|before| before.pin)
    }

    /// Leases that have not ended.
    pub(crate) fn leases(&self) -> usize {
        self.leases.len()
    }

    /// D has a request whose blocks are elsewhere.
    pub(crate) fn want(&mut self, now: Time, remote: &RemoteBlocks) {
        self.wanted.add(now, remote);
    }

    /// D's request ended, or has its blocks.
    pub(crate) fn unwant(&mut self, remote: &RemoteBlocks) {
        self.wanted.remove(remote);
    }

    /// D reads nothing of these blocks: an empty receive, so that P lets go of them.
    pub(crate) fn receive_nothing(&mut self, at: Time, remote: &RemoteBlocks) {
        self.unwant(remote);
        let (peer, requests) = (Arc::clone(&remote.peer), vec![Arc::clone(&remote.request)]);
        self.emit(KvOutput::Notify { at, peer, what: Notice::Done, requests });
    }

    /// D reads the remote blocks that `start` has room for: the last ones.
    pub(crate) fn receive(
        &mut self,
        at: Time,
        start: &LoadStart,
        remote: &Arc<RemoteBlocks>,
        breaks_after: Option<u32>,
        caller: Option<TraceContext>,
    ) {
        let LoadStart { load, ix, blocks, .. } = *start;
        self.loads.insert(load, Load { remote: Arc::clone(remote), ix, breaks_after });
        let (remote, ranks) = (Arc::clone(remote), self.profile.tensor_parallel);
        self.emit(KvOutput::Pull { at, load, remote, blocks, ranks, breaks_after, caller });
    }

    /// D's load ended. Returns the slot of the request it was for and, if it failed, how many blocks had arrived; `None` if there
    /// is no such load.
    pub(crate) fn received(&mut self, load: LoadId, outcome: &Result<Transfer, TransferError>) -> Option<(SeqIx, u32)> {
        let Load { remote, ix, breaks_after } = self.loads.remove(&load)?;
        self.unwant(&remote);
        match outcome {
            Ok(transfer) => self.metrics.observe(transfer),
            Err(_) => self.metrics.nixl_num_failed_transfers += 1,
        }
        let arrived = match outcome {
            Err(TransferError::Broken) => breaks_after.unwrap_or(0),
            Ok(_) | Err(_) => 0,
        };
        Some((ix, arrived))
    }

    /// The engine is down: whoever wants to read learns that, and nothing else matters.
    pub(crate) fn nobody_is_there(&mut self, now: Time, input: KvInput) {
        if let KvInput::Pull(Pull { key, blocks, peer, trail, .. }) = input {
            let link = self.link();
            trail.note(now, || SendFact::Asked { blocks, link, peer });
            self.refuse(now, key, TransferError::Unreachable, trail);
        }
    }

    /// The engine goes down: `after`, which takes its place, says so to whoever reads, and hands over what was said before.
    pub(crate) fn go_down(mut self, at: Time, after: &mut Connector) {
        self.hand_over(at);
        after.due = self.due;
        for ((_, key), Sending { trail, .. }) in self.sends {
            after.refuse(at, key, TransferError::Unreachable, trail);
        }
    }

    fn refuse(&mut self, at: Time, key: PullKey, error: TransferError, trail: Trail<SendFact>) {
        trail.note(at, || SendFact::Failed(error));
        trail.finish(at);
        self.emit(KvOutput::Sent { at, key, outcome: Err(error) });
    }

    /// What happens at P, and outside any request at D.
    pub(crate) fn handle(&mut self, now: Time, input: KvInput) -> Freed {
        match input {
            KvInput::Pull(pull) => self.asked(now, pull),
            KvInput::Heartbeat(requests) => {
                let until = now.saturating_add(self.config.lease_extension());
                for request in requests {
                    self.leases.extend(&request, until);
                }
            }
            KvInput::Done(requests) => return requests.iter().filter_map(|r| self.let_go(r)).collect(),
            KvInput::Refused(remote) => self.receive_nothing(now, &remote),
            KvInput::NotReached => self.metrics.nixl_num_failed_notifications += 1,
            KvInput::Received { .. } => unreachable!("the engine ends loads when it completes a step"),
        }
        Freed::new()
    }

    fn let_go(&mut self, request: &str) -> Option<PinId> {
        let ended = self.leases.end(request);
        if ended.is_none() {
            self.metrics.nixl_num_notifications_after_expiry += 1;
        }
        ended.map(|request| request.pin)
    }

    fn asked(&mut self, now: Time, pull: Pull) {
        let Pull { key, request, blocks, ranks, breaks_after, peer, trail } = pull;
        let link = self.link();
        trail.note(now, || SendFact::Asked { blocks, link, peer });
        let refused = match self.leases.get(&request) {
            None => TransferError::NotKept,
            Some(kept) if blocks > kept.blocks => TransferError::TooMany,
            Some(kept) => {
                if let Some((trace, span)) = kept.span {
                    trail.note(now, || SendFact::Computed(trace, span));
                }
                let moved = breaks_after.map_or(blocks, |after| after.min(blocks));
                let shipment = Shipment { blocks: moved, block_size: self.block_size, receiver_ranks: ranks };
                let transfer = Transfer::over(link, &self.profile, shipment);
                trail.note(now, || SendFact::Sending(transfer));
                let sending = Sending { request, transfer, breaks: breaks_after.is_some(), trail };
                self.sends.insert((now.saturating_add(transfer.time), key), sending);
                return;
            }
        };
        self.refuse(now, key, refused, trail);
    }

    /// When the connector has something to do of its own or to hand over.
    pub(crate) fn next_wakeup(&self) -> Option<Time> {
        let handed = self.outbox.front().map(KvOutput::at);
        handed.into_iter().chain(self.next_event()).min()
    }

    /// When the connector has something to do of its own.
    pub(crate) fn next_event(&self) -> Option<Time> {
        let sent = self.sends.first_key_value().map(|((at, _), _)| *at);
        [sent, self.leases.next_expiry(), self.wanted.next_beat()].into_iter().flatten().min()
    }

    /// Does what is due at `now`: sends end, leases expire, heartbeats go out, in this order.
    pub(crate) fn advance(&mut self, now: Time) -> Freed {
        let mut freed = Freed::new();
        while let Some(entry) = self.sends.first_entry().filter(|e| e.key().0 <= now) {
            let ((at, key), Sending { request, transfer, breaks, trail }) = entry.remove_entry();
            if breaks {
                // No notification comes, so the lease ends by itself.
                self.refuse(at, key, TransferError::Broken, trail);
                continue;
            }
            freed.extend(self.let_go(&request));
            trail.finish(at);
            self.emit(KvOutput::Sent { at, key, outcome: Ok(transfer) });
        }
        while let Some((_, request)) = self.leases.expired(now) {
            self.metrics.nixl_num_kv_expired_reqs += 1;
            freed.push(request.pin);
        }
        for (peer, requests) in self.wanted.beats(now) {
            self.emit(KvOutput::Notify { at: now, peer, what: Notice::Heartbeat, requests });
        }
        freed
    }

    /// Makes what is said by `now` ready for the driver.
    pub(crate) fn hand_over(&mut self, now: Time) {
        while self.outbox.front().is_some_and(|o| o.at() <= now) {
            self.due.extend(self.outbox.pop_front());
        }
    }

    /// Moves what was handed over to `out`.
    pub(crate) fn drain(&mut self, out: &mut Vec<KvOutput>) {
        out.append(&mut self.due);
    }

    fn emit(&mut self, output: KvOutput) {
        let later = self.outbox.iter().rev().take_while(|o| o.at() > output.at()).count();
        self.outbox.insert(self.outbox.len() - later, output);
    }
}
