//! The analysis on runs whose true overheads are known.

use super::synthetic::{Noise, run};
use super::*;

const QUIET: Noise = Noise { sd: 0.01, drift: 0.2 };

fn all_arms() -> Vec<Arm> {
    let mut arms = vec![Arm::Control];
    for path in Path::ALL {
        arms.extend([0.0, 0.1, 1.0].map(|ratio| Arm::traced(path, ratio)));
    }
    arms
}

/// A standard path that costs 10 % at every ratio, lean ones that cost 1 % at most.
fn truth(arm: &Arm) -> f64 {
    match arm {
        Arm::Traced { path: Path::Eager, .. } => 1.10,
        Arm::Traced { ratio, .. } => 1.0 + 0.01 * ratio,
        Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => 1.0,
    }
}

#[test]
fn overheads_come_out_as_they_were_put_in() {
    let run = run(Regime::Floor, 20, &all_arms(), &QUIET, 3, truth);
    let analysis = Analysis::of(&run, TARGET);
    let floor = analysis.regime(Regime::Floor).unwrap();
    assert_eq!((floor.rounds, floor.arms.len()), (20, 11));
    for arm in floor.arms.iter().skip(1) {
        let p50 = arm.estimate(Statistic::E2eP50).unwrap();
        let (overhead, truth) = (p50.overhead.unwrap(), truth(&arm.arm) - 1.0);
        assert_eq!(p50.n, 20, "{}", arm.arm);
        assert!((overhead.value - truth).abs() < 0.015, "{}: {overhead:?}", arm.arm);
        assert!(overhead.interval.half() < 0.015, "{}: {overhead:?}", arm.arm);
        let difference = p50.difference.unwrap();
        assert!((difference.value - 100.0 * truth).abs() < 2.5, "{}: {difference:?}", arm.arm);
    }
    assert!(floor.arms[0].estimates.is_empty() && floor.arms[0].arm == Arm::Off);
}

/// From blocks to interval, where arms of one round share references and the box drifts.
#[test]
fn intervals_hold_the_true_overhead_as_often_as_they_say() {
    let (mut held, mut boot, mut all) = (0, 0, 0);
    for seed in 0..50 {
        let run = run(Regime::Saturation, 20, &all_arms(), &Noise { sd: 0.03, drift: 0.3 }, seed, |_| 1.0);
        let off = References::new(run.blocks.iter().filter(|b| b.arm == Arm::Off));
        for arm in all_arms() {
            let own = run.blocks.iter().filter(|b| b.arm == arm);
            let rounds = pairs::by_round(own, |b| off.log_ratio(Statistic::GatewayRequestCpu, b));
            let logs: Vec<f64> = rounds.into_values().collect();
            held += usize::from(Moments::of(&logs).unwrap().interval(LEVEL).contains(0.0));
            boot += usize::from(bootstrap_t(&logs, &mut Seed(seed).stream("boot")).unwrap().contains(0.0));
            all += 1;
        }
    }
    let share = |n: usize| n as f64 / f64::from(all);
    assert!((0.93..=0.97).contains(&share(held)) && (0.92..=0.98).contains(&share(boot)), "{held} {boot} of {all}");
}

#[test]
fn only_targeted_arms_decide() {
    let verdicts = |analysis: &Analysis| -> Vec<String> {
        let line = |(_, arm, e, j): (Regime, &Arm, &Estimate, Judgement)| {
            format!("{} {arm} {} below {} {}", j.verdict.name(), e.statistic.name(), j.target.below, j.target.decides)
        };
        analysis.judged().map(line).filter(|l| l.contains("p50")).collect()
    };
    let lean = Analysis::of(&run(Regime::Floor, 20, &all_arms(), &QUIET, 4, truth), TARGET);
    insta::assert_snapshot!(verdicts(&lean).join("\n"), @r"
    FAIL eager 0 e2e p50 below 0.015 false
    FAIL eager 0.1 e2e p50 below 0.05 false
    FAIL eager 1.0 e2e p50 below 0.05 false
    PASS deferred 0 e2e p50 below 0.015 true
    PASS deferred 0.1 e2e p50 below 0.05 true
    PASS deferred 1.0 e2e p50 below 0.05 false
    PASS direct 0 e2e p50 below 0.015 true
    PASS direct 0.1 e2e p50 below 0.05 true
    PASS direct 1.0 e2e p50 below 0.05 false
    ");
    assert!(!lean.failed());
    let heavy = |arm: &Arm| if *arm == Arm::traced(Path::Deferred, 0.1) { 1.2 } else { 1.0 };
    assert!(Analysis::of(&run(Regime::Floor, 20, &all_arms(), &QUIET, 4, heavy), TARGET).failed());
}

#[test]
fn a_round_without_its_block_contributes_nothing() {
    let arm = Arm::traced(Path::Deferred, 0.1);
    let mut run = run(Regime::Floor, 20, &all_arms(), &QUIET, 5, truth);
    run.blocks.retain(|b| b.round != 7 || b.arm != arm);
    run.blocks.iter_mut().filter(|b| b.round == 8 && b.arm == arm).for_each(|b| b.answered = 0);
    let analysis = Analysis::of(&run, TARGET);
    let found = analysis.regimes[0].arm(&arm).unwrap();
    assert_eq!(found.estimate(Statistic::E2eMean).unwrap().n, 18);
}

#[test]
fn a_run_without_reference_says_nothing() {
    let mut run = run(Regime::Floor, 3, &all_arms(), &QUIET, 6, truth);
    run.blocks.retain(|b| b.arm != Arm::Off);
    let analysis = Analysis::of(&run, TARGET);
    assert!(analysis.regimes[0].arms.iter().all(|a| a.estimates.is_empty()));
    run.blocks.clear();
    assert!(Analysis::of(&run, TARGET).regimes.is_empty());
}

#[test]
fn secondary_statistics_are_adjusted_and_never_judged() {
    let analysis = Analysis::of(&run(Regime::Floor, 20, &all_arms(), &QUIET, 7, truth), TARGET);
    let floor = &analysis.regimes[0];
    let mut seen = 0;
    for estimate in floor.arms.iter().flat_map(|a| &a.estimates) {
        let primary = estimate.statistic.is_primary(Regime::Floor);
        match estimate.role {
            Role::Control => assert!(estimate.noise_floor.is_some() || estimate.overhead.is_none()),
            Role::Primary(_) => assert!(primary),
            Role::Secondary(None) => assert_eq!(estimate.overhead, None, "{estimate:?}"),
            Role::Secondary(Some(a)) => {
                let overhead = estimate.overhead.unwrap();
                assert!(!primary && a.p >= overhead.p && a.interval.half() >= overhead.interval.half());
                seen += 1;
            }
        }
    }
    assert_eq!((seen, floor.family), (seen, seen));
    // The exporters use nothing in `off`: a difference, and no ratio.
    let exporter = floor.arm(&Arm::traced(Path::Direct, 1.0)).unwrap().estimate(Statistic::GatewayExporterCpu).unwrap();
    assert!(exporter.overhead.is_none() && (exporter.difference.unwrap().value - 12.0).abs() < 1e-9);
}

#[test]
fn arms_that_do_the_same_are_below_the_noise_floor() {
    let analysis = Analysis::of(&run(Regime::Floor, 20, &all_arms(), &QUIET, 8, truth), TARGET);
    let floor = &analysis.regimes[0];
    let p50 = |arm: &Arm| floor.arm(arm).unwrap().estimate(Statistic::E2eP50).unwrap();
    let control = p50(&Arm::Control);
    assert_eq!(control.noise_floor, Some(control.overhead.unwrap().interval.reach()));
    assert!(!p50(&Arm::traced(Path::Eager, 0.1)).below_noise_floor);
}

#[test]
fn the_lean_path_is_held_against_the_standard_one() {
    let arms = [Arm::traced(Path::Eager, 1.0), Arm::traced(Path::Deferred, 1.0)];
    let truth = |arm: &Arm| match arm {
        Arm::Traced { path: Path::Eager, .. } => 3.0,
        Arm::Traced { .. } => 1.1,
        Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => 1.0,
    };
    let analysis = Analysis::of(&run(Regime::Saturation, 20, &arms, &QUIET, 9, truth), TARGET);
    let [share] = analysis.shares_of_eager[..] else { panic!("{:?}", analysis.shares_of_eager) };
    // 20 us of request CPU, times 0.1 or 2, and 12 us for 24 spans.
    assert!((share.share.ratio - 14.0 / 52.0).abs() < 0.03, "{share:?}");
    assert_eq!((share.path, share.share.n, share.verdict), (Path::Deferred, 20, Verdict::Pass));
}

#[test]
fn an_analysis_is_read_back_as_it_was_written_and_is_the_same_again() {
    let run = run(Regime::Floor, 4, &all_arms(), &QUIET, 10, truth);
    let analysis = Analysis::of(&run, TARGET);
    let text = serde_json::to_string(&analysis).unwrap();
    assert!(!text.contains("NaN"));
    assert_eq!(serde_json::from_str::<Analysis>(&text).unwrap(), analysis);
    assert_eq!(Analysis::of(&run, TARGET), analysis);
}
