//! `precise-prefix-cache-producer`, or `precise-prefix-cache-scorer` with the producer's parameters: the older plugin is both.

use serde_json::Value;
use shared::units::HumanDur;

use super::catalogue::{PRECISE_SCORER, Part};
use super::map::Mapper;
use super::scalars::{DURATION, duration};
use crate::core::config::{Parameters, PreciseConfig};
use crate::core::scheduler::parameters::{PluginError, Reader};

/// The index of KV events as the file's producer configures it, or else its scorer.
pub(super) fn precise(m: &mut Mapper<'_>) -> PreciseConfig {
    let of = |m: &Mapper<'_>, is: fn(&super::map::Declared) -> bool| m.declared.iter().position(is);
    let scorer = of(m, |d| d.kind == PRECISE_SCORER);
    let producer = of(m, |d| d.part == Some(Part::PreciseProducer));
    let second = m.declared.iter().filter(|d| d.part == Some(Part::PreciseProducer)).nth(1).map(|d| d.path.clone());
    if let Some(path) = second {
        m.problems.add(&format!("{path}.type"), "a second precise-prefix-cache-producer", "one of that type");
    }
    let all = scorer.into_iter().chain(producer).map(|i| read(m, i)).collect::<Vec<_>>();
    // What the scorer says of the index is its producer's, not its own.
    if let Some(i) = scorer {
        m.declared[i].parameters.clear();
    }
    all.into_iter().last().flatten().unwrap_or_default()
}

fn read(m: &mut Mapper<'_>, i: usize) -> Option<PreciseConfig> {
    let (path, parameters) = (m.declared[i].path.clone(), m.declared[i].parameters.clone());
    match Reader::all(&parameters, config) {
        Ok(config) => {
            elsewhere(m, &path, &parameters);
            Some(config)
        }
        Err(error) => {
            m.refuse(&path, error);
            None
        }
    }
}

/// What llm-d can do and the gateway cannot: an index in a database, one publisher for all engines, other engines' events.
fn elsewhere(m: &mut Mapper<'_>, path: &str, parameters: &Parameters) {
    let all = Value::Object(parameters.clone().into_iter().collect());
    let given = |pointer: &str| all.pointer(pointer).filter(|v| !v.is_null() && v.as_str() != Some("")).cloned();
    let mut refuse = |pointer: &str, found: &str, instead: &str| {
        m.unsupported(&format!("{path}.parameters{}", pointer.replace('/', ".")), found, instead);
    };
    for backend in ["redisConfig", "valkeyConfig", "costAwareMemoryConfig"] {
        let pointer = format!("/indexerConfig/kvBlockIndexConfig/{backend}");
        if given(&pointer).is_some() {
            refuse(&pointer, "an index elsewhere", "inMemoryConfig");
        }
    }
    if given("/kvEventsConfig/zmqEndpoint").is_some() {
        let instead = "nothing: the gateway subscribes to each engine";
        refuse("/kvEventsConfig/zmqEndpoint", "one socket for all engines", instead);
    }
    if let Some(engine) = given("/kvEventsConfig/engineType").filter(|e| e != "vllm") {
        refuse("/kvEventsConfig/engineType", &engine.to_string(), "vllm");
    }
    if given("/sessionManager").is_some() {
        refuse("/sessionManager", "a session manager", "nothing");
    }
}

/// The parameters of llm-d's producer (`PluginConfig` and what it nests; llm-d-router, October 2026).
fn config(p: &mut Reader<'_>) -> Result<PreciseConfig, PluginError> {
    let default = PreciseConfig::default();
    p.ignored("sessionManager");
    let block_tokens = p.nested("tokenProcessorConfig", |p| {
        // It enters hashes that are the gateway's own.
        p.ignored("hashSeed");
        p.ignored("hashAlgorithm");
        let older = p.count_from("blockSize", default.block_tokens, 1)?;
        p.count_from("blockSizeTokens", older, 1)
    })?;
    let (max_blocks, max_endpoints_per_block, weights) = p.nested("indexerConfig", indexer)?;
    let (events_port, topic_filter) = p.nested("kvEventsConfig", events)?;
    let speculative = p.flag("speculativeIndexing", default.speculative)?;
    let ttl = p.text_or("speculativeTTL", "2s")?;
    let ttl = if ttl.is_empty() { Some(default.speculative_ttl) } else { duration(&ttl) };
    Ok(PreciseConfig {
        block_tokens,
        max_blocks,
        max_endpoints_per_block,
        gpu_weight: weights[0],
        cpu_weight: weights[1],
        speculative,
        speculative_ttl: ttl
            .filter(|d| *d >= HumanDur::millis(1))
            .ok_or_else(|| p.refuse("speculativeTTL", DURATION))?,
        events_port,
        topic_filter,
        ..default
    })
}

type Indexer = (u32, u32, [f64; 2]);

fn indexer(p: &mut Reader<'_>) -> Result<Indexer, PluginError> {
    let default = PreciseConfig::default();
    // A tokenizer of its own, as older files have it, and a scorer of which there is one.
    for name in ["tokenizersPoolConfig", "prefixStoreConfig", "kvBlockScorerConfig", "tokenProcessorConfig"] {
        p.ignored(name);
    }
    let (blocks, endpoints) = p.nested("kvBlockIndexConfig", |p| {
        for name in ["enableMetrics", "metricsLoggingInterval", "redisConfig", "valkeyConfig", "costAwareMemoryConfig"]
        {
            p.ignored(name);
        }
        p.nested("inMemoryConfig", |p| {
            Ok((
                p.count_from("size", default.max_blocks, 1)?,
                p.count_from("podCacheSize", default.max_endpoints_per_block, 1)?,
            ))
        })
    })?;
    Ok((blocks, endpoints, weights(p)?))
}

/// Weights of the tiers: `[{name: gpu, weight: 1.0}, {name: cpu, weight: 0.8}]`.
fn weights(p: &mut Reader<'_>) -> Result<[f64; 2], PluginError> {
    const NAME: &str = "kvCacheBackendConfigs";
    const ALLOWED: &str = "a list of the tiers gpu and cpu such as {name: gpu, weight: 1.0}, weights from 0 to 1";
    let default = PreciseConfig::default();
    let mut weights = [default.gpu_weight, default.cpu_weight];
    for tier in p.list(NAME, ALLOWED)? {
        let name = tier.get("name").and_then(Value::as_str).unwrap_or_default();
        let weight = tier.get("weight").and_then(Value::as_f64).filter(|w| (0.0..=1.0).contains(w));
        let place = ["gpu", "cpu"].iter().position(|known| *known == name.to_ascii_lowercase());
        let (Some(place), Some(weight)) = (place, weight) else { return Err(p.refuse(NAME, ALLOWED)) };
        weights[place] = weight;
    }
    Ok(weights)
}

fn events(p: &mut Reader<'_>) -> Result<(u16, String), PluginError> {
    let default = PreciseConfig::default();
    for name in ["zmqEndpoint", "engineType", "discoverPods", "remoteSocket", "tracing"] {
        p.ignored(name);
    }
    p.count_from("concurrency", 4, 1)?;
    let topic = p.text_or("topicFilter", &default.topic_filter)?;
    let port = p.nested("podDiscoveryConfig", |p| {
        for name in ["podLabelSelector", "podNamespace", "replayPort", "replaySocketPort"] {
            p.ignored(name);
        }
        let port = p.count_from("socketPort", default.events_port.into(), 1)?;
        u16::try_from(port).map_err(|_| p.refuse("socketPort", "a port"))
    })?;
    Ok((port, topic))
}
