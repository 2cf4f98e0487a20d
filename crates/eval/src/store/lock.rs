//! One owner per results folder.
//!
//! The owner holds a lock on `.lock` in the folder. The lock is the system's and ends with its process, however that
//! ends; the file only says who holds it, and one that a killed process left means nothing.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use minicache_config::atomic::{self, Transient};
use serde::{Deserialize, Serialize};

use super::made::moment;
use super::{Result, SAMPLE, StoreError, reading, writing};

const LOCK: &str = ".lock";
const CLONE: &str = ".clone";
/// Characters of another process's command that are shown.
const COMMAND_SHOWN: usize = 160;
/// A holder that is just coming or going is waited for this often.
const TRIES: usize = 10;
const BETWEEN: Duration = Duration::from_millis(20);

/// What the lock file says.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Holder {
    pid: u32,
    host: String,
    since: String,
    command: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plain =
            |text: &str| -> String { text.chars().filter(|c| !c.is_control()).take(COMMAND_SHOWN).collect() };
        if self.pid == 0 {
            return f.write_str("one that has not said its name");
        }
        let (host, since, command) = (plain(&self.host), plain(&self.since), plain(&self.command));
        write!(f, "process {} on {host} since {since} ({command})", self.pid)
    }
}

/// This process owns a results folder until this is dropped.
#[derive(Debug)]
pub struct Owner {
    /// The lock's file; `None` only while this is dropped.
    name: Option<Transient>,
    lock: File,
    /// The folder, where it was made for this.
    made: Option<PathBuf>,
    /// Of a folder for runs on the bundled sample: the results folder that it is in.
    _above: Option<Box<Owner>>,
}

impl Owner {
    /// Takes the results folder `results`, which is made where it is not there, and removes what killed processes left
    /// on their way in it and in the folders of its experiments. `command` is what other processes are told.
    ///
    /// # Errors
    /// Another process owns the folder ([`StoreError::Held`]); a file is in the folder's place; a folder that cannot be
    /// made or written to.
    pub fn of(results: &Path, command: &str) -> Result<Self> {
        check_folder(results)?;
        // A run in the folder above works in its `sample` too.
        let above = results.parent().filter(|p| results.ends_with(SAMPLE) && p.join(LOCK).exists());
        let above = above.map(|p| Self::of(p, command).map(Box::new)).transpose()?;
        let made = (!results.is_dir()).then(|| results.to_path_buf());
        let path = results.join(LOCK);
        let mut tries = 0;
        let lock = loop {
            // Each time: an owner that leaves an empty folder takes it along.
            fs::create_dir_all(results).map_err(writing(results))?;
            let file = match open(&path) {
                Err(e) if e.kind() == ErrorKind::NotFound && tries < TRIES => {
                    tries += 1;
                    continue;
                }
                opened => opened.map_err(writing(&path))?,
            };
            match file.try_lock() {
                // Its last owner may have removed it between the two calls: then the name stands for another file.
                Ok(()) if is_at(&file, &path) => break file,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(BETWEEN);
                }
                Err(TryLockError::WouldBlock) => {
                    let holder = said(file).to_string();
                    return Err(StoreError::Held { folder: results.to_path_buf(), holder });
                }
                Err(TryLockError::Error(e)) => {
                    // A file system without locks.
                    let care = "make sure that no other run uses it";
                    eprintln!("{}: the folder cannot be locked ({e}); {care}", results.display());
                    break file;
                }
            }
        };
        let owner = Self { name: Some(Transient::new(&path)), lock, made, _above: above };
        owner.say(command).map_err(writing(&path))?;
        tidy(results)?;
        Ok(owner)
    }

    fn say(&self, command: &str) -> std::io::Result<()> {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let holder = Holder {
            pid: std::process::id(),
            host: host.trim().to_string(),
            since: moment(),
            command: command.to_string(),
        };
        let text = serde_json::to_string(&holder)? + "\n";
        let mut file = &self.lock;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(text.as_bytes())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // While it is still locked, and once: then the name may be another owner's.
        drop(self.name.take());
        if let Some(made) = &self.made {
            // Only one that nothing was put into.
            let _ = fs::remove_dir(made);
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    // Not through a link that somebody put there.
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
    options.open(path)
}

/// Whether the open `file` is the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let of = |m: fs::Metadata| (m.dev(), m.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => of(ours) == of(there),
        _ => false,
    }
}

fn said(mut file: File) -> Holder {
    let mut text = String::new();
    let read = file.read_to_string(&mut text);
    read.ok().and_then(|_| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Removes what killed processes left on their way in the results folder and its experiments' folders, those of runs on
/// the bundled sample included. A folder with a lock of its own is another owner's.
fn tidy(results: &Path) -> Result<()> {
    let clear = |folder: &Path| atomic::remove_leftovers(folder).map_err(writing(folder));
    clear(results)?;
    for experiment in folders(results)? {
        if experiment.join(LOCK).exists() {
            continue;
        }
        clear(&experiment)?;
        clear(&experiment.join(super::samples::FOLDER))?;
        if experiment.ends_with(SAMPLE) {
            for experiment in folders(&experiment)? {
                clear(&experiment)?;
                clear(&experiment.join(super::samples::FOLDER))?;
            }
        }
    }
    Ok(())
}

/// The folders in `folder`, links left out.
fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(reading(folder))?;
    let is_folder = |e: &fs::DirEntry| e.file_type().is_ok_and(|t| t.is_dir());
    Ok(entries.into_iter().filter(is_folder).map(|e| e.path()).collect())
}

/// Checks that no file is in the place of the results folder or of one above it.
///
/// # Errors
/// [`StoreError::NotAFolder`].
pub fn check_folder(results: &Path) -> Result<()> {
    match results.ancestors().find(|a| a.exists() && !a.is_dir()) {
        Some(file) => Err(StoreError::NotAFolder(file.to_path_buf())),
        None => Ok(()),
    }
}

/// The id of the results folder `results`, which tells rows that were computed for it from rows that came with the
/// checkout; `None` before the first run. It lies in `.clone`, which is no part of what is committed.
pub fn clone_id(results: &Path) -> Option<String> {
    let text = fs::read_to_string(results.join(CLONE)).ok()?;
    let id = text.trim();
    (!id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.to_string())
}

/// As [`clone_id`], made where there is none.
///
/// # Errors
/// A folder that cannot be written to.
pub fn make_clone_id(results: &Path) -> Result<String> {
    if let Some(id) = clone_id(results) {
        return Ok(id);
    }
    let id = format!("{:016x}", rand::random::<u64>());
    let path = results.join(CLONE);
    fs::create_dir_all(results).map_err(writing(results))?;
    atomic::replace(&path, format!("{id}\n").as_bytes()).map_err(writing(&path))?;
    Ok(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner_who_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        let owner = Owner::of(&results, "minicache run a.toml").unwrap();
        let e = Owner::of(&results, "minicache run b.toml").unwrap_err();
        assert!(matches!(e, StoreError::Held { .. }));
        let said = e.to_string();
        let pid = std::process::id().to_string();
        assert!(said.contains(&pid) && said.contains("run a.toml") && said.lines().count() == 1, "{said}");
        let other = Owner::of(&dir.path().join("other"), "").unwrap();
        let sample = results.join("sample");
        let e = Owner::of(&sample, "").unwrap_err();
        assert!(matches!(e, StoreError::Held { folder, .. } if folder == results) && !sample.exists());
        drop(owner);
        assert!(!results.exists(), "made for the lock, and empty");
        // What a killed process left is no obstacle.
        fs::create_dir(&results).unwrap();
        fs::write(results.join(LOCK), "{\"pid\": 1}").unwrap();
        drop(Owner::of(&results, "").unwrap());
        assert!(results.is_dir() && !results.join(LOCK).exists());
        drop(other);
    }

    #[test]
    fn owners_come_and_go_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (results, inside) = (dir.path().to_path_buf(), std::sync::atomic::AtomicUsize::new(0));
        use std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Ok(owner) = Owner::of(&results, "") {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two owners");
                            std::thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                            drop(owner);
                        }
                    }
                });
            }
        });
        assert!(!results.join(LOCK).exists());
    }

    #[test]
    fn a_file_or_a_link_in_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        for path in [file.clone(), file.join("below")] {
            let e = Owner::of(&path, "").unwrap_err().to_string();
            assert!(e.contains("/f: is a file"), "{e}");
        }
        std::os::unix::fs::symlink(&file, dir.path().join(LOCK)).unwrap();
        assert!(matches!(Owner::of(dir.path(), "").unwrap_err(), StoreError::Write { .. }));
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn what_killed_runs_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let left = ["", "e", "e/samples", "sample", "sample/e", "sample/e/samples"];
        let kept = ["other", "e/deeper"];
        for folder in left.iter().chain(&kept) {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
            fs::write(dir.path().join(folder).join(".minicache-01234567.tmp"), "x").unwrap();
            fs::write(dir.path().join(folder).join("mine.tmp"), "x").unwrap();
        }
        fs::write(dir.path().join("other/.lock"), "").unwrap();
        drop(Owner::of(dir.path(), "").unwrap());
        let there = |folder: &str, name: &str| dir.path().join(folder).join(name).exists();
        assert!(left.iter().all(|f| !there(f, ".minicache-01234567.tmp")));
        assert!(kept.iter().all(|f| there(f, ".minicache-01234567.tmp")));
        assert!(left.iter().chain(&kept).all(|f| there(f, "mine.tmp")));
    }

    #[test]
    fn a_folder_keeps_its_id() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(clone_id(dir.path()), None);
        let id = make_clone_id(dir.path()).unwrap();
        assert_eq!(
            (make_clone_id(dir.path()).unwrap(), clone_id(dir.path())),
            (id.clone(), Some(id.clone()))
        );
        fs::write(dir.path().join(CLONE), "../../x").unwrap();
        assert_ne!(make_clone_id(dir.path()).unwrap(), id);
    }
}
