//! The answer of the server: a stream of chunks as the engine produces tokens, or one body at the end.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use shared::ids::RequestId;
use shared::openai::{PromptTokensDetails, StreamOptions, Usage};
use shared::time::Time;
use shared::tokens::{self, BYTES_PER_TOKEN, ContentId};
use shared::trace::Trail;
use tokio::sync::mpsc::UnboundedReceiver;

use super::api::{Api, ApiError};
use super::pacing::Delivery;
use super::stop::{Stops, TextEnd};
use super::validate::Accepted;
use super::{App, Served};
use crate::core::engine::{RejectReason, RequestKey};
use crate::core::facts::EngineFact;
use crate::core::sequence::FinishReason;

/// How the text of an answer is wrapped.
#[derive(Debug)]
pub(super) struct Shape {
    api: Api,
    streaming: bool,
    options: StreamOptions,
    content: ContentId,
    stops: Stops,
    prompt_tokens: u32,
    /// Whether usage says how much of the prompt was cached (`--enable-prompt-tokens-details`).
    details: bool,
    id: RequestId,
    /// `"id":..,"object":..,"created":..,"model":..` as every chunk carries it.
    head: String,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug)]
struct Finish {
    reason: FinishReason,
    cached_tokens: u32,
}

impl Shape {
    pub(super) fn new(app: &App, api: Api, id: &RequestId, accepted: Accepted) -> Shape {
        let object = match (api, accepted.streaming) {
            (Api::Completions, _) => "text_completion",
            (Api::Chat, true) => "chat.completion.chunk",
            (Api::Chat, false) => "chat.completion",
        };
        let model = serde_json::to_string(&*app.model).expect("text serialises");
        let created = app.unix_seconds();
        let head = format!("\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":{model}");
        Shape {
            api,
            streaming: accepted.streaming,
            options: accepted.options,
            content: accepted.content,
            stops: accepted.stops,
            prompt_tokens: accepted.prompt_tokens,
            details: app.prompt_tokens_details,
            id: id.clone(),
            head,
        }
    }

    /// Bytes `from..to` of the text.
    fn text(&self, from: usize, to: usize) -> String {
        let (first, last) = (from / BYTES_PER_TOKEN, to.div_ceil(BYTES_PER_TOKEN));
        let mut ids = Vec::new();
        self.content.extend(first as u64, last as u64, &mut ids);
        let mut text = String::with_capacity(BYTES_PER_TOKEN * ids.len());
        tokens::push_text(&ids, &mut text);
        let skipped = first * BYTES_PER_TOKEN;
        text.truncate(to.max(from) - skipped);
        text.split_off(from - skipped)
    }

    fn usage(&self, output: u32, cached: Option<u32>) -> String {
        let prompt = self.prompt_tokens;
        let details = cached.filter(|_| self.details).map(|cached_tokens| PromptTokensDetails { cached_tokens });
        let usage = Usage {
            prompt_tokens: prompt,
            total_tokens: prompt + output,
            completion_tokens: output,
            prompt_tokens_details: details,
        };
        serde_json::to_string(&usage).expect("numbers serialise")
    }

    /// Server-sent events for the tokens `from..to`; the filler needs no JSON escapes.
    fn chunk(&self, from: u32, to: u32, finish: Option<Finish>, out: &mut String) {
        use std::fmt::Write as _;
        let head = &self.head;
        if from == 0 && self.api == Api::Chat {
            let _ = write!(
                out,
                "data: {{{head},\"choices\":[{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\
                 \"logprobs\":null,\"finish_reason\":null}}]{}}}\n\n",
                self.running_usage(0)
            );
        }
        let (shown, reason) = match finish {
            None => (self.stops.shown(to), "\"finish_reason\":null".to_owned()),
            Some(Finish { reason, .. }) => {
                let TextEnd { bytes, stop_reason } = self.stops.end(self.content, to, reason);
                (bytes, format!("\"finish_reason\":\"{}\",\"stop_reason\":{stop_reason}", reason.as_str()))
            }
        };
        let text = self.text(self.stops.shown(from), shown);
        let piece = match self.api {
            Api::Completions => format!("\"text\":\"{text}\""),
            Api::Chat => format!("\"delta\":{{\"content\":\"{text}\"}}"),
        };
        let usage = self.running_usage(to);
        let _ =
            write!(out, "data: {{{head},\"choices\":[{{\"index\":0,{piece},\"logprobs\":null,{reason}}}]{usage}}}\n\n");
        if let Some(Finish { cached_tokens, .. }) = finish {
            if self.options.include_usage {
                let usage = self.usage(to, Some(cached_tokens));
                let _ = write!(out, "data: {{{head},\"choices\":[],\"usage\":{usage}}}\n\n");
            }
            out.push_str("data: [DONE]\n\n");
        }
    }

    fn running_usage(&self, output: u32) -> String {
        let on = self.options.include_usage && self.options.continuous_usage_stats;
        if on { format!(",\"usage\":{}", self.usage(output, None)) } else { String::new() }
    }

    /// The whole answer, with the nulls vLLM writes.
    fn body(&self, output: u32, finish: Finish) -> String {
        let TextEnd { bytes, stop_reason } = self.stops.end(self.content, output, finish.reason);
        let text = self.text(0, bytes);
        let choice = match self.api {
            Api::Completions => format!("\"text\":\"{text}\""),
            Api::Chat => format!(
                "\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\",\"refusal\":null,\"annotations\":null,\
                 \"audio\":null,\"function_call\":null,\"reasoning\":null}}"
            ),
        };
        format!(
            "{{{},\"choices\":[{{\"index\":0,{choice},\"logprobs\":null,\"finish_reason\":\"{}\",\
             \"stop_reason\":{stop_reason},\"token_ids\":null,\"prompt_logprobs\":null,\"prompt_token_ids\":null}}],\
             \"service_tier\":null,\"system_fingerprint\":null,\"usage\":{},\"kv_transfer_params\":null,\
             \"ec_transfer_params\":null,\"metrics\":null}}",
            self.head,
            finish.reason.as_str(),
            self.usage(output, Some(finish.cached_tokens))
        )
    }
}

/// A request in the engine and what is left to write of its answer. Dropping it early aborts the request.
pub(super) struct Answer {
    app: Arc<App>,
    key: RequestKey,
    trail: Trail<EngineFact>,
    body_read: Time,
    shape: Shape,
    output: UnboundedReceiver<Delivery>,
    /// Received and not written yet.
    first: Option<Delivery>,
    sent: u32,
    first_write: bool,
    ended: bool,
}

impl Answer {
    pub(super) fn new(
        app: Arc<App>,
        key: RequestKey,
        trail: Trail<EngineFact>,
        body_read: Time,
        shape: Shape,
        output: UnboundedReceiver<Delivery>,
    ) -> Answer {
        app.opened();
        Answer { app, key, trail, body_read, shape, output, first: None, sent: 0, first_write: false, ended: false }
    }

    /// The response; a stream starts at once, as Starlette's does, and its first chunk follows with the first token.
    pub(super) async fn respond(mut self) -> Response {
        if self.shape.streaming {
            // A refusal is known as soon as the engine has the request, and is still an HTTP error then.
            return match self.output.recv().await {
                Some(Delivery::Rejected(reason)) => self.refuse(reason).into_response(),
                None => self.gone().into_response(),
                first @ Some(Delivery::Taken | Delivery::Tokens(_) | Delivery::Finished { .. }) => {
                    self.first = first;
                    self.stream()
                }
            };
        }
        let mut output = 0;
        loop {
            match self.output.recv().await {
                Some(Delivery::Taken) => {}
                Some(Delivery::Tokens(n)) => output += n,
                Some(Delivery::Finished { tokens, reason, stats }) => {
                    self.note_first_write();
                    let finish = Finish { reason, cached_tokens: stats.cached_tokens };
                    let body = self.shape.body(output + tokens, finish);
                    self.end();
                    return ([(CONTENT_TYPE, "application/json")], body).into_response();
                }
                Some(Delivery::Rejected(reason)) => return self.refuse(reason).into_response(),
                None => return self.gone().into_response(),
            }
        }
    }

    fn stream(self) -> Response {
        let mut response = Response::new(Body::new(self));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    fn poll_delivery(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(first)),
            None => self.output.poll_recv(cx),
        }
    }

    fn note_first_write(&mut self) {
        if !std::mem::replace(&mut self.first_write, true) {
            let now = self.app.clock.now();
            self.trail.note(now, || EngineFact::FirstWrite);
            self.app.served(&Served { id: self.shape.id.clone(), body_read: self.body_read, first_write: now });
        }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.app.closed();
            let now = self.app.clock.now();
            self.trail.note(now, || EngineFact::LastWrite);
            self.trail.clone().finish(now);
        }
    }

    fn fail(&mut self, error: ApiError) -> ApiError {
        if !std::mem::replace(&mut self.ended, true) {
            self.app.closed();
            let now = self.app.clock.now();
            self.trail.note(now, || EngineFact::Failed {
                error_type: error.error_type(),
                http_status: error.status.as_u16(),
            });
            self.trail.clone().finish(now);
        }
        error
    }

    fn refuse(&mut self, reason: RejectReason) -> ApiError {
        let busy = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.";
        let error = match reason {
            RejectReason::QueueFull { .. } => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable", busy, None)
            }
            RejectReason::TooLong { max_model_len } => {
                let text = format!("This model's maximum context length is {max_model_len} tokens.");
                ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some("input_tokens"))
            }
            RejectReason::EmptyPrompt => {
                let text = "Either prompt or prompt_embeds must be provided and non-empty.";
                ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some("prompt"))
            }
        };
        self.fail(error)
    }

    fn gone(&mut self) -> ApiError {
        let text = "The server had an error while processing your request.";
        self.fail(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", text, None))
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // Tokens that came while the socket was busy are written as one chunk, as vLLM's collector merges them.
        let (mut to, mut text) = (self.sent, String::new());
        let last = loop {
            match self.poll_delivery(cx) {
                Poll::Ready(Some(Delivery::Taken)) => {}
                Poll::Ready(Some(Delivery::Tokens(n))) => to += n,
                Poll::Ready(Some(Delivery::Finished { tokens, reason, stats })) => {
                    to += tokens;
                    let finish = Finish { reason, cached_tokens: stats.cached_tokens };
                    self.shape.chunk(self.sent, to, Some(finish), &mut text);
                    break true;
                }
                Poll::Ready(Some(Delivery::Rejected(_)) | None) => {
                    let error = self.gone();
                    text = format!("data: {}\n\ndata: [DONE]\n\n", error.body.to_json());
                    break true;
                }
                Poll::Pending if to > self.sent => {
                    self.shape.chunk(self.sent, to, None, &mut text);
                    break false;
                }
                Poll::Pending => return Poll::Pending,
            }
        };
        self.sent = to;
        self.note_first_write();
        if last {
            self.end();
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(text)))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.ended {
            self.app.closed();
            let now = self.app.clock.now();
            self.trail.note(now, || EngineFact::Aborted);
            self.app.engine.abort(now, self.key, self.trail.clone());
        }
    }
}
