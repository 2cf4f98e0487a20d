//! Prompts: where they come from, and what a model makes of them.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use crate::room::Room;
use crate::text;

#[test]
fn a_prompt_is_shown_as_the_model_reads_it() {
    let room = Room::new();
    let model = room.model(true);
    let args = ["tokens", "--model", &model];
    let said = |more: &[&str]| room.done(&[&args[..], more].concat());
    assert_eq!(said(&["--prompt", "w5 w9"]), "w5 w9\n5 9\n");
    assert_eq!(said(&["--prompt", "w9", "--chat"]), "w1 w3 w9 w4\n1 3 9 4\n");
    assert_eq!(said(&["--prompt", "w9", "--chat", "--system", "w8"]).lines().last(), Some("1 2 8 1 3 9 4"));
    let json: serde_json::Value = serde_json::from_str(&said(&["--prompt", "w5 no", "--json"])).unwrap();
    assert_eq!(json, serde_json::json!({ "text": "w5 no", "ids": [5, 0], "tokens": ["w5", "?"] }));

    // The weights are not needed.
    fs::remove_file(room.path("model/model.safetensors")).unwrap();
    assert_eq!(said(&["--prompt", "w5 w9"]), "w5 w9\n5 9\n");
    fs::remove_file(room.path("model/tokenizer_config.json")).unwrap();
    room.wrong(&[&args[..], &["--prompt", "w9", "--chat"]].concat(), &["no chat template"]);
    room.wrong(&[&args[..], &["--prompt", ""]].concat(), &["empty"]);
    room.wrong(&args, &["--prompt"]);
}

#[test]
fn a_prompt_comes_from_a_file_or_from_stdin() {
    let room = Room::new();
    let model = room.model(false);
    fs::write(room.path("marked.txt"), "\u{feff}w5 w9").unwrap();
    fs::write(room.path("wide.txt"), b"\xff\xfew\x005\x00").unwrap();
    let args = ["tokens", "--model", &model, "--prompt-file"];
    assert_eq!(room.done(&[&args[..], &["marked.txt"]].concat()), "w5 w9\n5 9\n");
    room.wrong(&[&args[..], &["wide.txt"]].concat(), &["wide.txt", "UTF-16"]);
    room.wrong(&[&args[..], &["none.txt"]].concat(), &["none.txt"]);
    for command in [&["tokens"][..], &["logits", "--out", "x.safetensors"]] {
        let mut child = room
            .command(&[command, &["--model", &model, "--prompt-file", "-"]].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all("\u{feff}w5 w9".as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let said = text(&out.stdout);
        assert!(out.status.success() && (said.ends_with("5 9\n") || said.contains("2 tokens")), "{said}");
    }
}

#[test]
fn a_full_context_is_said() {
    let room = Room::new();
    let model = room.model(false);
    let config = room.path("model/config.json");
    let mut settings: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    settings["max_position_embeddings"] = 7.into();
    fs::write(&config, settings.to_string()).unwrap();
    let call = |tokens: &str| {
        let out = room
            .command(&["generate", "--model", &model, "--prompt", "w5 w6 w7", "--max-new-tokens", tokens])
            .output()
            .unwrap();
        assert!(out.status.success());
        (text(&out.stdout).split_whitespace().count(), text(&out.stderr))
    };
    let (words, said) = call("9");
    assert_eq!(words, 4);
    assert!(said.contains("stopped after 4 tokens: the model's context of 7 tokens is full"), "{said}");
    let (words, said) = call("4");
    assert!(words == 4 && !said.contains("context"), "{said}");
}
