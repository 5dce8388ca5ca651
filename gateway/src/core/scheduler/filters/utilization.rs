//! `utilization-filter`: endpoints below caps on what they report or were sent; an endpoint goes when one metric is above its cap.
//! Endpoints without metrics count as 0.

use serde_json::Value;
use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what satisfies every condition.
#[derive(Debug)]
pub struct Utilization {
    conditions: Vec<(Metric, f64)>,
    fallback_on_empty: bool,
}

#[derive(Clone, Copy, Debug)]
enum Metric {
    ActiveRequests,
    RunningRequests,
    WaitingQueue,
    KvCacheUtilization,
}

const CONDITIONS: &str = "a list of at least one {metric, maxValue}: active-requests, running-requests or waiting-queue of at \
                          least 0, or kv-cache-utilization from 0 to 1";

impl Utilization {
    /// From `conditions` and `fallbackOnEmpty`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<Utilization, PluginError> {
        p.in_flight_producer()?;
        let fallback_on_empty = p.flag("fallbackOnEmpty", false)?;
        let given = p.list("conditions", CONDITIONS)?;
        let conditions: Option<Vec<_>> = given.iter().map(condition).collect();
        match conditions.filter(|c| !c.is_empty()) {
            Some(conditions) => Ok(Utilization { conditions, fallback_on_empty }),
            None => Err(p.refuse("conditions", CONDITIONS)),
        }
    }

    fn holds(&self, c: &Candidate) -> bool {
        self.conditions.iter().all(|(metric, max)| metric.of(c) <= *max)
    }
}

fn condition(value: &Value) -> Option<(Metric, f64)> {
    let fields = value.as_object()?;
    if fields.keys().any(|k| !["metric", "maxValue"].contains(&k.as_str())) {
        return None;
    }
    let (metric, most) = match fields.get("metric")?.as_str()? {
        "active-requests" => (Metric::ActiveRequests, f64::INFINITY),
        "running-requests" => (Metric::RunningRequests, f64::INFINITY),
        "waiting-queue" => (Metric::WaitingQueue, f64::INFINITY),
        "kv-cache-utilization" => (Metric::KvCacheUtilization, 1.0),
        _ => return None,
    };
    let max = fields.get("maxValue")?.as_f64()?;
    (0.0..=most).contains(&max).then_some((metric, max))
}

impl Metric {
    fn of(self, c: &Candidate) -> f64 {
        match self {
            Metric::ActiveRequests => f64::from(c.in_flight),
            Metric::RunningRequests => f64::from(c.running),
            Metric::WaitingQueue => f64::from(c.waiting),
            Metric::KvCacheUtilization => c.kv_usage,
        }
    }
}

impl Filter for Utilization {
    fn filter(&self, _: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        if self.fallback_on_empty && !candidates.iter().any(|c| self.holds(c)) {
            return;
        }
        candidates.retain(|c| self.holds(c));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn caps_are_inclusive_and_all_hold() {
        let pool = Pool::default();
        let check = |conditions: &[(&str, f64)], fallback: bool, expect: &[u32]| {
            let list: Vec<_> = conditions.iter().map(|(m, max)| json!({"metric": m, "maxValue": max})).collect();
            let filter = read(json!({"conditions": list, "fallbackOnEmpty": fallback}), Utilization::read).unwrap();
            let all = candidates(3, |i, c| {
                (c.in_flight, c.running, c.waiting) = ([1, 5, 9][i], [2, 4, 6][i], [0, 3, 8][i]);
                c.kv_usage = [0.9, 0.5, 0.1][i];
            });
            assert_eq!(kept(&filter, &view(&pool), all), expect, "{conditions:?}");
        };
        check(&[("active-requests", 5.0)], false, &[0, 1]);
        check(&[("running-requests", 4.0)], false, &[0, 1]);
        check(&[("waiting-queue", 2.0)], false, &[0]);
        check(&[("kv-cache-utilization", 0.5)], false, &[1, 2]);
        check(&[("waiting-queue", 3.0), ("kv-cache-utilization", 0.5)], false, &[1]);
        check(&[("running-requests", 1.0)], false, &[]);
        check(&[("running-requests", 1.0)], true, &[0, 1, 2]);
    }

    #[test]
    fn conditions_are_checked() {
        for bad in [
            json!([]),
            json!([{"metric": "waiting-queue"}]),
            json!([{"metric": "waiting-queue", "maxValue": -1}]),
            json!([{"metric": "kv-cache-utilization", "maxValue": 2}]),
            json!([{"metric": "queue", "maxValue": 2}]),
            json!([{"metric": "waiting-queue", "maxValue": 1, "min": 0}]),
        ] {
            assert!(read(json!({"conditions": bad.clone()}), Utilization::read).is_err(), "{bad}");
        }
        assert!(read(json!({}), Utilization::read).is_err());
    }
}
