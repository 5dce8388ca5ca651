//! Tells services which traces the gateway keeps, in batches, without a request ever waiting for it.
//!
//! What cannot be told is counted: the services let go of their part of the trace when its time is over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Full;
use shared::ids::TraceId;
use shared::trace::verdict::{KEEP_PATH, MAX_IDS, write};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::server::membership::Target;
use crate::server::runtime::{Shared, Upstream};

/// Verdicts that may wait to be told; further ones are lost.
const MAX_WAITING: usize = 8_192;
/// How long a verdict may wait for others: services hold records for a minute.
const GATHER: Duration = Duration::from_millis(200);
/// How long a service may take to answer, and how long to wait before it is asked again.
const ANSWER: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(500);
/// How often a service is asked.
const TRIES: u32 = 3;
/// How long the end of the gateway waits for verdicts to be told.
const FINISH: Duration = Duration::from_secs(5);

/// Where verdicts go.
#[derive(Debug)]
pub(crate) struct Verdicts {
    queue: mpsc::Sender<Told>,
    /// The other end, until somebody spreads them.
    told: Mutex<Option<mpsc::Receiver<Told>>>,
    lost: AtomicU64,
}

#[derive(Debug)]
enum Told {
    Keep(TraceId, Vec<Arc<Target>>),
    /// To be answered when everything before it is told.
    Finish(oneshot::Sender<()>),
}

impl Verdicts {
    pub(crate) fn new() -> Verdicts {
        let (queue, told) = mpsc::channel(MAX_WAITING);
        Verdicts { queue, told: Mutex::new(Some(told)), lost: AtomicU64::new(0) }
    }

    /// The trace is kept; these services have parts of it.
    pub(crate) fn keep(&self, trace: TraceId, called: Vec<Arc<Target>>) {
        if self.queue.try_send(Told::Keep(trace, called)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything is told, for a while.
    pub(crate) async fn finish(&self) {
        let (done, told) = oneshot::channel();
        if self.queue.send(Told::Finish(done)).await.is_ok() {
            let _ = tokio::time::timeout(FINISH, told).await;
        }
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(lost, "services were not told of all traces that are kept");
        }
    }
}

/// Ids that wait for their messages, by where they go.
type Waiting = BTreeMap<String, Vec<TraceId>>;

/// Tells verdicts until the gateway ends.
pub(crate) async fn spread(shared: Arc<Shared>) {
    let Some(verdicts) = &shared.verdicts else { return };
    let Some(mut told) = verdicts.told.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    // Those of all pools: one that was not asked for the request holds nothing of it.
    let managers = shared.pools.iter().filter_map(|pool| pool.kv_manager.as_ref()?.uri(KEEP_PATH));
    let managers: BTreeSet<String> = managers.map(|uri| uri.to_string()).collect();
    let (mut waiting, mut sending) = (Waiting::new(), JoinSet::new());
    loop {
        let full = waiting.values().any(|ids| ids.len() >= MAX_IDS);
        let next = match (waiting.is_empty(), full) {
            (true, _) => told.recv().await,
            (false, true) => {
                send(&shared, &mut waiting, &mut sending);
                continue;
            }
            (false, false) => match tokio::time::timeout(GATHER, told.recv()).await {
                Ok(next) => next,
                Err(_) => {
                    send(&shared, &mut waiting, &mut sending);
                    continue;
                }
            },
        };
        match next {
            Some(Told::Keep(trace, called)) => {
                let path = PathAndQuery::from_static(KEEP_PATH);
                let called = called.iter().filter_map(|t| t.backend.uri(&path)).map(|uri| uri.to_string());
                called.chain(managers.iter().cloned()).for_each(|uri| waiting.entry(uri).or_default().push(trace));
            }
            Some(Told::Finish(done)) => {
                send(&shared, &mut waiting, &mut sending);
                while sending.join_next().await.is_some() {}
                let _ = done.send(());
            }
            None => return,
        }
    }
}

/// Sends what waits.
fn send(shared: &Arc<Shared>, waiting: &mut Waiting, sending: &mut JoinSet<()>) {
    while sending.try_join_next().is_some() {}
    for (uri, ids) in std::mem::take(waiting) {
        let Ok(uri) = uri.parse::<Uri>() else { continue };
        for ids in ids.chunks(MAX_IDS) {
            let (shared, body, uri) = (Arc::clone(shared), Bytes::from(write(ids)), uri.clone());
            let count = ids.len() as u64;
            sending.spawn(async move {
                if !tell(&shared.client, &uri, body).await
                    && let Some(verdicts) = &shared.verdicts
                {
                    verdicts.lost.fetch_add(count, Ordering::Relaxed);
                }
            });
        }
    }
}

/// Whether the service knows, or has nothing to do with it: one that is not ours holds nothing.
async fn tell(client: &Upstream, uri: &Uri, body: Bytes) -> bool {
    for _ in 0..TRIES {
        let mut request = Request::new(Full::new(body.clone()));
        (*request.method_mut(), *request.uri_mut()) = (Method::POST, uri.clone());
        if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER, client.request(request)).await
            && answer.status() < StatusCode::INTERNAL_SERVER_ERROR
        {
            return true;
        }
        tokio::time::sleep(AGAIN).await;
    }
    false
}
