//! D's side: whose blocks are wanted, and when their engines are told so.
//!
//! vLLM's rules (`on_new_request`, `_stop_heartbeat`): a request counts from the moment the engine has it, queued or not, until
//! its blocks are here or it ends; every interval all engines concerned get one message each, with all their requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shared::time::{Dur, Time};

use super::{Peer, RemoteBlocks};

#[derive(Clone, Debug)]
pub(super) struct Wanted {
    by_peer: BTreeMap<Arc<Peer>, BTreeSet<Arc<str>>>,
    interval: Dur,
    /// When the next message may go out.
    next: Time,
}

impl Wanted {
    pub(super) fn new(interval: Dur) -> Wanted {
        Wanted { by_peer: BTreeMap::new(), interval, next: Time::ZERO }
    }

    pub(super) fn add(&mut self, now: Time, remote: &RemoteBlocks) {
        if self.by_peer.is_empty() {
            self.next = self.next.max(now);
        }
        self.by_peer.entry(Arc::clone(&remote.peer)).or_default().insert(Arc::clone(&remote.request));
    }

    pub(super) fn remove(&mut self, remote: &RemoteBlocks) {
        if let Some(requests) = self.by_peer.get_mut(&remote.peer) {
            requests.remove(&remote.request);
            if requests.is_empty() {
                self.by_peer.remove(&remote.peer);
            }
        }
    }

    /// When the next heartbeats go out.
    pub(super) fn next_beat(&self) -> Option<Time> {
        (!self.by_peer.is_empty()).then_some(self.next)
    }

    /// The heartbeats that are due at `now`.
    pub(super) fn beats(&mut self, now: Time) -> Vec<(Arc<Peer>, Vec<Arc<str>>)> {
        if self.next_beat().is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next = now + self.interval;
        self.by_peer.iter().map(|(peer, requests)| (Arc::clone(peer), requests.iter().cloned().collect())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(port: u16, request: &str) -> RemoteBlocks {
        let peer = Arc::new(Peer { engine_id: format!("p-{port}").into(), host: "127.0.0.1".into(), port });
        RemoteBlocks { peer, request: request.into(), blocks: 1 }
    }

    fn at(s: u64) -> Time {
        Time::ZERO + Dur::from_secs(s)
    }

    fn told(wanted: &mut Wanted, now: Time) -> Vec<(u16, Vec<String>)> {
        let text = |(peer, requests): (Arc<Peer>, Vec<Arc<str>>)| {
            (peer.port, requests.iter().map(|r| r.to_string()).collect())
        };
        wanted.beats(now).into_iter().map(text).collect()
    }

    #[test]
    fn every_engine_gets_one_message_an_interval_with_all_its_requests() {
        let mut wanted = Wanted::new(Dur::from_secs(5));
        assert_eq!(wanted.next_beat(), None);
        wanted.add(at(10), &remote(1, "a"));
        wanted.add(at(10), &remote(1, "b"));
        wanted.add(at(10), &remote(2, "c"));
        assert_eq!(wanted.next_beat(), Some(at(10)));
        let both = vec![(1, vec!["a".to_owned(), "b".into()]), (2, vec!["c".into()])];
        assert_eq!(told(&mut wanted, at(10)), both);
        assert_eq!((told(&mut wanted, at(14)), wanted.next_beat()), (Vec::new(), Some(at(15))));
        wanted.remove(&remote(2, "c"));
        wanted.remove(&remote(1, "a"));
        assert_eq!(told(&mut wanted, at(15)), [(1, vec!["b".to_owned()])]);
        wanted.remove(&remote(1, "b"));
        assert_eq!(wanted.next_beat(), None);
    }

    #[test]
    fn a_new_request_soon_after_a_message_waits_for_the_next() {
        let mut wanted = Wanted::new(Dur::from_secs(5));
        wanted.add(at(1), &remote(1, "a"));
        assert_eq!(told(&mut wanted, at(1)).len(), 1);
        wanted.remove(&remote(1, "a"));
        wanted.add(at(2), &remote(1, "b"));
        assert_eq!(wanted.next_beat(), Some(at(6)));
        wanted.remove(&remote(1, "b"));
        wanted.add(at(20), &remote(1, "c"));
        assert_eq!(wanted.next_beat(), Some(at(20)));
    }
}
