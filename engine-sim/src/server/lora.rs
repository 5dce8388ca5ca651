//! The LoRA adapters that requests can choose by model name (`vllm/entrypoints/openai/models/serving.py`).
//!
//! An adapter is a name, a path and a number; nothing is read from the path. The core knows adapters by number, and a name keeps its
//! number when it is unloaded and loaded again.

use std::sync::{Arc, PoisonError, RwLock};

use crate::core::config::LoraModule;

/// So many names are told apart in the life of a server.
const MAX_NAMES: usize = 1 << 16;

/// A loaded adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Adapter {
    pub(super) number: u32,
    pub(super) name: Arc<str>,
    pub(super) path: Arc<str>,
    /// The model it was made for, if that is said.
    pub(super) base: Option<Arc<str>>,
}

/// Why an adapter is not loaded or unloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// vLLM says no, in these words.
    Bad(String),
    /// There is no such adapter.
    Unknown(String),
    /// The engine cannot.
    Engine(&'static str),
}

/// All adapters of a server.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    enabled: bool,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// In order of their first loading.
    loaded: Vec<Adapter>,
    /// Names by number, from 1, those of unloaded ones included: requests may still run with them.
    names: Vec<Arc<str>>,
}

impl Adapters {
    /// The adapters of a checked configuration.
    pub(super) fn new(enabled: bool, modules: &[LoraModule]) -> Adapters {
        let mut known = Known::default();
        for module in modules {
            known.load(&module.name, &module.path, module.base_model_name.as_deref());
        }
        Adapters { enabled, known: RwLock::new(known) }
    }

    /// The adapter that a model name chooses.
    pub(super) fn find(&self, model: &str) -> Option<Adapter> {
        self.read(|known| known.loaded.iter().find(|a| &*a.name == model).cloned())
    }

    /// All that are loaded.
    pub(super) fn loaded(&self) -> Vec<Adapter> {
        self.read(|known| known.loaded.clone())
    }

    /// Names of adapters, joined with commas as vLLM's metrics have them.
    pub(super) fn names(&self, numbers: &[u32]) -> String {
        self.read(|known| {
            let name = |n: &u32| known.names.get((*n as usize).checked_sub(1)?).map(|name| &**name);
            numbers.iter().filter_map(name).collect::<Vec<_>>().join(",")
        })
    }

    /// Loads an adapter; `is_base` says which names are served models.
    pub(super) fn load(
        &self,
        name: &str,
        path: &str,
        in_place: bool,
        is_base: impl Fn(&str) -> bool,
    ) -> Result<(), Refused> {
        if name.is_empty() || path.is_empty() {
            return Err(Refused::Bad("Both 'lora_name' and 'lora_path' must be provided.".into()));
        }
        if is_base(name) {
            return Err(Refused::Bad(format!("The lora adapter '{name}' conflicts with a served base model.")));
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if !in_place && known.loaded.iter().any(|a| &*a.name == name) {
            let text = "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.";
            return Err(Refused::Bad(format!("The lora adapter '{name}' {text}")));
        }
        if !self.enabled {
            return Err(Refused::Engine("LoRA is not enabled. Use --enable-lora to enable LoRA."));
        }
        if known.load(name, path, None) {
            Ok(())
        } else {
            Err(Refused::Engine("This emulator tells 65536 names apart."))
        }
    }

    /// Forgets an adapter; requests that run with it go on.
    pub(super) fn unload(&self, name: &str) -> Result<(), Refused> {
        if name.is_empty() {
            return Err(Refused::Bad("'lora_name' needs to be provided to unload a LoRA adapter.".into()));
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let at = known.loaded.iter().position(|a| &*a.name == name);
        let at = at.ok_or_else(|| Refused::Unknown(format!("The lora adapter '{name}' cannot be found.")))?;
        known.loaded.remove(at);
        Ok(())
    }

    fn read<R>(&self, look: impl FnOnce(&Known) -> R) -> R {
        look(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Known {
    /// False if there are too many names.
    fn load(&mut self, name: &str, path: &str, base: Option<&str>) -> bool {
        let at = self.names.iter().position(|n| &**n == name);
        let at = at.unwrap_or_else(|| {
            self.names.push(name.into());
            self.names.len() - 1
        });
        if at >= MAX_NAMES {
            self.names.truncate(MAX_NAMES);
            return false;
        }
        let name = Arc::clone(&self.names[at]);
        let adapter = Adapter { number: at as u32 + 1, name, path: path.into(), base: base.map(Arc::from) };
        match self.loaded.iter_mut().find(|a| a.number == adapter.number) {
            Some(old) => *old = adapter,
            None => self.loaded.push(adapter),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number() {
        let adapters = Adapters::new(true, &[]);
        let load = |name, path, in_place| adapters.load(name, path, in_place, |n| n == "base");
        assert_eq!(load("a", "/a", false), Ok(()));
        assert_eq!(load("b", "/b", false), Ok(()));
        assert!(matches!(load("a", "/a2", false), Err(Refused::Bad(_))));
        assert_eq!(load("a", "/a2", true), Ok(()));
        assert_eq!(adapters.find("a").map(|a| (a.number, a.path)), Some((1, "/a2".into())));
        assert_eq!(adapters.unload("a"), Ok(()));
        assert!(matches!(adapters.unload("a"), Err(Refused::Unknown(_))));
        assert_eq!((adapters.find("a"), adapters.names(&[1, 2, 9])), (None, "a,b".into()));
        assert_eq!(load("a", "/a", false), Ok(()));
        assert_eq!(adapters.find("a").map(|a| a.number), Some(1));
        assert!(matches!(load("base", "/x", false), Err(Refused::Bad(_))));
        assert!(matches!(Adapters::default().load("a", "/a", false, |_| false), Err(Refused::Engine(_))));
    }
}
