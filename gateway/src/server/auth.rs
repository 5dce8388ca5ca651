//! Who may call: whoever has one of the tokens. Tokens are kept as digests and never shown.

use std::fmt;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::core::config::AuthConfig;

/// More tokens than this are a mistake: each is compared with every request.
const MAX_TOKENS: usize = 10_000;
/// Larger files are not read.
const MAX_BYTES: u64 = 1 << 20;

/// The tokens.
#[derive(Clone)]
pub(crate) struct Tokens(Vec<[u8; 32]>);

impl Tokens {
    /// The tokens of a configuration; `env` is usually `&|k| std::env::var(k).ok()`.
    ///
    /// # Errors
    /// If a file cannot be read, a variable is not set, or there is no token at all: then nobody could call.
    pub(crate) fn read(config: &AuthConfig, env: &dyn Fn(&str) -> Option<String>) -> Result<Tokens, String> {
        let mut text = String::new();
        if let Some(path) = &config.bearer_tokens_file {
            let fail = |e: std::io::Error| format!("auth.bearer_tokens_file {}: {e}", path.display());
            if std::fs::metadata(path).map_err(fail)?.len() > MAX_BYTES {
                return Err(format!("auth.bearer_tokens_file {}: larger than {MAX_BYTES} bytes", path.display()));
            }
            let lines = std::fs::read_to_string(path).map_err(fail)?;
            lines.lines().filter(|l| !l.trim_start().starts_with('#')).for_each(|l| text.extend([l, "\n"]));
        }
        if let Some(name) = &config.bearer_tokens_env {
            text += &env(name).ok_or_else(|| format!("auth.bearer_tokens_env: the variable {name} is not set"))?;
        }
        let tokens = text.split(|c: char| c.is_whitespace() || c == ',').filter(|t| !t.is_empty());
        let digests: Vec<[u8; 32]> = tokens.map(|t| Sha256::digest(t).into()).collect();
        match digests.len() {
            0 => Err("auth: there is no token, so nobody could call".to_owned()),
            n if n > MAX_TOKENS => Err(format!("auth: {n} tokens, at most {MAX_TOKENS}")),
            _ => Ok(Tokens(digests)),
        }
    }

    /// Whether the headers hold one of them. How long that takes says nothing about the tokens.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(AUTHORIZATION) else { return false };
        let mut parts = value.as_bytes().splitn(2, |b| *b == b' ');
        let (scheme, token) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let digest: [u8; 32] = Sha256::digest(token).into();
        let found = self.0.iter().fold(Choice::from(0), |any, own| any | own.ct_eq(&digest));
        scheme.eq_ignore_ascii_case(b"bearer") & bool::from(found)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn tokens(file: &str, variable: Option<&str>) -> Result<Tokens, String> {
        let mut kept = tempfile::NamedTempFile::new().unwrap();
        kept.write_all(file.as_bytes()).unwrap();
        let path = Some(kept.path().to_owned()).filter(|_| !file.is_empty());
        let config = AuthConfig { bearer_tokens_file: path, bearer_tokens_env: variable.map(|_| "TOKENS".to_owned()) };
        Tokens::read(&config, &|name| variable.filter(|v| name == "TOKENS" && !v.is_empty()).map(str::to_owned))
    }

    #[test]
    fn one_of_the_tokens_opens() {
        let tokens = tokens("# mine\none\n\n two \n", Some("three,four")).unwrap();
        let check = |value: &str, expect: bool| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
            assert_eq!(tokens.allow(&headers), expect, "{value}");
        };
        ["Bearer one", "bearer two", "BEARER three", "Bearer four"].into_iter().for_each(|v| check(v, true));
        for wrong in ["", "Bearer", "Bearer ", "Bearer five", "Basic one", "one", "Bearer  one", "Bearer one two"] {
            check(wrong, false);
        }
        assert!(!tokens.allow(&HeaderMap::new()));
        assert_eq!(format!("{tokens:?}"), "4 tokens");
    }

    #[test]
    fn no_token_is_an_error_and_none_is_shown() {
        assert!(tokens("#\n", None).unwrap_err().contains("no token"));
        assert!(tokens("", Some("")).unwrap_err().contains("TOKENS is not set"));
        let config = AuthConfig { bearer_tokens_file: Some("/nowhere/at/all".into()), bearer_tokens_env: None };
        assert!(Tokens::read(&config, &|_| None).unwrap_err().contains("/nowhere/at/all"));
    }
}
