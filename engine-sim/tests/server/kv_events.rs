//! KV events over loopback: a subscriber hears what a running server caches, and asks for what it has missed.

use std::time::Duration;

use engine_sim::core::config::EngineConfig;
use rmpv::Value;
use serde_json::json;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::harness::{COMPLETIONS, Running, instant};

/// Prompts of whole blocks: their token ids are their number and what follows it.
fn prompt(number: u32) -> String {
    let tokens: Vec<u32> = (0..32).map(|i| 1000 * number + i).collect();
    json!({"prompt": tokens, "max_tokens": 1}).to_string()
}

fn publishing(endpoint: &str) -> EngineConfig {
    let mut config = instant();
    let events = &mut config.kv_events_config;
    events.enable_kv_cache_events = true;
    events.endpoint = endpoint.into();
    events.replay_endpoint = Some("tcp://*:0".into());
    events.topic = "kv@{pod}@{model}".into();
    config
}

async fn source(server: &Running) -> serde_json::Value {
    serde_json::from_str(&server.get("/kv_event_sources").await.text).unwrap()
}

/// A published batch.
#[derive(Debug, PartialEq)]
struct Batch {
    topic: String,
    seq: i64,
    payload: Vec<u8>,
}

impl Batch {
    fn read(frames: &[bytes::Bytes]) -> Batch {
        let [topic, seq, payload] = frames else { panic!("{} frames", frames.len()) };
        let seq = i64::from_be_bytes(seq.as_ref().try_into().unwrap());
        Batch { topic: String::from_utf8(topic.to_vec()).unwrap(), seq, payload: payload.to_vec() }
    }

    fn events(&self) -> Vec<Value> {
        let batch = rmpv::decode::read_value(&mut self.payload.as_slice()).unwrap();
        let [ts, events, rank] = batch.as_array().unwrap().as_slice() else { panic!("{batch}") };
        assert!(ts.as_f64().unwrap() > 1.7e9, "seconds since 1970");
        assert_eq!(rank.as_u64(), Some(0));
        events.as_array().unwrap().clone()
    }
}

fn field<'a>(event: &'a Value, name: &str) -> &'a Value {
    let found = event.as_map().unwrap().iter().find(|(key, _)| key.as_str() == Some(name));
    &found.unwrap_or_else(|| panic!("no {name} in {event}")).1
}

async fn receive(socket: &mut SubSocket, patience: Duration) -> Option<Batch> {
    let message = tokio::time::timeout(patience, socket.recv()).await.ok()?.unwrap();
    Some(Batch::read(&message.into_vec()))
}

/// Sends request after request, each with a prompt of its own, until the subscriber hears of one: a subscription takes its time.
async fn first_heard(server: &Running, socket: &mut SubSocket) -> (u32, Batch) {
    for number in 1..1000 {
        server.json(COMPLETIONS, &prompt(number)).await;
        if let Some(batch) = receive(socket, Duration::from_millis(20)).await {
            return (number, batch);
        }
    }
    panic!("nothing was heard");
}

async fn replay(endpoint: &str, from: u64) -> Vec<Batch> {
    let mut socket = DealerSocket::new();
    socket.connect(endpoint).await.unwrap();
    let mut request = ZmqMessage::from(Vec::new());
    request.push_back(bytes::Bytes::copy_from_slice(&from.to_be_bytes()));
    socket.send(request).await.unwrap();
    let mut batches = Vec::new();
    loop {
        let answer = tokio::time::timeout(Duration::from_secs(10), socket.recv()).await.unwrap().unwrap().into_vec();
        assert_eq!(answer[0].as_ref(), b"", "the delimiter");
        let batch = Batch::read(&answer[1..]);
        if batch.seq == -1 {
            assert_eq!((batch.topic.as_str(), batch.payload.len()), ("", 0));
            return batches;
        }
        batches.push(batch);
    }
}

#[tokio::test]
async fn a_subscriber_hears_what_is_cached_and_replays_what_it_missed() {
    let server = Running::start(publishing("tcp://*:0")).await;
    let sources = source(&server).await;
    let own = &sources["0"];
    let endpoint = own["endpoint"].as_str().unwrap();
    assert!(endpoint.starts_with("tcp://127.0.0.1:"), "the wildcard is the server's own interface: {endpoint}");
    assert_eq!((&own["publisher"], &own["buffer_steps"]), (&json!("zmq"), &json!(10_000)));
    // Nobody listens yet.
    server.json(COMPLETIONS, &prompt(0)).await;
    let mut socket = SubSocket::new();
    socket.connect(endpoint).await.unwrap();
    socket.subscribe("kv@").await.unwrap();
    let (number, heard) = first_heard(&server, &mut socket).await;
    assert!(heard.seq > 0, "the first batch was published before anybody listened");
    assert_eq!(heard.topic, own["topic"].as_str().unwrap());
    assert!(heard.topic.starts_with("kv@127.0.0.1:") && heard.topic.ends_with("@igsim/instant"), "{}", heard.topic);

    let all = replay(own["replay_endpoint"].as_str().unwrap(), 0).await;
    let seqs: Vec<i64> = all.iter().map(|b| b.seq).collect();
    assert_eq!(seqs, (0..=i64::from(number)).collect::<Vec<_>>(), "no gap is left");
    assert_eq!(all[heard.seq as usize], heard, "what is replayed is what was published");
    for (number, batch) in (0u32..).zip(&all) {
        let [event] = batch.events().try_into().unwrap();
        assert_eq!(field(&event, "type").as_str(), Some("BlockStored"));
        let tokens: Vec<Value> = (0..32).map(|i| Value::from(1000 * number + i)).collect();
        assert_eq!(field(&event, "token_ids"), &Value::Array(tokens));
        assert_eq!(field(&event, "block_hashes").as_array().unwrap().len(), 2);
        assert_eq!((field(&event, "medium").as_str(), field(&event, "block_size").as_u64()), (Some("GPU"), Some(16)));
    }
    let late = replay(own["replay_endpoint"].as_str().unwrap(), heard.seq as u64).await;
    assert_eq!(late.len(), all.len() - heard.seq as usize);
}

#[tokio::test]
async fn an_emptied_cache_is_told_with_the_next_step() {
    let server = Running::start(publishing("tcp://*:0")).await;
    let sources = source(&server).await;
    let replay_endpoint = sources["0"]["replay_endpoint"].as_str().unwrap();
    server.json(COMPLETIONS, &prompt(1)).await;
    server.until("idle", |s| s.running == 0 && s.free_blocks + 1 == s.num_gpu_blocks).await;
    assert!(server.engine.reset_prefix_cache());
    server.json(COMPLETIONS, &prompt(1)).await;
    let all = replay(replay_endpoint, 0).await;
    let types: Vec<Vec<String>> = all
        .iter()
        .map(|b| b.events().iter().map(|e| field(e, "type").as_str().unwrap().to_owned()).collect())
        .collect();
    assert_eq!(types, [vec!["BlockStored"], vec!["AllBlocksCleared", "BlockStored"]]);
    let stored = |batch: usize, event: usize| field(&all[batch].events()[event], "block_hashes").clone();
    assert_eq!(stored(0, 0), stored(1, 1), "the same prompt is stored again");
}

#[tokio::test]
async fn a_publisher_connects_to_a_subscriber_that_is_bound() {
    let mut socket = SubSocket::new();
    let endpoint = socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    socket.subscribe("").await.unwrap();
    let server = Running::start(publishing(&endpoint)).await;
    assert_eq!(source(&server).await["0"]["endpoint"], json!(endpoint));
    let (_, heard) = first_heard(&server, &mut socket).await;
    assert_eq!(heard.events().len(), 1);
}

#[tokio::test]
async fn a_server_that_publishes_nothing_lists_no_source() {
    let server = Running::start(instant()).await;
    assert_eq!(source(&server).await, json!({}));
}
