//! Models from the Hugging Face hub, kept in the cache that all of its tools share.
//!
//! Downloads go through the `hf-hub` crate. Around it this module adds: one commit for all files of a model (a branch
//! that moves during a download cannot mix two versions), offline mode, a check of every file's size, and errors that
//! say what to do. What is cached whole is used without asking the hub.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{Error, Result};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Fetched where a repository has them; before the weights, so that weights that are whole mean that all is there.
const SMALL: [&str; 5] =
    [CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
/// Times that a file is tried again after a broken connection; each goes on where the last one stopped.
const RETRIES: u32 = 4;

/// Where and how models are fetched.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The hub's address.
    pub endpoint: String,
    /// The cache folder, with a `models--ORG--NAME` for each repository.
    pub cache: PathBuf,
    /// Sent with every request, if any.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Show progress on stderr.
    pub progress: bool,
}

/// A repository with a revision, and a file in it if one was named: `org/name[/file.gguf][@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// A single file in the repository.
    pub file: Option<String>,
}

impl HubId {
    /// Reads `org/name`, `org/name@revision` or `org/name/path/file.gguf[@revision]`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let word = |w: &str| {
            !w.is_empty()
                && !w.starts_with(['.', '-'])
                && !w.contains("..")
                && w.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        if !revision.split('/').all(word) {
            return None;
        }
        let parts: Vec<&str> = path.split('/').collect();
        let (repo, file) = parts.split_at_checked(2)?;
        let named = file.last().is_none_or(|f| f.ends_with(".gguf"));
        (parts.iter().all(|p| word(p)) && named).then(|| Self {
            repo: repo.join("/"),
            revision: revision.to_string(),
            file: (!file.is_empty()).then(|| file.join("/")),
        })
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.repo)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl Hub {
    /// The hub as the environment describes it: `HF_ENDPOINT`; `HF_HUB_CACHE`, `HF_HOME` (the cache is its `hub`
    /// folder) or `~/.cache/huggingface`; `HF_TOKEN` or the token file that `hf auth login` leaves; `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>, user: Option<PathBuf>) -> Self {
        let variable = |name: &str| variable(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            cache.unwrap_or_else(|| user.unwrap_or_default().join(".cache")).join("huggingface")
        });
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let saved_token = || {
            let text = std::fs::read_to_string(token_file).ok()?;
            Some(text.trim().to_string()).filter(|t| !t.is_empty())
        };
        let offline = variable("HF_HUB_OFFLINE").map(|v| v.to_ascii_lowercase());
        Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(saved_token),
            offline: offline.is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.as_str())),
            progress: true,
        }
    }

    /// The local path of what `id` names: the folder of a model's snapshot with its configuration, tokenizer and
    /// safetensors weights, or a single file. Downloads what the cache does not hold.
    ///
    /// # Errors
    /// Not cached in offline mode; no connection; a model that does not exist or whose licence was not accepted.
    pub fn fetch(&self, id: &HubId) -> Result<PathBuf> {
        let cached = self.cached(id);
        // Another tool may have left a model's weights there without its tokenizer.
        let needs_more = |path: &PathBuf| id.file.is_none() && !path.join("tokenizer.json").is_file();
        if let Some(path) = cached.clone().filter(|path| self.offline || !needs_more(path)) {
            return Ok(path);
        }
        if self.offline {
            return Err(Error::Hub(format!(
                "{id} is not in the cache {} (or not whole), and HF_HUB_OFFLINE is set; unset it once to download",
                self.cache.display()
            )));
        }
        let cache = std::path::absolute(&self.cache).map_err(Error::io(&self.cache))?;
        let api = ApiBuilder::from_cache(Cache::new(cache.clone()))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_string())
            .with_token(self.token.clone())
            .with_user_agent("minicache", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| self.explain(id, "", &e))?;
        let named = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone());
        let info = match (api.repo(named.clone()).info(), cached) {
            (Ok(info), _) => info,
            (Err(_), Some(path)) => return Ok(path),
            (Err(e), None) => return Err(self.explain(id, "", &e)),
        };
        if !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) || info.sha.is_empty() {
            return Err(Error::Hub(format!("{id}: {} named no commit for it", self.endpoint)));
        }
        let repo = api.repo(Repo::with_revision(id.repo.clone(), RepoType::Model, info.sha.clone()));
        let download =
            Download { hub: self, id, api: &api, repo: &repo, snapshot: self.snapshot(id, &info.sha) };
        let has = |name: &str| info.siblings.iter().any(|s| s.rfilename == name);
        if let Some(file) = &id.file {
            if !has(file) {
                let ggufs =
                    info.siblings.iter().map(|s| s.rfilename.as_str()).filter(|f| f.ends_with(".gguf"));
                let list = ggufs.collect::<Vec<_>>().join(", ");
                let list = if list.is_empty() { "no GGUF files".to_string() } else { list };
                return Err(Error::Hub(format!("{} has no file {file}; it has {list}", id.repo)));
            }
            download.file(file)?;
        } else {
            let names: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
            download.model(&names)?;
        }
        // Last, so that a name stands for a commit only once the files of it are there.
        let pinned = Cache::new(cache).repo(named);
        pinned.create_ref(&info.sha).map_err(Error::io(self.folder(id)))?;
        self.cached(id).ok_or_else(|| {
            Error::Hub(format!("{id}: the cache {} does not hold what was downloaded", self.cache.display()))
        })
    }

    /// What the cache holds of `id`, if it is whole.
    pub fn cached(&self, id: &HubId) -> Option<PathBuf> {
        let mut snapshot = self.snapshot(id, &id.revision);
        if !snapshot.is_dir() {
            let commit = std::fs::read_to_string(self.folder(id).join("refs").join(&id.revision)).ok()?;
            snapshot = self.snapshot(id, commit.trim());
        }
        if let Some(file) = &id.file {
            return Some(snapshot.join(file)).filter(|p| p.is_file());
        }
        let whole = snapshot.join(CONFIG).is_file()
            && (snapshot.join(SINGLE).is_file()
                || shards(&snapshot.join(INDEX)).is_ok_and(|s| s.iter().all(|f| snapshot.join(f).is_file())));
        whole.then_some(snapshot)
    }

    fn folder(&self, id: &HubId) -> PathBuf {
        self.cache.join(format!("models--{}", id.repo.replace('/', "--")))
    }

    fn snapshot(&self, id: &HubId, commit: &str) -> PathBuf {
        self.folder(id).join("snapshots").join(commit)
    }

    /// An error of the hub, said so that it can be mended.
    fn explain(&self, id: &HubId, file: &str, error: &ApiError) -> Error {
        let place = if file.is_empty() { id.to_string() } else { format!("{id}, {file}") };
        let page = format!("{}/{}", self.endpoint, id.repo);
        let text = match error {
            ApiError::RequestError(e) => match &**e {
                ureq::Error::StatusCode(code @ (401 | 403)) => {
                    let token = match (&self.token, code) {
                        (None, _) => format!(
                            "then set HF_TOKEN to a token from {}/settings/tokens (or run `hf auth login`)",
                            self.endpoint
                        ),
                        (Some(_), 401) => "your token was not accepted: check HF_TOKEN".to_string(),
                        (Some(_), _) => "your token's account has no access yet".to_string(),
                    };
                    format!(
                        "access to {place} was refused (status {code}): the model is gated or private, or its name is \
                         wrong; ask for access at {page}, {token}"
                    )
                }
                ureq::Error::StatusCode(404) => {
                    format!("{place} was not found (status 404); check the name and revision at {page}")
                }
                ureq::Error::StatusCode(code) => {
                    format!("{} answered status {code} for {place}; try again later", self.endpoint)
                }
                other => format!(
                    "no connection to {} for {place} ({other}); check the network, HF_ENDPOINT and proxy settings, or \
                     give a local directory",
                    self.endpoint
                ),
            },
            ApiError::IoError(e) => {
                format!("{place}: {e}; check the connection and the space in {}", self.cache.display())
            }
            ApiError::LockAcquisition(path) => {
                let lock = path.display();
                format!(
                    "{place} is being downloaded by another process; wait for it, or remove {lock} if there is none"
                )
            }
            other => format!("{place}: {} gave an answer that is not the hub's ({other})", self.endpoint),
        };
        Error::Hub(text)
    }
}

/// One model's download at one commit.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a HubId,
    api: &'a Api,
    repo: &'a ApiRepo,
    snapshot: PathBuf,
}

impl Download<'_> {
    fn model(&self, names: &[&str]) -> Result<()> {
        if !names.contains(&SINGLE) && !names.contains(&INDEX) {
            let ggufs: Vec<_> = names.iter().filter(|n| n.ends_with(".gguf")).copied().collect();
            let hint = match ggufs.first() {
                Some(first) => format!("name one of its GGUF files, such as {}/{first}", self.id.repo),
                None => "only safetensors and GGUF weights are read".to_string(),
            };
            return Err(Error::Hub(format!("{} has no safetensors weights; {hint}", self.id)));
        }
        for name in SMALL.iter().filter(|n| names.contains(n)) {
            self.file(name)?;
        }
        if !names.contains(&INDEX) {
            return self.file(SINGLE);
        }
        self.file(INDEX)?;
        for shard in shards(&self.snapshot.join(INDEX))? {
            if !names.contains(&shard.as_str()) {
                let message = format!("names the shard {shard}, which {} does not have", self.id);
                return Err(Error::file(self.snapshot.join(INDEX), message));
            }
            self.file(&shard)?;
        }
        Ok(())
    }

    fn file(&self, name: &str) -> Result<()> {
        let path = self.snapshot.join(name);
        if path.is_file() {
            return Ok(());
        }
        let mut attempt = 0;
        loop {
            let size = Arc::new(AtomicU64::new(0));
            let bar = Bar::new(self.hub.progress, Arc::clone(&size));
            let error = match self.repo.download_with_progress(name, bar) {
                Ok(_) => {
                    let (got, wanted) =
                        (path.metadata().map_or(0, |m| m.len()), size.load(Ordering::Relaxed));
                    if got == wanted {
                        return Ok(());
                    }
                    // A server that sent the whole file where the rest was asked for.
                    self.forget(&path)?;
                    let message = format!("{got} bytes came where {wanted} were announced");
                    ApiError::IoError(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, message))
                }
                Err(e) => e,
            };
            let again = match &error {
                ApiError::RequestError(e) => match &**e {
                    // The part on disk is whole already, or too long: nothing can follow it.
                    ureq::Error::StatusCode(416) => self.forget_part(name),
                    ureq::Error::StatusCode(code) => *code >= 500,
                    _ => true,
                },
                ApiError::InvalidResume => self.forget_part(name),
                ApiError::IoError(e) => e.kind() != std::io::ErrorKind::StorageFull,
                _ => false,
            };
            if !again || attempt == RETRIES {
                return Err(self.hub.explain(self.id, name, &error));
            }
            std::thread::sleep(Duration::from_millis(200 << attempt));
            attempt += 1;
        }
    }

    /// Removes a file of the snapshot and what it links to.
    fn forget(&self, path: &Path) -> Result<()> {
        if let Ok(blob) = path.canonicalize() {
            std::fs::remove_file(&blob).map_err(Error::io(&blob))?;
        }
        std::fs::remove_file(path)
            .or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
            .map_err(Error::io(path))
    }

    /// Removes the unfinished part of a file; tells whether there was one.
    fn forget_part(&self, name: &str) -> bool {
        let Ok(metadata) = self.api.metadata(&self.repo.url(name)) else { return false };
        let blob = self.hub.folder(self.id).join("blobs").join(metadata.etag());
        std::fs::remove_file(blob.with_extension("part")).is_ok()
    }
}

/// The files that a `model.safetensors.index.json` names, sorted.
fn shards(index: &Path) -> Result<Vec<String>> {
    let value = crate::tokenizer::read_json(index)?;
    let map = value["weight_map"].as_object();
    let mut files: Vec<String> =
        map.into_iter().flat_map(|m| m.values()).filter_map(|v| Some(v.as_str()?.to_string())).collect();
    files.sort_unstable();
    files.dedup();
    let plain = |f: &String| !f.contains(['/', '\\']) && !f.starts_with('.');
    if files.is_empty() || !files.iter().all(plain) {
        return Err(Error::file(index, "has no weight_map of files beside it; download it again"));
    }
    Ok(files)
}

/// Progress of one file: a bar on a terminal, a line elsewhere.
struct Bar {
    shown: bool,
    bar: ProgressBar,
    size: Arc<AtomicU64>,
}

impl Bar {
    fn new(shown: bool, size: Arc<AtomicU64>) -> Self {
        Self { shown, bar: ProgressBar::hidden(), size }
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        let first = self.size.swap(size as u64, Ordering::Relaxed) == 0;
        if !self.shown || !first {
            return;
        }
        if std::io::stderr().is_terminal() {
            let style =
                ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
            self.bar = ProgressBar::new(size as u64).with_message(filename.to_string());
            self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        } else {
            eprintln!("downloading {filename} ({:.1} MB)", size as f64 / 1e6);
        }
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_where_and_how() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_saved\n").unwrap();
        let home = dir.path().display().to_string();
        let hub = |set: &[(&str, &str)]| {
            let set: Vec<_> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let value = |name: &str| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
            Hub::from_variables(value, Some(PathBuf::from("/home/me")))
        };
        let plain = hub(&[]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert!(!plain.offline && plain.token.is_none());
        let set = hub(&[("HF_HOME", &home), ("HF_HUB_OFFLINE", "True"), ("HF_ENDPOINT", "http://mirror")]);
        assert_eq!((set.cache, set.endpoint), (dir.path().join("hub"), "http://mirror".to_string()));
        assert_eq!((set.offline, set.token.as_deref()), (true, Some("hf_saved")));
        let set = hub(&[
            ("HF_HOME", &home),
            ("HF_TOKEN", "hf_own"),
            ("HF_HUB_CACHE", "/c"),
            ("HF_HUB_OFFLINE", "0"),
        ]);
        assert_eq!(
            (set.cache, set.offline, set.token.as_deref()),
            (PathBuf::from("/c"), false, Some("hf_own"))
        );
    }

    #[test]
    fn ids() {
        let id = |repo: &str, revision: &str, file: Option<&str>| {
            Some(HubId { repo: repo.into(), revision: revision.into(), file: file.map(Into::into) })
        };
        assert_eq!(HubId::parse("org/a-b.c"), id("org/a-b.c", "main", None));
        assert_eq!(HubId::parse("org/name@refs/pr/1"), id("org/name", "refs/pr/1", None));
        assert_eq!(HubId::parse("org/name/q/x.gguf@v1"), id("org/name", "v1", Some("q/x.gguf")));
        for bad in [
            "name",
            "org/name/file.bin",
            "org/../x",
            "/org/name",
            "org/name@",
            "org/name@../x",
            "a b/c",
            "./x",
        ] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
        let text = "org/name/x.gguf@v1";
        assert_eq!(HubId::parse(text).map(|id| id.to_string()).as_deref(), Some(text));
    }
}
