//! The sidecar as a program: what it refuses before it serves.

use std::process::{Command, Output};

fn ran(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pd-proxy"));
    let Output { status, stderr, .. } = command.args(args).env_clear().output().expect("the program starts");
    (status.code(), String::from_utf8(stderr).expect("UTF-8"))
}

#[test]
fn who_may_prefill_has_to_be_said() {
    let engine = ["--engine", "http://127.0.0.1:1", "--listen", "127.0.0.1:0"];
    let check = |further: &[&str], expect: &str| {
        let (code, told) = ran(&[&engine, further].concat());
        assert_eq!(code, Some(2), "{further:?}: {told}");
        assert!(told.contains(expect), "{further:?}: {told}");
    };
    check(&[], "--allow <HOST[:PORT]>");
    check(&["--allow", "http://x"], "--allow: found \"http://x\", expected HOST or HOST:PORT");
    check(&["--allow", "a", "--allow-any"], "cannot be used with");
    check(&["--allow", "a", "--set", "prefill_max_retries=9"], "prefill_max_retries: found 9");
    check(&["--allow", "a", "--set", "retries=1"], "retries");
    let (code, told) = ran(&["--engine", "127.0.0.1:1", "--allow", "a"]);
    assert_eq!(code, Some(2));
    assert!(told.contains("--engine: ") && told.contains("is not an endpoint"), "{told}");
}
