//! A response on its way from the engine to the caller: passed on as it comes, looked at, and cut off when its time is over.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Exchange;
use crate::server::observe::Observer;
use crate::server::tail::Tail;
use crate::spans::{Failure, GatewayFact};

/// The body of a response on its way through. Dropped early, it closes the connection to the engine, which aborts.
pub(super) struct Relay {
    passage: Arc<Mutex<Passage>>,
    /// What ends the passage at the deadline: the server asks for nothing while its caller reads nothing.
    watch: Option<AbortHandle>,
}

/// What is shared with the watch.
struct Passage {
    /// The engine's response; `None` once it was cut off.
    upstream: Option<Incoming>,
    exchange: Exchange,
    observer: Observer,
    /// The end of the response, where the observer does not read it.
    tail: Option<Tail>,
    /// Who waits for the next piece.
    reader: Option<Waker>,
}

/// The total time of a request is over.
#[derive(Debug, thiserror::Error)]
#[error("the request took too long")]
struct TookTooLong;

impl Relay {
    pub(super) fn new(
        upstream: Incoming,
        exchange: Exchange,
        observer: Observer,
        tail: Option<Tail>,
        deadline: Instant,
    ) -> Relay {
        let mut passage = Passage { upstream: Some(upstream), exchange, observer, tail, reader: None };
        passage.end_if_over();
        let over = passage.exchange.over;
        let passage = Arc::new(Mutex::new(passage));
        let watch = (!over).then(|| tokio::spawn(watch(Arc::downgrade(&passage), deadline)).abort_handle());
        Relay { passage, watch }
    }

    fn passage(&self) -> MutexGuard<'_, Passage> {
        lock(&self.passage)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

fn lock(passage: &Mutex<Passage>) -> MutexGuard<'_, Passage> {
    passage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts a passage off at the deadline, whether or not somebody reads.
async fn watch(passage: Weak<Mutex<Passage>>, deadline: Instant) {
    tokio::time::sleep_until(deadline).await;
    if let Some(passage) = passage.upgrade() {
        lock(&passage).cut_off();
    }
}

impl Passage {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let Some(upstream) = &mut self.upstream else { return Poll::Ready(Some(Err(TookTooLong.into()))) };
        match Pin::new(upstream).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.pass(data);
                }
                let Some(frame) = self.exchange.hear_frame(frame) else {
                    self.complete();
                    return Poll::Ready(None);
                };
                self.end_if_over();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.broken(Failure::Reset);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                self.complete();
                Poll::Ready(None)
            }
            Poll::Pending => {
                match &mut self.reader {
                    Some(reader) => reader.clone_from(cx.waker()),
                    none @ None => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn pass(&mut self, data: &Bytes) {
        let exchange = &mut self.exchange;
        if exchange.bytes == 0 && !data.is_empty() && exchange.pool().reads_first_chunks {
            exchange.first_chunk();
        }
        exchange.bytes += data.len() as u64;
        let before = exchange.learnt.first_token;
        self.observer.data(data, &mut exchange.learnt);
        if let Some(tail) = &mut self.tail {
            tail.push(data);
        }
        if !before && exchange.learnt.first_token {
            let now = exchange.shared.clock.now();
            exchange.trail.annotate(now, || GatewayFact::FirstToken);
            exchange.first_token = Some(now.since(exchange.received));
        }
    }

    fn is_end(&self) -> bool {
        self.upstream.as_ref().is_some_and(Incoming::is_end_stream)
    }

    /// The server asks for no more after the last byte of a body of known length, so its end is noticed here.
    fn end_if_over(&mut self) {
        if self.is_end() {
            self.complete();
        }
    }

    fn complete(&mut self) {
        if !self.exchange.over {
            self.observer.end(&mut self.exchange.learnt);
            if let Some(tail) = &self.tail {
                self.exchange.learnt.usage = tail.usage();
            }
            self.exchange.end(None);
        }
    }

    fn broken(&mut self, failure: Failure) {
        self.exchange.shared.metrics.broken.fetch_add(1, Ordering::Relaxed);
        self.exchange.end(Some(failure));
    }

    fn cut_off(&mut self) {
        if self.exchange.over {
            return;
        }
        self.upstream = None;
        self.broken(Failure::Timeout);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

impl hyper::body::Body for Relay {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        self.passage().poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.passage().is_end()
    }

    fn size_hint(&self) -> SizeHint {
        self.passage().upstream.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}
