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
//! On top of them a model has one commit for all of its files (a branch that moves during a download cannot mix two
//! versions), and what is cached whole is used without asking the hub.

mod cache;
mod client;
mod download;
mod env;
mod names;

use std::path::{Path, PathBuf};

use minicache_config::shown;
use serde::Deserialize;
use url::Url;

use self::cache::RepoCache;
use self::client::{Client, Trouble};
use self::download::{Wanted, download, patiently};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Fetched where a repository has them; before the weights, so that weights that are whole mean that all is there.
const SMALL: [&str; 5] =
    [CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
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

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// Its word in the hub's interface and in the cache's folders.
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The address of a repository below the hub's.
    fn page(self, repo: &str) -> String {
        match self {
            Self::Model => repo.to_string(),
            Self::Dataset => format!("datasets/{repo}"),
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        }
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
        let parts: Vec<&str> = path.split('/').collect();
        let (repo, file) = parts.split_at_checked(2)?;
        let id = Self {
            repo: repo.join("/"),
            revision: revision.to_string(),
            file: (!file.is_empty()).then(|| file.join("/")),
        };
        id.is_plain().then_some(id)
    }

    /// Whether all of its names are plain.
    fn is_plain(&self) -> bool {
        let file = |f: &String| names::is_path(f) && f.ends_with(".gguf");
        names::is_repo(&self.repo) && names::is_path(&self.revision) && self.file.as_ref().is_none_or(file)
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

/// What the hub says of a repository at a revision.
#[derive(Debug, Deserialize)]
#[serde(from = "Answer")]
struct Info {
    commit: String,
    /// Its files, of those that have plain names.
    files: Vec<String>,
}

/// The answer as it comes.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl From<Answer> for Info {
    fn from(answer: Answer) -> Self {
        let names = answer.siblings.into_iter().map(|s| s.rfilename);
        Self { commit: answer.sha, files: names.filter(|f| names::is_path(f)).collect() }
    }
}

impl Info {
    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|f| f == name)
    }
}

/// A repository of the hub, with its part of the cache.
struct Repository<'a> {
    hub: &'a Hub,
    kind: Kind,
    repo: &'a str,
    client: Client,
    cache: RepoCache,
}

impl Repository<'_> {
    /// The commit that `revision` stands for, and its files.
    fn info(&self, revision: &str) -> std::result::Result<Info, Trouble> {
        let (kind, repo) = (self.kind.plural(), self.repo);
        let url = self.client.url(&format!("api/{kind}/{repo}/revision/{}", escaped(revision)))?;
        let info: Info = patiently(|| self.client.json(url.clone()))?;
        if names::is_word(&info.commit) {
            return Ok(info);
        }
        Err(Trouble::Answer(match info.commit.as_str() {
            "" => "it names no commit".to_string(),
            commit => format!("its commit {} is no plain name, and was refused", shown(commit)),
        }))
    }

    /// One file, in the cache.
    fn file(&self, wanted: Wanted<'_>) -> std::result::Result<(PathBuf, String), Trouble> {
        let page = self.kind.page(self.repo);
        let url = self.client.url(&format!("{page}/resolve/{}/{}", escaped(wanted.revision), wanted.path))?;
        download(&self.client, &self.cache, &url, wanted, self.hub.progress)
    }

    /// One of a model's files at the commit that `info` names.
    fn file_of(&self, id: &HubId, info: &Info, path: &str) -> Result<PathBuf> {
        let present = self.cache.snapshot(&info.commit).join(path);
        if present.is_file() {
            return Ok(present);
        }
        let done = self.file(Wanted { revision: &info.commit, pinned: true, path });
        let place = if id.file.is_some() { id.to_string() } else { format!("{id}, {path}") };
        Ok(done.map_err(|e| self.explain(&place, e))?.0)
    }

    /// A model's files at the commit that `info` names.
    fn model(&self, id: &HubId, info: &Info) -> Result<()> {
        if !info.has(SINGLE) && !info.has(INDEX) {
            let hint = match info.files.iter().find(|f| f.ends_with(".gguf")) {
                Some(first) => format!("name one of its GGUF files, such as {}/{first}", id.repo),
                None => "only safetensors and GGUF weights are read".to_string(),
            };
            return Err(Error::Hub(format!("{id} has no safetensors weights; {hint}")));
        }
        for name in SMALL.iter().filter(|n| info.has(n)) {
            self.file_of(id, info, name)?;
        }
        if !info.has(INDEX) {
            self.file_of(id, info, SINGLE)?;
            return Ok(());
        }
        let index = self.file_of(id, info, INDEX)?;
        for shard in shards(&index)? {
            if !info.has(&shard) {
                return Err(Error::file(index, format!("names the shard {shard}, which {id} does not have")));
            }
            self.file_of(id, info, &shard)?;
        }
        Ok(())
    }

    /// What went wrong with `place`, said so that it can be mended.
    fn explain(&self, place: &str, trouble: Trouble) -> Failure {
        let (hub, noun) = (self.hub.address(), self.kind.noun());
        let page = format!("{hub}/{}", self.kind.page(self.repo));
        let is_unreachable = trouble.passes() || matches!(trouble, Trouble::Unreachable(_));
        let message = match trouble {
            Trouble::Status(code @ (401 | 403)) => {
                let token = match (&self.hub.token, code) {
                    (None, _) => {
                        format!(
                            "then set HF_TOKEN to a token from {hub}/settings/tokens (or run `hf auth login`)"
                        )
                    }
                    (Some(_), 401) => "your token was not accepted: check HF_TOKEN".to_string(),
                    (Some(_), _) => "your token's account has no access yet".to_string(),
                };
                format!(
                    "access to {place} was refused (status {code}): the {noun} is gated or private, or its name is \
                     wrong; ask for access at {page}, {token}"
                )
            }
            Trouble::Status(404) => {
                format!("{place} was not found (status 404); check the name and revision at {page}")
            }
            Trouble::Status(code) => format!("{hub} answered status {code} for {place}; try again later"),
            Trouble::Unreachable(why) => format!(
                "no connection to {hub} for {place} ({why}); check the network, HF_ENDPOINT and proxy settings, or \
                 give a local directory"
            ),
            Trouble::Broken(why) => format!(
                "the connection to {hub} broke while {place} came ({why}); try again: it goes on where it was cut"
            ),
            Trouble::Answer(why) => format!("{place}: {hub} gave an answer that is not the hub's: {why}"),
            Trouble::Mismatch(why) => format!(
                "{place} from {hub} was damaged or changed on its way: {why}; nothing of it was kept, try again or \
                 check the network and HF_ENDPOINT"
            ),
            Trouble::Local(why) => {
                let cache = self.hub.cache.display();
                format!("{place}: {why}; check the space and rights in {cache}")
            }
        };
        Failure { message, is_unreachable }
    }
}

/// A revision in an address: one part of its path.
fn escaped(revision: &str) -> String {
    revision.replace('/', "%2F")
}

/// The first few of many names; `None` for none.
fn listed<'a>(names: impl Iterator<Item = &'a String>) -> Option<String> {
    let names: Vec<&str> = names.map(String::as_str).collect();
    let (first, rest) = names.split_at(names.len().min(LISTED));
    let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    (!first.is_empty()).then(|| first.join(", ") + &more)
}

/// The files that a `model.safetensors.index.json` names, sorted.
fn shards(index: &Path) -> Result<Vec<String>> {
    let value = crate::tokenizer::read_json(index)?;
    let map = value["weight_map"].as_object();
    let mut files: Vec<String> =
        map.into_iter().flat_map(|m| m.values()).filter_map(|v| Some(v.as_str()?.to_string())).collect();
    files.sort_unstable();
    files.dedup();
    if files.is_empty() || !files.iter().all(|f| names::is_word(f)) {
        return Err(Error::file(index, "has no weight_map of files beside it; download it again"));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            "org/name/../../x.gguf",
            "org/name//x.gguf",
            "org/name/C:\\x.gguf",
        ] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
        let text = "org/name/x.gguf@v1";
        assert_eq!(HubId::parse(text).map(|id| id.to_string()).as_deref(), Some(text));
    }
}
