//! One file from the hub into the cache: resumed where it was cut, checked as a whole, then linked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::header::CONTENT_RANGE;
use ureq::http::{HeaderValue, StatusCode};
use url::Url;

use super::cache::RepoCache;
use super::client::{Client, Facts, Trouble};

/// Times that a request is tried again after a disturbance, unless much came in between.
const RETRIES: u32 = 4;
/// Bytes that are much.
const MUCH: u64 = 1 << 20;
/// Bytes that are read at once.
const CHUNK: usize = 128 << 10;

/// Where a file comes from.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Branch, tag or commit.
    pub(super) revision: &'a str,
    /// Whether the revision is a commit already.
    pub(super) pinned: bool,
    /// Path in the repository.
    pub(super) path: &'a str,
}

/// Downloads the file at `url` into `cache` and gives its path there, and its commit.
pub(super) fn download(
    client: &Client,
    cache: &RepoCache,
    url: &Url,
    wanted: Wanted<'_>,
    progress: bool,
) -> Result<(PathBuf, String), Trouble> {
    let facts = patiently(|| client.facts(url.clone()))?;
    let Some(blob) = facts.blob.as_deref() else {
        return Err(Trouble::Answer("it names no ETag, by which the file would be kept".to_string()));
    };
    let commit = match (facts.commit.as_deref(), wanted.pinned) {
        (Some(commit), false) => commit,
        (Some(commit), true) if commit != wanted.revision => {
            return Err(Trouble::Answer(format!(
                "asked for commit {}, it answers for {commit}",
                wanted.revision
            )));
        }
        (_, true) => wanted.revision,
        (None, false) => return Err(Trouble::Answer("it names no commit (X-Repo-Commit)".to_string())),
    };
    let file = cache.snapshot(commit).join(wanted.path);
    if !file.is_file() {
        let waiting = |lock: &Path| {
            if progress {
                let lock = lock.display();
                eprintln!("{}: waiting for another process that downloads it (lock {lock})", wanted.path);
            }
        };
        let _alone = cache.lock(blob, waiting).map_err(Trouble::local(cache.blob(blob)))?;
        if !cache.blob(blob).is_file() {
            let part = cache.part(blob);
            Transfer { client, url, facts: &facts, blob, part: &part, bar: Bar::new(progress, wanted.path) }
                .run()?;
            cache.finish(blob).map_err(Trouble::local(part))?;
        }
        cache.link(blob, commit, wanted.path).map_err(Trouble::local(file.clone()))?;
    }
    Ok((file, commit.to_string()))
}

/// Repeats what a disturbance stopped.
pub(super) fn patiently<T>(mut ask: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
    let mut retries = 0..RETRIES;
    loop {
        match ask() {
            Err(trouble) if trouble.passes() => match retries.next() {
                Some(retry) => pause(retry),
                None => return Err(trouble),
            },
            other => return other,
        }
    }
}

fn pause(retry: u32) {
    std::thread::sleep(Duration::from_millis(200 << retry));
}

/// The contents of one blob on their way to its part file.
struct Transfer<'a> {
    client: &'a Client,
    url: &'a Url,
    facts: &'a Facts,
    blob: &'a str,
    part: &'a Path,
    bar: Bar<'a>,
}

impl Transfer<'_> {
    /// Brings the part file to what the hub announced.
    fn run(mut self) -> Result<(), Trouble> {
        let mut retries = 0..RETRIES;
        let mut anew = false;
        loop {
            let before = self.length();
            let result = self.go_on().and_then(|()| self.check());
            let trouble = match result {
                Ok(()) => return Ok(()),
                Err(trouble) => trouble,
            };
            if self.length() >= before + MUCH {
                retries = 0..RETRIES;
            }
            if let Trouble::Mismatch(_) = trouble {
                fs::remove_file(self.part).map_err(Trouble::local(self.part))?;
                // What lay there from before may be at fault.
                if before == 0 || anew {
                    return Err(trouble);
                }
                anew = true;
                continue;
            }
            match retries.next() {
                Some(retry) if trouble.passes() => pause(retry),
                _ => return Err(trouble),
            }
        }
    }

    fn length(&self) -> u64 {
        self.part.metadata().map_or(0, |m| m.len())
    }

    /// Writes what is missing behind what is there. Always at its place in the file, never at its end: a second writer
    /// would do no harm.
    fn go_on(&mut self) -> Result<(), Trouble> {
        let local = || Trouble::local(self.part);
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(self.part);
        let mut file = opened.map_err(local())?;
        let mut at = file.metadata().map_err(local())?.len();
        if at > 0 && self.facts.size == Some(at) {
            return Ok(());
        }
        if self.facts.size.is_some_and(|size| at > size) {
            (at, file) = (0, cleared(file).map_err(local())?);
        }
        let answer = self.client.get(self.url.clone(), at)?;
        let begins = match answer.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => None,
            StatusCode::PARTIAL_CONTENT => {
                answer.headers().get(CONTENT_RANGE).map_or((at == 0).then_some(0), beginning)
            }
            _ => Some(0),
        };
        if begins != Some(at) {
            (at, file) = (0, cleared(file).map_err(local())?);
        }
        if begins != Some(at) {
            return Err(Trouble::Broken(
                "the file does not go on where its part in the cache ends".to_string(),
            ));
        }
        file.seek(SeekFrom::Start(at)).map_err(local())?;
        let size = self.facts.size.or_else(|| Some(at + answer.body().content_length()?));
        self.bar.start(at, size);
        let mut body = answer.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = body
                .read(&mut chunk)
                .map_err(|e| Trouble::Broken(minicache_config::shown(&e.to_string())))?;
            file.write_all(&chunk[..read]).map_err(local())?;
            at += read as u64;
            self.bar.go(at);
            match size {
                Some(size) if at > size => {
                    return Err(Trouble::Mismatch(format!(
                        "more came than the {size} bytes that were announced"
                    )));
                }
                Some(size) if read == 0 && at < size => {
                    return Err(Trouble::Broken(format!("{at} bytes came where {size} were announced")));
                }
                _ if read == 0 => return file.sync_all().map_err(local()),
                _ => {}
            }
        }
    }

    /// Compares the part file with the hash that the hub announced: the SHA-256 of a large file, git's blob hash of any
    /// other. A hub that is a plain file server announces neither.
    fn check(&self) -> Result<(), Trouble> {
        let mut file = File::open(self.part).map_err(Trouble::local(self.part))?;
        let is_hex = self.blob.bytes().all(|b| b.is_ascii_hexdigit());
        let (kind, found) = match self.blob.len() {
            64 if is_hex => ("SHA-256", digest(Sha256::new(), &mut file)),
            40 if is_hex => {
                let header = format!("blob {}\0", self.length());
                ("git blob hash", digest(Sha1::new_with_prefix(header), &mut file))
            }
            _ => return Ok(()),
        };
        let found = found.map_err(Trouble::local(self.part))?;
        if found.eq_ignore_ascii_case(self.blob) {
            return Ok(());
        }
        let announced = self.blob;
        Err(Trouble::Mismatch(format!("the {kind} of what came is {found}, the hub announced {announced}")))
    }
}

fn cleared(file: File) -> io::Result<File> {
    file.set_len(0)?;
    Ok(file)
}

/// The first byte of a `Content-Range: bytes 5-9/10`.
fn beginning(range: &HeaderValue) -> Option<u64> {
    range.to_str().ok()?.trim().strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

fn digest(mut hash: impl Digest, file: &mut File) -> io::Result<String> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            read => hash.update(&chunk[..read]),
        }
    }
}

/// Progress of one file: a bar on a terminal, a line elsewhere.
struct Bar<'a> {
    shown: bool,
    name: &'a str,
    bar: ProgressBar,
}

impl<'a> Bar<'a> {
    fn new(shown: bool, name: &'a str) -> Self {
        Self { shown, name, bar: ProgressBar::hidden() }
    }

    fn start(&mut self, at: u64, size: Option<u64>) {
        if std::mem::take(&mut self.shown) {
            if std::io::stderr().is_terminal() {
                let style = ProgressStyle::with_template(
                    "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                );
                self.bar = ProgressBar::new(size.unwrap_or(0)).with_message(self.name.to_string());
                self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            } else {
                let size = size.map(|s| format!(" ({:.1} MB)", s as f64 / 1e6)).unwrap_or_default();
                eprintln!("downloading {}{size}", self.name);
            }
        }
        self.bar.set_position(at);
        self.bar.reset_eta();
    }

    fn go(&self, at: u64) {
        self.bar.set_position(at);
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
