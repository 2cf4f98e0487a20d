//! Servers that lie: about names, about contents, about where to go.

use std::path::Path;

use super::id;
use super::server::{COMMIT, FakeHub, OLD, Reply, hash, sharded, weights};

/// Everything below a folder that is no folder itself, sorted.
fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found.sort();
    found
}

fn set(reply: &mut Reply, name: &'static str, value: &str) {
    reply.1.retain(|(n, _)| *n != name);
    reply.1.push((name, value.to_string()));
}

const BAD_NAMES: [&str; 9] =
    ["..", ".", "../../../../escaped", "/tmp/escaped", "a/b", "..%2Fescaped/..", "a b", "a\\b", ".hidden"];

#[test]
fn names_from_the_network_are_plain_or_refused() {
    for name in BAD_NAMES {
        for header in ["ETag", "X-Linked-Etag", "X-Repo-Commit"] {
            for quoted in [name.to_string(), format!("\"{name}\""), format!("W/\"{name}\"")] {
                let files =
                    [(COMMIT, "config.json", b"{}".to_vec()), (COMMIT, "model.safetensors", weights(1))];
                let server = FakeHub::twisted(&files, move |asked, _, mut reply| {
                    if asked.path.contains("/resolve/") {
                        set(&mut reply, header, &quoted);
                    }
                    reply
                });
                let dir = tempfile::tempdir().unwrap();
                let hub = server.hub(&dir.path().join("deep/in/cache"));
                let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
                assert!(message.contains("is no plain name, and was refused"), "{header}: {name}: {message}");
                let data = hub.fetch_data("org/data", "main", "config.json").unwrap_err();
                assert!(
                    data.message.contains("is no plain name, and was refused"),
                    "{header}: {name}: {data}"
                );
                assert_eq!(files_below(dir.path()), [""; 0], "{header}: {name}");
            }
        }
    }
}

#[test]
fn a_commit_that_is_no_name_is_refused() {
    for name in BAD_NAMES.into_iter().chain(["\u{1b}[2J", ""]) {
        let server = FakeHub::twisted(&sharded(), move |asked, _, mut reply| {
            if asked.path.contains("/api/") {
                let body = serde_json::json!({"sha": name, "siblings": [{"rfilename": "config.json"}]});
                reply.2 = body.to_string().into_bytes();
            }
            reply
        });
        let dir = tempfile::tempdir().unwrap();
        let message = server.hub(dir.path()).fetch(&id("org/model")).unwrap_err().to_string();
        assert!(message.contains("was refused") || message.contains("names no commit"), "{name}: {message}");
        assert!(!message.contains('\u{1b}'), "{message:?}");
        assert_eq!(files_below(dir.path()), [""; 0], "{name}");
    }
}

#[test]
fn a_cache_with_a_bad_ref_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    std::fs::create_dir_all(cache.join("models--org--model/refs")).unwrap();
    std::fs::create_dir_all(cache.join("models--org--model/snapshots")).unwrap();
    std::fs::write(cache.join("models--org--model/refs/main"), "../../..").unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "x").unwrap();
    assert!(FakeHub::start(&[]).hub(&cache).cached(&id("org/model")).is_none());
}

#[test]
fn an_index_that_leads_out_of_the_repository() {
    for shard in ["../../../escaped.safetensors", "/escaped", "..", "a/b.safetensors"] {
        let index = serde_json::json!({"weight_map": {"a": shard}}).to_string().into_bytes();
        let files =
            [(COMMIT, "config.json", b"{}".to_vec()), (COMMIT, "model.safetensors.index.json", index)];
        let (server, dir) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
        let message = server.hub(dir.path()).fetch(&id("org/model")).unwrap_err().to_string();
        assert!(message.contains("no weight_map of files beside it"), "{message}");
    }
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let storage = FakeHub::start(&sharded());
    for way in ["file", "everything"] {
        let elsewhere = storage.address.clone();
        let server = FakeHub::twisted(&sharded(), move |asked, _, mut reply| match way {
            // The hub sends to another port for the contents of large files ...
            "file" => {
                for (_, place) in reply.1.iter_mut().filter(|(n, _)| *n == "Location") {
                    *place = format!("{elsewhere}{place}");
                }
                reply
            }
            // ... or for everything, with every kind of redirection, and no word of its own.
            _ => {
                let status = [301, 302, 303, 307, 308][asked.path.len() % 5];
                Reply(status, vec![("Location", format!("{elsewhere}{}", asked.path))], Vec::new())
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let mut hub = server.hub(dir.path());
        hub.token = Some("hf_secret".to_string());
        let folder = hub.fetch(&id("org/model@old")).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
        hub.fetch_data("org/data", OLD, "model.safetensors").unwrap();
        assert!(server.asked().iter().all(|a| a.token.as_deref() == Some("Bearer hf_secret")));
    }
    assert!(storage.asked().len() > 4);
    assert!(storage.asked().iter().all(|a| a.token.is_none()), "{:?}", storage.asked());
}

#[test]
fn relative_redirections_are_followed_with_the_token() {
    // As the hub does it for small files: on to an address of its own, which has the file's facts.
    let server = FakeHub::twisted(&sharded(), |asked, _, reply| {
        match asked.path.strip_prefix("/org/model/resolve/") {
            Some(rest) => {
                Reply(307, vec![("Location", format!("/prefix/org/model/resolve/{rest}"))], Vec::new())
            }
            None => reply,
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let mut hub = server.hub(dir.path());
    hub.token = Some("hf_secret\n".to_string());
    let folder = hub.fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
    let asked = server.asked();
    assert!(asked.iter().any(|a| a.path.starts_with("/prefix/")), "{asked:?}");
    assert!(asked.iter().all(|a| a.token.as_deref() == Some("Bearer hf_secret")), "{asked:?}");
}

#[test]
fn a_token_that_is_none_is_not_sent() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    for token in ["hf_a\nX-Injected: 1", "hx y", "hf_\u{1b}", "hf_ä"] {
        let mut hub = server.hub(dir.path());
        hub.token = Some(token.to_string());
        let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
        assert!(message.contains("HF_TOKEN") && !message.contains(token), "{message}");
    }
    assert!(server.asked().is_empty());
    for endpoint in ["mirror.example", "ftp://mirror.example", "http://", "https://m.example/?a=b"] {
        let mut hub = server.hub(dir.path());
        hub.endpoint = endpoint.to_string();
        let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
        assert!(message.contains(&format!("HF_ENDPOINT {endpoint} is no address of a hub")), "{message}");
    }
}

#[test]
fn contents_are_what_was_announced() {
    // One byte of a large file is another, or of a small one.
    for name in ["model.safetensors", "config.json"] {
        let server = FakeHub::twisted(&sharded(), move |asked, _, mut reply| {
            if asked.path.ends_with(name) && !reply.2.is_empty() {
                reply.2[3] ^= 1;
            }
            reply
        });
        let dir = tempfile::tempdir().unwrap();
        let message = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap_err().to_string();
        let kind = if name == "config.json" { "git blob hash" } else { "SHA-256" };
        for wanted in ["damaged or changed", kind, name] {
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
        let kept = files_below(&dir.path().join("models--org--model"));
        assert!(kept.iter().all(|f| !f.contains("incomplete") && !f.ends_with(name)), "{kept:?}");
        let data = server.hub(dir.path()).fetch_data("org/data", OLD, name).unwrap_err();
        assert!(data.message.contains(kind) && !data.is_unreachable, "{data}");
    }
}

#[test]
fn more_or_less_than_was_announced() {
    for grown in [true, false] {
        let server = FakeHub::twisted(&sharded(), move |asked, _, mut reply| {
            match &asked.range {
                _ if !asked.path.contains("/storage/") => {}
                _ if grown => reply.2.extend([0; 100_000]),
                None => reply.2.truncate(60_000),
                Some(_) => return Reply(416, Vec::new(), Vec::new()),
            }
            reply
        });
        let dir = tempfile::tempdir().unwrap();
        let message = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap_err().to_string();
        let wanted = if grown { "more came than the 70000 bytes" } else { "came where 70000 were announced" };
        assert!(message.contains(wanted), "{message}");
        assert!(
            !dir.path().join("models--org--model/snapshots").join(OLD).join("model.safetensors").exists()
        );
    }
}

#[test]
fn a_tag_that_is_no_hash_is_checked_by_size_alone() {
    let server = FakeHub::twisted(&sharded(), |asked, _, mut reply| {
        if asked.path.contains("/resolve/") {
            set(&mut reply, "X-Linked-Etag", "\"5e2f-1a\"");
        }
        reply
    });
    let dir = tempfile::tempdir().unwrap();
    server.hub(dir.path()).fetch_data("org/data", OLD, "model.safetensors").unwrap();
    assert!(dir.path().join("datasets--org--data/blobs/5e2f-1a").is_file());
}

#[test]
fn redirections_end_somewhere() {
    for (place, wanted) in [
        ("/org/model/resolve/x/config.json", "it sent on more than 10 times"),
        ("file:///etc/passwd", "which is no address of the web"),
        ("http://[", "which is no address"),
        ("", "which is no address of the web"),
    ] {
        let server = FakeHub::twisted(&sharded(), move |asked, _, reply| {
            let to = vec![("Location", place.to_string())];
            if asked.path.contains("/resolve/") { Reply(302, to, Vec::new()) } else { reply }
        });
        let dir = tempfile::tempdir().unwrap();
        let message = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap_err().to_string();
        assert!(message.contains(wanted), "{place}: {message}");
    }
}

#[test]
fn an_answer_for_another_commit_is_refused() {
    let server = FakeHub::twisted(&sharded(), |asked, _, mut reply| {
        if asked.path.contains("/resolve/") {
            set(&mut reply, "X-Repo-Commit", COMMIT);
        }
        reply
    });
    let dir = tempfile::tempdir().unwrap();
    let message = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap_err().to_string();
    assert!(message.contains(&format!("asked for commit {OLD}, it answers for {COMMIT}")), "{message}");
}

#[test]
fn what_the_hub_announced_stays_whatever_the_storage_says() {
    let storage = FakeHub::twisted(&sharded(), |_, _, mut reply| {
        reply.2 = weights(4);
        set(&mut reply, "X-Linked-Etag", &hash("model.safetensors", &weights(4)));
        set(&mut reply, "X-Repo-Commit", OLD);
        reply
    });
    let elsewhere = storage.address.clone();
    let server = FakeHub::twisted(&sharded(), move |_, _, mut reply| {
        for (_, place) in reply.1.iter_mut().filter(|(n, _)| *n == "Location") {
            *place = format!("{elsewhere}{place}");
        }
        reply
    });
    let dir = tempfile::tempdir().unwrap();
    let message = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap_err().to_string();
    assert!(
        message.contains("SHA-256") && message.contains(&hash("model.safetensors", &weights(3))),
        "{message}"
    );
}

#[test]
fn long_lists_of_files_are_cut_and_bad_names_left_out() {
    let names: Vec<_> = (0..500).map(|i| serde_json::json!({"rfilename": format!("q{i}.gguf")})).collect();
    let server = FakeHub::twisted(&sharded(), move |asked, _, mut reply| {
        if asked.path.contains("/api/") {
            let mut names = names.clone();
            names.insert(0, serde_json::json!({"rfilename": "\u{1b}]0;x/../bad.gguf"}));
            reply.2 = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string().into_bytes();
        }
        reply
    });
    let dir = tempfile::tempdir().unwrap();
    let message = server.hub(dir.path()).fetch(&id("org/model/other.gguf")).unwrap_err().to_string();
    assert!(message.contains("it has q0.gguf, q1.gguf") && message.ends_with("and 488 more"), "{message}");
    assert!(!message.contains('\u{1b}') && message.len() < 500, "{message}");
}
