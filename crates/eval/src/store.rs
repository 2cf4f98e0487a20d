//! Results on disk: `cells.csv` with the finished cells of an experiment's plan, and per-sample files that let a
//! stopped run go on.
//!
//! `cells.csv` is replaced as a whole (temporary file, fsync, rename), so that a reader or a killed run sees either
//! the old or the new file. Its rows are in plan order at every moment. Cells that are finished but not in the plan
//! at hand (another limit, another model) are set aside in `other-cells.jsonl`, from where a later plan takes them
//! back.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// The column with a cell's key.
pub const KEY: &str = "key";
const CELLS: &str = "cells.csv";
const OTHERS: &str = "other-cells.jsonl";
const SAMPLES: &str = "samples";

/// One row of `cells.csv`: column to text.
pub type Row = IndexMap<String, String>;

/// What can go wrong with results on disk.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written; what was finished before is intact.
    #[error(
        "cannot write {}: {source}; finished cells are kept, so run the same command again once that is mended",
        path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A results file that is not one.
    #[error("{}: {message}; remove the file to start that experiment anew", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

type Result<T> = std::result::Result<T, StoreError>;

fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Read { path: path.to_path_buf(), source }
}

fn writing(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Write { path: path.to_path_buf(), source }
}

/// The results folder of one experiment, opened for one plan.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Planned cells in order, each key once.
    plan: IndexMap<String, Row>,
    /// Columns in file order, `key` first.
    columns: Vec<String>,
    done: HashMap<String, Vec<Row>>,
    others: IndexMap<String, Vec<Row>>,
}

#[derive(Serialize, Deserialize)]
struct SetAside {
    key: String,
    rows: Vec<Row>,
}

impl Store {
    /// Opens the folder `dir` for the cells `plan`: keys in order, each with the columns that say what the cell is
    /// (model, task, names, swept values). These head the file, `columns` with what is measured follow. The naming
    /// columns of finished cells are brought up to date, so a renamed variant needs no new run. Nothing is written
    /// before [`Store::begin`].
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn open(dir: &Path, plan: &[(String, Row)], columns: &[&str]) -> Result<Self> {
        let mut all = vec![KEY.to_string()];
        let naming = plan.iter().flat_map(|(_, names)| names.keys().map(String::as_str));
        for column in naming.chain(columns.iter().copied()) {
            if !all.iter().any(|c| c == column) {
                all.push(column.to_string());
            }
        }
        let mut unique = IndexMap::new();
        for (key, names) in plan {
            unique.entry(key.clone()).or_insert_with(|| names.clone());
        }
        let mut store = Self {
            dir: dir.to_path_buf(),
            plan: unique,
            columns: all,
            done: HashMap::new(),
            others: IndexMap::new(),
        };
        for (key, rows) in read_others(&dir.join(OTHERS))?.into_iter().chain(read_cells(&dir.join(CELLS))?) {
            if store.plan.contains_key(&key) {
                store.insert(key, rows);
            } else {
                store.others.insert(key, rows);
            }
        }
        Ok(store)
    }

    /// Makes the folder ready for work: sets aside what is not in the plan. With `fresh` the planned cells start
    /// anew, finished or not.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn begin(&mut self, fresh: bool) -> Result<()> {
        if fresh {
            self.done.clear();
            for key in self.plan.keys() {
                match fs::remove_file(self.samples_path(key)) {
                    Err(e) if e.kind() != ErrorKind::NotFound => {
                        return Err(writing(&self.samples_path(key))(e));
                    }
                    _ => {}
                }
            }
        }
        // What is set aside is written before it leaves cells.csv: a kill between the two loses nothing.
        self.write_others()?;
        self.write_cells()
    }

    /// Whether the cell is finished.
    pub fn is_done(&self, key: &str) -> bool {
        self.done.contains_key(key)
    }

    /// Rows of a finished cell.
    pub fn rows(&self, key: &str) -> Option<&[Row]> {
        self.done.get(key).map(Vec::as_slice)
    }

    /// Seconds that a planned cell took when it was computed before: in its own rows, or in rows of the same names that
    /// are not of this plan (other limits, other data).
    pub fn seconds(&self, key: &str) -> Option<f64> {
        let names = self.plan.get(key)?;
        let alike = |rows: &&Vec<Row>| {
            rows.first().is_some_and(|row| names.iter().all(|(c, text)| row.get(c) == Some(text)))
        };
        let rows = self.done.get(key).or_else(|| self.others.values().find(alike))?;
        let seconds = rows.iter().filter_map(|row| row.get("seconds")?.parse().ok());
        seconds.reduce(f64::max)
    }

    /// Records finished cells, all of them in one atomic write.
    ///
    /// # Errors
    /// The file cannot be written; the cells finished before stay.
    pub fn finish(&mut self, cells: impl IntoIterator<Item = (String, Vec<Row>)>) -> Result<()> {
        for (key, rows) in cells {
            self.insert(key, rows);
        }
        self.write_cells()
    }

    /// Takes rows in with the key and the plan's naming columns.
    fn insert(&mut self, key: String, mut rows: Vec<Row>) {
        for row in &mut rows {
            row.insert(KEY.to_string(), key.clone());
            row.extend(self.plan.get(&key).cloned().unwrap_or_default());
        }
        self.done.insert(key, rows);
    }

    /// The cells file.
    pub fn cells_path(&self) -> PathBuf {
        self.dir.join(CELLS)
    }

    /// The per-sample file of a cell.
    pub fn samples_path(&self, key: &str) -> PathBuf {
        self.dir.join(SAMPLES).join(format!("{key}.jsonl"))
    }

    /// Opens a cell's per-sample file with what an earlier run left in it.
    ///
    /// # Errors
    /// The file cannot be read or made.
    pub fn samples<T: Serialize + serde::de::DeserializeOwned>(&self, key: &str) -> Result<Samples<T>> {
        Samples::open(&self.samples_path(key))
    }

    fn write_cells(&self) -> Result<()> {
        let path = self.cells_path();
        let broken = |e: csv::Error| writing(&path)(std::io::Error::other(e));
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(&self.columns).map_err(broken)?;
        for key in self.plan.keys() {
            for row in self.done.get(key).map(Vec::as_slice).unwrap_or_default() {
                let cell = |c: &String| row.get(c).map(String::as_str).unwrap_or_default();
                writer.write_record(self.columns.iter().map(cell)).map_err(broken)?;
            }
        }
        let bytes = writer.into_inner().map_err(|e| writing(&path)(std::io::Error::other(e.to_string())))?;
        replace(&path, &bytes)
    }

    fn write_others(&self) -> Result<()> {
        let path = self.dir.join(OTHERS);
        if self.others.is_empty() && !path.exists() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for (key, rows) in &self.others {
            let entry = SetAside { key: key.clone(), rows: rows.clone() };
            serde_json::to_writer(&mut bytes, &entry).map_err(|e| writing(&path)(e.into()))?;
            bytes.push(b'\n');
        }
        replace(&path, &bytes)
    }
}

/// Writes `bytes` to `path` so that at every moment the old or the new file is there whole. A file that already
/// holds them is left alone.
///
/// # Errors
/// The folder or file cannot be written; the temporary file is removed.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        let mut file = tempfile::Builder::new().suffix(".tmp").tempfile_in(dir)?;
        file.write_all(bytes)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        file.as_file().set_permissions(mode)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        // The rename itself lasts only once the folder is on disk.
        File::open(dir)?.sync_all()
    };
    write().map_err(writing(path))
}

/// Rows by key, in file order. A last line without its line end was torn by whatever copied the file: its cell is
/// dropped and runs again.
fn read_cells(path: &Path) -> Result<IndexMap<String, Vec<Row>>> {
    let mut cells: IndexMap<String, Vec<Row>> = IndexMap::new();
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(cells),
        Err(e) => return Err(reading(path)(e)),
    };
    let malformed = |message: String| StoreError::Malformed { path: path.to_path_buf(), message };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|e| malformed(e.to_string()))?.clone();
    if whole == 0 {
        return Ok(cells);
    }
    let Some(key_column) = headers.iter().position(|h| h == KEY) else {
        return Err(malformed(format!("has no column `{KEY}`, so it is no results file")));
    };
    let mut torn = HashSet::new();
    for record in reader.records() {
        let record = record.map_err(|e| malformed(e.to_string()))?;
        let key = record.get(key_column).unwrap_or_default().to_string();
        let start = record.position().map_or(0, |p| p.byte() as usize);
        if record.len() != headers.len() || start >= whole {
            torn.insert(key);
            continue;
        }
        let row = headers.iter().map(str::to_string).zip(record.iter().map(str::to_string)).collect();
        cells.entry(key).or_default().push(row);
    }
    cells.retain(|key, _| !torn.contains(key));
    Ok(cells)
}

fn read_others(path: &Path) -> Result<IndexMap<String, Vec<Row>>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(IndexMap::new()),
        Err(e) => return Err(reading(path)(e)),
    };
    let entry = |line: &str| serde_json::from_str::<SetAside>(line).ok().map(|e| (e.key, e.rows));
    Ok(text.lines().filter_map(entry).collect())
}

/// A cell's per-sample file: one JSON object per line, appended as samples finish.
#[derive(Debug)]
pub struct Samples<T> {
    path: PathBuf,
    file: Option<File>,
    lines: Vec<(u64, T)>,
}

impl<T: Serialize + serde::de::DeserializeOwned> Samples<T> {
    /// Reads what is there; a torn or foreign line ends it, and what follows is cut off.
    fn open(path: &Path) -> Result<Self> {
        let mut text = Vec::new();
        match File::open(path) {
            Ok(mut file) => {
                file.read_to_end(&mut text).map_err(reading(path))?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(reading(path)(e)),
        }
        let mut lines = Vec::new();
        let mut end = 0;
        for line in text.split_inclusive(|&b| b == b'\n') {
            let Some(sample) = line.strip_suffix(b"\n").and_then(|l| serde_json::from_slice(l).ok()) else {
                break;
            };
            end += line.len() as u64;
            lines.push((end, sample));
        }
        Ok(Self { path: path.to_path_buf(), file: None, lines })
    }

    /// Samples so far, in file order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.lines.iter().map(|(_, s)| s)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Forgets all samples after the first `count`; the file follows with the next append.
    pub fn truncate(&mut self, count: usize) {
        self.lines.truncate(count);
        self.file = None;
    }

    /// Appends samples in one write and makes them last.
    ///
    /// # Errors
    /// The file cannot be written; a torn line is found and dropped by the next run.
    pub fn append(&mut self, samples: impl IntoIterator<Item = T>) -> Result<()> {
        let start = self.lines.last().map_or(0, |(end, _)| *end);
        let (mut bytes, mut lines) = (Vec::new(), Vec::new());
        for sample in samples {
            serde_json::to_writer(&mut bytes, &sample).map_err(|e| writing(&self.path)(e.into()))?;
            bytes.push(b'\n');
            lines.push((start + bytes.len() as u64, sample));
        }
        let (path, open) = (&self.path, self.file.take());
        let write = || -> std::io::Result<File> {
            let mut file = match open {
                Some(file) => file,
                None => {
                    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
                    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
                    file.set_len(start)?;
                    file.seek(SeekFrom::Start(start))?;
                    file
                }
            };
            file.write_all(&bytes)?;
            file.sync_data()?;
            Ok(file)
        };
        self.file = Some(write().map_err(writing(&self.path))?);
        self.lines.extend(lines);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn row(score: &str) -> Row {
        record(&[("score", score), ("seconds", "1")])
    }

    fn record(cells: &[(&str, &str)]) -> Row {
        cells.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect()
    }

    fn plan(keys: &[&str]) -> Vec<(String, Row)> {
        keys.iter().map(|k| ((*k).to_string(), record(&[("model", "m")]))).collect()
    }

    fn open(dir: &Path, keys: &[&str]) -> Store {
        let mut store = Store::open(dir, &plan(keys), &["score", "seconds"]).unwrap();
        store.begin(false).unwrap();
        store
    }

    #[test]
    fn rows_are_in_plan_order_however_they_finish() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &["a", "b", "c"]);
        store.finish([("c".to_string(), vec![row("3")])]).unwrap();
        store.finish([("a".to_string(), vec![row("1"), row("1.5")])]).unwrap();
        let text = fs::read_to_string(store.cells_path()).unwrap();
        assert_eq!(text, "key,model,score,seconds\na,m,1,1\na,m,1.5,1\nc,m,3,1\n");
        let again = open(dir.path(), &["a", "b", "c"]);
        assert!(again.is_done("a") && again.is_done("c") && !again.is_done("b"));
        assert_eq!(again.rows("a").unwrap().len(), 2);
    }

    #[test]
    fn cells_outside_the_plan_are_set_aside_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &["a", "b"]).finish([("a".to_string(), vec![row("1")])]).unwrap();
        let other = open(dir.path(), &["b"]);
        assert!(!other.is_done("a"));
        assert_eq!(fs::read_to_string(other.cells_path()).unwrap(), "key,model,score,seconds\n");
        let back = open(dir.path(), &["a", "b"]);
        assert!(back.is_done("a"));
        assert!(fs::read_to_string(back.cells_path()).unwrap().contains("a,m,1,1"));
    }

    #[test]
    fn names_follow_the_plan() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &["a"]).finish([("a".to_string(), vec![row("1")])]).unwrap();
        let renamed = vec![("a".to_string(), record(&[("model", "m"), ("variant", "ours")]))];
        let mut store = Store::open(dir.path(), &renamed, &["score"]).unwrap();
        store.begin(false).unwrap();
        assert_eq!(fs::read_to_string(store.cells_path()).unwrap(), "key,model,variant,score\na,m,ours,1\n");
    }

    #[test]
    fn a_torn_line_costs_its_cell_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &["a", "b"]);
        store
            .finish([("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2"), row("3")])])
            .unwrap();
        let text = fs::read_to_string(store.cells_path()).unwrap();
        for cut in 1..4 {
            fs::write(store.cells_path(), &text[..text.len() - cut]).unwrap();
            let torn = open(dir.path(), &["a", "b"]);
            assert!(torn.is_done("a") && !torn.is_done("b"), "cut {cut}");
        }
        fs::write(store.cells_path(), "x,y\n1,2\n").unwrap();
        let e = Store::open(dir.path(), &plan(&["a"]), &["score"]).unwrap_err().to_string();
        assert!(e.contains("no column `key`"), "{e}");
    }

    #[test]
    fn fresh_forgets_the_planned_cells_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &["a", "b"]);
        store.finish([("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2")])]).unwrap();
        store.samples::<u32>("b").unwrap().append([1]).unwrap();
        let mut store = Store::open(dir.path(), &plan(&["b"]), &["score", "seconds"]).unwrap();
        store.begin(true).unwrap();
        assert!(!store.is_done("b") && !store.samples_path("b").exists());
        assert!(open(dir.path(), &["a"]).is_done("a"));
    }

    #[test]
    fn samples_go_on_after_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), &["a"]);
        let mut samples = store.samples::<(String, f64)>("a").unwrap();
        assert!(samples.is_empty());
        samples.append([("x".to_string(), 0.1), ("y".to_string(), 0.2)]).unwrap();
        samples.append([("z".to_string(), 0.3)]).unwrap();
        let path = store.samples_path("a");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut samples = store.samples::<(String, f64)>("a").unwrap();
        assert_eq!(samples.len(), 2);
        samples.append([("z".to_string(), 0.3)]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        samples.truncate(1);
        samples.append([("y".to_string(), 0.2), ("z".to_string(), 0.3)]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        assert_eq!(samples.iter().map(|s| s.1).collect::<Vec<_>>(), [0.1, 0.2, 0.3]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        let e = Store::open(&file, &plan(&["a"]), &["score"]).and_then(|mut s| s.begin(false));
        let e = e.unwrap_err().to_string();
        assert!(e.contains("f") && e.lines().count() == 1, "{e}");
    }
}
