//! Endpoints that a file or a name server names.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use serde_json::json;
use tokio::net::UdpSocket;

use super::harness::{Engine, Running, header, json as reply};
use crate::core::config::GatewayConfig;
use crate::server::{ServeError, Server};

fn following(source: serde_json::Value) -> GatewayConfig {
    GatewayConfig { discovery: vec![serde_json::from_value(source).unwrap()], ..GatewayConfig::default() }
}

/// Replaces a file in one go.
fn write(path: &Path, text: &str) {
    let next = path.with_extension("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, path).unwrap();
}

fn listed(engines: &[(&str, &Engine)]) -> String {
    let lines = engines.iter().map(|(name, e)| format!("  - {{ name: {name}, url: \"http://{}\" }}\n", e.addr));
    format!("endpoints:\n{}", lines.collect::<String>())
}

async fn failures(gateway: &Running) -> u64 {
    let (_, metrics) = gateway.get("/metrics").await;
    let line = metrics.lines().find_map(|l| l.strip_prefix("gateway_discovery_failures_total "));
    line.and_then(|n| n.parse().ok()).expect("the count is there")
}

#[tokio::test]
async fn the_pool_follows_a_file() {
    let (mut a, mut b) = (Engine::start(0).await, Engine::start(0).await);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool.yaml");
    write(&path, &listed(&[("a", &a)]));
    let config = following(json!({"file": {"path": path, "interval": "10ms"}}));
    let gateway = Running::start(config, Vec::new()).await;
    gateway.until_ready(true).await;
    // What stands in the file at the start is known before the first request.
    let held = gateway.spawn(gateway.chat());
    let call = a.call().await;

    write(&path, &listed(&[("b", &b)]));
    gateway.until_members(&["b"]).await;
    gateway.until_ready(true).await;
    let next = gateway.spawn(gateway.chat());
    b.call().await.reply.send(reply(200, "{}")).unwrap();
    assert_eq!(header(&next.await.unwrap(), "x-gateway-destination-endpoint-served"), "b");
    call.reply.send(reply(200, "{}")).unwrap();
    assert_eq!(header(&held.await.unwrap(), "x-gateway-destination-endpoint-served"), "a");

    // A bad file, or none, changes nothing and is counted.
    let before = failures(&gateway).await;
    write(&path, "endpoints: [{ name: c }]");
    while failures(&gateway).await == before {}
    std::fs::remove_file(&path).unwrap();
    let before = failures(&gateway).await;
    while failures(&gateway).await < before + 2 {}
    assert_eq!(gateway.endpoints.names(), ["b"]);

    // The same name at another address is another endpoint.
    write(&path, &listed(&[("b", &a)]));
    loop {
        let mut next = gateway.spawn(gateway.chat());
        tokio::select! {
            call = a.call() => {
                call.reply.send(reply(200, "{}")).unwrap();
                assert_eq!(next.await.unwrap().status(), 200);
                break;
            }
            call = b.call() => call.reply.send(reply(200, "{}")).unwrap(),
            // Between the two the pool is empty.
            response = &mut next => assert_eq!(response.unwrap().status(), 503),
        }
    }
    write(&path, "endpoints: []");
    gateway.until_members(&[]).await;
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.active, stats.disconnected), (0, 0));
}

#[tokio::test]
async fn a_name_that_is_taken_waits_until_it_is_free() {
    let (mut a, b) = (Engine::start(0).await, Engine::start(0).await);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool.yaml");
    write(&path, &listed(&[("a", &a)]));
    let config = following(json!({"file": {"path": path, "interval": "10ms"}}));
    let gateway = Running::start(config, vec![b.backend("a")]).await;
    assert_eq!(gateway.endpoints.names(), ["a"]);
    assert!(gateway.endpoints.drain("a"));
    gateway.until_members(&["a"]).await;
    gateway.until_ready(true).await;
    let response = gateway.spawn(gateway.chat());
    a.call().await.reply.send(reply(200, "{}")).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_source_that_was_never_right_is_an_error_at_the_start() {
    let config = following(json!({"file": {"path": "/nowhere/at/all"}}));
    let (any, clock) = ("127.0.0.1:0".parse().unwrap(), shared::clock::RunClock::start());
    let tracer = shared::trace::Tracer::off();
    let bound = Server::bind(any, config, Vec::new(), tracer, clock, shared::rng::Seed(1)).await;
    assert!(matches!(bound, Err(ServeError::Discovery(why)) if why.contains("/nowhere/at/all")));
}

/// What a name server knows. A name without records does not exist; without a zone it has no answer at all.
type Zone = Arc<Mutex<Option<BTreeMap<(String, RecordType), Vec<RData>>>>>;

/// A name server on a loopback address.
async fn name_server(zone: &Zone) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (at, zone) = (socket.local_addr().unwrap(), Arc::clone(zone));
    tokio::spawn(async move {
        let mut packet = [0; 4096];
        while let Ok((size, caller)) = socket.recv_from(&mut packet).await {
            let asked = Message::from_vec(&packet[..size]).unwrap();
            let answer = answer(&asked, zone.lock().unwrap().as_ref());
            socket.send_to(&answer.to_vec().unwrap(), caller).await.unwrap();
        }
    });
    at
}

fn answer(asked: &Message, zone: Option<&BTreeMap<(String, RecordType), Vec<RData>>>) -> Message {
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    let query = asked.queries[0].clone();
    let name = query.name().to_utf8();
    match zone {
        None => answer.metadata.response_code = ResponseCode::ServFail,
        Some(zone) => {
            let exists = zone.keys().any(|(known, _)| *known == name);
            answer.metadata.response_code = if exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
            let found = zone.get(&(name, query.query_type())).into_iter().flatten();
            answer.add_answers(found.map(|data| Record::from_rdata(query.name().clone(), 300, data.clone())));
        }
    }
    answer.add_query(query);
    answer
}

fn zone(records: &[(&str, RData)]) -> Option<BTreeMap<(String, RecordType), Vec<RData>>> {
    let mut zone: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (name, data) in records {
        zone.entry(((*name).to_owned(), data.record_type())).or_default().push(data.clone());
    }
    Some(zone)
}

fn a(last: u8) -> RData {
    RData::A(A(Ipv4Addr::new(127, 0, 0, last)))
}

/// A headless service of Kubernetes: one name, an address for each pod.
#[tokio::test]
async fn the_pool_follows_the_addresses_of_a_name() {
    let mut engine = Engine::start(0).await;
    let port = engine.addr.port();
    let records = Zone::default();
    *records.lock().unwrap() = zone(&[("vllm.default.svc.", a(1))]);
    let server = name_server(&records).await;
    let dns = json!({"name": "vllm.default.svc.", "port": port, "interval": "20ms", "servers": [server.to_string()]});
    let gateway = Running::start(following(json!({"dns": dns})), Vec::new()).await;
    let one = format!("127.0.0.1:{port}");
    gateway.until_members(&[&one]).await;
    // Who is known from the start is scraped before the first request is answered.
    let response = gateway.spawn(gateway.chat());
    engine.call().await.reply.send(reply(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), one);

    let two = format!("127.0.0.2:{port}");
    *records.lock().unwrap() = zone(&[("vllm.default.svc.", a(1)), ("vllm.default.svc.", a(2))]);
    gateway.until_members(&[&one, &two]).await;
    // A name server that fails says nothing.
    *records.lock().unwrap() = None;
    let before = failures(&gateway).await;
    while failures(&gateway).await < before + 2 {}
    assert_eq!(gateway.endpoints.names(), [one.clone(), two.clone()]);
    // One that says that nobody is there is believed.
    *records.lock().unwrap() = zone(&[("vllm.default.svc.", a(2))]);
    gateway.until_members(&[&two]).await;
    *records.lock().unwrap() = zone(&[]);
    gateway.until_members(&[]).await;
}

#[tokio::test]
async fn the_pool_follows_the_services_of_a_name() {
    let mut engine = Engine::start(0).await;
    let port = engine.addr.port();
    let srv = |priority, port, target: &str| RData::SRV(SRV::new(priority, 0, port, Name::from_utf8(target).unwrap()));
    let service = "_http._tcp.vllm.svc.";
    let records = Zone::default();
    *records.lock().unwrap() = zone(&[
        (service, srv(1, port, "pod-0.svc.")),
        (service, srv(1, 9, "pod-1.svc.")),
        (service, srv(2, 7, "spare.svc.")),
        ("pod-0.svc.", a(1)),
        ("pod-1.svc.", a(3)),
        ("spare.svc.", a(4)),
    ]);
    let server = name_server(&records).await;
    let dns = json!({"name": service, "record": "srv", "interval": "20ms", "servers": [server.to_string()]});
    let gateway = Running::start(following(json!({"dns": dns})), Vec::new()).await;
    gateway.until_members(&[&format!("127.0.0.1:{port}"), "127.0.0.3:9"]).await;
    gateway.until_ready(true).await;
    let response = gateway.spawn(gateway.chat());
    engine.call().await.reply.send(reply(200, "{}")).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}
