//! Bodies with some of their members replaced. Everything else stays byte for byte as the caller wrote it: fields nobody here knows,
//! the order of fields, the way numbers are written.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// An object with more members is refused: no request has so many.
const MAX_MEMBERS: usize = 4096;

/// What tells the prefilling engine to keep its cache for another one (vLLM's NIXL connector).
const KEEP: &str = "{\"do_remote_decode\":true,\"do_remote_prefill\":false,\"remote_engine_id\":null,\"remote_block_ids\":null,\
                    \"remote_host\":null,\"remote_port\":null}";

/// A body that is no JSON object. The text of it is not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoObject {
    /// Where it stops being one, in bytes.
    pub offset: usize,
}

/// Members that are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    MaxTokens,
    MaxCompletionTokens,
    MinTokens,
    Stream,
    StreamOptions,
    KvTransferParams,
    Priority,
}

impl Field {
    fn of(name: &str) -> Option<Field> {
        match name {
            "max_tokens" => Some(Field::MaxTokens),
            "max_completion_tokens" => Some(Field::MaxCompletionTokens),
            "min_tokens" => Some(Field::MinTokens),
            "stream" => Some(Field::Stream),
            "stream_options" => Some(Field::StreamOptions),
            "kv_transfer_params" => Some(Field::KvTransferParams),
            "priority" => Some(Field::Priority),
            _ => None,
        }
    }
}

/// A JSON object, read as far as its members.
#[derive(Clone, Debug)]
pub struct Object {
    text: Bytes,
    members: Vec<Member>,
}

#[derive(Clone, Debug)]
struct Member {
    field: Option<Field>,
    /// Name, colon and value.
    all: Range<usize>,
    value: Range<usize>,
}

impl Object {
    /// Reads the members of an object.
    ///
    /// # Errors
    /// If `text` is anything else than one JSON object.
    pub fn read(text: Bytes) -> Result<Object, NoObject> {
        let members = Reader { text: &text, at: 0 }.members()?;
        Ok(Object { text, members })
    }

    /// The request for the engine that prefills: one token, in one piece, and the cache kept.
    pub fn for_prefill(&self) -> Bytes {
        let added = ["\"max_tokens\":1,\"max_completion_tokens\":1,\"stream\":false,\"kv_transfer_params\":", KEEP];
        self.with(|field| matches!(field, None | Some(Field::Priority)), &added.map(str::as_bytes))
    }

    /// The request for the engine that decodes: with `params` if there are any, and without a caller's own.
    pub fn for_decode(&self, params: Option<&[u8]>) -> Bytes {
        let others = |field| field != Some(Field::KvTransferParams);
        match params {
            Some(params) => self.with(others, &[b"\"kv_transfer_params\":", params]),
            None => self.with(others, &[]),
        }
    }

    /// The request with this priority, whatever its caller wrote.
    pub fn with_priority(&self, priority: i32) -> Bytes {
        self.with(|field| field != Some(Field::Priority), &[b"\"priority\":", priority.to_string().as_bytes()])
    }

    /// `kv_transfer_params` of an answer, as they are; nothing if they are no object. The last member of a name counts.
    pub fn transfer_params(&self) -> Option<Bytes> {
        let found = self.members.iter().rfind(|m| m.field == Some(Field::KvTransferParams))?;
        let value = self.text.slice(found.value.clone());
        value.starts_with(b"{").then_some(value)
    }

    /// The object of the members that are wanted, and of the text `added` after them.
    fn with(&self, wanted: impl Fn(Option<Field>) -> bool, added: &[&[u8]]) -> Bytes {
        let mut out = Vec::with_capacity(self.text.len() + added.iter().map(|a| a.len()).sum::<usize>() + 2);
        out.push(b'{');
        for member in self.members.iter().filter(|m| wanted(m.field)) {
            out.extend_from_slice(&self.text[member.all.clone()]);
            out.push(b',');
        }
        added.iter().for_each(|piece| out.extend_from_slice(piece));
        if out.last() == Some(&b',') {
            out.pop();
        }
        out.push(b'}');
        out.into()
    }
}

/// Walks over one object.
struct Reader<'t> {
    text: &'t [u8],
    at: usize,
}

impl<'t> Reader<'t> {
    fn members(mut self) -> Result<Vec<Member>, NoObject> {
        let mut members = Vec::new();
        self.expect(b'{')?;
        if self.peek() == Some(b'}') {
            self.at += 1;
        } else {
            loop {
                members.push(self.member()?);
                match self.peek() {
                    Some(b',') if members.len() < MAX_MEMBERS => self.at += 1,
                    Some(b'}') => break self.at += 1,
                    _ => return Err(self.wrong()),
                }
            }
        }
        match self.peek() {
            None => Ok(members),
            Some(_) => Err(self.wrong()),
        }
    }

    fn member(&mut self) -> Result<Member, NoObject> {
        if self.peek() != Some(b'"') {
            return Err(self.wrong());
        }
        let start = self.at;
        let field = Field::of(&self.value::<Cow<'t, str>>()?);
        self.expect(b':')?;
        self.peek();
        let value = self.at;
        self.value::<IgnoredAny>()?;
        Ok(Member { field, all: start..self.at, value: value..self.at })
    }

    /// The next JSON value.
    fn value<T: Deserialize<'t>>(&mut self) -> Result<T, NoObject> {
        let mut values = serde_json::Deserializer::from_slice(&self.text[self.at..]).into_iter::<T>();
        match values.next() {
            Some(Ok(value)) => {
                self.at += values.byte_offset();
                Ok(value)
            }
            Some(Err(_)) | None => Err(self.wrong()),
        }
    }

    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        let spaces = self.text[self.at..].iter().take_while(|b| matches!(b, b' ' | b'\n' | b'\r' | b'\t')).count();
        self.at += spaces;
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Result<(), NoObject> {
        if self.peek() != Some(byte) {
            return Err(self.wrong());
        }
        self.at += 1;
        Ok(())
    }

    const fn wrong(&self) -> NoObject {
        NoObject { offset: self.at }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(text: &str) -> Result<Object, NoObject> {
        Object::read(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn text(bytes: Bytes) -> String {
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn a_prefill_makes_one_token_and_keeps_its_cache() {
        let object = read(
            r#" { "z":1.0e2 , "model" : "m","stream":true,"max_tokens": 9, "min_tokens":3,"stream_options":{"include_usage":true},
                  "max_completion_tokens":9,"prompt":"a \"stream\": b","kv_transfer_params":{"x":1},"str\u0065am":true } "#,
        );
        let prefill = text(object.unwrap().for_prefill());
        let head = r#"{"z":1.0e2,"model" : "m","prompt":"a \"stream\": b","max_tokens":1,"max_completion_tokens":1,"stream":false,"#;
        assert!(prefill.starts_with(head), "{prefill}");
        let value: Value = serde_json::from_str(&prefill).unwrap();
        let params = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null});
        assert_eq!(value["kv_transfer_params"], params);
    }

    #[test]
    fn a_decode_brings_the_parameters_as_they_are() {
        let object = read(r#"{"stream":true,"kv_transfer_params":{"own":1},"max_tokens":9}"#).unwrap();
        let params = br#"{"remote_block_ids":[[1,2]],  "n":1e0}"#;
        let expect = r#"{"stream":true,"max_tokens":9,"kv_transfer_params":{"remote_block_ids":[[1,2]],  "n":1e0}}"#;
        assert_eq!(text(object.for_decode(Some(params))), expect);
        assert_eq!(text(object.for_decode(None)), r#"{"stream":true,"max_tokens":9}"#);
        assert_eq!(text(read("{}").unwrap().for_decode(None)), "{}");
        assert_eq!(text(read("{ }").unwrap().for_decode(Some(b"{}"))), r#"{"kv_transfer_params":{}}"#);
    }

    #[test]
    fn parameters_of_an_answer_are_found() {
        let check = |answer: &str, expect: Option<&str>| {
            assert_eq!(read(answer).unwrap().transfer_params().map(text).as_deref(), expect, "{answer}");
        };
        check(r#"{"id":"x","kv_transfer_params": {"a":[1]} }"#, Some(r#"{"a":[1]}"#));
        check(r#"{"choices":[{"kv_transfer_params":{"a":1}}]}"#, None);
        check(r#"{"kv_transfer_params":null}"#, None);
        check(r#"{"kv_transfer_params":[1]}"#, None);
        check(r#"{"kv_transfer_params":{},"kv_transfer_params":null}"#, None);
        check("{}", None);
    }

    #[test]
    fn anything_else_is_no_object() {
        for bad in ["", " ", "[]", "7", "null", "\"x\"", "{", "{\"a\"}", "{\"a\":}", "{\"a\":1", "{\"a\":1,}", "{a:1}"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        for bad in ["{} x", "{}{}", "{\"a\":1 \"b\":2}", "{\"a\":[1,2}", "{,}", "{7:1}", "{\"a\":tru}", "{\"a\":1}}"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(read("{\"a\":1 x").unwrap_err(), NoObject { offset: 7 });
        let many = vec!["\"a\":1"; MAX_MEMBERS + 1].join(",");
        assert!(read(&format!("{{{many}}}")).is_err(), "more members than any request has");
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,6}", inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Unknown members survive, whatever they are; known ones are as they must be.
        #[test]
        fn only_known_members_change(
            members in prop::collection::btree_map("[a-z_\"\\\\{},:é]{1,10}", value(), 0..6),
            stream in prop::option::of(any::<bool>()),
            pretty in any::<bool>(),
        ) {
            let mut all: serde_json::Map<String, Value> = members.into_iter().collect();
            if let Some(stream) = stream {
                all.insert("stream".to_owned(), stream.into());
            }
            let object = Value::Object(all);
            let written = if pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) };
            let read = read(&written.unwrap()).unwrap();
            let mut prefill: Value = serde_json::from_slice(&read.for_prefill()).unwrap();
            let mut decode: Value = serde_json::from_slice(&read.for_decode(Some(b"{\"p\":1}"))).unwrap();
            prop_assert_eq!(&prefill["max_tokens"], &json!(1));
            prop_assert_eq!(&prefill["stream"], &json!(false));
            prop_assert_eq!(decode["kv_transfer_params"].take(), json!({"p": 1}));
            decode.as_object_mut().unwrap().remove("kv_transfer_params");
            prop_assert_eq!(&decode, &object);
            for key in ["max_tokens", "max_completion_tokens", "stream", "kv_transfer_params"] {
                prefill.as_object_mut().unwrap().remove(key);
                decode.as_object_mut().unwrap().remove(key);
            }
            prop_assert_eq!(prefill, decode);
        }

        #[test]
        fn no_text_makes_it_fail(text in ".{0,40}") {
            if let Ok(object) = read(&text) {
                prop_assert!(serde_json::from_slice::<Value>(&object.for_prefill()).is_ok());
            }
        }
    }
}
