//! `minicache logits` and `dump-kv`: what a model computes, with every kind of cache.

use std::fs;
use std::path::Path;

use crate::golden::{difference, find, ids, read};
use crate::room::{MODELS, Room};

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
