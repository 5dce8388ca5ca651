//! What files may say, and what is said of those that are wrong.

use super::file::OutsideFile;
use super::*;

const SMG: &str = include_str!("../../../../scenarios/outside/smg.yaml");

fn load(text: &str) -> Result<OutsideFile, String> {
    shared::config::load_str::<OutsideFile>("x.yaml", text, &[]).map(|l| l.config).map_err(|e| e.to_string())
}

fn with(lines: &str) -> String {
    format!("name: x\nmodel: m\nrequests: 10\nload: {{in_flight: 2}}\n{lines}\n")
}

#[test]
fn the_file_for_smg_is_valid() {
    let file = load(SMG).unwrap();
    assert_eq!(file.arms.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(), ["off", "off'", "0", "0.1", "1.0"]);
    assert_eq!((file.regime(), file.starts()), (Regime::Saturation, true));
    assert_eq!(file.arms[0].arm(), Arm::Off);
    assert_eq!(file.arms[1].arm(), Arm::Control);
    // Equal but for what is measured.
    assert_eq!(file.command(&file.arms[0]), file.command(&file.arms[1]));
    assert!(file.command(&file.arms[2]).starts_with(&file.command(&file.arms[0])));
    assert_ne!(file.environment(&file.arms[2]), file.environment(&file.arms[3]));
}

#[test]
fn mistakes_are_told_with_their_place() {
    let check = |text: &str, expect: &[&str]| {
        let problem = load(text).unwrap_err();
        expect.iter().for_each(|part| assert!(problem.contains(part), "{text}\n{problem}\nlacks {part}"));
    };
    let arms = "arms: [{name: off}, {name: b}]";
    check(&with(&format!("start: [a]\nspeed: 3\n{arms}")), &["x.yaml", "speed"]);
    check(&with(arms), &["arms[0].start", "nothing", "a program and its arguments"]);
    check(&with("start: [a]\narms: [{name: b}, {name: off}]"), &["arms[0].name", "b", "`off`"]);
    check(&with("start: [a]\narms: [{name: off}, {name: off}]"), &["arms[1].name", "a name that no other arm has"]);
    check(&with(&format!("start: [a, '{{engine0}}']\n{arms}")), &["arms[0].start", "{engine0}", "{receiver}, {port}"]);
    check(&with(&format!("start: [a]\nenv: {{A: '{{prot}}'}}\n{arms}")), &["arms[0].env", "{prot}"]);
    check(&with(&format!("start: [a]\nurl: 'ftp://x'\n{arms}")), &["url", "ftp://x", "an http URL with a host"]);
    check(&with(&format!("start: [a]\nsettle: 1h\n{arms}")), &["settle", "3600 s", "at most 10m"]);
    check(&with(&format!("start: [a]\nprocess: p\nurl: 'http://h'\n{arms}")), &["arms[0].switch", "no `start`"]);
    check(&with("process: p\narms: [{name: off, switch: [a]}, {name: b, switch: [a]}]"), &["{port}", "{receiver}"]);
    check(&with("start: [a]\narms: [{name: off}, {name: b, switch: [x]}]"), &["arms[1].switch", "without `process`"]);
    let two = with(&format!("start: [a]\n{arms}"));
    check(&two.replace("in_flight: 2", "in_flight: 2, per_second: 5"), &["load", "both"]);
    check(&two.replace("in_flight: 2", "prompt_tokens: 5"), &["load", "neither"]);
    check(&two.replace("in_flight: 2", "per_second: 0"), &["load.per_second", "above 0"]);
    check(&two.replace("requests: 10", "requests: 0"), &["requests", "0"]);
    assert!(load(&two).is_ok());
}

#[test]
fn a_running_system_is_switched() {
    let arms = "arms: [{name: off, switch: [a, '{engines}']}, {name: b, switch: [b]}]";
    let file = load(&with(&format!("engines: 2\nprocess: p\nurl: 'http://h:1'\n{arms}"))).unwrap();
    assert!(!file.starts());
    let open = load(
        &with(&format!("process: p\nengines: 1\nurl: 'http://h'\n{arms}")).replace("in_flight: 2", "per_second: 9"),
    );
    assert_eq!(open.unwrap().regime(), Regime::Floor);
}
