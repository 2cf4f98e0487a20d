//! A repository of the hub: its commit, its files, and why they could not be had.

use std::path::{Path, PathBuf};

use minicache_config::shown;
use serde::Deserialize;

use super::cache::RepoCache;
use super::client::{Client, Trouble};
use super::download::{Wanted, download, patiently};
use super::{Failure, Hub, HubId, names};
use crate::{Error, Result};

pub(super) const CONFIG: &str = "config.json";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";
/// Fetched where a repository has them; before the weights, so that weights that are whole mean that all is there.
const SMALL: [&str; 5] =
    [CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// Its word in the hub's interface and in the cache's folders.
    pub(super) fn plural(self) -> &'static str {
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

/// What the hub says of a repository at a revision.
#[derive(Debug, Deserialize)]
#[serde(from = "Answer")]
pub(super) struct Info {
    pub(super) commit: String,
    /// Its files, of those that have plain names.
    pub(super) files: Vec<String>,
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
pub(super) struct Repository<'a> {
    pub(super) hub: &'a Hub,
    pub(super) kind: Kind,
    pub(super) repo: &'a str,
    pub(super) client: Client,
    pub(super) cache: RepoCache,
}

impl Repository<'_> {
    /// The commit that `revision` stands for, and its files.
    pub(super) fn info(&self, revision: &str) -> std::result::Result<Info, Trouble> {
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
    pub(super) fn file(&self, wanted: Wanted<'_>) -> std::result::Result<(PathBuf, String), Trouble> {
        let page = self.kind.page(self.repo);
        let url = self.client.url(&format!("{page}/resolve/{}/{}", escaped(wanted.revision), wanted.path))?;
        download(&self.client, &self.cache, &url, wanted, self.hub.progress)
    }

    /// One of a model's files at the commit that `info` names.
    pub(super) fn file_of(&self, id: &HubId, info: &Info, path: &str) -> Result<PathBuf> {
        let present = self.cache.snapshot(&info.commit).join(path);
        if present.is_file() {
            return Ok(present);
        }
        let done = self.file(Wanted { revision: &info.commit, pinned: true, path });
        let place = if id.file.is_some() { id.to_string() } else { format!("{id}, {path}") };
        Ok(done.map_err(|e| self.explain(&place, e))?.0)
    }

    /// A model's files at the commit that `info` names.
    pub(super) fn model(&self, id: &HubId, info: &Info) -> Result<()> {
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
    pub(super) fn explain(&self, place: &str, trouble: Trouble) -> Failure {
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

/// The files that a `model.safetensors.index.json` names, sorted.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
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
