//! Progress of the lab on standard error.

use std::io::IsTerminal;

use shared::clock::RunClock;
use shared::time::{Dur, Time};

use crate::overhead::lab::Progress;
use crate::overhead::model::{Block, Setting};
use crate::overhead::soak::Glance;

/// Progress on standard error: one line that is written over on a terminal, a line now and then otherwise.
pub(super) struct Lines {
    terminal: bool,
    clock: RunClock,
    said: Time,
}

/// Between lines where nothing is written over.
const LINE_EVERY: Dur = Dur::from_secs(20);

impl Lines {
    pub(super) fn new() -> Lines {
        Lines { terminal: std::io::stderr().is_terminal(), clock: RunClock::start(), said: Time::ZERO }
    }
}

impl Lines {
    /// Whether a line is due, and what begins and ends it.
    fn due(&mut self) -> Option<(&'static str, &'static str)> {
        if self.terminal {
            return Some(("\r\x1b[K", ""));
        }
        let now = self.clock.now();
        let due = now.since(self.said) >= LINE_EVERY;
        self.said = if due { now } else { self.said };
        due.then_some(("", "\n"))
    }

    /// Tells how a soak goes.
    pub(super) fn glance(&mut self, glance: &Glance) {
        let Glance { elapsed, ended, failed, gateway_kib, engine_kib } = glance;
        if let Some((start, end)) = self.due() {
            let seconds = elapsed.as_secs_f64();
            let memory = format!("gateway {:.1} MiB, engines {:.1} MiB", mib(*gateway_kib), mib(*engine_kib));
            eprint!("{start}{seconds:.0} s: {ended} requests ended, {failed} failed; {memory}{end}");
        }
    }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

impl Progress for Lines {
    fn regime(&mut self, setting: &Setting) {
        let Setting { regime, requests, load, placement, schedule_delay_ms, .. } = setting;
        let name = regime.name();
        eprintln!(
            "{name}: {load}; {requests} requests a block; {placement}; spans wait at most {schedule_delay_ms} ms"
        );
    }

    fn block(&mut self, block: &Block, rounds: u32, last: bool) {
        let (name, arm, round) = (block.regime.name(), &block.arm, block.round + 1);
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        if block.failed > 0 {
            eprintln!("{clear}{name}: round {round}: {arm}: {} requests failed", block.failed);
        }
        if last {
            eprint!("{clear}");
        } else if let Some((start, end)) = self.due() {
            let (p50, cpu) = (block.e2e.p50, block.cpu.gateway());
            eprint!(
                "{start}{name}: round {round} of {rounds}: {arm}: p50 {p50:.0} us, gateway CPU {cpu:.0} us a request{end}"
            );
        }
    }
}
