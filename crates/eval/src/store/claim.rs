//! Claims: who computes a cell, or does what only one may do at a time.
//!
//! A claim is a hard link of its worker's file (see [`super::worker`]) under the name of what is claimed. Of several
//! links of one name one succeeds; the claim says whose it is, and beats as its worker does. A claim whose worker is gone
//! is taken away by a rename, which succeeds for one, and then it is anybody's.
//!
//! A process that was suspended for long may find that its claim is another's. It asks before it writes
//! ([`Claim::holds`]); what it writes in the moment between is the same as the other's, and is found twice and kept once.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use minicache_config::atomic;

use super::worker::{Seen, Worker};
use super::{Result, StoreError, writing};

/// The folder of claims in an experiment's, or in a results folder.
pub(super) const CLAIMS: &str = ".claims";
/// Between two looks at a claim that is waited for.
const BETWEEN: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_millis(500);

/// Something that this process has claimed, until this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    worker: Arc<Worker>,
}

impl Claim {
    /// Claims `name` in `folder`; `None` where another has.
    pub(super) fn take(folder: &Path, name: &str, worker: &Arc<Worker>) -> Result<Option<Self>> {
        let claims = folder.join(CLAIMS);
        let path = claims.join(name);
        loop {
            match fs::hard_link(worker.path(), &path) {
                Ok(()) => return Ok(Some(Self { path, worker: worker.clone() })),
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    if !worker.path().exists() {
                        return Err(StoreError::Forgotten(worker.results().to_path_buf()));
                    }
                    // Whoever finds it empty takes the folder along.
                    fs::create_dir_all(&claims).map_err(writing(&claims))?;
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(writing(&path)(e)),
            }
            let Some(seen) = Seen::at(&path)? else { continue };
            if seen.file == worker.id() {
                // A network that repeats a request may answer so to the one that succeeded.
                return Ok(Some(Self { path, worker: worker.clone() }));
            }
            if !worker.is_gone(&seen) {
                return Ok(None);
            }
            take_away(&path, &seen)?;
        }
    }

    /// As [`Claim::take`], once whoever has it gives it back or is gone.
    pub(super) fn wait(folder: &Path, name: &str, worker: &Arc<Worker>) -> Result<Self> {
        let mut between = BETWEEN;
        loop {
            if let Some(claim) = Self::take(folder, name, worker)? {
                return Ok(claim);
            }
            std::thread::sleep(between);
            between = (between * 2).min(LONGEST);
        }
    }

    /// Whether it still is this process's.
    pub(super) fn holds(&self) -> bool {
        Seen::at(&self.path).is_ok_and(|seen| seen.is_some_and(|seen| seen.file == self.worker.id()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.holds() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes the claim `seen` of one that is gone away from `path`, unless another has done so already.
pub(super) fn take_away(path: &Path, seen: &Seen) -> Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    let away = atomic::spare_name(folder);
    match fs::rename(path, &away) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        renamed => renamed.map_err(writing(path))?,
    }
    if Seen::at(&away)?.is_some_and(|moved| moved.file != seen.file) {
        // Another was faster, and this is its new claim. Where a third has the name by now, that one keeps it.
        let _ = fs::hard_link(&away, path);
    }
    fs::remove_file(&away).map_err(writing(&away))
}

/// The claims in `folder`, by name.
pub(super) fn claims(folder: &Path) -> Result<Vec<(String, Seen)>> {
    let claims = folder.join(CLAIMS);
    let names = match fs::read_dir(&claims) {
        Ok(entries) => entries.filter_map(|e| e.ok()?.file_name().into_string().ok()),
        Err(_) => return Ok(Vec::new()),
    };
    let mut all = Vec::new();
    for name in names.filter(|name| !name.starts_with('.')) {
        if let Some(seen) = Seen::at(&claims.join(&name))? {
            all.push((name, seen));
        }
    }
    Ok(all)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    }

    /// What a worker that was killed leaves: a file and claims of it.
    fn dead(results: &Path, id: &str, claimed: &[&str]) {
        let file = results.join(super::super::worker::WORKERS).join(id);
        let here: serde_json::Value = {
            let worker = Worker::of(results, "").unwrap();
            serde_json::from_str(&fs::read_to_string(worker.path()).unwrap()).unwrap()
        };
        let mut said = here;
        said["ticks"] = 1.into();
        said["id"] = id.into();
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, said.to_string()).unwrap();
        fs::create_dir_all(results.join(CLAIMS)).unwrap();
        for name in claimed {
            fs::hard_link(&file, results.join(CLAIMS).join(name)).unwrap();
        }
    }

    #[test]
    fn a_claim_is_one_worker_s_until_it_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = [0, 1].map(|_| Worker::of(dir.path(), "").unwrap());
        let claim = Claim::take(dir.path(), "cell", &a).unwrap().unwrap();
        assert!(Claim::take(dir.path(), "cell", &b).unwrap().is_none());
        assert!(Claim::take(dir.path(), "other", &b).unwrap().is_some());
        let found = claims(dir.path()).unwrap();
        assert_eq!((found.len(), &found[0].1.holder), (1, a.holder()));
        assert!(claim.holds());
        drop(claim);
        let claim = Claim::take(dir.path(), "cell", &b).unwrap().unwrap();
        // One that was taken for gone gives nothing back that is another's.
        let zombie = Claim { path: claim.path.clone(), worker: a.clone() };
        assert!(!zombie.holds());
        drop(zombie);
        assert!(claim.holds());
    }

    #[test]
    fn what_the_dead_hold_is_taken_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path();
        let taken = AtomicUsize::new(0);
        let all: Vec<String> = (0..40).map(|i| format!("cell{i}")).collect();
        // First those that live, which tidy when they begin.
        let workers: Vec<_> = (0..4).map(|_| Worker::of(results, "").unwrap()).collect();
        let file = results.join("dead");
        let mut said: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(workers[0].path()).unwrap()).unwrap();
        said["ticks"] = 1.into();
        fs::write(&file, said.to_string()).unwrap();
        fs::create_dir_all(results.join(CLAIMS)).unwrap();
        for name in &all {
            fs::hard_link(&file, results.join(CLAIMS).join(name)).unwrap();
        }
        fs::remove_file(&file).unwrap();
        let held = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for worker in &workers {
                scope.spawn(|| {
                    for name in &all {
                        if let Some(claim) = Claim::take(results, name, worker).unwrap() {
                            taken.fetch_add(1, SeqCst);
                            held.lock().unwrap().push(claim);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.load(SeqCst), all.len());
        assert_eq!(names(&results.join(CLAIMS)).len(), all.len(), "and nothing on its way");
        assert!(held.lock().unwrap().iter().all(Claim::holds));
    }

    #[test]
    fn what_is_done_alone_is_done_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let worker = Worker::of(dir.path(), "").unwrap();
                    for _ in 0..10 {
                        let done: Result<()> = worker.alone(dir.path(), "merge", || {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two at once");
                            std::thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                            Ok(())
                        });
                        done.unwrap();
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), [""; 0], "nothing is left");
    }

    #[test]
    fn the_next_worker_removes_what_the_dead_left() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sample/e")).unwrap();
        dead(dir.path(), "dead000000000000", &["report"]);
        let worker = Worker::of(dir.path(), "").unwrap();
        assert_eq!(names(&dir.path().join(super::super::worker::WORKERS)), [worker.holder().id.clone()]);
        drop(worker);
        assert_eq!(names(dir.path()), ["sample"]);
    }
}
