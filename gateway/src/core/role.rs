//! Which stages of a request an endpoint serves, as its label says.

use std::collections::BTreeMap;

/// What an endpoint is for (llm-d's label `llm-d.ai/role`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Role {
    /// No label: it decodes, and prefills what it decodes. No other endpoint's prefill is sent to it.
    #[default]
    Unlabelled,
    /// `encode`
    Encode,
    /// `prefill`
    Prefill,
    /// `decode`: after another endpoint's prefill or its own.
    Decode,
    /// `encode-prefill`
    EncodePrefill,
    /// `prefill-decode`, once called `both`
    PrefillDecode,
    /// `encode-prefill-decode`
    EncodePrefillDecode,
    /// A value that llm-d's filters do not know: it serves no stage.
    Unknown,
}

impl Role {
    /// The label.
    pub const LABEL: &str = "llm-d.ai/role";

    /// The role that `labels` give.
    pub fn of(labels: &BTreeMap<String, String>) -> Role {
        match labels.get(Role::LABEL).map(String::as_str) {
            None => Role::Unlabelled,
            Some("encode") => Role::Encode,
            Some("prefill") => Role::Prefill,
            Some("decode") => Role::Decode,
            Some("encode-prefill") => Role::EncodePrefill,
            Some("prefill-decode" | "both") => Role::PrefillDecode,
            Some("encode-prefill-decode") => Role::EncodePrefillDecode,
            Some(_) => Role::Unknown,
        }
    }

    /// Whether `decode-filter` keeps it.
    pub const fn decodes(self) -> bool {
        match self {
            Role::Unlabelled | Role::Decode | Role::PrefillDecode | Role::EncodePrefillDecode => true,
            Role::Encode | Role::Prefill | Role::EncodePrefill | Role::Unknown => false,
        }
    }

    /// Whether `prefill-filter` keeps it.
    pub const fn prefills(self) -> bool {
        match self {
            Role::Prefill | Role::EncodePrefill | Role::PrefillDecode | Role::EncodePrefillDecode => true,
            Role::Unlabelled | Role::Encode | Role::Decode | Role::Unknown => false,
        }
    }

    /// Whether `encode-filter` keeps it.
    pub const fn encodes(self) -> bool {
        match self {
            Role::Encode | Role::EncodePrefill | Role::EncodePrefillDecode => true,
            Role::Unlabelled | Role::Prefill | Role::Decode | Role::PrefillDecode | Role::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_those_of_llm_ds_filters() {
        let check = |label: Option<&str>, expect: (bool, bool, bool)| {
            let labels = label.map(|l| (Role::LABEL.to_owned(), l.to_owned())).into_iter().collect();
            let role = Role::of(&labels);
            assert_eq!((role.encodes(), role.prefills(), role.decodes()), expect, "{label:?}");
        };
        check(None, (false, false, true));
        check(Some("encode"), (true, false, false));
        check(Some("prefill"), (false, true, false));
        check(Some("decode"), (false, false, true));
        check(Some("encode-prefill"), (true, true, false));
        check(Some("prefill-decode"), (false, true, true));
        check(Some("both"), (false, true, true));
        check(Some("encode-prefill-decode"), (true, true, true));
        check(Some("router"), (false, false, false));
    }
}
