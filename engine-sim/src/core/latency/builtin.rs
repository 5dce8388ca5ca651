//! The profiles that come with the engine, as the files they are. Each is parsed when it is first asked for.

use std::sync::{Arc, OnceLock};

use super::LatencyProfile;
use super::file::{ProfileFile, load_profile};

/// A file of the folder `profiles`.
pub(super) struct Builtin {
    pub(super) name: &'static str,
    text: &'static str,
    parsed: OnceLock<(ProfileFile, Arc<LatencyProfile>)>,
}

macro_rules! builtin {
    ($name:literal) => {
        Builtin {
            name: $name,
            text: include_str!(concat!("../../../profiles/", $name, ".yaml")),
            parsed: OnceLock::new(),
        }
    };
}

/// All of them, the default first.
pub(super) static ALL: [Builtin; PROFILES] = [
    builtin!("llama-3.1-8b-h100"),
    builtin!("llama-3.1-8b-fp8-h200"),
    builtin!("llama-3.1-8b-rtxpro6000"),
    builtin!("llama-3.1-8b-rtxpro6000-tp2"),
    builtin!("qwen3-32b-h100-tp2"),
    builtin!("qwen3-32b-h100-tp4"),
    builtin!("qwen3-32b-rtxpro6000"),
    builtin!("qwen3-32b-rtxpro6000-tp2"),
    builtin!("llama-3.3-70b-h100-tp8"),
    builtin!("llama-2-70b-a100-tp8"),
    builtin!("llama-2-70b-h100-tp8"),
    builtin!("instant"),
];
const PROFILES: usize = 12;

pub(super) fn find(name: &str) -> Option<&'static Builtin> {
    ALL.iter().find(|b| b.name == name)
}

impl Builtin {
    /// The file and the profile in it.
    pub(super) fn parsed(&self) -> &(ProfileFile, Arc<LatencyProfile>) {
        self.parsed.get_or_init(|| {
            let file =
                load_profile(self.name, self.text).unwrap_or_else(|e| panic!("a built-in profile is wrong:\n{e}"));
            assert_eq!(file.name, self.name, "a built-in profile is named as its file");
            let profile = Arc::new(file.profile());
            (file, profile)
        })
    }
}
