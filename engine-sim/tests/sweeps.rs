//! The latency model against published concurrency sweeps of a real vLLM: how far off it is, printed and bounded.
//!
//! Needs `IGSIM_DATA`, the folder with `engine/vllm_concurrency_sweeps_dev.csv`; without it the test says so and passes. The sweeps are
//! closed loops of `10 N` requests at concurrency N with lengths drawn in 0.8..1.0 of nominal, prefix caching off and at most N
//! requests in a batch. Overheads of this profile were set by hand with these rows in view: this is a check of the
//! whole, not a validation on unseen data.

use std::collections::BTreeMap;

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Input, NewRequest, Output, RequestKey, RequestStats, prepare_prompt};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::SamplingParams;
use shared::block_hash::ExtraKeys;
use shared::rng::Seed;
use shared::time::Time;
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;

struct Row {
    isl: u32,
    osl: u32,
    concurrency: u32,
    ttft_ms: f64,
    tpot_ms: f64,
}

fn rows(text: &str, model: &str, system: &str, tp: &str) -> Vec<Row> {
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    let column = |name: &str| header.iter().position(|h| *h == name).unwrap();
    let columns = ["model_path", "system", "tp_size", "isl", "osl", "concurrency", "ttft_ms", "tpot_ms"].map(column);
    let cells = lines.map(|l| l.split(',').collect::<Vec<_>>());
    let matching = cells.filter(|c| c[columns[0]] == model && c[columns[1]] == system && c[columns[2]] == tp);
    let number = |c: &[&str], i: usize| c[columns[i]].parse::<f64>().unwrap();
    let row = |c: Vec<&str>| Row {
        isl: number(&c, 3) as u32,
        osl: number(&c, 4) as u32,
        concurrency: number(&c, 5) as u32,
        ttft_ms: number(&c, 6),
        tpot_ms: number(&c, 7),
    };
    matching.map(row).collect()
}

/// Mean time to first token and mean time per further token, in milliseconds.
fn simulate(profile: LatencyProfile, row: &Row) -> (f64, f64) {
    let mut config = EngineConfig { profile: profile.name.into(), ..EngineConfig::default() };
    config.scheduler.max_num_seqs = row.concurrency;
    config.cache.enable_prefix_caching = false;
    let mut engine = Engine::new(config.clone(), profile);
    let mut lengths = Seed(1).stream("lengths");
    let mut request = |key: u64, arrival| {
        let mut draw = |nominal: u32| (f64::from(nominal) * (0.8 + 0.2 * lengths.unit())) as u32;
        let (prompt, max_tokens) = (vec![TokenId(1); draw(row.isl) as usize], draw(row.osl));
        NewRequest {
            key: RequestKey(key),
            prompt: prepare_prompt(&config.cache, &prompt, &ExtraKeys::default()),
            params: SamplingParams { max_tokens, ..SamplingParams::default() },
            priority: 0,
            arrival,
            content: ContentId(key),
            lora: None,
            kv: None,
            trail: Trail::off(),
        }
    };
    let (all, mut sent) = (10 * u64::from(row.concurrency), u64::from(row.concurrency));
    (0..sent).for_each(|key| engine.handle(Time::ZERO, Input::Add(Box::new(request(key, Time::ZERO)))));
    let (mut out, mut ended): (Vec<Output>, BTreeMap<u64, Box<RequestStats>>) = Default::default();
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
        for o in out.drain(..) {
            if let Output::Finished { key, stats, .. } = o {
                ended.insert(key.0, stats);
                if sent < all {
                    engine.handle(at, Input::Add(Box::new(request(sent, at))));
                    sent += 1;
                }
            }
        }
    }
    let mean = |f: &dyn Fn(&RequestStats) -> f64| ended.values().map(|s| f(s)).sum::<f64>() / ended.len() as f64;
    let ttft = mean(&|s| (s.first_token.unwrap() - s.queued).as_millis_f64());
    let decode =
        mean(&|s| (s.last_token.unwrap() - s.first_token.unwrap()).as_millis_f64() / f64::from(s.output_tokens - 1));
    (ttft, decode)
}

#[test]
fn qwen3_32b_is_near_its_sweeps() {
    let Some(data) = std::env::var_os("IGSIM_DATA") else {
        println!("skipped: IGSIM_DATA is not set");
        return;
    };
    let path = std::path::Path::new(&data).join("engine/vllm_concurrency_sweeps_dev.csv");
    let text = std::fs::read_to_string(path).unwrap();
    let profile = LatencyProfile::named("qwen3-32b-h100-tp2").unwrap();
    let (mut ratios, mut ttfts) = (Vec::new(), Vec::new());
    println!("{:>5} {:>5} {:>4} {:>18} {:>18}", "in", "out", "N", "TTFT ms real/sim", "TPOT ms real/sim");
    for row in rows(&text, "Qwen/Qwen3-32B", "h100_sxm", "2.0") {
        let (ttft, tpot) = simulate(profile, &row);
        println!(
            "{:>5} {:>5} {:>4} {:>9.0} {:>8.0} {:>9.1} {:>8.1}",
            row.isl, row.osl, row.concurrency, row.ttft_ms, ttft, row.tpot_ms, tpot
        );
        ratios.push((tpot / row.tpot_ms).ln().abs());
        ttfts.push((ttft / row.ttft_ms).ln().abs());
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    println!("mean absolute log error: TPOT {:.3}, TTFT {:.3}", mean(&ratios), mean(&ttfts));
    assert!(mean(&ratios) < 0.08, "time per token: {:.3}", mean(&ratios));
}
