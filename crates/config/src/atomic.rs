//! Files that appear whole or not at all: everything that is written as a whole goes through here.
//!
//! A file is written beside its place under a name of its own, made last on disk and then renamed, so that a reader
//! or a killed process sees the old or the new file and nothing between. Temporary names are random and never opened
//! where something is there already, so no link at a name that can be guessed is followed. A process that is killed
//! leaves its temporary file, which [`leftovers`] knows by its name, as it does whose it is ([`tag`]); one that is asked
//! to end removes it with [`discard_all`].

use std::fs::{self, File, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;

const PREFIX: &str = ".minicache-";
const SUFFIX: &str = ".tmp";
/// Letters and digits between them: those of the process, then random ones.
const OF_PROCESS: usize = 4;
const RANDOM: usize = 4;

/// This process's own letters and digits.
static TAG: LazyLock<String> = LazyLock::new(|| {
    // Seeded by the system, apart in every process.
    let mut number = RandomState::new().hash_one(std::process::id());
    let mut digit = || {
        let digit = char::from_digit((number % 36) as u32, 36);
        number /= 36;
        digit.unwrap_or('0')
    };
    (0..OF_PROCESS).map(|_| digit()).collect()
});

/// What the names of this process's temporary files begin with, after what all have in common: four letters and digits.
pub fn tag() -> &'static str {
    &TAG
}

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
                    .prefix(&format!("{PREFIX}{}", tag()))
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

/// Writes `bytes` to `path` unless something is there already; gives whether it did. Of several processes that try at
/// once exactly one does, on network file systems too: the file gets its name by a link, and one link of a name succeeds.
///
/// # Errors
/// The file cannot be written, or a file system without hard links.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    if fs::symlink_metadata(path).is_ok() {
        return Ok(false);
    }
    let mut writer = Writer::new(path)?;
    writer.write_all(bytes)?;
    let Target::Beside(file) = &writer.target else { return Ok(false) };
    file.as_file().sync_all()?;
    match fs::hard_link(file.path(), path) {
        Ok(()) => Ok(true),
        // A network that repeats a request may answer so to the one that succeeded.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(file.as_file().metadata()?.nlink() > 1),
        Err(e) => Err(e),
    }
}

/// A name in `folder` that nothing has and that [`leftovers`] knows as this process's.
pub fn spare_name(folder: &Path) -> PathBuf {
    let random = RandomState::new().hash_one(folder) % 36u64.pow(RANDOM as u32);
    let digits = (0..RANDOM as u32).map(|i| char::from_digit((random / 36u64.pow(i) % 36) as u32, 36));
    let digits: String = digits.map(|d| d.unwrap_or('0')).collect();
    folder.join(format!("{PREFIX}{}{digits}{SUFFIX}", tag()))
}

/// The process ([`tag`]) whose temporary file would have this name.
fn owner(name: &std::ffi::OsStr) -> Option<String> {
    let of = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.strip_suffix(SUFFIX))?;
    let fits = of.len() == OF_PROCESS + RANDOM && of.bytes().all(|b| b.is_ascii_alphanumeric());
    fits.then(|| of[..OF_PROCESS].to_string())
}

/// Temporary files in `folder`, each with the [`tag`] of its process, which may be at work or killed. Folders below it
/// are not looked into.
///
/// # Errors
/// A folder that cannot be read.
pub fn leftovers(folder: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Some(tag) = owner(&entry.file_name())
            // One that is gone by now was at work.
            && entry.file_type().is_ok_and(|t| t.is_file())
        {
            found.push((entry.path(), tag));
        }
    }
    Ok(found)
}

/// Removes what killed processes left in `folder`: for whoever knows that none is at work there. Nothing else is touched.
///
/// # Errors
/// A folder that cannot be read, or a file that cannot be removed.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    leftovers(folder)?.iter().try_for_each(|(path, _)| fs::remove_file(path))
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
        assert_eq!(
            leftovers(dir.path()).unwrap(),
            [(writer.written_path().to_path_buf(), tag().to_string())]
        );
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
    fn of_many_who_create_a_file_one_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("id");
        let made: usize = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8u8)
                .map(|i| {
                    scope.spawn({
                        let path = &path;
                        move || create(path, &[i]).unwrap()
                    })
                })
                .collect();
            all.into_iter().map(|t| usize::from(t.join().unwrap())).sum()
        });
        assert_eq!((made, names(dir.path())), (1, vec!["id".to_string()]));
        let before = fs::read(&path).unwrap();
        assert!(!create(&path, b"other").unwrap() && fs::read(&path).unwrap() == before);
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
        let spare = spare_name(dir.path());
        fs::write(&spare, "x").unwrap();
        let mut tags: Vec<String> = leftovers(dir.path()).unwrap().into_iter().map(|(_, tag)| tag).collect();
        tags.sort_by_key(|t| *t == "aB3d");
        assert_eq!(tags, [tag(), "aB3d"]);
        remove_leftovers(dir.path()).unwrap();
        let left = names(dir.path());
        assert!(keep.iter().all(|k| left.contains(&(*k).to_string())), "{left:?}");
        assert_eq!(left.len(), keep.len() + 2);
        remove_leftovers(&dir.path().join("absent")).unwrap();
    }
}
