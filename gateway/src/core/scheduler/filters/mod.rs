//! Filters: which endpoints may be used at all. The formulas and defaults are those of llm-d's plugins of the same names
//! (llm-d-router `pkg/epp/framework/plugins/scheduling/filter`, August 2026).

mod by_label;
mod by_role;
mod header_based_testing;
mod healthy;
mod label_selector;
mod lora_residency;
mod prefix_cache_affinity;
mod slo_headroom_tier;
mod utilization;

pub use by_label::ByLabel;
pub use by_role::{ByRole, Stage};
pub use header_based_testing::HeaderBasedTesting;
pub use healthy::Healthy;
pub use label_selector::LabelSelector;
pub use lora_residency::LoraResidency;
pub use prefix_cache_affinity::PrefixCacheAffinity;
pub use slo_headroom_tier::SloHeadroomTier;
pub use utilization::Utilization;
