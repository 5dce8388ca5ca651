//! Terms of the step model from measured steps.
//!
//! Each kind of step is fitted on its own, by least squares on relative errors with terms that are not negative. The knee between
//! the floor of the linear layers and their cost per token is the one part that is not linear: its place and its exponent are
//! searched over a grid, the rest follows for each pair. How good a fit is on data that it has not seen is found by fitting every
//! second row and judging the others, and the other way round.

use super::nnls::nnls;
use super::steps::{Kind, StepRow};
use crate::core::latency::{Fit, HostTimes, ProfileFile, Regime, RegimeFit, StepTimes, TermTimes};

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The terms.
    pub step: StepTimes,
    /// Time from arrival to the engine core in microseconds, where times to first token were given.
    pub frontend: Option<f64>,
    /// One report for each kind of step.
    pub reports: Vec<RegimeReport>,
}

/// How one kind of step came out.
#[derive(Clone, Debug, PartialEq)]
pub struct RegimeReport {
    /// The kind.
    pub regime: Regime,
    /// Where its terms come from.
    pub origin: Origin,
    /// Of the profile as it was.
    pub before: Option<Errors>,
    /// Of the fit to all rows.
    pub in_sample: Option<Errors>,
    /// Each half judged by the fit to the other; nothing with fewer than [`LEAST_ROWS`] rows.
    pub held_out: Option<Errors>,
}

/// Where terms come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Fitted to so many rows.
    Fitted(usize),
    /// No such step was measured: composed of the other two kinds.
    Composed,
    /// Nothing to fit or compose from: as before.
    Kept,
}

/// Relative errors, predicted against measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Errors {
    /// Mean of their absolute values.
    pub mean: f64,
    /// 95th percentile of their absolute values.
    pub p95: f64,
    /// Mean; above 0 where predictions are too long.
    pub bias: f64,
}

impl Errors {
    /// Of a list of relative errors, which is not empty.
    pub fn of(errors: &[f64]) -> Errors {
        assert!(!errors.is_empty(), "errors of something");
        let mut sorted: Vec<f64> = errors.iter().map(|e| e.abs()).collect();
        sorted.sort_by(f64::total_cmp);
        let n = errors.len();
        let rank = (0.95 * n as f64).ceil() as usize;
        Errors {
            mean: sorted.iter().sum::<f64>() / n as f64,
            p95: sorted[rank.clamp(1, n) - 1],
            bias: errors.iter().sum::<f64>() / n as f64,
        }
    }
}

/// Rows of one kind that a judgement on unseen rows needs at least.
pub const LEAST_ROWS: usize = 6;
/// Rows that the search for the knee needs at least: it adds two numbers to find.
const KNEE_ROWS: usize = 40;
/// Rows that the search looks at at most; the terms themselves are fitted to all.
const SEARCH_ROWS: usize = 1500;
/// How much smaller the error has to be for the knee to be worth its two numbers.
const KNEE_GAIN: f64 = 0.95;

/// Fits a profile to measured steps.
///
/// A kind of step without rows is composed of the others where they were fitted (mixed steps), else keeps the profile's terms.
pub fn calibrate(profile: &ProfileFile, rows: &[StepRow]) -> Calibration {
    let of = |regime: Regime| -> Vec<StepRow> { rows.iter().filter(|r| r.regime() == regime).copied().collect() };
    let mut found = Calibration { step: profile.step, frontend: None, reports: Vec::new() };
    for regime in Regime::ALL {
        let mut rows = of(regime);
        if rows.is_empty() {
            let terms = (regime == Regime::Mixed).then(|| found.composed()).flatten();
            let origin = if terms.is_some() { Origin::Composed } else { Origin::Kept };
            *found.step.terms_mut(regime) = terms.unwrap_or(*found.step.terms(regime));
            found.reports.push(RegimeReport { regime, origin, before: None, in_sample: None, held_out: None });
            continue;
        }
        let only_ttft = regime == Regime::Prefill && rows.iter().all(|r| r.kind == Kind::Ttft);
        rows.iter_mut().for_each(|row| row.time_us -= around_first_token(&profile.host, row));
        // The constant of a time to first token is a step's base and the frontend; a decode step has the same base.
        let decode = found.step.decode;
        let base = only_ttft.then_some(decode.base + decode.floor + decode.all_reduce);
        let frontend = only_ttft.then_some(profile.host.frontend);
        let before = Fitted { terms: *profile.step.terms(regime), frontend };
        let fitted = fit(&rows, base);
        found.frontend = fitted.frontend.or(found.frontend);
        found.reports.push(RegimeReport {
            regime,
            origin: Origin::Fitted(rows.len()),
            before: Some(Errors::of(&before.errors(&rows))),
            in_sample: Some(Errors::of(&fitted.errors(&rows))),
            held_out: held_out(&rows, base),
        });
        *found.step.terms_mut(regime) = fitted.terms;
    }
    let decode = found.step.decode;
    for regime in [Regime::Prefill, Regime::Mixed] {
        let terms = found.step.terms_mut(regime);
        if !of(Regime::Prefill).iter().chain(&of(Regime::Mixed)).any(|r| r.prefill_past > 0.0) {
            // No chunk with a past was measured: it has to read at least what a decode reads.
            terms.per_past_token = decode.per_context_token;
        }
    }
    found
}

impl Calibration {
    /// The errors, as a profile's file has them.
    pub fn fit(&self) -> Fit {
        let percent = |e: f64| (e * 1e4).round() / 100.0;
        let mut fit = Fit::default();
        for report in &self.reports {
            *fit.regime_mut(report.regime) = match (report.origin, report.in_sample, report.held_out) {
                (Origin::Fitted(rows), Some(in_sample), Some(held_out)) => Some(RegimeFit {
                    rows: rows as u32,
                    in_sample_percent: percent(in_sample.mean),
                    held_out_percent: percent(held_out.mean),
                }),
                _ => None,
            };
        }
        fit
    }

    /// The profile with what was found in it.
    pub fn apply(&self, profile: &ProfileFile) -> ProfileFile {
        let mut profile = profile.clone();
        profile.step = self.step;
        profile.fit = self.fit();
        profile.host.frontend = self.frontend.unwrap_or(profile.host.frontend);
        profile
    }

    /// Terms of mixed steps from those of the other two kinds, if both were fitted: the tokens of all go through the linear
    /// layers together, each request's attention costs what it costs alone.
    fn composed(&self) -> Option<TermTimes> {
        let fitted = self.reports.iter().filter(|r| matches!(r.origin, Origin::Fitted(_))).count();
        let (d, p) = (&self.step.decode, &self.step.prefill);
        (fitted == 2).then(|| TermTimes {
            base: p.base.max(d.base + d.floor - p.floor),
            per_sequence: round((d.per_sequence + d.per_token - p.per_token).max(0.0)),
            per_context_token: d.per_context_token,
            ..*p
        })
    }
}

/// What a time to first token has besides the frontend and the step: the host's work on one request.
fn around_first_token(host: &HostTimes, row: &StepRow) -> f64 {
    match row.kind {
        Kind::Step => 0.0,
        Kind::Ttft => {
            host.schedule
                + host.schedule_per_seq
                + host.admit
                + host.admit_per_token * row.prefill_tokens
                + host.update
                + host.update_per_seq
                + host.detokenize
        }
    }
}

fn held_out(rows: &[StepRow], base: Option<f64>) -> Option<Errors> {
    if rows.len() < LEAST_ROWS {
        return None;
    }
    let half = |odd: usize| -> Vec<StepRow> { rows.iter().skip(odd).step_by(2).copied().collect() };
    let (even, odd) = (half(0), half(1));
    let mut errors = fit(&even, base).errors(&odd);
    errors.extend(fit(&odd, base).errors(&even));
    Some(Errors::of(&errors))
}

/// Terms of one kind of step.
#[derive(Clone, Copy, Debug)]
struct Fitted {
    terms: TermTimes,
    frontend: Option<f64>,
}

impl Fitted {
    fn errors(&self, rows: &[StepRow]) -> Vec<f64> {
        rows.iter().map(|r| (predict(&self.terms, r) + self.frontend.unwrap_or(0.0)) / r.time_us - 1.0).collect()
    }
}

/// The model's time of a step, in microseconds: [`crate::core::latency::LatencyProfile::step_ps`] with fractions.
pub fn predict(t: &TermTimes, row: &StepRow) -> f64 {
    let (floor, tokens) = (t.floor, t.per_token * row.tokens());
    let linear =
        if floor == 0.0 { tokens } else { (floor.powf(t.exponent) + tokens.powf(t.exponent)).powf(1.0 / t.exponent) };
    linear
        + t.base
        + t.per_sequence * row.decode_seqs
        + t.per_chunk * row.prefill_seqs
        + t.per_context_token * row.decode_context
        + t.per_past_token * row.prefill_past
        + t.per_pair * row.prefill_pairs
        + t.all_reduce
        + t.all_reduce_per_token * row.tokens()
}

/// The best terms; `base` fixes the constant of the step and makes what is left of it the frontend.
fn fit(rows: &[StepRow], base: Option<f64>) -> Fitted {
    let straight = fit_with(rows, base, None);
    if rows.len() < KNEE_ROWS {
        return straight;
    }
    let few: Vec<StepRow> = rows.iter().step_by(rows.len().div_ceil(SEARCH_ROWS)).copied().collect();
    let error = |rows: &[StepRow], f: &Fitted| Errors::of(&f.errors(rows)).mean;
    let candidates = knees().map(|knee| (error(&few, &fit_with(&few, base, Some(knee))), knee));
    let Some((_, knee)) = candidates.min_by(|a, b| a.0.total_cmp(&b.0)) else { return straight };
    let bent = fit_with(rows, base, Some(knee));
    if error(rows, &bent) < KNEE_GAIN * error(rows, &straight) { bent } else { straight }
}

/// Where the linear layers turn from reading weights to computing.
#[derive(Clone, Copy, Debug)]
struct Knee {
    /// Tokens at which both take the same.
    tokens: f64,
    /// How sharp it is.
    exponent: f64,
}

/// 16 to 4096 tokens in steps of the square root of 2, exponents from 1.125 to 8.
fn knees() -> impl Iterator<Item = Knee> {
    let exponents = [18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 56, 64, 80, 96, 128];
    (8..=24).flat_map(move |half| {
        exponents.map(|p| Knee { tokens: (f64::from(half) / 2.0).exp2(), exponent: f64::from(p) / 16.0 })
    })
}

/// A column of the least-squares problem and the term that it finds.
type Column = (fn(&StepRow) -> f64, fn(&mut TermTimes) -> &mut f64);

fn fit_with(rows: &[StepRow], base: Option<f64>, knee: Option<Knee>) -> Fitted {
    let mut terms = all_reduce(rows);
    terms.base = base.unwrap_or(0.0);
    let decode = rows[0].regime() == Regime::Decode;
    let columns: [Column; 6] = [
        (|r| r.decode_seqs, |t| &mut t.per_sequence),
        (|r| r.prefill_seqs, |t| &mut t.per_chunk),
        (|r| r.decode_context, |t| &mut t.per_context_token),
        (|r| r.prefill_past, |t| &mut t.per_past_token),
        (|r| r.prefill_pairs, |t| &mut t.per_pair),
        // Requests are the tokens of a decode step.
        (StepRow::tokens, |t| &mut t.per_token),
    ];
    let varies = |f: fn(&StepRow) -> f64| rows.iter().any(|r| (f(r) - f(&rows[0])).abs() > 1e-9);
    let wanted = |i: usize| if i == 5 { knee.is_none() && !decode } else { varies(columns[i].0) };
    let chosen: Vec<usize> = (0..columns.len()).filter(|&i| wanted(i)).collect();

    let constant = vec![1.0; rows.len()];
    let weigh = |values: &[f64]| -> Vec<f64> { values.iter().zip(rows).map(|(v, r)| v / r.time_us).collect() };
    let bend =
        |k: Knee| move |r: &StepRow| (k.tokens.powf(k.exponent) + r.tokens().powf(k.exponent)).powf(1.0 / k.exponent);
    let mut matrix: Vec<Vec<f64>> = vec![weigh(&constant)];
    for &i in &chosen {
        matrix.push(weigh(&rows.iter().map(columns[i].0).collect::<Vec<_>>()));
    }
    if let Some(k) = knee {
        matrix.push(weigh(&rows.iter().map(bend(k)).collect::<Vec<_>>()));
    }
    let target: Vec<f64> = rows.iter().map(|r| r.time_us - predict(&terms, r)).collect();
    let matrix: Vec<&[f64]> = matrix.iter().map(Vec::as_slice).collect();
    let x = nnls(&matrix, &weigh(&target));

    for (&i, value) in chosen.iter().zip(&x[1..]) {
        *columns[i].1(&mut terms) = round(*value);
    }
    if let Some(k) = knee {
        let slope = x[chosen.len() + 1];
        (terms.per_token, terms.floor, terms.exponent) = (round(slope), round(slope * k.tokens), k.exponent);
    }
    terms.base = round(terms.base + if base.is_none() { x[0] } else { 0.0 });
    Fitted { terms, frontend: base.map(|_| round(x[0])) }
}

/// The all-reduce terms alone, from rows that state it apart.
fn all_reduce(rows: &[StepRow]) -> TermTimes {
    let known: Vec<&StepRow> = rows.iter().filter(|r| r.all_reduce_us > 0.0).collect();
    if known.is_empty() {
        return TermTimes::default();
    }
    let weigh = |f: &dyn Fn(&StepRow) -> f64| -> Vec<f64> { known.iter().map(|r| f(r) / r.all_reduce_us).collect() };
    let (one, tokens, target) = (weigh(&|_| 1.0), weigh(&StepRow::tokens), weigh(&|r| r.all_reduce_us));
    let x = nnls(&[&one, &tokens], &target);
    TermTimes { all_reduce: round(x[0]), all_reduce_per_token: round(x[1]), ..TermTimes::default() }
}

/// Five digits, and no more than the picosecond that the core counts in.
fn round(us: f64) -> f64 {
    if us <= 0.0 {
        return 0.0;
    }
    let digits = (4.0 - us.log10().floor()).clamp(0.0, 6.0) as i32;
    let scale = 10f64.powi(digits);
    (us * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::latency::{BatchShape, Source};

    fn profile() -> ProfileFile {
        let mut file = ProfileFile::named("llama-3.1-8b-h100").unwrap().clone();
        file.source = Source {
            data: String::new(),
            date: String::new(),
            licence: String::new(),
            notes: Vec::new(),
            tables: None,
        };
        file
    }

    fn truth() -> StepTimes {
        let base = TermTimes { base: 900.0, per_sequence: 12.0, per_context_token: 0.05, ..TermTimes::default() };
        let knee = TermTimes { floor: 5120.0, per_token: 20.0, exponent: 2.0, ..base };
        StepTimes {
            decode: TermTimes { base: 6000.0, ..base },
            prefill: TermTimes {
                per_pair: 0.001,
                per_past_token: 0.1,
                per_context_token: 0.0,
                per_sequence: 0.0,
                ..knee
            },
            mixed: TermTimes { per_pair: 0.002, per_past_token: 0.2, ..knee },
        }
    }

    /// Steps as the model itself would time them.
    fn rows() -> Vec<StepRow> {
        let mut rows = Vec::new();
        for i in 0..120u32 {
            let (n, context) = (f64::from(1 + i % 11 * 20), f64::from(100 + i % 13 * 700));
            let (chunk, past) = (f64::from(16 << (i % 8)), f64::from(i % 7 * 500));
            let decode = StepRow::decode(n, n * context, 0.0);
            let prefill = StepRow::prefill(1.0, chunk, past, 0.0);
            let mixed = StepRow { decode_seqs: n, decode_context: n * context, ..prefill };
            rows.extend([decode, prefill, mixed]);
        }
        let truth = truth();
        rows.iter_mut().for_each(|r| r.time_us = predict(truth.terms(r.regime()), r));
        rows
    }

    #[test]
    fn steps_of_the_model_give_the_model_back() {
        let found = calibrate(&profile(), &rows());
        for report in &found.reports {
            let error = report.held_out.unwrap().mean;
            assert!(error < 0.001, "{:?}: {error}", report.regime);
        }
        let (decode, prefill) = (found.step.decode, found.step.prefill);
        assert!((decode.base - 6000.0).abs() < 1.0 && (decode.per_sequence - 12.0).abs() < 0.01, "{decode:?}");
        assert!((prefill.per_token - 20.0).abs() < 0.2 && prefill.exponent == 2.0, "{prefill:?}");
        assert_eq!(found.fit().mixed.unwrap().rows, 120);
    }

    #[test]
    fn the_engine_computes_what_was_fitted() {
        let mut file = profile();
        file.step = truth();
        let profile = file.profile();
        for row in rows() {
            let shape = BatchShape {
                decode_seqs: row.decode_seqs as u32,
                decode_context: row.decode_context as u64,
                prefill_seqs: row.prefill_seqs as u32,
                prefill_tokens: row.prefill_tokens as u32,
                prefill_past: row.prefill_past as u64,
                prefill_pairs_x2: (2.0 * row.prefill_pairs) as u64,
                ..BatchShape::default()
            };
            let engine = profile.step_ps(&shape) as f64 / 1e6;
            assert!((engine / row.time_us - 1.0).abs() < 1e-6, "{engine} {row:?}");
        }
    }

    #[test]
    fn noise_in_one_half_shows_in_the_other() {
        let mut rows = rows();
        rows.iter_mut().enumerate().for_each(|(i, r)| r.time_us *= if (i / 3).is_multiple_of(2) { 1.2 } else { 1.0 });
        let found = calibrate(&profile(), &rows);
        let decode = &found.reports[0];
        assert!(decode.held_out.unwrap().mean > 1.5 * decode.in_sample.unwrap().mean);
    }

    #[test]
    fn a_time_to_first_token_has_the_base_of_a_decode_step_and_the_rest_is_the_frontend() {
        let mut rows: Vec<StepRow> = rows().into_iter().filter(|r| r.regime() == Regime::Decode).collect();
        let host = HostTimes::default();
        for i in 1..=9 {
            let mut row = StepRow { kind: Kind::Ttft, ..StepRow::prefill(1.0, f64::from(i * 1000), 0.0, 0.0) };
            row.time_us = 13_000.0
                + 6000.0
                + 15.0 * row.prefill_tokens
                + 0.001 * row.prefill_pairs
                + around_first_token(&host, &row);
            rows.push(row);
        }
        let found = calibrate(&profile(), &rows);
        assert!((found.frontend.unwrap() - 13_000.0).abs() < 50.0, "{:?}", found.frontend);
        assert!((found.step.prefill.per_token - 15.0).abs() < 0.05, "{:?}", found.step.prefill);
        // No mixed step was measured.
        assert_eq!(found.reports[2].origin, Origin::Composed);
        assert_eq!(found.step.mixed.per_context_token, found.step.decode.per_context_token);
        assert_eq!(found.step.prefill.per_past_token, found.step.decode.per_context_token);
    }

    #[test]
    fn rounding_keeps_five_digits_and_no_less_than_a_picosecond() {
        assert_eq!(
            [round(12345.678), round(0.0437123), round(0.000_429_9), round(-1.0)],
            [12346.0, 0.043712, 0.00043, 0.0]
        );
    }
}
