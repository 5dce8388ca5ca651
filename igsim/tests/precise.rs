//! Precise prefix routing: the engines' KV events reach the index, live and in virtual time, in the gateway and in a service of its
//! own, and requests go where their prefix is.

mod common;

use common::{Place, by_trace, findings, rows, scenario};
use igsim::ladder::{Climb, Ladder};
use shared::trace::{Kind, Span, Value};

/// Conversations to three engines, routed by nothing but what these say they hold.
const ALONE: &str = "\
name: alone
requests: 40
gateway:
  precise_prefix: { speculative: true }
  profile:
    filters: [{ type: healthy-filter }]
    scorers: [{ type: precise-prefix-cache-scorer }]
    picker: { type: max-score-picker }
engines:
  - count: 3
    profile: llama-3.1-8b-h100
    kv_events_config:
      { enable_kv_cache_events: true, endpoint: 'tcp://*:0', replay_endpoint: 'tcp://*:0', topic: 'kv@{pod}@{model}' }
workload:
  arrivals: { process: closed, concurrency: 4 }
  sessions: { turns: 4, turn_tokens: 64, think_time: 50ms }
  prompt_tokens: 200
  output_tokens: 40
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
tracing: { ratio: 1.0, kv_events: 1.0, exporters: [file] }
";

fn named<'s>(spans: &[&'s Span], name: &str) -> Vec<&'s Span> {
    spans.iter().copied().filter(|s| s.name == name).collect()
}

fn int(span: &Span, key: &str) -> i64 {
    match span.get(key) {
        Some(Value::Int(n)) => *n,
        other => panic!("{} has {key}: {other:?}", span.name),
    }
}

/// Runs [`ALONE`] and checks what every request was told. Later turns begin with what the engine of the turn before has cached.
fn conversations(mode: &str, more: &[&str], service: bool) {
    let place = Place::new();
    place.write("alone.yaml", ALONE);
    place.good(&[["run", "alone.yaml", "--mode", mode, "--out", "out"].as_slice(), more].concat());
    let set = place.traces("out");
    assert_eq!(findings(&set), [], "{mode}");
    let traces = by_trace(&set);
    let (mut requests, mut batches) = (0, 0);
    for spans in traces.values() {
        let events = named(spans, "kvcache.events.process");
        if !events.is_empty() {
            assert_eq!(spans.len(), 1, "a trace of its own");
            batches += 1;
            continue;
        }
        requests += 1;
        let director = named(spans, "gateway.director.handle_request")[0];
        let [scores] = named(spans, "kvcache.manager.get_scores")[..] else { panic!("{mode}: one lookup") };
        let lookups = named(spans, "gateway.kvcache.lookup");
        if service {
            let [lookup] = lookups[..] else { panic!("{mode}: one question") };
            assert_eq!((lookup.kind, scores.kind), (Kind::Client, Kind::Server));
            assert_eq!((lookup.parent, scores.parent), (Some(director.span_id), Some(lookup.span_id)));
            assert_ne!(scores.instance, director.instance, "it is another service");
        } else {
            assert_eq!((lookups.len(), scores.kind, scores.parent), (0, Kind::Internal, Some(director.span_id)));
        }
        for name in ["kvcache.storage.lookup", "kvcache.scorer.compute"] {
            assert_eq!(named(spans, name)[0].parent, Some(scores.span_id), "{mode}: {name}");
        }
        assert_eq!(int(scores, "llm_d.kv_cache.pod_count"), 3);
        assert!(int(scores, "llm_d.kv_cache.block_keys.count") >= 12);
    }
    assert_eq!(requests, 40, "{mode}");
    assert!(batches > 40, "{mode}: {batches} batches of events");
    // Every turn after the first finds all full blocks of the turn before, and its answer's.
    let rows = rows(&place.path("out"));
    let later: Vec<_> = rows.iter().filter(|r| r["turn"] != "0").collect();
    assert!(later.len() >= 20, "{}", later.len());
    for row in &later {
        let (prompt, cached): (u32, u32) =
            (row["prompt_tokens"].parse().unwrap(), row["cached_tokens"].parse().unwrap());
        assert!(cached + 64 + 2 * 16 >= prompt, "{mode}: {cached} of {prompt} tokens were cached");
    }
}

#[test]
fn conversations_stay_where_their_cache_is_in_virtual_time() {
    conversations("virtual", &[], false);
}

#[test]
fn conversations_stay_where_their_cache_is_live() {
    conversations("live", &[], false);
}

#[test]
fn a_service_of_its_own_says_the_same() {
    conversations("live", &["--set", "listen.kv_cache_manager=127.0.0.1:0"], true);
}

#[test]
fn the_older_form_of_events_is_read_too() {
    conversations("live", &["--set", "engines[0].kv_events_config.event_format=array"], false);
}

#[test]
fn a_virtual_run_repeats_itself_byte_by_byte() {
    let traces = || {
        let place = Place::new();
        place.good(&["run", &scenario("epp/precise-prefix"), "--set", "requests=20", "--out", "out"]);
        std::fs::read_to_string(place.path("out/traces.otlp.jsonl")).unwrap()
    };
    let first = traces();
    assert!(first.contains("kvcache.events.process") && first.contains("kvcache.manager.get_scores"));
    assert_eq!(first, traces());
}

#[test]
fn the_gateway_goes_on_without_a_manager_that_does_not_answer() {
    let place = Place::new();
    place.write("alone.yaml", ALONE);
    let nobody = "gateway.precise_prefix.manager=http://127.0.0.1:9";
    place.good(&["run", "alone.yaml", "--mode", "live", "--set", nobody, "--set", "requests=8", "--out", "out"]);
    let set = place.traces("out");
    assert_eq!(findings(&set), []);
    for spans in by_trace(&set).values() {
        let [lookup] = named(spans, "gateway.kvcache.lookup")[..] else { panic!("one question") };
        assert_eq!(lookup.get("error.type").and_then(Value::as_str), Some("connection_failed"));
        let root = named(spans, "gateway.request")[0];
        assert_eq!(int(root, "http.response.status_code"), 200);
    }
}

/// The ladder of the library, on engines with a tenth of the cache and a tenth of the prompts.
#[test]
fn policies_stand_in_order_beyond_the_knee() {
    let place = Place::new();
    place.write(
        "small.yaml",
        &std::fs::read_to_string(scenario("ladders/qwen3-32b-8xh100"))
            .unwrap()
            .replace("epp_config: ", &format!("epp_config: {}/", common::library().join("ladders").display()))
            .replace("count: 8", "count: 2")
            .replace(
                "kv_events_config:",
                "max_model_len: 4096\n    cache: { num_gpu_blocks: 1921 }\n    kv_events_config:",
            )
            .replace("groups: 150, tokens: 6000, prompts: 5", "groups: 20, tokens: 1600, prompts: 2")
            .replace("prompt_tokens: 1200", "prompt_tokens: 320")
            .replace("output_tokens: 1000", "output_tokens: 40"),
    );
    let ladder = std::fs::read_to_string(scenario("ladders/qwen3-32b-8xh100.ladder")).unwrap();
    place.write(
        "small.ladder.yaml",
        &ladder
            .replace("qwen3-32b-8xh100.yaml", "small.yaml")
            .replace("epp_config: ", &format!("epp_config: {}/", common::library().join("ladders").display())),
    );
    let set = [("warm_up", "{rate: 10, duration: 8s, pause: 1m}"), ("rungs", "[{rate: 60, duration: 3s}]")];
    let set: Vec<(String, String)> = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let ladder = Ladder::load(&place.path("small.ladder.yaml"), &set).unwrap_or_else(|e| panic!("{e}"));
    let climbs = ladder.climb(None, |_, _| ()).unwrap_or_else(|e| panic!("{e}"));
    let rung = |name: &str| {
        let climb: &Climb = climbs.iter().find(|c| c.policy == name).unwrap();
        climb.rungs[0].clone()
    };
    let (precise, round_robin) = (rung("precise"), rung("round-robin"));
    assert!(climbs.iter().all(|c| c.rungs[0].errors == 0 && c.rungs[0].requests > 100));
    assert!(precise.cached_share > round_robin.cached_share + 0.1, "{precise:?} {round_robin:?}");
    assert!(precise.ttft_mean_s < round_robin.ttft_mean_s, "{precise:?} {round_robin:?}");
    assert!(precise.output_tokens_per_s >= round_robin.output_tokens_per_s, "{precise:?} {round_robin:?}");
    let again = ladder.climb(None, |_, _| ()).unwrap();
    assert_eq!(climbs, again, "the same seed, the same figures");
}
