//! What Prometheus calls a metric of OpenTelemetry.
//!
//! The rules are those of the OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility": characters that Prometheus does not
//! have become underscores, the unit is a suffix written out, units in braces are none, counters end with `_total`.

use crate::metrics::{Def, Key, Kind};

/// Name of the family: without `_total`, which only samples of counters carry in OpenMetrics.
pub(super) fn family(def: &Def) -> String {
    let mut name = plain(def.name);
    if let Some(unit) = unit(def)
        && !name.ends_with(&format!("_{unit}"))
    {
        name.push('_');
        name.push_str(unit);
    }
    name
}

/// The unit as a word, if there is one.
pub(super) fn unit(def: &Def) -> Option<&'static str> {
    match def.unit {
        "s" => Some("seconds"),
        "ms" => Some("milliseconds"),
        "By" => Some("bytes"),
        "1" if matches!(def.kind, Kind::Gauge) => Some("ratio"),
        _ => None,
    }
}

/// Name of a label.
pub(super) fn label(key: &Key) -> String {
    key.label.map_or_else(|| plain(key.attribute), str::to_owned)
}

fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == ':' { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_mapping() {
        let check = |kind, name, unit, expect: &str| assert_eq!(family(&Def::new(kind, name, unit, "")), expect);
        check(Kind::Histogram, "gen_ai.server.request.duration", "s", "gen_ai_server_request_duration_seconds");
        check(Kind::Histogram, "gen_ai.client.token.usage", "{token}", "gen_ai_client_token_usage");
        check(Kind::UpDownCounter, "llm.requests.active", "{request}", "llm_requests_active");
        check(Kind::Gauge, "queue.bytes", "By", "queue_bytes");
        check(Kind::Gauge, "share", "1", "share_ratio");
        check(Kind::Counter, "share", "1", "share");
        assert_eq!(label(&Key::of("gen_ai.request.model")), "gen_ai_request_model");
        assert_eq!(label(&Key::called("http.route", "route")), "route");
    }
}
