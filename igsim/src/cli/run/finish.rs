//! The end of a run: its traces looked at, its report written and told.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use shared::trace::config::OtlpConfig;

use super::{Answered, Driven};
use crate::cli::{Failure, Format, RunArgs, send};
use crate::inspect::{Style, TRACES_FILE};
use crate::report::{Report, RunFacts, TraceFigures, seen_by_the_client};
use crate::run::output::{Output, REPORT_FILE, print};
use crate::run::verdict::{Looked, figures};
use crate::scenario::{Mode, Scenario};

/// Looks at the traces, writes the report, and prints what the user wants to know.
pub(super) fn finish(args: &RunArgs, scenario: &Scenario, output: &Output, driven: Driven) -> Result<(), Failure> {
    let Driven { ended, answered } = driven;
    let file = output.path(TRACES_FILE);
    // What cannot be read or was not written is told after the report, which is good all the same.
    // Of files of bounded size only the last one is there for sure: no trace can be called incomplete.
    let whole = file.exists() && scenario.tracing.rotating_file().is_none();
    let naming = scenario.tracing.naming.map(Into::into).unwrap_or_default();
    let (looked, unread) = match whole.then(|| Looked::at(&file, naming)).transpose() {
        Ok(looked) => (looked, None),
        Err(error) => (None, Some(error)),
    };
    let (summary, unwritten) = ended.collector.finish();
    let facts = RunFacts {
        versions: BTreeMap::from([("igsim".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]),
        scenario: scenario.name.clone(),
        mode: if scenario.mode == Mode::Live { "live" } else { "virtual" }.to_owned(),
        seed: scenario.seed,
        interrupted: ended.interrupted,
        tenants: scenario.tenants(),
        paced: scenario.mode == Mode::Live,
        expectations: scenario.expectations.clone(),
        ..RunFacts::default()
    };
    let (facts, remote) = with_answered(facts, answered, scenario, looked.as_ref());
    let report = summary.finish(facts);
    let json = report.to_json();
    output.write(REPORT_FILE, &json).map_err(Failure::run)?;
    match args.format {
        Format::Json => print(&json),
        Format::Text => tell(&report, looked.as_ref(), output),
    }
    if let Some(error) = unwritten {
        return Err(Failure::run(error));
    }
    if let Some(error) = unread {
        return Err(Failure::run(error));
    }
    if let Some(set) = looked.map(Looked::into_set).filter(|_| !remote.is_empty()) {
        let run_id = args.run_id.clone().unwrap_or_else(send::fresh_run_id);
        for endpoint in &remote {
            send::deliver(set.clone(), endpoint, &run_id)?;
        }
    }
    if report.expectations.iter().all(|e| e.pass) { Ok(()) } else { Err(Failure::Expectation) }
}

/// Adds what is known of those who answered; with it, who gets the traces now.
fn with_answered(
    mut facts: RunFacts,
    answered: Answered,
    scenario: &Scenario,
    looked: Option<&Looked>,
) -> (RunFacts, Vec<OtlpConfig>) {
    match answered {
        Answered::Own { own, ratio, remote } => {
            facts.versions.insert("vllm".to_owned(), engine_sim::server::VLLM_VERSION.to_owned());
            facts.endpoints = (0..scenario.engine_count()).map(|i| format!("engine-{i}")).collect();
            facts.engines = own.engines;
            facts.retries = own.retries;
            facts.traces =
                TraceFigures { by_policy: scenario.tracing.decides_by_policy(), ..figures(&own.stats, ratio, looked) };
            (facts, remote)
        }
        Answered::Running(url) => {
            facts.gateway = Some(url);
            facts.expectations.retain(|path, _| seen_by_the_client(path));
            (facts, Vec::new())
        }
    }
}

fn tell(report: &Report, looked: Option<&Looked>, output: &Output) {
    print(&report.table());
    let colour = std::env::var_os("NO_COLOR").is_none() && std::io::stdout().is_terminal();
    if let Some(looked) = looked {
        if let Some((line, tree)) = looked.slowest(Style { colour, ..Style::PLAIN }) {
            print(&format!("{line}\n\n{tree}\n"));
        }
        for finding in looked.findings().iter().take(5) {
            print(&format!("finding: {finding}\n"));
        }
    }
    let dir = output.dir().display();
    print(&match report.gateway {
        None => format!("Written to {dir}/   next: igsim inspect {dir} --slowest 3\n"),
        Some(_) => format!(
            "Written to {dir}/   traces: where the gateway sends its own; of a Tempo: igsim query slow-requests --tempo URL, \
             igsim check URL --query '{{ }}'\n"
        ),
    });
}
