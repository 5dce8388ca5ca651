//! Everything that can be said about a set of traces: each for itself, how services hand them on, and whether content is in them.

use super::{CheckOptions, Finding, Rule, check, content, llm_d, propagation};
use crate::trace::naming::Naming;
use crate::trace::set::TraceSet;

/// What is looked at, and what is known of the deployment.
#[derive(Clone, Copy, Debug, Default)]
pub struct AuditOptions<'a> {
    /// How each trace is checked. With llm-d's names no registry is looked at.
    pub check: CheckOptions<'a>,
    /// Whose names the spans have.
    pub naming: Naming,
    /// Who records nothing here: names of services, of endpoints, or addresses (`host` or `host:port`) as callers have them.
    pub uninstrumented: &'a [String],
    /// Texts that no telemetry may have in it.
    pub canaries: &'a [String],
}

/// Checks the traces of `set` and what they tell of each other, in the order of trace ids.
pub fn audit(set: &TraceSet, options: &AuditOptions<'_>) -> Vec<Finding> {
    let registry = options.check.registry.filter(|_| options.naming == Naming::Proposal);
    let mut findings = check(set, &CheckOptions { registry, ..options.check });
    if options.naming == Naming::LlmD {
        // These are rules of ours, which nobody else has to follow.
        findings.retain(|f| !matches!(f.rule, Rule::ErrorType | Rule::StatusOk));
        findings.extend(llm_d::find(set));
    }
    findings.extend(propagation::find(set, options));
    findings.extend(content::find(set, options.canaries));
    // Stable: what was found in a trace stays in its order.
    findings.sort_by_key(|f| f.trace_id);
    findings
}
