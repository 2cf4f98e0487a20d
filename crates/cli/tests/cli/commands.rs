//! The commands on one file or one model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::Value;
use tempfile::TempDir;

const PAIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../core/tests/fixtures");
pub(crate) const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures");
const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden");

/// An empty folder to work in.
pub(crate) struct Room(TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minicache"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command.env_remove("MINICACHE_DATA").env_remove("MINICACHE_MODELS").env("HF_HUB_OFFLINE", "1");
        command.env("RUST_BACKTRACE", "1");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// A call that has to succeed: its stdout.
    pub(crate) fn done(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.done(args)).unwrap()
    }

    /// A call that has to fail as wrong, saying every one of `words` in one or two lines.
    pub(crate) fn wrong(&self, args: &[&str], words: &[&str]) {
        let out = self.run(args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!((1..=2).contains(&said.lines().count()), "{args:?}: {said}");
        assert!(said.starts_with("minicache: ") && out.stdout.is_empty(), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
    }

    /// The tiny LLaMA-3 model with a tokenizer of words `w0`, `w1`, ... and, if asked, a chat template.
    pub(crate) fn model(&self, chat: bool) -> String {
        let dir = self.path("model");
        fs::create_dir_all(&dir).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(MODELS).join("llama3").join(name), dir.join(name)).unwrap();
        }
        let config: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        let size = config["vocab_size"].as_u64().unwrap();
        let vocab: serde_json::Map<String, Value> =
            (0..size).map(|i| (if i == 0 { "?".to_string() } else { format!("w{i}") }, i.into())).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "?" },
        });
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        if chat {
            let template = "{% for m in messages %}w1 {{ m.role == 'system' and 'w2' or 'w3' }} {{ m.content }} {% endfor %}w4";
            let config = serde_json::json!({ "chat_template": template });
            fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        }
        dir.display().to_string()
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let number = |view: &TensorView<'_>| -> Vec<f32> {
        let four = view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match view.dtype() {
            Dtype::F32 => four.map(f32::from_le_bytes).collect(),
            Dtype::I32 => four.map(|b| i32::from_le_bytes(b) as f32).collect(),
            Dtype::I64 => {
                let eight = view.data().chunks_exact(8);
                eight.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            Dtype::U8 => view.data().iter().map(|&b| f32::from(b)).collect(),
            other => panic!("{other}"),
        }
    };
    let mut all: Tensors =
        file.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec(), number(&view))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn write(path: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, x)| x.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

pub(crate) fn find<'a>(tensors: &'a Tensors, name: &str) -> &'a (String, Vec<usize>, Vec<f32>) {
    tensors.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("no {name}"))
}

/// Largest difference over the largest number.
pub(crate) fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs())) / top
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

#[test]
fn footprints_need_no_weights() {
    let room = Room::new();
    let said = room.json(&[
        "footprint",
        "--model",
        "llama-2-7b",
        "--context",
        "512",
        "--batch",
        "3",
        "--json",
        "--cache",
        "{ method = \"minicache\", quant = { bits = 4, group = 128 } }",
    ]);
    let keys: Vec<&str> = said.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["model", "context", "batch", "full_bytes", "bytes", "ratio", "parts"]);
    assert_eq!(said["full_bytes"].as_u64(), Some(3 * 512 * 32 * 2 * 4096 * 2));
    let parts: u64 = said["parts"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(said["bytes"].as_u64(), Some(parts));
    let ratio = said["full_bytes"].as_f64().unwrap() / parts as f64;
    assert!((said["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9 && ratio > 2.0 && ratio < 5.02, "{ratio}");

    let human = room.done(&[
        "footprint",
        "--model",
        "llama-2-7b",
        "--context",
        "64",
        "--cache",
        "{ method = \"minicache\", quant = { bits = 4, group = 128 } }",
    ]);
    assert!(human.contains("16 / 4.25 x 32/24 = 5.02x"), "{human}");

    // A folder of which only the configuration is there, and a file.
    let dir = room.path("bare");
    fs::create_dir(&dir).unwrap();
    fs::copy(Path::new(MODELS).join("mistral/config.json"), dir.join("config.json")).unwrap();
    let bare = room.json(&["footprint", "--model", "bare", "--context", "10", "--json"]);
    assert_eq!(bare["model"], "bare");
    let gguf = format!("{MODELS}/gguf/llama2.q8_0.gguf");
    assert_eq!(room.json(&["footprint", "--model", &gguf, "--context", "10", "--json"])["batch"], 1);

    let models = room.json(&["models", "--json"]);
    for entry in models["models"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let said =
            room.json(&["footprint", "--model", name, "--context", "40", "--cache", "kivi-2", "--json"]);
        let numbers = ["layers", "kv_heads", "head_dim"].map(|k| entry[k].as_u64().unwrap());
        assert_eq!(said["full_bytes"].as_u64(), Some(4 * 40 * numbers.iter().product::<u64>()), "{name}");
    }

    room.wrong(&["footprint", "--model", "llama-2-8b", "--context", "10"], &["did you mean", "llama-2-7b"]);
    room.wrong(&["footprint", "--model", "llama-2-7b", "--context", "0"], &["--context", "at least 1"]);
    let late = "{ method = \"mean\", start_layer = 32 }";
    let args = ["footprint", "--model", "llama-2-7b", "--context", "9", "--cache", late];
    room.wrong(&args, &["start_layer", "32 layers"]);
    room.wrong(&["footprint", "--model", "x", "--context", "9", "--similarity", "3"], &["--similarity"]);
}

#[test]
fn lists_say_what_there_is() {
    let room = Room::new();
    let human = room.done(&["models"]);
    for name in ["smollm2-135m", "llama-3-70b", "phi-3-mini-4k", "mixtral-8x7b"] {
        assert!(human.contains(name), "{human}");
    }
    let methods = room.json(&["methods", "--json"]);
    let methods = methods["methods"].as_array().unwrap();
    assert_eq!(methods.len(), minicache_core::METHODS.len());
    for m in methods {
        assert!(m["about"].as_str().unwrap().len() > 20 && !m["reads"].as_array().unwrap().is_empty(), "{m}");
    }
    let human = room.done(&["methods"]);
    assert!(human.contains("minicache") && human.contains("reads start_layer"), "{human}");
}

pub(crate) fn ids(golden: &Tensors) -> String {
    find(golden, "tokens").2.iter().map(|t| format!("{t} ")).collect()
}

#[test]
fn logits_and_states_are_the_golden_ones() {
    let room = Room::new();
    for name in ["llama3", "mistral-sliding", "phi3-longrope"] {
        let model = format!("{MODELS}/{name}");
        let golden = read(&Path::new(&model).join("golden.safetensors"));
        let tokens = ids(&golden);
        let (_, shape, want) = find(&golden, "logits");
        for prefill in [None, Some("20"), Some("0")] {
            let mut args = vec!["logits", "--model", &model, "--tokens", &tokens, "--out", "l.safetensors"];
            args.extend(prefill.iter().flat_map(|n| ["--prefill", n]));
            room.done(&args);
            let got = read(&room.path("l.safetensors"));
            assert_eq!((got.len(), &got[0].1), (1, shape), "{name}");
            let d = difference(&got[0].2, want);
            assert!(d < 1e-4, "{name} {prefill:?}: {d}");
        }
        room.done(&["dump-kv", "--model", &model, "--tokens", &tokens, "--out", "kv.safetensors"]);
        let got = read(&room.path("kv.safetensors"));
        assert_eq!(got.len(), 8);
        for (tensor, shape, numbers) in &got {
            let (_, want_shape, want) = find(&golden, tensor);
            assert_eq!(shape, want_shape, "{name} {tensor}");
            let d = difference(numbers, want);
            assert!(d < 1e-4, "{name} {tensor}: {d}");
        }
    }
}

#[test]
fn compressed_caches_change_what_follows_the_prefill() {
    let room = Room::new();
    let model = format!("{MODELS}/llama2");
    let golden = read(&Path::new(&model).join("golden.safetensors"));
    let tokens = ids(&golden);
    let run = |out: &str, more: &[&str]| {
        let args = ["logits", "--model", &model, "--tokens", &tokens, "--out", out, "--set", "weights=f32"];
        room.done(&[&args[..], more].concat());
        read(&room.path(out)).remove(0)
    };
    let full = run("a.safetensors", &["--prefill", "30"]);
    let merged =
        run("b.safetensors", &["--prefill", "30", "--cache", "{ method = \"mean\", start_layer = 0 }"]);
    let vocab = full.1[1];
    assert!(difference(&merged.2[..30 * vocab], &full.2[..30 * vocab]) < 1e-5);
    assert!(difference(&merged.2[30 * vocab..], &full.2[30 * vocab..]) > 1e-3);

    // Restored states of a mean are the mean of the golden ones.
    let spec = "{ method = \"mean\", start_layer = 2, dtype = \"f32\" }";
    room.done(&[
        "dump-kv",
        "--model",
        &model,
        "--tokens",
        &tokens,
        "--cache",
        spec,
        "--out",
        "kv.safetensors",
    ]);
    let got = read(&room.path("kv.safetensors"));
    for side in ["key", "value"] {
        let layer = |i: usize| &find(&golden, &format!("layer.{i}.{side}")).2;
        let mean: Vec<f32> = layer(2).iter().zip(layer(3)).map(|(a, b)| 0.5 * (a + b)).collect();
        for i in [2, 3] {
            assert!(difference(&find(&got, &format!("layer.{i}.{side}")).2, &mean) < 1e-4);
        }
        assert!(difference(&find(&got, &format!("layer.1.{side}")).2, layer(1)) < 1e-4);
    }

    let bad = |more: &[&str], words: &[&str]| {
        let args = ["logits", "--model", &model, "--out", "x.safetensors"];
        room.wrong(&[&args[..], more].concat(), words);
    };
    bad(&["--tokens", "1 2 x"], &["--tokens", "`x`"]);
    bad(&["--tokens", "1 99999"], &["99999", "vocabulary"]);
    bad(&["--tokens", "1 2", "--prefill", "3"], &["--prefill", "2 tokens"]);
    bad(&["--prompt-file", "none.txt"], &["--prompt-file", "none.txt"]);
    bad(&[], &["--prompt-file"]);
    bad(&["--tokens", "1", "--set", "cache.t=1"], &["--set cache.t=1", "--cache"]);
    bad(&["--tokens", "1", "--weights", "f8"], &["--weights"]);
    fs::write(room.path("p.txt"), "w1 w2").unwrap();
    bad(&["--prompt-file", "p.txt"], &["tokenizer.json"]);
    room.wrong(
        &["logits", "--model", "./no/such", "--tokens", "1", "--out", "x"],
        &["./no/such: no such file"],
    );
}

#[test]
fn text_is_generated_with_every_kind_of_cache() {
    let room = Room::new();
    let model = room.model(false);
    let words = |text: &str| text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
    let args = ["generate", "--model", &model, "--prompt", "w5 w6 w7 w8", "--max-new-tokens", "6"];
    let greedy = words(&room.done(&args));
    assert_eq!(greedy.len(), 6, "{greedy:?}");
    let out = room.run(&args);
    let said = text(&out.stderr);
    for word in ["prefill: 4 tokens", "decode: 5 tokens", "tokens/s", "full cache"] {
        assert!(said.contains(word), "{said}");
    }
    for cache in ["minicache", "mean", "kivi-2", "rtn-8", "h2o", "sinks"] {
        let got = words(&room.done(&[&args[..], &["--cache", cache]].concat()));
        // The first token comes from the exact prefill.
        assert_eq!((got.len(), &got[0]), (6, &greedy[0]), "{cache}");
    }
    let sampled = |seed: &str| {
        room.done(&[&args[..], &["--temperature", "5", "--top-p", "0.95", "--seed", seed]].concat())
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));

    // The prompt as the file has it is what the ids say it is.
    fs::write(room.path("p.txt"), "w5 w6 w7 w8").unwrap();
    let file = ["generate", "--model", &model, "--prompt-file", "p.txt", "--max-new-tokens", "6"];
    assert_eq!(words(&room.done(&file)), greedy);
    room.done(&["logits", "--model", &model, "--prompt-file", "p.txt", "--out", "a.safetensors"]);
    room.done(&["logits", "--model", &model, "--tokens", "5,6,7,8", "--out", "b.safetensors"]);
    let logits = read(&room.path("a.safetensors"));
    assert_eq!(logits, read(&room.path("b.safetensors")));
    let last = &logits[0].2[3 * logits[0].1[1]..];
    let best = (0..last.len()).max_by(|&i, &j| last[i].total_cmp(&last[j])).unwrap();
    assert_eq!(greedy[0], format!("w{best}"));

    room.wrong(&[&args[..], &["--chat"]].concat(), &["no chat template"]);
    room.wrong(&[&args[..], &["--temperature", "-1"]].concat(), &["--temperature"]);
    room.wrong(&[&args[..], &["--top-p", "0"]].concat(), &["--top-p"]);
    room.wrong(&["generate", "--model", &model, "--prompt", ""], &["prompt is empty"]);
    room.wrong(&["generate", "--model", &model], &["--prompt"]);
    let long = "w5 ".repeat(100_000);
    fs::write(room.path("long.txt"), long).unwrap();
    room.wrong(&["generate", "--model", &model, "--prompt-file", "long.txt"], &["100000 tokens", "context"]);
}

#[test]
fn chats_use_the_template() {
    let room = Room::new();
    let model = room.model(true);
    let base = ["generate", "--model", &model, "--max-new-tokens", "4", "--prompt"];
    let chat = room.done(&[&base[..], &["w9", "--system", "w8"]].concat());
    assert_eq!(room.done(&[&base[..], &["w1 w2 w8 w1 w3 w9 w4", "--raw"]].concat()), chat);
    assert_eq!(
        room.done(&[&base[..], &["w9", "--chat"]].concat()),
        room.done(&[&base[..], &["w9"]].concat())
    );
    room.wrong(&[&base[..], &["w9", "--raw", "--system", "w8"]].concat(), &["--raw"]);
}

#[test]
fn benchmarks_measure_the_caches_in_order() {
    let room = Room::new();
    let model = format!("{MODELS}/llama2");
    let caches = ["kivi-2", "{ method = \"full\" }", "minicache"];
    let mut options = Vec::new();
    caches.iter().for_each(|c| options.extend(["--cache", *c]));
    let check = |said: &Value, name: &str, context: u64, batch: u64| {
        let keys: Vec<&str> = said.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["model", "context", "batch", "bandwidth_gb_s", "runs"]);
        assert_eq!((said["model"].as_str(), said["context"].as_u64()), (Some(name), Some(context)));
        assert_eq!(said["batch"].as_u64(), Some(batch));
        assert!(said["bandwidth_gb_s"].as_f64().unwrap() > 0.1);
        let runs = said["runs"].as_array().unwrap();
        let order: Vec<&str> = runs.iter().map(|r| r["cache"].as_str().unwrap()).collect();
        assert_eq!(order, caches);
        for run in runs {
            for key in
                ["prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes", "ratio", "bandwidth_share"]
            {
                let n = run[key].as_f64().unwrap();
                assert!(n.is_finite() && n > 0.0, "{key} of {run}");
            }
        }
        runs.iter().map(|r| r["cache_bytes"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let args = ["bench", "--model", &model, "--context", "20", "--batch", "3", "--json"];
    check(&room.json(&[&args[..], &options].concat()), "llama2", 20, 3);

    let args = ["bench", "--model", "smollm2-135m", "--attention-only", "--context", "256", "--batch", "2"];
    let bytes = check(&room.json(&[&args[..], &["--json"], &options].concat()), "smollm2-135m", 256, 2);
    // What is allocated is what `footprint` says.
    for (cache, bytes) in caches.iter().zip(bytes) {
        let args =
            ["footprint", "--model", "smollm2-135m", "--context", "256", "--batch", "2", "--json", "--cache"];
        let said = room.json(&[&args[..], &[cache]].concat());
        let ratio = said["bytes"].as_f64().unwrap() / bytes;
        assert!((ratio - 1.0).abs() < 0.01, "{cache}: {ratio}");
    }
    let human = room.done(&[&args[..], &options].concat());
    assert!(human.contains("attention only") && human.contains("GB/s"), "{human}");
    room.wrong(&["bench", "--model", &model, "--context", "100000"], &["--context", "at most"]);
    room.wrong(&["bench", "--model", &model, "--context", "0"], &["--context"]);
}
