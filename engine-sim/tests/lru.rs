//! Prefix hit rates of the block pool on the Mooncake conversation trace, against those of a plain LRU cache.
//!
//! Blocks of 512 tokens, as in the trace, one request after the other: blocks found are touched, the rest is handed out, which
//! evicts what was used least recently. Needs `IGSIM_DATA`, the folder with `traces/mooncake_conversation_trace.jsonl`; without it
//! the test says so and passes.

use engine_sim::core::block_pool::{BlockIx, BlockPool};
use shared::block_hash::BlockKey;

/// Tokens of a block.
const BLOCK: u64 = 512;

#[derive(serde::Deserialize)]
struct Line {
    input_length: u64,
    hash_ids: Vec<u64>,
}

fn trace() -> Option<Vec<Line>> {
    let Some(data) = std::env::var_os("IGSIM_DATA") else {
        println!("skipped: IGSIM_DATA is not set");
        return None;
    };
    let path = std::path::Path::new(&data).join("traces/mooncake_conversation_trace.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    Some(text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
}

/// Holds the blocks of a request: those found, then new ones. Returns them and how many were found.
fn admit(pool: &mut BlockPool, line: &Line) -> (Vec<BlockIx>, usize) {
    let mut held: Vec<BlockIx> = line.hash_ids.iter().map_while(|&id| pool.lookup(BlockKey(id.into()))).collect();
    let found = held.len();
    held.iter().for_each(|&block| pool.touch(block));
    for &id in &line.hash_ids[found..] {
        let (block, _) = pool.pop();
        pool.register(block, BlockKey(id.into()));
        held.push(block);
    }
    (held, found)
}

/// Share of prompt tokens found, in percent, with a pool of so many blocks.
fn hit_rate(trace: &[Line], blocks: u32, release: impl Fn(&mut BlockPool, &[BlockIx])) -> f64 {
    // One more for the null block.
    let mut pool = BlockPool::new(blocks + 1);
    let (mut hits, mut all) = (0, 0);
    for line in trace {
        let (held, found) = admit(&mut pool, line);
        hits += (found as u64 * BLOCK).min(line.input_length);
        all += line.input_length;
        release(&mut pool, &held);
    }
    assert_eq!(pool.free_blocks(), blocks, "blocks are conserved");
    100.0 * hits as f64 / all as f64
}

#[test]
fn hit_rates_are_those_of_a_least_recently_used_cache() {
    let Some(trace) = trace() else { return };
    // 0.5, 2.6, 5.1 and 25.6 million tokens, and more blocks than the trace has.
    let sizes = [1_000, 5_000, 10_000, 50_000, 400_000];
    let check = |what: &str, expect: [f64; 5], release: fn(&mut BlockPool, &[BlockIx])| {
        let found = sizes.map(|blocks| hit_rate(&trace, blocks, release));
        println!("{what}: {found:.2?} % of prompt tokens");
        for (found, expect) in found.into_iter().zip(expect) {
            assert!((found - expect).abs() < 0.05, "{what}: {found} instead of {expect}");
        }
    };
    // Every block used when its turn in the prompt comes: the textbook's order.
    check("in the prompt's order", [4.5, 11.3, 21.5, 36.2, 37.4], |pool, held| {
        held.iter().for_each(|&block| pool.release(&[block]));
    });
    // vLLM lets go of a chain from its tail, which so is evicted first: a beginning is worth more than what follows it.
    check("as vLLM releases", [4.5, 11.4, 21.6, 36.2, 37.4], BlockPool::release);
}
