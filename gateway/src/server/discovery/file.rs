//! Endpoints in a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use shared::config::{MAX_FILE_BYTES, Problems, Validate};

use super::{MAX_ENDPOINTS, Said};
use crate::core::config::FileDiscovery;
use crate::server::backend::Backend;

/// A file of endpoints.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct EndpointFile {
    /// The endpoints; an empty list is a pool without endpoints of this file.
    endpoints: Vec<Listed>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Listed {
    /// Its name, unique in the pool.
    name: String,
    /// Its base URL.
    url: String,
    /// Its labels.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl Validate for EndpointFile {
    fn validate(&self, p: &mut Problems) {
        p.check(self.endpoints.len() <= MAX_ENDPOINTS, "endpoints", self.endpoints.len(), "at most 10000 endpoints");
        for (i, listed) in self.endpoints.iter().enumerate() {
            let twice = self.endpoints[..i].iter().any(|other| other.name == listed.name);
            let name = format!("{:?}", listed.name);
            p.check(!twice, &format!("endpoints[{i}].name"), format!("{name} a second time"), "each name once");
            if let Err(error) = listed.backend() {
                p.add(&format!("endpoints[{i}]"), format!("{name} at {:?}", listed.url), error.to_string());
            }
        }
    }
}

impl Listed {
    fn backend(&self) -> Result<Backend, crate::server::BadBackend> {
        let mut backend = Backend::named(&self.name, &self.url)?;
        backend.config = backend.config.with_labels(self.labels.clone());
        Ok(backend)
    }
}

/// The file, and what stood in it.
#[derive(Debug)]
pub(crate) struct FileSource {
    path: PathBuf,
    /// The text that was read last, good or bad; its endpoints until they are told.
    text: Option<String>,
}

impl FileSource {
    pub(super) fn new(config: &FileDiscovery) -> Result<FileSource, String> {
        let source = FileSource { path: config.path.clone(), text: None };
        parse(&source.path, &text(&source.path)?)?;
        Ok(source)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it. A bad text is an error each time it is read.
    pub(super) async fn read(&mut self) -> Result<Said, String> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || text(&path)).await;
        let text = read.map_err(|e| e.to_string())??;
        if self.text.as_ref() == Some(&text) {
            return Ok(Said::Nothing);
        }
        let endpoints = parse(&self.path, &text)?;
        self.text = Some(text);
        Ok(Said::Endpoints(endpoints))
    }
}

fn text(path: &Path) -> Result<String, String> {
    let fail = |e: std::io::Error| format!("{}: {e}", path.display());
    let bytes = std::fs::metadata(path).map_err(fail)?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(format!("{}: {bytes} bytes, at most {MAX_FILE_BYTES} are read", path.display()));
    }
    std::fs::read_to_string(path).map_err(fail)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Backend>, String> {
    let source = path.display().to_string();
    let loaded = shared::config::load_str::<EndpointFile>(&source, text, &[]).map_err(|e| e.to_string())?;
    let backends = loaded.config.endpoints.iter().map(|listed| listed.backend().map_err(|e| e.to_string()));
    backends.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<&[&str], &str>) {
        let found = parse(Path::new("pool.yaml"), text);
        let names = found.as_ref().map(|list| list.iter().map(|b| &*b.config.name).collect::<Vec<_>>());
        match (names, expect) {
            (Ok(names), Ok(expect)) => assert_eq!(names, expect),
            (Err(error), Err(expect)) => assert!(error.contains(expect), "{error}"),
            (found, expect) => panic!("{text}: {found:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn a_file_lists_endpoints_or_says_what_is_wrong() {
        check("endpoints: []", Ok(&[]));
        check(
            "endpoints:\n  - { name: a, url: http://h:1, labels: { llm-d.ai/role: decode } }\n  - { name: b, url: https://h/v1 }",
            Ok(&["a", "b"]),
        );
        check("", Err("pool.yaml"));
        check("endpoints: [{ name: a }]", Err("endpoints[0]"));
        check("endpoints: [{ name: a, url: h:1 }]", Err("http://127.0.0.1:8000"));
        check("endpoints: [{ name: 'a b', url: 'http://h:1' }]", Err("endpoints[0]"));
        check("endpoints: [{ name: a, url: 'http://h' }, { name: a, url: 'http://i' }]", Err("endpoints[1].name"));
        check("endpoint: []", Err("endpoint"));
    }
}
