//! Requests as bytes, ready for the socket. Pure: everything follows from spec, block and index.

use std::fmt::Write as _;

use rand_distr::{Distribution, Exp1};
use shared::rng::{Seed, mix64};
use shared::time::{Dur, Time};
use shared::tokens::{self, ContentId, TokenId};

use super::{Arrival, Lengths, LoadSpec, Pattern, Sample};
use crate::scenario::Api;
use crate::workload::Segment;

/// A request before it is sent.
#[derive(Debug)]
pub(super) struct Prepared {
    /// With the id, the intended time as offset from the start of the block, and room for what will be seen.
    pub(super) sample: Sample,
    /// Head and body.
    pub(super) bytes: Vec<u8>,
}

/// Writes requests.
#[derive(Debug)]
pub(super) struct Writer {
    /// Request line and headers, up to the content length.
    head: String,
    api: Api,
    /// The model as JSON.
    model: String,
}

/// The id a request is sent with.
pub(super) fn request_id(block: u64, index: u64) -> String {
    format!("b{block}-{index}")
}

impl Writer {
    pub(super) fn new(spec: &LoadSpec) -> Writer {
        let target = spec.uri.path_and_query().map_or("/", |p| p.as_str());
        let host = spec.uri.authority().map_or("", |a| a.as_str());
        let mut head = format!("POST {target} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n");
        for (name, value) in &spec.headers {
            // A header value is bytes; those that are no text cannot be written on purpose.
            if let Ok(value) = value.to_str() {
                let _ = write!(head, "{name}: {value}\r\n");
            }
        }
        Writer { head, api: spec.api, model: serde_json::to_string(&spec.model).expect("text serialises") }
    }

    /// The requests of a block, each written when it is asked for.
    pub(super) fn requests<'a>(&'a self, spec: &'a LoadSpec, block: u64) -> impl Iterator<Item = Prepared> + 'a {
        let salt = mix64(spec.seed.value("overhead/prompts") ^ mix64(block));
        let mut tokens = Vec::new();
        let arrivals = arrivals(&spec.pattern, spec.seed);
        arrivals.zip(0..).map(move |(arrival, index)| {
            tokens.clear();
            for segment in &arrival.prompt {
                let content = ContentId(mix64(segment.content.0 ^ salt));
                content.extend(segment.from, segment.from + u64::from(segment.tokens), &mut tokens);
            }
            self.write(request_id(block, index), &arrival, &tokens)
        })
    }

    /// Filler is letters and spaces: it needs no JSON escapes.
    fn write(&self, id: String, arrival: &Arrival, prompt: &[TokenId]) -> Prepared {
        let mut body = String::with_capacity(prompt.len() * tokens::BYTES_PER_TOKEN + 256);
        let _ = write!(body, "{{\"model\":{},", self.model);
        match self.api {
            Api::Completions => {
                body.push_str("\"prompt\":\"");
                tokens::push_text(prompt, &mut body);
                body.push_str("\",");
            }
            Api::Chat => messages(arrival, prompt, &mut body),
        }
        let output = arrival.output_tokens;
        let _ = write!(
            body,
            "\"max_tokens\":{output},\"ignore_eos\":true,\"stream\":true,\"stream_options\":{{\"include_usage\":true}}}}"
        );
        let mut bytes = String::with_capacity(self.head.len() + body.len() + 96);
        let length = body.len();
        let _ = write!(bytes, "{}content-length: {length}\r\nx-request-id: {id}\r\n\r\n{body}", self.head);
        let gaps = Vec::with_capacity(output.saturating_sub(1) as usize);
        let intended = Time::ZERO + arrival.offset;
        Prepared { sample: Sample { id, intended, gaps, ..Sample::default() }, bytes: bytes.into_bytes() }
    }
}

/// The last segment is the user's, what comes before is the system's.
fn messages(arrival: &Arrival, prompt: &[TokenId], body: &mut String) {
    let own = arrival.prompt.last().map_or(0, |s| s.tokens as usize);
    let (system, user) = prompt.split_at(prompt.len() - own);
    body.push_str("\"messages\":[");
    if !system.is_empty() {
        body.push_str("{\"role\":\"system\",\"content\":\"");
        tokens::push_text(system, body);
        body.push_str("\"},");
    }
    body.push_str("{\"role\":\"user\",\"content\":\"");
    tokens::push_text(user, body);
    body.push_str("\"}],");
}

/// When and how long; the same for every block.
fn arrivals(pattern: &Pattern, seed: Seed) -> Box<dyn Iterator<Item = Arrival> + '_> {
    match pattern {
        Pattern::FixedRate { per_second, requests, lengths } => {
            // The k-th comes at k / rate, so that rounding never adds up.
            let at = move |k| Dur::from_secs_f64(k as f64 / per_second);
            Box::new((0..*requests).map(move |k| plain(k, at(k), *lengths)))
        }
        Pattern::Poisson { per_second, requests, lengths } => {
            let mut stream = seed.stream("overhead/arrivals");
            let mut seconds = 0.0;
            Box::new((0..*requests).map(move |k| {
                let gap: f64 = Exp1.sample(stream.rng());
                seconds += gap / per_second;
                plain(k, Dur::from_secs_f64(seconds), *lengths)
            }))
        }
        Pattern::Closed { requests, lengths, .. } => Box::new((0..*requests).map(|k| plain(k, Dur::ZERO, *lengths))),
        Pattern::Schedule(arrivals) => Box::new(arrivals.iter().cloned()),
    }
}

/// A request that shares its prompt with no other.
fn plain(index: u64, offset: Dur, lengths: Lengths) -> Arrival {
    let prompt = vec![Segment { content: ContentId(mix64(index)), from: 0, tokens: lengths.prompt }];
    Arrival { offset, prompt, output_tokens: lengths.output }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{HeaderMap, Uri};
    use shared::openai::Request;

    use super::*;

    fn spec(api: Api, pattern: Pattern) -> LoadSpec {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", "Bearer me".parse().unwrap());
        let uri = Uri::from_static("http://127.0.0.1:1234/v1/x?y=z");
        let (timeout, spin) = (Dur::from_secs(1), Dur::ZERO);
        LoadSpec { uri, api, model: "a \"b\"".into(), headers, pattern, timeout, spin, seed: Seed(3) }
    }

    fn written(spec: &LoadSpec, block: u64) -> Vec<(Sample, String, Vec<TokenId>)> {
        let writer = Writer::new(spec);
        let requests = writer.requests(spec, block).map(|prepared| {
            let text = String::from_utf8(prepared.bytes).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())));
            let parsed: Request<'_> = serde_json::from_str(body).unwrap();
            let mut tokens = Vec::new();
            parsed.prompt_tokens(&mut tokens).unwrap();
            assert_eq!((parsed.stream, parsed.ignore_eos), (Some(true), Some(true)));
            assert_eq!(parsed.model.as_deref(), Some("a \"b\""));
            (prepared.sample, head.to_owned(), tokens)
        });
        requests.collect()
    }

    const LENGTHS: Lengths = Lengths { prompt: 20, output: 8 };

    #[test]
    fn a_request_is_what_a_server_expects() {
        for api in [Api::Chat, Api::Completions] {
            let spec = spec(api, Pattern::FixedRate { per_second: 4.0, requests: 3, lengths: LENGTHS });
            let requests = written(&spec, 7);
            let offsets: Vec<_> = requests.iter().map(|(s, ..)| s.intended.as_nanos() / 1_000_000).collect();
            assert_eq!(offsets, [0, 250, 500]);
            let (sample, head, tokens) = &requests[2];
            assert_eq!((sample.id.as_str(), tokens.len()), ("b7-2", 20));
            let start = "POST /v1/x?y=z HTTP/1.1\r\nhost: 127.0.0.1:1234\r\ncontent-type: application/json\r\n";
            assert!(head.starts_with(start), "{head}");
            assert!(head.contains("authorization: Bearer me\r\n") && head.contains("\r\nx-request-id: b7-2"), "{head}");
        }
    }

    #[test]
    fn prompts_differ_between_blocks_and_repeat_with_the_seed() {
        let prompts = |spec: &LoadSpec, block| written(spec, block).into_iter().map(|(.., t)| t).collect::<Vec<_>>();
        let closed = Pattern::Closed { in_flight: 2, requests: 4, lengths: LENGTHS };
        let (one, mut other) = (spec(Api::Chat, closed.clone()), spec(Api::Chat, closed));
        other.seed = Seed(4);
        let blocks = [prompts(&one, 0), prompts(&one, 1), prompts(&other, 0)];
        let mut first_blocks: Vec<_> = blocks.iter().flatten().map(|tokens| tokens[..16].to_vec()).collect();
        first_blocks.sort();
        first_blocks.dedup();
        assert_eq!(first_blocks.len(), 12, "no prompt begins as another one does");
        assert_eq!(prompts(&one, 1), blocks[1]);
    }

    #[test]
    fn shared_prefixes_are_shared_within_a_block_only() {
        let segment = |content, tokens| Segment { content: ContentId(content), from: 0, tokens };
        let arrival = |own| Arrival {
            offset: Dur::from_millis(own),
            prompt: vec![segment(1, 16), segment(own, 5)],
            output_tokens: own as u32,
        };
        let pattern = Pattern::Schedule(Arc::from([arrival(2), arrival(3)]));
        let spec = spec(Api::Chat, pattern);
        let (a, b) = (written(&spec, 0), written(&spec, 1));
        assert_eq!(a[0].2[..16], a[1].2[..16]);
        assert_ne!(a[0].2[16..], a[1].2[16..]);
        assert_ne!(a[0].2[..16], b[0].2[..16]);
        assert_eq!(a[1].0.intended, b[1].0.intended);
    }

    #[test]
    fn poisson_arrivals_repeat_and_keep_their_rate() {
        let spec = spec(Api::Chat, Pattern::Poisson { per_second: 100.0, requests: 4_000, lengths: LENGTHS });
        let times = || arrivals(&spec.pattern, spec.seed).map(|a| a.offset).collect::<Vec<_>>();
        let all = times();
        assert!(all.is_sorted());
        assert_eq!(all, times());
        // The sum of 4,000 exponential gaps of 10 ms has a standard deviation of 0.63 s.
        assert!((all[3_999].as_secs_f64() - 40.0).abs() < 4.0 * 0.63, "{}", all[3_999]);
    }
}
