//! A hub on the loopback device that speaks the hub's addresses and headers, and can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use minicache_models::Hub;
use sha2::{Digest, Sha256};
use tiny_http::{Header, Request, Response, Server, StatusCode};

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(super) const OLD: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A file at a commit.
pub(super) type Entry = (&'static str, &'static str, Vec<u8>);

/// What a request asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) head: bool,
    pub(super) path: String,
    pub(super) range: Option<String>,
    pub(super) token: Option<String>,
}

/// An answer: status, headers, body.
pub(super) struct Reply(pub(super) u16, pub(super) Vec<(&'static str, String)>, pub(super) Vec<u8>);

/// Changes the answer to a request; the number counts the requests before it.
type Twist = Box<dyn Fn(&Asked, usize, Reply) -> Reply + Send + Sync>;

pub(super) struct FakeHub {
    pub(super) address: String,
    log: Arc<Mutex<Vec<Asked>>>,
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
}

impl FakeHub {
    pub(super) fn start(files: &[Entry]) -> Self {
        Self::twisted(files, |_, _, reply| reply)
    }

    pub(super) fn twisted(
        files: &[Entry],
        twist: impl Fn(&Asked, usize, Reply) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let twist: Twist = Box::new(twist);
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let files = files.iter().map(|(c, n, data)| ((c.to_string(), n.to_string()), data.clone())).collect();
        let (notes, listening) = (Arc::clone(&log), Arc::clone(&server));
        let thread = std::thread::spawn(move || {
            for request in listening.incoming_requests() {
                let asked = asked(&request);
                let before = notes.lock().unwrap().len();
                notes.lock().unwrap().push(asked.clone());
                let Reply(status, headers, body) = twist(&asked, before, answer(&asked, &files));
                let headers =
                    headers.iter().map(|(n, v)| Header::from_bytes(*n, v.as_bytes()).unwrap()).collect();
                let length = Some(body.len());
                let _ = request.respond(Response::new(
                    StatusCode(status),
                    headers,
                    Cursor::new(body),
                    length,
                    None,
                ));
            }
        });
        Self { address: format!("http://{}", server.server_addr()), log, server, thread: Some(thread) }
    }

    pub(super) fn hub(&self, cache: &Path) -> Hub {
        let (endpoint, cache) = (self.address.clone(), cache.to_path_buf());
        Hub { endpoint, cache, token: None, offline: false, progress: false }
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// The requests for a file's contents.
    pub(super) fn downloads(&self, file: &str) -> Vec<Asked> {
        self.asked().into_iter().filter(|a| !a.head && a.path.ends_with(file)).collect()
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

fn asked(request: &Request) -> Asked {
    let field = |name: &str| {
        let found = request.headers().iter().find(|h| h.field.as_str().as_str().eq_ignore_ascii_case(name));
        found.map(|h| h.value.as_str().to_string())
    };
    Asked {
        head: request.method().as_str() == "HEAD",
        path: request.url().to_string(),
        range: field("range"),
        token: field("authorization"),
    }
}

/// What a well-behaved hub says.
fn answer(asked: &Asked, files: &BTreeMap<(String, String), Vec<u8>>) -> Reply {
    let nothing = |status: u16| Reply(status, Vec::new(), Vec::new());
    let commit = |revision: &str| match revision {
        "main" | "refs%2Fconvert%2Fparquet" | COMMIT => Some(COMMIT),
        "old" | OLD => Some(OLD),
        _ => None,
    };
    let path = asked.path.strip_prefix("/prefix").unwrap_or(&asked.path);
    if let Some(revision) = path.strip_prefix("/api/models/org/model/revision/") {
        let Some(sha) = commit(revision) else { return nothing(404) };
        let named = files.keys().filter(|(c, _)| c == sha);
        let siblings: Vec<_> = named.map(|(_, name)| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": sha, "siblings": siblings}).to_string();
        return Reply(200, Vec::new(), body.into_bytes());
    }
    // Large files live elsewhere: the hub answers with a redirection that carries their hash.
    let stored = path.strip_prefix("/storage/");
    let resolved =
        || ["/org/model/resolve/", "/datasets/org/data/resolve/"].iter().find_map(|p| path.strip_prefix(p));
    let found = stored.or_else(resolved).and_then(|r| r.split_once('/')).and_then(|(revision, name)| {
        let sha = commit(revision)?;
        Some((sha, name, files.get(&(sha.to_string(), name.to_string()))?))
    });
    let Some((sha, name, data)) = found else { return nothing(404) };
    let of_hub = |headers: &mut Vec<(&'static str, String)>, etag: &'static str| {
        headers.push(("X-Repo-Commit", sha.to_string()));
        headers.push((etag, format!("\"{}\"", hash(name, data))));
    };
    let mut headers = Vec::new();
    if is_large(name) && stored.is_none() {
        of_hub(&mut headers, "X-Linked-Etag");
        headers.push(("X-Linked-Size", data.len().to_string()));
        headers.push(("Location", format!("/storage/{sha}/{name}")));
        return Reply(302, headers, Vec::new());
    }
    if stored.is_none() {
        of_hub(&mut headers, "ETag");
    }
    let Some(start) = asked.range.as_ref().map(|r| start_of(r)) else {
        return Reply(200, headers, data.clone());
    };
    if start >= data.len() {
        return nothing(416);
    }
    headers.push(("Content-Range", format!("bytes {start}-{}/{}", data.len() - 1, data.len())));
    Reply(206, headers, data[start..].to_vec())
}

fn start_of(range: &str) -> usize {
    range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".parquet")
}

/// The hash that the hub announces of a file.
pub(super) fn hash(name: &str, data: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
    if is_large(name) {
        return hex(&Sha256::digest(data));
    }
    let mut git = sha1::Sha1::new_with_prefix(format!("blob {}\0", data.len()));
    git.update(data);
    hex(&git.finalize())
}

pub(super) fn weights(seed: u8) -> Vec<u8> {
    (0..70_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect()
}

pub(super) fn sharded() -> Vec<Entry> {
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

/// A server of one file that breaks its first answers off in the middle, as many as `cuts`; tells from where on it was
/// asked for it.
pub(super) fn breaking_storage(data: Vec<u8>, cuts: usize) -> (String, Arc<Mutex<Vec<usize>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/file", listener.local_addr().unwrap());
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
            let start = lines.iter().find_map(|l| l.strip_prefix("range: ")).map_or(0, start_of);
            let mut body = &data[start..];
            let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nConnection: close\r\n\r\n",
                body.len(),
                data.len() - 1,
                data.len()
            );
            let mut starts = notes.lock().unwrap();
            starts.push(start);
            if starts.len() <= cuts {
                body = &body[..body.len() / 2];
            }
            let _ = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(body));
        }
    });
    (address, starts)
}
