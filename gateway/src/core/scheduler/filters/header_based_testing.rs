//! `header-based-testing-filter`: endpoints that the header `test-epp-endpoint-selection` names, a list of addresses with or without
//! a port; none without the header. Of several endpoints at one address llm-d keeps one, here all are kept.

use shared::rng::Stream;

use crate::core::pool::EndpointConfig;
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what the caller names.
#[derive(Debug)]
pub struct HeaderBasedTesting;

impl Filter for HeaderBasedTesting {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        let selection = view.selection.unwrap_or_default();
        candidates.retain(|c| {
            let config = &view.pool.get(c.id).config;
            selection.split(',').map(str::trim).any(|item| names(item, config))
        });
    }
}

fn names(item: &str, config: &EndpointConfig) -> bool {
    let bare = |host: &str| host.trim_matches(['[', ']']) == config.address.trim_matches(['[', ']']);
    // The colons of an IPv6 address are no port unless the address is in brackets.
    let with_port = item.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
    match with_port {
        Some((host, port)) => bare(host) && port.parse() == Ok(config.port),
        None => !item.is_empty() && bare(item),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn the_caller_names_endpoints() {
        let endpoint = |address, port| EndpointConfig::new("e", address, port);
        let pool = Pool::new(vec![endpoint("10.0.0.1", 8000), endpoint("10.0.0.2", 8000), endpoint("fd00::1", 8000)]);
        let check = |selection: Option<&str>, expect: &[u32]| {
            let view = View { selection, ..view(&pool) };
            assert_eq!(kept(&HeaderBasedTesting, &view, candidates(3, |_, _| {})), expect, "{selection:?}");
        };
        check(None, &[]);
        check(Some(" "), &[]);
        check(Some("10.0.0.2"), &[1]);
        check(Some("10.0.0.2:8000, 10.0.0.1"), &[0, 1]);
        check(Some("10.0.0.1:9000"), &[]);
        check(Some("10.0.0.3"), &[]);
        check(Some("fd00::1"), &[2]);
        check(Some("[fd00::1]:8000"), &[2]);
        check(Some("[fd00::1]:1"), &[]);
    }
}
