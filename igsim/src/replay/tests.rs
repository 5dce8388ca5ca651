//! Traces as they are read, what is said of wrong ones, and the figures of the public ones where they are at hand.

use std::io::Cursor;
use std::path::PathBuf;

use insta::assert_snapshot;

use super::*;
use crate::scenario::Spread;

fn trace(format: TraceFormat) -> Trace {
    Trace { format, path: PathBuf::from("t"), speed_up: 1.0, limit: None, spread: Spread::Even }
}

fn read(text: &str, trace: &Trace) -> Result<Vec<Recorded>, String> {
    let input = Cursor::new(text.to_owned());
    Reader::new("t", input, trace, Seed(1)).collect::<Result<_, _>>().map_err(|e| e.to_string())
}

fn millis(records: &[Recorded]) -> Vec<f64> {
    records.iter().map(|r| r.at.as_nanos() as f64 / 1e6).collect()
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n\
    2023-11-16 18:15:50.9951690,396,109\r\n2023-11-17 00:00:00.0000000,1,1\r\n";

#[test]
fn azure_times_keep_their_100_ns() {
    let records = read(AZURE, &trace(TraceFormat::Azure)).unwrap();
    let times: Vec<u64> = records.iter().map(|r| r.at.as_nanos()).collect();
    assert_eq!(times, [0, 4_314_579_000, 20_653_319_410_000]);
    let lengths: Vec<_> = records.iter().map(|r| (r.own_tokens, r.output_tokens)).collect();
    assert_eq!(lengths, [(374, 44), (396, 109), (1, 1)]);
}

#[test]
fn speed_up_and_limit_apply() {
    let t = Trace { speed_up: 2.0, limit: Some(2), ..trace(TraceFormat::Azure) };
    assert_eq!(millis(&read(AZURE, &t).unwrap()), [0.0, 2157.2895]);
}

#[test]
fn wrong_azure_lines_are_named() {
    let check = |text: &str| read(text, &trace(TraceFormat::Azure)).unwrap_err();
    let line = |rest: &str| check(&format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{rest}\n"));
    assert_snapshot!(check("a,b\n1,2\n"), @r#"t:1: found the header "a,b", expected TIMESTAMP,ContextTokens,GeneratedTokens"#);
    assert_snapshot!(line("yesterday,1,1"), @r#"t:2: found TIMESTAMP "yesterday", expected a time such as 2023-11-16 18:15:46.6805900"#);
    assert_snapshot!(line("2023-11-16 18:15:46,0,1"), @"t:2: found ContextTokens 0, expected 1 to 16777216 tokens");
    assert_snapshot!(line("2023-11-16 18:15:46,5,-1"), @r#"t:2: found GeneratedTokens "-1", expected a number of tokens"#);
    assert_snapshot!(line("2023-11-16 18:15:46,5"), @"t:2: found 2 fields, expected 3, as in the header");
    assert_snapshot!(line("2023-11-16 18:15:46,5,5\n2023-11-16 18:15:45,5,5"), @"t:3: found TIMESTAMP 2023-11-16T18:15:45, expected a time not before that of the line before");
}

#[test]
fn a_csv_of_ones_own_may_name_what_is_shared() {
    let text = "tenant,arrival_s,prompt_tokens,output_tokens,prefix_group,prefix_tokens,priority\n\
        0,100.5,50,5,a,32,\n1,100.75,40,6,a,32,-2\n,101,30,7,,,\n";
    let records = read(text, &trace(TraceFormat::Csv)).unwrap();
    assert_eq!(millis(&records), [0.0, 250.0, 500.0]);
    assert_eq!(records[0].prompt, records[1].prompt);
    assert_eq!(records.iter().map(|r| r.own_tokens).collect::<Vec<_>>(), [18, 8, 30]);
    let who: Vec<_> = records.iter().map(|r| (r.tenant, r.priority)).collect();
    assert_eq!(who, [(Some(0), None), (Some(1), Some(-2)), (None, None)]);
}

#[test]
fn wrong_csv_lines_are_named() {
    let check = |text: &str| read(text, &trace(TraceFormat::Csv)).unwrap_err();
    assert_snapshot!(check("arrival_s,prompt_tokens\n"), @"t:1: found no column output_tokens, expected arrival_s,prompt_tokens,output_tokens");
    assert_snapshot!(check("arrival_s,prompt_tokens,output_tokens,colour\n"), @r#"t:1: found the column "colour", expected one of arrival_s, prompt_tokens, output_tokens, prefix_group, prefix_tokens, priority, tenant"#);
    assert_snapshot!(check("arrival_s,prompt_tokens,output_tokens\n1,2,3\n0.5,2,3\n"), @"t:3: found arrival_s 0.5, expected a time not before that of the line before");
    assert_snapshot!(check("arrival_s,prompt_tokens,output_tokens\nNaN,2,3\n"), @"t:2: found arrival_s NaN, expected seconds");
    assert_snapshot!(check("arrival_s,prompt_tokens,output_tokens,prefix_group,prefix_tokens\n1,2,3,a,4\n"), @"t:2: found prefix_tokens 4, expected at most prompt_tokens (2)");
    assert_snapshot!(check("arrival_s,prompt_tokens,output_tokens,prefix_tokens\n1,9,3,4\n"), @"t:2: found prefix_tokens 4 without a group, expected a prefix_group");
}

const MOONCAKE: &str = "\
{\"timestamp\": 27000, \"input_length\": 1030, \"output_length\": 5, \"hash_ids\": [7, 8, 9]}
{\"timestamp\": 27000, \"input_length\": 512, \"output_length\": 6, \"hash_ids\": [7]}
{\"timestamp\": 27000, \"input_length\": 1024, \"output_length\": 6, \"hash_ids\": [8, 7]}
{\"timestamp\": 30000, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [10]}
{\"timestamp\": 30000, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [10]}
";

#[test]
fn mooncake_blocks_are_shared_prefixes() {
    let records = read(MOONCAKE, &trace(TraceFormat::Mooncake)).unwrap();
    assert_eq!(records[0].prompt.iter().map(|s| s.tokens).collect::<Vec<_>>(), [512, 512, 6]);
    assert_eq!(records[0].prompt[0], records[1].prompt[0]);
    assert_ne!(records[0].prompt[0].content, records[2].prompt[1].content, "an id stands for its whole prefix");
    assert_eq!(records[3].prompt, records[4].prompt);
}

#[test]
fn ticks_are_spread() {
    let at = |spread| millis(&read(MOONCAKE, &Trace { spread, ..trace(TraceFormat::Mooncake) }).unwrap());
    assert_eq!(at(Spread::Even), [0.0, 1000.0, 2000.0, 3000.0, 4500.0]);
    assert_eq!(at(Spread::None), [0.0, 0.0, 0.0, 3000.0, 3000.0]);
    let random = at(Spread::Random);
    assert!(random.is_sorted() && random[2] < 3000.0 && random[3] >= 3000.0 && random[4] < 6000.0, "{random:?}");
    assert!(random[0] > 0.0, "{random:?}");
    assert_eq!(random, at(Spread::Random), "the seed decides");
}

#[test]
fn wrong_mooncake_lines_are_named_after_what_came_before() {
    let first = MOONCAKE.lines().next().unwrap();
    let check = |line: &str| {
        let input = Cursor::new(format!("{first}\n\n{line}\n"));
        let all: Vec<_> = Reader::new("t", input, &trace(TraceFormat::Mooncake), Seed(1)).collect();
        assert_eq!((all.len(), all[0].is_ok()), (2, true));
        all[1].clone().unwrap_err().to_string()
    };
    assert_snapshot!(check("{"), @"t:3: found a line that does not fit (EOF while parsing an object), expected an object with timestamp, input_length, output_length and hash_ids");
    assert_snapshot!(check("{\"timestamp\": 1, \"input_length\": 1, \"output_length\": 1}"), @"t:3: found a line that does not fit (missing field `hash_ids`), expected an object with timestamp, input_length, output_length and hash_ids");
    assert_snapshot!(check("{\"timestamp\": 1, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [1]}"), @"t:3: found timestamp 1, expected a time not before that of the line before");
    assert_snapshot!(check("{\"timestamp\": 28000, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1]}"), @"t:3: found 1 hash_ids, expected 2, one for each 512 of 600 tokens");
    assert_snapshot!(check("{\"timestamp\": 28000, \"input_length\": 1, \"output_length\": 0, \"hash_ids\": [1]}"), @"t:3: found output_length 0, expected 1 to 16777216 tokens");
}

/// The figures of a public trace: requests, seconds, mean prompt and mean answer.
fn figures(format: TraceFormat, file: &str) -> Option<(usize, f64, f64, f64)> {
    let Some(data) = std::env::var_os("IGSIM_DATA") else {
        eprintln!("skipped: IGSIM_DATA is not set, {file} is not read");
        return None;
    };
    let path = PathBuf::from(data).join("traces").join(file);
    let records: Vec<Recorded> = Reader::open(&Trace { path, ..trace(format) }, Seed(1))
        .and_then(Iterator::collect)
        .unwrap_or_else(|e| panic!("{e}"));
    let prompt = |r: &Recorded| r.own_tokens + r.prompt.iter().map(|s| s.tokens).sum::<u32>();
    let mean =
        |f: &dyn Fn(&Recorded) -> u32| records.iter().map(|r| f64::from(f(r))).sum::<f64>() / records.len() as f64;
    let seconds = records.last().map_or(0.0, |r| r.at.as_secs_f64());
    Some((records.len(), seconds, mean(&prompt), mean(&|r| r.output_tokens)))
}

#[test]
fn the_azure_trace_has_its_figures() {
    let found = figures(TraceFormat::Azure, "AzureLLMInferenceTrace_conv.csv");
    let Some((count, seconds, prompt, output)) = found else { return };
    let rounded = [seconds, prompt, output].map(|f| f.round() as u64);
    assert_eq!((count, rounded), (19_366, [3_502, 1_155, 211]));
}

#[test]
fn the_mooncake_trace_has_its_figures() {
    let found = figures(TraceFormat::Mooncake, "mooncake_conversation_trace.jsonl");
    let Some((count, seconds, prompt, output)) = found else { return };
    assert_eq!((count, [prompt, output].map(|f| f.round() as u64)), (12_031, [12_035, 343]));
    // The last tick is spread over the 3 s after its timestamp of 3,537 s.
    assert!((3_537.0..3_540.0).contains(&seconds), "{seconds}");
}
