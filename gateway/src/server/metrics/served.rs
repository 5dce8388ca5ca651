//! What was served, by operation and model: the server metrics of OpenTelemetry's GenAI semantic conventions.
//!
//! A model has series of its own once an engine has answered for it with 2xx, and only the first [`MAX_MODELS`] have; all others share
//! one name. So the number of series is bounded whatever callers ask for. The model is the one that the request is sent to, which a
//! rewrite may have chosen.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use shared::metrics::{Def, Family, Histogram, Key, Kind, Label, Place, Point};
use shared::openai::Usage;
use shared::time::{Dur, Time};

use super::{DURATION, FIRST_TOKEN};
use crate::server::request::Route;
use crate::spans::{Failure, bounded_name};

/// The most models that have series of their own.
pub(crate) const MAX_MODELS: usize = 32;
/// The name of all other models, as OpenTelemetry calls what has no name of its own.
const OTHER: &str = "_OTHER";

/// Buckets of the time per output token in seconds, those of `gen_ai.server.time_per_output_token`.
const PER_TOKEN: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Buckets of token counts, those of `gen_ai.client.token.usage`.
const TOKENS: &[f64] = &[
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0,
    67108864.0,
];

/// Values of `error.type`, the first for those that had no error.
const ERRORS: [&str; 16] = [
    "",
    "400",
    "401",
    "404",
    "408",
    "413",
    "429",
    "431",
    "500",
    "502",
    "503",
    "504",
    "timeout",
    "connection_failed",
    "connection_reset",
    "abandoned",
];

const OPERATION: Key = Key::of("gen_ai.operation.name");
const PROVIDER: Key = Key::of("gen_ai.provider.name");
const MODEL: Key = Key::of("gen_ai.request.model");
const ERROR: Key = Key::of("error.type");
const TOKEN_TYPE: Key = Key::of("gen_ai.token.type");

const REQUEST_DURATION: Def =
    Def::new(Kind::Histogram, "gen_ai.server.request.duration", "s", "Time from the request to its last byte.");
const TIME_TO_FIRST_TOKEN: Def =
    Def::new(Kind::Histogram, "gen_ai.server.time_to_first_token", "s", "Time to the first streamed token.");
const TIME_PER_OUTPUT_TOKEN: Def = Def::new(
    Kind::Histogram,
    "gen_ai.server.time_per_output_token",
    "s",
    "Time per output token after the first, of streams that say how many they have.",
);
const TOKEN_USAGE: Def = Def::new(
    Kind::Histogram,
    "gen_ai.client.token.usage",
    "{token}",
    "Tokens of prompts and outputs, as engines report them.",
);

/// A request that is over.
pub(crate) struct Ending<'a> {
    pub(crate) route: Route,
    /// The model it was sent to, or would have been.
    pub(crate) model: &'a str,
    /// The status sent to the caller.
    pub(crate) status: Option<u16>,
    pub(crate) failure: Option<Failure>,
    pub(crate) took: Dur,
    /// Time to the first streamed token.
    pub(crate) first_token: Option<Dur>,
    pub(crate) usage: Option<Usage>,
    /// Where and when, if its trace is kept.
    pub(crate) found: Option<(Place, Time)>,
}

/// The series of all models.
#[derive(Debug)]
pub(super) struct Models {
    known: ArcSwap<Vec<Arc<Model>>>,
    /// Held while one is added.
    adding: Mutex<()>,
    other: Arc<Model>,
}

/// A model's series.
#[derive(Debug)]
struct Model {
    name: Arc<str>,
    chat: Series,
    completions: Series,
}

/// Series are made when they are first needed: most never are.
#[derive(Debug, Default)]
struct Series {
    durations: [OnceLock<Histogram>; ERRORS.len()],
    first_token: OnceLock<Histogram>,
    per_token: OnceLock<Histogram>,
    input: OnceLock<Histogram>,
    output: OnceLock<Histogram>,
}

impl Model {
    fn new(name: Arc<str>) -> Arc<Model> {
        Arc::new(Model { name, chat: Series::default(), completions: Series::default() })
    }

    /// `None` for what is no request for inference.
    fn of(&self, route: Route) -> Option<&Series> {
        match route {
            Route::Chat => Some(&self.chat),
            Route::Completions => Some(&self.completions),
            Route::Other => None,
        }
    }
}

impl Models {
    pub(super) fn new() -> Models {
        let (known, adding) = (ArcSwap::default(), Mutex::default());
        Models { known, adding, other: Model::new(OTHER.into()) }
    }

    pub(super) fn ended(&self, ending: &Ending<'_>) {
        let good = ending.failure.is_none() && ending.status.is_some_and(|s| (200..300).contains(&s));
        let model = self.find(ending.model, good && ending.route != Route::Other);
        if let Some(series) = model.of(ending.route) {
            series.ended(ending, good);
        }
    }

    /// The series of a model; a model that is not known becomes so if it was `served` and there is room.
    fn find(&self, name: &str, served: bool) -> Arc<Model> {
        let find = |known: &[Arc<Model>]| known.iter().find(|m| &*m.name == name).map(Arc::clone);
        let known = self.known.load();
        if let Some(model) = find(&known) {
            return model;
        }
        if !served || name.is_empty() || known.len() >= MAX_MODELS {
            return Arc::clone(&self.other);
        }
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.load_full();
        if let Some(model) = find(&known) {
            return model;
        }
        if known.len() >= MAX_MODELS {
            return Arc::clone(&self.other);
        }
        let model = Model::new(name.into());
        let mut more = Vec::clone(&known);
        more.push(Arc::clone(&model));
        self.known.store(Arc::new(more));
        model
    }

    pub(super) fn families(&self) -> Vec<Family> {
        let known = self.known.load();
        let models = || known.iter().chain([&self.other]);
        let each = || models().flat_map(|m| [(m, "chat", &m.chat), (m, "text_completion", &m.completions)]);
        let labels = |model: &Model, operation: &'static str| -> Vec<Label> {
            let name = bounded_name(&model.name).to_string();
            vec![(OPERATION, operation.into()), (PROVIDER, "vllm".into()), (MODEL, name.into())]
        };
        let one = |def: Def, of: &dyn Fn(&Series) -> &OnceLock<Histogram>| {
            let points = each().filter_map(|(model, operation, series)| {
                let value = of(series).get()?.read().into();
                Some(Point { labels: labels(model, operation), value })
            });
            def.family(points.collect())
        };
        let (mut durations, mut tokens) = (Vec::new(), Vec::new());
        for (model, operation, series) in each() {
            for (error, histogram) in ERRORS.iter().zip(&series.durations) {
                let Some(histogram) = histogram.get() else { continue };
                let mut labels = labels(model, operation);
                labels.extend((!error.is_empty()).then_some((ERROR, Cow::Borrowed(*error))));
                durations.push(Point { labels, value: histogram.read().into() });
            }
            for (kind, histogram) in [("input", &series.input), ("output", &series.output)] {
                let Some(histogram) = histogram.get() else { continue };
                let mut labels = labels(model, operation);
                labels.push((TOKEN_TYPE, kind.into()));
                tokens.push(Point { labels, value: histogram.read().into() });
            }
        }
        let all = [
            REQUEST_DURATION.family(durations),
            one(TIME_TO_FIRST_TOKEN, &|s| &s.first_token),
            one(TIME_PER_OUTPUT_TOKEN, &|s| &s.per_token),
            TOKEN_USAGE.family(tokens),
        ];
        all.into_iter().filter(|family| !family.points.is_empty()).collect()
    }
}

impl Series {
    fn ended(&self, ending: &Ending<'_>, good: bool) {
        let found = ending.found;
        let duration = &self.durations[error_of(ending)];
        duration.get_or_init(|| Histogram::seconds(DURATION)).record(ending.took, found);
        if !good {
            return;
        }
        if let Some(first) = ending.first_token {
            self.first_token.get_or_init(|| Histogram::seconds(FIRST_TOKEN)).record(first, found);
        }
        let Some(usage) = ending.usage else { return };
        let tokens = [(&self.input, usage.prompt_tokens), (&self.output, usage.completion_tokens)];
        for (histogram, n) in tokens {
            histogram.get_or_init(|| Histogram::whole(TOKENS)).record_whole(u64::from(n), found);
        }
        if let (Some(first), Some(further @ 1..)) = (ending.first_token, usage.completion_tokens.checked_sub(1)) {
            let decode = Dur::from_nanos((ending.took - first).as_nanos() / u64::from(further));
            self.per_token.get_or_init(|| Histogram::seconds(PER_TOKEN)).record(decode, found);
        }
    }
}

/// The place of the error in [`ERRORS`]. A caller who went away is no error.
fn error_of(ending: &Ending<'_>) -> usize {
    let place = |text: &str| ERRORS.iter().position(|e| *e == text);
    let by_failure = ending.failure.and_then(Failure::error).and_then(|(kind, _)| place(kind));
    by_failure.unwrap_or_else(|| match ending.status {
        // What has no place of its own counts as the first of its class.
        Some(status @ 400..500) => place(&status.to_string()).or(place("400")).unwrap_or(0),
        Some(status @ 500..600) => place(&status.to_string()).or(place("500")).unwrap_or(0),
        Some(_) | None => 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::metrics::Value;
    use shared::metrics::text::Format;
    use shared::time::Anchor;

    fn ended<'a>(model: &'a str, status: Option<u16>) -> Ending<'a> {
        Ending {
            route: Route::Chat,
            model,
            status,
            failure: None,
            took: Dur::from_millis(1_100),
            first_token: Some(Dur::from_millis(100)),
            usage: Some(Usage {
                prompt_tokens: 9,
                completion_tokens: 11,
                total_tokens: 20,
                prompt_tokens_details: None,
            }),
            found: None,
        }
    }

    fn text(models: &Models) -> String {
        Format::Prometheus.write(&models.families(), Anchor::from_unix_nanos(0))
    }

    #[test]
    fn a_good_stream_has_all_four() {
        let models = Models::new();
        models.ended(&ended("m", Some(200)));
        let families = models.families();
        let read = |name: &str| {
            let family = families.iter().find(|f| f.def.name == name).unwrap();
            let sums = family.points.iter().map(|p| match &p.value {
                Value::Histogram(h) => (h.count(), h.sum),
                other => panic!("{other:?}"),
            });
            sums.collect::<Vec<_>>()
        };
        assert_eq!(read("gen_ai.server.request.duration"), [(1, 1.1)]);
        assert_eq!(read("gen_ai.server.time_to_first_token"), [(1, 0.1)]);
        assert_eq!(read("gen_ai.server.time_per_output_token"), [(1, 0.1)]);
        assert_eq!(read("gen_ai.client.token.usage"), [(1, 9.0), (1, 11.0)]);
        let series = "{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"vllm\",gen_ai_request_model=\"m\"";
        let line = format!("gen_ai_client_token_usage_bucket{series},gen_ai_token_type=\"output\",le=\"16\"}} 1\n");
        assert!(text(&models).contains(&line), "{}", text(&models));
    }

    #[test]
    fn failures_have_durations_only_and_a_type() {
        let check = |status: Option<u16>, failure: Option<Failure>, expect: &str| {
            let models = Models::new();
            models.ended(&Ending { failure, ..ended("m", status) });
            let families = models.families();
            assert_eq!(families.len(), 1, "{families:?}");
            let labels = &families[0].points[0].labels;
            let found = labels.iter().find(|(key, _)| *key == ERROR).map_or("", |(_, text)| text);
            assert_eq!(found, expect, "{status:?} {failure:?}");
            // Nobody has answered for this model.
            assert!(labels.contains(&(MODEL, OTHER.into())));
        };
        check(Some(404), None, "404");
        check(Some(418), None, "400");
        check(Some(503), None, "503");
        check(Some(200), Some(Failure::Reset), "connection_reset");
        check(Some(504), Some(Failure::Timeout), "timeout");
        check(None, Some(Failure::Cancelled), "");
    }

    #[test]
    fn models_beyond_the_bound_share_a_name() {
        let models = Models::new();
        (0..10_000).for_each(|i| models.ended(&ended(&format!("model-{i}"), Some(200))));
        (0..10_000).for_each(|i| models.ended(&ended(&format!("unknown-{i}"), Some(404))));
        let durations = &models.families()[0];
        // Each has one series, and the shared name one more for those that were not found.
        assert_eq!(durations.points.len(), MAX_MODELS + 2);
        assert!(text(&models).len() < 512 * 1024, "{} bytes", text(&models).len());
        assert!(!text(&models).contains("unknown-"));
    }

    #[test]
    fn names_are_bounded_and_escaped() {
        let models = Models::new();
        models.ended(&ended(&"x".repeat(10_000), Some(200)));
        models.ended(&ended("say \"hi\"", Some(200)));
        let text = text(&models);
        assert!(text.contains("gen_ai_request_model=\"h-") && text.contains("gen_ai_request_model=\"say \\\"hi\\\"\""));
    }
}
