//! Metrics to collectors at an interval: one thread, which asks for them, encodes and sends; a collector that is absent, slow or refuses
//! costs what it would have got, and nobody waits for it but this thread.

use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::clock::RunClock;
use crate::metrics::{Source, otlp};
use crate::time::Dur;
use crate::trace::TelemetryError;
use crate::trace::config::{MetricsConfig, Signal};
use crate::trace::exporter::direct::Sender;
use crate::trace::exporter::transport::Transport;
use crate::trace::resource::Resource;
use crate::trace::stats::{ExporterCounters, ExporterStats, Loss};

/// Pushes the metrics of a service until it is stopped; dropping it stops it too.
#[derive(Debug)]
pub struct Pusher {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread is done.
    done: crossbeam_channel::Receiver<()>,
    counters: Vec<Arc<ExporterCounters>>,
    flush_timeout: Dur,
}

impl Pusher {
    /// Starts pushing what `source` gives, for `resource`; `None` if the configuration names no collector. `clock` began with the
    /// counting.
    ///
    /// # Errors
    /// If a collector's configuration cannot be used or there is no thread; a collector that does not answer is no error.
    pub fn start(
        config: &MetricsConfig,
        mut resource: Resource,
        clock: RunClock,
        source: Source,
    ) -> Result<Option<Pusher>, TelemetryError> {
        if config.otlp.is_empty() {
            return Ok(None);
        }
        resource.add_missing(&config.resource_attributes);
        let (mut ways, mut counters) = (Vec::new(), Vec::new());
        for otlp in &config.otlp {
            let fail = |why: String| TelemetryError::Exporter(format!("otlp metrics {}: {why}", otlp.address()));
            let transport = Transport::new(otlp, otlp.timeout).map_err(fail)?.carrying(Signal::Metrics);
            let name = format!("otlp metrics {} {}", otlp.protocol, otlp.address());
            let counted = Arc::new(ExporterCounters::new(name, true));
            counters.push(Arc::clone(&counted));
            ways.push((transport, counted));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(TelemetryError::Thread)?;
        let (stop, stopped) = oneshot::channel();
        let (finished, done) = crossbeam_channel::bounded(0);
        let interval = config.interval;
        let work = move || {
            runtime.block_on(async move {
                let senders: Vec<_> = ways.iter().map(|(t, c)| Arc::new((Sender::new(t, c), Arc::clone(c)))).collect();
                push(&senders, interval, stopped, &resource, clock, &source).await;
            });
            // A name lookup that hangs must not hold the thread.
            runtime.shutdown_background();
            drop(finished);
        };
        let thread = std::thread::Builder::new().name("metrics-otlp".to_owned()).spawn(work);
        let thread = Some(thread.map_err(TelemetryError::Thread)?);
        Ok(Some(Pusher { stop: Some(stop), thread, done, counters, flush_timeout: config.flush_timeout }))
    }

    /// Pushes once more, waits for that at most as long as the flush timeout, and says what became of the series: exported and dropped
    /// count series, not spans.
    pub fn stop(mut self) -> Vec<ExporterStats> {
        self.end();
        self.counters.iter().map(|c| c.stats()).collect()
    }

    fn end(&mut self) {
        self.stop = None;
        let wait = self.done.recv_timeout(self.flush_timeout.to_std());
        let ended = matches!(wait, Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            let _ = thread.join();
        }
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

type Way = (Sender, Arc<ExporterCounters>);

/// Pushes at every interval, and once when `stopped` says so.
async fn push(
    senders: &[Arc<Way>],
    interval: Dur,
    mut stopped: oneshot::Receiver<()>,
    resource: &Resource,
    clock: RunClock,
    source: &Source,
) {
    loop {
        let over = tokio::select! {
            _ = &mut stopped => true,
            () = tokio::time::sleep(interval.to_std()) => false,
        };
        let families = source();
        let series = otlp::points(&families);
        let request = Bytes::from(otlp::encode(&families, resource, clock.anchor(), clock.now()));
        // Side by side, so that a slow collector does not hold up the others.
        let mut sending = JoinSet::new();
        for way in senders {
            sending.spawn(send(Arc::clone(way), request.clone(), series));
        }
        while sending.join_next().await.is_some() {}
        if over {
            return;
        }
    }
}

async fn send(way: Arc<Way>, request: Bytes, series: usize) {
    let (sender, counters) = &*way;
    match sender.send(request).await {
        Ok(rejected) => {
            let rejected = rejected.min(series);
            counters.exported(series - rejected);
            counters.lost(Loss::ExportFailed, rejected);
        }
        Err(why) => {
            counters.lost(Loss::ExportFailed, series);
            counters.error(why);
        }
    }
}
