//! Replays recordings of vLLM 0.33's own scheduler and compares every decision, step by step.
//!
//! A recording gives the inputs (requests, aborts, finished remote loads) and, per step, everything the real scheduler decided.
//! `VLLM_GOLDEN_DIR` names a further directory of recordings.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use engine_sim::core::config::{CacheConfig, EventFormat, HashAlgo, KvEventsConfig, ObservabilityConfig, Policy};
use engine_sim::core::hasher::BlockHasher;
use engine_sim::core::kv_cache::KvEvent;
use engine_sim::core::kv_events::{EventLog, EventSource};
use engine_sim::core::scheduler::{Batch, Origin, Scheduler, SchedulerParams, TokenOut};
use engine_sim::core::sequence::{NewSequence, SamplingParams, SeqIx};
use engine_sim::server::kv_events::wire::{self, Form};
use serde_json::{Value, json};
use shared::block_hash::{BlockKey, ExtraKeys};
use shared::time::Time;
use shared::tokens::TokenId;

/// Recordings that are known not to replay yet. One that does fails the test: take it off the list.
const NOT_YET: [&str; 0] = [];

#[test]
fn every_decision_is_vllms() {
    let mut files = recordings(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"));
    assert_eq!(files.len(), 93, "recordings in the repository");
    if let Some(more) = std::env::var_os("VLLM_GOLDEN_DIR") {
        files.extend(recordings(Path::new(&more)));
    }
    let (mut steps, mut mismatches, mut wrong, mut passing_unexpectedly) = (0, 0, Vec::new(), Vec::new());
    for path in &files {
        let name =
            path.file_name().and_then(|n| n.to_str()).unwrap_or_default().trim_end_matches(".json.gz").to_owned();
        let trace = read(path);
        steps += trace["steps"].as_array().unwrap().len();
        let found = replay(&trace);
        mismatches += found.count;
        match found.first {
            None if NOT_YET.contains(&name.as_str()) => passing_unexpectedly.push(name),
            None => {}
            Some(first) => {
                println!("{name}: {} mismatches, the first at {first}", found.count);
                wrong.push(name);
            }
        }
    }
    println!("{} traces, {steps} steps, {mismatches} mismatches", files.len());
    assert_eq!(passing_unexpectedly, Vec::<String>::new(), "these replay now: take them off the list");
    wrong.retain(|name| !NOT_YET.contains(&name.as_str()));
    assert_eq!(wrong, Vec::<String>::new(), "these differ from vLLM");
}

/// The comparison sees what is wrong, counts all of it and shows the first of it from both sides.
#[test]
fn a_scheduler_that_differs_is_found_out() {
    let mut trace = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/max_num_seqs.json.gz"));
    assert_eq!(replay(&trace).count, 0);
    let limit = trace["config"]["max_num_seqs"].as_u64().unwrap();
    trace["config"]["max_num_seqs"] = json!(limit + 1);
    let found = replay(&trace);
    let first = found.first.expect("a request more is admitted");
    assert!(found.count > 1, "{} mismatches", found.count);
    assert!(first.starts_with("step ") && first.contains("recorded") && first.contains("replayed"), "{first}");
}

fn recordings(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.to_string_lossy().ends_with(".json.gz"));
    files.sort();
    files
}

fn read(path: &Path) -> Value {
    let file = std::fs::File::open(path).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    let mut trace: Value = serde_json::from_str(&text).unwrap();
    let ordered: Trace = serde_json::from_str(&text).unwrap();
    for (step, order) in trace["steps"].as_array_mut().unwrap().iter_mut().zip(ordered.steps) {
        step["scheduled"] = json!(order.scheduled.0);
        if let Some(outputs) = order.outputs {
            step["outputs"] = json!(outputs.0);
        }
    }
    trace
}

/// The two objects of a step whose order is a decision; reading into a [`Value`] loses it.
#[derive(serde::Deserialize)]
struct Trace {
    steps: Vec<OrderedStep>,
}

#[derive(serde::Deserialize)]
struct OrderedStep {
    scheduled: Ordered,
    outputs: Option<Ordered>,
}

struct Ordered(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Ordered {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Ordered, D::Error> {
        struct Pairs;
        impl<'de> serde::de::Visitor<'de> for Pairs {
            type Value = Ordered;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Ordered(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// How a replay differs from its recording.
#[derive(Default)]
struct Mismatches {
    count: usize,
    /// The first one, with both sides.
    first: Option<String>,
}

/// Every difference between the recording and the replay. What comes after the first one may follow from it.
fn replay(trace: &Value) -> Mismatches {
    let mut player = Player::new(trace);
    player.check_prompt_hashes(trace);
    let steps = trace["steps"].as_array().unwrap();
    for expected in steps {
        player.step(expected);
    }
    if player.scheduler.has_work() || player.scheduler.batches_in_flight() > 0 {
        player.differ(steps.len() as u64, "work left after the last step", &Value::Null, "some");
    }
    player.found.into_inner()
}

/// A request of the recording, with what the scheduler does not keep.
struct Request {
    id: String,
    spec: Value,
    tokens: Vec<TokenId>,
    lora: Option<String>,
    ix: Option<SeqIx>,
}

struct Player {
    scheduler: Scheduler,
    requests: Vec<Request>,
    /// Steps of the batches in flight.
    in_flight: Vec<u64>,
    inflight_limit: usize,
    block_size: u32,
    remote_tokens: Option<u32>,
    cache: CacheConfig,
    /// What publishes events, with integers and with whole digests as hashes.
    logs: [EventLog; 2],
    found: RefCell<Mismatches>,
}

fn number(v: &Value) -> u32 {
    u32::try_from(v.as_u64().unwrap()).unwrap()
}

/// The integer after `name=` in a Python repr.
fn field(repr: &Value, name: &str) -> Option<u32> {
    let text = repr.as_str()?;
    let at =
        text.match_indices(name).find(|(at, _)| !text[..*at].ends_with(|c: char| c == '_' || c.is_alphanumeric()))?.0;
    let digits: String = text[at + name.len()..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

impl Player {
    fn new(trace: &Value) -> Player {
        let config = &trace["config"];
        let watermark = trace["watermark"].as_f64().unwrap();
        let num_blocks = number(&config["num_blocks"]);
        let is = |key: &str| config[key].as_bool().unwrap_or(false);
        let remote_tokens = field(&config["use_kv_connector"], "matched_tokens=");
        let params = SchedulerParams {
            block_size: number(&trace["block_size"]),
            num_blocks,
            max_model_len: number(&config["max_model_len"]),
            max_num_batched_tokens: number(&config["max_num_batched_tokens"]),
            max_num_seqs: number(&config["max_num_seqs"]),
            chunked_prefill: true,
            long_prefill_token_threshold: config["long_prefill_token_threshold"].as_u64().unwrap_or(0) as u32,
            policy: if config["scheduling_policy"] == "priority" { Policy::Priority } else { Policy::Fcfs },
            reserve_full_isl: true,
            watermark_blocks: (watermark * f64::from(num_blocks)).floor() as u32,
            async_scheduling: is("async_scheduling"),
            prefix_caching: is("enable_prefix_caching"),
            max_loras: field(&config["lora_config"], "max_loras="),
            kv_events: true,
            observability: ObservabilityConfig::default(),
            drop_stale_outputs: remote_tokens.is_some(),
            defer_frees: is("defer_block_free"),
        };
        let cache = CacheConfig {
            block_size: params.block_size,
            prefix_caching_hash_algo: HashAlgo::Sha256Cbor,
            ..CacheConfig::default()
        };
        let requests = trace["requests"].as_object().unwrap().iter().map(|(id, spec)| Request {
            id: id.clone(),
            spec: spec.clone(),
            tokens: spec["prompt_token_ids"].as_array().unwrap().iter().map(|t| TokenId(number(t))).collect(),
            lora: spec["lora"].as_str().map(str::to_owned),
            ix: None,
        });
        Player {
            requests: requests.collect(),
            block_size: params.block_size,
            scheduler: Scheduler::new(params),
            in_flight: Vec::new(),
            inflight_limit: trace["inflight"].as_u64().unwrap() as usize,
            remote_tokens,
            logs: [true, false].map(|int| event_log(&cache, int)),
            cache,
            found: RefCell::default(),
        }
    }

    fn differ(&self, step: u64, what: &str, recorded: &Value, found: impl std::fmt::Display) {
        let mut all = self.found.borrow_mut();
        all.count += 1;
        all.first.get_or_insert_with(|| format!("step {step}: {what}\n  recorded {recorded}\n  replayed {found}"));
    }

    fn same(&self, step: u64, what: &str, recorded: &Value, found: &Value) {
        if recorded != found {
            self.differ(step, what, recorded, found);
        }
    }

    fn close(&self, step: u64, what: &str, recorded: &Value, found: f64) {
        if recorded.as_f64().is_none_or(|r| (r - found).abs() >= 1e-6) {
            self.differ(step, what, recorded, found);
        }
    }

    /// A hasher over the whole prompt gives the recorded digests.
    fn check_prompt_hashes(&self, trace: &Value) {
        for r in &self.requests {
            let mut hasher = BlockHasher::new(HashAlgo::Sha256Cbor, &extra_keys(&r.spec));
            let blocks = r.tokens.chunks_exact(self.block_size as usize);
            let found: Vec<Value> = blocks.map(|b| json!(format!("{:?}", hasher.next_key(b)))).collect();
            let short = |h: &Value| json!(h.as_str().unwrap()[32..].to_owned());
            let recorded: Vec<Value> =
                trace["requests"][&r.id]["block_hashes"].as_array().unwrap().iter().map(short).collect();
            self.same(0, &format!("block hashes of {}", r.id), &json!(recorded), &json!(found));
        }
    }

    fn index(&self, id: &str) -> usize {
        self.requests.iter().position(|r| r.id == id).unwrap_or_else(|| panic!("no request {id}"))
    }

    fn id(&self, tag: u64) -> &str {
        &self.requests[tag as usize].id
    }

    fn add(&mut self, id: &str) {
        let at = self.index(id);
        let r = &self.requests[at];
        let loras: BTreeSet<&str> = self.requests.iter().filter_map(|r| r.lora.as_deref()).collect();
        let ids: BTreeSet<&str> = self.requests.iter().map(|r| r.id.as_str()).collect();
        let stops = r.spec["stop_token_ids"].as_array().into_iter().flatten().map(|t| TokenId(number(t)));
        let caching = self.scheduler.params().prefix_caching;
        let mut hasher = BlockHasher::new(HashAlgo::Sha256Cbor, &extra_keys(&r.spec));
        let blocks = r.tokens.chunks_exact(self.block_size as usize);
        let tail = blocks.remainder().to_vec();
        let keys: Vec<BlockKey> = if caching { blocks.map(|b| hasher.next_key(b)).collect() } else { Vec::new() };
        let new = NewSequence {
            tag: at as u64,
            prompt_tokens: r.tokens.len() as u32,
            keys,
            tail: if caching { tail } else { Vec::new() },
            hasher,
            params: SamplingParams {
                max_tokens: number(&r.spec["max_tokens"]),
                stop_token_ids: stops.collect(),
                ..SamplingParams::default()
            },
            priority: r.spec["priority"].as_i64().unwrap() as i32,
            arrival: (r.spec["arrival_time"].as_f64().unwrap() * 1e6) as u64,
            tie: ids.iter().position(|other| *other == r.id).unwrap() as u64,
            lora: r.lora.as_deref().map(|l| loras.iter().position(|other| *other == l).unwrap() as u32),
            remote_tokens: self.remote_tokens,
            source: Some(Box::new(EventSource::new(&self.cache, &r.tokens, &extra_keys(&r.spec), true))),
        };
        self.requests[at].ix = Some(self.scheduler.add(new));
    }

    /// One turn of vLLM's engine loop, as it was recorded.
    fn step(&mut self, expected: &Value) {
        let step = expected["step"].as_u64().unwrap();
        for id in expected["added"].as_array().unwrap() {
            self.add(id.as_str().unwrap());
        }
        let mut appended = None;
        if self.scheduler.has_work() {
            let tokens = self.compare_batch(step, expected);
            self.in_flight.push(step);
            appended = Some(tokens);
            self.compare_queues(step, expected);
        } else {
            self.same(step, "scheduled", &expected["scheduled"], &json!([]));
        }
        let more = |tokens| tokens > 0 || self.scheduler.has_work();
        if self.in_flight.len() < self.inflight_limit && appended.is_some_and(more) {
            return self.same(step, "processed_step", &expected["processed_step"], &Value::Null);
        }
        if self.in_flight.is_empty() {
            return self.differ(step, "processed_step", &expected["processed_step"], "nothing in flight");
        }
        self.complete(step, expected);
    }

    fn compare_batch(&mut self, step: u64, expected: &Value) -> u64 {
        let batch = self.scheduler.schedule();
        let (described, total) = (describe_batch(batch), batch.total_tokens());
        let (mut scheduled, mut new, mut cached) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for d in &described.entries {
            let blocks = self.scheduler.blocks(d.ix);
            let id = self.id(d.tag).to_owned();
            scheduled.push(json!([id, d.tokens]));
            match d.origin {
                Origin::New | Origin::Resumed => {
                    new.insert(id, json!({"num_computed": d.computed, "block_ids": blocks}));
                }
                Origin::Running => {
                    let added = &blocks[d.owned as usize..];
                    cached.insert(id, json!({"num_computed": d.computed, "new_block_ids": added, "resumed": false}));
                }
            }
        }
        self.same(step, "scheduled", &expected["scheduled"], &json!(scheduled));
        self.same(step, "new", &expected["new"], &json!(new));
        self.same(step, "cached", &expected["cached"], &json!(cached));
        self.same(step, "preempted", &expected["preempted"], &self.sorted_ids(&described.preempted));
        self.same(step, "finished_since_last", &expected["finished_since_last"], &self.sorted_ids(&described.finished));
        total
    }

    fn compare_queues(&self, step: u64, expected: &Value) {
        let s = &self.scheduler;
        let ids = |ixs: Vec<SeqIx>| json!(ixs.into_iter().map(|ix| self.id(s.tag(ix))).collect::<Vec<_>>());
        self.same(step, "running", &expected["running"], &ids(s.running().to_vec()));
        self.same(step, "waiting", &expected["waiting"], &ids(s.waiting().collect()));
        self.same(step, "kv_holding_waiting", &expected["kv_holding_waiting"], &ids(s.holding().collect()));
        self.same(step, "deferred", &expected["deferred"], &self.sorted_ids(&s.deferred().collect::<Vec<_>>()));
        self.same(step, "free_blocks", &expected["free_blocks"], &json!(s.kv().pool().free_blocks()));
        self.close(step, "usage", &expected["usage"], s.kv().pool().usage());
    }

    fn complete(&mut self, step: u64, expected: &Value) {
        let processed = self.in_flight.remove(0);
        self.same(step, "processed_step", &expected["processed_step"], &json!(processed));
        for id in expected["aborts"].as_array().into_iter().flatten() {
            let at = self.index(id.as_str().unwrap());
            let ix = self.requests[at].ix.expect("aborted after it was added");
            self.scheduler.abort(ix, at as u64);
        }
        let token = TokenId(1000 + processed as u32);
        let (_, outputs) = self.scheduler.complete(|_, _| token).expect("a batch is in flight");
        let outputs: Vec<TokenOut> = outputs.to_vec();
        for out in &outputs {
            self.requests[out.tag as usize].tokens.push(out.token);
        }
        let tell = |o: &TokenOut| {
            (self.id(o.tag), json!({"new_token_ids": [o.token.0], "finish": o.finish.map(|f| f.as_str())}))
        };
        let found: Vec<(&str, Value)> = outputs.iter().map(tell).collect();
        self.same(step, "outputs", &expected["outputs"], &json!(found));
        for id in expected["finished_recving"].as_array().into_iter().flatten() {
            let at = self.index(id.as_str().unwrap());
            let ix = self.requests[at].ix.expect("loaded after it was added");
            self.scheduler.load_arrived(ix, at as u64);
        }
        self.compare_events(step, expected);
        self.compare_stats(step, &expected["stats"]);
    }

    /// The published bytes, read by another decoder, say what vLLM's events say.
    fn compare_events(&mut self, step: u64, expected: &Value) {
        let mut events = Vec::new();
        self.scheduler.drain_kv_events(&mut events);
        let recorded = expected["kv_events"].as_array().map_or(&[][..], Vec::as_slice);
        let [int, whole] = &mut self.logs;
        let mut found = published(int, &events, true);
        let whole = published(whole, &events, false);
        for (event, whole) in found.iter().zip(&whole) {
            self.same(step, "hashes of kv_events", &hashes(event), &last_eight_bytes(&hashes(whole)));
        }
        self.compare_digests(step, &events, &whole);
        for (event, recorded) in found.iter_mut().zip(recorded) {
            forget_unrecorded(event, recorded);
        }
        self.same(step, "kv_events", &json!(recorded), &json!(found));
    }

    /// Blocks of prompts are published with the recorded digests.
    fn compare_digests(&self, step: u64, events: &[KvEvent], published: &[Value]) {
        for (event, published) in events.iter().zip(published) {
            let KvEvent::Stored { tag, first_block, .. } = event else { continue };
            let recorded = self.requests[*tag as usize].spec["block_hashes"].as_array().unwrap();
            let recorded = recorded.iter().skip(*first_block as usize);
            for (recorded, published) in recorded.zip(hashes(published).as_array().unwrap()) {
                self.same(step, "digests of kv_events", recorded, published);
            }
        }
    }

    fn compare_stats(&mut self, step: u64, expected: &Value) {
        let prefix = self.scheduler.take_prefix_stats();
        let s = &self.scheduler;
        let (waiting, deferred) = s.num_waiting();
        self.close(step, "stats.usage", &expected["usage"], s.kv().pool().usage());
        let found = json!({
            "running": s.running().len(), "waiting": waiting, "deferred": deferred, "usage": expected["usage"],
            "prefix_queries": prefix.queries, "prefix_hits": prefix.hits,
            "prefix_preempted_queries": prefix.preempted_queries, "prefix_preempted_hits": prefix.preempted_hits,
        });
        self.same(step, "stats", expected, &found);
    }

    fn sorted_ids(&self, tags: &[u64]) -> Value {
        let mut ids: Vec<&str> = tags.iter().map(|&t| self.id(t)).collect();
        ids.sort_unstable();
        json!(ids)
    }
}

/// What is needed of a batch after the borrow of the scheduler ends.
struct Described {
    entries: Vec<DescribedEntry>,
    preempted: Vec<u64>,
    finished: Vec<u64>,
}

struct DescribedEntry {
    ix: SeqIx,
    tag: u64,
    tokens: u32,
    computed: u32,
    owned: u32,
    origin: Origin,
}

fn describe_batch(batch: &Batch) -> Described {
    let entry = |e: &engine_sim::core::scheduler::Entry| DescribedEntry {
        ix: e.ix,
        tag: e.tag,
        tokens: e.tokens,
        computed: e.computed,
        owned: e.owned_blocks,
        origin: e.origin,
    };
    Described {
        entries: batch.entries.iter().map(entry).collect(),
        preempted: batch.preempted.iter().map(|&(_, tag)| tag).collect(),
        finished: batch.finished.clone(),
    }
}

fn extra_keys(spec: &Value) -> ExtraKeys {
    let text = |key: &str| spec[key].as_str().map(str::to_owned);
    ExtraKeys {
        lora: text("lora").map(|name| (name, text("lora_path").unwrap_or_default())),
        cache_salt: text("cache_salt"),
    }
}

fn event_log(cache: &CacheConfig, use_int_block_hashes: bool) -> EventLog {
    let config = KvEventsConfig { enable_kv_cache_events: true, use_int_block_hashes, ..KvEventsConfig::default() };
    EventLog::new(&config, cache.block_size).unwrap()
}

/// The events of a step as a subscriber reads them.
fn published(log: &mut EventLog, events: &[KvEvent], int_hashes: bool) -> Vec<Value> {
    log.collect(Time::ZERO, |out| out.extend_from_slice(events));
    let Some(batch) = log.take() else { return Vec::new() };
    let form = Form { format: EventFormat::Map, int_hashes };
    let bytes = wire::payload(0.0, &batch.events, form);
    let decoded = rmpv::decode::read_value(&mut bytes.as_slice()).unwrap();
    plain(&decoded)[1].as_array().unwrap().clone()
}

/// MessagePack as JSON, bytes in hexadecimal digits.
fn plain(value: &rmpv::Value) -> Value {
    match value {
        rmpv::Value::Map(fields) => fields
            .iter()
            .map(|(k, v)| (k.as_str().unwrap().to_owned(), plain(v)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        rmpv::Value::Array(items) => items.iter().map(plain).collect(),
        rmpv::Value::Binary(bytes) => json!(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>()),
        rmpv::Value::String(text) => json!(text.as_str()),
        rmpv::Value::Integer(n) => json!(n.as_u64()),
        rmpv::Value::F64(x) => json!(x),
        rmpv::Value::Boolean(b) => json!(b),
        rmpv::Value::Nil => Value::Null,
        other => panic!("{other} has no place in an event"),
    }
}

fn hashes(event: &Value) -> Value {
    event["block_hashes"].clone()
}

fn last_eight_bytes(digests: &Value) -> Value {
    let last = |d: &Value| u64::from_str_radix(&d.as_str().unwrap()[48..], 16).unwrap();
    digests.as_array().unwrap().iter().map(last).collect()
}

/// Takes out what the recording leaves out. `lora_id` and the kind of cache are in none; tokens and extra keys are in some.
fn forget_unrecorded(event: &mut Value, recorded: &Value) {
    let stored = event["type"] == "BlockStored";
    let fields = event.as_object_mut().unwrap();
    if stored {
        assert_eq!(fields.remove("kv_cache_spec_kind"), Some(json!("full_attention")));
        assert!(fields.remove("lora_id").is_some());
    }
    fields.retain(|name, _| recorded.get(name).is_some() || !["token_ids", "extra_keys"].contains(&name.as_str()));
}
