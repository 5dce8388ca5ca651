//! A second attempt beside one that has not answered: where it goes, and which of the two has the request in the end.

use std::sync::Arc;

use shared::time::{Stopwatch, Time};

use super::{Gateway, Open, dispatch};
use crate::core::kv_index::KvPrompt;
use crate::core::pool::EndpointId;
use crate::core::producers::Placed;
use crate::core::request::{Output, RequestKey};
use crate::spans::GatewayFact;

impl Open {
    /// The place of the attempt at `endpoint`, if there is another one, which stays.
    pub(super) fn lose(&mut self, endpoint: EndpointId) -> Option<Placed> {
        let second = self.second.take()?;
        Some(if second.endpoint == endpoint { second } else { std::mem::replace(&mut self.placed, second) })
    }
}

impl Gateway {
    /// Sends a request that nobody has answered yet to a second endpoint, if there is one, and budget.
    pub(super) fn hedge(&mut self, now: Time, key: RequestKey, watch: &mut dyn Stopwatch, out: &mut Vec<Output>) {
        let may = |open: &Open| open.second.is_none() && !open.answered && open.attempt < self.retries;
        let Some(mut open) = self.open.remove(&key) else { return out.push(Output::Stay { key }) };
        let first = open.placed.endpoint;
        open.tried.push(first);
        let possible = may(&open) && self.director.has_other(now, &open.info, &open.tried);
        let next = if possible && self.may_retry(now, &open.info) {
            self.director.direct(now, &open.info, &open.tried, watch).ok()
        } else {
            None
        };
        open.tried.pop();
        if let Some(next) = next {
            open.attempt += 1;
            open.second = Some(next);
            self.hedges += 1;
            let (attempt, slow) = (open.attempt, &self.director.pool.get(first).config.name);
            open.info.trail.annotate(now, || GatewayFact::Hedge { attempt, slow: Arc::clone(slow) });
            out.push(dispatch(key, next, attempt, None));
        } else {
            out.push(Output::Stay { key });
        }
        self.open.insert(key, open);
    }

    /// The head of a response came from `endpoint`: another attempt is outrun.
    pub(super) fn response_started(&mut self, now: Time, key: RequestKey, endpoint: EndpointId) {
        let Some(open) = self.open.get_mut(&key) else { return };
        let other = [Some(open.placed), open.second].into_iter().flatten().find(|p| p.endpoint != endpoint);
        let outrun = other.and_then(|other| open.lose(other.endpoint));
        if open.placed.endpoint == endpoint {
            // Only a further attempt would need them.
            open.info.prefix = Vec::new();
            open.info.kv = KvPrompt::default();
            if !std::mem::replace(&mut open.answered, true) {
                self.hedging.answered(now.since(open.sent));
            }
        }
        if let Some(outrun) = outrun {
            self.director.leave(outrun);
            self.stir(now);
        }
    }
}
