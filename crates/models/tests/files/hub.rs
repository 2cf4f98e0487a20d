//! The hub path against a loopback server that speaks the hub's URLs.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use minicache_models::hub::{Hub, HubId};
use minicache_models::{LoadOptions, Model};
use tiny_http::{Header, Request, Response, Server, StatusCode};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OLD: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// What a request asked for: the path, and its `Range` and `Authorization` headers.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    path: String,
    range: Option<String>,
    token: Option<String>,
}

/// A hub with a few files, that notes what it is asked.
struct FakeHub {
    address: String,
    log: Arc<Mutex<Vec<Asked>>>,
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Good,
    /// Wants a token and an agreement.
    Gated,
    /// Sends whole files whatever range is asked for.
    IgnoresRanges,
}

impl FakeHub {
    fn start(mood: Mood, files: &[(&str, &str, Vec<u8>)]) -> Self {
        Self::with_storage(mood, files, None)
    }

    /// A hub whose large files are at another address.
    fn with_storage(mood: Mood, files: &[(&str, &str, Vec<u8>)], storage: Option<String>) -> Self {
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let address = format!("http://{}", server.server_addr());
        let log = Arc::new(Mutex::new(Vec::new()));
        let files: HashMap<(String, String), Vec<u8>> = files
            .iter()
            .map(|(commit, name, data)| ((commit.to_string(), name.to_string()), data.clone()))
            .collect();
        let (notes, listening) = (Arc::clone(&log), Arc::clone(&server));
        let thread = std::thread::spawn(move || {
            for request in listening.incoming_requests() {
                answer(request, mood, &files, &notes, storage.as_deref());
            }
        });
        Self { address, log, server, thread: Some(thread) }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub {
            endpoint: self.address.clone(),
            cache: cache.to_path_buf(),
            token: None,
            offline: false,
            progress: false,
        }
    }

    fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// Ranges of the requests for a file that asked for its contents (not for its size).
    fn ranges(&self, file: &str) -> Vec<String> {
        let all = self.asked().into_iter().filter(|a| a.path.ends_with(file)).filter_map(|a| a.range);
        all.filter(|r| r != "bytes=0-0").collect()
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.server.unblock();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).unwrap()
}

fn answer(
    request: Request,
    mood: Mood,
    files: &HashMap<(String, String), Vec<u8>>,
    log: &Mutex<Vec<Asked>>,
    elsewhere: Option<&str>,
) {
    let field = |name: &str| {
        let found = request.headers().iter().find(|h| h.field.as_str().as_str().eq_ignore_ascii_case(name));
        found.map(|h| h.value.as_str().to_string())
    };
    let (path, range, token) = (request.url().to_string(), field("range"), field("authorization"));
    log.lock().unwrap().push(Asked { path: path.clone(), range: range.clone(), token: token.clone() });
    let status = |request: Request, code: u16| request.respond(Response::empty(StatusCode(code))).unwrap();
    if mood == Mood::Gated && token.as_deref() != Some("Bearer hf_good") {
        return status(request, if token.is_some() { 403 } else { 401 });
    }
    let commit = |revision: &str| match revision {
        "main" | COMMIT => Some(COMMIT),
        "old" | OLD => Some(OLD),
        _ => None,
    };
    if let Some(revision) = path.strip_prefix("/api/models/org/model/revision/") {
        let Some(sha) = commit(revision) else { return status(request, 404) };
        let siblings: Vec<_> = files
            .keys()
            .filter(|(c, _)| c == sha)
            .map(|(_, name)| serde_json::json!({"rfilename": name}))
            .collect();
        let body = serde_json::json!({"sha": sha, "siblings": siblings}).to_string();
        return request.respond(Response::from_string(body)).unwrap();
    }
    // Large files live elsewhere: the hub answers with a redirection that carries their hash.
    let (storage, rest) = match path.strip_prefix("/storage/") {
        Some(rest) => (true, Some(rest)),
        None => (false, path.strip_prefix("/org/model/resolve/")),
    };
    let found = rest.and_then(|r| r.split_once('/')).and_then(|(revision, name)| {
        let sha = commit(revision)?;
        Some((sha, name, files.get(&(sha.to_string(), name.to_string()))?))
    });
    let Some((sha, name, data)) = found else { return status(request, 404) };
    let host = field("host").unwrap();
    let large = name.ends_with(".safetensors");
    let etag = format!("\"{sha}-{}\"", name.replace('.', "-"));
    if large && !storage {
        let response = Response::empty(StatusCode(302))
            .with_header(header(
                "Location",
                &format!("http://{}/storage/{sha}/{name}", elsewhere.unwrap_or(&host)),
            ))
            .with_header(header("X-Repo-Commit", sha))
            .with_header(header("X-Linked-Etag", &etag));
        return request.respond(response).unwrap();
    }
    let asked = range.as_deref().and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.split_once('-'));
    let (start, end) = asked.map_or((0, data.len()), |(a, b)| {
        (a.parse::<usize>().unwrap(), b.parse::<usize>().map_or(data.len(), |b| (b + 1).min(data.len())))
    });
    if start >= data.len() {
        return status(request, 416);
    }
    let sizing = range.as_deref() == Some("bytes=0-0");
    let (start, end, code) =
        if mood == Mood::IgnoresRanges && !sizing { (0, data.len(), 200) } else { (start, end, 206) };
    let part = data[start..end].to_vec();
    let response = Response::new(StatusCode(code), Vec::new(), Cursor::new(part), Some(end - start), None)
        .with_header(header("Content-Range", &format!("bytes {start}-{}/{}", end - 1, data.len())))
        .with_header(header("X-Repo-Commit", sha))
        .with_header(header("ETag", &etag));
    request.respond(response).unwrap();
}

fn weights(seed: u8) -> Vec<u8> {
    (0..70_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect()
}

fn sharded() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    vec![
        (COMMIT, "config.json", b"{\"new\": true}".to_vec()),
        (COMMIT, "tokenizer.json", b"{}".to_vec()),
        (COMMIT, "pytorch_model.bin", weights(9)),
        (COMMIT, "model.safetensors.index.json", index.into()),
        (COMMIT, "model-00001-of-00002.safetensors", weights(1)),
        (COMMIT, "model-00002-of-00002.safetensors", weights(2)),
        (OLD, "config.json", b"{\"new\": false}".to_vec()),
        (OLD, "model.safetensors", weights(3)),
    ]
}

fn id(text: &str) -> HubId {
    HubId::parse(text).unwrap()
}

#[test]
fn downloads_all_of_a_sharded_model_once() {
    let (server, dir) = (FakeHub::start(Mood::Good, &sharded()), tempfile::tempdir().unwrap());
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
    let (server, dir) = (FakeHub::start(Mood::Good, &files), tempfile::tempdir().unwrap());
    let folder = server.hub(dir.path()).fetch(&id("org/model")).unwrap();
    let model = Model::from_path(&folder, "model", &LoadOptions::default()).unwrap();
    assert_eq!(model.config.layers, 4);
    // The hub's links and the files themselves are one model.
    let local = Model::from_path(&super::gguf::fixture("llama2"), "local", &LoadOptions::default()).unwrap();
    assert_eq!(model.fingerprint, local.fingerprint);
}

#[test]
fn revisions_are_kept_apart() {
    let (server, dir) = (FakeHub::start(Mood::Good, &sharded()), tempfile::tempdir().unwrap());
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
fn resumes_what_was_begun() {
    let (server, dir) = (FakeHub::start(Mood::Good, &sharded()), tempfile::tempdir().unwrap());
    let blobs = dir.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = |name: &str, bytes: &[u8]| {
        std::fs::write(blobs.join(format!("{COMMIT}-{}.part", name.replace('.', "-"))), bytes).unwrap();
    };
    part("model-00001-of-00002.safetensors", &weights(1)[..30_000]);
    // Stopped between the last byte and the renaming.
    part("model-00002-of-00002.safetensors", &weights(2));
    let folder = server.hub(dir.path()).fetch(&id("org/model")).unwrap();
    assert_eq!(std::fs::read(folder.join("model-00001-of-00002.safetensors")).unwrap(), weights(1));
    assert_eq!(std::fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), weights(2));
    assert!(server.ranges("model-00001-of-00002.safetensors").iter().all(|r| r == "bytes=30000-"));
    assert!(server.ranges("model-00002-of-00002.safetensors").contains(&"bytes=0-".to_string()));
}

#[test]
fn a_server_without_ranges_cannot_spoil_a_file() {
    let (server, dir) = (FakeHub::start(Mood::IgnoresRanges, &sharded()), tempfile::tempdir().unwrap());
    let blobs = dir.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{OLD}-model-safetensors.part")), &weights(3)[..30_000]).unwrap();
    let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
}

/// A server for one file that breaks its first two answers off in the middle; tells which ranges it was asked for.
fn breaking_storage(data: Vec<u8>) -> (String, Arc<Mutex<Vec<usize>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&starts);
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let lines: Vec<String> = BufReader::new(connection.try_clone().unwrap())
                .lines()
                .map_while(Result::ok)
                .take_while(|l| !l.is_empty())
                .map(|l| l.to_ascii_lowercase())
                .collect();
            let Some(range) = lines.iter().find_map(|l| l.strip_prefix("range: bytes=")) else { continue };
            let (start, end) = range.split_once('-').unwrap();
            let start: usize = start.parse().unwrap();
            let end = end.parse::<usize>().map_or(data.len(), |e| e + 1);
            let mut body = &data[start..end];
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nConnection: close\r\n\r\n",
                body.len(),
                end - 1,
                data.len()
            );
            if body.len() > 1 {
                let mut starts = notes.lock().unwrap();
                starts.push(start);
                if starts.len() <= 2 {
                    body = &body[..body.len() / 2];
                }
            }
            connection.write_all(head.as_bytes()).unwrap();
            connection.write_all(body).unwrap();
        }
    });
    (address, starts)
}

#[test]
fn goes_on_after_a_broken_connection() {
    let (storage, starts) = breaking_storage(weights(3));
    let server = FakeHub::with_storage(Mood::Good, &sharded(), Some(storage));
    let dir = tempfile::tempdir().unwrap();
    let folder = server.hub(dir.path()).fetch(&id("org/model@old")).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(3));
    let starts = starts.lock().unwrap().clone();
    assert_eq!(starts.len(), 3, "{starts:?}");
    assert!(starts[0] == 0 && 0 < starts[1] && starts[1] < starts[2], "{starts:?}");
}

#[test]
fn gated_models_say_where_to_ask() {
    let (server, dir) = (FakeHub::start(Mood::Gated, &sharded()), tempfile::tempdir().unwrap());
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
        let server = FakeHub::start(Mood::Good, &sharded());
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
    let (server, dir) = (FakeHub::start(Mood::Good, &files), tempfile::tempdir().unwrap());
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
