//! Scenarios as they are read, and what is said of wrong ones.

use insta::assert_snapshot;

use super::*;

const SMALL: &str = "\
name: small
requests: 10
engines: [{ profile: llama-3.1-8b-h100 }]
workload:
  arrivals: { process: poisson, rate: 10 }
";

fn read(text: &str) -> Result<Scenario, String> {
    shared::config::load_str::<Scenario>("s.yaml", text, &[]).map(|l| l.config).map_err(|e| e.to_string())
}

/// The error of the small scenario with one override.
fn wrong(path: &str, value: &str) -> String {
    let set = [(path.to_owned(), value.to_owned())];
    shared::config::load_str::<Scenario>("s.yaml", SMALL, &set).map(|l| l.config).expect_err("it is wrong").to_string()
}

#[test]
fn defaults_fill_what_is_left_out() {
    let s = read(SMALL).unwrap();
    assert_eq!((s.seed, s.mode, s.engine_count()), (42, Mode::Live, 1));
    assert_eq!(s.model(), "meta-llama/Llama-3.1-8B-Instruct");
    assert_eq!(s.workload.arrivals, Some(Arrivals::Poisson { rate: 10.0 }));
}

#[test]
fn the_resolved_scenario_reads_back_as_itself() {
    let s = read(SMALL).unwrap();
    let yaml = s.to_yaml();
    assert!(yaml.contains("max_num_batched_tokens: 8192"), "{yaml}");
    assert_eq!(read(&yaml).unwrap(), s);
}

#[test]
fn problems_are_told_with_path_and_line() {
    assert_snapshot!(read("\
name: bad
duration: 10
engines:
  - profile: llama-3.1-8b-h101
    scheduler:
      max_num_seqs: -3
  - count: 0
workload:
  arrivals: { process: poison, rate: 3 }
  output_tokens: { distribution: lognormal, median: 3, sigma: wide }
tracing: { ratio: 1.5 }
").unwrap_err(), @r#"
    error: s.yaml: duration: found 10, expected a duration such as 50ms or 1.5s
       2 | duration: 10
         |           ^^
    error: s.yaml: engines[0].scheduler.max_num_seqs: found -3, expected an integer of at least 1
       6 |       max_num_seqs: -3
         |                     ^^
    help: the default is 1024
    error: s.yaml: engines[1].count: found 0, expected an integer from 1 to 100000
       7 |   - count: 0
         |            ^
    help: the default is 1
    error: s.yaml: workload.arrivals.process: found "poison", expected one of poisson, gamma, steps, constant, closed, replay
       9 |   arrivals: { process: poison, rate: 3 }
         |                        ^^^^^^
    help: did you mean poisson?
    error: s.yaml: workload.output_tokens.sigma: found "wide", expected a number
      10 |   output_tokens: { distribution: lognormal, median: 3, sigma: wide }
         |                                                               ^^^^
    error: s.yaml: tracing.ratio: found 1.5, expected a number from 0 to 1
      11 | tracing: { ratio: 1.5 }
         |                   ^^^
    "#);
}

#[test]
fn relations_are_checked() {
    assert_snapshot!(wrong("workload.arrivals.rate", "-1"), @r"
    error: s.yaml: workload.arrivals.rate: found -1, expected a number of at least 0
    --set | workload.arrivals.rate=-1
          |                        ^^
    ");
    assert_snapshot!(wrong("workload.arrivals.rate", "0"), @r"
    error: s.yaml: workload.arrivals.rate: found 0, expected a number above 0
    --set | workload.arrivals.rate=0
          |                        ^
    ");
    assert_snapshot!(wrong("workload.arrivals.rate", ".nan"), @r"
    error: s.yaml: workload.arrivals.rate: found .nan, expected a finite number
    --set | workload.arrivals.rate=.nan
          |                        ^^^^
    ");
    assert_snapshot!(wrong("duration", "10s"), @r"
    error: s.yaml: requests: found both duration and requests, expected one of the two
       2 | requests: 10
         |           ^^
    ");
    assert_snapshot!(wrong("requests", ""), @"error: s.yaml: duration: found neither duration nor requests, expected one of the two, for example duration: 30s");
    assert_snapshot!(wrong("requests", "0"), @r"
    error: s.yaml: requests: found 0, expected an integer of at least 1
    --set | requests=0
          |          ^
    ");
    assert_snapshot!(wrong("engines", "[]"), @r"
    error: s.yaml: engines: found 0 items, expected a list of at least 1
    --set | engines=[]
          |         ^^
    ");
    assert_snapshot!(wrong("engines[0].profile", "llama-3.1-8b-h10"), @r"
    error: s.yaml: engines[0].profile: found llama-3.1-8b-h10, expected one of llama-3.1-8b-h100, llama-3.1-8b-fp8-h200, llama-3.1-8b-rtxpro6000, llama-3.1-8b-rtxpro6000-tp2, qwen3-32b-h100-tp2, qwen3-32b-h100-tp4, qwen3-32b-rtxpro6000, qwen3-32b-rtxpro6000-tp2, llama-3.3-70b-h100-tp8, llama-2-70b-a100-tp8, llama-2-70b-h100-tp8, instant, or the path of a .yaml file
    --set | engines[0].profile=llama-3.1-8b-h10
          |                    ^^^^^^^^^^^^^^^^
    help: did you mean llama-3.1-8b-h100?
    ");
    assert_snapshot!(wrong("engines[0].count", "70000"), @"error: s.yaml: listen.engines: found ports up to 78099, expected ports up to 65535");
    assert_snapshot!(wrong("engines[0].port", "8080"), @r"
    error: s.yaml: engines[0].port: found port 8080, which the gateway has, expected ports of its own
    --set | engines[0].port=8080
          |                 ^^^^
    ");
    assert_snapshot!(wrong("engines[0].url", "http://x:1"), @r"
    error: s.yaml: engines[0].model: found nothing, expected the model that the real server serves
       3 | engines: [{ profile: llama-3.1-8b-h100 }]
         |           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("engines[1]", "{ profile: llama-3.1-8b-h100, port: 8100, model: other }"), @r#"
    error: s.yaml: engines[1].port: found port 8100, which engines[0] has, expected ports of its own
    --set | engines[1]={ profile: llama-3.1-8b-h100, port: 8100, model: other }
          |            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: engines[1].model: found "other", expected "meta-llama/Llama-3.1-8B-Instruct", the first group's model
    --set | engines[1]={ profile: llama-3.1-8b-h100, port: 8100, model: other }
          |            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    let events = wrong("engines[0].kv_events_config", "{ enable_kv_cache_events: true, endpoint: 'tcp://*:8100' }");
    assert!(events.starts_with(
        "error: s.yaml: engines[0].kv_events_config.endpoint: found port 8100, which engines[0] has, expected ports of its own"
    ), "{events}");
    assert_snapshot!(wrong("engines[0].role", "prefill"), @r"
    error: s.yaml: engines: found no engine that decodes, expected an engine of role both or decode, or of none
       3 | engines: [{ profile: llama-3.1-8b-h100 }]
         |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("workload.tenants", "[{ name: a, weight: 0, objective: fast }]"), @r#"
    error: s.yaml: workload.tenants[0].objective: found "fast", expected nothing (gateway.objectives)
    --set | workload.tenants=[{ name: a, weight: 0, objective: fast }]
          |                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: workload.tenants: found only weights of 0, expected a weight above 0
    --set | workload.tenants=[{ name: a, weight: 0, objective: fast }]
          |                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("workload.prompt_tokens", "{ distribution: lognormal, mean: 10, p99: 1000 }"), @r"
    error: s.yaml: workload.prompt_tokens.p99: found 1000, expected less than 15 times the mean: no log-normal is so wide
    --set | workload.prompt_tokens={ distribution: lognormal, mean: 10, p99: 1000 }
          |                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("workload.prompt_tokens", "{ distribution: uniform, min: 9, max: 8 }"), @r"
    error: s.yaml: workload.prompt_tokens.max: found 8, expected a number that is not below min
    --set | workload.prompt_tokens={ distribution: uniform, min: 9, max: 8 }
          |                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("workload.prompt_tokens", "200000"), @r"
    error: s.yaml: workload.prompt_tokens: found requests of up to 200064 tokens (system prompt, prefix, prompt and output), expected at most 131072, the engines' max_model_len
    --set | workload.prompt_tokens=200000
          |                        ^^^^^^
    ");
    assert_snapshot!(wrong("workload.prompt_tokens", "0"), @r"
    error: s.yaml: workload.prompt_tokens: found 0, expected an integer of at least 1
    --set | workload.prompt_tokens=0
          |                        ^
    help: the default is 256
    ");
    assert_snapshot!(wrong("trace", "{ format: azure, path: no/such.csv }"), @r#"
    error: s.yaml: workload.arrivals.process: found arrivals beside a trace, expected replay, or no section trace
       5 |   arrivals: { process: poisson, rate: 10 }
         |                        ^^^^^^^
    error: s.yaml: trace.path: found no file "no/such.csv", expected a trace file
    --set | trace={ format: azure, path: no/such.csv }
          |       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    help: give the path of yours with --set trace.path=FILE; scenarios/README.md says where traces come from
    "#);
    assert_snapshot!(wrong("workload.arrivals", "{ process: replay }"), @r"
    error: s.yaml: workload.arrivals.process: found replay without a section trace, expected a section trace with format and path
    --set | workload.arrivals={ process: replay }
          |                   ^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("expectations", "{ ttft.p99: { max: 5 }, errors: {}, ttft_ms.p50: { min: 3, max: 2 } }"), @r"
    error: s.yaml: expectations.errors: found no bound, expected min, max or both
    --set | expectations={ ttft.p99: { max: 5 }, errors: {}, ttft_ms.p50: { min: 3, max: 2 } }
          |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: expectations.ttft.p99: found no such figure of the report, expected a path such as errors, ttft_ms.p99 or traces.incomplete
    --set | expectations={ ttft.p99: { max: 5 }, errors: {}, ttft_ms.p50: { min: 3, max: 2 } }
          |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: expectations.ttft_ms.p50: found from 3 to 2, expected a min that is not above max
    --set | expectations={ ttft.p99: { max: 5 }, errors: {}, ttft_ms.p50: { min: 3, max: 2 } }
          |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("gateway.profile.scorers", "[{ type: queue-scorer, weight: -1 }, { type: quue-scorer }]"), @r#"
    error: s.yaml: gateway.profile.scorers[0].weight: found -1, expected a number of at least 0
    --set | gateway.profile.scorers=[{ type: queue-scorer, weight: -1 }, { type: quue-scorer }]
          |                         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: gateway.profile.scorers[1].type: found "quue-scorer", expected one of queue-scorer, running-requests-size-scorer, kv-cache-utilization-scorer, load-aware-scorer, lora-affinity-scorer, active-request-scorer, token-load-scorer, prefix-cache-scorer, precise-prefix-cache-scorer, no-hit-lru-scorer, session-affinity-scorer, context-length-aware, latency-scorer
    --set | gateway.profile.scorers=[{ type: queue-scorer, weight: -1 }, { type: quue-scorer }]
          |                         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("tracing.exporters", "[none, { otlp: { url: collector } }]"), @r#"
    error: s.yaml: tracing.exporters[1].otlp.url: found "collector", expected an address such as http://localhost:4317
    --set | tracing.exporters=[none, { otlp: { url: collector } }]
          |                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    error: s.yaml: tracing.exporters: found none among others, expected none alone
    --set | tracing.exporters=[none, { otlp: { url: collector } }]
          |                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("listen.gateway", "everywhere"), @r#"
    error: s.yaml: listen.gateway: found "everywhere", expected an address such as 127.0.0.1:8080
    --set | listen.gateway=everywhere
          |                ^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("gateway.metrics.scrape_interval", "50"), @r"
    error: s.yaml: gateway.metrics.scrape_interval: found 50, expected a duration such as 50ms or 1.5s
    --set | gateway.metrics.scrape_interval=50
          |                                 ^^
    help: the default is 50ms
    ");
    assert_snapshot!(wrong("gateway.metrics.scrape_interval", "5 days"), @r#"
    error: s.yaml: gateway.metrics.scrape_interval: found "5 days", expected a duration such as 50ms or 1.5s
    --set | gateway.metrics.scrape_interval=5 days
          |                                 ^^^^^^
    "#);
    assert_snapshot!(wrong("workload.sessions", "{ turns: 3, think_time: soon }"), @r#"
    error: s.yaml: workload.sessions.think_time: found "soon", expected a duration such as 50ms or 1.5s
    --set | workload.sessions={ turns: 3, think_time: soon }
          |                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("name", "../etc"), @r#"
    error: s.yaml: name: found "../etc", expected 1 to 64 of the characters A-Z a-z 0-9 - _ . not starting with a dot
    --set | name=../etc
          |      ^^^^^^
    "#);
}

#[test]
fn the_schema_describes_every_field() {
    fn undescribed(schema: &serde_json::Value, path: &str, out: &mut Vec<String>) {
        if let Some(fields) = schema.get("properties").and_then(serde_json::Value::as_object) {
            for (name, field) in fields {
                if field.get("description").is_none() && field.get("const").is_none() && field.get("$ref").is_none() {
                    out.push(format!("{path}.{name}"));
                }
            }
        }
        match schema {
            serde_json::Value::Object(map) => map.iter().for_each(|(k, v)| undescribed(v, &format!("{path}/{k}"), out)),
            serde_json::Value::Array(items) => items.iter().for_each(|v| undescribed(v, path, out)),
            _ => {}
        }
    }
    let mut missing = Vec::new();
    undescribed(&json_schema(), "", &mut missing);
    assert_eq!(missing, Vec::<String>::new());
}
