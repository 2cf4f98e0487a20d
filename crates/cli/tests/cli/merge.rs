//! `minicache merge`: pairs of layers in files.

use std::fs;
use std::path::Path;

use safetensors::serialize_to_file;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::golden::{difference, find, read};
use crate::room::Room;

const PAIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../core/tests/fixtures");
const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden");

fn write(path: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, x)| x.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

#[test]
fn merged_pairs_are_the_golden_ones() {
    let room = Room::new();
    let shared = Path::new(SHARED).join("merge");
    let mut checked = 0;
    for dir in [Path::new(PAIR), &shared].into_iter().filter(|d| d.join("cases.json").is_file()) {
        let cases = fs::read_to_string(dir.join("cases.json")).unwrap();
        let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
        for pair in (0..3).map(|i| dir.join(format!("pair{i}"))) {
            for case in cases.iter().filter(|_| pair.with_extension("safetensors").is_file()) {
                let spec = match case["rule"].as_str().unwrap() {
                    "" => format!("{{ method = {}, granularity = {} }}", case["method"], case["granularity"]),
                    rule => format!(
                        "{{ method = {}, t = {}, granularity = {}, retention = {{ rule = \"{rule}\", gamma = {} }} }}",
                        case["method"], case["t"], case["granularity"], case["gamma"]
                    ),
                };
                let (from, out) = (pair.with_extension("safetensors"), room.path("out.safetensors"));
                let (from, to) = (from.display().to_string(), out.display().to_string());
                let said = room.json(&["merge", &from, "--cache", &spec, "--out", &to, "--json"]);
                let golden = read(&pair.with_extension(format!("case{}.safetensors", case["case"])));
                let got = read(&out);
                assert_eq!(got.len(), 4);
                for (name, shape, numbers) in &got {
                    let (_, want_shape, want) = find(&golden, name);
                    assert_eq!(shape, want_shape);
                    let d = difference(numbers, want);
                    assert!(d <= 1e-5, "{from} {spec} {name}: {d}");
                }
                for side in ["key", "value"] {
                    let (_, shape, marks) = find(&golden, &format!("retained.{side}"));
                    let lanes: Vec<Vec<usize>> = marks
                        .chunks_exact(shape[1])
                        .map(|lane| (0..shape[1]).filter(|&i| lane[i] > 0.0).collect())
                        .collect();
                    let by_head = case["granularity"] == "head";
                    let want = if by_head { serde_json::json!(lanes) } else { serde_json::json!(lanes[0]) };
                    assert_eq!(said["retained"][side], want, "{from} {spec}");
                }
                let shape = &got[0].1;
                let bytes = &said["bytes"];
                assert_eq!(
                    bytes["before"].as_u64().unwrap() as usize,
                    4 * 2 * shape.iter().product::<usize>()
                );
                let parts: u64 =
                    bytes["parts"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
                assert!(parts > 0 && bytes["after"].as_u64() == Some(parts));
                checked += 1;
            }
        }
    }
    assert!(checked >= 9, "only {checked} cases");
}

#[test]
fn bad_pairs_are_named() {
    let room = Room::new();
    let path = room.path("pair.safetensors");
    let pair = path.display().to_string();
    let merge = |words: &[&str]| room.wrong(&["merge", &pair, "--out", "x.safetensors"], words);
    merge(&["pair.safetensors", "No such file"]);

    let shape: &[usize] = &[2, 3, 4];
    let good = |name| (name, shape, vec![0.5; 24]);
    let all = || vec![good("a.key"), good("b.key"), good("a.value"), good("b.value")];
    write(&path, &all()[..3]);
    merge(&["no tensor `b.value`", "a.key, a.value, b.key"]);
    let mut broken = all();
    broken[3] = ("b.value", &[2, 3, 3], vec![0.5; 18]);
    write(&path, &broken);
    merge(&["b.value", "[2, 3, 3]"]);
    broken[3] = ("b.value", shape, vec![f32::NAN; 24]);
    write(&path, &broken);
    merge(&["b.value", "NaN", "KV head 0, token 0"]);
    let bytes = vec![0u8; 48];
    let half = TensorView::new(Dtype::F16, shape.to_vec(), &bytes).unwrap();
    serialize_to_file([("a.key", half)], None, &path).unwrap();
    merge(&["a.key", "F16"]);
    write(&path, &all());
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    merge(&["pair.safetensors", "safetensors file"]);
    fs::write(&path, "nonsense").unwrap();
    merge(&["pair.safetensors"]);
    assert!(!room.path("x.safetensors").exists());

    write(&path, &all());
    let with = |cache: &str, words: &[&str]| {
        room.wrong(&["merge", &pair, "--out", "x.safetensors", "--cache", cache], words);
    };
    with("minicash", &["--cache", "unknown method `minicash`"]);
    with("{ method = \"minicache\", t = 2.0 }", &["cache.t", "0 to 1"]);
    with("h2o", &["does not work on a pair"]);
    room.wrong(&["merge", &pair, "--out", "no/x.safetensors"], &["--out", "no such folder"]);
    // Heads that are treated apart have a list each, even if there is only one.
    for heads in [1, 2] {
        let shape: &[usize] = &[heads, 3, 4];
        let tensor = |name| (name, shape, (0..heads * 12).map(|i| (i as f32).sin()).collect());
        write(&path, &["a.key", "b.key", "a.value", "b.value"].map(tensor));
        for (cache, nested) in [("token", false), ("head", true)] {
            let cache = format!("{{ method = \"minicache\", granularity = \"{cache}\", merge = \"keys\" }}");
            let args = ["merge", &pair, "--out", "x.safetensors", "--cache", &cache, "--json"];
            let said = room.json(&args);
            for side in ["key", "value"] {
                let lists = said["retained"][side].as_array().unwrap();
                let all_lists = lists.iter().all(Value::is_array);
                assert!(
                    if nested { all_lists && lists.len() == heads } else { lists.iter().all(Value::is_u64) },
                    "{said}"
                );
            }
        }
    }
    write(&path, &all());
    let human = room.done(&["merge", &pair, "--out", "x.safetensors"]);
    assert!(human.contains("3 tokens") && human.contains("retained keys"), "{human}");
}
