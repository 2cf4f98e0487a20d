//! Files that appear whole or not at all: everything that is written as a whole goes through here.
//!
//! A file is written beside its place under a name of its own, made last on disk and then renamed, so that a reader
//! or a killed process sees the old or the new file and nothing between. Temporary names are random and never opened
//! where something is there already, so no link at a name that can be guessed is followed. A process that is killed
//! leaves its temporary file, which [`remove_leftovers`] knows by its name; one that is asked to end removes it with
//! [`discard_all`].

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;

const PREFIX: &str = ".minicache-";
const SUFFIX: &str = ".tmp";
/// Random letters and digits between them.
const RANDOM: usize = 8;

/// Files that are to go when this process ends.
static TRANSIENT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn transient() -> MutexGuard<'static, Vec<PathBuf>> {
    TRANSIENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file that goes with its process: removed when this is dropped, and by [`discard_all`].
#[derive(Debug)]
pub struct Transient(PathBuf);

impl Transient {
    /// Takes charge of the file at `path`.
    pub fn new(path: &Path) -> Self {
        transient().push(path.to_path_buf());
        Self(path.to_path_buf())
    }
}

impl Drop for Transient {
    fn drop(&mut self) {
        let mut all = transient();
        // What cannot be removed any more is a leftover for the next run.
        let _ = fs::remove_file(&self.0);
        all.retain(|path| *path != self.0);
    }
}

/// Removes every file that is to go with this process: for one that is about to end without unwinding. From here on
/// no file is begun or put in its place any more: whoever tries waits for the end.
pub fn discard_all() {
    let all = transient();
    for path in all.iter() {
        let _ = fs::remove_file(path);
    }
    std::mem::forget(all);
}

/// A file on its way.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    target: Target,
}

#[derive(Debug)]
enum Target {
    /// A file beside the place.
    Beside(NamedTempFile),
    /// A device or a pipe: there is nothing to put in its place.
    Itself(File),
}

impl Writer {
    /// Begins the file that is to stand at `path`. Its folder must be there.
    ///
    /// # Errors
    /// A folder that is not there or cannot be written to.
    pub fn new(path: &Path) -> io::Result<Self> {
        let target = match fs::metadata(path) {
            Ok(there) if !there.is_file() && !there.is_dir() => {
                Target::Itself(fs::OpenOptions::new().write(true).open(path)?)
            }
            _ => {
                // The list is held, so that no file comes to be that it does not know.
                let mut all = transient();
                let file = tempfile::Builder::new()
                    .prefix(PREFIX)
                    .suffix(SUFFIX)
                    .rand_bytes(RANDOM)
                    // As any file: the user's mask takes from it.
                    .permissions(Permissions::from_mode(0o666))
                    .tempfile_in(folder(path))?;
                all.push(file.path().to_path_buf());
                Target::Beside(file)
            }
        };
        Ok(Self { path: path.to_path_buf(), target })
    }

    /// Where the bytes go, for libraries that write to a path.
    pub fn written_path(&self) -> &Path {
        match &self.target {
            Target::Beside(file) => file.path(),
            Target::Itself(_) => &self.path,
        }
    }

    /// Puts the file in its place; it is there for good when this returns.
    ///
    /// # Errors
    /// A full disk, or a place that cannot be written to; what was there before stays.
    pub fn commit(self) -> io::Result<()> {
        let path = self.path.clone();
        self.commit_as(&path)
    }

    /// As [`Writer::commit`], under another name in the same folder.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    pub fn commit_as(mut self, path: &Path) -> io::Result<()> {
        let Target::Beside(file) = &mut self.target else { return self.flush() };
        file.as_file().sync_all()?;
        {
            let mut all = transient();
            let temporary = file.path().to_path_buf();
            fs::rename(&temporary, path)?;
            all.retain(|known| *known != temporary);
            file.disable_cleanup(true);
        }
        // The rename itself lasts only once the folder is on disk.
        File::open(folder(path))?.sync_all()
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.target {
            Target::Beside(file) => file.write(bytes),
            Target::Itself(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.target {
            Target::Beside(file) => file.flush(),
            Target::Itself(file) => file.flush(),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Target::Beside(file) = &self.target else { return };
        let mut all = transient();
        if let Some(at) = all.iter().position(|known| known == file.path()) {
            let _ = fs::remove_file(all.swap_remove(at));
        }
    }
}

/// Writes `bytes` to `path`. A file that holds them already is left alone, its date with it.
///
/// # Errors
/// The file cannot be written; what was there before stays.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let there = fs::symlink_metadata(path);
    if there.is_ok_and(|t| t.is_file() && t.len() == bytes.len() as u64)
        && fs::read(path).is_ok_and(|old| old == bytes)
    {
        return Ok(());
    }
    let mut writer = Writer::new(path)?;
    writer.write_all(bytes)?;
    writer.commit()
}

/// Whether a file of this name was on its way when its process was killed.
pub fn is_leftover(name: &std::ffi::OsStr) -> bool {
    let random = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
    random.is_some_and(|r| r.len() == RANDOM && r.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Removes what killed processes left in `folder`: for whoever knows that none is at work there. Folders below it are
/// not looked into, and nothing else is touched.
///
/// # Errors
/// A folder that cannot be read, or a file that cannot be removed.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if is_leftover(&entry.file_name()) && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.csv");
        replace(&path, b"one").unwrap();
        let mut writer = Writer::new(&path).unwrap();
        writer.write_all(b"tw").unwrap();
        assert!(is_leftover(writer.written_path().file_name().unwrap()));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        writer.write_all(b"o").unwrap();
        writer.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        // One that is given up goes.
        Writer::new(&path).unwrap().write_all(b"three").unwrap();
        assert_eq!(
            (names(dir.path()), fs::read(&path).unwrap()),
            (vec!["a.csv".to_string()], b"two".to_vec())
        );
        // The mode is that of any new file.
        fs::write(dir.path().join("plain"), "").unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("a.csv"), mode("plain"));
    }

    #[test]
    fn a_file_that_holds_the_bytes_already_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"one").unwrap();
        let date = || fs::metadata(&path).unwrap().modified().unwrap();
        let before = date();
        replace(&path, b"one").unwrap();
        assert_eq!(before, date());
    }

    #[test]
    fn links_are_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (link, aim) = (dir.path().join("run.json"), dir.path().join("precious"));
        fs::write(&aim, "precious").unwrap();
        std::os::unix::fs::symlink(&aim, &link).unwrap();
        replace(&link, b"precious").unwrap();
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
        replace(&link, b"new").unwrap();
        assert_eq!(
            (fs::read(&aim).unwrap(), fs::read(&link).unwrap()),
            (b"precious".to_vec(), b"new".to_vec())
        );
    }

    #[test]
    fn a_device_is_written_to_and_stays_one() {
        replace(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        if Path::new("/dev/full").exists() {
            assert_eq!(replace(Path::new("/dev/full"), b"x").unwrap_err().kind(), ErrorKind::StorageFull);
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(replace(&dir.path().join("folder"), b"x").is_err());
        assert!(replace(&dir.path().join("absent/file"), b"x").is_err());
        assert_eq!(names(dir.path()), ["folder"]);
    }

    #[test]
    fn only_leftovers_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let keep = [".minicache-abcdefgh.tmpx", ".minicache-abc.tmp", "a.tmp", "minicache-abcdefgh.tmp"];
        for name in keep.iter().chain(&[".minicache-aB3dEfg9.tmp"]) {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", dir.path().join(".minicache-llllllll.tmp")).unwrap();
        fs::create_dir(dir.path().join(".minicache-dddddddd.tmp")).unwrap();
        remove_leftovers(dir.path()).unwrap();
        let left = names(dir.path());
        assert!(keep.iter().all(|k| left.contains(&(*k).to_string())), "{left:?}");
        assert_eq!(left.len(), keep.len() + 2);
        remove_leftovers(&dir.path().join("absent")).unwrap();
    }
}
