//! What processes that are gone have left in a results folder, and its removal while others are at work.

use std::fs;
use std::path::{Path, PathBuf};

use minicache_config::atomic;

use super::claim::{CLAIMS, claims, take_away};
use super::worker::{WORKERS, Worker, all_workers};
use super::{FAILED, Result, SAMPLE, UNMERGED, reading, samples, writing};

/// Removes temporary files, claims and workers' files of processes that are gone, in the results folder, in the folders
/// of its experiments, and in those of runs on the bundled sample. What is of a process at work stays, and so does
/// everything else.
pub(super) fn clear(results: &Path, worker: &Worker) -> Result<()> {
    let mut all = vec![results.to_path_buf()];
    for folder in folders(results)? {
        if folder.ends_with(SAMPLE) {
            all.extend(folders(&folder)?);
        }
        all.push(folder);
    }
    // First the files and then who is at work: whoever made one of them had said its name before.
    let mut left = Vec::new();
    for folder in &all {
        for below in ["", samples::FOLDER, CLAIMS, UNMERGED, FAILED, WORKERS] {
            let folder = folder.join(below);
            left.extend(atomic::leftovers(&folder).map_err(reading(&folder))?);
        }
    }
    let living: Vec<_> = all_workers(results)?.into_iter().filter(|seen| !worker.is_gone(seen)).collect();
    for (path, tag) in left {
        if tag != atomic::tag() && !living.iter().any(|seen| seen.holder.tag() == tag) {
            removed(&path)?;
        }
    }
    for folder in &all {
        for (name, seen) in claims(folder)? {
            if worker.is_gone(&seen) {
                take_away(&folder.join(CLAIMS).join(name), &seen)?;
            }
        }
        // Those that are empty.
        let _ = fs::remove_dir(folder.join(CLAIMS));
        let _ = fs::remove_dir(folder.join(UNMERGED));
        let _ = fs::remove_dir(folder.join(FAILED));
    }
    for seen in super::worker::workers(results)? {
        if worker.is_gone(&seen) && !seen.holder.id.is_empty() {
            removed(&results.join(WORKERS).join(&seen.holder.id))?;
        }
    }
    Ok(())
}

/// Removes a file that another may have removed already.
fn removed(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(writing(path)(e)),
        _ => Ok(()),
    }
}

/// The folders in `folder`, links and hidden ones left out.
pub(super) fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(reading(folder))?;
    let shown = |e: &fs::DirEntry| !e.file_name().to_string_lossy().starts_with('.');
    let is_folder = |e: &fs::DirEntry| shown(e) && e.file_type().is_ok_and(|t| t.is_dir());
    Ok(entries.into_iter().filter(is_folder).map(|e| e.path()).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_runs_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let left = ["", "e", "e/samples", "e/.claims", "sample", "sample/e", "sample/e/samples"];
        let kept = ["e/deeper", ".hidden"];
        let at_work = Worker::of(dir.path(), "").unwrap();
        let ours = format!(".minicache-{}0000.tmp", atomic::tag());
        for folder in left.iter().chain(&kept) {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
            for name in [".minicache-01234567.tmp", "mine.tmp", &ours] {
                fs::write(dir.path().join(folder).join(name), "x").unwrap();
            }
        }
        drop(Worker::of(dir.path(), "").unwrap());
        let there = |folder: &str, name: &str| dir.path().join(folder).join(name).exists();
        assert!(left.iter().all(|f| !there(f, ".minicache-01234567.tmp")));
        assert!(kept.iter().all(|f| there(f, ".minicache-01234567.tmp")));
        assert!(left.iter().chain(&kept).all(|f| there(f, "mine.tmp") && there(f, &ours)));
        drop(at_work);
    }
}
