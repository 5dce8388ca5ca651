//! Latency profiles by name or by file: what a configuration names, found.
//!
//! The core knows the profiles that come with it; this is the one place that reads a user's own.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use shared::config::{ConfigErrors, did_you_mean};

use crate::core::latency::{LatencyProfile, ProfileFile};

/// Why there is no such profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileError {
    /// No built-in profile has this name, and it is not the path of a YAML file.
    Unknown {
        /// The name.
        name: String,
    },
    /// The file is missing or wrong.
    File(ConfigErrors),
}

impl std::error::Error for ProfileError {}

impl fmt::Display for ProfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProfileError::Unknown { name } => write!(f, "found {name}, expected {}", allowed()),
            ProfileError::File(errors) => write!(f, "{errors}"),
        }
    }
}

impl ProfileError {
    /// A name that may have been meant.
    pub fn hint(&self) -> Option<String> {
        match self {
            ProfileError::Unknown { name } => {
                did_you_mean(name, LatencyProfile::names()).map(|n| format!("did you mean {n}?"))
            }
            ProfileError::File(_) => None,
        }
    }
}

/// What names a profile.
pub fn allowed() -> String {
    let names = LatencyProfile::names().collect::<Vec<_>>().join(", ");
    format!("one of {names}, or the path of a .yaml file")
}

/// The profile that `name` means: a built-in one, or a file when it ends in `.yaml` or `.yml`.
///
/// A path is relative to the working directory. A file is read once in a process: engines of one run are alike.
///
/// # Errors
/// An unknown name, or everything that is wrong with the file.
pub fn find(name: &str) -> Result<Arc<LatencyProfile>, ProfileError> {
    static READ: Mutex<BTreeMap<String, Arc<LatencyProfile>>> = Mutex::new(BTreeMap::new());
    if let Some(profile) = LatencyProfile::named(name) {
        return Ok(profile);
    }
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(profile) = read.get(name) {
        return Ok(Arc::clone(profile));
    }
    let profile = Arc::new(find_file(name)?.profile());
    read.insert(name.to_owned(), Arc::clone(&profile));
    Ok(profile)
}

/// As [`find`], with where its constants come from.
///
/// # Errors
/// As [`find`].
pub fn find_file(name: &str) -> Result<ProfileFile, ProfileError> {
    match ProfileFile::named(name) {
        Some(file) => Ok(file.clone()),
        None if is_path(name) => shared::config::load::<ProfileFile>(Path::new(name), &[])
            .map(|loaded| loaded.config)
            .map_err(ProfileError::File),
        None => Err(ProfileError::Unknown { name: name.to_owned() }),
    }
}

fn is_path(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("yaml") || e.eq_ignore_ascii_case("yml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_first_then_files() {
        assert_eq!(find("instant").unwrap().name, "instant");
        let error = find("instnat").unwrap_err();
        assert_eq!(error.hint().unwrap(), "did you mean instant?");
        assert!(error.to_string().starts_with("found instnat, expected one of llama-3.1-8b-h100, "), "{error}");
        assert!(error.to_string().ends_with("or the path of a .yaml file"), "{error}");
        let error = find("no/such.yaml").unwrap_err();
        assert_eq!(error.to_string(), "error: no/such.yaml: found no such file, expected a readable YAML file");
    }

    #[test]
    fn a_file_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.yaml");
        let mut file = find_file("instant").unwrap();
        file.name = "mine".to_owned();
        std::fs::write(&path, file.to_yaml()).unwrap();
        let (name, first) = (path.to_str().unwrap(), find(path.to_str().unwrap()).unwrap());
        assert_eq!(first.name, "mine");
        std::fs::remove_file(&path).unwrap();
        assert!(Arc::ptr_eq(&first, &find(name).unwrap()));
    }
}
