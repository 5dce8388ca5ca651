use proptest::prelude::*;
use shared::time::Dur;
use shared::tokens::TokenId;
use shared::units::HumanDur;

use super::*;

const BLOCK: u32 = 2;
const A: EndpointId = EndpointId(0);
const B: EndpointId = EndpointId(1);

fn config() -> PreciseConfig {
    PreciseConfig { block_tokens: BLOCK, speculative: true, ..PreciseConfig::default() }
}

fn index() -> KvIndex {
    KvIndex::new(&config(), 2)
}

/// The prompt 0, 1, 2, ... of so many blocks, as a request hashes it.
fn keys(blocks: u32) -> Vec<u64> {
    hashed("m", None, 0..BLOCK * blocks)
}

fn hashed(model: &str, salt: Option<&str>, tokens: std::ops::Range<u32>) -> Vec<u64> {
    let mut hasher = config().hasher(model, salt);
    hasher.tokens(tokens.map(TokenId));
    hasher.finish()
}

/// Blocks of that prompt. The engine calls the n-th one 100 + n.
fn stored(blocks: std::ops::Range<u32>) -> Stored {
    let name = |n: u32| EngineHash(100 + u64::from(n));
    Stored {
        parent: blocks.start.checked_sub(1).map(name),
        tokens: (BLOCK * blocks.start..BLOCK * blocks.end).map(TokenId).collect(),
        blocks: blocks.map(name).collect(),
        block_tokens: BLOCK,
        ..Stored::default()
    }
}

fn removed(block: u64, tier: Tier) -> CacheEvent {
    CacheEvent::Removed { blocks: vec![EngineHash(block)], tier }
}

fn batch(seq: u64, events: Vec<CacheEvent>) -> Batch {
    Batch { seq, made: 10 * seq, events }
}

fn take(index: &mut KvIndex, endpoint: EndpointId, events: Vec<CacheEvent>) {
    let next = index.next_batch(endpoint);
    assert_eq!(index.apply(endpoint, "m", &batch(next, events)), Applied::Taken);
}

fn found(index: &mut KvIndex, now: u64, keys: &[u64]) -> Vec<(u32, f64)> {
    let mut matched = Vec::new();
    index.walk(Time::ZERO + Dur::from_millis(now), keys);
    index.score(&mut matched);
    matched.iter().map(|m| (m.blocks, m.score)).collect()
}

#[test]
fn the_longest_leading_match_of_each_endpoint_counts() {
    let mut index = index();
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..3))]);
    take(&mut index, B, vec![CacheEvent::Stored(stored(0..1)), CacheEvent::Stored(stored(1..2))]);
    assert_eq!(found(&mut index, 0, &keys(5)), [(3, 3.0), (2, 2.0)]);
    assert_eq!(found(&mut index, 0, &keys(1)), [(1, 1.0), (1, 1.0)]);
    assert_eq!(found(&mut index, 0, &hashed("m", None, 1..9)), [(0, 0.0); 2]);
    take(&mut index, A, vec![removed(101, Tier::Gpu)]);
    assert_eq!(found(&mut index, 0, &keys(5)), [(1, 1.0), (2, 2.0)], "what follows a hole does not count");
    take(&mut index, B, vec![CacheEvent::Cleared]);
    assert_eq!(found(&mut index, 0, &keys(5)), [(1, 1.0), (0, 0.0)]);
}

#[test]
fn blocks_weigh_by_their_best_tier() {
    let mut index = index();
    let cpu = Stored { tier: Tier::Cpu, ..stored(0..2) };
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..1)), CacheEvent::Stored(cpu)]);
    assert_eq!(found(&mut index, 0, &keys(3))[0], (2, 1.8));
    take(&mut index, A, vec![removed(100, Tier::Gpu)]);
    assert_eq!(found(&mut index, 0, &keys(3))[0], (2, 1.6));
    take(&mut index, A, vec![removed(100, Tier::Cpu)]);
    assert_eq!(found(&mut index, 0, &keys(3))[0], (0, 0.0));
}

#[test]
fn a_block_stored_twice_is_gone_when_both_copies_are() {
    let mut index = index();
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..1)), CacheEvent::Stored(stored(0..1))]);
    take(&mut index, A, vec![removed(100, Tier::Gpu)]);
    assert_eq!(found(&mut index, 0, &keys(1))[0].0, 1);
    take(&mut index, A, vec![removed(100, Tier::Gpu), removed(100, Tier::Gpu)]);
    assert_eq!((found(&mut index, 0, &keys(1))[0].0, index.blocks()), (0, 0));
}

#[test]
fn models_adapters_and_salts_have_blocks_of_their_own() {
    let mut index = index();
    let adapted = Stored { adapter: Some("lora".into()), blocks: vec![EngineHash(1)], ..stored(0..1) };
    let salted = Stored { salt: Some("s".into()), blocks: vec![EngineHash(2)], ..stored(0..1) };
    take(&mut index, A, vec![CacheEvent::Stored(adapted), CacheEvent::Stored(salted)]);
    let mut check = |model, salt, expect| {
        assert_eq!(found(&mut index, 0, &hashed(model, salt, 0..BLOCK))[0].0, expect, "{model} {salt:?}");
    };
    check("lora", None, 1);
    check("m", Some("s"), 1);
    check("m", None, 0);
    check("m", Some("t"), 0);
}

#[test]
fn what_cannot_be_named_is_counted_and_left_out() {
    let mut index = index();
    let others = [
        Stored { block_tokens: 16, ..stored(0..1) },
        Stored { opaque: true, ..stored(0..1) },
        Stored { tokens: vec![TokenId(0)], ..stored(0..1) },
        stored(1..3),
    ];
    take(&mut index, A, others.into_iter().map(CacheEvent::Stored).collect());
    assert_eq!(index.skipped(), Skipped { orphans: 2, foreign: 3, refused: 0 });
    assert_eq!(index.blocks(), 0);
}

#[test]
fn a_gap_is_filled_or_what_was_known_is_forgotten() {
    let mut index = index();
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..2))]);
    let late = batch(3, vec![CacheEvent::Stored(stored(2..3))]);
    assert_eq!(index.apply(A, "m", &late), Applied::Gap { from: 1 });
    assert_eq!(found(&mut index, 0, &keys(3))[0].0, 2, "nothing was done");
    take(&mut index, A, vec![removed(101, Tier::Gpu)]);
    take(&mut index, A, vec![CacheEvent::Stored(stored(1..2))]);
    assert_eq!(index.apply(A, "m", &batch(1, Vec::new())), Applied::Known);
    assert_eq!(index.apply(A, "m", &late), Applied::Taken);
    assert_eq!(found(&mut index, 0, &keys(3))[0].0, 3);

    assert_eq!(index.apply(A, "m", &batch(9, Vec::new())), Applied::Gap { from: 4 });
    index.resume(A, "m", &batch(9, vec![CacheEvent::Stored(stored(0..1))]));
    assert_eq!((found(&mut index, 0, &keys(3))[0].0, index.next_batch(A)), (1, 10));
}

#[test]
fn an_engine_that_counts_anew_has_lost_its_cache() {
    let mut index = index();
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..2))]);
    take(&mut index, A, Vec::new());
    let newer = Batch { seq: 0, made: 1000, events: vec![CacheEvent::Stored(stored(0..1))] };
    assert_eq!(index.apply(A, "m", &newer), Applied::Taken);
    assert_eq!((found(&mut index, 0, &keys(2))[0].0, index.next_batch(A)), (1, 1));
    let later = Batch { seq: 5, made: 2000, events: Vec::new() };
    assert_eq!(index.apply(A, "m", &later), Applied::Gap { from: 1 });
}

#[test]
fn what_is_expected_counts_for_a_while() {
    let mut index = index();
    index.expect(Time::ZERO, B, &keys(2));
    assert_eq!(found(&mut index, 1999, &keys(3)), [(0, 0.0), (2, 2.0)]);
    take(&mut index, B, vec![CacheEvent::Stored(stored(0..1))]);
    assert_eq!(found(&mut index, 2000, &keys(3))[1].0, 1, "an event has confirmed the first block");
    assert_eq!((index.expected(), index.blocks()), (0, 1));

    index.expect(Time::ZERO + Dur::from_millis(3000), B, &keys(2));
    index.expect(Time::ZERO + Dur::from_millis(4000), B, &keys(2));
    assert_eq!(found(&mut index, 5500, &keys(2))[1].0, 2, "the later request counts on");
    assert_eq!(found(&mut index, 6000, &keys(2))[1].0, 1);
}

#[test]
fn nothing_is_expected_unless_asked_for() {
    let mut index = KvIndex::new(&PreciseConfig { speculative: false, ..config() }, 2);
    index.expect(Time::ZERO, B, &keys(2));
    assert_eq!(found(&mut index, 0, &keys(2))[1].0, 0);
}

#[test]
fn the_index_is_bounded_in_blocks_and_endpoints() {
    let bounded = PreciseConfig { max_blocks: 3, max_endpoints_per_block: 1, ..config() };
    let mut index = KvIndex::new(&bounded, 2);
    take(&mut index, A, vec![CacheEvent::Stored(stored(0..5))]);
    assert_eq!((index.blocks(), index.skipped().refused), (3, 2));
    take(&mut index, B, vec![CacheEvent::Stored(stored(0..1))]);
    assert_eq!(found(&mut index, 0, &keys(1)), [(0, 0.0), (1, 1.0)], "the newest holder takes the oldest one's place");
    index.clear(B);
    index.add_endpoint();
    assert_eq!(found(&mut index, 0, &keys(1)).len(), 3);
}

#[test]
fn a_topic_of_llm_d_names_the_model() {
    let check = |topic: &str, expect: Option<&str>| assert_eq!(model_of_topic(topic).as_deref(), expect, "{topic}");
    check("kv@10.0.0.1:8000@Qwen/Qwen3-32B", Some("Qwen/Qwen3-32B"));
    check("kv@pod@a@b", Some("a@b"));
    check("kv@pod", None);
    check("", None);
}

/// A step of the property test: an endpoint and what its engine does with the n-th block of the prompt.
#[derive(Clone, Debug)]
enum Step {
    Store(u32, u32),
    Drop(u32, u32),
    Clear(u32),
    Expect(u32, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let pair = || (0u32..3, 0u32..5);
    prop_oneof![
        pair().prop_map(|(e, n)| Step::Store(e, n)),
        pair().prop_map(|(e, n)| Step::Drop(e, n)),
        (0u32..3).prop_map(Step::Clear),
        pair().prop_map(|(e, n)| Step::Expect(e, n)),
    ]
}

proptest! {
    /// The index finds what an engine holds, block by block, and nothing is left when every engine is empty.
    #[test]
    fn agrees_with_a_naive_index(steps in proptest::collection::vec(step(), 0..60)) {
        let long = PreciseConfig { speculative_ttl: HumanDur::secs(3600), ..config() };
        let mut index = KvIndex::new(&long, 3);
        let mut engines = [[0u32; 5]; 3];
        let mut expected = [[false; 5]; 3];
        for step in steps {
            match step {
                // An engine stores a block only where it has the one before.
                Step::Store(e, n) if n == 0 || engines[e as usize][n as usize - 1] > 0 => {
                    engines[e as usize][n as usize] += 1;
                    take(&mut index, EndpointId(e), vec![CacheEvent::Stored(stored(n..n + 1))]);
                }
                Step::Store(..) => {}
                Step::Drop(e, n) => {
                    let copies = &mut engines[e as usize][n as usize];
                    *copies = copies.saturating_sub(1);
                    take(&mut index, EndpointId(e), vec![removed(100 + u64::from(n), Tier::Gpu)]);
                }
                Step::Clear(e) => {
                    // What is expected goes with what is held, block by block.
                    for n in 0..5 {
                        if engines[e as usize][n] > 0 {
                            expected[e as usize][n] = false;
                        }
                    }
                    engines[e as usize] = [0; 5];
                    take(&mut index, EndpointId(e), vec![CacheEvent::Cleared]);
                }
                Step::Expect(e, n) => {
                    expected[e as usize][..=n as usize].fill(true);
                    index.expect(Time::ZERO, EndpointId(e), &keys(n + 1));
                }
            }
            let holds = |e: usize, n: usize| engines[e][n] > 0 || expected[e][n];
            let expect: Vec<u32> = (0..3).map(|e| (0..5).take_while(|n| holds(e, *n)).count() as u32).collect();
            let all: Vec<u32> = found(&mut index, 0, &keys(5)).iter().map(|m| m.0).collect();
            prop_assert_eq!(all, expect);
        }
        for e in 0..3 {
            take(&mut index, EndpointId(e), vec![CacheEvent::Cleared]);
        }
        index.walk(Time::MAX, &[]);
        prop_assert_eq!((index.blocks(), index.expected()), (0, 0));
    }
}
