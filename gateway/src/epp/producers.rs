//! Data producers and the saturation detector of a file.

use shared::units::HumanDur;

use super::catalogue::{Part, UTILIZATION_DETECTOR};
use super::file::File;
use super::map::Mapper;
use super::scalars::{DURATION, duration};
use crate::core::config::{
    ConcurrencyConfig, ConcurrencyMode, Detector, InFlightConfig, Parameters, PrefixConfig, SaturationConfig,
};
use crate::core::prefix_index::{BLOCK_TOKENS, MAX_BLOCK_TOKENS};
use crate::core::scheduler::parameters::{PluginError, Reader};

/// The prefix index and what counts as in flight; llm-d makes the default ones where a file has none.
pub(super) fn producers(m: &mut Mapper<'_>) -> (PrefixConfig, InFlightConfig) {
    tokens(m);
    let prefix = one(m, Part::PrefixProducer, prefix).unwrap_or_default();
    let in_flight = one(m, Part::InFlightProducer, in_flight).unwrap_or_default();
    if let Some(i) = m.declared.iter().position(|d| d.part == Some(Part::PrefixProducer)) {
        let (path, given) = (m.declared[i].path.clone(), m.declared[i].parameters.get("blockSizeTokens"));
        let small = given.and_then(|v| v.as_u64()).is_some_and(|n| n < BLOCK_TOKENS as u64);
        if small {
            m.warn(&format!("{path}.parameters.blockSizeTokens"), "blocks have 64 tokens, as in llm-d");
        }
    }
    (prefix, in_flight)
}

/// The saturation detector: the one that is named, else `utilization-detector` as it is declared, else its defaults.
pub(super) fn saturation(m: &mut Mapper<'_>, file: &File) -> SaturationConfig {
    let newer = file.flow_control.as_ref().and_then(|f| f.saturation_detector.as_ref());
    let older = file.saturation_detector.as_ref();
    let (path, named) = match (newer, older) {
        (Some(d), _) => ("flowControl.saturationDetector.pluginRef", d.plugin_ref.as_deref()),
        (None, Some(d)) => ("saturationDetector.pluginRef", d.plugin_ref.as_deref()),
        (None, None) => ("", None),
    };
    let named = named.filter(|n| !n.is_empty()).unwrap_or(UTILIZATION_DETECTOR);
    let declared = m.declared.iter().any(|d| d.name == named);
    if !declared && named == UTILIZATION_DETECTOR {
        return SaturationConfig::default();
    }
    let Some(i) = m.find(path, named) else { return SaturationConfig::default() };
    let of: fn(&mut Reader<'_>) -> Result<SaturationConfig, PluginError> =
        if m.declared[i].part == Some(Part::UtilizationDetector) {
            utilization
        } else if m.declared[i].part == Some(Part::ConcurrencyDetector) {
            concurrency
        } else {
            let expected = "the name of a utilization-detector or a concurrency-detector";
            m.problems.add(path, format!("{named:?}"), expected);
            return SaturationConfig::default();
        };
    read(m, i, of).unwrap_or_default()
}

/// Prompts are measured in bytes, as simulated engines do it too; a tokenizer elsewhere is not asked.
fn tokens(m: &mut Mapper<'_>) {
    let all = (0..m.declared.len()).filter(|&i| m.declared[i].part == Some(Part::TokenProducer));
    for i in all.collect::<Vec<_>>() {
        let path = format!("{}.parameters", m.declared[i].path);
        let keys: Vec<String> = m.declared[i].parameters.keys().cloned().collect();
        for key in keys.iter().filter(|k| !["estimate", "modelName"].contains(&k.as_str())) {
            m.warn(&format!("{path}.{key}"), "no tokenizer is asked: a token is four bytes of the prompt");
        }
    }
}

/// The only plugin that is this part.
fn one<T>(m: &mut Mapper<'_>, part: Part, of: fn(&mut Reader<'_>) -> Result<T, PluginError>) -> Option<T> {
    let all: Vec<usize> = (0..m.declared.len()).filter(|&i| m.declared[i].part == Some(part)).collect();
    if let [_, second, ..] = all[..] {
        let (path, kind) = (format!("{}.type", m.declared[second].path), m.declared[second].kind.clone());
        m.problems.add(&path, format!("a second {kind}"), "one of that type");
    }
    read(m, *all.first()?, of)
}

fn read<T>(m: &mut Mapper<'_>, i: usize, of: fn(&mut Reader<'_>) -> Result<T, PluginError>) -> Option<T> {
    let parameters: &Parameters = &m.declared[i].parameters;
    match Reader::all(parameters, of) {
        Ok(value) => Some(value),
        Err(error) => {
            let path = m.declared[i].path.clone();
            m.refuse(&path, error);
            None
        }
    }
}

fn prefix(p: &mut Reader<'_>) -> Result<PrefixConfig, PluginError> {
    let default = PrefixConfig::default();
    let auto_tune = p.flag("autoTune", true)?;
    // The older name stands for the newer where only it is given.
    let older = p.count_from("blockSize", 0, 0)?;
    let mut block = p.count_from("blockSizeTokens", 16, 1)?;
    if older > 0 && block == 16 {
        block = older;
    }
    let block_tokens = block.max(BLOCK_TOKENS as u32);
    if block_tokens as usize > MAX_BLOCK_TOKENS {
        return Err(p.refuse("blockSizeTokens", &format!("at most {MAX_BLOCK_TOKENS}")));
    }
    let blocks = p.count_from("maxPrefixBlocksToMatch", 2048, 0)?;
    let tokens = p.count_from("maxPrefixTokensToMatch", default.max_prefix_tokens, 0)?;
    let max_prefix_tokens = match (tokens, blocks) {
        (0, 0) => u32::MAX,
        (0, blocks) => blocks.saturating_mul(block_tokens),
        (tokens, _) => tokens.max(block_tokens),
    };
    let lru_blocks_per_endpoint = match p.count_from("lruCapacityPerServer", default.lru_blocks_per_endpoint, 0)? {
        0 => default.lru_blocks_per_endpoint,
        blocks => blocks,
    };
    Ok(PrefixConfig { block_tokens, lru_blocks_per_endpoint, auto_tune, max_prefix_tokens })
}

fn in_flight(p: &mut Reader<'_>) -> Result<InFlightConfig, PluginError> {
    p.prefix_producer()?;
    // Between replicas of the endpoint picker, of which there is one.
    p.flag("syncCrossReplicaState", true)?;
    let most = p.count_from("maxEstimatedOutputTokens", u32::MAX, 0)?;
    Ok(InFlightConfig {
        add_estimated_output_tokens: p.flag("addEstimatedOutputTokens", false)?,
        output_ratio: p.number("outputRatio", 1.5, 0.0, f64::MAX)?,
        max_estimated_output_tokens: (most < u32::MAX).then_some(most),
    })
}

fn utilization(p: &mut Reader<'_>) -> Result<SaturationConfig, PluginError> {
    let default = SaturationConfig::default();
    // Used by the detector as a filter only.
    p.number("headroom", 0.0, 0.0, f64::MAX)?;
    let kv_cache_threshold = p.number("kvCacheUtilThreshold", default.kv_cache_threshold, 0.0, 1.0)?;
    if kv_cache_threshold == 0.0 {
        return Err(p.refuse("kvCacheUtilThreshold", "a number above 0 and at most 1"));
    }
    let staleness = p.text_or("metricsStalenessThreshold", "200ms")?;
    let metrics_staleness = duration(&staleness).filter(|d| *d > HumanDur::default());
    Ok(SaturationConfig {
        queue_depth_threshold: p.count_from("queueDepthThreshold", default.queue_depth_threshold, 1)?,
        kv_cache_threshold,
        metrics_staleness: metrics_staleness.ok_or_else(|| p.refuse("metricsStalenessThreshold", DURATION))?,
        ..default
    })
}

fn concurrency(p: &mut Reader<'_>) -> Result<SaturationConfig, PluginError> {
    let default = ConcurrencyConfig::default();
    // Used by the detector as a filter only.
    p.number("headroom", 0.0, 0.0, f64::MAX)?;
    p.text_or("inFlightLoadProducerName", "")?;
    let mode = p.text_or("concurrencyMode", "requests")?;
    let mode = match mode.as_str() {
        "requests" => ConcurrencyMode::Requests,
        "tokens" => ConcurrencyMode::Tokens,
        "hybrid" => ConcurrencyMode::Hybrid,
        _ => return Err(p.refuse("concurrencyMode", "requests, tokens or hybrid")),
    };
    let max_requests = p.count_from("maxConcurrency", default.max_requests, 1)?;
    let max_tokens = p.count_from("maxTokenConcurrency", default.max_tokens as u32, 1)?;
    let concurrency = ConcurrencyConfig { mode, max_requests, max_tokens: u64::from(max_tokens) };
    Ok(SaturationConfig { detector: Detector::ConcurrencyDetector, concurrency, ..SaturationConfig::default() })
}
