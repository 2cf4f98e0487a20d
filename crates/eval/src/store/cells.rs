//! `cells.csv`: the finished cells of a plan first, in its order, then those of other plans.
//!
//! Rows of other models, tasks, variants and swept values stand side by side with the plan's. Those that go by the same
//! names as a cell of the plan (computed with another limit, say) give way to it once it is finished: they are set aside
//! in `other-cells.jsonl`, from where a later plan takes them back. Until then they stay, as do the old rows of a cell
//! that is computed anew, so a run that is stopped loses no row.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use super::files::{self, Cells};
use super::samples::{self, FOLDER, Samples};
use super::{KEY, Made, Result, Row, writing};

pub(super) const CELLS: &str = "cells.csv";
const ASIDE: &str = "other-cells.jsonl";
pub(super) const MADE: &str = "made.json";

/// Which finished cells are taken as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// All of them.
    #[default]
    Any,
    /// Those that were computed for this results folder, and none that came with the checkout.
    Own,
}

/// Who makes the rows of a run.
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    /// What all have in common.
    pub made: Made,
    /// Where each task's data came from.
    pub data: IndexMap<String, String>,
}

/// The results folder of one experiment, opened for one plan.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Planned cells in order, each key once.
    plan: IndexMap<String, Row>,
    /// Columns of what is measured.
    measured: Vec<String>,
    /// Planned cells that are finished.
    done: HashSet<String>,
    /// What stands in `cells.csv`, or is about to: of any plan.
    rows: Cells,
    /// What stands in `other-cells.jsonl`.
    aside: Cells,
    made: BTreeMap<String, Made>,
    provenance: Provenance,
}

impl Store {
    /// Opens the folder `dir` for the cells `plan`: keys in order, each with the columns that say what the cell is
    /// (model, task, names, swept values). These head the file, `columns` with what is measured follow. The naming
    /// columns of finished cells are brought up to date, so a renamed variant needs no new run. Nothing is written
    /// before [`Store::begin`].
    ///
    /// A cell is finished where its rows are there and are not outdated, and where its per-sample file, if there is one,
    /// is undamaged.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn open(dir: &Path, plan: &[(String, Row)], columns: &[&str]) -> Result<Self> {
        let mut unique = IndexMap::new();
        for (key, names) in plan {
            unique.entry(key.clone()).or_insert_with(|| names.clone());
        }
        let mut store = Self {
            dir: dir.to_path_buf(),
            plan: unique,
            measured: columns.iter().map(|c| (*c).to_string()).collect(),
            done: HashSet::new(),
            rows: files::read_cells(&dir.join(CELLS))?,
            aside: files::read_aside(&dir.join(ASIDE))?,
            made: files::read_made(&dir.join(MADE))?,
            provenance: Provenance::default(),
        };
        for (key, names) in &store.plan {
            if !store.rows.contains_key(key)
                && let Some(rows) = store.aside.get(key)
            {
                store.rows.insert(key.clone(), rows.clone());
            }
            let Some(rows) = store.rows.get_mut(key) else { continue };
            name(rows, key, names);
            let count = rows.first().and_then(|r| r.get("samples")?.parse().ok()).unwrap_or(0);
            let outdated = store.made.get(key).is_some_and(|m| m.outdated);
            if !outdated && samples::are_sound(&samples_path(dir, key), key, count)? {
                store.done.insert(key.clone());
            }
        }
        Ok(store)
    }

    /// Takes of the finished cells only those that `reuse` lets pass, for the results folder with the id `clone`: the
    /// others are computed again, and their rows replaced as each is finished.
    #[must_use]
    pub fn reusing(mut self, reuse: Reuse, clone: Option<&str>) -> Self {
        if reuse == Reuse::Own {
            let made = &self.made;
            self.done.retain(|key| clone.is_some_and(|id| made.get(key).is_some_and(|m| m.clone == id)));
        }
        self
    }

    /// Makes the folder ready for work by `provenance`. With `fresh` the planned cells start anew, finished or not; their
    /// rows stay until each is finished again.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn begin(&mut self, fresh: bool, provenance: Provenance) -> Result<()> {
        self.provenance = provenance;
        fs::create_dir_all(&self.dir).map_err(writing(&self.dir))?;
        if fresh {
            self.done.clear();
            for key in self.plan.keys().filter(|key| self.rows.contains_key(*key)) {
                self.made.entry(key.clone()).or_default().outdated = true;
            }
            // Before the samples go: a run that is stopped between them is still one to be computed anew.
            files::write_made(&self.dir.join(MADE), &self.made)?;
            for key in self.plan.keys() {
                let path = self.samples_path(key);
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(writing(&path)(e)),
                    _ => {}
                }
            }
        }
        self.save(&[])
    }

    /// Whether the cell is finished.
    pub fn is_done(&self, key: &str) -> bool {
        self.done.contains(key)
    }

    /// Rows of a finished cell.
    pub fn rows(&self, key: &str) -> Option<&[Row]> {
        self.rows.get(key).filter(|_| self.is_done(key)).map(Vec::as_slice)
    }

    /// Who made the rows of a cell; `None` where that is not known.
    pub fn made(&self, key: &str) -> Option<&Made> {
        self.made.get(key)
    }

    /// The values of a naming column in the rows of other plans.
    pub fn others<'a>(&'a self, column: &'a str) -> impl Iterator<Item = &'a str> {
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        others.filter_map(move |(_, rows)| rows.first()?.get(column).map(String::as_str))
    }

    /// Seconds that a planned cell took when it was computed before: in its own rows, or in rows that go by its names
    /// (of other limits or data).
    pub fn seconds(&self, key: &str) -> Option<f64> {
        let named = names(self.plan.get(key)?);
        let alike = |rows: &&Vec<Row>| rows.first().is_some_and(|row| names(row) == named);
        let rows =
            self.rows.get(key).or_else(|| self.rows.values().chain(self.aside.values()).find(alike))?;
        rows.iter().filter_map(|row| row.get("seconds")?.parse().ok()).reduce(f64::max)
    }

    /// Records finished cells, all of them in one atomic write.
    ///
    /// # Errors
    /// The file cannot be written; the cells finished before stay.
    pub fn finish(&mut self, cells: impl IntoIterator<Item = (String, Vec<Row>)>) -> Result<()> {
        let mut new = Vec::new();
        for (key, mut rows) in cells {
            if let Some(names) = self.plan.get(&key) {
                name(&mut rows, &key, names);
            }
            self.rows.insert(key.clone(), rows);
            self.done.insert(key.clone());
            new.push(key);
        }
        self.save(&new)
    }

    /// The cells file.
    pub fn cells_path(&self) -> PathBuf {
        self.dir.join(CELLS)
    }

    /// The per-sample file of a cell.
    pub fn samples_path(&self, key: &str) -> PathBuf {
        samples_path(&self.dir, key)
    }

    /// Opens a cell's per-sample file with what earlier runs left in it of the samples that are computed from `of` (see
    /// [`super::digest`]).
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn samples<T: serde::Serialize + serde::de::DeserializeOwned>(
        &self,
        key: &str,
        of: Vec<String>,
    ) -> Result<Samples<T>> {
        Samples::open(&self.samples_path(key), key, of)
    }

    /// Writes everything, so that a kill between any two writes loses no row. `new` are the cells that have just been
    /// finished.
    fn save(&mut self, new: &[String]) -> Result<()> {
        let (cells, aside, made) = (self.cells_path(), self.dir.join(ASIDE), self.dir.join(MADE));
        // What leaves a file is in the other one before.
        for key in self.outnamed() {
            if let Some(rows) = self.rows.shift_remove(&key) {
                self.aside.insert(key, rows);
            }
        }
        files::write_aside(&aside, &self.aside)?;
        // Who made a row is known once the row is there; and who made an old one not before it is replaced.
        for key in new {
            if !self.made.contains_key(key) {
                self.made.insert(key.clone(), self.maker(key));
            }
        }
        files::write_made(&made, &self.made)?;
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        let ordered = self.plan.keys().filter_map(|key| self.rows.get(key));
        let all = ordered.chain(others.map(|(_, rows)| rows)).flatten();
        files::write_cells(&cells, &self.columns(), all)?;
        for key in new {
            self.made.insert(key.clone(), self.maker(key));
        }
        self.aside.retain(|key, _| !self.rows.contains_key(key));
        self.made.retain(|key, _| self.rows.contains_key(key) || self.aside.contains_key(key));
        files::write_made(&made, &self.made)?;
        files::write_aside(&aside, &self.aside)
    }

    fn maker(&self, key: &str) -> Made {
        let Provenance { made, data } = &self.provenance;
        let task = self.plan.get(key).and_then(|names| names.get("task"));
        Made { data: task.and_then(|t| data.get(t)).cloned().unwrap_or_default(), ..made.clone() }
    }

    /// Cells of other plans that go by the names of a finished one of this.
    fn outnamed(&self) -> Vec<String> {
        let named: HashSet<_> = self.done.iter().filter_map(|key| Some(names(self.plan.get(key)?))).collect();
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        let given = others.filter(|(_, rows)| rows.first().is_some_and(|row| named.contains(&names(row))));
        given.map(|(key, _)| key.clone()).collect()
    }

    /// The columns in order: `key`, the plan's names, what it measures, each followed by what rows of other plans have
    /// besides.
    fn columns(&self) -> Vec<String> {
        let mut naming: Vec<&str> = vec![KEY];
        let mut measured: Vec<&str> = Vec::new();
        for column in self.plan.values().flat_map(IndexMap::keys) {
            if !naming.contains(&column.as_str()) {
                naming.push(column);
            }
        }
        measured.extend(self.measured.iter().map(String::as_str).filter(|c| !naming.contains(c)));
        let older = self.rows.iter().filter(|(key, _)| !self.done.contains(*key));
        for (column, value) in older.flat_map(|(_, rows)| rows).flatten() {
            let columns = if is_name(column) { &mut naming } else { &mut measured };
            if !value.is_empty() && column != KEY && !columns.contains(&column.as_str()) {
                columns.push(column);
            }
        }
        naming.into_iter().chain(measured).map(str::to_string).collect()
    }
}

fn samples_path(dir: &Path, key: &str) -> PathBuf {
    dir.join(FOLDER).join(format!("{key}.jsonl"))
}

/// Gives rows their key and the plan's naming columns.
fn name(rows: &mut [Row], key: &str, names: &Row) {
    for row in rows {
        row.insert(KEY.to_string(), key.to_string());
        row.extend(names.clone());
    }
}

/// Whether a column says what a cell is, not what came out.
fn is_name(column: &str) -> bool {
    ["model", "task", "variant", "cache"].contains(&column)
        || ["cache.", "model."].iter().any(|table| column.starts_with(table))
}

/// What a row goes by: an absent name and an empty one are the same.
fn names(row: &Row) -> BTreeMap<&str, &str> {
    let names = row.iter().filter(|(column, value)| is_name(column) && !value.is_empty());
    names.map(|(column, value)| (column.as_str(), value.as_str())).collect()
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

    /// Keys with models: `a`, or `b:other`.
    fn plan(keys: &[&str]) -> Vec<(String, Row)> {
        let cell = |k: &&str| {
            let (key, model) = k.split_once(':').unwrap_or((k, "m"));
            (key.to_string(), record(&[("model", model), ("variant", key)]))
        };
        keys.iter().map(cell).collect()
    }

    fn by(clone: &str) -> Provenance {
        Provenance { made: Made { clone: clone.into(), ..Made::default() }, ..Provenance::default() }
    }

    fn open(dir: &Path, plan: &[(String, Row)]) -> Store {
        let mut store = Store::open(dir, plan, &["score", "seconds"]).unwrap();
        store.begin(false, by("here")).unwrap();
        store
    }

    fn done(key: &str, score: &str) -> [(String, Vec<Row>); 1] {
        [(key.to_string(), vec![row(score)])]
    }

    fn text(dir: &Path) -> String {
        fs::read_to_string(dir.join(CELLS)).unwrap()
    }

    #[test]
    fn rows_are_in_plan_order_however_they_finish() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &plan(&["a", "b", "c"]));
        store.finish(done("c", "3")).unwrap();
        store.finish([("a".to_string(), vec![row("1"), row("1.5")])]).unwrap();
        assert_eq!(text(dir.path()), "key,model,variant,score,seconds\na,m,a,1,1\na,m,a,1.5,1\nc,m,c,3,1\n");
        let again = open(dir.path(), &plan(&["a", "b", "c"]));
        assert!(again.is_done("a") && again.is_done("c") && !again.is_done("b"));
        assert_eq!(again.rows("a").unwrap().len(), 2);
        assert_eq!(again.made("a").unwrap().clone, "here");
    }

    #[test]
    fn rows_of_other_plans_stand_beside_the_plan_s() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &plan(&["a", "b"])).finish(done("a", "1")).unwrap();
        let swept = [(
            "c".to_string(),
            record(&[("model", "n"), ("variant", "c"), ("cache.t", "0.5"), ("cache", "{}")]),
        )];
        let mut other = Store::open(dir.path(), &swept, &["kl"]).unwrap();
        other.begin(false, by("here")).unwrap();
        assert!(!other.is_done("a"));
        other.finish([("c".to_string(), vec![record(&[("kl", "0.1")])])]).unwrap();
        let both = "key,model,variant,cache.t,cache,kl,score,seconds\nc,n,c,0.5,{},0.1,,\na,m,a,,,,1,1\n";
        assert_eq!(text(dir.path()), both);
        assert_eq!(other.others("model").collect::<Vec<_>>(), ["m"]);
        let back = open(dir.path(), &plan(&["a", "b"]));
        assert!(back.is_done("a"));
        assert_eq!(
            text(dir.path()),
            "key,model,variant,cache.t,cache,score,seconds,kl\na,m,a,,,1,1,\nc,n,c,0.5,{},,,0.1\n"
        );
        assert!(!dir.path().join(ASIDE).exists());
    }

    #[test]
    fn a_row_of_the_same_names_gives_way_once_the_new_one_is_finished_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let named = |key: &str| [(key.to_string(), record(&[("model", "m"), ("variant", "v")]))];
        open(dir.path(), &named("whole")).finish(done("whole", "1")).unwrap();
        let whole = text(dir.path());
        let mut store = open(dir.path(), &named("limited"));
        assert!(text(dir.path()).contains("whole,m,v,1,1\n"), "until the new one is finished");
        store.finish(done("limited", "2")).unwrap();
        assert!(!text(dir.path()).contains("whole") && text(dir.path()).contains("limited"));
        assert!(fs::read_to_string(dir.path().join(ASIDE)).unwrap().contains("\"key\":\"whole\""));
        let back = open(dir.path(), &named("whole"));
        assert!(back.is_done("whole") && back.made("limited").is_some());
        assert_eq!(text(dir.path()), whole);
        let aside = fs::read_to_string(dir.path().join(ASIDE)).unwrap();
        assert!(aside.contains("limited") && !aside.contains("whole"));
    }

    #[test]
    fn a_kill_between_two_files_loses_no_row() {
        let dir = tempfile::tempdir().unwrap();
        let named = |key: &str| [(key.to_string(), record(&[("model", "m"), ("variant", "v")]))];
        open(dir.path(), &named("one")).finish(done("one", "1")).unwrap();
        let before = text(dir.path());
        open(dir.path(), &named("two")).finish(done("two", "2")).unwrap();
        // Set aside already, and cells.csv still the old one.
        fs::write(dir.path().join(CELLS), before).unwrap();
        let mut store = open(dir.path(), &named("two"));
        assert!(!store.is_done("two"));
        store.finish(done("two", "2")).unwrap();
        assert!(open(dir.path(), &named("one")).is_done("one"));
        assert!(open(dir.path(), &named("two")).is_done("two"));
    }

    #[test]
    fn names_follow_the_plan() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &plan(&["a"])).finish(done("a", "1")).unwrap();
        let renamed = vec![("a".to_string(), record(&[("model", "m"), ("variant", "ours")]))];
        let mut store = Store::open(dir.path(), &renamed, &["score"]).unwrap();
        store.begin(false, by("here")).unwrap();
        assert_eq!(text(dir.path()), "key,model,variant,score\na,m,ours,1\n");
    }

    #[test]
    fn a_torn_line_costs_its_cell_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let both = plan(&["a", "b"]);
        let mut store = open(dir.path(), &both);
        store
            .finish([("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2"), row("3")])])
            .unwrap();
        let whole = text(dir.path());
        for cut in 1..4 {
            fs::write(store.cells_path(), &whole[..whole.len() - cut]).unwrap();
            let torn = open(dir.path(), &both);
            assert!(torn.is_done("a") && !torn.is_done("b"), "cut {cut}");
        }
        for (file, bytes, words) in [
            (CELLS, "x,y\n1,2\n", "no column `key`"),
            (ASIDE, "{\"key\":\"a\",\"rows\":[]}\n{\"key\"\n", "line 2"),
            (MADE, "[", "made.json"),
        ] {
            fs::write(dir.path().join(file), bytes).unwrap();
            let e = Store::open(dir.path(), &both, &["score"]).unwrap_err().to_string();
            assert!(e.contains(words) && e.contains(file) && e.contains("remove the"), "{e}");
            fs::remove_file(dir.path().join(file)).unwrap();
        }
    }

    #[test]
    fn fresh_forgets_the_planned_cells_only_and_shows_their_rows_until_they_are_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &plan(&["a", "b"]));
        store.finish([("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2")])]).unwrap();
        let of = || vec![super::super::digest(&"x")];
        store.samples::<Row>("b", of()).unwrap().put([(0, row("2"))]).unwrap();
        let mut store = Store::open(dir.path(), &plan(&["b"]), &["score", "seconds"]).unwrap();
        assert!(store.is_done("b"));
        store.begin(true, by("here")).unwrap();
        assert!(!store.is_done("b") && !store.samples_path("b").exists());
        assert!(text(dir.path()).contains("b,m,b,2,1"));
        // Stopped here, it goes on without being told again.
        let mut store = open(dir.path(), &plan(&["b"]));
        assert!(!store.is_done("b") && open(dir.path(), &plan(&["a"])).is_done("a"));
        store.finish(done("b", "3")).unwrap();
        let store = open(dir.path(), &plan(&["b"]));
        assert!(store.is_done("b") && text(dir.path()).contains("b,m,b,3,1"));
    }

    #[test]
    fn cells_of_another_checkout_are_computed_again_where_that_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let cells = plan(&["a", "b"]);
        let mut store = Store::open(dir.path(), &cells, &["score", "seconds"]).unwrap();
        store.begin(false, by("there")).unwrap();
        store.finish([("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2")])]).unwrap();
        let reusing = |reuse| {
            let store = Store::open(dir.path(), &cells, &["score", "seconds"]).unwrap();
            store.reusing(reuse, Some("here"))
        };
        assert!(reusing(Reuse::Any).is_done("a"));
        let mut own = reusing(Reuse::Own);
        assert!(!own.is_done("a"));
        own.begin(false, by("here")).unwrap();
        own.finish(done("a", "1.5")).unwrap();
        assert!(text(dir.path()).contains("a,m,a,1.5,1\nb,m,b,2,1\n"));
        let own = reusing(Reuse::Own);
        assert!(own.is_done("a") && !own.is_done("b"));
        assert_eq!(
            (own.made("a").unwrap().clone.as_str(), own.made("b").unwrap().clone.as_str()),
            ("here", "there")
        );
        let none = Store::open(dir.path(), &cells, &["score"]).unwrap().reusing(Reuse::Own, None);
        assert!(!none.is_done("a"));
    }

    #[test]
    fn a_cell_with_a_damaged_sample_file_is_not_finished() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let mut store = Store::open(dir.path(), &plan(&["a"]), &["score", "samples"]).unwrap();
            store.begin(false, by("here")).unwrap();
            store
        };
        let mut store = open();
        let of = || vec![super::super::digest(&"x"), super::super::digest(&"y")];
        let mut samples = store.samples::<Row>("a", of()).unwrap();
        samples.put([(0, row("1")), (1, row("2"))]).unwrap();
        let finished = [("a".to_string(), vec![record(&[("score", "1"), ("samples", "2")])])];
        store.finish(finished).unwrap();
        let path = store.samples_path("a");
        let whole = fs::read_to_string(&path).unwrap();
        assert!(open().is_done("a"));
        for damaged in [whole.replace('1', "7"), whole.lines().next().unwrap().to_string() + "\n"] {
            fs::write(&path, damaged).unwrap();
            assert!(!open().is_done("a"));
        }
        fs::remove_file(&path).unwrap();
        assert!(open().is_done("a"), "results come without samples");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        let e = Store::open(&file, &plan(&["a"]), &["score"]).and_then(|mut s| s.begin(false, by("")));
        let e = e.unwrap_err().to_string();
        assert!(e.contains("f") && e.lines().count() == 1, "{e}");
    }
}
