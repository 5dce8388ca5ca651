//! Allocations of the telemetry path's stages: they repeat exactly, so that what a request may make is asserted and not measured.
//! One test, alone in its process: the count is the process's.

use benches::stages::STAGES;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

#[test]
fn a_request_allocates_no_more_than_it_must() {
    let so_far = || {
        let stats = COUNTING.stats();
        stats.allocations + stats.reallocations
    };
    let check = |name: &str, most: f64| {
        let stage = STAGES.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no stage is called {name}"));
        let found = stage.allocations(so_far);
        assert!(found <= most, "{name}: {found} allocations, at most {most}");
    };
    // Recording sites of a request that nobody records.
    check("sites/unsampled", 0.0);
    // Context handling: the header that is sent.
    check("context/format", 1.0);
    check("hop/unsampled", 1.0);
    check("hop/sampled", 1.0);
    check("record/gateway", 3.0);
    check("record/engine", 3.0);
}
