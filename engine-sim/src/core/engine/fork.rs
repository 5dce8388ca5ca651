//! A copy of an engine, to see what would become of a request.

use shared::time::Time;
use shared::trace::Trail;

use super::{Engine, Input, NewRequest, Open};
use crate::core::engine::steps::Steps;

impl Engine {
    /// An engine in the same state, of which nothing is recorded or published: what happens to one leaves the other alone. What goes wrong
    /// now goes on in the copy, nothing new goes wrong.
    ///
    /// Takes memory and time in proportion to the KV cache and the open requests.
    pub fn fork(&self) -> Engine {
        Engine {
            config: self.config.clone(),
            profile: self.profile.clone(),
            scheduler: self.scheduler.clone(),
            open: self.open.iter().map(|open| open.as_ref().map(Open::unrecorded)).collect(),
            by_key: self.by_key.clone(),
            inbox: self.inbox.iter().map(unrecorded).collect(),
            outbox: self.outbox.clone(),
            plan: self.plan,
            in_flight: self.in_flight.clone(),
            run: self.run,
            gpu_free: self.gpu_free,
            core_time: self.core_time,
            taken: self.taken,
            metrics: self.metrics.clone(),
            kv_events: None,
            reported: self.reported,
            quiet: self.quiet,
            kv: self.kv.clone(),
            received: self.received.clone(),
            model: self.model.clone(),
            steps: Steps::default(),
            backlog: self.backlog,
            families: self.families.clone(),
            controlled: self.controlled.clone(),
            faults: self.faults.as_ref().map(|faults| Box::new(faults.under_way())),
        }
    }
}

impl Open {
    fn unrecorded(&self) -> Open {
        Open { trail: Trail::off(), ..self.clone() }
    }
}

fn unrecorded((at, input): &(Time, Input)) -> (Time, Input) {
    let input = match input {
        Input::Add(request) => {
            let request = NewRequest { trail: Trail::off(), ..NewRequest::clone(request) };
            Input::Add(Box::new(request))
        }
        Input::Abort(_) | Input::Kv(_) => input.clone(),
    };
    (*at, input)
}

#[cfg(test)]
mod tests {
    use shared::time::Dur;

    use crate::core::config::EngineConfig;
    use crate::core::engine::tests::{engine, request, run_to_idle, table};
    use crate::core::engine::{Engine, Input};

    use super::*;

    fn add(engine: &mut Engine, key: u64, at: Time) {
        let request = request(engine.config(), key, 300, 20, at);
        engine.handle(at, Input::Add(Box::new(request)));
    }

    /// An engine with requests waiting, running and on their way.
    fn busy() -> Engine {
        let mut config = EngineConfig::default();
        (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) = (4, 512);
        let mut engine = engine(config);
        (0..9).for_each(|key| add(&mut engine, key, Time::ZERO + Dur::from_millis(key * 3)));
        let mut out = Vec::new();
        for _ in 0..25 {
            let at = engine.next_wakeup().expect("there is work");
            engine.advance(at, &mut out);
        }
        engine
    }

    #[test]
    fn a_copy_has_the_same_future() {
        let mut engine = busy();
        let mut copy = engine.fork();
        assert_eq!(copy.next_wakeup(), engine.next_wakeup());
        let at = engine.core_time() + Dur::from_millis(1);
        [&mut engine, &mut copy].into_iter().for_each(|e| add(e, 99, at));
        let (future, same) = (table(&run_to_idle(&mut engine)), table(&run_to_idle(&mut copy)));
        assert!(future.contains("99 length"), "{future}");
        assert_eq!(future, same);
    }

    #[test]
    fn what_happens_to_a_copy_leaves_the_engine_alone() {
        let (mut left, mut right) = (busy(), busy());
        let mut copy = left.fork();
        let at = copy.core_time() + Dur::from_millis(1);
        (100..120).for_each(|key| add(&mut copy, key, at));
        run_to_idle(&mut copy);
        assert_eq!(table(&run_to_idle(&mut left)), table(&run_to_idle(&mut right)));
    }
}
