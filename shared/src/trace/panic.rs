//! What becomes of open records when a process ends in a panic.

use crate::trace::pipeline::Telemetry;

/// Has open records folded and sent before a panic of one of these threads, by name, ends the process. A panic in a request's task ends
/// that request only, and its record with it, so tasks' threads are none of them.
pub fn fold_on_panic(telemetry: &Telemetry, threads: &'static [&'static str]) {
    let fold = telemetry.on_panic();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        if std::thread::current().name().is_some_and(|name| threads.contains(&name)) {
            fold();
        }
    }));
}
