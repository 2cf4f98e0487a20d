//! Finding and loading data sets: the user's files, then the hub, then the sample that ships with the program.
//!
//! Whatever the place, every record arrives in the field layout that the hub uses, and a bad one is reported with
//! file, line (or row) and field.

mod dataset;
mod error;
mod hub;
mod layouts;
mod read;
mod record;
mod sample;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

pub(crate) use dataset::as_is;
pub use dataset::{Dataset, HubFile, Part};
pub use error::{DataError, Result};
pub use hub::HubData;
pub(crate) use layouts::{coqa_layout, truthfulqa_gen_layout, truthfulqa_mc_layout};
pub(crate) use read::Lines;
use read::{Blob, Source};
#[doc(hidden)]
pub use read::{Format, records_from_bytes};
pub use record::Record;
pub(crate) use record::keys;
pub(crate) use sample::calibration_texts;

/// Where data came from. [`Origin::label`] is what results show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The user's files; the path is relative to the data folder.
    Files(PathBuf),
    /// The hub: `owner/name`.
    Hub(String),
    /// The small sample that ships with the program, written for this project.
    Sample,
}

impl Origin {
    /// `files gsm8k/test.jsonl`, `hub openai/gsm8k` or `bundled sample`.
    pub fn label(&self) -> String {
        match self {
            Self::Files(path) => format!("files {}", path.display()),
            Self::Hub(repo) => format!("hub {repo}"),
            Self::Sample => "bundled sample".to_string(),
        }
    }
}

/// Why a file could not be had from the hub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// There is no such file, or it may not be read; another file may still be had.
    #[error("{0}")]
    NotFound(String),
    /// The hub cannot be reached, so no other file will be tried either.
    #[error("{0}")]
    Unreachable(String),
}

/// Gets one file of the hub, from its cache or by download, and says where it lies on disk.
pub trait Fetch: Send + Sync {
    /// The local path of `file`.
    fn fetch(&self, file: &HubFile) -> std::result::Result<PathBuf, FetchError>;

    /// Whether files come from the cache alone, so that [`Fetch::fetch`] answers at once.
    fn is_offline(&self) -> bool {
        false
    }
}

impl<F> Fetch for F
where
    F: Fn(&HubFile) -> std::result::Result<PathBuf, FetchError> + Send + Sync,
{
    fn fetch(&self, file: &HubFile) -> std::result::Result<PathBuf, FetchError> {
        self(file)
    }
}

/// Finds data sets.
#[derive(Clone, Default)]
pub struct DataSource {
    dir: Option<PathBuf>,
    hub: Option<Arc<dyn Fetch>>,
    unreachable: Arc<Mutex<Option<String>>>,
    /// Whether the hub has given anything.
    from_hub: Arc<AtomicBool>,
}

/// A data set as found.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Where it was found.
    pub origin: Origin,
    /// SHA-256 of its files, in hexadecimal.
    pub fingerprint: String,
    /// Why a better place was passed over, such as an unreachable hub.
    pub note: Option<String>,
    /// The records of each part of the [`Dataset`]; an absent optional part is empty.
    pub parts: Vec<Vec<Record>>,
}

impl DataSource {
    /// Looks in `dir` first (absent: in the folder that `MINICACHE_DATA` names), then in the bundled sample.
    pub fn new(dir: Option<PathBuf>) -> Self {
        let from_env = || std::env::var_os("MINICACHE_DATA").filter(|v| !v.is_empty()).map(PathBuf::from);
        Self { dir: dir.or_else(from_env), ..Self::default() }
    }

    /// Looks only in the bundled sample.
    pub fn sample_only() -> Self {
        Self::default()
    }

    /// Asks `hub` for what the folder does not have.
    #[must_use]
    pub fn with_hub(mut self, hub: Arc<dyn Fetch>) -> Self {
        self.hub = Some(hub);
        self
    }

    /// The user's data folder.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Loads `dataset` from the first place that has all its required parts. Of each part the first records are read, as
    /// many as `wanted` says for it; all of them, within bounds, where it says nothing.
    ///
    /// # Errors
    /// A data folder that does not exist, a file that cannot be read or is not in its format, a folder that has one
    /// required part but lacks another, or no data anywhere.
    pub fn load(&self, dataset: &Dataset, wanted: &[Option<usize>]) -> Result<Loaded> {
        if let Some(dir) = &self.dir {
            if !dir.is_dir() {
                let source = std::io::Error::new(std::io::ErrorKind::NotFound, "no such folder");
                return Err(DataError::Io { path: dir.clone(), source });
            }
            if let Some(found) = find_all(dataset, |part| in_folder(dir, dataset, part), &dir.display())? {
                let first = found.iter().flatten().next().map(|s| PathBuf::from(&s.name)).unwrap_or_default();
                let relative = first.strip_prefix(dir).map(Path::to_path_buf).unwrap_or(first);
                return read_all(dataset, wanted, &found, Origin::Files(relative), None);
            }
        }
        let mut note = None;
        if let Some(hub) = &self.hub {
            match self.fetch_all(hub.as_ref(), dataset) {
                Ok((repo, found)) => {
                    self.from_hub.store(true, Ordering::Relaxed);
                    return read_all(dataset, wanted, &found, Origin::Hub(repo.to_string()), None);
                }
                Err(reason) => note = Some(format!("the hub was passed over: {reason}")),
            }
        }
        if let Some(found) = find_all(dataset, |part| Ok(sample::find(dataset, part)), &"the bundled sample")?
        {
            return read_all(dataset, wanted, &found, Origin::Sample, note);
        }
        Err(self.missing(dataset, note))
    }

    /// Like [`DataSource::load`], but only if `dir` has the data set.
    pub(crate) fn has_files(&self, dataset: &Dataset) -> Result<bool> {
        let Some(dir) = &self.dir else { return Ok(false) };
        Ok(find_all(dataset, |part| in_folder(dir, dataset, part), &dir.display())?.is_some())
    }

    /// The place that [`DataSource::load`] would look at first, as in [`Origin::label`], by the presence of files alone;
    /// `None` when there is no file at hand and no hub to ask.
    ///
    /// # Errors
    /// A folder that has one required part but lacks another.
    pub fn whereabouts(&self, dataset: &Dataset) -> Result<Option<String>> {
        if self.has_files(dataset)? {
            return Ok(Some("files".to_string()));
        }
        let first = dataset.parts.iter().flat_map(|p| p.hub).map(|f| f.repo).next();
        let repo = match &self.hub {
            Some(hub) if hub.is_offline() => self.fetch_all(hub.as_ref(), dataset).ok().map(|(repo, _)| repo),
            Some(_) => first,
            None => None,
        };
        if let Some(repo) = repo {
            return Ok(Some(format!("hub {repo}")));
        }
        let sample = find_all(dataset, |part| Ok(sample::find(dataset, part)), &"the bundled sample")?;
        Ok(sample.map(|_| Origin::Sample.label()))
    }

    /// Whether any real data is at hand: a data folder, or what a hub has given so far.
    pub fn is_real(&self) -> bool {
        self.dir.is_some() || self.from_hub.load(Ordering::Relaxed)
    }

    /// Why the hub was given up, where it could not be reached.
    pub fn unreachable(&self) -> Option<String> {
        self.unreachable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn missing(&self, dataset: &Dataset, note: Option<String>) -> DataError {
        let mut tried: Vec<String> = self.dir.iter().map(|d| format!("not in {}", d.display())).collect();
        tried.extend(note);
        tried.push("the bundled sample has none".to_string());
        let required = dataset.parts.iter().filter(|p| !p.optional);
        let wanted: Vec<String> = required
            .map(|p| p.local.first().map(|l| l.replace("{}", dataset.name)).unwrap_or_default())
            .collect();
        DataError::Missing {
            dataset: dataset.name.to_string(),
            tried: format!(" ({})", tried.join("; ")),
            wanted: wanted.join(" and "),
        }
    }

    fn fetch_all(
        &self,
        hub: &dyn Fetch,
        dataset: &Dataset,
    ) -> std::result::Result<(&'static str, Vec<Vec<Source>>), String> {
        let remembered = || self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = remembered().clone() {
            return Err(reason);
        }
        let mut repo = None;
        let mut found = Vec::new();
        for part in dataset.parts {
            let mut reasons = Vec::new();
            let mut files = Vec::new();
            for candidate in part.hub {
                match hub.fetch(candidate) {
                    Ok(path) => {
                        repo.get_or_insert(candidate.repo);
                        files.push(Source { name: path.display().to_string(), blob: Blob::Disk(path) });
                        break;
                    }
                    Err(FetchError::Unreachable(reason)) => {
                        *remembered() = Some(reason.clone());
                        return Err(reason);
                    }
                    Err(FetchError::NotFound(reason)) => {
                        reasons.push(format!("{}: {reason}", candidate.repo))
                    }
                }
            }
            if files.is_empty() && !part.optional {
                return Err(if reasons.is_empty() {
                    "it has no such data set".into()
                } else {
                    reasons.join("; ")
                });
            }
            found.push(files);
        }
        Ok((repo.ok_or("it has no such data set")?, found))
    }
}

/// The files of every part, or `None` when no required part is there. One required part without another is an error.
fn find_all(
    dataset: &Dataset,
    find: impl Fn(&Part) -> Result<Vec<Source>>,
    place: &dyn std::fmt::Display,
) -> Result<Option<Vec<Vec<Source>>>> {
    let found: Vec<Vec<Source>> = dataset.parts.iter().map(find).collect::<Result<_>>()?;
    let required = || dataset.parts.iter().zip(&found).filter(|(p, _)| !p.optional);
    if required().all(|(_, files)| files.is_empty()) {
        return Ok(None);
    }
    match required().find(|(_, files)| files.is_empty()) {
        None => Ok(Some(found)),
        Some((part, _)) => Err(DataError::Missing {
            dataset: format!("{}, {}", dataset.name, part.name),
            tried: format!(" in {place}, which has the other part"),
            wanted: part.local.first().map(|l| l.replace("{}", dataset.name)).unwrap_or_default(),
        }),
    }
}

fn read_all(
    dataset: &Dataset,
    wanted: &[Option<usize>],
    found: &[Vec<Source>],
    origin: Origin,
    note: Option<String>,
) -> Result<Loaded> {
    let member = member(dataset);
    let mut hash = Sha256::new();
    let mut parts = Vec::new();
    for (index, (part, files)) in dataset.parts.iter().zip(found).enumerate() {
        let limit = wanted.get(index).copied().flatten();
        hash.update(part.name);
        let mut records: Vec<Record> = Vec::new();
        for file in files {
            // The whole file makes the fingerprint, however little is read of it.
            file.hash(&member, &mut hash)?;
            let left = limit.map(|limit| limit - records.len());
            if left != Some(0) {
                records.extend(file.records(&member, left)?);
            }
        }
        if records.is_empty() && !part.optional && limit != Some(0) {
            let place = files.first().map(|f| f.name.clone()).unwrap_or_default();
            return Err(DataError::Format { place, message: "holds no records".to_string() });
        }
        for (index, record) in records.iter_mut().enumerate() {
            record.index = index;
        }
        parts.push((part.normalise)(records)?);
    }
    let fingerprint = hex(&hash.finalize());
    Ok(Loaded { origin, fingerprint, note, parts })
}

/// The file of a data set inside of an archive of several.
fn member(dataset: &Dataset) -> String {
    format!("data/{}.jsonl", dataset.name)
}

fn in_folder(dir: &Path, dataset: &Dataset, part: &Part) -> Result<Vec<Source>> {
    for pattern in part.local {
        let pattern = pattern.replace("{}", dataset.name);
        let paths = match pattern.rsplit_once('/') {
            _ if !pattern.contains('*') => vec![dir.join(&pattern)],
            Some((folder, name)) => matching(&dir.join(folder), name),
            None => matching(dir, &pattern),
        };
        let mut files: Vec<Source> = paths
            .into_iter()
            .filter(|p| p.is_file())
            .map(|p| Source { name: p.display().to_string(), blob: Blob::Disk(p) })
            .collect();
        if let [file] = files.as_slice()
            && file.name.ends_with(".zip")
            && !file.has_member(&member(dataset))?
        {
            files.clear();
        }
        if !files.is_empty() {
            return Ok(files);
        }
    }
    Ok(Vec::new())
}

/// The files of `folder` whose names fit `pattern` (one `*`), sorted: shards are numbered.
fn matching(folder: &Path, pattern: &str) -> Vec<PathBuf> {
    let Some((head, tail)) = pattern.split_once('*') else { return Vec::new() };
    let fits =
        |name: &str| name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(fits))
        .collect();
    paths.sort();
    paths
}

/// SHA-256 in hexadecimal.
pub(crate) fn hex_digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
