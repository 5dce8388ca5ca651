//! The environment variables of the OpenTelemetry specification, through an injected reader.
//!
//! Read: `OTEL_SDK_DISABLED`, `OTEL_TRACES_SAMPLER(_ARG)`, `OTEL_TRACES_EXPORTER` (`otlp`, `console`, `none`, or a comma list),
//! `OTEL_EXPORTER_OTLP_[TRACES_]{ENDPOINT,PROTOCOL,HEADERS,TIMEOUT,COMPRESSION,INSECURE,CERTIFICATE}`, the same with `METRICS_`,
//! `OTEL_METRICS_EXPORTER` (`otlp`, `prometheus` or `none`), `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_{MAX_QUEUE_SIZE,SCHEDULE_DELAY,MAX_EXPORT_BATCH_SIZE,EXPORT_TIMEOUT}` and
//! `OTEL_PROPAGATORS`. An empty value counts as unset. A value that cannot be used is ignored with a warning that names the
//! variable but, for headers and endpoints, never the value.
//!
//! `OTEL_TRACES_SAMPLER` naming a ratio sampler without a usable `OTEL_TRACES_SAMPLER_ARG` means the specification's ratio 1.0;
//! [`DEFAULT_RATIO`](crate::trace::config::DEFAULT_RATIO) holds where the environment names no sampler. Three rules differ from
//! the specification: without `OTEL_TRACES_EXPORTER` spans are exported only if an endpoint is given, without a protocol an
//! endpoint with port 4317 is taken for gRPC, and `OTEL_TRACES_SAMPLER_ARG` alone sets the ratio of the default sampler.

use crate::time::Dur;
use std::path::PathBuf;

use crate::trace::config::{
    ConfigError, ExporterChoice, OtlpChoice, OtlpConfig, OtlpEncoding, OtlpProtocol, Signal, otlp_endpoint,
};
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
    /// Where metrics are pushed to.
    pub(crate) metrics: Option<Vec<OtlpChoice>>,
    pub(crate) metrics_otlp: EnvOtlp,
    pub(crate) metrics_interval: Option<Dur>,
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
    ca_file: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Endpoint {
    url: OtlpUrl,
    /// Set for the signal alone: taken as it is. A general endpoint gets the signal's path appended for HTTP.
    for_signal: bool,
}

impl EnvLayer {
    pub(crate) fn read(env: &dyn Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> EnvLayer {
        let mut vars = Vars { env, warnings };
        let otlp = EnvOtlp::read(&mut vars, Signal::Traces);
        let metrics_otlp = EnvOtlp::read(&mut vars, Signal::Metrics);
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
            metrics: metrics(&mut vars),
            metrics_otlp,
            metrics_interval: vars.parse("OTEL_METRIC_EXPORT_INTERVAL", "milliseconds above 0", timeout),
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
    fn read(vars: &mut Vars<'_>, signal: Signal) -> EnvOtlp {
        let insecure = vars.parse_otlp(signal, "INSECURE", "true or false", boolean).unwrap_or(false);
        let url = |v: &str| {
            let text = match (v.contains("://"), insecure) {
                (true, _) => v.to_owned(),
                (false, true) => format!("http://{v}"),
                (false, false) => format!("https://{v}"),
            };
            OtlpUrl::parse(&text).ok()
        };
        let allowed = "an http or https URL without user name and password";
        let own = vars.parse_secret(&format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.word()), allowed, url);
        let general = vars.parse_secret("OTEL_EXPORTER_OTLP_ENDPOINT", allowed, url);
        let endpoint = match (own, general) {
            (Some(url), _) => Some(Endpoint { url, for_signal: true }),
            (None, Some(url)) => Some(Endpoint { url, for_signal: false }),
            (None, None) => None,
        };
        EnvOtlp {
            endpoint,
            protocol: vars.parse_otlp(signal, "PROTOCOL", "grpc or http/protobuf", protocol),
            headers: vars
                .parse_otlp_secret(signal, "HEADERS", "key=value pairs with commas", pairs)
                .unwrap_or_default(),
            timeout: vars.parse_otlp(signal, "TIMEOUT", "milliseconds above 0", timeout),
            gzip: vars.parse_otlp(signal, "COMPRESSION", "gzip or none", compression).unwrap_or(false),
            ca_file: vars.parse_otlp(signal, "CERTIFICATE", "a path", |v| Some(PathBuf::from(v))),
        }
    }

    /// The configuration of an endpoint that the user asks for, completed by the environment.
    pub(crate) fn choose(&self, choice: OtlpChoice, signal: Signal) -> Result<OtlpConfig, ConfigError> {
        let OtlpChoice { url, protocol, encoding: _, gzip, headers, ca_file } = choice;
        let mut otlp = match url {
            Some(url) => self.complete(otlp_endpoint(&url, self.protocol(protocol), signal)?),
            None => self.resolve(protocol, signal),
        };
        otlp.gzip = gzip.unwrap_or(otlp.gzip);
        otlp.ca_file = ca_file.or(otlp.ca_file);
        otlp.headers.retain(|(name, _)| !headers.iter().any(|(own, _)| own.eq_ignore_ascii_case(name)));
        otlp.headers.extend(headers);
        Ok(otlp)
    }

    /// The protocol that the user gave elsewhere, else that of the environment.
    fn protocol(&self, given: Option<OtlpProtocol>) -> Option<OtlpProtocol> {
        given.or(self.protocol)
    }

    /// The configuration for an endpoint that the user gave elsewhere.
    fn complete(&self, (endpoint, protocol): (String, OtlpProtocol)) -> OtlpConfig {
        let timeout = self.timeout.unwrap_or(Dur::from_secs(10));
        OtlpConfig {
            endpoint,
            protocol,
            headers: self.headers.clone(),
            timeout,
            gzip: self.gzip,
            encoding: OtlpEncoding::Sdk,
            ca_file: self.ca_file.clone(),
        }
    }

    /// The configuration that the environment gives, with the specification's default endpoints.
    fn resolve(&self, protocol: Option<OtlpProtocol>, signal: Signal) -> OtlpConfig {
        let by_port = self.endpoint.as_ref().map(|e| e.url.protocol_of_port());
        let protocol = self.protocol(protocol).or(by_port).unwrap_or(OtlpProtocol::HttpProtobuf);
        let endpoint = match (&self.endpoint, protocol) {
            (None, OtlpProtocol::Grpc) => "http://localhost:4317".to_owned(),
            (None, OtlpProtocol::HttpProtobuf) => format!("http://localhost:4318{}", signal.path()),
            (Some(e), OtlpProtocol::HttpProtobuf) if !e.for_signal => e.url.for_signal(signal),
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

    /// Says something once: what holds for all signals is read for each of them.
    fn complain(&mut self, text: String) {
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }

    fn parse<T>(&mut self, name: &str, allowed: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.get(name)?;
        let value = parse(&text);
        if value.is_none() {
            self.complain(format!("{name}=`{text}` is ignored: {allowed} is allowed"));
        }
        value
    }

    /// A variable that exists for one signal alone and for all signals.
    fn parse_otlp<T>(
        &mut self,
        signal: Signal,
        what: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let own = self.parse(&format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.word()), allowed, &parse);
        own.or_else(|| self.parse(&format!("OTEL_EXPORTER_OTLP_{what}"), allowed, &parse))
    }

    /// Like [`Vars::parse`] for values that must not be shown.
    fn parse_secret<T>(&mut self, name: &str, allowed: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let value = parse(&self.get(name)?);
        if value.is_none() {
            self.complain(format!("{name} is ignored: {allowed} is allowed"));
        }
        value
    }

    /// Like [`Vars::parse_otlp`] for values that must not be shown.
    fn parse_otlp_secret<T>(
        &mut self,
        signal: Signal,
        what: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let own = self.parse_secret(&format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.word()), allowed, &parse);
        own.or_else(|| self.parse_secret(&format!("OTEL_EXPORTER_OTLP_{what}"), allowed, &parse))
    }
}

fn exporters(vars: &mut Vars<'_>, endpoint_given: bool) -> Option<Vec<ExporterChoice>> {
    let otlp = || ExporterChoice::Otlp(OtlpChoice::default());
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

/// Where metrics are pushed to; nowhere unless this asks for it, since every service has a page of them to read.
fn metrics(vars: &mut Vars<'_>) -> Option<Vec<OtlpChoice>> {
    let list = vars.get("OTEL_METRICS_EXPORTER")?;
    let mut chosen = Vec::new();
    for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        match name {
            "otlp" => chosen.push(OtlpChoice::default()),
            "prometheus" | "none" => {}
            _ => vars.warnings.push(format!(
                "OTEL_METRICS_EXPORTER: exporter `{name}` is ignored: otlp, prometheus or none is allowed"
            )),
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
