//! The environment variables of the OpenTelemetry specification, through an injected reader.
//!
//! Read: `OTEL_SDK_DISABLED`, `OTEL_TRACES_SAMPLER(_ARG)`, `OTEL_TRACES_EXPORTER` (`otlp`, `console`, `none`, or a comma list),
//! `OTEL_EXPORTER_OTLP_[TRACES_]{ENDPOINT,PROTOCOL,HEADERS,TIMEOUT,COMPRESSION,INSECURE}`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_{MAX_QUEUE_SIZE,SCHEDULE_DELAY,MAX_EXPORT_BATCH_SIZE,EXPORT_TIMEOUT}` and
//! `OTEL_PROPAGATORS`. An empty value counts as unset. A value that cannot be used is ignored with a warning that names the
//! variable but, for headers and endpoints, never the value.
//!
//! `OTEL_TRACES_SAMPLER` naming a ratio sampler without a usable `OTEL_TRACES_SAMPLER_ARG` means the specification's ratio 1.0;
//! [`DEFAULT_RATIO`](crate::trace::config::DEFAULT_RATIO) holds where the environment names no sampler. Three rules differ from
//! the specification: without `OTEL_TRACES_EXPORTER` spans are exported only if an endpoint is given, without a protocol an
//! endpoint with port 4317 is taken for gRPC, and `OTEL_TRACES_SAMPLER_ARG` alone sets the ratio of the default sampler.

use crate::time::Dur;
use crate::trace::config::{ExporterChoice, OtlpConfig, OtlpEncoding, OtlpProtocol};
use crate::trace::exporter::console::ConsoleTarget;
use crate::trace::otlp_url::OtlpUrl;
use crate::trace::sampler::{Ratio, SamplerKind};

/// The settings found in the environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct EnvLayer {
    pub(crate) disabled: Option<bool>,
    pub(crate) sampler: Option<SamplerKind>,
    pub(crate) ratio: Option<Ratio>,
    pub(crate) exporters: Option<Vec<ExporterChoice>>,
    pub(crate) otlp: EnvOtlp,
    pub(crate) schedule_delay: Option<Dur>,
    pub(crate) max_batch: Option<usize>,
    pub(crate) max_queue: Option<usize>,
    pub(crate) export_timeout: Option<Dur>,
    pub(crate) trace_context: Option<bool>,
    pub(crate) service_name: Option<String>,
    pub(crate) resource_attributes: Vec<(String, String)>,
}

/// What the environment says about the OTLP exporter.
#[derive(Clone, Debug, Default)]
pub(crate) struct EnvOtlp {
    endpoint: Option<Endpoint>,
    protocol: Option<OtlpProtocol>,
    headers: Vec<(String, String)>,
    timeout: Option<Dur>,
    gzip: bool,
}

#[derive(Clone, Debug)]
struct Endpoint {
    url: OtlpUrl,
    /// Set for traces alone: taken as it is. A general endpoint gets `/v1/traces` appended for HTTP.
    for_traces: bool,
}

impl EnvLayer {
    pub(crate) fn read(env: &dyn Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> EnvLayer {
        let mut vars = Vars { env, warnings };
        let otlp = EnvOtlp::read(&mut vars);
        let exporters = exporters(&mut vars, otlp.endpoint.is_some());
        let attributes = vars.parse("OTEL_RESOURCE_ATTRIBUTES", "key=value pairs with commas", pairs);
        let mut resource_attributes = attributes.unwrap_or_default();
        let named = resource_attributes.iter().position(|(k, _)| k == "service.name");
        let from_attributes = named.map(|i| resource_attributes.remove(i).1);
        EnvLayer {
            disabled: vars.parse("OTEL_SDK_DISABLED", "true or false", boolean),
            sampler: vars.parse("OTEL_TRACES_SAMPLER", "a sampler of the specification", |v| v.parse().ok()),
            ratio: vars.parse("OTEL_TRACES_SAMPLER_ARG", "a number from 0 to 1", |v| Ratio::new(v.parse().ok()?)),
            exporters,
            otlp,
            schedule_delay: vars.parse("OTEL_BSP_SCHEDULE_DELAY", "milliseconds", millis),
            max_batch: vars.parse("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "a number above 0", positive),
            max_queue: vars.parse("OTEL_BSP_MAX_QUEUE_SIZE", "a number above 0", positive),
            export_timeout: vars.parse("OTEL_BSP_EXPORT_TIMEOUT", "milliseconds above 0", timeout),
            trace_context: propagators(&mut vars),
            service_name: vars.get("OTEL_SERVICE_NAME").or(from_attributes),
            resource_attributes,
        }
    }
}

impl EnvOtlp {
    fn read(vars: &mut Vars<'_>) -> EnvOtlp {
        let insecure = vars.parse_otlp("INSECURE", "true or false", boolean).unwrap_or(false);
        let url = |v: &str| {
            let text = match (v.contains("://"), insecure) {
                (true, _) => v.to_owned(),
                (false, true) => format!("http://{v}"),
                (false, false) => format!("https://{v}"),
            };
            OtlpUrl::parse(&text).ok()
        };
        let allowed = "an http or https URL without user name and password";
        let own = vars.parse_secret("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", allowed, url);
        let general = vars.parse_secret("OTEL_EXPORTER_OTLP_ENDPOINT", allowed, url);
        let endpoint = match (own, general) {
            (Some(url), _) => Some(Endpoint { url, for_traces: true }),
            (None, Some(url)) => Some(Endpoint { url, for_traces: false }),
            (None, None) => None,
        };
        EnvOtlp {
            endpoint,
            protocol: vars.parse_otlp("PROTOCOL", "grpc or http/protobuf", protocol),
            headers: vars.parse_otlp_secret("HEADERS", "key=value pairs with commas", pairs).unwrap_or_default(),
            timeout: vars.parse_otlp("TIMEOUT", "milliseconds above 0", timeout),
            gzip: vars.parse_otlp("COMPRESSION", "gzip or none", compression).unwrap_or(false),
        }
    }

    /// The protocol that the user gave elsewhere, else that of the environment.
    pub(crate) fn protocol(&self, given: Option<OtlpProtocol>) -> Option<OtlpProtocol> {
        given.or(self.protocol)
    }

    /// The configuration for an endpoint that the user gave elsewhere.
    pub(crate) fn complete(&self, (endpoint, protocol): (String, OtlpProtocol)) -> OtlpConfig {
        let timeout = self.timeout.unwrap_or(Dur::from_secs(10));
        OtlpConfig {
            endpoint,
            protocol,
            headers: self.headers.clone(),
            timeout,
            gzip: self.gzip,
            encoding: OtlpEncoding::Sdk,
        }
    }

    /// The configuration that the environment gives, with the specification's default endpoints.
    pub(crate) fn resolve(&self, protocol: Option<OtlpProtocol>) -> OtlpConfig {
        let by_port = self.endpoint.as_ref().map(|e| e.url.protocol_of_port());
        let protocol = self.protocol(protocol).or(by_port).unwrap_or(OtlpProtocol::HttpProtobuf);
        let endpoint = match (&self.endpoint, protocol) {
            (None, OtlpProtocol::Grpc) => "http://localhost:4317".to_owned(),
            (None, OtlpProtocol::HttpProtobuf) => "http://localhost:4318/v1/traces".to_owned(),
            (Some(e), OtlpProtocol::HttpProtobuf) if !e.for_traces => e.url.for_traces(),
            (Some(e), OtlpProtocol::HttpProtobuf) => e.url.whole(),
            (Some(e), OtlpProtocol::Grpc) => e.url.base(),
        };
        self.complete((endpoint, protocol))
    }
}

/// The variables, and where complaints about them go.
struct Vars<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
    warnings: &'a mut Vec<String>,
}

impl Vars<'_> {
    /// The trimmed value; empty is unset.
    fn get(&self, name: &str) -> Option<String> {
        (self.env)(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    fn parse<T>(&mut self, name: &str, allowed: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.get(name)?;
        let value = parse(&text);
        if value.is_none() {
            self.warnings.push(format!("{name}=`{text}` is ignored: {allowed} is allowed"));
        }
        value
    }

    /// A variable that exists for traces alone and for all signals.
    fn parse_otlp<T>(&mut self, what: &str, allowed: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let own = self.parse(&format!("OTEL_EXPORTER_OTLP_TRACES_{what}"), allowed, &parse);
        own.or_else(|| self.parse(&format!("OTEL_EXPORTER_OTLP_{what}"), allowed, &parse))
    }

    /// Like [`Vars::parse`] for values that must not be shown.
    fn parse_secret<T>(&mut self, name: &str, allowed: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let value = parse(&self.get(name)?);
        if value.is_none() {
            self.warnings.push(format!("{name} is ignored: {allowed} is allowed"));
        }
        value
    }

    /// Like [`Vars::parse_otlp`] for values that must not be shown.
    fn parse_otlp_secret<T>(&mut self, what: &str, allowed: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let own = self.parse_secret(&format!("OTEL_EXPORTER_OTLP_TRACES_{what}"), allowed, &parse);
        own.or_else(|| self.parse_secret(&format!("OTEL_EXPORTER_OTLP_{what}"), allowed, &parse))
    }
}

fn exporters(vars: &mut Vars<'_>, endpoint_given: bool) -> Option<Vec<ExporterChoice>> {
    let otlp = || ExporterChoice::Otlp { url: None, protocol: None, encoding: None };
    let Some(list) = vars.get("OTEL_TRACES_EXPORTER") else {
        return endpoint_given.then(|| vec![otlp()]);
    };
    let mut chosen = Vec::new();
    for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        match name {
            "otlp" => chosen.push(otlp()),
            "console" => chosen.push(ExporterChoice::Console(ConsoleTarget::Stderr)),
            "none" => {}
            _ => vars
                .warnings
                .push(format!("OTEL_TRACES_EXPORTER: exporter `{name}` is ignored: otlp, console or none is allowed")),
        }
    }
    Some(chosen)
}

/// Whether trace context is propagated; `None` leaves the default.
fn propagators(vars: &mut Vars<'_>) -> Option<bool> {
    let list = vars.get("OTEL_PROPAGATORS")?;
    let mut trace_context = false;
    for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        match name {
            "tracecontext" => trace_context = true,
            // Baggage is a header like any other to a proxy: it is always forwarded.
            "baggage" | "none" => {}
            _ => vars.warnings.push(format!(
                "OTEL_PROPAGATORS: propagator `{name}` is ignored: tracecontext, baggage or none is allowed"
            )),
        }
    }
    Some(trace_context)
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

fn protocol(text: &str) -> Option<OtlpProtocol> {
    match text {
        "grpc" => Some(OtlpProtocol::Grpc),
        "http/protobuf" => Some(OtlpProtocol::HttpProtobuf),
        _ => None,
    }
}

fn compression(text: &str) -> Option<bool> {
    match text {
        "gzip" => Some(true),
        "none" => Some(false),
        _ => None,
    }
}

fn millis(text: &str) -> Option<Dur> {
    let ms: u64 = text.parse().ok()?;
    Some(Dur::from_nanos(ms.checked_mul(1_000_000)?))
}

fn timeout(text: &str) -> Option<Dur> {
    millis(text).filter(|d| *d > Dur::ZERO)
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|n| *n > 0)
}

/// `key=value,key2=value2` with percent-encoded values (the W3C baggage syntax, without properties).
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let members = text.split(',').map(str::trim).filter(|m| !m.is_empty());
    members
        .map(|member| {
            let (key, value) = member.split_once('=')?;
            let key = key.trim();
            (!key.is_empty()).then_some(())?;
            Some((key.to_owned(), percent_decode(value.trim())?))
        })
        .collect()
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(b) = rest.next() {
        if b == b'%' {
            let digit = |b: Option<u8>| char::from(b?).to_digit(16);
            bytes.push((digit(rest.next())? * 16 + digit(rest.next())?) as u8);
        } else {
            bytes.push(b);
        }
    }
    String::from_utf8(bytes).ok()
}
