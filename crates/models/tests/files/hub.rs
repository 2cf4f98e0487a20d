//! The hub path against a loopback server that speaks the hub's URLs.

mod hostile;
mod server;

use minicache_models::hub::HubId;
use minicache_models::{LoadOptions, Model};

use server::{COMMIT, FakeHub, OLD, Reply, breaking_storage, hash, sharded, weights};

fn id(text: &str) -> HubId {
    HubId::parse(text).unwrap()
}

#[test]
fn downloads_all_of_a_sharded_model_once() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    let hub = server.hub(dir.path());
    let folder = hub.fetch(&id("org/model")).unwrap();
    assert_eq!(folder, dir.path().join("models--org--model/snapshots").join(COMMIT));
    assert_eq!(std::fs::read(folder.join("model-00001-of-00002.safetensors")).unwrap(), weights(1));
    assert_eq!(std::fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), weights(2));
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{\"new\": true}");
    assert!(folder.join("tokenizer.json").is_file() && !folder.join("pytorch_model.bin").exists());
    assert!(server.asked().iter().all(|a| a.token.is_none() && !a.path.contains("/resolve/main/")));

    let before = server.asked().len();
    assert_eq!(hub.fetch(&id("org/model")).unwrap(), folder);
    assert_eq!(server.asked().len(), before, "what is cached needs no request");
}

#[test]
fn a_downloaded_model_runs() {
    let read = |name: &str| std::fs::read(super::gguf::fixture("llama2").join(name)).unwrap();
    let files = ["config.json", "model.safetensors"].map(|name| (COMMIT, name, read(name)));
    let (server, dir) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
    let folder = server.hub(dir.path()).fetch(&id("org/model")).unwrap();
    let model = Model::from_path(&folder, "model", &LoadOptions::default()).unwrap();
    assert_eq!(model.config.layers, 4);
    // The hub's links and the files themselves are one model.
    let local = Model::from_path(&super::gguf::fixture("llama2"), "local", &LoadOptions::default()).unwrap();
    assert_eq!(model.fingerprint, local.fingerprint);
}

#[test]
fn revisions_are_kept_apart() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    let hub = server.hub(dir.path());
    let old = hub.fetch(&id("org/model@old")).unwrap();
    let new = hub.fetch(&id("org/model")).unwrap();
    assert_eq!(std::fs::read(old.join("config.json")).unwrap(), b"{\"new\": false}");
    assert_eq!(std::fs::read(new.join("config.json")).unwrap(), b"{\"new\": true}");
    assert_eq!(hub.fetch(&id(&format!("org/model@{OLD}"))).unwrap(), old);
    let message = hub.fetch(&id("org/model@nowhere")).unwrap_err().to_string();
    assert!(message.contains("org/model@nowhere was not found (status 404)"), "{message}");
}

#[test]
fn the_cache_is_laid_out_as_huggingface_hub_does_it() {
    let files = [(COMMIT, "config.json", b"{}".to_vec()), (COMMIT, "model.safetensors", weights(1))];
    let (server, dir) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
    server.hub(dir.path()).fetch(&id("org/model")).unwrap();
    let folder = dir.path().join("models--org--model");
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    for (_, name, data) in &files {
        let blob = folder.join("blobs").join(hash(name, data));
        assert!(blob.symlink_metadata().unwrap().is_file() && std::fs::read(&blob).unwrap() == *data);
        let link = std::fs::read_link(folder.join("snapshots").join(COMMIT).join(name)).unwrap();
        assert_eq!(link, std::path::Path::new("../../blobs").join(hash(name, data)));
    }
    let names = |folder: &str| {
        let entries = std::fs::read_dir(dir.path().join(folder)).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|n| n.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let mut blobs: Vec<_> = files.iter().map(|(_, name, data)| hash(name, data)).collect();
    blobs.sort();
    assert_eq!(names("models--org--model/blobs"), blobs, "nothing is left behind");
    assert_eq!(names("models--org--model/refs"), ["main"]);
    assert_eq!(names(""), [".locks", "models--org--model"]);
}

#[test]
fn what_another_tool_downloaded_is_used() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    let folder = dir.path().join("models--org--model");
    let name = "model-00001-of-00002.safetensors";
    let blob = folder.join("blobs").join(hash(name, &weights(1)));
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::write(&blob, weights(1)).unwrap();
    let hub = server.hub(dir.path());
    let snapshot = hub.fetch(&id("org/model")).unwrap();
    assert_eq!(snapshot.join(name).canonicalize().unwrap(), blob.canonicalize().unwrap());
    assert!(server.downloads(name).is_empty(), "a blob that is there is not fetched");
    // A link whose blob was removed.
    std::fs::remove_file(&blob).unwrap();
    hub.fetch(&id("org/model")).unwrap();
    assert_eq!(std::fs::read(snapshot.join(name)).unwrap(), weights(1));
}

#[test]
fn resumes_what_was_begun() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    let blobs = dir.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = |name: &str, whole: &[u8], bytes: &[u8]| {
        std::fs::write(blobs.join(format!("{}.incomplete", hash(name, whole))), bytes).unwrap();
    };
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    part(first, &weights(1), &weights(1)[..30_000]);
    // Stopped between the last byte and the renaming.
    part(second, &weights(2), &weights(2));
    let folder = server.hub(dir.path()).fetch(&id("org/model")).unwrap();
    assert_eq!(std::fs::read(folder.join(first)).unwrap(), weights(1));
    assert_eq!(std::fs::read(folder.join(second)).unwrap(), weights(2));
    assert!(server.downloads(first).iter().all(|a| a.range.as_deref() == Some("bytes=30000-")));
    assert!(server.downloads(second).is_empty());
}

#[test]
fn a_part_of_something_else_is_fetched_anew() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!("{}.incomplete", hash("model.safetensors", &weights(3))));
    let server = FakeHub::start(&sharded());
    for bytes in [&weights(4)[..30_000], &weights(4)[..], &[weights(3), weights(3)].concat()[..]] {
        std::fs::write(&part, bytes).unwrap();
        let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
        assert!(!part.exists());
        std::fs::remove_file(folder.join("model.safetensors").canonicalize().unwrap()).unwrap();
    }
}

#[test]
fn a_server_without_ranges_cannot_spoil_a_file() {
    let server = FakeHub::twisted(&sharded(), |asked, _, reply| match reply {
        Reply(206, _, _) if asked.path.contains("/storage/") => Reply(200, Vec::new(), weights(3)),
        other => other,
    });
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = format!("{}.incomplete", hash("model.safetensors", &weights(3)));
    std::fs::write(blobs.join(part), &weights(3)[..30_000]).unwrap();
    let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
}

#[test]
fn goes_on_after_a_broken_connection() {
    let (storage, starts) = breaking_storage(weights(3), 2);
    let server = FakeHub::twisted(&sharded(), move |_, _, mut reply| {
        reply.1.iter_mut().filter(|(n, _)| *n == "Location").for_each(|(_, v)| v.clone_from(&storage));
        reply
    });
    let dir = tempfile::tempdir().unwrap();
    let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
    let starts = starts.lock().unwrap().clone();
    assert_eq!(starts.len(), 3, "{starts:?}");
    assert!(starts[0] == 0 && 0 < starts[1] && starts[1] < starts[2], "{starts:?}");
}

#[test]
fn a_server_in_trouble_is_asked_again() {
    // One request of three fails.
    let server = FakeHub::twisted(&sharded(), |_, n, reply| {
        if n % 3 == 0 { Reply([500, 503, 429][n / 3 % 3], Vec::new(), Vec::new()) } else { reply }
    });
    let dir = tempfile::tempdir().unwrap();
    let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));

    let server = FakeHub::twisted(&sharded(), |_, _, _| Reply(502, Vec::new(), Vec::new()));
    let message = server.hub(dir.path()).fetch(&id("org/model")).unwrap_err().to_string();
    assert!(message.contains("answered status 502") && message.contains("try again later"), "{message}");
    assert_eq!(server.asked().len(), 5, "not for ever");
}

#[test]
fn mirrors_with_a_path_and_without_questions_about_files() {
    let server = FakeHub::twisted(&sharded(), |asked, _, reply| {
        assert!(asked.path.starts_with("/prefix/") || asked.path.starts_with("/storage/"), "{}", asked.path);
        if asked.head { Reply(405, Vec::new(), Vec::new()) } else { reply }
    });
    for slash in ["", "/"] {
        let dir = tempfile::tempdir().unwrap();
        let mut hub = server.hub(dir.path());
        hub.endpoint = format!("{}/prefix{slash}", server.address);
        let folder = hub.fetch(&id("org/model@old")).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
    }
}

#[test]
fn files_of_data_sets() {
    let files = [(COMMIT, "main/test.parquet", weights(5)), (COMMIT, "a.jsonl", b"{}\n".to_vec())];
    let (server, dir) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
    let mut hub = server.hub(dir.path());
    for revision in ["main", "refs/convert/parquet"] {
        let file = hub.fetch_data("org/data", revision, "main/test.parquet").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), weights(5));
        let folder = dir.path().join("datasets--org--data");
        assert_eq!(file, folder.join("snapshots").join(COMMIT).join("main/test.parquet"));
        assert_eq!(std::fs::read_to_string(folder.join("refs").join(revision)).unwrap(), COMMIT);
        let blob = std::path::Path::new("../../../blobs").join(hash("test.parquet", &weights(5)));
        assert_eq!(std::fs::read_link(&file).unwrap(), blob);
    }
    assert_eq!(
        server.downloads("storage/0123456789abcdef0123456789abcdef01234567/main/test.parquet").len(),
        1
    );
    let absent = hub.fetch_data("org/data", "main", "b.jsonl").unwrap_err();
    assert!(!absent.is_unreachable && absent.message.contains("not found (status 404)"), "{absent}");
    for (repo, revision, path) in [
        ("org/data", "main", "../a.jsonl"),
        ("org/data", "../x", "a.jsonl"),
        ("org/..", "main", "a"),
        ("org", "main", "/a"),
    ] {
        let error = hub.fetch_data(repo, revision, path).unwrap_err();
        assert!(error.message.contains("is no file of a data set"), "{error}");
    }
    hub.offline = true;
    assert!(hub.fetch_data("org/data", "main", "main/test.parquet").is_ok());
    let absent = hub.fetch_data("org/data", "main", "a.jsonl").unwrap_err();
    assert!(absent.message.contains("OFFLINE is set, and a.jsonl is not in"), "{absent}");
    hub.offline = false;
    drop(server);
    let begun = std::time::Instant::now();
    let error = hub.fetch_data("org/data", "main", "a.jsonl").unwrap_err();
    assert!(error.is_unreachable && error.message.contains("no connection to http://127.0.0.1"), "{error}");
    assert!(begun.elapsed().as_secs() < 5, "a hub that is not there is given up at once");
}

#[test]
fn two_at_once_download_once() {
    let (server, dir) = (FakeHub::start(&sharded()), tempfile::tempdir().unwrap());
    let runs = [0; 4].map(|_| {
        let hub = server.hub(dir.path());
        std::thread::spawn(move || hub.fetch(&id("org/model@old")).unwrap())
    });
    for run in runs {
        assert_eq!(std::fs::read(run.join().unwrap().join("model.safetensors")).unwrap(), weights(3));
    }
    assert_eq!(server.downloads(&format!("storage/{OLD}/model.safetensors")).len(), 1);
    // The locks' files stay, as those of a killed process do, and block nobody; one that is held is waited for.
    let locks = dir.path().join(".locks/models--org--model");
    let name = hash("model.safetensors", &weights(3));
    let lock = std::fs::File::open(locks.join(format!("{name}.lock"))).unwrap();
    std::fs::remove_file(dir.path().join("models--org--model/blobs").join(name)).unwrap();
    lock.lock().unwrap();
    let hub = server.hub(dir.path());
    let waiting = std::thread::spawn(move || hub.fetch(&id("org/model@old")).unwrap());
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!waiting.is_finished());
    drop(lock);
    assert!(waiting.join().unwrap().join("model.safetensors").is_file());
}

/// Wants a token and an agreement.
fn gate(asked: &server::Asked, _: usize, reply: Reply) -> Reply {
    match asked.token.as_deref() {
        Some("Bearer hf_good") => reply,
        Some(_) => Reply(403, Vec::new(), Vec::new()),
        None => Reply(401, Vec::new(), Vec::new()),
    }
}

#[test]
fn gated_models_say_where_to_ask() {
    let (server, dir) = (FakeHub::twisted(&sharded(), gate), tempfile::tempdir().unwrap());
    let mut hub = server.hub(dir.path());
    let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
    for wanted in
        ["status 401", "gated", &format!("{}/org/model", server.address), "HF_TOKEN", "/settings/tokens"]
    {
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    assert!(!message.contains('\n'));
    hub.token = Some("hf_other".to_string());
    let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
    assert!(message.contains("status 403") && message.contains("no access yet"), "{message}");
    hub.token = Some("hf_good".to_string());
    hub.fetch(&id("org/model")).unwrap();
    let api = server.asked().into_iter().rev().find(|a| a.path.contains("/api/")).unwrap();
    assert_eq!(api.token.as_deref(), Some("Bearer hf_good"));
}

#[test]
fn offline_uses_the_cache_or_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut hub = {
        let server = FakeHub::start(&sharded());
        let mut hub = server.hub(dir.path());
        hub.offline = true;
        let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
        assert!(message.contains("not in the cache") && message.contains("HF_HUB_OFFLINE"), "{message}");
        assert!(server.asked().is_empty());
        hub.offline = false;
        hub.fetch(&id("org/model")).unwrap();
        hub
    };
    // The server is gone: the cache serves what it has, online or not.
    for offline in [true, false] {
        hub.offline = offline;
        assert!(hub.fetch(&id("org/model")).unwrap().join("config.json").is_file());
    }
    let message = hub.fetch(&id("org/model@old")).unwrap_err().to_string();
    assert!(message.contains("no connection to http://127.0.0.1"), "{message}");
    // A shard that is missing makes the snapshot incomplete.
    let shard = hub.cached(&id("org/model")).unwrap().join("model-00002-of-00002.safetensors");
    std::fs::remove_file(shard).unwrap();
    hub.offline = true;
    assert!(hub.fetch(&id("org/model")).unwrap_err().to_string().contains("not whole"));
}

#[test]
fn single_files_and_repositories_without_weights() {
    let files = [
        (COMMIT, "config.json", b"{}".to_vec()),
        (COMMIT, "model-q4.gguf", b"GGUF...".to_vec()),
        (OLD, "pytorch_model.bin", weights(1)),
    ];
    let (server, dir) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
    let hub = server.hub(dir.path());
    let message = hub.fetch(&id("org/model")).unwrap_err().to_string();
    assert!(message.contains("no safetensors") && message.contains("org/model/model-q4.gguf"), "{message}");
    let message = hub.fetch(&id("org/model@old")).unwrap_err().to_string();
    assert!(message.contains("only safetensors and GGUF"), "{message}");
    let message = hub.fetch(&id("org/model/other.gguf")).unwrap_err().to_string();
    assert!(message.contains("it has model-q4.gguf"), "{message}");
    let file = hub.fetch(&id("org/model/model-q4.gguf")).unwrap();
    assert_eq!(std::fs::read(file).unwrap(), b"GGUF...");
}
