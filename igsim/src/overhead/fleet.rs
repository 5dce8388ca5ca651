//! The processes of one regime, started together, switched together, read together.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use http::Uri;
use shared::time::Dur;

use super::cpu::{self, Reading, Ticks};
use super::model::{Arm, Health};
use super::node::child::{Node, NodeError};
use super::node::message::{Answer, Counters, Order, Role, Start, Tracing};
use super::place::Placement;
use super::receiver::{Decoded, Taken};
use crate::scenario::Scenario;

/// What a fleet is made of.
#[derive(Clone, Debug)]
pub struct FleetSpec {
    /// The program whose hidden command the processes are: `igsim` itself.
    pub binary: PathBuf,
    /// Gateway and engines.
    pub scenario: Scenario,
    /// Where they run.
    pub placement: Placement,
    /// The longest time that a span waits for its batch, in milliseconds.
    pub schedule_delay_ms: f64,
    /// Bytes of bodies that the receiver keeps in a file, to decode them after the run; more are counted as not kept.
    pub stored_bytes: u64,
}

/// Why a fleet cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A process does not do what it should.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The kernel does not say what it should.
    #[error("cannot read CPU time: {0}")]
    Proc(#[from] std::io::Error),
}

/// Gateway, engines and receiver. Dropping it ends them.
#[derive(Debug)]
pub struct Fleet {
    // Ended in this order: a gateway drains into its engines, and both send their last spans.
    gateway: Node,
    engine: Node,
    receiver: Node,
}

/// What all processes have used and made so far.
#[derive(Clone, Debug)]
pub struct Moment {
    /// Of the gateway.
    pub gateway: Counters,
    /// Of the engines.
    pub engine: Counters,
    /// The gateway's threads.
    pub gateway_cpu: Reading,
    /// The engines' threads.
    pub engine_cpu: Reading,
    /// The receiver's threads.
    pub receiver_cpu: Reading,
    /// The lab's own CPU time in nanoseconds: the load generator.
    pub client_nanos: u64,
    /// The machine.
    pub ticks: Ticks,
}

const PROC: &str = "/proc";

impl Fleet {
    /// Starts all processes.
    ///
    /// # Errors
    /// If one of them does not start.
    pub fn start(spec: &FleetSpec) -> Result<Fleet, NodeError> {
        let start = |cpus: &[usize], engines: &[String], spans_to: String| Start {
            cpus: cpus.to_vec(),
            scenario: Box::new(spec.scenario.clone()),
            engines: engines.to_vec(),
            spans_to,
            schedule_delay_ms: spec.schedule_delay_ms,
            stored_bytes: spec.stored_bytes,
        };
        let others = &spec.placement.others;
        let receiver = Node::start(&spec.binary, Role::Receiver, start(others, &[], String::new()))?;
        let spans_to = receiver.urls().first().map(|url| format!("{url}/v1/traces")).unwrap_or_default();
        let engine = Node::start(&spec.binary, Role::Engine, start(others, &[], spans_to.clone()))?;
        let gateway_start = start(&spec.placement.gateway, engine.urls(), spans_to);
        let gateway = Node::start(&spec.binary, Role::Gateway, gateway_start)?;
        Ok(Fleet { gateway, engine, receiver })
    }

    /// The gateway's URL with `path` behind it.
    pub fn uri(&self, path: &str) -> Uri {
        let base = self.gateway.urls().first().map(String::as_str).unwrap_or_default();
        format!("{base}{path}").parse().expect("an address and a path are a URL")
    }

    /// Process ids of gateway and engines.
    pub fn pids(&self) -> (u32, u32) {
        (self.gateway.pid(), self.engine.pid())
    }

    /// Brings every process into the state in which a block of `arm` begins.
    ///
    /// # Errors
    /// If a process does not do it.
    pub fn prepare(&mut self, arm: &Arm) -> Result<(), NodeError> {
        let (tracing, health, delay) = match arm {
            Arm::Off | Arm::Control | Arm::Outside { .. } => (None, Health::Healthy, 0.0),
            Arm::Traced { path, ratio, receiver, steps } => {
                (Some(Tracing { path: *path, ratio: *ratio, steps: *steps }), *receiver, 0.0)
            }
            Arm::Delayed { us } => (None, Health::Healthy, *us),
        };
        self.receiver.order(&Order::Health(health))?;
        for node in [&mut self.engine, &mut self.gateway] {
            node.order(&Order::Reset)?;
            node.order(&Order::Arm(tracing))?;
        }
        self.engine.order(&Order::Delay(delay))
    }

    /// Makes the receiver do its part again.
    ///
    /// # Errors
    /// If the process does not answer.
    pub fn heal(&mut self) -> Result<(), NodeError> {
        self.receiver.order(&Order::Health(Health::Healthy))
    }

    /// Exports everything; false if something is left after `timeout`.
    ///
    /// # Errors
    /// If a process does not answer.
    pub fn flush(&mut self, timeout: Dur) -> Result<bool, NodeError> {
        let order = Order::Flush(timeout.as_nanos() / 1_000_000);
        self.gateway.tell(&order)?;
        self.engine.tell(&order)?;
        let mut settled = true;
        for node in [&mut self.gateway, &mut self.engine] {
            match node.answer(&order)? {
                Answer::Settled(all) => settled &= all,
                other => return Err(node.unexpected(&other)),
            }
        }
        Ok(settled)
    }

    /// What everything has used and made so far.
    ///
    /// # Errors
    /// If a process or the kernel does not say.
    pub fn moment(&mut self) -> Result<Moment, FleetError> {
        let (proc, gateway, engine) = (Path::new(PROC), self.gateway.counters()?, self.engine.counters()?);
        let receiver = self.receiver.counters()?;
        Ok(Moment {
            gateway_cpu: cpu::read(proc, self.gateway.pid(), gateway.cpu_nanos)?,
            engine_cpu: cpu::read(proc, self.engine.pid(), engine.cpu_nanos)?,
            receiver_cpu: cpu::read(proc, self.receiver.pid(), receiver.cpu_nanos)?,
            gateway,
            engine,
            client_nanos: cpu::of_this_process(),
            ticks: Ticks::read(proc)?,
        })
    }

    /// The gateway's largest memory so far, in KiB.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn gateway_peak_kib(&self) -> Result<u64, FleetError> {
        Ok(cpu::peak_rss_kib(Path::new(PROC), self.gateway.pid())?)
    }

    /// How long the engines took to begin their answers since they were last asked, by the client's request id.
    ///
    /// # Errors
    /// If the process does not answer.
    pub fn served(&mut self) -> Result<HashMap<String, Dur>, NodeError> {
        match self.engine.ask(&Order::Served)? {
            Answer::Served(all) => Ok(all.into_iter().map(|(id, nanos)| (id, Dur::from_nanos(nanos))).collect()),
            other => Err(self.engine.unexpected(&other)),
        }
    }

    /// What the receiver got since it was last asked.
    ///
    /// # Errors
    /// If the process does not answer.
    pub fn take(&mut self) -> Result<Taken, NodeError> {
        match self.receiver.ask(&Order::Take)? {
            Answer::Taken(taken) => Ok(taken),
            other => Err(self.receiver.unexpected(&other)),
        }
    }

    /// Everything that the receiver got, decoded, by mark.
    ///
    /// # Errors
    /// If the process does not answer, or something cannot be decoded.
    pub fn decode(&mut self) -> Result<Decoded, NodeError> {
        match self.receiver.ask(&Order::Decode)? {
            Answer::Decoded(all) => Ok(all),
            other => Err(self.receiver.unexpected(&other)),
        }
    }
}
