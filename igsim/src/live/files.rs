//! Open files of a live run: where client, gateway and engines are one process, every request in flight is four sockets.

use shared::open_files::OpenFiles;

use crate::scenario::{Arrivals, Scenario};

/// Sockets of a request in flight: client to gateway and gateway to engine, both ends of each.
const PER_REQUEST: u64 = 4;
/// Sockets of an engine: its listener and both ends of the connection that is scraped.
const PER_ENGINE: u64 = 3;
/// Standard streams, trace and result files, the runtime's own, connections to collectors.
const AROUND: u64 = 64;

/// Raises the limit of open files as far as it goes, and says so if that is not enough for what is known to come.
pub(super) fn raise(needed: u64) {
    if let Some(missing) = OpenFiles::raise().missing(needed) {
        eprintln!("warning: {missing}");
    }
}

/// How many files client, gateway and engines of the scenario need at least.
pub(super) fn of_all(scenario: &Scenario) -> u64 {
    AROUND + PER_ENGINE * u64::from(scenario.engine_count()) + PER_REQUEST * clients(scenario)
}

/// How many the client alone needs.
pub(super) fn of_client(scenario: &Scenario) -> u64 {
    AROUND + clients(scenario)
}

/// Requests that will be in flight at least. Of an open loop it is not known how many.
fn clients(scenario: &Scenario) -> u64 {
    match scenario.workload.arrivals {
        Some(Arrivals::Closed { concurrency, .. }) => u64::from(concurrency),
        Some(
            Arrivals::Poisson { .. }
            | Arrivals::Gamma { .. }
            | Arrivals::Constant { .. }
            | Arrivals::Steps { .. }
            | Arrivals::Replay {},
        )
        | None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_loop_says_how_many_files_it_needs() {
        let check = |arrivals: &str, expect: (u64, u64)| {
            let text = format!("{{name: s, requests: 1, engines: [{{count: 2}}], workload: {{arrivals: {arrivals}}}}}");
            let scenario = shared::config::load_str::<Scenario>("s", &text, &[]).unwrap().config;
            assert_eq!((of_all(&scenario), of_client(&scenario)), expect, "{arrivals}");
        };
        check("{process: closed, concurrency: 10000}", (40_070, 10_064));
        check("{process: poisson, rate: 5}", (70, 64));
    }
}
