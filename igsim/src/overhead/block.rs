//! One block: from a reset state, through a fixed number of requests, to the acknowledgement of the last span.
//!
//! CPU and bytes count up to the acknowledgement, latency up to the last answer. From a receiver that slows, refuses or is absent no
//! acknowledgement is to be had in time: there CPU counts up to the last answer.

use std::collections::HashMap;

use shared::time::{Dur, Time};

use super::cpu;
use super::fleet::{Fleet, FleetError, Moment};
use super::load::{LoadError, Loader, Sample};
use super::model::{Arm, Block, Cpu, Health, Regime, Summary, Telemetry};
use super::node::child::NodeError;

/// The longest wait for acknowledgements: longer than an export with its retries may take.
const FLUSH: Dur = Dur::from_secs(15);

/// Where in the run a block stands.
#[derive(Clone, Debug)]
pub struct Place {
    /// The regime.
    pub regime: Regime,
    /// The round.
    pub round: u32,
    /// Number in the regime.
    pub place: u32,
    /// What is switched on.
    pub arm: Arm,
    /// A number that no other block of the run has, repetitions included.
    pub number: u64,
}

/// A block and what is known of it besides.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its figures; what the receiver decodes is not among them yet.
    pub block: Block,
    /// By which the receiver tells its spans.
    pub mark: u32,
    /// Latencies end to end, in microseconds.
    pub latencies: Vec<f64>,
}

/// Why a block cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A process does not do what it should.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The load cannot be sent.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Spans stay where they are although the receiver is healthy.
    #[error("spans of `{arm}` were not acknowledged within {seconds:.0} s")]
    NotSettled {
        /// The arm.
        arm: String,
        /// How long they were waited for.
        seconds: f64,
    },
}

impl From<NodeError> for BlockError {
    fn from(error: NodeError) -> BlockError {
        BlockError::Fleet(error.into())
    }
}

/// Measures one block.
///
/// # Errors
/// If a process fails, or healthy telemetry does not settle.
pub async fn measure(fleet: &mut Fleet, loader: &Loader, place: Place) -> Result<Measured, BlockError> {
    fleet.prepare(&place.arm)?;
    // Whatever came between two blocks belongs to neither.
    fleet.served()?;
    fleet.take()?;
    let before = fleet.moment()?;
    let samples = loader.run(place.number).await?;
    let faulty = matches!(&place.arm, Arm::Traced { receiver, .. } if *receiver != Health::Healthy);
    if !faulty {
        settle(fleet, &place.arm)?;
    }
    let after = fleet.moment()?;
    let own = fleet.served()?;
    let counted = if faulty { recover(fleet, &place.arm)? } else { after.clone() };
    let taken = fleet.take()?;
    let mut telemetry = telemetry(&before, &counted);
    telemetry.receiver_requests = taken.requests;
    telemetry.receiver_bytes = taken.bytes;
    telemetry.receiver_not_kept = taken.not_kept;
    let peak = fleet.gateway_peak_kib()?;
    let mut block = summarise(&place, &samples, &own);
    block.steal = after.ticks.steal_since(&before.ticks);
    block.cpu = cpu(&before, &after, block.answered);
    block.telemetry = telemetry;
    block.peak_rss_kib = peak;
    let allocations = after.gateway.since(&before.gateway).allocations;
    block.allocations = allocations.map(|n| n as f64 / block.answered.max(1) as f64);
    let latencies = samples.iter().filter(|s| s.ok()).map(|s| s.e2e().as_micros_f64()).collect();
    Ok(Measured { block, mark: taken.mark, latencies })
}

/// Waits for the acknowledgement of every span.
fn settle(fleet: &mut Fleet, arm: &Arm) -> Result<(), BlockError> {
    if fleet.flush(FLUSH)? {
        Ok(())
    } else {
        Err(BlockError::NotSettled { arm: arm.to_string(), seconds: FLUSH.as_secs_f64() })
    }
}

/// After a receiver that did not do its part, whose acknowledgements are waited for by nobody: what it left over is got rid of,
/// so that the next block pays for nothing of this one, and counted.
fn recover(fleet: &mut Fleet, arm: &Arm) -> Result<Moment, BlockError> {
    fleet.heal()?;
    settle(fleet, arm)?;
    Ok(fleet.moment()?)
}

/// What the client saw, with the engines' own times to first byte.
pub(super) fn summarise(place: &Place, samples: &[Sample], own: &HashMap<String, Dur>) -> Block {
    let good = || samples.iter().filter(|s| s.ok());
    let us = Dur::as_micros_f64;
    let e2e =
        |wanted: &dyn Fn(&Sample) -> bool| Summary::of(good().filter(|s| wanted(s)).map(|s| us(s.e2e())).collect());
    let added = good().filter_map(|s| Some(us(s.to_first_byte()?) - us(*own.get(&s.id)?)));
    let first = samples.iter().map(|s| s.intended).min().unwrap_or(Time::ZERO);
    let last = samples.iter().map(|s| s.last).max().unwrap_or(Time::ZERO);
    let unsampled = |s: &Sample| place.arm.ratio().is_some() && !s.sampled;
    let (answered, seconds) = (good().count() as u64, last.since(first).as_secs_f64());
    Block {
        regime: place.regime,
        round: place.round,
        place: place.place,
        arm: place.arm.clone(),
        answered,
        failed: samples.len() as u64 - answered,
        seconds,
        steal: 0.0,
        repeated: 0,
        e2e: e2e(&|_| true),
        ttft: Summary::of(good().filter_map(|s| s.ttft()).map(us).collect()),
        itl: Summary::of(good().flat_map(|s| &s.gaps).map(|gap| us(*gap)).collect()),
        added: Summary::of(added.collect()),
        sampled_e2e: e2e(&|s| s.sampled),
        unsampled_e2e: e2e(&unsampled),
        cpu: Cpu::default(),
        throughput: if seconds > 0.0 { answered as f64 / seconds } else { 0.0 },
        peak_rss_kib: 0,
        allocations: None,
        telemetry: Telemetry::default(),
    }
}

/// CPU time per answered request, in microseconds.
fn cpu(before: &Moment, after: &Moment, answered: u64) -> Cpu {
    let each = |nanos: u64| nanos as f64 / 1_000.0 / answered.max(1) as f64;
    let gateway = cpu::between(&before.gateway_cpu, &after.gateway_cpu);
    let engine = cpu::between(&before.engine_cpu, &after.engine_cpu);
    let receiver = cpu::between(&before.receiver_cpu, &after.receiver_cpu);
    Cpu {
        gateway_request: each(gateway.request),
        gateway_exporter: each(gateway.exporter),
        engine_request: each(engine.request),
        engine_exporter: each(engine.exporter),
        client: each(after.client_nanos.saturating_sub(before.client_nanos)),
        receiver: each(receiver.request + receiver.exporter),
    }
}

fn telemetry(before: &Moment, after: &Moment) -> Telemetry {
    let (gateway, engine) = (after.gateway.since(&before.gateway), after.engine.since(&before.engine));
    Telemetry {
        records: gateway.records,
        spans: gateway.spans + engine.spans,
        exported: gateway.exported + engine.exported,
        dropped: gateway.dropped + engine.dropped,
        records_dropped: gateway.records_dropped + engine.records_dropped,
        batches: gateway.batches + engine.batches,
        receiver_requests: 0,
        receiver_bytes: 0,
        receiver_spans: 0,
        receiver_not_kept: 0,
    }
}

impl Summary {
    /// Of values in any order: quantiles by linear interpolation between order statistics (Hyndman and Fan's type 7).
    pub fn of(mut values: Vec<f64>) -> Summary {
        values.sort_by(f64::total_cmp);
        let Some(last) = values.len().checked_sub(1) else { return Summary::default() };
        let at = |q: f64| {
            let rank = q * last as f64;
            let (low, high) = (values[rank.floor() as usize], values[rank.ceil() as usize]);
            low + (high - low) * rank.fract()
        };
        Summary {
            count: values.len() as u64,
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overhead::model::Path;

    #[test]
    fn quantiles_lie_between_the_values_beside_them() {
        let summary = Summary::of((1..=101).rev().map(f64::from).collect());
        assert_eq!(summary, Summary { count: 101, mean: 51.0, p50: 51.0, p95: 96.0, p99: 100.0 });
        assert_eq!(Summary::of(vec![1.0, 2.0]).p50, 1.5);
        assert_eq!(Summary::of(Vec::new()), Summary::default());
    }

    #[test]
    fn what_the_gateway_added_is_the_clients_time_less_the_engines_own() {
        let at = |us: u64| Time::ZERO + Dur::from_micros(us);
        let sample = |id: &str, sampled, last: u64| Sample {
            id: id.to_owned(),
            intended: at(0),
            sent: at(10),
            first_byte: Some(at(150)),
            first_token: Some(at(160)),
            last_token: Some(at(170)),
            last: at(last),
            gaps: vec![Dur::from_micros(10)],
            sampled,
            ..Sample::default()
        };
        let mut failed = sample("c", false, 900);
        failed.failure = Some(crate::report::Failure::Timeout);
        let samples = [sample("a", true, 200), sample("b", false, 400), failed];
        let own = HashMap::from([("a".to_owned(), Dur::from_micros(40))]);
        let arm = Arm::traced(Path::Direct, 0.5);
        let place = Place { regime: Regime::Floor, round: 0, place: 0, arm, number: 0 };
        let block = summarise(&place, &samples, &own);
        assert_eq!((block.answered, block.failed), (2, 1));
        assert_eq!((block.e2e.mean, block.sampled_e2e.p50, block.unsampled_e2e.p50), (300.0, 200.0, 400.0));
        assert_eq!((block.added.count, block.added.mean), (1, 100.0));
        assert_eq!((block.ttft.p50, block.itl.p50), (160.0, 10.0));
        assert_eq!(block.seconds, 900e-6);
    }
}
