//! A cell's per-sample file: one JSON object per line, appended as samples finish.
//!
//! A line says which sample of the cell it is (`at`), what it was computed from (`of`, a hash), and carries a check of
//! its own text (`sum`), in which the cell's key has a part. A line counts where all three are right, wherever it stands;
//! whatever else is in the file (torn, damaged, doubled, of another run) is dropped with the next write, and those
//! samples are computed again. Once all samples are there the file has them in order.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minicache_config::atomic;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::claim::Claim;
use super::{Result, StoreError, reading, writing};

/// The folder of per-sample files in an experiment's.
pub(super) const FOLDER: &str = "samples";

/// The last field of a line, up to its value.
const SUM: &str = ",\"sum\":\"";

/// What a sample is computed from, as a hash.
pub fn digest(from: &impl Serialize) -> String {
    // What cannot be written as JSON has no content that could change.
    short(&serde_json::to_vec(from).unwrap_or_default(), &[])
}

fn short(a: &[u8], b: &[u8]) -> String {
    let hash = Sha256::new().chain_update(a).chain_update(b).finalize();
    hash.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// What a line says of itself.
#[derive(Deserialize)]
struct Tail {
    at: usize,
    of: String,
}

/// A cell's samples, those on disk and those still to come.
#[derive(Debug)]
pub struct Samples<T> {
    path: PathBuf,
    /// The cell's key.
    key: String,
    /// What each sample is computed from.
    of: Vec<String>,
    samples: Vec<Option<T>>,
    /// The samples in the file, in its order.
    order: Vec<usize>,
    /// The file holds these and nothing else.
    sound: bool,
    file: Option<File>,
    /// What allows to write to it; `None` where nobody else is at work.
    claim: Option<Arc<Claim>>,
}

impl<T: Serialize + DeserializeOwned> Samples<T> {
    /// Reads what earlier runs have left of the samples that are computed from `of` (see [`digest`]).
    pub(super) fn open(path: &Path, key: &str, of: Vec<String>, claim: Option<Arc<Claim>>) -> Result<Self> {
        let samples = of.iter().map(|_| None).collect();
        let (path, key, order) = (path.to_path_buf(), key.to_string(), Vec::new());
        let mut read = Self { path, key, of, samples, order, sound: true, file: None, claim };
        read.sound = read.take(&read.path.clone())?;
        Ok(read)
    }

    /// Takes the samples that are missing from the file of the same cell at `path`, another experiment's. The next write
    /// puts them into the cell's own file.
    pub(super) fn adopt(&mut self, path: &Path) -> Result<()> {
        let before = self.order.len();
        self.take(path)?;
        self.sound &= self.order.len() == before;
        Ok(())
    }

    /// Takes from the file at `path` the samples that are not there yet; gives whether that was all that the file holds.
    fn take(&mut self, path: &Path) -> Result<bool> {
        let mut all = true;
        for line in lines(path)?.unwrap_or_default().split_inclusive(|&b| b == b'\n') {
            match parse::<T>(&self.key, line) {
                Some((tail, sample)) if self.of.get(tail.at) == Some(&tail.of) && !self.has(tail.at) => {
                    self.samples[tail.at] = Some(sample);
                    self.order.push(tail.at);
                }
                _ => all = false,
            }
        }
        Ok(all)
    }

    /// Whether the sample `at` is there.
    pub fn has(&self, at: usize) -> bool {
        self.samples.get(at).is_some_and(Option::is_some)
    }

    /// Whether all samples are there.
    pub fn is_whole(&self) -> bool {
        self.samples.iter().all(Option::is_some)
    }

    /// The samples that are there, in their own order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.samples.iter().flatten()
    }

    /// Writes samples with their places, all in one write, and makes them last. Those that are there already stay.
    ///
    /// # Errors
    /// The file cannot be written; a torn line is found and dropped by the next run. Another process has taken the cell
    /// over.
    pub fn put(&mut self, new: impl IntoIterator<Item = (usize, T)>) -> Result<()> {
        let new: Vec<(usize, T)> = new.into_iter().filter(|(at, _)| !self.has(*at)).collect();
        self.check()?;
        let mut bytes = Vec::new();
        for (at, sample) in &new {
            self.line(*at, sample, &mut bytes).map_err(writing(&self.path))?;
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.opened()?,
        };
        // Until it is known to be written the file counts as damaged.
        self.sound = false;
        file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(writing(&self.path))?;
        (self.sound, self.file) = (true, Some(file));
        for (at, sample) in new {
            self.samples[at] = Some(sample);
            self.order.push(at);
        }
        Ok(())
    }

    /// Puts the file in order, for when all samples are there.
    ///
    /// # Errors
    /// The file cannot be written; another process has taken the cell over.
    pub fn settle(&mut self) -> Result<()> {
        if self.sound && self.order.is_sorted() {
            return Ok(());
        }
        self.check()?;
        self.order.sort_unstable();
        self.rewrite()
    }

    /// Makes sure that no other process writes to the file.
    fn check(&self) -> Result<()> {
        match &self.claim {
            Some(claim) if !claim.holds() => Err(StoreError::Lost(self.path.clone())),
            _ => Ok(()),
        }
    }

    /// The file, ready to be appended to.
    fn opened(&mut self) -> Result<File> {
        self.make_folder()?;
        if !self.sound {
            self.rewrite()?;
        }
        OpenOptions::new().create(true).append(true).open(&self.path).map_err(writing(&self.path))
    }

    fn make_folder(&self) -> Result<()> {
        let Some(folder) = self.path.parent() else { return Ok(()) };
        fs::create_dir_all(folder).map_err(writing(folder))
    }

    /// Writes the file anew, the first of its folder where all samples are another experiment's.
    fn rewrite(&mut self) -> Result<()> {
        self.make_folder()?;
        let mut bytes = Vec::new();
        for &at in &self.order {
            if let Some(sample) = &self.samples[at] {
                self.line(at, sample, &mut bytes).map_err(writing(&self.path))?;
            }
        }
        self.file = None;
        atomic::replace(&self.path, &bytes).map_err(writing(&self.path))?;
        self.sound = true;
        Ok(())
    }

    fn line(&self, at: usize, sample: &T, out: &mut Vec<u8>) -> std::io::Result<()> {
        let mut text = serde_json::to_string(sample)?;
        if text.pop() != Some('}') {
            return Err(std::io::Error::other("a sample must be an object"));
        }
        text += &format!(",\"at\":{at},\"of\":\"{}\"", self.of[at]);
        let sum = short(self.key.as_bytes(), text.as_bytes());
        out.extend_from_slice(format!("{text}{SUM}{sum}\"}}\n").as_bytes());
        Ok(())
    }
}

/// The bytes of a per-sample file; `None` where there is none. What lies behind a link is not ours.
fn lines(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_file() => fs::read(path).map(Some).map_err(reading(path)),
        Ok(_) => Ok(Some(b"?".to_vec())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(reading(path)(e)),
    }
}

/// A line with its end as a sample, if it is what was written.
fn parse<T: DeserializeOwned>(key: &str, line: &[u8]) -> Option<(Tail, T)> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (body, sum) = text.rsplit_once(SUM)?;
    if sum.strip_suffix("\"}")? != short(key.as_bytes(), body.as_bytes()) {
        return None;
    }
    Some((serde_json::from_str(text).ok()?, serde_json::from_str(text).ok()?))
}

/// Whether the per-sample file of a finished cell of `count` samples or more is as it was left. Also where there is
/// none (results come without them), and where it is of a version that wrote no checks.
pub(super) fn are_sound(path: &Path, key: &str, count: usize) -> Result<bool> {
    let Some(bytes) = lines(path)? else { return Ok(true) };
    let lines = || bytes.split_inclusive(|&b| b == b'\n');
    let is_older = |line: &[u8]| {
        let json = serde_json::from_slice::<serde_json::Value>(line);
        json.is_ok_and(|v| v.is_object() && v.get("sum").is_none())
    };
    if !bytes.is_empty() && lines().all(is_older) {
        return Ok(true);
    }
    let in_order = |(index, line): (usize, &[u8])| {
        parse::<serde::de::IgnoredAny>(key, line).is_some_and(|(tail, _)| tail.at == index)
    };
    Ok(lines().count() >= count && lines().enumerate().all(in_order))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Sample {
        id: String,
        kl: f64,
    }

    const TEXTS: [&str; 4] = ["w", "x", "y", "z"];

    fn sample(at: usize) -> (usize, Sample) {
        (at, Sample { id: TEXTS[at].into(), kl: 0.1 + at as f64 / 3.0 })
    }

    fn open(path: &Path) -> Samples<Sample> {
        Samples::open(path, "key", TEXTS.iter().map(digest).collect(), None).unwrap()
    }

    /// Computes what is missing, as a run does; gives what that was.
    fn complete(path: &Path) -> Vec<usize> {
        let mut samples = open(path);
        let missing: Vec<usize> = (0..TEXTS.len()).filter(|&at| !samples.has(at)).collect();
        for &at in &missing {
            samples.put([sample(at)]).unwrap();
        }
        samples.settle().unwrap();
        assert_eq!(samples.iter().cloned().collect::<Vec<_>>(), [0, 1, 2, 3].map(|at| sample(at).1));
        missing
    }

    #[test]
    fn samples_go_on_wherever_a_run_was_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples/key.jsonl");
        assert_eq!(complete(&path), [0, 1, 2, 3]);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let ends = whole[..cut].iter().filter(|&&b| b == b'\n').count();
            assert_eq!(complete(&path).len(), 4 - ends, "cut at {cut}");
            assert!(fs::read(&path).unwrap() == whole, "cut at {cut}");
        }
        assert!(complete(&path).is_empty());
    }

    #[test]
    fn order_is_that_of_the_plan_however_samples_finish() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        complete(&path);
        let mut samples = open(&other);
        samples.put([sample(2), sample(0)]).unwrap();
        samples.put([sample(2), sample(3)]).unwrap();
        assert!(samples.has(3) && !samples.has(1));
        drop(samples);
        assert_eq!(complete(&other), [1]);
        assert_eq!(fs::read(&path).unwrap(), fs::read(&other).unwrap());
    }

    /// Where every sample is another experiment's, settling is what writes the first file of the folder.
    #[test]
    fn samples_of_another_experiment_fill_a_folder_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let (beside, own) = (dir.path().join("a/samples/key.jsonl"), dir.path().join("b/samples/key.jsonl"));
        complete(&beside);
        let mut samples = open(&own);
        samples.adopt(&beside).unwrap();
        assert!(samples.is_whole() && !own.exists());
        samples.settle().unwrap();
        assert_eq!(fs::read(&own).unwrap(), fs::read(&beside).unwrap());
    }

    #[test]
    fn damaged_lines_are_computed_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.jsonl");
        complete(&path);
        let whole = fs::read(&path).unwrap();
        let lines: Vec<&[u8]> = whole.split_inclusive(|&b| b == b'\n').collect();
        // Any bit of any byte.
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, &bytes).unwrap();
            assert!(!are_sound(&path, "key", 4).unwrap(), "byte {at}");
            let again = complete(&path);
            assert!((1..=2).contains(&again.len()), "byte {at}: {again:?}");
            assert!(fs::read(&path).unwrap() == whole, "byte {at}");
        }
        let mut foreign = Samples::open(&dir.path().join("o"), "other", open(&path).of, None).unwrap();
        foreign.put([0, 1].map(sample)).unwrap();
        let foreign = fs::read(dir.path().join("o")).unwrap();
        let cases: [(Vec<u8>, &[usize]); 7] = [
            ([lines[1], lines[0], lines[3], lines[2]].concat(), &[]),
            ([lines[0], lines[1], lines[1], lines[2], lines[0], lines[3]].concat(), &[]),
            ([lines[0], &foreign, lines[2], lines[3]].concat(), &[1]),
            ([lines[0], lines[1], &[0; 512], lines[2], lines[3]].concat(), &[2]),
            ([lines[0], &lines[1][..20], lines[2], lines[3]].concat(), &[1, 2]),
            (vec![0; whole.len()], &[0, 1, 2, 3]),
            (b"{\"id\":\"w\",\"kl\":0.1}\n".to_vec(), &[0, 1, 2, 3]),
        ];
        for (bytes, again) in cases {
            fs::write(&path, &bytes).unwrap();
            assert_eq!(complete(&path), again, "{}", String::from_utf8_lossy(&bytes));
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_sample_of_another_text_is_none_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.jsonl");
        complete(&path);
        let texts = ["w", "other", "y", "z"].iter().map(digest).collect();
        let samples: Samples<Sample> = Samples::open(&path, "key", texts, None).unwrap();
        assert_eq!([0, 1, 2, 3].map(|at| samples.has(at)), [true, false, true, true]);
    }

    #[test]
    fn a_finished_file_is_told_from_a_damaged_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.jsonl");
        let sound = |count| are_sound(&path, "key", count).unwrap();
        assert!(sound(4), "results come without samples");
        fs::write(&path, "{\"id\":\"w\",\"kl\":0.1}\n").unwrap();
        assert!(sound(4), "an older version's");
        for bytes in ["", "{\"id\":\"w\"", "\0\0\0\0"] {
            fs::write(&path, bytes).unwrap();
            assert!(!sound(1), "{bytes:?}");
        }
        fs::remove_file(&path).unwrap();
        complete(&path);
        assert!(sound(4) && !sound(5) && !are_sound(&path, "other", 4).unwrap());
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(!are_sound(&dir.path().join("link"), "key", 4).unwrap());
        complete(&dir.path().join("link"));
        assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().is_file());
    }
}
