//! What a run found out: rows per request, figures of the whole run, a table for people and JSON for programs.
//!
//! A driver hands in one [`RequestRow`] per request and [`RunFacts`] at the end. Nothing here reads a clock, so the report of a
//! virtual run depends on scenario and seed alone.

mod expect;
mod figures;
mod pd;
mod rows;
mod summary;
mod table;
mod tenants;

pub use expect::{Bound, Verdict, evaluate, figure_exists};
pub use figures::{
    EndpointFigures, EngineFigures, ExporterFigures, FaultFigures, GatewayFigures, LetGo, Pacing, Report, Routing,
    Throughput, Tokens, TraceFigures, seen_by_the_client,
};
pub use pd::{PdFigures, PdTally};
pub use rows::{Failure, Outcome, RequestRow, RowWriter};
pub use summary::{RunFacts, Summary};
pub(crate) use table::{digits, thousands};
pub use tenants::TenantFigures;
