//! `igsim explain`.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, Format};
use crate::inspect::Traces;
use crate::inspect::explain::{self, Explanation};
use crate::run::output;

#[derive(Clone, Debug, Args)]
pub(super) struct ExplainArgs {
    /// Folder of a run, or a file of OTLP JSON lines.
    path: PathBuf,
    /// Explain the decisions of one trace; the start of its id is enough. Without it all decisions are summed up.
    #[arg(long, value_name = "ID")]
    trace: Option<String>,
    /// What to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let set = super::traces::read(&args.path)?;
    let traces = Traces::of(&set);
    match &args.trace {
        Some(prefix) => {
            let id = traces.named(prefix, &args.path).map_err(Failure::input)?;
            let explanation = Explanation::of(id, traces.spans(id))
                .ok_or_else(|| Failure::input(format!("--trace {prefix}: no decision was recorded in this trace")))?;
            show(args.format, &explanation, || format!("trace {id}\n{}", explain::decisions(&explanation)))
        }
        None => {
            let all: Vec<Explanation> =
                traces.of_requests().filter_map(|id| Explanation::of(id, traces.spans(id))).collect();
            if all.is_empty() {
                return Err(Failure::input(format!("{}: no trace of it has a decision", args.path.display())));
            }
            show(args.format, &all, || explain::summary(&all))
        }
    }
}

fn show(format: Format, value: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
    output::print(&match format {
        Format::Text => text(),
        Format::Json => serde_json::to_string_pretty(value).map_err(Failure::run)? + "\n",
    });
    Ok(())
}
