//! Layers of the configuration: who wins, what is an error, what only a warning.

use std::collections::BTreeMap;

use shared::time::Dur;
use shared::trace::config::{
    ExporterChoice, ExporterConfig, Layer, OtlpChoice, OtlpConfig, OtlpEncoding, OtlpProtocol, RecorderKind,
};
use shared::trace::sampler::{Root, Sampler};
use shared::trace::{SamplerKind, TelemetryConfig};

fn resolve(command_line: Layer, file: Layer, env: &[(&str, &str)]) -> (TelemetryConfig, Vec<String>) {
    let vars: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    TelemetryConfig::resolve(&command_line, &file, &|name| vars.get(name).cloned()).expect("a valid configuration")
}

fn from_env(env: &[(&str, &str)]) -> (TelemetryConfig, Vec<String>) {
    resolve(Layer::default(), Layer::default(), env)
}

fn sampler(sampler: &Sampler) -> String {
    let root = match &sampler.root {
        Root::On => "on".to_owned(),
        Root::Off => "off".to_owned(),
        Root::Ratio(ratio) => ratio.probability().to_string(),
    };
    if sampler.parent_based { format!("parent, {root}") } else { root }
}

#[test]
fn without_any_layer_the_defaults_hold() {
    let (config, warnings) = from_env(&[]);
    assert_eq!((sampler(&config.sampler).as_str(), config.detail, config.exporters.len()), ("parent, 0.1", 2, 0));
    assert!(!config.disabled && config.trace_context && warnings.is_empty());
}

#[test]
fn the_sampler_comes_from_the_highest_layer_that_names_one() {
    let layer = |kind: Option<SamplerKind>, ratio: Option<f64>| Layer { sampler: kind, ratio, ..Layer::default() };
    let on = Some(SamplerKind::AlwaysOn);
    let by_ratio = Some(SamplerKind::TraceIdRatio);
    let env_ratio: &[_] = &[("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.25")];
    let check = |command_line: Layer, file: Layer, env: &[(&str, &str)], expect: &str| {
        assert_eq!(sampler(&resolve(command_line, file, env).0.sampler), expect, "{env:?}");
    };
    check(layer(None, None), layer(None, None), env_ratio, "0.25");
    check(layer(None, Some(0.5)), layer(on, None), env_ratio, "parent, 0.5");
    // The specification's 1.0 holds for kinds that the environment names, the default of 0.1 for others.
    check(layer(None, None), layer(None, None), &[("OTEL_TRACES_SAMPLER", "traceidratio")], "1");
    check(layer(None, None), layer(None, None), &[("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")], "parent, 1");
    let unusable: &[_] = &[("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "2")];
    check(layer(None, None), layer(None, None), unusable, "1");
    check(layer(by_ratio, None), layer(None, None), unusable, "0.1");
    check(layer(None, None), layer(None, None), &[("OTEL_TRACES_SAMPLER_ARG", "0.5")], "parent, 0.5");
    check(layer(on, None), layer(None, Some(0.5)), env_ratio, "on");
    check(layer(by_ratio, None), layer(None, Some(0.5)), &[], "0.5");
    check(layer(by_ratio, None), layer(None, None), env_ratio, "0.25");
    check(layer(None, None), layer(None, Some(1.0)), &[("OTEL_TRACES_SAMPLER", "always_off")], "parent, 1");
    check(layer(None, None), layer(None, None), &[("OTEL_TRACES_SAMPLER", "parentbased_always_off")], "parent, off");
}

#[test]
fn values_of_the_user_are_errors_and_name_the_field() {
    let error = |layer: Layer| {
        TelemetryConfig::resolve(&layer, &Layer::default(), &|_| None).expect_err("an error").to_string()
    };
    let otlp = |url: &str| {
        let choice = ExporterChoice::Otlp(OtlpChoice::to(url));
        Layer { exporters: Some(vec![choice]), ..Layer::default() }
    };
    let url_allowed = "a URL like http://127.0.0.1:4318 (HTTP) or http://127.0.0.1:4317 (gRPC) is allowed";
    assert_eq!(
        error(Layer { ratio: Some(1.5), ..Layer::default() }),
        "tracing.ratio: found `1.5`, a number from 0 to 1 is allowed"
    );
    assert_eq!(
        error(Layer { detail: Some(4), ..Layer::default() }),
        "tracing.detail: found `4`, 1 (lifecycle), 2 (decisions) and 3 (fine) are allowed"
    );
    for bad in ["localhost:4317", "ftp://h:1", "", "http://", "nonsense"] {
        assert_eq!(error(otlp(bad)), format!("otlp: found `{bad}`, {url_allowed}"));
    }
    assert_eq!(
        error(otlp("http://user:secret@h:4318/x?key=secret")),
        "otlp: found `http://***@h:4318/x`, a URL without user name and password is allowed \
         (credentials go into OTEL_EXPORTER_OTLP_HEADERS)"
    );
}

fn only_otlp(config: TelemetryConfig) -> OtlpConfig {
    match config.exporters.into_iter().next() {
        Some(ExporterConfig::Otlp(otlp)) => otlp,
        other => panic!("expected one OTLP exporter, found {other:?}"),
    }
}

#[test]
fn records_are_encoded_directly_and_spans_of_the_sdk_by_the_sdk() {
    let check = |recorder: Option<RecorderKind>, expect: OtlpEncoding| {
        let choice = ExporterChoice::Otlp(OtlpChoice::to("http://h:4318"));
        let layer = Layer { recorder, exporters: Some(vec![choice]), ..Layer::default() };
        assert_eq!(only_otlp(resolve(layer, Layer::default(), &[]).0).encoding, expect, "{recorder:?}");
    };
    check(None, OtlpEncoding::Direct);
    check(Some(RecorderKind::Deferred), OtlpEncoding::Direct);
    check(Some(RecorderKind::Eager), OtlpEncoding::Sdk);
}

#[test]
fn endpoints_on_the_command_line() {
    let check = |url: &str, protocol: Option<OtlpProtocol>, endpoint: &str, expect: OtlpProtocol| {
        let choice =
            ExporterChoice::Otlp(OtlpChoice { protocol, encoding: Some(OtlpEncoding::Sdk), ..OtlpChoice::to(url) });
        let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
        // The environment completes what the user left open, but not the endpoint.
        let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://other:1"), ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")];
        let otlp = only_otlp(resolve(layer, Layer::default(), &env).0);
        assert_eq!((otlp.endpoint.as_str(), otlp.protocol, otlp.gzip), (endpoint, expect, true), "{url}");
        assert_eq!(otlp.encoding, OtlpEncoding::Sdk, "what the user asks for");
    };
    let (grpc, http) = (OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf);
    check("http://h:4317", None, "http://h:4317", grpc);
    check("http://h:4318", None, "http://h:4318/v1/traces", http);
    check("http://h:4318/", None, "http://h:4318/v1/traces", http);
    check("http://h:4318/v1/traces", None, "http://h:4318/v1/traces", http);
    check("https://h/api/otel", None, "https://h/api/otel/v1/traces", http);
    check("https://h:443", Some(grpc), "https://h:443", grpc);
    check("http://h:4317", Some(http), "http://h:4317/v1/traces", http);
    check("http://h/base/?key=a/b", None, "http://h/base/v1/traces?key=a/b", http);
    check("http://h/v1/traces?key=a", None, "http://h/v1/traces?key=a", http);
}

#[test]
fn the_environment_names_the_protocol_that_the_command_line_leaves_open() {
    let check = |url: &str, given: Option<OtlpProtocol>, env: &str, endpoint: &str, expect: OtlpProtocol| {
        let choice = ExporterChoice::Otlp(OtlpChoice { protocol: given, ..OtlpChoice::to(url) });
        let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
        let otlp = only_otlp(resolve(layer, Layer::default(), &[("OTEL_EXPORTER_OTLP_PROTOCOL", env)]).0);
        assert_eq!((otlp.endpoint.as_str(), otlp.protocol), (endpoint, expect), "{url} {given:?} {env}");
    };
    let (grpc, http) = (OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf);
    check("https://h", None, "grpc", "https://h", grpc);
    check("http://h:4318", None, "grpc", "http://h:4318", grpc);
    check("http://h:4317", None, "http/protobuf", "http://h:4317/v1/traces", http);
    check("http://h:4317", None, "", "http://h:4317", grpc);
    check("https://h", Some(http), "grpc", "https://h/v1/traces", http);
}

#[test]
fn credentials_are_in_no_debug_output() {
    let url = "http://h:4318?key=secret".to_owned();
    let choice = ExporterChoice::Otlp(OtlpChoice::to(url));
    let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
    let env = [("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")];
    let otlp = only_otlp(resolve(layer, Layer::default(), &env).0);
    assert_eq!(otlp.endpoint, "http://h:4318/v1/traces?key=secret");
    assert_eq!(
        format!("{otlp:?}"),
        "OtlpConfig { address: \"http://h:4318/v1/traces\", protocol: HttpProtobuf, headers: [\"authorization\"], \
         timeout: 10.0 s, gzip: false, encoding: Direct }"
    );
}

#[test]
fn endpoints_in_the_environment_follow_the_specification() {
    let check = |env: &[(&str, &str)], endpoint: &str, expect: OtlpProtocol| {
        let (config, warnings) = from_env(env);
        assert_eq!(warnings, Vec::<String>::new());
        let otlp = only_otlp(config);
        assert_eq!((otlp.endpoint.as_str(), otlp.protocol), (endpoint, expect), "{env:?}");
    };
    let (grpc, http) = (OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf);
    let general = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let own = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    let protocol = "OTEL_EXPORTER_OTLP_PROTOCOL";
    check(&[("OTEL_TRACES_EXPORTER", "otlp")], "http://localhost:4318/v1/traces", http);
    check(&[("OTEL_TRACES_EXPORTER", "otlp"), (protocol, "grpc")], "http://localhost:4317", grpc);
    check(&[(general, "http://h:4318")], "http://h:4318/v1/traces", http);
    check(&[(general, "http://h:4318/base/")], "http://h:4318/base/v1/traces", http);
    check(&[(general, "http://h:4318/base?key=a")], "http://h:4318/base/v1/traces?key=a", http);
    check(&[(own, "http://h:4318/custom")], "http://h:4318/custom", http);
    check(&[(own, "http://h:4318/custom?key=a")], "http://h:4318/custom?key=a", http);
    check(&[(own, "http://h:4318")], "http://h:4318/", http);
    check(&[(own, "http://a/x"), (general, "http://b")], "http://a/x", http);
    check(&[(general, "http://h:4317")], "http://h:4317", grpc);
    check(&[(general, "http://h:4317"), (protocol, "http/protobuf")], "http://h:4317/v1/traces", http);
    check(&[(general, "h:4317"), (protocol, "grpc")], "https://h:4317", grpc);
    check(&[(general, "h:4317"), ("OTEL_EXPORTER_OTLP_INSECURE", "true")], "http://h:4317", grpc);
    // A wrong general value is not looked at where each signal has its own.
    let [traces, metrics] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"];
    check(&[(general, "http://h:1"), (traces, "grpc"), (metrics, "grpc"), (protocol, "x")], "http://h:1", grpc);
}

#[test]
fn every_variable_of_the_environment_is_heard() {
    let (config, warnings) = from_env(&[
        ("OTEL_SDK_DISABLED", "TRUE"),
        ("OTEL_TRACES_EXPORTER", "otlp, console"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20eDp5, x-tenant = a "),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_SERVICE_NAME", "mine"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=other,team=a%2Cb,deployment.environment.name=ci"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_BSP_SCHEDULE_DELAY", "250"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "200"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "7000"),
        ("OTEL_PROPAGATORS", "baggage"),
    ]);
    assert_eq!(warnings, Vec::<String>::new());
    assert!(config.disabled && !config.trace_context);
    assert_eq!((config.max_queue, config.max_batch), (100, 100), "a batch is no larger than the queue");
    assert_eq!((config.schedule_delay, config.export_timeout), (Dur::from_millis(250), Dur::from_millis(7000)));
    assert_eq!(config.service_name.as_deref(), Some("mine"));
    let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    assert_eq!(config.resource_attributes, [pair("team", "a,b"), pair("deployment.environment.name", "ci")]);
    assert!(matches!(config.exporters[1], ExporterConfig::Console(_)));
    let otlp = only_otlp(config);
    assert_eq!(otlp.headers, [pair("authorization", "Basic eDp5"), pair("x-tenant", "a")]);
    assert_eq!((otlp.timeout, otlp.gzip), (Dur::from_millis(2500), true));
}

#[test]
fn wrong_values_in_the_environment_are_ignored_with_a_warning() {
    let check = |name: &str, value: &str, expect: &str| {
        let (config, warnings) = from_env(&[(name, value)]);
        assert_eq!(warnings, [expect], "{name}={value}");
        assert_eq!((sampler(&config.sampler).as_str(), config.disabled), ("parent, 0.1", false));
    };
    check("OTEL_SDK_DISABLED", "1", "OTEL_SDK_DISABLED=`1` is ignored: true or false is allowed");
    check(
        "OTEL_TRACES_SAMPLER",
        "jaeger_remote",
        "OTEL_TRACES_SAMPLER=`jaeger_remote` is ignored: a sampler of the specification is allowed",
    );
    check("OTEL_TRACES_SAMPLER_ARG", "2", "OTEL_TRACES_SAMPLER_ARG=`2` is ignored: a number from 0 to 1 is allowed");
    check(
        "OTEL_TRACES_EXPORTER",
        "zipkin",
        "OTEL_TRACES_EXPORTER: exporter `zipkin` is ignored: otlp, console or none is allowed",
    );
    check(
        "OTEL_PROPAGATORS",
        "b3,tracecontext",
        "OTEL_PROPAGATORS: propagator `b3` is ignored: tracecontext, baggage or none is allowed",
    );
    check("OTEL_BSP_SCHEDULE_DELAY", "-1", "OTEL_BSP_SCHEDULE_DELAY=`-1` is ignored: milliseconds is allowed");
    check("OTEL_BSP_MAX_QUEUE_SIZE", "0", "OTEL_BSP_MAX_QUEUE_SIZE=`0` is ignored: a number above 0 is allowed");
    check(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "http/json",
        "OTEL_EXPORTER_OTLP_PROTOCOL=`http/json` is ignored: grpc or http/protobuf is allowed",
    );
    check(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "secret",
        "OTEL_EXPORTER_OTLP_HEADERS is ignored: key=value pairs with commas is allowed",
    );
    for endpoint in ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] {
        let warning = format!("{endpoint} is ignored: an http or https URL without user name and password is allowed");
        check(endpoint, "http://user:secret@h:4318", &warning);
        check(endpoint, "user:secret@h:4318", &warning);
    }
    check(
        "OTEL_RESOURCE_ATTRIBUTES",
        "a=%zz",
        "OTEL_RESOURCE_ATTRIBUTES=`a=%zz` is ignored: key=value pairs with commas is allowed",
    );
    let (_, none) = from_env(&[("OTEL_SDK_DISABLED", ""), ("OTEL_TRACES_SAMPLER", "  ")]);
    assert!(none.is_empty(), "empty is unset");
}

#[test]
fn none_and_an_empty_list_export_nowhere() {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4318");
    assert!(from_env(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]).0.exporters.is_empty());
    let nothing = Layer { exporters: Some(Vec::new()), ..Layer::default() };
    assert!(resolve(nothing, Layer::default(), &[endpoint]).0.exporters.is_empty());
}
