//! A gateway that runs already, in place of the scenario's own: where it is, and whether somebody answers there.

use std::collections::BTreeSet;

use http::{StatusCode, Uri};
use serde::Deserialize;
use shared::time::Dur;

use super::outgoing::Destination;
use crate::remote::{Kind, Remote};
use crate::scenario::{Api, Scenario};
use crate::virtual_time::world::path_of;

/// The environment variable with headers for the gateway, credentials among them.
pub const HEADERS_VARIABLE: &str = "GATEWAY_HEADERS";

const KIND: Kind = Kind { what: "a gateway", example: "http://127.0.0.1:8080", headers: HEADERS_VARIABLE };
/// How long it may take to say that it is there.
const REACH_WITHIN: Dur = Dur::from_secs(5);
/// The longest list of models that is read, in bytes.
const MAX_LIST: usize = 1 << 20;
/// Models of the list that a warning names, and how much of each name.
const MAX_NAMED: (usize, usize) = (5, 80);

/// A gateway, or any other OpenAI-compatible server.
#[derive(Clone, Debug)]
pub struct Running(Remote);

/// Nobody answers.
#[derive(Debug, thiserror::Error)]
#[error(
    "{url}: cannot reach a gateway: {problem}\nhelp: GET {url}/v1/models must be answered, whatever the status; \
     without --gateway the scenario's own gateway and engines are started"
)]
pub struct Unreachable {
    url: String,
    problem: String,
}

impl Running {
    /// The gateway at `url`, with or without the `/v1` that OpenAI clients want. `headers` go with every request, as `NAME=VALUE`
    /// with commas between.
    ///
    /// # Errors
    /// In words, if the address or a header is none.
    pub fn new(url: &str, headers: &str) -> Result<Running, String> {
        let bare = url.trim_end_matches('/');
        Remote::new(KIND, bare.strip_suffix("/v1").unwrap_or(bare), headers).map(Running)
    }

    /// Its base address.
    pub fn url(&self) -> &str {
        self.0.url()
    }

    /// Asks it for its models, so that a run is not thousands of failed requests: what the user should know of the answer.
    ///
    /// # Errors
    /// If nobody answers.
    pub fn reach(&self, scenario: &Scenario) -> Result<Option<String>, Unreachable> {
        let unreachable = |problem| Unreachable { url: self.url().to_owned(), problem };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| unreachable(format!("cannot start: {e}")))?;
        let answer = runtime.block_on(self.0.get("/v1/models", REACH_WITHIN, MAX_LIST));
        let (status, body) = answer.map_err(unreachable)?;
        let doubt = match status {
            StatusCode::OK => not_listed(&models(scenario), &body),
            // Not every gateway has a list.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => None,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Some(format!("answered {status}: headers for it are taken from {HEADERS_VARIABLE}"))
            }
            status => Some(format!("answered {status}: requests may fail")),
        };
        Ok(doubt.map(|doubt| format!("{}/v1/models {doubt}", self.url())))
    }

    /// Where requests go.
    pub(super) fn destination(&self, api: Api) -> Destination {
        let text = format!("{}{}", self.url(), path_of(api));
        let uri: Uri = text.parse().expect("a base address and a path are a URL");
        Destination { uri, headers: self.0.headers().clone() }
    }
}

/// The models that requests ask for.
fn models(scenario: &Scenario) -> BTreeSet<String> {
    let tenants = &scenario.workload.tenants;
    let own = tenants.iter().filter_map(|t| t.model.clone());
    let common = tenants.is_empty() || tenants.iter().any(|t| t.model.is_none());
    own.chain(common.then(|| scenario.model())).collect()
}

/// Says which of the `asked` models are not in a list of OpenAI's form; nothing of what is no such list, or an empty one.
fn not_listed(asked: &BTreeSet<String>, body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Card>,
    }
    #[derive(Deserialize)]
    struct Card {
        id: String,
    }
    let List { data } = serde_json::from_slice(body).ok()?;
    let missing: Vec<&str> =
        asked.iter().filter(|model| data.iter().all(|card| card.id != **model)).map(String::as_str).collect();
    if data.is_empty() || missing.is_empty() {
        return None;
    }
    let (most, length) = MAX_NAMED;
    // A stranger's text: no more of it than helps, and nothing that a terminal would obey.
    let plain = |id: &str| id.chars().filter(|c| !c.is_control()).take(length).collect::<String>();
    let mut listed: Vec<String> = data.iter().take(most).map(|card| plain(&card.id)).collect();
    if data.len() > most {
        listed.push(format!("{} more", data.len() - most));
    }
    let (missing, listed) = (missing.join(", "), listed.join(", "));
    Some(format!("lists {listed}; requests ask for {missing} (workload.model, else engines[0].model)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_with_and_without_v1() {
        let check = |url: &str, expect: &str| {
            let running = Running::new(url, "").unwrap();
            assert_eq!(running.destination(Api::Chat).uri, expect, "{url}");
        };
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            check(url, "http://h:1/v1/chat/completions");
        }
        check("https://h/team/v1", "https://h/team/v1/chat/completions");
        let bad = |url: &str| Running::new(url, "").unwrap_err();
        assert_eq!(bad("h:1/x"), "h:1/x: found no address of a gateway, expected one such as http://127.0.0.1:8080");
        assert_eq!(bad("http://me:s3cret@h"), "http://h: found credentials in a URL, expected them in GATEWAY_HEADERS");
        let with = Running::new("http://h", "Authorization=Bearer s3cret").unwrap();
        assert_eq!(with.destination(Api::Completions).headers["authorization"], "Bearer s3cret");
        assert_eq!(format!("{with:?}"), "Running(http://h)");
    }

    #[test]
    fn models_that_are_not_listed_are_told() {
        let asked = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let check = |body: &str, expect: Option<&str>| {
            assert_eq!(not_listed(&asked, body.as_bytes()).as_deref(), expect, "{body}");
        };
        check(r#"{"data": [{"id": "b"}, {"id": "a", "object": "model"}]}"#, None);
        check(r#"{"data": []}"#, None);
        check("welcome", None);
        let expect = "lists c; requests ask for a, b (workload.model, else engines[0].model)";
        check(r#"{"data": [{"id": "c\u001b"}]}"#, Some(expect));
    }

    #[test]
    fn the_models_asked_for_are_those_of_tenants_and_workload() {
        let text = "{name: s, requests: 1, engines: [{count: 1}], workload: {arrivals: {process: constant, rate: 1}}}";
        let plain = shared::config::load_str::<Scenario>("s", text, &[]).unwrap().config;
        let check = |workload: &str, expect: &[&str]| {
            let workload = serde_json::from_str(workload).unwrap();
            let scenario = Scenario { workload, ..plain.clone() };
            assert_eq!(models(&scenario).iter().map(String::as_str).collect::<Vec<_>>(), expect);
        };
        check("{}", &["meta-llama/Llama-3.1-8B-Instruct"]);
        check(r#"{"model": "m"}"#, &["m"]);
        check(r#"{"model": "m", "tenants": [{"name": "a", "model": "n"}]}"#, &["n"]);
        check(r#"{"model": "m", "tenants": [{"name": "a", "model": "n"}, {"name": "b"}]}"#, &["m", "n"]);
    }
}
