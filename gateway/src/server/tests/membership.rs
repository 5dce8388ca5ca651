//! Engines that come and go while requests run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::BodyExt;

use super::harness::{Engine, Running, header, json, named, stream, text};
use crate::core::config::GatewayConfig;
use crate::server::CannotJoin;

#[tokio::test]
async fn a_draining_engine_keeps_what_it_has_and_gets_nothing_new() {
    let (mut a, mut b, mut c) = (Engine::start(0).await, Engine::start(0).await, Engine::start(0).await);
    let gateway = Running::start(GatewayConfig::default(), vec![a.backend("a")]).await;
    let held = gateway.spawn(gateway.chat());
    let call = a.call().await;
    assert!(gateway.endpoints.drain("a"));
    assert!(!gateway.endpoints.drain("a"), "it is no member any more");
    gateway.until_ready(false).await;
    assert_eq!(gateway.send(gateway.chat()).await.status(), 503);

    gateway.endpoints.join(b.backend("b")).unwrap();
    let taken: CannotJoin = gateway.endpoints.join(c.backend("b")).unwrap_err();
    assert_eq!(taken.to_string(), "an endpoint called \"b\" is in the pool already");
    gateway.until_ready(true).await;
    let next = gateway.spawn(gateway.chat());
    b.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(header(&next.await.unwrap(), "x-gateway-destination-endpoint-served"), "b");

    // The pool has given a's place to nobody: its request still knows where it is.
    let (pieces, reply) = stream();
    call.reply.send(reply).unwrap();
    let response = held.await.unwrap();
    assert_eq!(header(&response, "x-gateway-destination-endpoint-served"), "a");
    drop(pieces);
    text(response).await;

    // Now it has: c has a's id, and what was known of a is forgotten.
    gateway.endpoints.join(c.backend("a")).unwrap();
    gateway.endpoints.drain("b");
    gateway.until_ready(false).await;
    gateway.until_ready(true).await;
    let last = gateway.spawn(gateway.chat());
    c.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(header(&last.await.unwrap(), "x-gateway-destination-endpoint-served"), "a");
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.server_errors, stats.disconnected, stats.active), (3, 1, 0, 0));
}

/// What engines saw of each request: how many began to answer it.
type Begun = Arc<Mutex<BTreeMap<String, u32>>>;

/// An engine that answers every request with a short stream until it is told to die: then it breaks every connection.
async fn answering(begun: &Begun) -> (Engine, Arc<AtomicBool>) {
    let Engine { addr, mut calls } = Engine::start(0).await;
    let (dead, begun) = (Arc::new(AtomicBool::new(false)), Arc::clone(begun));
    let is_dead = Arc::clone(&dead);
    tokio::spawn(async move {
        while let Some(call) = calls.recv().await {
            if is_dead.load(Ordering::SeqCst) {
                continue;
            }
            let id = call.head.headers["x-request-id"].to_str().unwrap().to_owned();
            *begun.lock().unwrap().entry(id).or_default() += 1;
            let (pieces, reply) = stream();
            if call.reply.send(reply).is_err() {
                continue;
            }
            let is_dead = Arc::clone(&is_dead);
            tokio::spawn(async move {
                for _ in 0..4 {
                    if pieces.send(Bytes::from_static(b"data: {}\n\n")).await.is_err() || is_dead.load(Ordering::SeqCst)
                    {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
    });
    let (_, nothing) = tokio::sync::mpsc::unbounded_channel();
    (Engine { addr, calls: nothing }, dead)
}

/// I1. Engines are added, drained and killed under load: every request ends with an answer or an error, and none is asked for again
/// once its stream has begun.
#[tokio::test]
async fn no_request_is_lost_while_engines_come_and_go() {
    const CALLERS: u32 = 8;
    const EACH: u32 = 40;
    let begun = Begun::default();
    let (first, _) = answering(&begun).await;
    let mut config = GatewayConfig::default();
    config.limits.retries = 3;
    let gateway = Running::start(config, vec![first.backend("engine-0")]).await;
    let answered = Arc::new(AtomicU32::new(0));
    let mut callers = Vec::new();
    for caller in 0..CALLERS {
        let mut requests = Vec::new();
        for i in 0..EACH {
            let mut request = gateway.chat();
            request.headers_mut().insert("x-request-id", format!("req-{caller}-{i}").parse().unwrap());
            requests.push(request);
        }
        let (client, answered) = (gateway.client(), Arc::clone(&answered));
        callers.push(tokio::spawn(async move {
            let mut statuses = Vec::new();
            for request in requests {
                let response = client.request(request).await.expect("the gateway answers");
                let status = response.status().as_u16();
                let whole = response.into_body().collect().await.is_ok();
                statuses.push((status, whole));
                answered.fetch_add(1, Ordering::SeqCst);
            }
            statuses
        }));
    }
    // While they go on: one joins, and of those before it one drains, the next dies.
    let mut alive = vec!["engine-0".to_owned()];
    let mut deaths = Vec::new();
    for n in 1..=6u32 {
        while answered.load(Ordering::SeqCst) < n * CALLERS * EACH / 8 {
            tokio::task::yield_now().await;
        }
        let (engine, dead) = answering(&begun).await;
        let name = format!("engine-{n}");
        gateway.endpoints.join(engine.backend(&name)).unwrap();
        deaths.push(dead);
        alive.push(name);
        if n % 2 == 0 {
            gateway.endpoints.drain(&alive.remove(0));
        } else if n > 1 {
            deaths[n as usize - 2].store(true, Ordering::SeqCst);
        }
    }
    let mut counts = BTreeMap::new();
    for caller in callers {
        for outcome in caller.await.unwrap() {
            *counts.entry(outcome).or_insert(0u32) += 1;
        }
    }
    assert_eq!(counts.values().sum::<u32>(), CALLERS * EACH, "{counts:?}");
    let whole = counts.get(&(200, true)).copied().unwrap_or(0);
    assert!(whole > CALLERS * EACH / 2, "{counts:?}");
    assert!(counts.keys().all(|(status, whole)| *status == 200 || *whole && *status >= 502), "{counts:?}");
    assert!(begun.lock().unwrap().values().all(|n| *n == 1), "a stream that had begun was asked for again");

    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.received, stats.active, stats.disconnected), (u64::from(CALLERS * EACH), 0, 0));
    let (requests, attempts) = (named(&spans, "gateway.request"), named(&spans, "gateway.backend.proxy"));
    assert_eq!(requests.len() as u32, CALLERS * EACH);
    assert_eq!(attempts.len() as u64, requests.len() as u64 + stats.retries - refused(&spans));
}

/// Requests that got no attempt at all.
fn refused(spans: &[shared::trace::Span]) -> u64 {
    let all = named(spans, "gateway.request");
    let tried = |id| spans.iter().any(|s| s.name == "gateway.backend.proxy" && s.parent == Some(id));
    all.iter().filter(|s| !tried(s.span_id)).count() as u64
}
