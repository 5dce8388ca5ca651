//! What the connector counts, with vLLM's names (`nixl/stats.py`) and semantics: transfers are observed per rank, where they arrive.

use shared::time::Dur;

use super::Transfer;
use crate::core::metrics::{Histogram, Unit};

/// Counters and histograms of the connector. A field is vLLM's metric name without the `vllm:` prefix.
#[derive(Clone, Debug)]
pub struct KvMetrics {
    /// Length of a transfer, per rank.
    pub nixl_xfer_time_seconds: Histogram,
    /// Posting its descriptors.
    pub nixl_post_time_seconds: Histogram,
    /// Bytes of a transfer.
    pub nixl_bytes_transferred: Histogram,
    /// Descriptors of a transfer.
    pub nixl_num_descriptors: Histogram,
    /// Transfers that failed.
    pub nixl_num_failed_transfers: u64,
    /// Notifications that did not reach their engine.
    pub nixl_num_failed_notifications: u64,
    /// Leases that ended before the blocks were read.
    pub nixl_num_kv_expired_reqs: u64,
    /// Notifications about blocks that were not kept any more.
    pub nixl_num_notifications_after_expiry: u64,
    /// Tokens asked of other engines, beyond the local hits, at first admissions.
    pub external_prefix_cache_queries: u64,
    /// Of these, loaded.
    pub external_prefix_cache_hits: u64,
}

const TIMES: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0];
const DESCRIPTORS: [u64; 14] = [10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000];

fn times(seconds: &[f64]) -> Histogram {
    Histogram::new(Unit::Time, seconds.iter().map(|&s| Dur::from_secs_f64(s).as_nanos()).collect())
}

impl Default for KvMetrics {
    fn default() -> KvMetrics {
        let post: Vec<f64> = std::iter::once(0.001).chain(TIMES).collect();
        KvMetrics {
            nixl_xfer_time_seconds: times(&TIMES),
            nixl_post_time_seconds: times(&post),
            // 2 KiB times the powers of 4, up to 8 GiB.
            nixl_bytes_transferred: Histogram::new(Unit::Count, (0..12).map(|i| 1 << (11 + 2 * i)).collect()),
            nixl_num_descriptors: Histogram::new(Unit::Count, DESCRIPTORS.to_vec()),
            nixl_num_failed_transfers: 0,
            nixl_num_failed_notifications: 0,
            nixl_num_kv_expired_reqs: 0,
            nixl_num_notifications_after_expiry: 0,
            external_prefix_cache_queries: 0,
            external_prefix_cache_hits: 0,
        }
    }
}

impl KvMetrics {
    /// All histograms with vLLM's names.
    pub fn histograms(&self) -> [(&'static str, &Histogram); 4] {
        [
            ("nixl_xfer_time_seconds", &self.nixl_xfer_time_seconds),
            ("nixl_post_time_seconds", &self.nixl_post_time_seconds),
            ("nixl_bytes_transferred", &self.nixl_bytes_transferred),
            ("nixl_num_descriptors", &self.nixl_num_descriptors),
        ]
    }

    /// Counters of the connector itself with vLLM's names.
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("nixl_num_failed_transfers_total", self.nixl_num_failed_transfers),
            ("nixl_num_failed_notifications_total", self.nixl_num_failed_notifications),
            ("nixl_num_kv_expired_reqs_total", self.nixl_num_kv_expired_reqs),
            ("nixl_num_notifications_after_expiry_total", self.nixl_num_notifications_after_expiry),
        ]
    }

    pub(super) fn observe(&mut self, transfer: &Transfer) {
        for _ in 0..transfer.ranks {
            self.nixl_xfer_time_seconds.observe_time(transfer.time);
            self.nixl_post_time_seconds.observe_time(transfer.post);
            self.nixl_bytes_transferred.observe(transfer.rank_bytes);
            self.nixl_num_descriptors.observe(transfer.rank_descriptors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_vllms() {
        let m = KvMetrics::default();
        let bytes = &m.nixl_bytes_transferred.bounds;
        assert_eq!((bytes.len(), bytes[0], bytes[1], bytes[11]), (12, 2048, 8192, 8 << 30));
        assert_eq!(m.nixl_post_time_seconds.bounds.len(), 13);
        assert_eq!(m.nixl_num_descriptors.bounds.len(), 14);
    }

    #[test]
    fn a_transfer_counts_once_per_rank() {
        let mut m = KvMetrics::default();
        m.observe(&Transfer { ranks: 8, rank_bytes: 4096, ..Transfer::default() });
        assert_eq!(m.nixl_bytes_transferred.counts[..2], [0, 8]);
        assert_eq!(m.nixl_xfer_time_seconds.count(), 8);
    }
}
