//! How fast the CPUs are right now. What shares a physical core with a virtual one slows it down by a fifth without a trace in its
//! steal time: a fixed piece of work, timed before and after a block, shows it, whatever the block did.

use std::hint::black_box;

use shared::rng::mix64;

use super::{cpu, place};

/// A block between whose probes a CPU was so much slower than usual is repeated, as a share.
pub const MAX_SLOWDOWN: f64 = 0.08;

/// Steps of the fixed work: about half a millisecond.
const STEPS: u64 = 100_000;
/// The best of so many repetitions counts, so that an interrupt is not taken for a slow CPU.
const REPETITIONS: usize = 3;
/// Readings that "usual" is the median of; before there are as many nothing is slow.
const USUAL: usize = 8;

/// Times the fixed work on each CPU.
#[derive(Debug)]
pub struct Probe {
    cpus: Vec<usize>,
    /// Readings so far, a list for each CPU.
    readings: Vec<Vec<f64>>,
}

impl Probe {
    /// Of `cpus`.
    pub fn new(cpus: Vec<usize>) -> Probe {
        Probe { readings: vec![Vec::new(); cpus.len()], cpus }
    }

    /// By how much the slowest CPU is slower than usual, as a share; 0 as long as nothing is usual.
    pub fn slowdown(&mut self) -> f64 {
        let cpus = self.cpus.clone();
        let now = cpus.into_iter().map(|cpu| std::thread::spawn(move || time_on(cpu)).join().unwrap_or(None));
        self.note(&now.collect::<Vec<_>>())
    }

    fn note(&mut self, now: &[Option<f64>]) -> f64 {
        let mut slowdown = 0.0f64;
        for (readings, now) in self.readings.iter_mut().zip(now) {
            let Some(now) = now else { continue };
            let place = readings.partition_point(|r| r < now);
            readings.insert(place, *now);
            if readings.len() >= USUAL {
                slowdown = slowdown.max(now / readings[readings.len() / 2] - 1.0);
            }
        }
        slowdown
    }
}

/// CPU time of the fixed work on a CPU, in nanoseconds; nothing if it cannot be used.
fn time_on(cpu: usize) -> Option<f64> {
    place::run_on(&[cpu]).ok()?;
    let once = |_| {
        let before = cpu::of_this_thread();
        black_box((0..STEPS).fold(black_box(1), |n, _| mix64(n)));
        (cpu::of_this_thread() - before) as f64
    };
    (0..REPETITIONS).map(once).reduce(f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_slow_against_its_own_usual_time() {
        let mut probe = Probe::new(vec![0, 1]);
        for _ in 0..USUAL {
            probe.note(&[Some(500.0), Some(700.0)]);
        }
        assert!(probe.note(&[Some(510.0), Some(700.0)]) < MAX_SLOWDOWN);
        assert!((probe.note(&[Some(500.0), Some(840.0)]) - 0.2).abs() < 1e-9);
        assert_eq!(probe.note(&[None, None]), 0.0);
    }

    #[test]
    fn little_is_known_at_first() {
        let mut probe = Probe::new(vec![0]);
        assert_eq!((probe.note(&[Some(100.0)]), probe.note(&[Some(900.0)])), (0.0, 0.0));
    }
}
