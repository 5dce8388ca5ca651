//! Progress on standard error: a bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use shared::time::{Dur, Time};

use crate::report::Summary;

/// Progress of a run.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    total: Option<u64>,
    last_line: Time,
    last_draw: Time,
    quiet: bool,
}

/// Between plain lines.
const LINE_EVERY: Dur = Dur::from_secs(5);
/// Between redraws of the bar.
const DRAW_EVERY: Dur = Dur::from_millis(100);

impl Progress {
    /// Progress towards `total` requests, if that many are known.
    pub fn new(total: Option<u64>, quiet: bool) -> Progress {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let bar = (terminal && !quiet).then(|| {
            let bar = match total {
                Some(n) => ProgressBar::new(n),
                None => ProgressBar::no_length(),
            };
            let template =
                if total.is_some() { "{bar:30.##-} {pos}/{len} requests  {msg}" } else { "{pos} requests  {msg}" };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
            bar
        });
        Progress { bar, total, last_line: Time::ZERO, last_draw: Time::ZERO, quiet }
    }

    /// Shows how far the run is. `wall` is time on the real clock since the start, whatever the mode.
    pub fn show(&mut self, wall: Time, summary: &Summary) {
        let every = if self.bar.is_some() { DRAW_EVERY } else { LINE_EVERY };
        let last = if self.bar.is_some() { &mut self.last_draw } else { &mut self.last_line };
        if self.quiet || wall.since(*last) < every {
            return;
        }
        *last = wall;
        let (done, errors) = summary.progress();
        let message = format!("{:.1} s  p50 TTFT {:.0} ms  errors {errors}", wall.as_secs_f64(), summary.ttft_p50_ms());
        match (&self.bar, self.total) {
            (Some(bar), _) => {
                bar.set_position(done);
                bar.set_message(message);
            }
            (None, Some(total)) => eprintln!("{done}/{total} requests  {message}"),
            (None, None) => eprintln!("{done} requests  {message}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
