//! The lab in front of systems that are not ours, played by `igsim up` and by programs that fail.

use std::path::Path;
use std::process::{Command, Stdio};

use igsim::overhead::model::{Arm, Block};
use igsim::overhead::record;

fn outside(dir: &Path, file: &str) -> (Option<i32>, String, String) {
    let path = dir.join("system.yaml");
    std::fs::write(&path, file).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_igsim"));
    command.args(["overhead", "outside"]).arg(&path).args(["--rounds", "2", "--out"]).arg(dir.join("run"));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A fleet of our own, played by a system that is not.
fn fleet(dir: &Path) -> String {
    let scenario = dir.join("fleet.yaml");
    let text = "name: fleet\nengines: [{count: 1, profile: instant, model: lab}]\nrequests: 1\nworkload:\n  arrivals: {process: \
                poisson, rate: 1}\n";
    std::fs::write(&scenario, text).unwrap();
    format!(
        "name: fleet\nmodel: lab\nstart: ['{}', up, '{}', --set, 'listen.gateway=127.0.0.1:{{port}}', --set, \
         'listen.engines=127.0.0.1:{{port2}}']\nload: {{in_flight: 2, output_tokens: 2}}\nrequests: 30\nsettle: 20ms\n",
        env!("CARGO_BIN_EXE_igsim"),
        scenario.display()
    )
}

#[test]
fn two_rounds_account_for_every_request() {
    let dir = tempfile::tempdir().unwrap();
    let file = fleet(dir.path()) + "arms: [{name: off}, {name: \"off'\"}, {name: again, env: {A: '{receiver}'}}]\n";
    let (code, stdout, stderr) = outside(dir.path(), &file);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("again"), "{stdout}");
    let run = record::read(&dir.path().join("run")).unwrap().run;
    assert_eq!((run.settings[0].rounds, run.settings[0].requests), (2, 30));
    // Each round has both arms behind one `off` block; one more `off` block ends the run.
    assert_eq!(run.blocks.len(), 2 * 3 + 1);
    for Block { arm, answered, failed, cpu, e2e, peak_rss_kib, .. } in &run.blocks {
        assert_eq!((*answered, *failed, e2e.count), (30, 0, 30), "{arm}");
        assert!(cpu.gateway() > 0.0 && cpu.client > 0.0 && *peak_rss_kib > 1_000, "{arm}: {cpu:?}");
        assert_eq!(cpu.engine_request, 0.0, "the system has its own engines");
    }
    let again = run.blocks.iter().filter(|b| b.arm == Arm::Outside { name: "again".to_owned() }).count();
    assert_eq!(again, 2);
    for name in ["report.json", "report.html", "arm-0.log", "arm-2.log"] {
        assert!(dir.path().join("run").join(name).exists(), "{name}");
    }
}

#[test]
fn a_system_that_fails_says_what_it_said() {
    let check = |lines: &str, code: i32, expect: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let file = format!("name: x\nmodel: m\nload: {{in_flight: 1}}\nrequests: 5\n{lines}\n");
        let (found, stdout, stderr) = outside(dir.path(), &file);
        assert_eq!(found, Some(code), "{lines}: {stdout}{stderr}");
        expect.iter().for_each(|part| assert!(stderr.contains(part), "{lines}: {stderr} lacks {part}"));
    };
    let arms = "arms: [{name: off}, {name: b}]";
    let dies = format!("start: [sh, -c, 'echo no luck; exit 4']\n{arms}");
    check(&dies, 3, &["`off`: sh -c", "exit status: 4", "arm-0.log", "\n  no luck"]);
    let idle = format!("start: [sh, -c, 'echo I wait; exec sleep 600']\nready_within: 300ms\n{arms}");
    check(&idle, 3, &["`off`: GET http://127.0.0.1:", "/v1/models was not answered well within", "\n  I wait"]);
    check(&format!("start: [/nowhere/system]\n{arms}"), 3, &["`off`: cannot run /nowhere/system"]);
    check(&format!("start: [a, '{{engine0}}']\n{arms}"), 2, &["system.yaml", "arms[0].start", "{engine0}"]);
}
