//! The reader's end of the side channel: carries what this engine says to others.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use shared::trace::TraceContext;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;

use super::wire::{MAX_BODY, NOTIFY, Notification, PULL, PullAnswer, PullRequest, Refusal};
use super::{Outcome, Peers};
use crate::core::kv_transfer::{KvInput, KvOutput, LONGEST_TRANSFER, Notice, Peer, Transfer, TransferError};
use crate::spans::transfer_span_id;

/// Until a peer that does not take a connection is given up.
const CONNECT: Duration = Duration::from_secs(5);
/// Until a notification that nobody answers counts as failed.
const NOTIFIED: Duration = Duration::from_secs(5);

type Http = Client<HttpConnector, Full<Bytes>>;

/// Sends what the engine says, each message in a task of its own, until the engine stops.
pub(super) async fn carry(peers: Arc<Peers>, mut said: UnboundedReceiver<KvOutput>) {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    let http: Http = Client::builder(TokioExecutor::new()).build(connector);
    // Bounded by the engine's loads and, for notifications, by their time limit.
    let mut tasks = JoinSet::new();
    loop {
        let output = tokio::select! {
            output = said.recv() => output,
            Some(_) = tasks.join_next() => continue,
        };
        let (http, peers) = (http.clone(), Arc::clone(&peers));
        match output {
            None => return peers.end_all_pulls(),
            Some(KvOutput::Sent { key, outcome, .. }) => peers.pull_ended(key, outcome),
            Some(KvOutput::Pull { load, remote, blocks, ranks, breaks_after, caller, .. }) => {
                tasks.spawn(async move {
                    let asked = PullRequest {
                        engine_id: remote.peer.engine_id.to_string(),
                        request_id: remote.request.to_string(),
                        blocks,
                        tp_size: ranks,
                        breaks_after,
                        reader: peers.engine_id.to_string(),
                    };
                    let read = pull(&http, &peers, &remote.peer, &asked, caller);
                    let outcome = tokio::time::timeout(LONGEST_TRANSFER.to_std(), read).await;
                    let outcome = outcome.unwrap_or(Err(TransferError::Timeout));
                    peers.engine.hear(peers.clock.now(), KvInput::Received { load, outcome });
                });
            }
            Some(KvOutput::Notify { peer, what, requests, .. }) => {
                tasks.spawn(async move {
                    let told = tokio::time::timeout(NOTIFIED, notify(&http, &peer, what, &requests)).await;
                    if !told.unwrap_or(false) {
                        peers.engine.hear(peers.clock.now(), KvInput::NotReached);
                    }
                });
            }
        }
    }
}

async fn pull(http: &Http, peers: &Peers, peer: &Peer, asked: &PullRequest, caller: Option<TraceContext>) -> Outcome {
    let mut headers = HeaderMap::new();
    if let Some(caller) = caller {
        peers.tracer.load().inject(&caller.child(transfer_span_id(caller.span_id)), &mut headers);
    }
    let request = request(peer, PULL, asked, headers).ok_or(TransferError::Unreachable)?;
    let answer = http.request(request).await.map_err(|_| TransferError::Unreachable)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    let body = body.map_err(|_| TransferError::Unreachable)?.to_bytes();
    judge(status, &body, asked.blocks, asked.tp_size)
}

fn judge(status: StatusCode, body: &[u8], blocks: u32, ranks: u32) -> Result<Transfer, TransferError> {
    if status != StatusCode::OK {
        let refusal = serde_json::from_slice::<Refusal>(body);
        return Err(refusal.map_or(TransferError::BadAnswer, |refusal| refusal.error()));
    }
    let answer = serde_json::from_slice::<PullAnswer>(body).map_err(|_| TransferError::BadAnswer)?;
    answer.transfer(blocks, ranks)
}

/// Whether the peer heard it.
async fn notify(http: &Http, peer: &Peer, what: Notice, requests: &[Arc<str>]) -> bool {
    let body = Notification {
        engine_id: peer.engine_id.to_string(),
        notice: what.into(),
        request_ids: requests.iter().map(|r| r.to_string()).collect(),
    };
    let Some(request) = request(peer, NOTIFY, &body, HeaderMap::new()) else { return false };
    http.request(request).await.is_ok_and(|answer| answer.status().is_success())
}

fn request(peer: &Peer, path: &str, body: &impl serde::Serialize, headers: HeaderMap) -> Option<Request<Full<Bytes>>> {
    let host = if peer.host.contains(':') { format!("[{}]", peer.host) } else { peer.host.to_string() };
    let body = serde_json::to_vec(body).expect("numbers and names serialise");
    let request = Request::post(format!("http://{host}:{}{path}", peer.port));
    let mut request = request.body(Full::from(Bytes::from(body))).ok()?;
    *request.headers_mut() = headers;
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_make_no_sense_are_failures() {
        let check = |status: u16, body: &str, expect: Result<u64, TransferError>| {
            let found = judge(StatusCode::from_u16(status).unwrap(), body.as_bytes(), 2, 1);
            assert_eq!(found.map(|t| t.bytes()), expect, "{status} {body}");
        };
        let good = r#"{"blocks":2,"ranks":1,"rank_bytes":7,"rank_descriptors":4,"post_ns":1,"time_ns":2}"#;
        check(200, good, Ok(7));
        check(200, &good.replace("\"blocks\":2", "\"blocks\":3"), Err(TransferError::BadAnswer));
        check(200, &good.replace("\"time_ns\":2", "\"time_ns\":18446744073709551615"), Err(TransferError::BadAnswer));
        check(200, "{}", Err(TransferError::BadAnswer));
        check(404, r#"{"error":"kv_blocks_not_kept"}"#, Err(TransferError::NotKept));
        check(409, r#"{"error":"kv_blocks_too_many"}"#, Err(TransferError::TooMany));
        check(502, "<html>", Err(TransferError::BadAnswer));
    }
}
