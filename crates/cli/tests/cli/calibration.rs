//! Aligned models and calibrated latents, on the tiny golden models.

use std::fs;
use std::path::Path;

use crate::golden::{difference, find, ids, read};
use crate::room::{MODELS, Room};
use crate::text;

/// The model's folder, its golden tokens as `--tokens` takes them, and a file of token ids to calibrate on.
fn prepared(room: &Room, name: &str) -> (String, String) {
    let model = format!("{MODELS}/{name}");
    let tokens = ids(&read(&Path::new(&model).join("golden.safetensors")));
    fs::write(room.path("ids.txt"), tokens.replace(',', " ")).unwrap();
    (model, tokens)
}

fn logits(room: &Room, model: &str, tokens: &str, cache: &str) -> Vec<f32> {
    room.done(&["logits", "--model", model, "--tokens", tokens, "--cache", cache, "--out", "l.safetensors"]);
    find(&read(&room.path("l.safetensors")), "logits").2.clone()
}

#[test]
fn aligned_models_predict_the_same() {
    for name in ["llama3", "phi3", "qwen2"] {
        let room = Room::new();
        let (model, tokens) = prepared(&room, name);
        let args = [
            "align",
            "--model",
            &model,
            "--calibration-tokens",
            "ids.txt",
            "--chunk",
            "24",
            "--out",
            "aligned",
        ];
        let said = room.done(&args);
        assert!(said.contains(" aligned on 40 tokens of token ids of ids.txt"), "{said}");
        let full = "{ method = \"full\", dtype = \"f32\" }";
        let (before, after) = (logits(&room, &model, &tokens, full), logits(&room, "aligned", &tokens, full));
        let largest = before.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(difference(&after, &before) < 1e-4 * largest, "{name}");
        // A second time the folder is in use.
        room.wrong(&args, &["aligned", "is not empty"]);
    }
    let room = Room::new();
    let (model, _) = prepared(&room, "llama3");
    fs::write(room.path("bad.txt"), "1 2 99999").unwrap();
    let args = ["align", "--model", &model, "--out", "x", "--calibration-tokens"];
    room.wrong(&[&args[..], &["bad.txt"]].concat(), &["bad.txt", "99999", "vocabulary of 200"]);
    room.wrong(&[&args[..], &["none.txt"]].concat(), &["--calibration-tokens", "none.txt"]);
}

#[test]
fn a_basis_serves_its_model_and_no_other() {
    let room = Room::new();
    let (model, tokens) = prepared(&room, "llama3");
    let args =
        ["calibrate", "--model", &model, "--calibration-tokens", "ids.txt", "--out", "basis.safetensors"];
    let said = room.done(&[&args[..], &["--groups", "2,4"]].concat());
    assert!(said.contains("calibrated on 44 tokens of token ids of ids.txt"), "{said}");
    let side = "{ group = 2, bits = 16, rank = 1.0 }";
    let whole = format!("method = \"latent\", dtype = \"f32\", magnitudes = \"f32\", k = {side}, v = {side}");
    let with = |basis: &str| format!("{{ {whole}{basis} }}");
    let named = with(", basis = \"basis.safetensors\"");
    let exact = logits(&room, &model, &tokens, "{ method = \"full\", dtype = \"f32\" }");
    let largest = exact.iter().fold(0f32, |m, x| m.max(x.abs()));
    let args = [
        "logits",
        "--model",
        &model,
        "--tokens",
        &tokens,
        "--prefill",
        "20",
        "--out",
        "l.safetensors",
        "--cache",
    ];
    room.done(&[&args[..], &[&named]].concat());
    let latent = find(&read(&room.path("l.safetensors")), "logits").2.clone();
    let worst = difference(&latent, &exact);
    assert!(worst < 1e-4 * largest, "every component without quantisation: {worst} of {largest}");

    let other = format!("{MODELS}/mistral");
    let args = ["logits", "--model", &other, "--tokens", "1 2", "--out", "l.safetensors", "--cache"];
    room.wrong(&[&args[..], &[&named]].concat(), &["basis.safetensors", "calibrated on another model"]);
    let args = ["logits", "--model", &model, "--tokens", "1 2", "--out", "l.safetensors", "--cache"];
    let missing = with(", basis = \"none.safetensors\"");
    room.wrong(&[&args[..], &[&missing]].concat(), &["none.safetensors"]);
    let three = named.replacen("group = 2", "group = 3", 1);
    room.wrong(
        &[&args[..], &[&three]].concat(),
        &["a basis for keys of 3 layers and 1 KV head", "calibrate"],
    );
    // Without a basis there has to be text and a tokenizer to calibrate with, unless the model writes the text.
    let task = with(", calibration = { task = \"gsm8k\" }");
    room.wrong(&[&args[..], &[&task]].concat(), &["basis = \"FILE\"", "tokenizer"]);
    let both = with(", calibration = { task = \"gsm8k, self\" }");
    room.wrong(&[&args[..], &[&both]].concat(), &["calibration.task", "`self` alone", "gsm8k, self"]);
    let own = with(", calibration = { tokens = 60, chunk = 20 }");
    let out = room.run(&[&args[..], &[&own]].concat());
    let said = text(&out.stderr);
    assert!(
        out.status.success() && said.contains("calibrated on 60 tokens of the model's own text"),
        "{said}"
    );
    room.wrong(
        &["calibrate", "--model", &model, "--groups", "9", "--calibration-tokens", "ids.txt", "--out", "b"],
        &["--groups", "4 layers"],
    );
}

#[test]
fn without_data_a_model_calibrates_on_what_it_writes_the_same_every_time() {
    let room = Room::new();
    let (model, _) = prepared(&room, "llama3");
    let calibrate = |out: &str, tokens: &str, counted: usize| {
        let args = ["calibrate", "--model", &model, "--tokens", tokens, "--chunk", "30", "--out", out];
        let said = room.done(&[&args[..], &["--groups", "2"]].concat());
        // Without the first four of each sequence.
        assert!(said.contains(&format!("calibrated on {counted} tokens of the model's own text")), "{said}");
        fs::read(room.path(out)).unwrap()
    };
    let basis = calibrate("a.safetensors", "100", 84);
    assert!(calibrate("b.safetensors", "100", 84) == basis);
    assert!(calibrate("c.safetensors", "130", 110) != basis);
    let said = room.done(&["align", "--model", &model, "--tokens", "80", "--out", "aligned"]);
    assert!(said.contains("aligned on 76 tokens of the model's own text"), "{said}");
}
