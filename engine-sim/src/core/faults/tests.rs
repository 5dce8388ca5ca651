//! Rules, windows and draws.

use super::*;

fn rule(json: &str) -> FaultRule {
    serde_json::from_str(json).unwrap_or_else(|e| panic!("{json}: {e}"))
}

fn faults(rules: &[&str]) -> Faults {
    let rules: Vec<FaultRule> = rules.iter().map(|r| rule(r)).collect();
    rules.iter().for_each(|r| assert_eq!(r.validate(), [], "{r:?}"));
    Faults::new(Seed(5), "engine-3", &rules)
}

fn ms(ms: u64) -> Time {
    Time::ZERO + Dur::from_millis(ms)
}

/// Everything that changes up to `until`, as text.
fn changes(faults: &mut Faults, until: Time) -> Vec<String> {
    let mut out = Vec::new();
    while let Some((at, change)) = faults.change(until) {
        let (word, condition) = match change {
            Change::Begin(c) => ("+", c),
            Change::End(c) => ("-", c),
        };
        out.push(format!("{}{word}{}", at.as_nanos() / 1_000_000, condition.kind().as_str()));
    }
    out
}

#[test]
fn conditions_begin_and_end_when_they_should() {
    let check = |rules: &[&str], expect: &[&str]| {
        let mut f = faults(rules);
        assert_eq!(changes(&mut f, ms(60_000)), expect, "{rules:?}");
    };
    check(&[], &[]);
    check(&[r#"{"kind": "crash"}"#], &["0+crash"]);
    check(&[r#"{"kind": "crash", "at": "5s"}"#], &["5000+crash"]);
    check(&[r#"{"kind": "hang", "at": "5s", "for": "2s"}"#], &["5000+hang", "7000-hang"]);
    // An end before a beginning; beginnings in the order of the rules.
    check(
        &[
            r#"{"kind": "slow", "factor": 3, "at": "1s", "for": "1s"}"#,
            r#"{"kind": "metrics_stale", "at": "2s", "for": "1s"}"#,
            r#"{"kind": "engine_dead", "at": "2s"}"#,
        ],
        &["1000+slow", "2000-slow", "2000+metrics_stale", "2000+engine_dead", "3000-metrics_stale"],
    );
}

#[test]
fn what_is_under_way_can_be_asked_for() {
    let mut f = faults(&[
        r#"{"kind": "slow", "factor": 2, "at": "1s", "for": "4s"}"#,
        r#"{"kind": "slow", "factor": 1.5, "at": "2s", "for": "1s"}"#,
        r#"{"kind": "hang", "at": "2s", "for": "1s"}"#,
        r#"{"kind": "metrics_stale", "at": "2s"}"#,
        r#"{"kind": "metrics_error", "at": "3s"}"#,
    ]);
    changes(&mut f, ms(1_000));
    assert_eq!((f.slowness(), f.released(ms(1)), f.page()), (2000, Some(ms(1)), None));
    changes(&mut f, ms(2_000));
    assert_eq!((f.slowness(), f.released(ms(2_500))), (3000, Some(ms(3_000))));
    assert_eq!(f.page(), Some(PageFault::Stale(ms(2_000))));
    changes(&mut f, ms(3_000));
    assert_eq!((f.slowness(), f.released(ms(3_000)), f.page()), (2000, Some(ms(3_000)), Some(PageFault::Status(500))));
    f.add(ms(3_000), &rule(r#"{"kind": "hang"}"#));
    f.add(ms(3_000), &rule(r#"{"kind": "crash", "at": "1s"}"#));
    changes(&mut f, ms(4_000));
    assert_eq!((f.released(ms(9_000)), f.down()), (None, Some(Down::Process)));
    f.clear(ms(4_500));
    assert_eq!(changes(&mut f, ms(9_000)).len(), 5);
    assert_eq!((f.slowness(), f.down(), f.page(), f.next_change()), (1000, None, None, None));
    assert_eq!(f.counts().of(FaultKind::Slow), 2);
}

#[test]
fn conditions_come_again_as_often_as_they_should() {
    let mut f = faults(&[r#"{"kind": "crash", "mean_between": "10s", "for": "1s"}"#]);
    let all = changes(&mut f, ms(11_000_000));
    // A thousand are expected, give or take 32.
    assert!((850..1150).contains(&f.counts().of(FaultKind::Crash)), "{}", f.counts().of(FaultKind::Crash));
    let mut again = faults(&[r#"{"kind": "crash", "mean_between": "10s", "for": "1s"}"#, r#"{"kind": "hang"}"#]);
    let same = changes(&mut again, ms(11_000_000));
    assert_eq!(
        same.into_iter().filter(|c| !c.contains("hang")).collect::<Vec<_>>(),
        all,
        "another rule shifts nothing"
    );
}

#[test]
fn requests_are_struck_at_the_rate_of_the_rule() {
    let rules = [
        r#"{"kind": "http_error", "rate": 0.25, "status": 503, "at": "1s", "for": "1s"}"#,
        r#"{"kind": "cut_stream", "rate": 0.5, "after_tokens": {"min": 3, "max": 5}}"#,
        r#"{"kind": "kv_transfer", "rate": 0.5, "moved": 0.25}"#,
    ];
    let mut f = faults(&rules);
    let draw = |f: &mut Faults, at| (0..2000).filter_map(|_| f.request(at)).collect::<Vec<_>>();
    let before = draw(&mut f, ms(0));
    assert!((900..1100).contains(&before.len()), "{}", before.len());
    let cut = |n| RequestFault::Cut { after_tokens: n };
    assert!([3, 4, 5].iter().all(|n| before.contains(&cut(*n))));
    assert!(before.iter().all(|b| [cut(3), cut(4), cut(5)].contains(b)));
    let during = draw(&mut f, ms(1_500));
    let refused = during.iter().filter(|r| **r == RequestFault::Status(503)).count();
    assert!((420..580).contains(&refused), "{refused}");
    assert_eq!(f.counts().of(FaultKind::HttpError), refused as u64);
    // The window is over with its last moment.
    assert!(draw(&mut f, ms(2_000)).iter().all(|r| *r != RequestFault::Status(503)));
    let failed = (0..1000).filter_map(|_| f.kv_transfer(ms(0))).collect::<Vec<_>>();
    assert!((420..580).contains(&failed.len()), "{}", failed.len());
    assert_eq!((failed[0].moved(100), failed[0].moved(3)), (25, 0));

    // The same seed strikes the same requests, whatever other rules there are.
    let mut alone = faults(&rules[..2]);
    assert_eq!(draw(&mut alone, ms(0)), before);
    let mut other = Faults::new(Seed(6), "engine-3", &[rule(rules[0]), rule(rules[1])]);
    assert_ne!(draw(&mut other, ms(0)), before);
}

#[test]
fn a_rule_that_makes_no_sense_names_the_field() {
    let check = |json: &str, expect: &str| {
        let found: Vec<String> = rule(json).validate().iter().map(ConfigProblem::to_string).collect();
        assert_eq!(found, [expect], "{json}");
    };
    check(r#"{"kind": "slow", "factor": 0.5}"#, "factor: found 0.5, expected a number in 1..=1000");
    check(r#"{"kind": "hang", "for": "0s"}"#, "for: found 0s, expected a duration above 0, at most 366 days");
    check(r#"{"kind": "hang", "at": "9000h"}"#, "at: found 9000h, expected a duration of at most 366 days");
    check(
        r#"{"kind": "crash", "at": "1s", "for": "1s", "mean_between": "1s"}"#,
        "mean_between: found both at and mean_between, expected one of the two",
    );
    check(
        r#"{"kind": "crash", "mean_between": "1s"}"#,
        "for: found mean_between without for, expected a duration, so that it can happen again",
    );
    check(r#"{"kind": "http_error", "status": 200}"#, "status: found 200, expected an HTTP status in 400..=599");
    check(r#"{"kind": "http_error", "status": 503, "rate": 1.5}"#, "rate: found 1.5, expected a share in 0..=1");
    check(
        r#"{"kind": "cut_stream", "after_tokens": {"min": 4, "max": 3}}"#,
        "after_tokens.max: found 3, expected a number that is not below min",
    );
    check(r#"{"kind": "kv_transfer", "moved": -0.1}"#, "moved: found -0.1, expected a share in 0..=1");
    assert!(serde_json::from_str::<FaultRule>(r#"{"kind": "slow", "factor": 2, "status": 500}"#).is_err());
    assert!(serde_json::from_str::<FaultRule>(r#"{"kind": "meteor"}"#).is_err());
}

use shared::config::ConfigProblem;
