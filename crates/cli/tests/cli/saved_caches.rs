//! Prompts' caches in files, across runs.

use std::fs;

use super::room::Room;

#[test]
fn a_saved_prompt_is_gone_on_from() {
    let room = Room::new();
    let model = room.model(false);
    let generate = |prompt: &str, cache: &str, more: &[&str]| {
        let args =
            ["generate", "--model", &model, "--max-new-tokens", "6", "--prompt", prompt, "--cache", cache];
        room.run(&[&args[..], more].concat())
    };
    let text = |out: std::process::Output| {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (first, whole) = ("w5 w6 w7 w8 w9 w10 w11 w12", "w5 w6 w7 w8 w9 w10 w11 w12 w3 w4");
    let xkv = "{ method = \"xkv\", rank_k = 1, rank_v = 2 }";
    for cache in ["full", "{ method = \"minicache\", quant = { bits = 4 } }", "kivi-2", xkv, "h2o"] {
        let (plain, _) = text(generate(first, cache, &[]));
        let (saving, _) = text(generate(first, cache, &["--save-cache", "a.kv"]));
        assert_eq!(plain, saving);
        let (gone_on, said) = text(generate(whole, cache, &["--load-cache", "a.kv"]));
        assert!(said.contains("prefill: 2 tokens"), "{said}");
        // An exact cache says the same in one piece.
        if cache == "full" {
            assert_eq!(gone_on, text(generate(whole, cache, &[])).0);
        }
        // What was loaded can be saved, and is gone on from in turn.
        text(generate(whole, cache, &["--load-cache", "a.kv", "--save-cache", "b.kv"]));
        text(generate(&format!("{whole} w1"), cache, &["--load-cache", "b.kv"]));
    }
    let wrong = |prompt: &str, cache: &str, words: &[&str]| {
        let out = generate(prompt, cache, &["--load-cache", "a.kv"]);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|w| said.contains(w)) && said.trim_end().lines().count() == 1, "{said}");
    };
    wrong("w5 w6 w7 w1 w9 w10 w11 w12 w13", "h2o", &["a.kv", "3 of its 8 tokens"]);
    wrong(first, "h2o", &["a.kv", "nothing to go on with"]);
    wrong(whole, "kivi-2", &["a.kv", "h2o", "kivi"]);
    let mut bytes = fs::read(room.path("a.kv")).unwrap();
    let last = bytes.len() - 40;
    bytes[last] ^= 4;
    fs::write(room.path("a.kv"), &bytes).unwrap();
    wrong(whole, "h2o", &["a.kv", "damaged"]);
    fs::write(room.path("a.kv"), &bytes[..100]).unwrap();
    wrong(whole, "h2o", &["a.kv", "ends too early"]);
    fs::remove_file(room.path("a.kv")).unwrap();
    wrong(whole, "h2o", &["a.kv", "No such file"]);
}
