//! The page of a synthetic run: complete, well-formed, and nothing but itself.

use super::*;
use crate::overhead::analysis::TARGET;
use crate::overhead::analysis::synthetic::{Noise, run};
use crate::overhead::model::{Path, Regime};

fn arms() -> Vec<Arm> {
    let mut arms = vec![Arm::Control, Arm::Outside { name: "<smg & co>".to_owned() }];
    for path in Path::ALL {
        arms.extend([0.0, 0.01, 0.1, 1.0].map(|r| Arm::traced(path, r)));
    }
    arms
}

fn truth(arm: &Arm) -> f64 {
    match arm {
        Arm::Traced { path: Path::Eager, ratio, .. } => 1.12 + 0.2 * ratio,
        Arm::Traced { ratio, .. } => 1.0 + 0.03 * ratio,
        Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => 1.0,
    }
}

fn made(regimes: &[Regime]) -> String {
    let mut runs = regimes.iter().map(|r| run(*r, 20, &arms(), &Noise { sd: 0.012, drift: 0.1 }, 5, truth));
    let mut all = runs.next().unwrap();
    for run in runs {
        all.blocks.extend(run.blocks);
        all.settings.extend(run.settings);
    }
    let latencies = |arm: &Arm| (1..2000).map(|i| 60.0 * truth(arm) * (1.0 + 4.0 / f64::from(i).sqrt())).collect();
    let mut shown = vec![Arm::Off];
    shown.extend(arms());
    let distributions =
        shown.iter().map(|arm| Distribution::of(regimes[0], arm.clone(), latencies(arm), 200)).collect();
    page(&all, &Analysis::of(&all, TARGET), &distributions)
}

#[test]
fn the_page_is_complete_and_self_contained() {
    let page = made(&[Regime::Floor, Regime::Saturation]);
    for expected in [
        "floor: e2e p50",
        "saturation: gateway CPU",
        "near the target",
        "latency distributions",
        "of every block",
        "Threats",
        "Test CPU",
        "igsim overhead --quick",
    ] {
        assert!(page.contains(expected), "{expected} is missing");
    }
    for foreign in ["<script", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(foreign), "{foreign} leads elsewhere");
    }
    assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    assert!(!page.contains("<smg") && !page.contains("NaN") && !page.contains("inf"));
}

/// Tags are closed in the order in which they are opened.
#[test]
fn the_page_is_well_formed() {
    let page = made(&[Regime::FloorUnpinned]);
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1).filter_map(|rest| rest.split('>').next()) {
        let name = tag.trim_start_matches('/').split([' ', '\n']).next().unwrap();
        match tag {
            _ if ["meta", "br", "!doctype"].contains(&name) || tag.ends_with('/') => {}
            t if t.starts_with('/') => assert_eq!(open.pop(), Some(name)),
            _ => open.push(name),
        }
    }
    assert_eq!(open, Vec::<&str>::new());
}

#[test]
fn an_empty_run_still_makes_a_page() {
    let mut empty = run(Regime::Floor, 1, &[], &Noise { sd: 0.0, drift: 0.0 }, 1, truth);
    empty.blocks.truncate(1);
    assert!(page(&empty, &Analysis::of(&empty, TARGET), &Vec::new()).contains("</html>"));
    empty.blocks.clear();
    assert!(page(&empty, &Analysis::of(&empty, TARGET), &Vec::new()).contains("</html>"));
}
