//! The profile tools as they are called: what they print, and what they say of bad input.

use std::path::Path;
use std::process::{Command, Output};

fn engine_sim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine-sim")).args(args).output().unwrap()
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The exit code is 2 and standard error begins like this.
fn refused(args: &[&str], expect: &str) {
    let output = engine_sim(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.starts_with(expect), "{error}");
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn bad_input_is_told_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let csv = write(
        folder.path(),
        "s.csv",
        "decode_seqs,decode_context,prefill_tokens,time_us\n1,100,0,6500\n2,many,0,6600\n",
    );
    let expect = format!("error: {csv}: line 3, column decode_context: found \"many\", expected a number in 0..=1e12");
    refused(&["calibrate", "--profile", "instant", "--steps", &csv], &expect);
    refused(&["calibrate", "--profile", "instant", "--steps", "no.csv"], "error: no.csv: found No such file");
    refused(
        &["latency", "--profile", "instnat", "--decode", "1"],
        "error: --profile: found instnat, expected one of llama-3.1-8b-h100,",
    );
    refused(&["latency"], "error: --decode, --prefill: found no requests");
    refused(
        &["steps", "--profile", "instant", "--data", "."],
        "error: source.tables: found nothing in profile instant",
    );
    let data = folder.path().display().to_string();
    let expect = format!("error: {data}/latency/dynamo_h200_decode_dev.csv: found No such file");
    refused(&["steps", "--profile", "llama-3.1-8b-fp8-h200", "--data", &data], &expect);
    let yaml = write(folder.path(), "p.yaml", "name: mine\n");
    refused(&["--profile", &yaml], &format!("error: {yaml}: "));
}

#[test]
fn a_profile_is_calibrated_written_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let mut text = "decode_seqs,decode_context,prefill_tokens,time_us\n".to_owned();
    for n in 1..=20 {
        text += &format!("{n},{},0,{}\n", n * 500, 5000 + 40 * n + n * 500 / 20);
    }
    let csv = write(folder.path(), "s.csv", &text);
    let out = folder.path().join("mine.yaml").display().to_string();
    let table = printed(&engine_sim(&["calibrate", "--profile", "llama-3.1-8b-h100", "--steps", &csv, "--out", &out]));
    let rows: Vec<&str> = table.lines().map(str::trim_end).collect();
    assert!(rows[2].starts_with("decode       20 ") && rows[3].ends_with("as before"), "{table}");

    let step = printed(&engine_sim(&["latency", "--profile", &out, "--decode", "10", "--context", "500"]));
    // 5 ms + 10 * 40 us + 5000 * 0.05 us.
    let cells: Vec<&str> = step.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(&cells[..5], ["10", "500", "0", "0", "5.650"], "{step}");
}

#[test]
fn all_profiles_are_listed() {
    let list = printed(&engine_sim(&["profiles"]));
    assert_eq!(list.lines().count(), 13, "{list}");
    assert!(list.lines().any(|l| l.starts_with("llama-3.1-8b-fp8-h200 ") && l.contains("4.3")), "{list}");
}
