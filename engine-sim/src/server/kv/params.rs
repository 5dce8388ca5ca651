//! `kv_transfer_params`: what a router puts into a request, and what an answer tells it.

use std::sync::Arc;

use serde_json::{Map, Value};
use shared::tokens::TokenId;

use super::Peers;
use crate::core::kv_transfer::{Kept, KvAsk, Peer, RemoteBlocks};

/// Names longer than this are no names.
const MAX_NAME: usize = 256;

/// What a request asks of the KV connector, as far as it makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::server) enum Asked {
    /// Nothing, or nothing that can be done.
    Nothing,
    /// `do_remote_decode`: keep the blocks.
    Keep,
    /// `do_remote_prefill`: read the blocks.
    Pull(Arc<RemoteBlocks>),
}

impl Asked {
    /// Reads the parameters. What is missing or has the wrong type is warned about, and the prompt is computed here, as vLLM
    /// does.
    pub(in crate::server) fn read(params: &Value) -> Asked {
        let Value::Object(params) = params else { return Asked::Nothing };
        let is = |key: &str| params.get(key).and_then(Value::as_bool).unwrap_or(false);
        if is("do_remote_prefill") {
            return match remote(params) {
                Ok(remote) => Asked::Pull(Arc::new(remote)),
                Err(missing) => {
                    tracing::warn!(missing, "got invalid KVTransferParams: the request will not utilize KVTransfer");
                    Asked::Nothing
                }
            };
        }
        if is("do_remote_decode") { Asked::Keep } else { Asked::Nothing }
    }

    /// The same for the engine: blocks are kept under vLLM's internal name of the request, its id and eight hex digits.
    pub(in crate::server) fn for_engine(&self, id: &str, random: u32) -> Option<KvAsk> {
        match self {
            Asked::Nothing => None,
            Asked::Keep => Some(KvAsk::Keep(format!("{id}-{random:08x}").into())),
            Asked::Pull(remote) => Some(KvAsk::Pull(Arc::clone(remote))),
        }
    }
}

/// The remote blocks, or the first field that is missing.
fn remote(params: &Map<String, Value>) -> Result<RemoteBlocks, &'static str> {
    let text = |key: &'static str| match params.get(key).and_then(Value::as_str) {
        Some(text) if !text.is_empty() && text.len() <= MAX_NAME => Ok(Arc::from(text)),
        Some(_) | None => Err(key),
    };
    let blocks = params.get("remote_block_ids").and_then(block_count).ok_or("remote_block_ids")?;
    let (engine_id, request, host) = (text("remote_engine_id")?, text("remote_request_id")?, text("remote_host")?);
    let port = params.get("remote_port").and_then(Value::as_u64).and_then(|p| u16::try_from(p).ok());
    let peer = Arc::new(Peer { engine_id, host, port: port.ok_or("remote_port")? });
    Ok(RemoteBlocks { peer, request, blocks })
}

/// Blocks of the one KV group there is: a list in a list, or the plain list of earlier versions.
fn block_count(ids: &Value) -> Option<u32> {
    let outer = ids.as_array()?;
    let group = match outer.first()? {
        Value::Array(group) => group,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => outer,
    };
    let whole = !group.is_empty() && group.iter().all(Value::is_u64);
    u32::try_from(group.len()).ok().filter(|_| whole)
}

/// The prompt as tokens, which a router may send so that the chat template is not applied again.
pub(in crate::server) fn prompt_tokens(params: &Value, out: &mut Vec<TokenId>) -> bool {
    let Some(ids) = params.get("prompt_token_ids").and_then(Value::as_array) else { return false };
    let before = out.len();
    out.extend(ids.iter().filter_map(|id| Some(TokenId(u32::try_from(id.as_u64()?).ok()?))));
    let all = out.len() - before == ids.len() && !ids.is_empty();
    if !all {
        out.truncate(before);
    }
    all
}

impl Peers {
    /// What the answer of a request tells the router about its blocks.
    pub(in crate::server) fn params(&self, kept: &Kept) -> Value {
        serde_json::json!({
            "do_remote_prefill": true,
            "do_remote_decode": false,
            "remote_block_ids": [kept.blocks],
            "remote_engine_id": *self.engine_id,
            "remote_request_id": *kept.request,
            "remote_host": self.address.ip().to_string(),
            "remote_port": self.address.port(),
            "tp_size": kept.tensor_parallel,
            "pp_size": 1,
            "dcp_size": 1,
            "remote_num_tokens": kept.tokens,
            "remote_blocks_expiry_time": null,
            "remote_registration_generation": 0,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": kept.cached_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn whole() -> Value {
        json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[3, 4, 5]],
            "remote_engine_id": "e", "remote_request_id": "cmpl-1-00", "remote_host": "127.0.0.1", "remote_port": 5600,
            "tp_size": 1, "remote_num_tokens": 40,
        })
    }

    #[test]
    fn what_a_router_sends_is_understood() {
        let decode = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null});
        assert_eq!(Asked::read(&decode), Asked::Keep);
        let Asked::Pull(remote) = Asked::read(&whole()) else { panic!("all fields are there") };
        assert_eq!((remote.blocks, &*remote.request, remote.peer.port), (3, "cmpl-1-00", 5600));
        assert_eq!(Asked::read(&json!({})), Asked::Nothing);
        assert_eq!(Asked::read(&json!("yes")), Asked::Nothing);
    }

    #[test]
    fn parameters_that_are_not_whole_are_not_used() {
        for key in ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"] {
            for wrong in [Value::Null, json!([]), json!([[]]), json!(""), json!(-1), json!(70000)] {
                let mut params = whole();
                params[key] = wrong;
                assert_eq!(Asked::read(&params), Asked::Nothing, "{params}");
            }
        }
    }

    #[test]
    fn a_plain_list_of_blocks_is_one_group() {
        let mut params = whole();
        params["remote_block_ids"] = json!([7, 8]);
        assert!(matches!(Asked::read(&params), Asked::Pull(remote) if remote.blocks == 2));
    }

    #[test]
    fn prompt_tokens_are_all_or_none() {
        let mut out = vec![TokenId(1)];
        assert!(prompt_tokens(&json!({"prompt_token_ids": [5, 6]}), &mut out));
        assert!(!prompt_tokens(&json!({"prompt_token_ids": [5, "a"]}), &mut out));
        assert!(!prompt_tokens(&json!({"prompt_token_ids": []}), &mut out));
        assert_eq!(out, [TokenId(1), TokenId(5), TokenId(6)]);
    }
}
