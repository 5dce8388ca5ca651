//! The stages of the telemetry path: what a request pays, and what the worker pays behind its back.

use benches::stages::STAGES;
use benches::{candidates, eager};
use criterion::{Criterion, criterion_group, criterion_main};

fn stages(c: &mut Criterion) {
    for stage in STAGES.iter().chain(eager::STAGES).chain(candidates::STAGES) {
        let mut work = (stage.prepare)();
        c.bench_function(stage.name, |b| b.iter(&mut work));
    }
}

criterion_group!(benches, stages);
criterion_main!(benches);
