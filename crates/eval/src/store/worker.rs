//! Who is at work in a results folder: one file for each process, `.workers/<id>`, that says who it is and beats.
//!
//! Many processes may share a results folder, on one machine or on many. What they rely on is what NFS keeps too: a hard
//! link and a rename each happen once and as a whole, and a file that is opened shows what was written before it was
//! closed or synced elsewhere. No lock of the system is used, and no two clocks are compared: a process rewrites its
//! file's first byte now and then, so that the file system's own clock stands in the file's date, and whether another's
//! date is old is judged by the date of one's own.
//!
//! A process is gone when its file has not changed for [`limit`]; on the same machine at once, when its process
//! is not there any more.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use minicache_config::atomic::{self, Transient};
use serde::{Deserialize, Serialize};

use super::claim::Claim;
use super::failed::FailedCell;
use super::folder::check_folder;
use super::made::moment;
use super::{Result, SAMPLE, StoreError, reading, tidy, writing};

/// The folder of these files in a results folder.
pub(super) const WORKERS: &str = ".workers";
/// The environment variable with the seconds after which a process that does not beat is taken for gone.
pub const LIMIT: &str = "MINICACHE_STALE_SECONDS";
/// Without it: longer than attributes of files are cached by NFS, and than a file server is away when it restarts.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);
/// Beats within the limit, at least: some may be late.
const BEATS: u32 = 6;
const LONGEST_BEAT: Duration = Duration::from_secs(10);

/// What a process says of itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Holder {
    /// Its name among those at work.
    pub id: String,
    /// Its number on its machine.
    pub pid: u32,
    /// The machine.
    pub host: String,
    /// When it began.
    pub since: String,
    /// The command.
    pub command: String,
    /// Its job, where a scheduler started it: `1234_5` of Slurm.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub job: String,
    /// The boot of the machine, and the space in which its number counts.
    machine: String,
    /// When the system started it, in ticks since the boot.
    ticks: u64,
}

impl Holder {
    fn here(command: &str) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let array = variable("SLURM_ARRAY_JOB_ID").zip(variable("SLURM_ARRAY_TASK_ID"));
        let job = array.map(|(job, task)| format!("{job}_{task}")).or_else(|| variable("SLURM_JOB_ID"));
        let pid = std::process::id();
        Self {
            id: format!("{}{:012x}", atomic::tag(), rand::random::<u64>() >> 16),
            pid,
            host: host(),
            since: moment(),
            command: command.to_string(),
            job: job.unwrap_or_default(),
            machine: machine(),
            ticks: ticks(pid).unwrap_or_default(),
        }
    }

    /// Whether it was a process of this machine that is not there any more.
    fn has_ended(&self) -> bool {
        // Where the system does not tell machines apart, a number means nothing.
        self.machine.len() > 1 && self.machine == machine() && ticks(self.pid) != Some(self.ticks)
    }

    /// The [`atomic::tag`] of its temporary files.
    pub(super) fn tag(&self) -> &str {
        self.id.get(..atomic::tag().len()).unwrap_or_default()
    }
}

/// This machine's name.
fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string()
}

/// The boot of this machine and the space of process numbers.
fn machine() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let space = fs::read_link("/proc/self/ns/pid").map(|p| p.display().to_string()).unwrap_or_default();
    format!("{} {space}", boot.trim())
}

/// When the process `pid` was started, in ticks since the boot; `None` where it is not there, or dead and not yet
/// buried.
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before the last bracket may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    (!["Z", "X"].contains(fields.first()?)).then(|| fields.get(19)?.parse().ok())?
}

/// A worker's file, or a claim, as it was found.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Whose it is; nobody's where it could not be read.
    pub holder: Holder,
    /// The file system's time of its last beat.
    pub beat: SystemTime,
    /// The file itself, which all of a worker's claims are links of.
    pub(super) file: (u64, u64),
}

impl Seen {
    /// Reads the file at `path`; `None` where there is none.
    pub(super) fn at(path: &Path) -> Result<Option<Self>> {
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
        let read = open.and_then(|mut file| {
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok((text, file.metadata()?))
        });
        match read {
            Ok((text, about)) => Ok(Some(Self {
                holder: serde_json::from_str(&text).unwrap_or_default(),
                beat: about.modified().map_err(reading(path))?,
                file: (about.dev(), about.ino()),
            })),
            // Removed just now, here or on the file server.
            Err(e) if e.kind() == ErrorKind::NotFound || e.kind() == ErrorKind::StaleNetworkFileHandle => {
                Ok(None)
            }
            Err(e) => Err(reading(path)(e)),
        }
    }

    /// Whether its process is gone, at the file system's time `now`.
    pub fn is_gone(&self, now: SystemTime, limit: Duration) -> bool {
        self.holder.has_ended() || now.duration_since(self.beat).is_ok_and(|age| age > limit)
    }
}

/// Those whose files are in the results folder `results`, gone or not.
///
/// # Errors
/// A folder that cannot be read.
pub fn workers(results: &Path) -> Result<Vec<Seen>> {
    let folder = results.join(WORKERS);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(reading(&folder)(e)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(reading(&folder))?;
        // One on its way begins with a dot.
        if !entry.file_name().to_string_lossy().starts_with('.') {
            all.extend(Seen::at(&entry.path())?);
        }
    }
    Ok(all)
}

/// Seconds after which a process that does not beat is taken for gone: [`LIMIT`], or two minutes.
///
/// # Errors
/// The variable is no number of seconds.
pub fn limit() -> Result<Duration> {
    let Some(text) = std::env::var_os(LIMIT).filter(|text| !text.is_empty()) else {
        return Ok(DEFAULT_LIMIT);
    };
    let seconds = text.to_str().and_then(|t| t.parse::<f64>().ok()).filter(|s| (0.1..=86_400.0).contains(s));
    let asked = || StoreError::Limit { asked: text.to_string_lossy().into_owned() };
    seconds.map(Duration::from_secs_f64).ok_or_else(asked)
}

/// This process, at work in a results folder until this is dropped.
#[derive(Debug)]
pub struct Worker {
    file: Arc<Beating>,
    thread: Option<JoinHandle<()>>,
    /// The results folder.
    results: PathBuf,
    /// Whether the folder was made for this.
    made: bool,
}

/// The worker's file, as the thread that beats has it.
#[derive(Debug)]
struct Beating {
    path: PathBuf,
    holder: Holder,
    file: File,
    id: (u64, u64),
    limit: Duration,
    /// When its file was made, by the file system's clock.
    began: SystemTime,
    /// When it last beat, by this process's clock and by the file system's.
    last: Mutex<(Instant, SystemTime)>,
    over: Mutex<bool>,
    ended: Condvar,
    _name: Transient,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Beating {
    fn beat(&self) -> std::io::Result<()> {
        self.file.write_all_at(b"{", 0)?;
        self.file.sync_data()?;
        let date = self.file.metadata()?.modified()?;
        *locked(&self.last) = (Instant::now(), date);
        Ok(())
    }

    /// Beats until it is over. One that cannot be written is tried again with the next.
    fn run(&self) {
        let between = (self.limit / BEATS).min(LONGEST_BEAT);
        let mut over = locked(&self.over);
        while !*over {
            over = self.ended.wait_timeout(over, between).unwrap_or_else(PoisonError::into_inner).0;
            if !*over {
                let _ = self.beat();
            }
        }
    }
}

impl Worker {
    /// Begins work in the results folder `results`, which is made where it is not there, and removes what processes that
    /// are gone have left on their way. `command` is what others are told.
    ///
    /// # Errors
    /// A file is in the folder's place; a folder that cannot be made or written to, or is on a file system without hard
    /// links; a [`LIMIT`] that is none.
    pub fn of(results: &Path, command: &str) -> Result<Arc<Self>> {
        check_folder(results)?;
        let limit = limit()?;
        let made = !results.is_dir();
        let holder = Holder::here(command);
        let folder = results.join(WORKERS);
        let path = folder.join(&holder.id);
        let text = serde_json::to_string(&holder).map_err(|e| writing(&path)(e.into()))? + "\n";
        loop {
            fs::create_dir_all(&folder).map_err(writing(results))?;
            match atomic::create(&path, text.as_bytes()) {
                // Another has left, and taken the empty folder along.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                // As link(2) says it.
                Err(e) if [libc::EPERM, libc::ENOTSUP].map(Some).contains(&e.raw_os_error()) => {
                    return Err(StoreError::NoLinks(results.to_path_buf()));
                }
                created => {
                    created.map_err(writing(&path))?;
                    break;
                }
            }
        }
        let name = Transient::new(&path);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(writing(&path))?;
        let about = file.metadata().map_err(writing(&path))?;
        let began = about.modified().map_err(writing(&path))?;
        let file = Arc::new(Beating {
            began,
            last: Mutex::new((Instant::now(), began)),
            id: (about.dev(), about.ino()),
            path,
            holder,
            file,
            limit,
            over: Mutex::new(false),
            ended: Condvar::new(),
            _name: name,
        });
        let beating = file.clone();
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || beating.run());
        let thread = Some(thread.map_err(writing(&file.path))?);
        let worker = Arc::new(Self { file, thread, results: results.to_path_buf(), made });
        tidy::clear(results, &worker)?;
        Ok(worker)
    }

    /// The machine and the time, as a mark of a failed cell has them.
    pub(crate) fn signature() -> FailedCell {
        FailedCell { host: host(), since: moment(), ..FailedCell::default() }
    }

    /// The results folder.
    pub fn results(&self) -> &Path {
        &self.results
    }

    /// What it says of itself.
    pub fn holder(&self) -> &Holder {
        &self.file.holder
    }

    /// Its file, of which claims are made.
    pub(super) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Which file that is.
    pub(super) fn id(&self) -> (u64, u64) {
        self.file.id
    }

    /// When it began, by the file system's time.
    pub(super) fn began(&self) -> SystemTime {
        self.file.began
    }

    /// The file system's time.
    pub(super) fn now(&self) -> SystemTime {
        let (at, date) = *locked(&self.file.last);
        date + at.elapsed()
    }

    /// Whether the process behind a file is gone.
    pub(super) fn is_gone(&self, seen: &Seen) -> bool {
        seen.file != self.id() && seen.is_gone(self.now(), self.file.limit)
    }

    /// How many are at work in the results folder, this one among them.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn company(&self) -> Result<usize> {
        let others = workers(&self.results)?.into_iter().filter(|s| s.file != self.id() && !self.is_gone(s));
        Ok(1 + others.count())
    }

    /// Does `work` while nobody else does what goes by the same `name` in `folder`.
    ///
    /// # Errors
    /// Of `work`; a folder that cannot be written to.
    pub fn alone<T, E: From<StoreError>>(
        self: &Arc<Self>,
        folder: &Path,
        name: &str,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let claim = Claim::wait(folder, name, self)?;
        let done = work();
        drop(claim);
        done
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        *locked(&self.file.over) = true;
        self.file.ended.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // What cannot be removed now is removed by the next.
        let _ = tidy::clear(&self.results, self);
        let _ = fs::remove_file(&self.file.path);
        let _ = fs::remove_dir(self.results.join(WORKERS));
        if self.made {
            // Only one that nothing was put into.
            let _ = fs::remove_dir(&self.results);
        }
    }
}

/// The folders of workers that may be at work in `results`: its own, that of the folder above where this is the one for
/// the bundled sample, and that of the one below.
pub(super) fn all_workers(results: &Path) -> Result<Vec<Seen>> {
    let mut all = workers(results)?;
    all.extend(workers(&results.join(SAMPLE))?);
    if let Some(above) = results.parent().filter(|_| results.ends_with(SAMPLE)) {
        all.extend(workers(above)?);
    }
    Ok(all)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn many_work_in_a_folder_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        let first = Worker::of(&results, "minicache run a.toml").unwrap();
        let second = Worker::of(&results, "minicache run b.toml").unwrap();
        assert_eq!((first.company().unwrap(), second.company().unwrap()), (2, 2));
        let commands: Vec<String> =
            workers(&results).unwrap().into_iter().map(|seen| seen.holder.command).collect();
        assert!(commands.contains(&"minicache run b.toml".to_string()), "{commands:?}");
        drop(second);
        assert_eq!(first.company().unwrap(), 1);
        drop(first);
        assert!(!results.exists(), "made for the first, and empty");
    }

    #[test]
    fn who_has_ended_is_gone_at_once_and_who_does_not_beat_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let worker = Worker::of(dir.path(), "").unwrap();
        let mut seen = Seen::at(worker.path()).unwrap().unwrap();
        let (now, limit) = (seen.beat, Duration::from_secs(60));
        assert!(!seen.is_gone(now + limit, limit) && seen.is_gone(now + 2 * limit, limit));
        // The number is another process's by now.
        seen.holder.ticks += 1;
        assert!(seen.is_gone(now, limit));
        // On another machine it says nothing.
        seen.holder.machine = "another".into();
        assert!(!seen.is_gone(now, limit));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let there = ticks(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(there.is_some() && ticks(child.id()) != there);
    }

    #[test]
    fn a_beat_is_a_new_date_and_the_same_text() {
        let dir = tempfile::tempdir().unwrap();
        let worker = Worker::of(dir.path(), "a \"command\"").unwrap();
        let before = Seen::at(worker.path()).unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        worker.file.beat().unwrap();
        let after = Seen::at(worker.path()).unwrap().unwrap();
        assert!(after.beat > before.beat && after.holder == before.holder);
        assert!(worker.now() >= after.beat);
    }

    #[test]
    fn a_file_in_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        for path in [file.clone(), file.join("below")] {
            let e = Worker::of(&path, "").unwrap_err().to_string();
            assert!(e.contains("/f: is a file"), "{e}");
        }
    }
}
