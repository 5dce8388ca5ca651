//! What the overhead lab measures and writes down: regimes, arms, blocks with their raw figures.
//!
//! A block is the unit of measurement: a fixed number of requests through one arm, from a reset state until everything they
//! caused is acknowledged. Nothing in here measures, and nothing in here judges.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The load under which arms are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Regime {
    /// Engines with a GPU's latencies, open-loop arrivals at about 60 % of capacity: what a client sees.
    Realistic,
    /// Engines answer at once, one request at a time: what the gateway adds.
    Floor,
    /// As `floor`, with the processes left to the scheduler instead of pinned.
    FloorUnpinned,
    /// Engines answer at once, closed loop: what the gateway's CPU pays.
    Saturation,
}

impl Regime {
    /// Every regime, in the order of reports.
    pub const ALL: [Regime; 4] = [Regime::Realistic, Regime::Floor, Regime::FloorUnpinned, Regime::Saturation];

    /// The name in options, files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Regime::Realistic => "realistic",
            Regime::Floor => "floor",
            Regime::FloorUnpinned => "floor-unpinned",
            Regime::Saturation => "saturation",
        }
    }
}

/// How spans are recorded and encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// The OpenTelemetry SDK at once: Tracer, ParentBased, BatchSpanProcessor, opentelemetry-otlp.
    Eager,
    /// Recorded facts, folded in the background, exported by opentelemetry-otlp.
    Deferred,
    /// Recorded facts, encoded straight to OTLP in the background.
    Direct,
}

impl Path {
    /// Every path, the standard one first.
    pub const ALL: [Path; 3] = [Path::Eager, Path::Deferred, Path::Direct];

    /// The name in options, files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Path::Eager => "eager",
            Path::Deferred => "deferred",
            Path::Direct => "direct",
        }
    }
}

/// How the receiver of spans behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Acknowledges at once.
    #[default]
    Healthy,
    /// Acknowledges after a second.
    Slow,
    /// Answers 503.
    Refusing,
    /// Does not listen.
    Absent,
}

/// What is switched between blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// Telemetry off: no parse, no ids, inbound headers forwarded untouched.
    Off,
    /// The same as `off`, as a control: what it differs by is noise.
    Control,
    /// Telemetry on.
    Traced {
        /// Recorder and exporter.
        path: Path,
        /// Share of traces kept.
        ratio: f64,
        /// The receiver.
        #[serde(default)]
        receiver: Health,
        /// Share of engine steps that get a trace of their own.
        #[serde(default)]
        steps: f64,
    },
    /// Telemetry off and every answer held back by so many microseconds: proves that the lab sees a real delay.
    Delayed {
        /// The delay.
        us: f64,
    },
    /// A state of a system that is not ours.
    Outside {
        /// Its name.
        name: String,
    },
}

impl Arm {
    /// A traced arm with a healthy receiver.
    pub const fn traced(path: Path, ratio: f64) -> Arm {
        Arm::Traced { path, ratio, receiver: Health::Healthy, steps: 0.0 }
    }

    /// The same with traces of engine steps.
    #[must_use]
    pub fn with_steps(self, share: f64) -> Arm {
        match self {
            Arm::Traced { path, ratio, receiver, steps: _ } => Arm::Traced { path, ratio, receiver, steps: share },
            Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => self,
        }
    }

    /// The share of traces kept, for traced arms.
    pub const fn ratio(&self) -> Option<f64> {
        match self {
            Arm::Traced { ratio, .. } => Some(*ratio),
            Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => None,
        }
    }

    /// The order of reports: `off`, its control, traced arms by receiver, path and ratio, delayed arms, states of systems
    /// that are not ours by name.
    pub fn report_order(&self, other: &Arm) -> Ordering {
        let key = |arm: &Arm| match arm {
            Arm::Off => (0, Health::Healthy, Path::Eager, 0.0),
            Arm::Control => (1, Health::Healthy, Path::Eager, 0.0),
            Arm::Traced { path, ratio, receiver, steps: _ } => (2, *receiver, *path, *ratio),
            Arm::Delayed { us } => (3, Health::Healthy, Path::Eager, *us),
            Arm::Outside { .. } => (4, Health::Healthy, Path::Eager, 0.0),
        };
        let ((kind, receiver, path, size), (kind2, receiver2, path2, size2)) = (key(self), key(other));
        let name = |arm: &Arm| match arm {
            Arm::Outside { name } => name.clone(),
            Arm::Off | Arm::Control | Arm::Traced { .. } | Arm::Delayed { .. } => String::new(),
        };
        let known = (kind, receiver, path).cmp(&(kind2, receiver2, path2)).then(size.total_cmp(&size2));
        let steps = |arm: &Arm| if let Arm::Traced { steps, .. } = arm { *steps } else { 0.0 };
        known.then(steps(self).total_cmp(&steps(other))).then_with(|| name(self).cmp(&name(other)))
    }
}

impl fmt::Display for Arm {
    /// `off`, `off'`, `eager 0.1`, `direct 0.1, steps 0.01`, `direct 1.0, refusing receiver`, `delayed 15 us`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arm::Off => f.write_str("off"),
            Arm::Control => f.write_str("off'"),
            Arm::Traced { path, ratio, receiver, steps } => {
                let ratio = if *ratio == 1.0 { "1.0".to_owned() } else { ratio.to_string() };
                write!(f, "{} {ratio}", path.name())?;
                if *steps > 0.0 {
                    write!(f, ", steps {steps}")?;
                }
                match receiver {
                    Health::Healthy => Ok(()),
                    Health::Slow => f.write_str(", slow receiver"),
                    Health::Refusing => f.write_str(", refusing receiver"),
                    Health::Absent => f.write_str(", absent receiver"),
                }
            }
            Arm::Delayed { us } => write!(f, "delayed {us:.1} us"),
            Arm::Outside { name } => f.write_str(name),
        }
    }
}

/// A distribution in short, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Values.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Their median.
    pub p50: f64,
    /// Their 95th percentile.
    pub p95: f64,
    /// Their 99th percentile.
    pub p99: f64,
}

/// CPU time per request, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// The gateway's threads that serve requests.
    pub gateway_request: f64,
    /// The gateway's threads that fold, encode and send spans.
    pub gateway_exporter: f64,
    /// The engines' threads that serve and pace requests.
    pub engine_request: f64,
    /// The engines' threads that fold, encode and send spans.
    pub engine_exporter: f64,
    /// The load generator.
    pub client: f64,
    /// The receiver of spans.
    pub receiver: f64,
}

impl Cpu {
    /// Everything the gateway's process used.
    pub fn gateway(&self) -> f64 {
        self.gateway_request + self.gateway_exporter
    }
}

/// What became of the telemetry of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telemetry {
    /// Records opened, or traces begun and sampled by the SDK, in the gateway.
    pub records: u64,
    /// Spans made, gateway and engines together.
    pub spans: u64,
    /// Spans acknowledged.
    pub exported: u64,
    /// Spans lost on the way, for whatever reason, with those of lost records not among them.
    pub dropped: u64,
    /// Records lost before they were folded.
    pub records_dropped: u64,
    /// Batches acknowledged.
    pub batches: u64,
    /// Export requests that the receiver took.
    pub receiver_requests: u64,
    /// Bytes of bodies that the receiver took.
    pub receiver_bytes: u64,
    /// Spans that the receiver took, counted after the run; those of requests that it did not keep are missing.
    pub receiver_spans: u64,
    /// Export requests that the receiver took and had no room to keep.
    #[serde(default)]
    pub receiver_not_kept: u64,
}

impl Telemetry {
    /// Whether anything was recorded, sent or taken.
    pub fn any(&self) -> bool {
        *self != Telemetry::default()
    }

    /// Spans that the receiver took; nothing where it had no room to keep all of them, and cannot tell.
    pub fn received(&self) -> Option<u64> {
        (self.receiver_not_kept == 0).then_some(self.receiver_spans)
    }

    /// The sums of two blocks.
    pub fn plus(&self, other: &Telemetry) -> Telemetry {
        Telemetry {
            records: self.records + other.records,
            spans: self.spans + other.spans,
            exported: self.exported + other.exported,
            dropped: self.dropped + other.dropped,
            records_dropped: self.records_dropped + other.records_dropped,
            batches: self.batches + other.batches,
            receiver_requests: self.receiver_requests + other.receiver_requests,
            receiver_bytes: self.receiver_bytes + other.receiver_bytes,
            receiver_spans: self.receiver_spans + other.receiver_spans,
            receiver_not_kept: self.receiver_not_kept + other.receiver_not_kept,
        }
    }
}

/// Raw figures of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// The regime.
    pub regime: Regime,
    /// The round, from 0.
    pub round: u32,
    /// Place in the order in which the regime's blocks ran, from 0; blocks that were repeated keep their place.
    pub place: u32,
    /// What was switched on.
    pub arm: Arm,
    /// Requests that were answered in full.
    pub answered: u64,
    /// Requests that failed.
    pub failed: u64,
    /// From the first intended send time to the last byte of the last answer, in seconds.
    pub seconds: f64,
    /// Share of the machine's CPU time that the hypervisor took meanwhile.
    pub steal: f64,
    /// How often the block was repeated because of steal time or a CPU that was slower than usual.
    pub repeated: u32,
    /// From the intended send time to the last byte.
    pub e2e: Summary,
    /// From the intended send time to the first token.
    pub ttft: Summary,
    /// Between tokens.
    pub itl: Summary,
    /// The client's time to first byte, less the engine's own share of it.
    pub added: Summary,
    /// End to end, of requests whose trace was kept.
    pub sampled_e2e: Summary,
    /// End to end, of requests whose trace was not kept.
    pub unsampled_e2e: Summary,
    /// CPU time.
    pub cpu: Cpu,
    /// Answered requests per second: of the whole box, with client, engines and receiver.
    pub throughput: f64,
    /// The gateway's peak resident memory so far in the run, in KiB.
    pub peak_rss_kib: u64,
    /// Allocations per request in the gateway; only where the build counts them.
    pub allocations: Option<f64>,
    /// Spans and what became of them.
    pub telemetry: Telemetry,
}

/// The machine of a run, so far as it tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// CPUs that may be used.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Whether the CPU says that it is virtual.
    pub virtual_machine: bool,
    /// Whether its processors were kept from sleeping ([`super::awake`]).
    #[serde(default)]
    pub awake: bool,
}

/// How one regime was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// The regime.
    pub regime: Regime,
    /// Requests per block.
    pub requests: u64,
    /// Requests in flight (closed loop) or per second (open loop), in words.
    pub load: String,
    /// Which process ran on which CPUs, in words.
    pub placement: String,
    /// Longest time that a span waits for its batch, in milliseconds; the same in all arms.
    pub schedule_delay_ms: f64,
    /// Rounds that were done.
    pub rounds: u32,
    /// Arms left out for lack of time.
    pub left_out: Vec<String>,
}

/// A run of the lab: everything needed to analyse it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Version of igsim.
    pub version: String,
    /// The command line.
    pub command: String,
    /// The seed of the order of arms and of the load.
    pub seed: u64,
    /// When it began, seconds since 1970.
    pub began: u64,
    /// The machine.
    pub machine: Machine,
    /// How each regime was run.
    pub settings: Vec<Setting>,
    /// The blocks, in the order in which they ran.
    pub blocks: Vec<Block>,
}
