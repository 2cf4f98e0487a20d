//! The cache folder, laid out as `huggingface_hub` lays it out, so that either uses what the other downloaded:
//!
//! ```text
//! models--ORG--NAME/blobs/ETAG                  contents (ETAG.incomplete while they come)
//! models--ORG--NAME/snapshots/COMMIT/PATH       links to them
//! models--ORG--NAME/refs/BRANCH                 the commit that a branch stood for
//! .locks/models--ORG--NAME/ETAG.lock            held while a blob is written; the system frees it with its process
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::names;
use super::repository::Kind;

/// One repository in the cache.
#[derive(Debug)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, kind: Kind, repo: &str) -> Self {
        let name = format!("{}--{}", kind.plural(), repo.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The folder of the files of a branch, tag or commit, where the cache knows the commit.
    pub(super) fn snapshot_of(&self, revision: &str) -> Option<PathBuf> {
        if !names::is_path(revision) {
            return None;
        }
        if names::is_word(revision) && self.snapshot(revision).is_dir() {
            return Some(self.snapshot(revision));
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        names::is_word(commit.trim()).then(|| self.snapshot(commit.trim()))
    }

    /// A file at a branch, tag or commit, if the cache has it.
    pub(super) fn file(&self, revision: &str, path: &str) -> Option<PathBuf> {
        let file = self.snapshot_of(revision).filter(|_| names::is_path(path))?.join(path);
        file.is_file().then_some(file)
    }

    /// Where a blob lies once it is whole.
    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.folder.join("blobs").join(name)
    }

    /// Where a blob grows.
    pub(super) fn part(&self, name: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{name}.incomplete"))
    }

    /// Makes the caller the only one that writes a blob, for as long as it holds the file. `waiting` is told once if
    /// another process has to be waited for. `None` on a file system without locks: writers of one blob then write
    /// the same bytes to the same places, and what comes of it is checked like any download.
    pub(super) fn lock(&self, name: &str, waiting: impl FnOnce(&Path)) -> io::Result<Option<File>> {
        fs::create_dir_all(self.folder.join("blobs"))?;
        fs::create_dir_all(&self.locks)?;
        let path = self.locks.join(format!("{name}.lock"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) => {
                    if let Some(tell) = waiting.take() {
                        tell(&path);
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Turns the finished part of a blob into the blob.
    pub(super) fn finish(&self, name: &str) -> io::Result<()> {
        fs::rename(self.part(name), self.blob(name))
            .or_else(|e| if self.blob(name).is_file() { Ok(()) } else { Err(e) })
    }

    /// Makes a blob the contents of a commit's file, and gives the file's path.
    pub(super) fn link(&self, blob: &str, commit: &str, path: &str) -> io::Result<PathBuf> {
        let file = self.snapshot(commit).join(path);
        if file.is_file() {
            return Ok(file);
        }
        let folder = file.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder)?;
        // A link to a blob that is gone.
        fs::remove_file(&file).or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
        let up = "../".repeat(2 + path.matches('/').count());
        match symlink(&format!("{up}blobs/{blob}"), &file) {
            Ok(()) => Ok(file),
            // Another process was as quick.
            Err(_) if file.is_file() => Ok(file),
            // A file system without links.
            Err(_) => {
                fs::copy(self.blob(blob), self.part(blob))?;
                fs::rename(self.part(blob), &file)?;
                Ok(file)
            }
        }
    }

    /// Notes the commit that a branch or tag stands for.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> io::Result<()> {
        let path = self.folder.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|old| old == commit) {
            return Ok(());
        }
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        // Written aside, so that no reader sees half a commit.
        let mut aside = path.clone().into_os_string();
        aside.push(format!(".{}.tmp", std::process::id()));
        fs::write(&aside, commit)?;
        fs::rename(&aside, &path)
    }
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}
