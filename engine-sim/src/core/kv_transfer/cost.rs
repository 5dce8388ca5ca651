//! How long a transfer takes: `setup + descriptors * post + bytes / bandwidth`, for the slowest rank; all ranks move at once.
//!
//! A model, not measured on hardware of our own. Contention between transfers that share a link is not modelled, nor is the NIXL
//! handshake, which happens once per pair of engines.

use shared::time::Dur;

use super::LinkKind;
use crate::core::latency::LatencyProfile;

/// Figures of one rank's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Before the first byte moves.
    pub setup: Dur,
    /// Bytes per second.
    pub bandwidth: u64,
}

/// Posting one descriptor, in nanoseconds: 6.7 ms for 1,785 of them (vLLM issue 50913).
pub const POST_NS: u64 = 3_753;

/// Memory regions per layer: keys and values lie apart in FlashAttention's layout, so each block is two descriptors a layer.
pub const REGIONS_PER_LAYER: u64 = 2;

impl Link {
    /// Bandwidths are those of llm-d-inference-sim's table (NVLink about 600 GB/s, InfiniBand NDR 40, RoCE at 200 Gbit/s 20, 100
    /// Gbit/s Ethernet 10). It gives set-up times of 0.5 to 2 ms for RDMA and 2 to 10 ms for TCP: the geometric means are taken,
    /// and the lower end where both GPUs are in one machine.
    pub const fn of(kind: LinkKind) -> Link {
        let (setup_us, gigabytes) = match kind {
            LinkKind::NvLink => (500, 600),
            LinkKind::InfiniBand => (1_000, 40),
            LinkKind::RoCe => (1_000, 20),
            LinkKind::Tcp => (4_472, 10),
        };
        Link { setup: Dur::from_micros(setup_us), bandwidth: gigabytes * 1_000_000_000 }
    }
}

/// What is moved and how long that takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Blocks, each on all ranks of the receiver.
    pub blocks: u32,
    /// Ranks of the receiver.
    pub ranks: u32,
    /// Bytes that one rank receives.
    pub rank_bytes: u64,
    /// Descriptors that one rank posts.
    pub rank_descriptors: u64,
    /// Posting them.
    pub post: Dur,
    /// From the first descriptor posted to the last byte received, set-up included.
    pub time: Dur,
}

/// What is asked of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shipment {
    /// Blocks of the sender.
    pub blocks: u32,
    /// Tokens in one of them.
    pub block_size: u32,
    /// The receiver's tensor parallelism.
    pub receiver_ranks: u32,
}

impl Transfer {
    /// The time of a shipment from an engine with `profile` over `link`.
    pub fn over(link: LinkKind, profile: &LatencyProfile, shipment: Shipment) -> Transfer {
        let ranks = shipment.receiver_ranks.max(1);
        let blocks = u64::from(shipment.blocks);
        let bytes = blocks * u64::from(shipment.block_size) * profile.kv_bytes_per_token;
        let rank_bytes = bytes.div_ceil(u64::from(ranks));
        // A receiver with fewer ranks reads each block from several ranks of the sender.
        let sources = u64::from(profile.tensor_parallel.div_ceil(ranks).max(1));
        let rank_descriptors = blocks * u64::from(profile.layers) * REGIONS_PER_LAYER * sources;
        let figures = Link::of(link);
        let post = Dur::from_nanos(rank_descriptors * POST_NS);
        let wire = u128::from(rank_bytes) * 1_000_000_000 / u128::from(figures.bandwidth);
        let wire = Dur::from_nanos(u64::try_from(wire).unwrap_or(u64::MAX));
        let time = if blocks == 0 { Dur::ZERO } else { figures.setup + post + wire };
        Transfer { blocks: shipment.blocks, ranks, rank_bytes, rank_descriptors, post, time }
    }

    /// Bytes of all ranks.
    pub const fn bytes(&self) -> u64 {
        self.rank_bytes * self.ranks as u64
    }

    /// Descriptors of all ranks.
    pub const fn descriptors(&self) -> u64 {
        self.rank_descriptors * self.ranks as u64
    }

    /// Bytes of all ranks per second, set-up and posting included.
    pub fn bandwidth(&self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { self.bytes() as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(link: LinkKind, profile: &str, blocks: u32, ranks: u32) -> Transfer {
        let profile = LatencyProfile::named(profile).unwrap();
        Transfer::over(link, &profile, Shipment { blocks, block_size: 16, receiver_ranks: ranks })
    }

    #[test]
    fn a_transfer_follows_the_formula() {
        // 64 blocks of 2 MiB, 64 * 32 layers * 2 descriptors: 1 ms + 4,096 * 3.753 us + 134,217,728 / 40 GB/s.
        let t = over(LinkKind::InfiniBand, "llama-3.1-8b-h100", 64, 1);
        assert_eq!((t.rank_bytes, t.rank_descriptors), (64 << 21, 4096));
        assert_eq!(t.time.as_nanos(), 1_000_000 + 4096 * POST_NS + 3_355_443);
        assert_eq!(over(LinkKind::Tcp, "llama-3.1-8b-h100", 0, 1).time, Dur::ZERO);
    }

    #[test]
    fn ranks_share_the_bytes_and_each_posts_its_own() {
        let t = over(LinkKind::InfiniBand, "llama-3.3-70b-h100-tp8", 10, 8);
        // 5 MiB a block on eight ranks.
        assert_eq!((t.rank_bytes, t.bytes()), (10 * (5 << 20) / 8, 10 * (5 << 20)));
        assert_eq!((t.rank_descriptors, t.descriptors()), (10 * 80 * 2, 10 * 80 * 2 * 8));
        // Four ranks read twice as much each, from two ranks of the sender.
        let half = over(LinkKind::InfiniBand, "llama-3.3-70b-h100-tp8", 10, 4);
        assert_eq!((half.rank_bytes, half.rank_descriptors), (2 * t.rank_bytes, 2 * t.rank_descriptors));
    }

    /// The published transfers that say enough to be compared with. They name neither link nor layout, so the link is the one
    /// whose bandwidth is next above what they reached.
    #[test]
    fn published_transfers_are_met_by_order_of_magnitude() {
        let ms = |descriptors: u64, bytes: u64, link: Link| {
            (link.setup.as_nanos() + descriptors * POST_NS) as f64 / 1e6 + bytes as f64 / link.bandwidth as f64 * 1e3
        };
        // 167 MB in 1,785 descriptors: 38.7 ms (vLLM issue 50913, 4.3 GB/s a rank).
        let reached = ms(1785, 167_000_000, Link::of(LinkKind::Tcp));
        assert!((38.7 / 2.0..38.7 * 2.0).contains(&reached), "{reached}");
        // 2.25 MB in 1.381 ms (the example in vLLM's NIXL usage guide; descriptors not given).
        let reached = ms(18, 2_250_000, Link::of(LinkKind::InfiniBand));
        assert!((1.381 / 2.0..1.381 * 2.0).contains(&reached), "{reached}");
    }
}
