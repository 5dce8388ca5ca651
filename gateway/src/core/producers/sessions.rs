//! Which endpoint a session is bound to: what `session-affinity-scorer` reads.
//!
//! A session is bound to the endpoint of its first request and moves only when that endpoint is no candidate any more. A binding that
//! is not used for its time to live is gone.

use rustc_hash::FxHashMap;
use shared::time::{Dur, Time};

use crate::core::pool::EndpointId;
use crate::core::request::SessionKey;

/// More sessions than this are not remembered: the expired ones are dropped, then all.
const MAX_SESSIONS: usize = 65_536;

/// The bindings.
#[derive(Debug)]
pub(crate) struct Sessions {
    ttl: Dur,
    bound: FxHashMap<SessionKey, (EndpointId, Time)>,
}

impl Sessions {
    pub(crate) fn new(ttl: Dur) -> Sessions {
        Sessions { ttl, bound: FxHashMap::default() }
    }

    /// The endpoint that a session is bound to.
    pub(crate) fn endpoint(&self, session: SessionKey, now: Time) -> Option<EndpointId> {
        let (endpoint, used) = self.bound.get(&session)?;
        (now.since(*used) < self.ttl).then_some(*endpoint)
    }

    /// A request of the session was sent to `endpoint`; `could_stay` says whether its own endpoint could have been chosen.
    pub(crate) fn sent(&mut self, session: SessionKey, endpoint: EndpointId, could_stay: bool, now: Time) {
        let bound = self.endpoint(session, now);
        if could_stay && bound.is_some_and(|b| b != endpoint) {
            return;
        }
        if self.bound.len() >= MAX_SESSIONS && !self.bound.contains_key(&session) {
            let ttl = self.ttl;
            self.bound.retain(|_, (_, used)| now.since(*used) < ttl);
            if self.bound.len() >= MAX_SESSIONS {
                self.bound.clear();
            }
        }
        self.bound.insert(session, (endpoint, now));
    }

    /// Forgets the bindings to an endpoint that has left.
    pub(crate) fn forget(&mut self, endpoint: EndpointId) {
        self.bound.retain(|_, (bound, _)| *bound != endpoint);
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.bound.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_stays_where_it_is_as_long_as_it_can() {
        let at = |s| Time::ZERO + Dur::from_secs(s);
        let (a, b, session) = (EndpointId(0), EndpointId(1), SessionKey(5));
        let mut sessions = Sessions::new(Dur::from_secs(300));
        let mut step = |endpoint, could_stay, now| {
            sessions.sent(session, endpoint, could_stay, now);
            sessions.endpoint(session, now).unwrap()
        };
        assert_eq!(step(a, false, at(0)), a);
        assert_eq!(step(b, true, at(1)), a);
        assert_eq!(step(a, true, at(299)), a);
        assert_eq!(step(b, false, at(300)), b);
        assert_eq!(sessions.endpoint(session, at(599)), Some(b));
        assert_eq!(sessions.endpoint(session, at(600)), None);
        sessions.sent(session, a, true, at(600));
        assert_eq!(sessions.endpoint(session, at(600)), Some(a));
        sessions.forget(b);
        assert_eq!(sessions.endpoint(session, at(600)), Some(a));
        sessions.forget(a);
        assert_eq!(sessions.endpoint(session, at(600)), None);
    }

    #[test]
    fn their_number_is_bounded() {
        let mut sessions = Sessions::new(Dur::from_secs(1));
        for key in 0..=MAX_SESSIONS as u64 {
            sessions.sent(SessionKey(key), EndpointId(0), false, Time::ZERO);
        }
        assert!(sessions.bound.len() <= MAX_SESSIONS);
    }
}
