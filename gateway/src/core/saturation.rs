//! How full the pool is: llm-d's saturation detectors, pure functions of what is known of the endpoints.
//!
//! Only endpoints that may get requests count, as llm-d counts ready pods. A pool without any is full.

use shared::time::{Dur, Time};

use crate::core::config::{ConcurrencyConfig, ConcurrencyMode, Detector, SaturationConfig};
use crate::core::pool::Endpoint;

/// How full the pool is at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pressure {
    /// 1 is full.
    pub(crate) saturation: f64,
    /// Whether any endpoint may get requests.
    pub(crate) ready: bool,
    /// When it changes though nothing happens: metrics turn stale.
    pub(crate) changes: Option<Time>,
}

/// How full the pool is. With disaggregated prefill each stage is measured apart and the fuller one counts.
pub(crate) fn pressure(config: &SaturationConfig, staged: bool, endpoints: &[Endpoint], now: Time) -> Pressure {
    let ready = || endpoints.iter().filter(|e| e.is_available());
    let of = |part: &dyn Fn(&Endpoint) -> bool| saturation(config, ready().filter(|e| part(e)), now);
    let saturation = if staged {
        let stages = [of(&|e| e.config.role().prefills()), of(&|e| e.config.role().decodes())];
        stages.into_iter().flatten().reduce(f64::max)
    } else {
        of(&|_| true)
    };
    let fresh = |e: &Endpoint| e.metrics.map(|m| stale_from(config, m.at)).filter(|at| *at > now);
    let changes = match config.detector {
        Detector::UtilizationDetector => ready().filter_map(fresh).min(),
        Detector::ConcurrencyDetector => None,
    };
    Pressure { saturation: saturation.unwrap_or(1.0), ready: ready().next().is_some(), changes }
}

/// Metrics of `at` are too old from then on.
fn stale_from(config: &SaturationConfig, at: Time) -> Time {
    at.saturating_add(config.metrics_staleness.get()).saturating_add(Dur::from_nanos(1))
}

/// `None` without endpoints.
fn saturation<'a>(
    config: &SaturationConfig,
    endpoints: impl Iterator<Item = &'a Endpoint> + Clone,
    now: Time,
) -> Option<f64> {
    let count = endpoints.clone().count() as f64;
    if count == 0.0 {
        return None;
    }
    Some(match config.detector {
        Detector::UtilizationDetector => endpoints.map(|e| utilization(config, e, now)).sum::<f64>() / count,
        Detector::ConcurrencyDetector => concurrency(&config.concurrency, endpoints, count),
    })
}

/// llm-d's `utilization-detector`: stale or missing metrics count 1.
fn utilization(config: &SaturationConfig, endpoint: &Endpoint, now: Time) -> f64 {
    match endpoint.metrics {
        Some(m) if now < stale_from(config, m.at) => {
            let queue = f64::from(m.waiting) / f64::from(config.queue_depth_threshold);
            queue.max(m.kv_usage / config.kv_cache_threshold)
        }
        Some(_) | None => 1.0,
    }
}

/// llm-d's `concurrency-detector`.
fn concurrency<'a>(config: &ConcurrencyConfig, endpoints: impl Iterator<Item = &'a Endpoint>, count: f64) -> f64 {
    let requests = |e: &Endpoint| f64::from(e.in_flight) / f64::from(config.max_requests);
    let tokens = |e: &Endpoint| e.in_flight_tokens as f64 / config.max_tokens as f64;
    // All endpoints have one size, so the load of all by the size of all is the mean of their ratios.
    let mean = |of: &dyn Fn(&Endpoint) -> f64| endpoints.map(of).sum::<f64>() / count;
    match config.mode {
        ConcurrencyMode::Requests => mean(&requests),
        ConcurrencyMode::Tokens => mean(&tokens),
        ConcurrencyMode::Hybrid => mean(&|e| requests(e).max(tokens(e))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::core::pool::{EndpointConfig, EndpointId, EndpointMetrics, Health, Pool};
    use crate::core::role::Role;

    fn ms(n: u64) -> Time {
        Time::ZERO + Dur::from_millis(n)
    }

    /// A pool of endpoints that reported waiting requests, usage and when; `None` is up and reports nothing.
    fn pool(loads: &[Option<(u32, f64, u64)>], roles: &[&str]) -> Pool {
        let config = |i: usize| {
            let labels = roles.get(i).map(|r| (Role::LABEL.to_owned(), (*r).to_owned()));
            EndpointConfig::new("e", "127.0.0.1", 1).with_labels(BTreeMap::from_iter(labels))
        };
        let mut pool = Pool::new((0..loads.len()).map(config).collect());
        for (i, load) in loads.iter().enumerate() {
            let id = EndpointId(i as u32);
            pool.get_mut(id).health = Health::Up;
            if let Some((waiting, kv_usage, at)) = *load {
                let at = ms(at);
                let m = EndpointMetrics { waiting, running: 0, kv_usage, block_size: 16, num_gpu_blocks: 1, at };
                pool.scraped(id, Ok(m));
            }
        }
        pool
    }

    fn near(found: f64, expect: f64, what: &dyn std::fmt::Debug) {
        assert!((found - expect).abs() < 1e-12, "{what:?}: {found}, not {expect}");
    }

    #[test]
    fn utilization_is_the_mean_load_and_fails_closed() {
        let check = |loads: &[Option<(u32, f64, u64)>], expect: f64| {
            let pool = pool(loads, &[]);
            let found = pressure(&SaturationConfig::default(), false, pool.endpoints(), ms(1000));
            near(found.saturation, expect, &loads);
        };
        check(&[], 1.0);
        check(&[None], 1.0);
        check(&[Some((0, 0.0, 1000))], 0.0);
        check(&[Some((5, 0.0, 1000))], 1.0);
        check(&[Some((1, 0.8, 1000))], 1.0);
        check(&[Some((0, 0.4, 800)), Some((10, 0.0, 1000))], 1.25);
        check(&[Some((0, 0.0, 799)), Some((0, 0.0, 1000))], 0.5);
    }

    #[test]
    fn only_endpoints_that_may_get_requests_count() {
        let mut pool = pool(&[Some((5, 0.0, 1000)), Some((0, 0.0, 1000))], &[]);
        let mut check = |id: u32, expect: (f64, bool)| {
            pool.drain(EndpointId(id));
            let found = pressure(&SaturationConfig::default(), false, pool.endpoints(), ms(1000));
            assert_eq!((found.saturation, found.ready), expect);
        };
        check(0, (0.0, true));
        check(1, (1.0, false));
    }

    #[test]
    fn it_is_known_when_metrics_turn_stale() {
        let pool = pool(&[Some((9, 0.0, 900)), Some((0, 0.0, 950)), Some((0, 0.0, 100))], &[]);
        let at = |now| pressure(&SaturationConfig::default(), false, pool.endpoints(), now);
        let first = ms(1100) + Dur::from_nanos(1);
        assert_eq!(at(ms(1000)).changes, Some(first));
        // The busiest counts 1 from then on.
        near(at(ms(1100)).saturation, (1.8 + 0.0 + 1.0) / 3.0, &"before");
        near(at(first).saturation, (1.0 + 0.0 + 1.0) / 3.0, &"after");
        assert_eq!(at(ms(2000)).changes, None);
    }

    #[test]
    fn concurrency_counts_what_the_gateway_sent() {
        let check = |mode, in_flight: &[(u32, u64)], expect: f64| {
            let mut pool = pool(&vec![None; in_flight.len()], &[]);
            for (i, (requests, tokens)) in in_flight.iter().enumerate() {
                let e = pool.get_mut(EndpointId(i as u32));
                (e.in_flight, e.in_flight_tokens) = (*requests, *tokens);
            }
            let concurrency = ConcurrencyConfig { mode, max_requests: 10, max_tokens: 1000 };
            let config = SaturationConfig {
                detector: Detector::ConcurrencyDetector,
                concurrency,
                ..SaturationConfig::default()
            };
            let found = pressure(&config, false, pool.endpoints(), ms(0));
            near(found.saturation, expect, &(mode, in_flight));
            assert_eq!(found.changes, None);
        };
        check(ConcurrencyMode::Requests, &[], 1.0);
        check(ConcurrencyMode::Requests, &[(10, 0), (0, 0)], 0.5);
        check(ConcurrencyMode::Tokens, &[(10, 0), (0, 500)], 0.25);
        check(ConcurrencyMode::Hybrid, &[(10, 0), (0, 500)], 0.75);
        check(ConcurrencyMode::Hybrid, &[(20, 0), (0, 0)], 1.0);
    }

    #[test]
    fn the_fuller_stage_counts() {
        let loads = [Some((5, 0.0, 1000)), Some((1, 0.0, 1000)), Some((0, 0.0, 1000))];
        let check = |roles: &[&str], expect| {
            let found = pressure(&SaturationConfig::default(), true, pool(&loads, roles).endpoints(), ms(1000));
            near(found.saturation, expect, &roles);
        };
        check(&["prefill", "decode", "decode"], 1.0);
        check(&["decode", "prefill", "decode"], 0.5);
        check(&["decode", "decode", "decode"], 0.4);
    }
}
