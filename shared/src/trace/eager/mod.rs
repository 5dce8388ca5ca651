//! The eager recorder: every fact at once as calls of the OpenTelemetry SDK, as a careful component instrumented with it does.
//!
//! A service instance has an `SdkTracerProvider` with the SDK's own batch processor and, for a collector, the exporter of
//! opentelemetry-otlp; sampling, propagation and the life of spans are the SDK's. Ours are the times, the ids and the counts.
//! What such a component would not do either is left out: no global tracer, no thread-local current span, attributes only
//! for spans that are recorded. Knows nothing of records and of the worker that folds them.

mod form;
mod outlet;
mod sampler;
mod slot;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfig, BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, ShouldSample, Span, SpanData,
    SpanProcessor, TracerProviderBuilder,
};

use crate::ids::InstanceId;
use crate::time::{Anchor, Dur};
use crate::trace::config::TelemetryConfig;
use crate::trace::exporter::sdk;
use crate::trace::otlp_json::SCOPE_NAME;
use crate::trace::pipeline::TelemetryError;
use crate::trace::resource::Resource;
use crate::trace::sampler::Sampler;
use crate::trace::stats::{Counters, ExporterCounters, Loss};
use crate::trace::worker::Resources;

use outlet::Destination;
use sampler::{LiveSampler, PresetIds, Switch};

pub(crate) use form::{Sdk, extract, inject};
pub(crate) use slot::{EagerSlot, Opening, open};

/// The most service instances that export: each has a thread of its own for every exporter.
const MAX_INSTANCES: usize = 64;

/// The SDK's tracers of a process and where their spans go.
pub(crate) struct Eager {
    destinations: Vec<Destination>,
    providers: Mutex<Vec<SdkTracerProvider>>,
    batchers: Mutex<Vec<Batcher>>,
    switch: Arc<Switch>,
    max_queue: usize,
    max_batch: usize,
    schedule_delay: Dur,
    anchor: Anchor,
    counters: Arc<Counters>,
}

/// The SDK's tracer of one service instance.
pub(crate) struct Service {
    tracer: SdkTracer,
    anchor: Anchor,
    instance: InstanceId,
    counters: Arc<Counters>,
}

impl Eager {
    /// Prepares the exporters; tracers come one by one with their instances.
    pub(crate) fn new(
        config: &TelemetryConfig,
        anchor: Anchor,
        counters: Arc<Counters>,
        resources: &Arc<Resources>,
    ) -> Result<Eager, TelemetryError> {
        let destination = |exporter| Destination::new(exporter, config, anchor, Arc::clone(resources));
        Ok(Eager {
            destinations: config.exporters.iter().map(destination).collect::<Result<_, _>>()?,
            providers: Mutex::default(),
            batchers: Mutex::default(),
            switch: Arc::new(Switch::new(&config.sampler)),
            max_queue: config.max_queue.max(1),
            max_batch: config.max_batch.max(1),
            schedule_delay: config.schedule_delay,
            anchor,
            counters,
        })
    }

    /// The counts of the exporters, in the order of the configuration.
    pub(crate) fn exporters(&self) -> Vec<Arc<ExporterCounters>> {
        self.destinations.iter().map(|d| Arc::clone(d.counters())).collect()
    }

    /// The tracer of a service instance, and the processors that its spans go through.
    pub(crate) fn service(&self, resource: &Resource, instance: InstanceId) -> (Arc<Service>, Vec<Batcher>) {
        let mut builder = self.provider(resource, LiveSampler::new(Arc::clone(&self.switch)));
        let mut batchers = Vec::new();
        for destination in &self.destinations {
            if usize::from(instance.0) >= MAX_INSTANCES {
                let why = format!("more than {MAX_INSTANCES} service instances: use the deferred recorder");
                // Without a thread: there may be thousands of them.
                builder = builder.with_simple_exporter(destination.broken(why));
                continue;
            }
            let outlet = destination.outlet(resource, instance);
            let processor = BatchSpanProcessor::builder(outlet).with_batch_config(self.batching()).build();
            let batcher = Batcher(Arc::new(processor));
            self.batchers().push(batcher.clone());
            builder = builder.with_span_processor(batcher.clone());
            batchers.push(batcher);
        }
        let provider = builder.build();
        let service = self.traced_by(&provider, instance);
        lock(&self.providers).push(provider);
        (service, batchers)
    }

    /// The tracer for traces that no request causes, of which its owner starts only those that are kept: a provider with a sampler
    /// of its own in front of the same processors.
    pub(crate) fn own_service(&self, resource: &Resource, instance: InstanceId, lent: &[Batcher]) -> Arc<Service> {
        let builder = self.provider(resource, opentelemetry_sdk::trace::Sampler::AlwaysOn);
        let builder = lent.iter().fold(builder, |b, batcher| b.with_span_processor(Lent(batcher.clone())));
        self.traced_by(&builder.build(), instance)
    }

    fn provider(&self, resource: &Resource, sampler: impl ShouldSample + 'static) -> TracerProviderBuilder {
        let builder = SdkTracerProvider::builder().with_resource(sdk::resource(resource));
        builder.with_sampler(sampler).with_id_generator(PresetIds::default())
    }

    fn traced_by(&self, provider: &SdkTracerProvider, instance: InstanceId) -> Arc<Service> {
        let scope = InstrumentationScope::builder(SCOPE_NAME).with_version(env!("CARGO_PKG_VERSION")).build();
        let (tracer, counters) = (provider.tracer_with_scope(scope), Arc::clone(&self.counters));
        Arc::new(Service { tracer, anchor: self.anchor, instance, counters })
    }

    fn batching(&self) -> BatchConfig {
        let config = BatchConfigBuilder::default().with_scheduled_delay(self.schedule_delay.to_std());
        config.with_max_queue_size(self.max_queue).with_max_export_batch_size(self.max_batch).build()
    }

    /// Exchanges the sampler of requests that begin from now on.
    pub(crate) fn set_sampler(&self, sampler: &Sampler) {
        self.switch.set(sampler);
    }

    /// Exports what has ended so far; false if `timeout` ends first. Waits on the calling thread.
    pub(crate) fn flush(&self, timeout: Dur) -> bool {
        let before = self.counters.spans.get();
        let given_up = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&given_up);
        // The SDK waits 5 s for an export, whatever its caller would wait.
        let clean = side_by_side(self.batchers().clone(), timeout, move |batcher| {
            loop {
                match batcher.0.force_flush() {
                    Err(OTelSdkError::Timeout(_)) if told.load(Ordering::Relaxed) => return false,
                    Err(OTelSdkError::Timeout(_)) => {}
                    // Spans whose export failed are settled too.
                    Ok(()) | Err(OTelSdkError::InternalFailure(_) | OTelSdkError::AlreadyShutdown) => return true,
                }
            }
        });
        given_up.store(true, Ordering::Relaxed);
        // Nothing is on its way now, so what is missing never got into a queue.
        if clean && self.counters.spans.get() == before {
            self.destinations.iter().for_each(|d| d.account(before, Loss::QueueFull));
        }
        clean
    }

    /// Exports what is left within `timeout` and counts what was lost. Later spans are not recorded.
    pub(crate) fn stop(&self, timeout: Dur) {
        let providers = std::mem::take(&mut *lock(&self.providers));
        let bound = timeout.to_std();
        let shut = move |provider: SdkTracerProvider| provider.shutdown_with_timeout(bound).is_ok();
        // A little longer than the processors give themselves.
        let clean = side_by_side(providers, timeout + Dur::from_millis(500), shut);
        let created = self.counters.spans.get();
        for destination in &self.destinations {
            destination.close(timeout);
            destination.account(created, if clean { Loss::QueueFull } else { Loss::Shutdown });
        }
    }

    fn batchers(&self) -> MutexGuard<'_, Vec<Batcher>> {
        lock(&self.batchers)
    }
}

/// A batch processor that is also at hand for flushes: a provider's own does not tell a timeout from a failure.
#[derive(Clone, Debug)]
pub(crate) struct Batcher(Arc<BatchSpanProcessor>);

impl SpanProcessor for Batcher {
    fn on_start(&self, _: &mut Span, _: &Context) {}
    fn on_end(&self, span: SpanData) {
        self.0.on_end(span);
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }
}

/// A batch processor of another provider, which also ends it.
#[derive(Debug)]
struct Lent(Batcher);

impl SpanProcessor for Lent {
    fn on_start(&self, _: &mut Span, _: &Context) {}
    fn on_end(&self, span: SpanData) {
        self.0.on_end(span);
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }
    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Does `work` for all items at once; whether all of it was done well and within `patience`.
fn side_by_side<T: Send + 'static>(
    items: Vec<T>,
    patience: Dur,
    work: impl Fn(T) -> bool + Send + Sync + 'static,
) -> bool {
    let (done, wait) = crossbeam_channel::bounded(1);
    let all = move || {
        let good = std::thread::scope(|scope| {
            let work = &work;
            let all = items.len();
            let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
            // Every thread is joined, good or not.
            threads.into_iter().filter_map(|thread| thread.join().ok()).filter(|good| *good).count() == all
        });
        let _ = done.send(good);
    };
    let spawned = std::thread::Builder::new().name("telemetry-flush".to_owned()).spawn(all);
    spawned.is_ok() && wait.recv_timeout(patience.to_std()).unwrap_or(false)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
