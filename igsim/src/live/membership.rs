//! Engines that join the gateway's pool or are drained while a live run goes on.

use gateway::server::{Backend, Endpoints};
use shared::clock::RunClock;
use shared::time::{Dur, Time};

/// What happens to the membership of an engine, and when.
pub(super) enum Change {
    Joins(Dur, Backend),
    Drains(Dur, String),
}

impl Change {
    const fn at(&self) -> Dur {
        match self {
            Change::Joins(at, _) | Change::Drains(at, _) => *at,
        }
    }
}

/// Does what is planned when it is due, in tasks of their own; what is not due by the end of the run does not happen.
pub(super) fn plan(changes: Vec<Change>, endpoints: &Endpoints, clock: RunClock) {
    for change in changes {
        let endpoints = endpoints.clone();
        tokio::spawn(async move {
            tokio::time::sleep_until(clock.instant(Time::ZERO + change.at()).into()).await;
            match change {
                Change::Joins(_, backend) => {
                    if let Err(error) = endpoints.join(backend) {
                        tracing::error!(%error, "an engine cannot join");
                    }
                }
                Change::Drains(_, name) => {
                    endpoints.drain(&name);
                }
            }
        });
    }
}
