//! Counts allocations, in builds made for it only (`--features count-allocations`): counting costs time of its own.

#[cfg(feature = "count-allocations")]
#[global_allocator]
static COUNTING: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

/// Allocations of this process so far, growing ones included; nothing where the build does not count.
pub fn so_far() -> Option<u64> {
    #[cfg(feature = "count-allocations")]
    {
        let stats = COUNTING.stats();
        Some((stats.allocations + stats.reallocations) as u64)
    }
    #[cfg(not(feature = "count-allocations"))]
    None
}
