//! The answer of the server: a stream of chunks as the engine produces tokens, or one body at the end.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use shared::ids::RequestId;
use shared::openai::{PromptTokensDetails, StreamOptions, Usage};
use shared::time::Time;
use shared::tokens::{self, ContentId};
use shared::trace::Trail;
use tokio::sync::mpsc::UnboundedReceiver;

use super::api::{Api, ApiError};
use super::pacing::Delivery;
use super::validate::Accepted;
use super::{App, Served};
use crate::core::engine::{Output, RejectReason, RequestKey};
use crate::core::facts::EngineFact;
use crate::core::sequence::FinishReason;

/// How the text of an answer is wrapped.
#[derive(Debug)]
pub(super) struct Shape {
    api: Api,
    streaming: bool,
    options: StreamOptions,
    content: ContentId,
    prompt_tokens: u32,
    /// Whether usage says how much of the prompt was cached (`--enable-prompt-tokens-details`).
    details: bool,
    id: RequestId,
    /// `"id":..,"object":..,"created":..,"model":..` as every chunk carries it.
    head: String,
}

impl Shape {
    pub(super) fn new(app: &App, api: Api, id: &RequestId, accepted: &Accepted) -> Shape {
        let object = match (api, accepted.streaming) {
            (Api::Completions, _) => "text_completion",
            (Api::Chat, true) => "chat.completion.chunk",
            (Api::Chat, false) => "chat.completion",
        };
        let model = serde_json::to_string(&*app.model).expect("text serialises");
        let created = app.unix_seconds();
        let head = format!("\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":{model}");
        let (streaming, options, content) = (accepted.streaming, accepted.options, accepted.content);
        Shape {
            api,
            streaming,
            options,
            content,
            prompt_tokens: accepted.prompt_tokens,
            details: app.prompt_tokens_details,
            id: id.clone(),
            head,
        }
    }

    fn text(&self, from: u32, to: u32) -> String {
        let mut ids = Vec::new();
        self.content.extend(u64::from(from), u64::from(to), &mut ids);
        let mut text = String::with_capacity(4 * ids.len());
        tokens::push_text(&ids, &mut text);
        text
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
    fn chunk(&self, from: u32, to: u32, finish: Option<(FinishReason, u32)>, out: &mut String) {
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
        let text = self.text(from, to);
        let piece = match self.api {
            Api::Completions => format!("\"text\":\"{text}\""),
            Api::Chat => format!("\"delta\":{{\"content\":\"{text}\"}}"),
        };
        let reason = finish.map_or("null".to_owned(), |(r, _)| format!("\"{}\"", r.as_str()));
        let stop = if finish.is_some() { ",\"stop_reason\":null" } else { "" };
        let usage = self.running_usage(to);
        let _ = write!(
            out,
            "data: {{{head},\"choices\":[{{\"index\":0,{piece},\"logprobs\":null,\"finish_reason\":{reason}{stop}}}]{usage}}}\n\n"
        );
        if let Some((_, cached)) = finish {
            if self.options.include_usage {
                let usage = self.usage(to, Some(cached));
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
    fn body(&self, output: u32, cached: u32, reason: FinishReason) -> String {
        let text = self.text(0, output);
        let choice = match self.api {
            Api::Completions => format!("\"text\":\"{text}\""),
            Api::Chat => format!(
                "\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\",\"refusal\":null,\"annotations\":null,\
                 \"audio\":null,\"function_call\":null,\"reasoning\":null}}"
            ),
        };
        format!(
            "{{{},\"choices\":[{{\"index\":0,{choice},\"logprobs\":null,\"finish_reason\":\"{}\",\"stop_reason\":null,\
             \"token_ids\":null,\"prompt_logprobs\":null,\"prompt_token_ids\":null}}],\"service_tier\":null,\
             \"system_fingerprint\":null,\"usage\":{},\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}}",
            self.head,
            reason.as_str(),
            self.usage(output, Some(cached))
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
    sent: u32,
    first_write: bool,
    ended: bool,
}

/// What the engine said since the last look.
enum News {
    Taken,
    Tokens(u32),
    Finished(FinishReason, u32),
    Rejected(RejectReason),
    /// The engine is gone.
    Gone,
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
        Answer { app, key, trail, body_read, shape, output, sent: 0, first_write: false, ended: false }
    }

    /// The response; a stream starts at once, as Starlette's does, and its first chunk follows with the first token.
    pub(super) async fn respond(mut self) -> Response {
        if self.shape.streaming {
            // A refusal is known as soon as the engine has the request, and is still an HTTP error then.
            return match std::future::poll_fn(|cx| self.poll_news(cx)).await {
                News::Rejected(reason) => self.refuse(reason).into_response(),
                News::Gone => self.gone().into_response(),
                News::Taken | News::Tokens(_) | News::Finished(..) => self.stream(),
            };
        }
        let mut tokens = 0;
        loop {
            match std::future::poll_fn(|cx| self.poll_news(cx)).await {
                News::Taken => {}
                News::Tokens(n) => tokens += n,
                News::Finished(reason, cached) => {
                    self.note_first_write();
                    let body = self.shape.body(tokens, cached, reason);
                    self.end();
                    return ([(CONTENT_TYPE, "application/json")], body).into_response();
                }
                News::Rejected(reason) => return self.refuse(reason).into_response(),
                News::Gone => return self.gone().into_response(),
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

    fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<News> {
        Poll::Ready(match ready!(self.output.poll_recv(cx)) {
            Some(Delivery::Taken) => News::Taken,
            Some(Delivery::Output(Output::Tokens { new_tokens, .. })) => News::Tokens(new_tokens),
            Some(Delivery::Output(Output::Finished { reason, stats, .. })) => {
                News::Finished(reason, stats.cached_tokens)
            }
            Some(Delivery::Output(Output::Rejected { reason, .. })) => News::Rejected(reason),
            None => News::Gone,
        })
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
        let (mut to, mut end) = (self.sent, None);
        loop {
            match self.poll_news(cx) {
                Poll::Ready(News::Taken) => {}
                Poll::Ready(News::Tokens(n)) => to += n,
                Poll::Ready(last) => {
                    end = Some(last);
                    break;
                }
                Poll::Pending if to > self.sent => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        let mut text = String::new();
        let last = end.is_some();
        match end {
            None => self.shape.chunk(self.sent, to, None, &mut text),
            Some(News::Finished(reason, cached)) => self.shape.chunk(self.sent, to, Some((reason, cached)), &mut text),
            Some(News::Rejected(_) | News::Gone | News::Tokens(_) | News::Taken) => {
                let error = self.gone();
                text = format!("data: {}\n\ndata: [DONE]\n\n", error.body.to_json());
            }
        }
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
