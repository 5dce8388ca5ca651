//! The sender's end of the side channel.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::ListenerExt;
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::time::Time;
use shared::trace::{Tracer, Trail};
use tokio::net::TcpListener;

use super::wire::{MAX_BODY, NOTIFY, Notification, PULL, PullAnswer, PullRequest, Refusal, Word};
use super::{Outcome, Peers};
use crate::core::kv_transfer::{KvInput, LONGEST_TRANSFER, Pull, SendFact, TransferError};

pub(super) async fn serve(listener: TcpListener, peers: Arc<Peers>) {
    let listener = listener.tap_io(|socket| {
        let _ = socket.set_nodelay(true);
    });
    let routes = Router::new().route(PULL, post(pull)).route(NOTIFY, post(notify)).with_state(peers);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the side channel of the KV connector ended");
    }
}

async fn pull(State(peers): State<Arc<Peers>>, request: Request) -> Response {
    let received = peers.clock.now();
    let (head, body) = request.into_parts();
    let Some(asked) = read::<PullRequest>(body).await else { return StatusCode::BAD_REQUEST.into_response() };
    let trail = record(&peers.tracer.load(), &head.headers, received);
    if asked.engine_id != *peers.engine_id {
        return refuse_at_once(&peers, received, &asked, trail);
    }
    let Some((key, ended)) = peers.await_pull() else { return refusal(TransferError::Unreachable) };
    let PullRequest { request_id, blocks, tp_size, breaks_after, reader, .. } = asked;
    let (request, peer) = (request_id.into(), reader.into());
    peers
        .engine
        .hear(received, KvInput::Pull(Pull { key, request, blocks, ranks: tp_size, breaks_after, peer, trail }));
    if !peers.engine.alive() {
        // It may not have heard.
        peers.pull_ended(key, Err(TransferError::Unreachable));
    }
    let outcome = match tokio::time::timeout(LONGEST_TRANSFER.to_std(), ended).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(TransferError::Unreachable),
        Err(_) => {
            peers.pull_ended(key, Err(TransferError::Timeout));
            Err(TransferError::Timeout)
        }
    };
    answer(outcome)
}

/// The blocks were those of an engine that is not there any more.
fn refuse_at_once(peers: &Peers, received: Time, asked: &PullRequest, trail: Trail<SendFact>) -> Response {
    let link = peers.engine.inspect(|e| e.config().kv_transfer.as_ref().map(|kv| kv.kv_connector_extra_config.link));
    let (blocks, link, peer) = (asked.blocks, link.unwrap_or_default(), asked.reader.as_str().into());
    trail.note(received, || SendFact::Asked { blocks, link, peer });
    trail.note(received, || SendFact::Failed(TransferError::NotKept));
    trail.finish(peers.clock.now());
    refusal(TransferError::NotKept)
}

/// The record of the sender's side, if the reader's request is recorded; it is never the root of a trace.
fn record(tracer: &Tracer, headers: &HeaderMap, received: Time) -> Trail<SendFact> {
    match tracer.extract(headers) {
        Some(caller) if tracer.follows(&caller) => tracer.start(headers, received).1,
        Some(_) | None => Trail::off(),
    }
}

async fn notify(State(peers): State<Arc<Peers>>, request: Request) -> StatusCode {
    let received = peers.clock.now();
    let Some(said) = read::<Notification>(request.into_body()).await else { return StatusCode::BAD_REQUEST };
    if said.engine_id == *peers.engine_id {
        let requests = said.request_ids.into_iter().map(Into::into).collect();
        let input = match said.notice {
            Word::Heartbeat => KvInput::Heartbeat(requests),
            Word::Done => KvInput::Done(requests),
        };
        peers.engine.hear(received, input);
    }
    StatusCode::NO_CONTENT
}

async fn read<T: DeserializeOwned>(body: Body) -> Option<T> {
    let body = Limited::new(body, MAX_BODY).collect().await.ok()?.to_bytes();
    serde_json::from_slice(&body).ok()
}

fn answer(outcome: Outcome) -> Response {
    match outcome {
        Ok(transfer) => json(StatusCode::OK, &PullAnswer::from(transfer)),
        Err(error) => refusal(error),
    }
}

fn refusal(error: TransferError) -> Response {
    let status = match error {
        TransferError::NotKept => StatusCode::NOT_FOUND,
        TransferError::TooMany => StatusCode::CONFLICT,
        TransferError::Unreachable | TransferError::Timeout | TransferError::Broken | TransferError::BadAnswer => {
            StatusCode::SERVICE_UNAVAILABLE
        }
    };
    json(status, &Refusal { error: error.as_str().to_owned() })
}

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let body = serde_json::to_string(body).expect("numbers and names serialise");
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}
