//! Runs whose true overheads are known, for tests of everything that reads a run.

use rand_distr::{Distribution as _, StandardNormal};
use shared::rng::{Seed, Stream};

use crate::overhead::model::{Arm, Block, Cpu, Machine, Regime, Run, Setting, Summary, Telemetry};

/// A block with latencies in proportion to `us` and no telemetry.
pub(crate) fn block(regime: Regime, round: u32, place: u32, arm: Arm, us: f64) -> Block {
    let summary = |scale: f64| Summary {
        count: 1000,
        mean: 1.1 * us * scale,
        p50: us * scale,
        p95: 2.0 * us * scale,
        p99: 3.0 * us * scale,
    };
    Block {
        regime,
        round,
        place,
        arm,
        answered: 1000,
        failed: 0,
        seconds: 0.5,
        steal: 0.0,
        repeated: 0,
        e2e: summary(1.0),
        ttft: summary(0.6),
        itl: summary(0.05),
        added: summary(0.3),
        sampled_e2e: Summary::default(),
        unsampled_e2e: summary(1.0),
        cpu: Cpu {
            gateway_request: 0.2 * us,
            gateway_exporter: 0.0,
            engine_request: 0.3 * us,
            engine_exporter: 0.0,
            client: 0.4 * us,
            receiver: 0.0,
        },
        throughput: 1e6 / us,
        peak_rss_kib: 20_000 + u64::from(place),
        allocations: None,
        telemetry: Telemetry::default(),
    }
}

/// Noise of the blocks of a synthetic run.
pub(crate) struct Noise {
    /// Standard deviation of the logarithm of a block's figures.
    pub(crate) sd: f64,
    /// Growth from the first block to the last, in proportion; half of it as a slow wave.
    pub(crate) drift: f64,
}

/// A run of one regime: in each round every arm once in random order, an `off` block before every two, and one at the
/// end.
///
/// `truth` gives the factor of an arm's latencies and request CPU.
pub(crate) fn run(
    regime: Regime,
    rounds: u32,
    arms: &[Arm],
    noise: &Noise,
    seed: u64,
    truth: impl Fn(&Arm) -> f64,
) -> Run {
    let mut stream = Seed(seed).stream("synthetic");
    let mut planned = Vec::new();
    for round in 0..rounds {
        let mut left: Vec<Arm> = arms.to_vec();
        while !left.is_empty() {
            planned.push((round, Arm::Off));
            for _ in 0..left.len().min(2) {
                planned.push((round, left.swap_remove(stream.below(left.len()))));
            }
        }
    }
    planned.push((rounds.saturating_sub(1), Arm::Off));
    let total = planned.len() as f64;
    let make = |(place, (round, arm)): (usize, (u32, Arm))| {
        let at = place as f64 / total;
        let drift = noise.drift * 0.5 * (at + (at * 9.0).sin());
        let factor = truth(&arm) * (noise.sd * normal(&mut stream) + drift).exp();
        let mut block = block(regime, round, place as u32, arm, 100.0 * factor);
        trace(&mut block);
        block
    };
    let blocks: Vec<Block> = planned.into_iter().enumerate().map(make).collect();
    Run {
        version: "0.0.0".to_owned(),
        command: "igsim overhead --quick".to_owned(),
        seed,
        began: 1_795_000_000,
        machine: Machine {
            cpu: "Test CPU".to_owned(),
            cpus: 2,
            memory_mib: 8192,
            kernel: "6.1".to_owned(),
            virtual_machine: true,
            awake: false,
        },
        settings: vec![Setting {
            regime,
            requests: 1000,
            load: "one request at a time, 2000 per second".to_owned(),
            placement: "gateway on CPU 0, the rest on CPU 1".to_owned(),
            schedule_delay_ms: 50.0,
            rounds,
            left_out: vec!["direct 1.0".to_owned()],
        }],
        blocks,
    }
}

/// 24 spans a sampled request, 180 bytes each, 0.5 us of the exporters' CPU for each.
fn trace(block: &mut Block) {
    let Some(ratio) = block.arm.ratio() else { return };
    let sampled = (block.answered as f64 * ratio).round() as u64;
    let spans = sampled * 24;
    block.telemetry = Telemetry {
        records: sampled,
        spans,
        exported: spans,
        dropped: 0,
        records_dropped: 0,
        batches: spans.div_ceil(512),
        receiver_requests: spans.div_ceil(512),
        receiver_bytes: spans * 180,
        receiver_spans: spans,
        receiver_not_kept: 0,
    };
    block.sampled_e2e = Summary { count: sampled, ..block.e2e };
    block.unsampled_e2e = Summary { count: block.answered - sampled, ..block.e2e };
    block.cpu.gateway_exporter = 0.5 * spans as f64 / block.answered as f64;
}

fn normal(stream: &mut Stream) -> f64 {
    StandardNormal.sample(stream.rng())
}
