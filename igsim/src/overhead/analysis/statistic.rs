//! The figures of a block that are compared between arms, named before any run: which decide, and which are only shown.

use serde::{Deserialize, Serialize};

use crate::overhead::model::{Block, Regime, Summary};

/// A figure of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// Mean time from the intended send time to the last byte.
    E2eMean,
    /// Median of the same.
    E2eP50,
    /// Its 95th percentile.
    E2eP95,
    /// Its 99th percentile.
    E2eP99,
    /// Mean time from the intended send time to the first token.
    TtftMean,
    /// Median of the same.
    TtftP50,
    /// Its 95th percentile.
    TtftP95,
    /// Its 99th percentile.
    TtftP99,
    /// Mean time between tokens.
    ItlMean,
    /// Its 99th percentile.
    ItlP99,
    /// Mean of what the gateway adds to the time to first byte.
    AddedMean,
    /// Median of the same.
    AddedP50,
    /// Its 99th percentile.
    AddedP99,
    /// Mean end to end of requests whose trace was kept, against all requests of `off`.
    SampledE2eMean,
    /// Median of the same.
    SampledE2eP50,
    /// Mean end to end of requests whose trace was not kept, against all requests of `off`.
    UnsampledE2eMean,
    /// Median of the same.
    UnsampledE2eP50,
    /// CPU time per request of the gateway's process.
    GatewayCpu,
    /// The part of its threads that serve requests.
    GatewayRequestCpu,
    /// The part of its threads that fold, encode and send spans: next to nothing in `off`, so that only the difference is given.
    GatewayExporterCpu,
    /// CPU time per request of the engines' processes.
    EngineCpu,
    /// Answered requests per second, of the whole box.
    Throughput,
    /// Peak resident memory of the gateway by the end of the block.
    PeakMemory,
    /// Allocations per request in the gateway, where the build counts them.
    Allocations,
}

/// What a figure is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Microseconds, of a request or per request.
    Micros,
    /// Requests per second.
    PerSecond,
    /// KiB.
    Kib,
    /// A number per request.
    Count,
}

impl Unit {
    /// As printed behind a number.
    pub const fn name(self) -> &'static str {
        match self {
            Unit::Micros => "us",
            Unit::PerSecond => "req/s",
            Unit::Kib => "KiB",
            Unit::Count => "per request",
        }
    }
}

impl Statistic {
    /// Every statistic, in the order of reports.
    pub const ALL: [Statistic; 24] = [
        Statistic::E2eMean,
        Statistic::E2eP50,
        Statistic::E2eP95,
        Statistic::E2eP99,
        Statistic::TtftMean,
        Statistic::TtftP50,
        Statistic::TtftP95,
        Statistic::TtftP99,
        Statistic::ItlMean,
        Statistic::ItlP99,
        Statistic::AddedMean,
        Statistic::AddedP50,
        Statistic::AddedP99,
        Statistic::SampledE2eMean,
        Statistic::SampledE2eP50,
        Statistic::UnsampledE2eMean,
        Statistic::UnsampledE2eP50,
        Statistic::GatewayCpu,
        Statistic::GatewayRequestCpu,
        Statistic::GatewayExporterCpu,
        Statistic::EngineCpu,
        Statistic::Throughput,
        Statistic::PeakMemory,
        Statistic::Allocations,
    ];

    /// The statistics that decide in a regime; all others are secondary there and never decide.
    pub const fn primary(regime: Regime) -> &'static [Statistic] {
        match regime {
            Regime::Realistic => &[Statistic::E2eMean, Statistic::E2eP50, Statistic::TtftMean],
            Regime::Floor => &[Statistic::E2eP50, Statistic::E2eMean],
            Regime::FloorUnpinned => &[],
            Regime::Saturation => &[Statistic::GatewayCpu],
        }
    }

    /// Whether it decides in `regime`.
    pub fn is_primary(self, regime: Regime) -> bool {
        Statistic::primary(regime).contains(&self)
    }

    /// The statistics whose plots and columns stand for a regime: the primary ones, or those of `floor` where none decides.
    pub const fn headline(regime: Regime) -> &'static [Statistic] {
        match regime {
            Regime::FloorUnpinned => Statistic::primary(Regime::Floor),
            Regime::Realistic | Regime::Floor | Regime::Saturation => Statistic::primary(regime),
        }
    }

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Statistic::E2eMean => "e2e mean",
            Statistic::E2eP50 => "e2e p50",
            Statistic::E2eP95 => "e2e p95",
            Statistic::E2eP99 => "e2e p99",
            Statistic::TtftMean => "ttft mean",
            Statistic::TtftP50 => "ttft p50",
            Statistic::TtftP95 => "ttft p95",
            Statistic::TtftP99 => "ttft p99",
            Statistic::ItlMean => "itl mean",
            Statistic::ItlP99 => "itl p99",
            Statistic::AddedMean => "added mean",
            Statistic::AddedP50 => "added p50",
            Statistic::AddedP99 => "added p99",
            Statistic::SampledE2eMean => "sampled e2e mean",
            Statistic::SampledE2eP50 => "sampled e2e p50",
            Statistic::UnsampledE2eMean => "unsampled e2e mean",
            Statistic::UnsampledE2eP50 => "unsampled e2e p50",
            Statistic::GatewayCpu => "gateway CPU",
            Statistic::GatewayRequestCpu => "gateway CPU, requests",
            Statistic::GatewayExporterCpu => "gateway CPU, exporter",
            Statistic::EngineCpu => "engine CPU",
            Statistic::Throughput => "throughput",
            Statistic::PeakMemory => "peak memory so far",
            Statistic::Allocations => "allocations",
        }
    }

    /// What it is counted in.
    pub const fn unit(self) -> Unit {
        match self {
            Statistic::Throughput => Unit::PerSecond,
            Statistic::PeakMemory => Unit::Kib,
            Statistic::Allocations => Unit::Count,
            Statistic::E2eMean
            | Statistic::E2eP50
            | Statistic::E2eP95
            | Statistic::E2eP99
            | Statistic::TtftMean
            | Statistic::TtftP50
            | Statistic::TtftP95
            | Statistic::TtftP99
            | Statistic::ItlMean
            | Statistic::ItlP99
            | Statistic::AddedMean
            | Statistic::AddedP50
            | Statistic::AddedP99
            | Statistic::SampledE2eMean
            | Statistic::SampledE2eP50
            | Statistic::UnsampledE2eMean
            | Statistic::UnsampledE2eP50
            | Statistic::GatewayCpu
            | Statistic::GatewayRequestCpu
            | Statistic::GatewayExporterCpu
            | Statistic::EngineCpu => Unit::Micros,
        }
    }

    /// Whether a ratio to `off` means something: exporters do next to nothing there, so that theirs would be a ratio to noise.
    pub fn has_ratio(self) -> bool {
        self != Statistic::GatewayExporterCpu
    }

    /// The figure of a block of any arm, in [`Statistic::unit`]; nothing where the block has none.
    pub fn of(self, block: &Block) -> Option<f64> {
        let of = |summary: &Summary, figure: fn(&Summary) -> f64| (summary.count > 0).then(|| figure(summary));
        let value = match self {
            Statistic::E2eMean => of(&block.e2e, |s| s.mean),
            Statistic::E2eP50 => of(&block.e2e, |s| s.p50),
            Statistic::E2eP95 => of(&block.e2e, |s| s.p95),
            Statistic::E2eP99 => of(&block.e2e, |s| s.p99),
            Statistic::TtftMean => of(&block.ttft, |s| s.mean),
            Statistic::TtftP50 => of(&block.ttft, |s| s.p50),
            Statistic::TtftP95 => of(&block.ttft, |s| s.p95),
            Statistic::TtftP99 => of(&block.ttft, |s| s.p99),
            Statistic::ItlMean => of(&block.itl, |s| s.mean),
            Statistic::ItlP99 => of(&block.itl, |s| s.p99),
            Statistic::AddedMean => of(&block.added, |s| s.mean),
            Statistic::AddedP50 => of(&block.added, |s| s.p50),
            Statistic::AddedP99 => of(&block.added, |s| s.p99),
            Statistic::SampledE2eMean => of(&block.sampled_e2e, |s| s.mean),
            Statistic::SampledE2eP50 => of(&block.sampled_e2e, |s| s.p50),
            Statistic::UnsampledE2eMean => of(&block.unsampled_e2e, |s| s.mean),
            Statistic::UnsampledE2eP50 => of(&block.unsampled_e2e, |s| s.p50),
            Statistic::GatewayCpu => Some(block.cpu.gateway()),
            Statistic::GatewayRequestCpu => Some(block.cpu.gateway_request),
            Statistic::GatewayExporterCpu => Some(block.cpu.gateway_exporter),
            Statistic::EngineCpu => Some(block.cpu.engine_request + block.cpu.engine_exporter),
            Statistic::Throughput => Some(block.throughput),
            Statistic::PeakMemory => Some(block.peak_rss_kib as f64),
            Statistic::Allocations => block.allocations,
        };
        value.filter(|v| v.is_finite() && block.answered > 0)
    }

    /// The figure of an `off` block that an arm's is held against: with tracing off no request is sampled, so requests with and without
    /// a kept trace are both held against all of them.
    pub fn of_reference(self, block: &Block) -> Option<f64> {
        match self {
            Statistic::SampledE2eMean | Statistic::UnsampledE2eMean => Statistic::E2eMean.of(block),
            Statistic::SampledE2eP50 | Statistic::UnsampledE2eP50 => Statistic::E2eP50.of(block),
            Statistic::E2eMean
            | Statistic::E2eP50
            | Statistic::E2eP95
            | Statistic::E2eP99
            | Statistic::TtftMean
            | Statistic::TtftP50
            | Statistic::TtftP95
            | Statistic::TtftP99
            | Statistic::ItlMean
            | Statistic::ItlP99
            | Statistic::AddedMean
            | Statistic::AddedP50
            | Statistic::AddedP99
            | Statistic::GatewayCpu
            | Statistic::GatewayRequestCpu
            | Statistic::GatewayExporterCpu
            | Statistic::EngineCpu
            | Statistic::Throughput
            | Statistic::PeakMemory
            | Statistic::Allocations => self.of(block),
        }
    }
}
