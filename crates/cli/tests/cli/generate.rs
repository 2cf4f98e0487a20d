//! `minicache generate`: text, and chats.

use std::fs;

use crate::golden::read;
use crate::room::Room;
use crate::text;

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
