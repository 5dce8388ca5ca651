//! The cores of the gateway of a virtual run: one for each pool, as a live gateway has them.
//!
//! Every core knows every engine under the engine's own number; those of other pools are absent from it.

use std::sync::Arc;

use gateway::core::config::GatewayConfig;
use gateway::core::gateway::{EndpointChange, Gateway, Input, Output, RequestKey};
use gateway::core::pool::{EndpointConfig, EndpointId};
use gateway::core::pools::{PoolId, PoolTable};
use gateway::core::request::Rejection;
use gateway::core::rewrite::Rewrites;
use gateway::spans::{GatewayFact, bounded_name};
use shared::rng::Seed;
use shared::time::{Stopped, Time};

use super::world::World;

/// The pools of the gateway.
pub(super) struct Pools {
    pub(super) table: PoolTable,
    pools: Vec<Pool>,
    /// The pool of each engine.
    engines: Vec<PoolId>,
}

struct Pool {
    core: Gateway,
    config: GatewayConfig,
    /// When the core is looked at next.
    due: Option<Time>,
}

impl Pools {
    /// The pools of a gateway that knows these engines.
    pub(super) fn new(config: &GatewayConfig, engines: &[EndpointConfig], seed: Seed) -> Pools {
        let table = PoolTable::new(config);
        let of = |engine: &EndpointConfig| table.of_labels(engine.labels()).expect("a pool selects every engine");
        let of_engines: Vec<PoolId> = engines.iter().map(of).collect();
        let ids = (0..).map(PoolId);
        let pools = config.pool_configs().into_iter().zip(ids).map(|(config, id)| {
            let mut core = Gateway::new(config.clone(), engines.to_vec(), id.seed(seed));
            for (engine, _) in of_engines.iter().enumerate().filter(|(_, of)| **of != id) {
                let absent = Input::Endpoint(EndpointChange::Draining(EndpointId(engine as u32)));
                core.handle(Time::ZERO, absent, &mut Stopped(Time::ZERO), &mut Vec::new());
            }
            Pool { core, config, due: None }
        });
        Pools { pools: pools.collect(), table, engines: of_engines }
    }

    /// The core of a pool.
    pub(super) fn core(&self, pool: PoolId) -> &Gateway {
        &self.pools[pool.index()].core
    }

    /// The core of a pool.
    pub(super) fn core_mut(&mut self, pool: PoolId) -> &mut Gateway {
        &mut self.pools[pool.index()].core
    }

    /// The gateway's configuration as it is for a pool.
    pub(super) fn config(&self, pool: PoolId) -> &GatewayConfig {
        &self.pools[pool.index()].config
    }

    /// When the core of a pool is looked at next.
    pub(super) fn due(&mut self, pool: PoolId) -> &mut Option<Time> {
        &mut self.pools[pool.index()].due
    }

    /// The pool of an engine.
    pub(super) fn of_engine(&self, engine: usize) -> PoolId {
        self.engines[engine]
    }

    /// What every core knows of an engine.
    pub(super) fn endpoint(&self, engine: usize) -> &EndpointConfig {
        &self.pools[0].core.endpoints()[engine].config
    }

    /// Which models requests are sent to, whatever their pool will be.
    pub(super) fn rewrites(&self) -> Arc<Rewrites> {
        self.pools[0].core.rewrites()
    }
}

impl World<'_> {
    /// No pool has the model: the request is answered at once.
    pub(super) fn unknown_model(&mut self, slot: usize, at: Time) {
        let flight = self.flight(slot);
        flight.trail.annotate(at, || GatewayFact::Parsed {
            id: flight.id.clone(),
            model: bounded_name(&flight.model),
            size_bytes: flight.body_bytes,
            priority: 0,
            streaming: flight.plan.streaming,
        });
        let (key, rejection) = (RequestKey(slot as u64), Rejection::UnknownModel);
        self.decide(slot, at, Output::Reject { key, rejection });
    }
}
