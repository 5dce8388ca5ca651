//! What a user sees of a configuration that is wrong.

use insta::assert_snapshot;
use schemars::JsonSchema;
use serde::Deserialize;

use super::*;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Plant {
    name: String,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    #[schemars(range(min = 1))]
    count: u32,
    #[serde(default)]
    rate: f64,
    #[serde(default)]
    kind: Option<Kind>,
    #[serde(default)]
    shape: Option<Shape>,
    #[serde(default)]
    parts: Vec<Part>,
}

#[derive(Debug, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Tree,
    Shrub,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "form", rename_all = "snake_case", deny_unknown_fields)]
enum Shape {
    /// A ball.
    Ball {
        /// Half its width.
        radius: f64,
    },
    /// A box.
    Box {
        /// Across.
        width: f64,
        /// Up.
        #[serde(default)]
        height: f64,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Part {
    #[schemars(range(min = 1))]
    length: u32,
}

impl Validate for Plant {
    fn validate(&self, problems: &mut Problems) {
        problems.check(self.rate >= 0.0, "rate", self.rate, "a number of at least 0");
        for (i, part) in self.parts.iter().enumerate() {
            problems
                .at(&format!("parts[{i}]"), |p| p.check(part.length != 13, "length", part.length, "a lucky length"));
        }
    }
}

fn read_set(text: &str, set: &[(&str, &str)]) -> Result<Plant, String> {
    let set: Vec<(String, String)> = set.iter().map(|(p, v)| ((*p).to_owned(), (*v).to_owned())).collect();
    load_str::<Plant>("plant.yaml", text, &set).map(|l| l.config).map_err(|e| e.to_string())
}

fn error(text: &str) -> String {
    read_set(text, &[]).expect_err("the text is wrong")
}

#[test]
fn a_good_file_is_read() {
    let plant = read_set(
        "name: oak\nseed: 18446744073709551615\nrate: 2\nkind: tree\nshape: { form: box, width: 1.5 }\nparts: [{ length: 3 }]\n",
        &[],
    )
    .unwrap();
    assert_eq!((plant.name.as_str(), plant.seed, plant.kind), ("oak", u64::MAX, Some(Kind::Tree)));
    assert_eq!(plant.parts[0].length, 3);
    assert!(matches!(plant.shape, Some(Shape::Box { width: 1.5, height: 0.0 })));
    let round = read_set("name: pea\nshape: { form: ball, radius: 4 }\n", &[]).unwrap();
    assert!(matches!(round.shape, Some(Shape::Ball { radius: 4.0 })));
}

#[test]
fn all_problems_are_told_in_the_order_of_the_file() {
    assert_snapshot!(error("\
name: 7
count: -3
kidn: tree
kind: tre
rate: .nan
shape: { form: ball }
parts:
  - length: 0
  - lenght: 5
"), @r#"
    error: plant.yaml: name: found 7, expected text
       1 | name: 7
         |       ^
    error: plant.yaml: count: found -3, expected an integer of at least 1
       2 | count: -3
         |        ^^
    help: the default is 0
    error: plant.yaml: kidn: found an unknown key, expected one of count, kind, name, parts, rate, seed, shape
       3 | kidn: tree
         | ^^^^
    help: did you mean kind?
    error: plant.yaml: kind: found "tre", expected one of tree, shrub
       4 | kind: tre
         |       ^^^
    help: did you mean tree?
    error: plant.yaml: rate: found .nan, expected a finite number
       5 | rate: .nan
         |       ^^^^
    error: plant.yaml: shape.radius: found nothing, expected a number
       6 | shape: { form: ball }
         |        ^^^^^^^^^^^^^
    error: plant.yaml: parts[0].length: found 0, expected an integer of at least 1
       8 |   - length: 0
         |             ^
    error: plant.yaml: parts[1].lenght: found an unknown key, expected length
       9 |   - lenght: 5
         |     ^^^^^^
    help: did you mean length?
    error: plant.yaml: parts[1].length: found nothing, expected an integer of at least 1
       9 |   - lenght: 5
         |     ^
    "#);
}

#[test]
fn shapes_are_told_apart_by_their_tag() {
    assert_snapshot!(error("name: a\nshape: { form: bal, radius: 2 }\n"), @r#"
    error: plant.yaml: shape.form: found "bal", expected one of ball, box
       2 | shape: { form: bal, radius: 2 }
         |                ^^^
    help: did you mean ball?
    "#);
    assert_snapshot!(error("name: a\nshape: { radius: 2 }\n"), @r"
    error: plant.yaml: shape.form: found nothing, expected one of ball, box
       2 | shape: { radius: 2 }
         |        ^^^^^^^^^^^^
    ");
    assert_snapshot!(error("name: a\nshape:\n  form: ball\n  radius: 2\n  width: 1\n"), @r"
    error: plant.yaml: shape.width: found an unknown key, expected one of form, radius
       5 |   width: 1
         |   ^^^^^
    ");
    assert_snapshot!(error("name: a\nshape: 5\n"), @r"
    error: plant.yaml: shape: found 5, expected a mapping with form, radius or a mapping with form, height, width
       2 | shape: 5
         |        ^
    ");
}

#[test]
fn types_are_named() {
    assert_snapshot!(error("name: a\nseed: -1\n"), @r"
    error: plant.yaml: seed: found -1, expected an integer of at least 0
       2 | seed: -1
         |       ^^
    help: the default is 0
    ");
    assert_snapshot!(error("name: a\ncount: 4294967296\n"), @r"
    error: plant.yaml: count: found 4294967296, expected an integer of at least 1 and at most 4294967295
       2 | count: 4294967296
         |        ^^^^^^^^^^
    help: the default is 0
    ");
    assert_snapshot!(error("name: a\ncount: 1.5\n"), @r"
    error: plant.yaml: count: found 1.5, expected an integer of at least 1
       2 | count: 1.5
         |        ^^^
    help: the default is 0
    ");
    assert_snapshot!(error("name: a\nrate: fast\n"), @r#"
    error: plant.yaml: rate: found "fast", expected a number
       2 | rate: fast
         |       ^^^^
    help: the default is 0.0
    "#);
    assert_snapshot!(error("name: a\nparts: 4\n"), @r"
    error: plant.yaml: parts: found 4, expected a list
       2 | parts: 4
         |        ^
    ");
    assert_snapshot!(error("- a\n"), @"error: plant.yaml: found a list, expected a mapping with count, kind, name, parts, rate, seed, shape");
}

#[test]
fn the_type_has_the_last_word() {
    assert_snapshot!(error("name: a\nrate: -0.5\nparts:\n- length: 13\n"), @r"
    error: plant.yaml: rate: found -0.5, expected a number of at least 0
       2 | rate: -0.5
         |       ^^^^
    error: plant.yaml: parts[0].length: found 13, expected a lucky length
       4 | - length: 13
         |           ^^
    ");
}

#[test]
fn broken_yaml_is_shown() {
    assert_snapshot!(error("name: a\nparts:\n\t- length: 4\n"), @r"
    error: plant.yaml: line 3: found a tab in the indentation, expected spaces
       3 |  - length: 4
         | ^
    ");
    assert_snapshot!(error("name: [a\n"), @r"
    error: plant.yaml: line 1: found a syntax error (while parsing a flow sequence, expected ',' or ']'), expected YAML
       1 | name: [a
         |         ^
    ");
    assert_snapshot!(error("name: a\n---\nname: b\n"), @r"
    error: plant.yaml: found a second document, expected one document in the file
       3 | name: b
         | ^
    ");
    assert_snapshot!(error(""), @"error: plant.yaml: found an empty document, expected a mapping");
    assert_snapshot!(error("name: !secret a\n"), @r"
    error: plant.yaml: name: found the tag !secret, expected a value without a tag
       1 | name: !secret a
         | ^^^^
    ");
}

#[test]
fn duplicate_keys_are_all_told_with_their_paths() {
    assert_snapshot!(error("name: a\nparts:\n  - length: 4\n    length: 5\nname: b\n"), @r"
    error: plant.yaml: parts[0].length: found the same key a second time, expected each key once
       4 |     length: 5
         |     ^^^^^^
    error: plant.yaml: name: found the same key a second time, expected each key once
       5 | name: b
         | ^^^^
    ");
}

#[test]
fn a_missing_file_is_named() {
    let e = load::<Plant>(Path::new("no/such.yaml"), &[]).expect_err("there is no such file");
    assert_snapshot!(e.to_string(), @"error: no/such.yaml: found no such file, expected a readable YAML file");
}

#[test]
fn overrides_change_values_and_may_set_what_the_file_leaves_out() {
    let set =
        [("count", "4"), ("parts[0].length", "9"), ("kind", "shrub"), ("parts[1]", "{ length: 2 }"), ("rate", "2.5")];
    let plant = read_set("name: a\nparts: [{ length: 1 }]\n", &set).unwrap();
    assert_eq!((plant.count, plant.rate, plant.kind), (4, 2.5, Some(Kind::Shrub)));
    assert_eq!(plant.parts.iter().map(|p| p.length).collect::<Vec<_>>(), [9, 2]);
}

#[test]
fn wrong_overrides_are_shown_where_they_were_given() {
    let check = |path, value| read_set("name: a\n", &[(path, value)]).expect_err("the override is wrong");
    assert_snapshot!(check("count", "0"), @r"
    error: plant.yaml: count: found 0, expected an integer of at least 1
    --set | count=0
          |       ^
    help: the default is 0
    ");
    assert_snapshot!(check("cuont", "1"), @r"
    error: plant.yaml: cuont: found an unknown key, expected one of count, kind, name, parts, rate, seed, shape
    --set | cuont=1
          | ^^^^^
    help: did you mean count?
    ");
    assert_snapshot!(check("parts[0].lenth", "1"), @r"
    error: plant.yaml: parts[0].lenth: found an unknown key, expected length
    --set | parts[0].lenth=1
          | ^^^^^^^^^^^^^^
    help: did you mean length?
    ");
    assert_snapshot!(check("parts[3].length", "1"), @r"
    error: plant.yaml: --set: found index 3, expected an index of at most 0
    --set | parts[3].length=1
          | ^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(check("rate", ".inf"), @r"
    error: plant.yaml: rate: found .inf, expected a finite number
    --set | rate=.inf
          |      ^^^^
    ");
    assert_snapshot!(check("name", "[a"), @r"
    error: plant.yaml: name: found a syntax error (while parsing a flow sequence, expected ',' or ']'), expected YAML
    --set | name=[a
          |      ^^
    ");
    assert_snapshot!(check("a..b", "1"), @r#"
    error: plant.yaml: --set: found the path "a..b", expected a path such as engines[0].count
    --set | a..b=1
          | ^^^^
    "#);
    assert_snapshot!(check("name.first", "1"), @r"
    error: plant.yaml: name.first: found an unknown key, expected nothing
    --set | name.first=1
          | ^^^^^^^^^^
    ");
}
