//! Every row of docs/engine-http.md, sent to a real socket.

use engine_sim::core::config::{EngineConfig, LoraModule, Tokenizer};
use engine_sim::server::{ApiKeys, Frontend};
use http::Request;
use http::header::{HeaderName, HeaderValue};
use http_body_util::Full;
use serde_json::Value;

use crate::harness::{Reply, Running, instant};

const PAGE: &str = include_str!("../../../docs/engine-http.md");

/// One request and what is answered.
#[derive(Debug)]
struct Row {
    request: String,
    status: u16,
    answer: String,
    vllm: String,
}

/// Sections of the page that have rows, by heading.
fn sections() -> Vec<(String, Vec<Row>)> {
    let mut sections: Vec<(String, Vec<Row>)> = Vec::new();
    for line in PAGE.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            sections.push((heading.to_owned(), Vec::new()));
        } else if let Some(cells) = line.strip_prefix("| ").and_then(|l| l.strip_suffix(" |"))
            && let [_, request, status, answer, vllm] = cells.split(" | ").collect::<Vec<_>>()[..]
            && let Ok(status) = status.parse()
        {
            let row = Row { request: code(request), status, answer: code(answer), vllm: vllm.to_owned() };
            sections.last_mut().expect("a table has a heading").1.push(row);
        }
    }
    sections
}

/// The text between one or two backticks.
fn code(cell: &str) -> String {
    let text = cell.strip_prefix("``").and_then(|c| c.strip_suffix("``"));
    let text = text.filter(|t| !t.is_empty()).or_else(|| cell.strip_prefix('`')?.strip_suffix('`'));
    // A code span may begin and end with a space, so that it can begin and end with a backtick.
    text.unwrap_or_default().trim_matches(' ').replace('⏎', "\n")
}

/// The server of a section.
async fn server(heading: &str) -> Running {
    let (mut engine, mut frontend) = (instant(), Frontend::default());
    match heading {
        "A server with defaults" => {}
        "With `--max-model-len 64`" => engine.max_model_len = Some(64),
        "With `--api-key secret`" => frontend.api_keys = ApiKeys::new(["secret"]),
        "In dev mode" => frontend.dev_mode = true,
        "With LoRA" => {
            let sql = LoraModule { name: "sql".into(), path: "/adapters/sql".into(), base_model_name: None };
            engine = EngineConfig { max_loras: Some(2), lora_modules: vec![sql], ..engine };
            frontend.runtime_lora = true;
        }
        "With `--tokenizer bpe`" => engine.tokenizer = Tokenizer::Bpe,
        other => panic!("no server for the section {other:?}"),
    }
    Running::with(engine, |config| config.frontend = frontend).await
}

/// `METHOD /path <header: value> body`
fn request(server: &Running, row: &str) -> Request<Full<bytes::Bytes>> {
    let (method, rest) = row.split_once(' ').expect("a request has a method");
    let (path, mut rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut headers = vec![("content-type".to_owned(), "application/json".to_owned())];
    while let Some((header, after)) = rest.strip_prefix('<').and_then(|r| r.split_once('>')) {
        let (name, value) = header.split_once(": ").expect("a header has a value");
        headers.push((name.to_owned(), value.to_owned()));
        rest = after.trim_start();
    }
    let mut request = server.request(path, rest.to_owned());
    *request.method_mut() = method.parse().unwrap();
    for (name, value) in headers {
        let name = HeaderName::try_from(name).unwrap();
        request.headers_mut().insert(name, HeaderValue::try_from(value).unwrap());
    }
    request
}

/// Whether every field of `part` is in `whole`.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(k, v)| whole.get(k).is_some_and(|w| contains(w, v)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() >= part.len() && whole.iter().zip(part).all(|(w, p)| contains(w, p))
        }
        (whole, part) => whole == part,
    }
}

fn check(row: &Row, reply: &Reply) {
    assert_eq!(reply.status, row.status, "{row:?}\n{}", reply.text);
    let json = serde_json::from_str::<Value>(&reply.text).ok();
    let message = json.as_ref().and_then(|j| j["error"]["message"].as_str());
    let holds = match (serde_json::from_str::<Value>(&row.answer), message) {
        (Ok(part @ Value::Object(_)), _) => json.as_ref().is_some_and(|j| contains(j, &part)),
        (_, Some(message)) => message == row.answer,
        (_, None) if row.request.starts_with("GET /metrics") => reply.text.contains(&row.answer),
        (_, None) => reply.text == row.answer,
    };
    assert!(holds, "{row:?}\n{}", reply.text);
    if row.status >= 400 && message.is_some() {
        let error = &json.as_ref().expect("an error is JSON")["error"];
        assert_eq!(error["code"], row.status, "{row:?}");
        let kind = error["type"].as_str().unwrap();
        let validation = row.answer.contains("validation error") || row.answer == "Invalid JSON format";
        let expect = match kind {
            "Bad Request" => validation,
            "BadRequestError" => !validation && row.status == 400 && !row.vllm.contains("InvalidUserInput"),
            named => row.vllm.contains(&format!("`{named}`")),
        };
        assert!(expect, "{kind} in {row:?}");
        assert!(!reply.text.contains("canary"), "the caller's text is not repeated: {row:?}");
    }
}

#[tokio::test]
async fn every_row_of_the_page_holds() {
    let mut rows = 0;
    for (heading, table) in sections() {
        let server = server(&heading).await;
        for row in &table {
            check(row, &server.exchange(request(&server, &row.request)).await);
        }
        rows += table.len();
        server.stop().await;
    }
    assert!(rows > 100, "{rows} rows were found");
}
