//! Reading the engines' metrics: one loop for each endpoint, so that scrapes of one endpoint never overlap.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt, Full, Limited};
use shared::time::{Dur, Time};
use tokio::time::MissedTickBehavior;

use crate::core::gateway::{EndpointChange, Input};
use crate::core::pool::{Adapters, EndpointId, EndpointMetrics, ScrapeError};
use crate::server::membership::{First, Target};
use crate::server::pool::Pool;
use crate::server::runtime::Shared;
use crate::spans::ScrapeFact;

/// Longer answers are not read.
const MAX_ANSWER: usize = 8 * 1024 * 1024;
/// How often the list of models is read again: adapters come and go.
const MODELS_INTERVAL: Dur = Dur::from_secs(30);

/// Scrapes one endpoint until it is aborted; `first` is dropped after the first scrape.
pub(crate) async fn watch(
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    id: EndpointId,
    target: Arc<Target>,
    mut first: Option<First>,
) {
    let mut models_at: Option<Time> = None;
    let mut was_reachable = None;
    let mut ticks = tokio::time::interval(shared.config.metrics.scrape_interval.get().to_std());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let reachable = scrape(&shared, &pool, id, &target).await;
        if was_reachable.replace(reachable) != Some(reachable) {
            let endpoint = &*target.backend.config.name;
            tracing::info!(endpoint, reachable, "endpoint scraped");
        }
        let now = shared.clock.now();
        // After an outage it may be another server.
        models_at = models_at.filter(|_| reachable);
        if reachable && models_at.is_none_or(|at| now.since(at) >= MODELS_INTERVAL) {
            models(&shared, &pool, id, &target).await;
            models_at = Some(now);
        }
        first.take();
    }
}

/// One scrape; whether the endpoint answered.
async fn scrape(shared: &Shared, pool: &Pool, id: EndpointId, target: &Arc<Target>) -> bool {
    let started = shared.clock.now();
    let trail = shared.scrape_traces.as_ref().map(|traces| traces.start::<ScrapeFact>(started)).unwrap_or_default();
    let answer = get(shared, target, "/metrics").await.map_err(|e| match e {
        // A server that refuses to tell is up all the same.
        ScrapeError::Status(400..500) => ScrapeError::NoMetrics,
        other @ (ScrapeError::Unreachable
        | ScrapeError::TimedOut
        | ScrapeError::NoMetrics
        | ScrapeError::Status(_)
        | ScrapeError::Malformed) => other,
    });
    let at = shared.clock.now();
    if let Ok(body) = &answer
        && pool.reads_adapters
    {
        tell_adapters(pool, id, target, body, at);
    }
    let metrics = answer.and_then(|body| parse(&body, at));
    let config = &target.backend.config;
    let (endpoint, address) = (&config.name, &config.address);
    trail.note(at, || ScrapeFact { endpoint: Arc::clone(endpoint), address: Arc::clone(address), outcome: metrics });
    trail.finish(at);
    shared.metrics.scrapes.fetch_add(1, Ordering::Relaxed);
    let reachable = matches!(metrics, Ok(_) | Err(ScrapeError::NoMetrics));
    if !reachable {
        shared.metrics.scrapes_failed.fetch_add(1, Ordering::Relaxed);
    }
    pool.tell_of(id, target, at, Input::Metrics { endpoint: id, metrics });
    reachable
}

/// Tells the core which LoRA adapters are where, if that changed.
fn tell_adapters(pool: &Pool, id: EndpointId, target: &Arc<Target>, body: &[u8], at: Time) {
    let Some(adapters) = adapters(body) else { return };
    if pool.adapters(id).as_ref() != Some(&adapters) {
        pool.tell_of(id, target, at, Input::Endpoint(EndpointChange::Adapters(id, adapters)));
    }
}

/// Reads which models an endpoint serves; what cannot be read stays as it was.
async fn models(shared: &Shared, pool: &Pool, id: EndpointId, target: &Arc<Target>) {
    let Ok(body) = get(shared, target, "/v1/models").await else { return };
    let Ok(serde_json::Value::Object(mut list)) = serde_json::from_slice(&body) else { return };
    let Some(serde_json::Value::Array(cards)) = list.remove("data") else { return };
    let names = cards.iter().filter_map(|c| c.get("id")?.as_str()).map(Arc::from).collect();
    target.set_cards(cards);
    pool.tell_of(id, target, shared.clock.now(), Input::Endpoint(EndpointChange::Models(id, names)));
}

async fn get(shared: &Shared, target: &Target, path: &'static str) -> Result<Bytes, ScrapeError> {
    let uri = target.backend.uri(&PathAndQuery::from_static(path)).ok_or(ScrapeError::Unreachable)?;
    let mut request = http::Request::new(Full::new(Bytes::new()));
    *request.uri_mut() = uri;
    let answer = async {
        let response = shared.client.request(request).await.map_err(|_| ScrapeError::Unreachable)?;
        if response.status() != http::StatusCode::OK {
            return Err(ScrapeError::Status(response.status().as_u16()));
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        body.map(http_body_util::Collected::to_bytes).map_err(|_| ScrapeError::Malformed)
    };
    let limit = shared.config.metrics.scrape_timeout.get().to_std();
    tokio::time::timeout(limit, answer).await.unwrap_or(Err(ScrapeError::TimedOut))
}

/// Reads vLLM's gauges out of a Prometheus text. One that is missing means another kind of server, one that is no number an
/// answer that cannot be read.
///
/// An API server in front of several engine processes lists each: their queues add up, the fullest cache counts.
fn parse(body: &[u8], at: Time) -> Result<EndpointMetrics, ScrapeError> {
    let text = std::str::from_utf8(body).map_err(|_| ScrapeError::NoMetrics)?;
    let value = |sample| value(sample).ok_or(ScrapeError::Malformed);
    let (mut waiting, mut running, mut kv_usage) = (None, None, None);
    let (mut block_size, mut num_gpu_blocks) = (0, 0);
    for line in text.lines() {
        // Most lines belong to histograms: leave them early.
        let Some(rest) = line.strip_prefix("vllm:") else { continue };
        let name = rest.split(['{', ' ']).next().unwrap_or_default();
        match name {
            "num_requests_waiting" => waiting = Some(waiting.unwrap_or(0.0) + value(rest)?),
            "num_requests_running" => running = Some(running.unwrap_or(0.0) + value(rest)?),
            "kv_cache_usage_perc" => kv_usage = Some(value(rest)?.max(kv_usage.unwrap_or(0.0))),
            "cache_config_info" => {
                block_size = label(rest, "block_size").unwrap_or(block_size);
                num_gpu_blocks = label(rest, "num_gpu_blocks").unwrap_or(num_gpu_blocks);
            }
            _ => {}
        }
    }
    let (Some(waiting), Some(running), Some(kv_usage)) = (waiting, running, kv_usage) else {
        return Err(ScrapeError::NoMetrics);
    };
    Ok(EndpointMetrics {
        waiting: waiting as u32,
        running: running as u32,
        kv_usage: kv_usage.clamp(0.0, 1.0),
        block_size,
        num_gpu_blocks,
        at,
    })
}

/// Reads vLLM's LoRA info. Each change of it begins a new series, whose value is the time of the change: the newest one counts.
fn adapters(body: &[u8]) -> Option<Adapters> {
    let text = std::str::from_utf8(body).ok()?;
    let series = text.lines().filter(|l| l.starts_with("vllm:lora_requests_info{"));
    let newest = series.filter_map(|l| Some((value(l)?, l))).reduce(|a, b| if b.0 >= a.0 { b } else { a });
    let line = newest?.1;
    let list = |name| {
        let names = text_label(line, name).unwrap_or_default();
        names.split(',').map(str::trim).filter(|n| !n.is_empty()).map(Arc::from).collect()
    };
    Some(Adapters {
        max: label(line, "max_lora").unwrap_or(0),
        running: list("running_lora_adapters"),
        waiting: list("waiting_lora_adapters"),
    })
}

/// The value of a sample: what follows the labels, before an optional timestamp.
fn value(sample: &str) -> Option<f64> {
    let rest = sample.rsplit_once('}').map_or_else(|| sample.split_once(' ').map(|(_, v)| v), |(_, v)| Some(v))?;
    rest.split_ascii_whitespace().next()?.parse().ok().filter(|v: &f64| v.is_finite() && *v >= 0.0)
}

/// The numeric value of a label.
fn label(sample: &str, name: &str) -> Option<u32> {
    text_label(sample, name)?.parse().ok()
}

/// The value of a label.
fn text_label<'s>(sample: &'s str, name: &str) -> Option<&'s str> {
    let (_, labels) = sample.split_once('{')?;
    let mut rest = labels;
    loop {
        let found = rest.find(name)?;
        let starts = found == 0 || matches!(rest.as_bytes()[found - 1], b',' | b' ');
        let after = &rest[found + name.len()..];
        match after.strip_prefix("=\"").filter(|_| starts) {
            Some(v) => return v.split('"').next(),
            None => rest = after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<(u32, u32, f64, u32, u32), ScrapeError>) {
        let found = parse(text.as_bytes(), Time::ZERO);
        let found = found.map(|m| (m.waiting, m.running, m.kv_usage, m.block_size, m.num_gpu_blocks));
        assert_eq!(found, expect, "{text}");
    }

    #[test]
    fn vllms_gauges_are_read() {
        check(
            "# HELP vllm:num_requests_running Number of requests.\n\
             # TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{engine=\"0\",model_name=\"a} b\"} 3.0\n\
             vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 12\n\
             vllm:num_requests_waiting_by_reason{engine=\"0\",reason=\"capacity\"} 99\n\
             vllm:kv_cache_usage_perc{engine=\"0\"} 2.5e-1 1700000000000\n\
             vllm:cache_config_info{block_size=\"16\",cpu_num_gpu_blocks=\"7\",num_gpu_blocks=\"27000\"} 1.0\n\
             vllm:e2e_request_latency_seconds_bucket{le=\"0.3\"} 1\n",
            Ok((12, 3, 0.25, 16, 27000)),
        );
    }

    #[test]
    fn the_newest_series_of_adapters_counts() {
        let line = |running: &str, waiting: &str, at: f64| {
            format!(
                "vllm:lora_requests_info{{max_lora=\"4\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {at}\n"
            )
        };
        let list = |names: &[&str]| names.iter().map(|n| Arc::from(*n)).collect::<Vec<Arc<str>>>();
        let found = adapters((line("a", "", 1.0) + &line("b, c", "d", 3.5) + &line("", "e", 2.0)).as_bytes()).unwrap();
        assert_eq!(found, Adapters { max: 4, running: list(&["b", "c"]), waiting: list(&["d"]) });
        assert_eq!(adapters(line("", "", 1.0).as_bytes()).unwrap(), Adapters { max: 4, ..Adapters::default() });
        assert_eq!(adapters(b"vllm:num_requests_running 1\n"), None);
    }

    #[test]
    fn engines_behind_one_server_add_up() {
        check(
            "vllm:num_requests_running{engine=\"0\"} 1\nvllm:num_requests_running{engine=\"1\"} 2\n\
             vllm:num_requests_waiting 4\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n\
             vllm:kv_cache_usage_perc{engine=\"1\"} 0.75\n",
            Ok((4, 3, 0.75, 0, 0)),
        );
    }

    #[test]
    fn what_is_missing_is_no_error_and_what_is_no_number_is() {
        let malformed = Err(ScrapeError::Malformed);
        check("", Err(ScrapeError::NoMetrics));
        check("<html>hello</html>", Err(ScrapeError::NoMetrics));
        check("vllm:num_requests_running 1\nvllm:num_requests_waiting 1\n", Err(ScrapeError::NoMetrics));
        check("vllm:num_requests_running 1\nvllm:num_requests_waiting x\nvllm:kv_cache_usage_perc 0\n", malformed);
        check("vllm:num_requests_running 1\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc NaN\n", malformed);
    }
}
