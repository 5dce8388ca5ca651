//! The answer of the server: a stream of chunks as the engine produces tokens, or one body at the end.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, TRAILER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use shared::time::Time;
use shared::trace::verdict::PREEMPTIONS;

use super::api::{Api, ApiError};
use super::choice::{Broken, Choice};
use super::keep_alive::KeepAlive;
use super::shape::Shape;
use super::{App, Served};
use crate::core::engine::RejectReason;
use crate::core::facts::EngineFact;

/// A request's choices in the engine and what is left to write of them. Dropping it early aborts them.
pub(super) struct Answer {
    app: Arc<App>,
    body_read: Time,
    shape: Shape,
    first: Choice,
    /// Further choices, where several were asked for.
    rest: Vec<Choice>,
    opened: bool,
    ended: bool,
    /// Whether trailers are to say of a candidate that it was preempted.
    trailers: bool,
    last_words: Option<HeaderMap>,
}

impl Answer {
    pub(super) fn new(app: Arc<App>, body_read: Time, shape: Shape, first: Choice) -> Answer {
        app.open.opened(&shape.id, first.key);
        let rest = Vec::new();
        Answer { app, body_read, shape, first, rest, opened: false, ended: false, trailers: false, last_words: None }
    }

    /// The same answer, whose trailers say what the edge wants to know of a candidate: the stream's head is gone by then.
    pub(super) fn with_trailers(mut self, wanted: bool) -> Answer {
        self.trailers = wanted && self.first.trail.is_candidate();
        self
    }

    /// Adds a choice behind those that are there.
    pub(super) fn push(&mut self, choice: Choice) {
        self.app.open.further(&self.shape.id, choice.key);
        self.rest.push(choice);
    }

    /// Waits until the engine has taken the first choice or refused it.
    pub(super) async fn taken(&mut self) -> Result<(), Broken> {
        self.first.taken().await
    }

    /// The response; a stream starts at once, as Starlette's does, and its first chunk follows with the first token.
    pub(super) async fn respond(mut self, taken: Result<(), Broken>) -> Response {
        match taken {
            // vLLM's stream has begun when its engine says so.
            Err(broken @ Broken::Rejected(RejectReason::Paused)) if self.shape.streaming => {
                let error = self.broken_stream(broken);
                return events(Body::from(error.events()));
            }
            Err(broken) => return self.break_off(broken).into_response(),
            Ok(()) => {}
        }
        if self.shape.streaming {
            let announced = self.trailers;
            let mut response = match self.app.frontend.sse_keep_alive {
                None => events(Body::new(self)),
                Some(every) => events(Body::new(KeepAlive::new(self, every))),
            };
            if announced {
                response.headers_mut().insert(TRAILER, HeaderValue::from_static(PREEMPTIONS));
            }
            return response;
        }
        if let Err(broken) = self.finished().await {
            return self.break_off(broken).into_response();
        }
        self.note_first_writes();
        let body = self.shape.body(std::iter::once(&mut self.first).chain(&mut self.rest));
        self.note_last_writes();
        self.close();
        let mut response = ([(CONTENT_TYPE, "application/json")], body).into_response();
        response.headers_mut().extend(self.preemptions().into_iter().flatten());
        response
    }

    /// What the edge wants to know of a candidate, if there is something to say.
    fn preemptions(&mut self) -> Option<HeaderMap> {
        if !self.first.trail.is_candidate() {
            return None;
        }
        let count: u32 = self.choices().filter_map(|c| Some(c.end.as_ref()?.stats.preemptions)).sum();
        let header = (HeaderName::from_static(PREEMPTIONS), HeaderValue::from(count));
        (count > 0).then(|| HeaderMap::from_iter([header]))
    }

    async fn finished(&mut self) -> Result<(), Broken> {
        self.first.finished().await?;
        for choice in &mut self.rest {
            choice.finished().await?;
        }
        Ok(())
    }

    fn choices(&mut self) -> impl Iterator<Item = &mut Choice> {
        std::iter::once(&mut self.first).chain(&mut self.rest)
    }

    /// Notes the first bytes of every choice that has some.
    fn note_first_writes(&mut self) {
        if !self.choices().any(|c| c.has_news() && !c.begun) {
            return;
        }
        let (now, mut first) = (self.app.clock.now(), false);
        for choice in self.choices() {
            if choice.has_news() && !std::mem::replace(&mut choice.begun, true) {
                choice.trail.note(now, || EngineFact::FirstWrite);
                first = true;
            }
        }
        if first && !std::mem::replace(&mut self.opened, true) {
            self.app.served(&Served { id: self.shape.id.clone(), body_read: self.body_read, first_write: now });
        }
    }

    /// Closes the record of every choice that is written to its end.
    fn note_last_writes(&mut self) {
        if !self.choices().any(|c| c.end.is_some() && !c.written) {
            return;
        }
        let now = self.app.clock.now();
        for choice in self.choices() {
            if choice.end.is_some() && !std::mem::replace(&mut choice.written, true) {
                choice.trail.note(now, || EngineFact::LastWrite);
                choice.trail.clone().finish(now);
            }
        }
    }

    fn close(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.app.open.closed(&self.shape.id);
        }
    }

    /// Ends the answer without a result: what is open is aborted.
    fn break_off(&mut self, broken: Broken) -> ApiError {
        let error = match broken {
            Broken::Rejected(reason) => ApiError::rejected(reason),
            Broken::Failed => ApiError::failed(),
            Broken::Dead => ApiError::dead(),
        };
        self.close();
        let (now, fact) = (self.app.clock.now(), (error.error_type(), error.status.as_u16()));
        let app = Arc::clone(&self.app);
        for choice in self.choices().filter(|c| !c.written) {
            choice.trail.note(now, || EngineFact::Failed { error_type: fact.0, http_status: fact.1 });
            match broken {
                Broken::Failed if choice.is_open() => app.engine.abort(now, choice.key, choice.trail.clone()),
                Broken::Failed | Broken::Rejected(_) | Broken::Dead => choice.trail.clone().finish(now),
            }
        }
        error
    }

    /// The same in a stream: vLLM's chat calls every failure there an internal one.
    fn broken_stream(&mut self, broken: Broken) -> ApiError {
        let mut error = self.break_off(broken);
        if self.shape.api == Api::Chat && error.status == StatusCode::SERVICE_UNAVAILABLE {
            error.body.error.kind = "InternalServerError".to_owned();
        }
        error
    }

    /// Writes what is new in any choice.
    fn write(&mut self, out: &mut String) {
        if !self.opened {
            self.shape.write_opening(1 + self.rest.len() as u32, out);
        }
        self.note_first_writes();
        let Answer { shape, first, rest, .. } = self;
        for (index, choice) in std::iter::once(first).chain(rest).enumerate() {
            if choice.has_news() {
                shape.write_chunk(index as u32, choice, out);
            }
        }
        self.note_last_writes();
    }
}

fn events(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(self.last_words.take().map(|words| Ok(Frame::trailers(words))));
        }
        // Tokens that came while the socket was busy are written as one chunk, as vLLM's collector merges them.
        let (mut broken, mut news) = (Ok(()), false);
        for choice in self.choices() {
            broken = broken.and(choice.poll(cx));
            news |= choice.has_news();
        }
        let mut text = String::new();
        if let Err(broken) = broken {
            text = self.broken_stream(broken).events();
        } else if news {
            text.reserve(640);
            self.write(&mut text);
            if self.choices().all(|c| c.written) {
                self.shape.write_closing(std::iter::once(&self.first).chain(&self.rest), &mut text);
                self.close();
                self.last_words = if self.trailers { self.preemptions() } else { None };
            }
        } else {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(text)))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.last_words.is_none()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.ended {
            self.close();
            let (now, app) = (self.app.clock.now(), Arc::clone(&self.app));
            for choice in self.choices().filter(|c| !c.written) {
                choice.trail.note(now, || EngineFact::Aborted);
                app.engine.abort(now, choice.key, choice.trail.clone());
            }
        }
    }
}
