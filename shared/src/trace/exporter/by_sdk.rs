//! Batches through the SDK's OTLP exporters: one for each service instance, those of a batch side by side.

use std::collections::BTreeMap;
use std::sync::Arc;

use opentelemetry_sdk::trace::SpanData;
use tokio::task::JoinSet;

use crate::ids::InstanceId;
use crate::time::Dur;
use crate::trace::exporter::otlp::{Books, Settle};
use crate::trace::exporter::transport::{Connection, InstanceExporter, Transport};
use crate::trace::exporter::{Batch, sdk};
use crate::trace::span::Span;

/// The most service instances of one exporter that the SDK encodes for: each has an SDK exporter of its own.
pub const MAX_INSTANCES: usize = 64;

/// The exporters of the instances seen so far.
pub(super) struct BySdk {
    transport: Transport,
    connection: Connection,
    instances: BTreeMap<InstanceId, Arc<InstanceExporter>>,
    books: Books,
}

impl BySdk {
    /// To be called inside the runtime that will drive the connection.
    pub(super) fn new(transport: Transport, books: Books) -> BySdk {
        let connection = transport.connect();
        BySdk { transport, connection, instances: BTreeMap::new(), books }
    }

    /// Sends the spans of each service instance; all are settled at the end.
    pub(super) async fn export(&mut self, batch: &Batch) {
        let mut groups: BTreeMap<InstanceId, Vec<&Span>> = BTreeMap::new();
        for span in &batch.spans {
            groups.entry(span.instance).or_default().push(span);
        }
        let mut running = JoinSet::new();
        for (instance, spans) in groups {
            let settle = self.books.open(spans.len());
            match self.instance(instance, batch) {
                Ok(exporter) => {
                    let skew = batch.resources.get(usize::from(instance.0)).map_or(0, |r| r.clock_skew_ns);
                    let anchor = batch.anchor.shifted(skew);
                    let data = spans.iter().map(|s| sdk::span_data(s, anchor)).collect();
                    running.spawn(export_one(exporter, data, self.transport.timeout(), settle));
                }
                Err(why) => settle.failed(why),
            }
        }
        // Dropping the set, when the time is up, aborts what is under way.
        while running.join_next().await.is_some() {}
    }

    fn instance(&mut self, instance: InstanceId, batch: &Batch) -> Result<Arc<InstanceExporter>, String> {
        if let Some(exporter) = self.instances.get(&instance) {
            return Ok(Arc::clone(exporter));
        }
        if self.instances.len() >= MAX_INSTANCES {
            return Err(format!(
                "more than {MAX_INSTANCES} service instances: use the file exporter and send the file"
            ));
        }
        let resource = batch.resources.get(usize::from(instance.0)).ok_or("a span without a resource")?;
        let exporter = Arc::new(self.transport.exporter(&self.connection, resource, &self.books.counters)?);
        self.instances.insert(instance, Arc::clone(&exporter));
        Ok(exporter)
    }
}

async fn export_one(exporter: Arc<InstanceExporter>, data: Vec<SpanData>, timeout: Dur, settle: Settle) {
    match tokio::time::timeout(timeout.to_std(), exporter.export(data)).await {
        Ok(Ok(rejected)) => settle.done(rejected),
        Ok(Err(why)) => settle.failed(why),
        Err(_) => settle.failed(exporter.trouble().unwrap_or_else(|| format!("no answer within {timeout}"))),
    }
}
