//! `igsim up`.

use shared::clock::RunClock;
use shared::trace::Telemetry;
use shared::trace::config::MetricsConfig;

use super::{Failure, UpArgs};
use crate::inspect::TRACES_FILE;
use crate::live::stack::{Ports, Stack, StackError};
use crate::live::{Pushing, fold_on_panic};
use crate::run::interrupt::Interrupt;
use crate::run::output::{Output, print};
use crate::run::telemetry::resolve;
use crate::scenario::{self, Mode, Scenario};

pub(super) fn up(args: &UpArgs) -> Result<(), Failure> {
    let mut set = args.overrides.all();
    set.push(("mode".to_owned(), "live".to_owned()));
    set.extend(args.tracing.overrides());
    let scenario = scenario::load(&args.scenario, &set)?.config;
    super::warn(&scenario);
    debug_assert_eq!(scenario.mode, Mode::Live);
    let env = |key: &str| std::env::var(key).ok();
    let file = args.out.as_deref().map(|dir| dir.join(TRACES_FILE));
    let (options, tracing, metrics) = (args.tracing.options(), &scenario.tracing, &scenario.metrics);
    let resolved = resolve(&options, tracing, metrics, file, &env).map_err(Failure::input)?;
    resolved.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    // Whatever may be wrong with the input is known before a folder is made.
    args.out.as_deref().map(|dir| Output::open(dir, false)).transpose().map_err(Failure::input)?;
    let clock = RunClock::start();
    let metrics = resolved.config.metrics.clone();
    let telemetry = Telemetry::live(resolved.config, clock).map_err(Failure::run)?;
    fold_on_panic(&telemetry);
    let served = serve(args, &scenario, &telemetry, &metrics, clock).map_err(Failure::run);
    let stats = telemetry.shutdown(clock.now());
    served?;
    let (kept, started, spans) = (stats.traces_sampled, stats.traces_started, stats.spans_created);
    print(&format!("{kept} of {started} traces kept, {spans} spans\n"));
    for e in stats.exporters.iter().filter(|e| e.dropped.total() > 0) {
        eprintln!(
            "warning: {}: {} spans dropped: {}",
            e.name,
            e.dropped.total(),
            e.last_error.as_deref().unwrap_or("?")
        );
    }
    Ok(())
}

fn serve(
    args: &UpArgs,
    scenario: &Scenario,
    telemetry: &Telemetry,
    metrics: &MetricsConfig,
    clock: RunClock,
) -> Result<(), StackError> {
    let interrupt = Interrupt::listen();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stack = Stack::start(scenario, telemetry, clock, Ports { gateway: args.port }, None).await?;
        let pushing = Pushing::start(metrics, &stack, clock)?;
        print(&welcome(scenario, &stack));
        interrupt.raised().await;
        stack.stop().await;
        pushing.stop();
        Ok(())
    })
}

fn welcome(scenario: &Scenario, stack: &Stack) -> String {
    let (model, gateway) = (scenario.model(), stack.gateway_url());
    let engines: String = stack.engines().iter().map(|(name, url)| format!("  {name:<10} {url}\n")).collect();
    format!(
        "igsim {}  scenario {}  model {model}\n  gateway    {gateway}\n{engines}\n\
         curl -N {gateway}/v1/chat/completions -H 'content-type: application/json' \\\n  \
         -d '{{\"model\":\"{model}\",\"stream\":true,\"max_tokens\":16,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n\n\
         OpenAI clients: base_url {gateway}/v1, any API key. Ctrl-C stops everything and flushes spans.\n",
        env!("CARGO_PKG_VERSION"),
        scenario.name
    )
}
