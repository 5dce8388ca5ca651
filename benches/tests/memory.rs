//! Memory of an idle engine: allocations repeat exactly, so the bound is asserted and not measured.
//! One test, alone in its process: the count is the process's.

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::Engine;
use engine_sim::core::latency::LatencyProfile;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// What an idle engine may hold, in bytes.
const MOST: usize = 2 * 1024 * 1024;
const ENGINES: usize = 500;

#[test]
fn an_idle_engine_needs_less_than_two_mebibytes() {
    let held = || {
        let stats = COUNTING.stats();
        stats.bytes_allocated - stats.bytes_deallocated
    };
    for name in LatencyProfile::names() {
        let config = EngineConfig { profile: name.to_owned(), ..EngineConfig::default() };
        let profile = LatencyProfile::named(name).expect("it has this name");
        let before = held();
        let engines: Vec<Engine> = (0..ENGINES).map(|_| Engine::new(config.clone(), profile.clone())).collect();
        let each = (held() - before) / ENGINES;
        println!(
            "{name}: {:.2} MiB an idle engine, {} blocks",
            each as f64 / 1_048_576.0,
            engines[0].snapshot().num_gpu_blocks
        );
        assert!(each < MOST, "{name}: {each} bytes an idle engine");
    }
}
