//! Models and data sets from the Hugging Face hub, kept in the cache that all of its tools share.
//!
//! A client of our own over `ureq`, because the `hf-hub` crate cannot be made to do what a client has to, in 0.5.0 or
//! in 1.0.0: it joins an `ETag` and an `X-Repo-Commit` from the network to paths as they are, and takes what it
//! downloads unchecked although the `ETag` is its hash; 0.5.0 also shows the token to wherever a redirection leads,
//! and 1.0.0 gives up resuming and brings 300 crates and an asynchronous runtime. Its four parts:
//!
//! * `names`: what may become a part of a path; anything else from the network is refused.
//! * `env`: the environment variables of `huggingface_hub`.
//! * `client`: requests, and redirections followed by hand, so that the token goes to the hub's own host alone.
//! * `cache` and `download`: the layout of `huggingface_hub`, one writer of a blob at a time, resumed and hashed.
//!
//! On top of them (`repository`) a model has one commit for all of its files (a branch that moves during a download
//! cannot mix two versions), and what is cached whole is used without asking the hub.

mod cache;
mod client;
mod download;
mod env;
mod id;
mod names;
mod repository;

use std::path::PathBuf;

use minicache_config::shown;
use url::Url;

pub use self::id::HubId;

use self::cache::RepoCache;
use self::client::{Client, Trouble};
use self::download::Wanted;
use self::repository::{CONFIG, INDEX, Kind, Repository, SINGLE, shards};
use crate::{Error, Result};

/// Files that an error lists.
const LISTED: usize = 12;

/// Where and how models are fetched.
#[derive(Clone)]
pub struct Hub {
    /// The hub's address.
    pub endpoint: String,
    /// The cache folder, with a `models--ORG--NAME` for each repository.
    pub cache: PathBuf,
    /// Sent with every request to the hub's own host, if any.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Show progress on stderr.
    pub progress: bool,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token stays out of logs.
        f.debug_struct("Hub")
            .field("endpoint", &self.address())
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("progress", &self.progress)
            .finish()
    }
}

/// Why a file of the hub could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// One line that says what to do.
    pub message: String,
    /// The hub itself cannot be had just now, so that asking it for other files is in vain.
    pub is_unreachable: bool,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Hub(failure.message)
    }
}

impl Hub {
    /// The hub as the environment describes it: `HF_ENDPOINT`; the cache by `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`,
    /// `HF_HOME` (its `hub` folder), `XDG_CACHE_HOME` or `~/.cache`, with `~` and `$NAME` in them; the token by
    /// `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` or the file that `hf auth login` leaves, unless
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set; `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`.
    pub fn from_env() -> Self {
        env::hub(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    /// The local path of what `id` names: the folder of a model's snapshot with its configuration, tokenizer and
    /// safetensors weights, or a single file. Downloads what the cache does not hold.
    ///
    /// # Errors
    /// Not cached in offline mode; no connection; a model that does not exist or whose licence was not accepted; an
    /// answer that is not the hub's; contents that are not what the hub announced.
    pub fn fetch(&self, id: &HubId) -> Result<PathBuf> {
        let cached = self.cached(id);
        // Another tool may have left a model's weights there without its tokenizer.
        let needs_more = |path: &PathBuf| id.file.is_none() && !path.join("tokenizer.json").is_file();
        if let Some(path) = cached.clone().filter(|path| self.offline || !needs_more(path)) {
            return Ok(path);
        }
        if self.offline {
            return Err(Error::Hub(format!(
                "{id} is not in the cache {} (or not whole), and TRANSFORMERS_OFFLINE or HF_HUB_OFFLINE is set; unset \
                 it once to download",
                self.cache.display()
            )));
        }
        if !id.is_plain() {
            return Err(Error::Hub(format!("{} is no hub id (org/name)", shown(&id.to_string()))));
        }
        let repository = self.open(Kind::Model, &id.repo)?;
        let info = match (repository.info(&id.revision), cached) {
            (Ok(info), _) => info,
            (Err(_), Some(path)) => return Ok(path),
            (Err(e), None) => return Err(repository.explain(&id.to_string(), e).into()),
        };
        if let Some(file) = &id.file {
            if !info.files.contains(file) {
                let list = listed(info.files.iter().filter(|f| f.ends_with(".gguf")));
                let list = list.unwrap_or_else(|| "no GGUF files".to_string());
                return Err(Error::Hub(format!("{} has no file {file}; it has {list}", id.repo)));
            }
            repository.file_of(id, &info, file)?;
        } else {
            repository.model(id, &info)?;
        }
        // Last, so that a name stands for a commit only once the files of it are there.
        repository.cache.write_ref(&id.revision, &info.commit).map_err(Error::io(&self.cache))?;
        self.cached(id).ok_or_else(|| {
            Error::Hub(format!("{id}: the cache {} does not hold what was downloaded", self.cache.display()))
        })
    }

    /// What the cache holds of `id`, if it is whole.
    pub fn cached(&self, id: &HubId) -> Option<PathBuf> {
        let cache = RepoCache::new(&self.cache, Kind::Model, &id.repo);
        if let Some(file) = &id.file {
            return cache.file(&id.revision, file);
        }
        let snapshot = cache.snapshot_of(&id.revision)?;
        let whole = snapshot.join(CONFIG).is_file()
            && (snapshot.join(SINGLE).is_file()
                || shards(&snapshot.join(INDEX)).is_ok_and(|s| s.iter().all(|f| snapshot.join(f).is_file())));
        whole.then_some(snapshot)
    }

    /// The local path of one file of a data set at a branch, tag or commit, downloaded if the cache does not hold it.
    ///
    /// # Errors
    /// As for [`Hub::fetch`].
    pub fn fetch_data(
        &self,
        repo: &str,
        revision: &str,
        path: &str,
    ) -> std::result::Result<PathBuf, Failure> {
        let refuse = |message: String| Failure { message, is_unreachable: false };
        if !(names::is_repo(repo) && names::is_path(revision) && names::is_path(path)) {
            return Err(refuse(format!("{} of {} is no file of a data set", shown(path), shown(repo))));
        }
        if let Some(found) = RepoCache::new(&self.cache, Kind::Dataset, repo).file(revision, path) {
            return Ok(found);
        }
        if self.offline {
            let cache = self.cache.display();
            return Err(refuse(format!(
                "TRANSFORMERS_OFFLINE or HF_HUB_OFFLINE is set, and {path} is not in {cache}"
            )));
        }
        let repository = self.open(Kind::Dataset, repo)?;
        let wanted = Wanted { revision, pinned: false, path };
        let done = repository.file(wanted).and_then(|(file, commit)| {
            let noted = repository.cache.write_ref(revision, &commit);
            noted.map(|()| file).map_err(Trouble::local(&self.cache))
        });
        done.map_err(|e| repository.explain(&format!("{repo}, {path}"), e))
    }

    fn open<'a>(&'a self, kind: Kind, repo: &'a str) -> std::result::Result<Repository<'a>, Failure> {
        let client = Client::new(self).map_err(|message| Failure { message, is_unreachable: false })?;
        let folder = std::path::absolute(&self.cache).unwrap_or_else(|_| self.cache.clone());
        Ok(Repository { hub: self, kind, repo, client, cache: RepoCache::new(&folder, kind, repo) })
    }

    /// The hub's address as it is shown: without a password.
    fn address(&self) -> String {
        let mut text = self.endpoint.trim_end_matches('/').to_string();
        if let Ok(mut url) = Url::parse(&text)
            && url.password().is_some()
            && url.set_password(None).is_ok()
        {
            text = url.as_str().trim_end_matches('/').to_string();
        }
        text
    }
}

/// The first few of many names; `None` for none.
fn listed<'a>(names: impl Iterator<Item = &'a String>) -> Option<String> {
    let names: Vec<&str> = names.map(String::as_str).collect();
    let (first, rest) = names.split_at(names.len().min(LISTED));
    let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    (!first.is_empty()).then(|| first.join(", ") + &more)
}
