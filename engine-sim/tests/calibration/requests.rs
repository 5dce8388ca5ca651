//! A run of 300 requests on a real vLLM 0.19 on an RTX PRO 6000, against the engine with the profile of that GPU.
//!
//! Nothing of this run went into the profile, which is made of times of single layers.

use engine_sim::core::config::EngineConfig;
use engine_sim::core::latency::LatencyProfile;
use shared::time::Time;

use crate::load::{Lengths, Load, Seen};
use crate::{data, mean, table};

#[test]
fn three_hundred_requests_on_an_rtx_pro_6000() {
    let Some(folder) = data() else { return };
    let table = table(&folder, "engine/vllm_rtxpro6000_llama8b_requests.csv");
    let number = |column: &str| -> Vec<f64> { table.rows().map(|r| r.number(column).unwrap()).collect() };
    let lengths = number("input_tokens").into_iter().zip(number("output_tokens"));
    let lengths = lengths.map(|(prompt, output)| Lengths { prompt: prompt as u32, output: output as u32 });
    let at = number("arrival_s").into_iter().map(|s| Time::from_nanos((s * 1e9) as u64));

    let profile = LatencyProfile::named("llama-3.1-8b-rtxpro6000").unwrap();
    let mut config = EngineConfig::default();
    config.scheduler.max_num_batched_tokens = 2048;
    config.scheduler.max_num_seqs = 128;
    config.cache.enable_prefix_caching = false;
    let seen = Load::new(profile, config).open(at.zip(lengths));

    type Figure = fn(&Seen) -> f64;
    let figures: [(&str, &str, Figure); 3] =
        [("TTFT", "ttft_s", |s| s.ttft_ms), ("TPOT", "tpot_s", |s| s.tpot_ms), ("E2E", "e2e_s", |s| s.e2e_ms)];
    println!("{:<5} {:>12} {:>12} {:>10} {:>22}", "", "real ms", "simulated", "mean", "mean of each request");
    let mut errors = Vec::new();
    for (name, column, figure) in figures {
        let real: Vec<f64> = number(column).into_iter().map(|s| 1e3 * s).collect();
        let simulated: Vec<f64> = seen.iter().map(figure).collect();
        let of_mean = mean(simulated.iter().copied()) / mean(real.iter().copied()) - 1.0;
        let of_each = mean(real.iter().zip(&simulated).map(|(r, s)| (s / r - 1.0).abs()));
        let (r, s) = (mean(real.iter().copied()), mean(simulated.iter().copied()));
        println!("{name:<5} {r:>12.1} {s:>12.1} {:>9.1}% {:>21.1}%", 100.0 * of_mean, 100.0 * of_each);
        errors.push((of_mean.abs(), of_each));
    }
    let (of_mean, of_each) = errors[2];
    assert!(of_mean < 0.10, "end to end, mean: {of_mean:.3}");
    assert!(of_each < 0.12, "end to end, each request: {of_each:.3}");
}
