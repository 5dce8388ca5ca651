//! Ctrl-C and SIGTERM: the first ends a run cleanly, the second at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Whether the user wants the run to end.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<State>);

#[derive(Debug, Default)]
struct State {
    raised: AtomicBool,
    notify: Notify,
}

impl Interrupt {
    /// Starts listening, on a thread of its own. Where signals cannot be caught the default action stays.
    pub fn listen() -> Interrupt {
        let interrupt = Interrupt::default();
        let theirs = interrupt.clone();
        let thread = std::thread::Builder::new().name("signals".into());
        if let Err(error) = thread.spawn(move || theirs.run()) {
            tracing::warn!(%error, "signals are not caught");
        }
        interrupt
    }

    fn run(&self) {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if self.is_raised() {
                    // 128 and the number of SIGINT, as shells have it.
                    std::process::exit(130);
                }
                eprintln!("stopping: requests in flight are finished first; again to stop at once");
                self.raise();
            }
        });
    }

    /// Asks for the end.
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
        self.0.notify.notify_waiters();
    }

    /// Whether the end was asked for.
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    /// Waits for it.
    pub async fn raised(&self) {
        let waiting = self.0.notify.notified();
        tokio::pin!(waiting);
        waiting.as_mut().enable();
        if !self.is_raised() {
            waiting.await;
        }
    }
}
