//! Faults in how traces are handed from service to service, as they are met in llm-d deployments, for `igsim check` to find.
//!
//! Each strikes at its seam: what a hop puts on the wire, whether a service has a tracer, which clock it has.

use gateway::core::config::TrustInbound;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::Problems;
use shared::ids::{SpanId, TraceId};
use shared::rng::{Seed, mix64};
use shared::trace::context::TraceContext;
use shared::trace::{Handover, HandoverFault, Resource, Telemetry, Tracer};

use super::{Recorder, Scenario};

/// A fault in how a trace is handed on or recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PropagationFault {
    /// A hop does not pass `traceparent` on: whoever it calls starts a trace of its own.
    Drop {
        /// Which hop: gateway or pd-proxy.
        by: Hop,
        /// Share of traces, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        share: f64,
    },
    /// A hop passes the `traceparent` that it got on after its own, and the receiver takes the last one: it hangs beside the hop, not
    /// below it. The gateway gets one from igsim's own client then.
    Duplicate {
        /// Which hop: gateway or pd-proxy.
        by: Hop,
        /// Share of traces, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        share: f64,
    },
    /// A hop passes `traceparent` on with flag 00: what it calls does not record. From the client on, nobody does.
    Unsample {
        /// Which hop: client, gateway or pd-proxy.
        by: Hop,
        /// Share of traces, 0 to 1; all when absent.
        #[serde(default = "all")]
        #[schemars(range(min = 0, max = 1))]
        share: f64,
    },
    /// Services that do not trace; a sidecar then passes on what it gets.
    Untraced {
        /// Their names, for example engine-1 or pd-proxy-2.
        #[schemars(length(min = 1, max = 1000))]
        instances: Vec<String>,
    },
    /// The sidecar's decode hangs below its prefill, which has ended, as in llm-d's own.
    DecodeUnderPrefill {},
    /// Requests that waited in the gateway are sent on without their context.
    LostInQueue {},
    /// The clocks of engines are wrong.
    ClockSkew {
        /// Their names, for example engine-1.
        #[schemars(length(min = 1, max = 1000))]
        instances: Vec<String>,
        /// How far they are ahead, in milliseconds; behind if negative. At most an hour.
        skew_ms: f64,
    },
}

/// Who passes a context on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Hop {
    /// igsim's own client.
    Client,
    /// The gateway, to engines and their sidecars.
    Gateway,
    /// A routing sidecar, to the engines that prefill and decode.
    PdProxy,
}

/// An hour: more is no skew but another time.
const MOST_SKEW_MS: f64 = 3_600_000.0;

fn all() -> f64 {
    1.0
}

/// The trace contexts that igsim's client sends, where a fault wants some.
#[derive(Clone, Debug, Default)]
pub struct Callers {
    sampled: bool,
    struck: Option<Handover>,
    seed: u64,
}

impl Callers {
    /// The context that the request with this number in the plan is sent with.
    pub fn context(&self, index: u64) -> Option<TraceContext> {
        let handover = self.struck?;
        let draw = |n: u64| mix64(mix64(self.seed ^ index).wrapping_add(n)).max(1);
        let trace_id = TraceId::new(u128::from(draw(1)) << 64 | u128::from(draw(2)))?;
        let span_id = SpanId::new(draw(3))?;
        let context = TraceContext { trace_id, span_id, sampled: true, random: false, tracestate: None };
        handover.strikes(trace_id).then_some(TraceContext { sampled: self.sampled, ..context })
    }
}

impl Scenario {
    /// A tracer of the service instance `resource`, with the faults that the scenario has for it.
    pub fn tracer(&self, telemetry: &Telemetry, mut resource: Resource, hop: Option<Hop>) -> Tracer {
        let name = &resource.instance_id;
        let untraced =
            |f: &PropagationFault| matches!(f, PropagationFault::Untraced { instances } if instances.contains(name));
        if self.propagation_faults.iter().any(untraced) {
            return Tracer::off();
        }
        let skew = self.propagation_faults.iter().find_map(|f| f.skew_of(name));
        resource.clock_skew_ns = skew.map_or(0, |ms| (ms * 1e6).round() as i64);
        let fault = self.propagation_faults.iter().find(|f| hop.is_some() && f.struck_hop() == hop);
        resource.service_name = telemetry.naming().service(&resource.service_name).to_owned();
        telemetry.tracer(resource).handing_on(fault.and_then(PropagationFault::handover).unwrap_or_default())
    }

    /// The contexts that igsim's client sends.
    pub fn callers(&self) -> Callers {
        let seed = Seed(self.seed).value("propagation-callers");
        let of = |sampled, handover| Callers { sampled, struck: Some(handover), seed };
        let wanted = self.propagation_faults.iter().find_map(|fault| match fault {
            PropagationFault::Unsample { by: Hop::Client, .. } => Some(of(false, fault.handover()?)),
            // The gateway's own share says which of them are passed on.
            PropagationFault::Duplicate { by: Hop::Gateway, .. } => {
                Some(of(true, Handover::faulty(HandoverFault::Stale, 1.0)))
            }
            PropagationFault::Drop { .. }
            | PropagationFault::Duplicate { .. }
            | PropagationFault::Unsample { .. }
            | PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::LostInQueue {}
            | PropagationFault::ClockSkew { .. } => None,
        });
        wanted.unwrap_or_default()
    }

    /// Whether sidecars nest their spans as llm-d's does.
    pub(super) fn nests_decode(&self) -> bool {
        self.propagation_faults.contains(&PropagationFault::DecodeUnderPrefill {})
    }

    pub(super) fn check_propagation(&self, p: &mut Problems) {
        let groups = self.engines.iter().flat_map(|g| (0..g.count).map(move |_| g));
        let (mut names, mut sidecars) = (Vec::new(), 0);
        for (i, group) in groups.enumerate() {
            names.push(format!("engine-{i}"));
            if self.pd_proxy_of(group).is_some() {
                names.push(format!("pd-proxy-{i}"));
                sidecars += 1;
            }
        }
        let mut hops: Vec<Hop> = Vec::new();
        for (i, fault) in self.propagation_faults.iter().enumerate() {
            let at = |field: &str| format!("propagation_faults[{i}].{field}");
            let hop = fault.struck_hop();
            if let Some(share) = fault.share() {
                p.check((0.0..=1.0).contains(&share), &at("share"), share, "a number from 0 to 1");
            }
            if let Some(hop) = hop {
                let once = !hops.contains(&hop);
                p.check(once, &at("kind"), "a second fault of one hop", "at most one fault of each hop");
                hops.push(hop);
            }
            for name in fault.instances().iter().filter(|name| !names.contains(name)) {
                let expected = "the name of an engine or sidecar, such as engine-0 or pd-proxy-2";
                p.add(&at("instances"), format!("{name:?}"), expected);
            }
            let nests = *fault == PropagationFault::DecodeUnderPrefill {};
            let there = !(nests || hop == Some(Hop::PdProxy)) || sidecars > 0;
            p.check(there, &at("kind"), "a fault of sidecars where there is none", "engines with pd_proxy");
            let calls =
                hop == Some(Hop::Client) || matches!(fault, PropagationFault::Duplicate { by: Hop::Gateway, .. });
            let believed = matches!(self.gateway.trust_inbound, None | Some(TrustInbound::Always));
            let found = "the context of a client that the gateway does not follow";
            p.check(!calls || believed, &at("kind"), found, "gateway.trust_inbound: always");
            self.check_fault(fault, &at, p);
        }
    }

    fn check_fault(&self, fault: &PropagationFault, at: &dyn Fn(&str) -> String, p: &mut Problems) {
        match fault {
            PropagationFault::Drop { by, .. } | PropagationFault::Duplicate { by, .. } => {
                let passes = *by != Hop::Client;
                p.check(passes, &at("by"), "client, which has nothing to pass on", "gateway or pd-proxy");
            }
            PropagationFault::ClockSkew { skew_ms, .. } => {
                let sane = skew_ms.is_finite() && skew_ms.abs() <= MOST_SKEW_MS;
                p.check(sane, &at("skew_ms"), skew_ms, "a number from -3600000 to 3600000");
                let eager = self.tracing.recorder == Some(Recorder::Eager);
                let found = "clock_skew beside the eager recorder, all of whose services have one clock";
                p.check(!eager, &at("kind"), found, "tracing.recorder: deferred");
            }
            PropagationFault::LostInQueue {} => {
                let waits = self.gateway.flow_control.as_ref().is_some_and(|f| f.enabled);
                let found = "lost_in_queue where nothing waits";
                p.check(waits, &at("kind"), found, "gateway.flow_control.enabled: true beside it");
            }
            PropagationFault::Unsample { .. }
            | PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {} => {}
        }
    }
}

impl PropagationFault {
    /// The hop whose contexts it strikes.
    fn struck_hop(&self) -> Option<Hop> {
        match self {
            PropagationFault::Drop { by, .. }
            | PropagationFault::Duplicate { by, .. }
            | PropagationFault::Unsample { by, .. } => Some(*by),
            PropagationFault::LostInQueue {} => Some(Hop::Gateway),
            PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::ClockSkew { .. } => None,
        }
    }

    /// The service instances that it names.
    fn instances(&self) -> &[String] {
        match self {
            PropagationFault::Untraced { instances } | PropagationFault::ClockSkew { instances, .. } => instances,
            PropagationFault::Drop { .. }
            | PropagationFault::Duplicate { .. }
            | PropagationFault::Unsample { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::LostInQueue {} => &[],
        }
    }

    /// How far the clock of an instance is ahead, in milliseconds.
    fn skew_of(&self, name: &str) -> Option<f64> {
        match self {
            PropagationFault::ClockSkew { instances, skew_ms } if instances.iter().any(|i| i == name) => Some(*skew_ms),
            PropagationFault::ClockSkew { .. }
            | PropagationFault::Drop { .. }
            | PropagationFault::Duplicate { .. }
            | PropagationFault::Unsample { .. }
            | PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::LostInQueue {} => None,
        }
    }

    fn share(&self) -> Option<f64> {
        match self {
            PropagationFault::Drop { share, .. }
            | PropagationFault::Duplicate { share, .. }
            | PropagationFault::Unsample { share, .. } => Some(*share),
            PropagationFault::LostInQueue {}
            | PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::ClockSkew { .. } => None,
        }
    }

    fn handover(&self) -> Option<Handover> {
        let fault = match self {
            PropagationFault::Drop { .. } => HandoverFault::Dropped,
            PropagationFault::Duplicate { .. } => HandoverFault::Stale,
            PropagationFault::Unsample { .. } => HandoverFault::Unsampled,
            PropagationFault::LostInQueue {} => HandoverFault::LostInQueue,
            PropagationFault::Untraced { .. }
            | PropagationFault::DecodeUnderPrefill {}
            | PropagationFault::ClockSkew { .. } => return None,
        };
        Some(Handover::faulty(fault, self.share().unwrap_or(1.0)))
    }
}
