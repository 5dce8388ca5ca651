//! Engines that join the pool or are drained while a virtual run goes on.
//!
//! Every engine of the scenario has its place in the gateway's pool from the start, in the order of the groups: one that joins later is
//! absent until then.

use gateway::core::gateway::{EndpointChange, Input};
use gateway::core::pool::EndpointId;
use shared::time::Time;

use super::event::Event;
use super::world::World;

/// What happens to the membership of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The gateway learns of it.
    Joins,
    /// The gateway sends nothing new to it.
    Drains,
}

impl World<'_> {
    /// Takes those out that join later, and plans what is to come.
    pub(super) fn first_members(&mut self) {
        let mut first = 0;
        for group in &self.scenario.engines {
            let engines = first..first + group.count as usize;
            first = engines.end;
            for engine in engines {
                if let Some(at) = group.joins_at {
                    self.machines[engine].member = false;
                    self.tell_change(EndpointChange::Draining(id(engine)));
                    self.push(Time::ZERO + at.get(), Event::Membership(engine, Change::Joins));
                }
                if let Some(at) = group.drains_at {
                    self.push(Time::ZERO + at.get(), Event::Membership(engine, Change::Drains));
                }
            }
        }
    }

    pub(super) fn membership(&mut self, engine: usize, change: Change) {
        match change {
            Change::Joins => {
                self.machines[engine].member = true;
                self.tell_change(EndpointChange::Restarted(id(engine)));
                // It gets requests once it has answered.
                self.push(self.now, Event::Scrape(engine));
            }
            Change::Drains => {
                self.machines[engine].member = false;
                self.tell_change(EndpointChange::Draining(id(engine)));
            }
        }
    }

    fn tell_change(&mut self, change: EndpointChange) {
        self.tell(Input::Endpoint(change));
    }
}

const fn id(engine: usize) -> EndpointId {
    EndpointId(engine as u32)
}
