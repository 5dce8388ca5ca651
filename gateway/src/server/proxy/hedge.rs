//! A second attempt while the first one has not answered: the first answer is passed on, the other attempt is cancelled. Nothing of this
//! happens once a head of a response has come.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use http::header::HeaderMap;
use http_body_util::Full;
use hyper::body::Incoming;
use shared::time::Dur;

use super::Exchange;
use crate::core::gateway::Input;
use crate::core::pool::EndpointId;
use crate::core::request::Output;
use crate::server::membership::Target;
use crate::server::queue::Answer;
use crate::spans::{Failure, GatewayFact};

/// What every attempt is made of.
pub(super) struct Sending<'r> {
    pub(super) parts: &'r http::request::Parts,
    pub(super) headers: &'r mut HeaderMap,
    pub(super) body: &'r Bytes,
    /// Blocks that the kv-cache-manager is to expect where the request goes.
    pub(super) expected: &'r [u64],
}

/// The second attempt, while both are under way.
pub(super) struct Second {
    attempt: u32,
    endpoint: EndpointId,
    target: Arc<Target>,
}

type Head = Result<http::Response<Incoming>, Failure>;

impl Exchange {
    /// The head of a response to `request`, or to a second attempt that is made if it takes longer than `after`. Which of them it is of
    /// is the exchange's attempt then.
    pub(super) async fn hedged(
        &mut self,
        request: http::Request<Full<Bytes>>,
        after: Dur,
        sending: Sending<'_>,
    ) -> Head {
        let mut first = pin!(self.head(request));
        if let Ok(head) = tokio::time::timeout(after.to_std(), &mut first).await {
            return head;
        }
        let Some(request) = self.start_second(sending) else { return first.await };
        let mut second = pin!(self.head(request));
        tokio::select! {
            biased;
            head = &mut first => match self.failed_with(&head) {
                None => {
                    self.second_ended(Some(Failure::Outrun));
                    head
                }
                Some(failure) => {
                    self.first_lost(failure);
                    second.await
                }
            },
            head = &mut second => match self.failed_with(&head) {
                None => {
                    self.attempt_ended(Some(Failure::Outrun));
                    self.take_second();
                    head
                }
                Some(failure) => {
                    self.second_lost(failure);
                    first.await
                }
            },
        }
    }

    /// Why a head is no answer; an answer that is asked for elsewhere is none.
    fn failed_with(&self, head: &Head) -> Option<Failure> {
        match head {
            Ok(response) => self.is_retried(response.status()).then(|| Failure::Status(response.status().as_u16())),
            Err(failure) => Some(*failure),
        }
    }

    /// The request of a second attempt, if the core wants one.
    fn start_second(&mut self, sending: Sending<'_>) -> Option<http::Request<Full<Bytes>>> {
        let Sending { parts, headers, body, expected } = sending;
        let (now, key) = (self.shared.clock.now(), self.key);
        let asked = self.pool().ask(now, key, Input::Late { key }, self.trail.is_recording());
        let Answer::Now(Output::Dispatch { endpoint, attempt, .. }) = asked else { return None };
        let target = self.pool().membership.get(endpoint);
        self.expect([Some(endpoint), None], expected);
        self.note_started(attempt, &target);
        self.calls_too(&target);
        let request = self.outgoing(parts, headers, body.clone(), attempt, &target);
        self.second = Some(Box::new(Second { attempt, endpoint, target }));
        if request.is_err() {
            self.second_lost(Failure::Connect);
        }
        request.ok()
    }

    /// The first attempt came to nothing; the second one takes its place.
    fn first_lost(&mut self, failure: Failure) {
        self.attempt_ended(Some(failure));
        if let Some(endpoint) = self.at {
            self.tell_lost(endpoint, failure);
        }
        self.take_second();
    }

    /// The second attempt came to nothing.
    fn second_lost(&mut self, failure: Failure) {
        let endpoint = self.second.as_ref().map(|s| s.endpoint);
        self.second_ended(Some(failure));
        endpoint.into_iter().for_each(|endpoint| self.tell_lost(endpoint, failure));
    }

    /// The core keeps the other attempt, and has nothing to say to that.
    fn tell_lost(&self, endpoint: EndpointId, failure: Failure) {
        let (now, key) = (self.shared.clock.now(), self.key);
        let lost = Input::AttemptFailed { key, endpoint, failure };
        let _stays = self.pool().ask(now, key, lost, self.trail.is_recording());
    }

    fn take_second(&mut self) {
        if let Some(second) = self.second.take() {
            let Second { attempt, endpoint, target } = *second;
            (self.attempt, self.at, self.target) = (Some(attempt), Some(endpoint), Some(target));
        }
    }

    /// Ends the second attempt, if there is one.
    pub(super) fn second_ended(&mut self, failure: Option<Failure>) {
        if let Some(second) = self.second.take()
            && self.trail.is_on()
        {
            let attempt = second.attempt;
            self.trail.note(self.shared.clock.now(), || GatewayFact::AttemptEnded { attempt, failure });
        }
    }
}
