//! Two results folders of one experiment, cell by cell.

mod tolerance;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use indexmap::{IndexMap, IndexSet};
use minicache_config::RunInfo;
use minicache_config::columns::{Role, role};
use minicache_eval::store::{Finished, Row, processor};
use serde::Serialize;

use tolerance::{Rule, rule};

/// What two folders of an experiment have in common and what not.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    /// The experiment.
    pub(crate) id: String,
    /// Cells in both folders.
    pub(crate) compared: usize,
    /// Cells of these that differ.
    pub(crate) different: usize,
    /// Cells in the first folder only.
    pub(crate) only_a: Vec<Cell>,
    /// Cells in the second folder only.
    pub(crate) only_b: Vec<Cell>,
    /// Values that are further apart than they may be.
    pub(crate) differences: Vec<Difference>,
    /// Values that differ and are not judged, other than times.
    pub(crate) unjudged: usize,
    /// Times and rates, which are not judged.
    pub(crate) timings: Vec<Timing>,
}

/// A cell by its key and for readers.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cell {
    pub(crate) key: String,
    pub(crate) model: String,
    pub(crate) task: String,
    pub(crate) variant: String,
}

/// A value that is further apart than it may be.
#[derive(Debug, Serialize)]
pub(crate) struct Difference {
    #[serde(flatten)]
    pub(crate) cell: Cell,
    /// Swept values, and which row of the cell it is.
    pub(crate) row: String,
    pub(crate) column: String,
    pub(crate) a: String,
    pub(crate) b: String,
    pub(crate) tolerance: String,
}

/// A timing of the second folder as a multiple of the first's, over all rows.
#[derive(Debug, Serialize)]
pub(crate) struct Timing {
    pub(crate) column: String,
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

/// One side of a comparison.
struct Side {
    finished: Finished,
    info: Option<RunInfo>,
}

impl Side {
    /// Without a folder there are no rows.
    fn read(dir: Option<&Path>) -> Result<Self> {
        let Some(dir) = dir else { return Ok(Self { finished: Finished::default(), info: None }) };
        let info = if dir.join(RunInfo::FILE).is_file() { Some(RunInfo::read(dir)?) } else { None };
        Ok(Self { finished: Finished::read(dir)?, info })
    }

    /// The instruction set and the processor that a cell was computed with; nothing if not known, and of a GPU, which
    /// rounds otherwise for other batches. Libraries cut sums by the sizes of a processor's caches, so that with the same
    /// instructions calibrated bases differ in their last bits. `run.json` knows that of the last run, which is not the one
    /// that made rows which came from elsewhere.
    fn arithmetic(&self, key: &str) -> Option<(&str, &str)> {
        let (simd, machine, device) = match (self.finished.made.get(key), &self.info) {
            (Some(made), _) => (&made.simd, &made.machine, &made.device),
            (None, Some(info)) => (&info.simd, &info.machine, &info.device),
            (None, None) => return None,
        };
        (device.is_empty() && !simd.is_empty()).then_some((simd, processor(machine)))
    }

    /// The cells that are not in `other`.
    fn beyond(&self, other: &Self) -> Vec<Cell> {
        let cells = self.finished.cells.iter().filter(|(key, _)| !other.finished.cells.contains_key(*key));
        cells.map(|(key, rows)| Cell::new(key, rows)).collect()
    }
}

impl Cell {
    fn new(key: &str, rows: &[Row]) -> Self {
        let text = |column| rows.first().and_then(|row| row.get(column)).cloned().unwrap_or_default();
        Self { key: key.to_string(), model: text("model"), task: text("task"), variant: text("variant") }
    }
}

impl Comparison {
    /// Compares the experiment `id` in two folders, where they have it.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub(crate) fn of(id: &str, a: Option<&Path>, b: Option<&Path>) -> Result<Self> {
        let (a, b) = (Side::read(a)?, Side::read(b)?);
        let mut out = Self {
            id: id.to_string(),
            compared: 0,
            different: 0,
            only_a: a.beyond(&b),
            only_b: b.beyond(&a),
            differences: Vec::new(),
            unjudged: 0,
            timings: Vec::new(),
        };
        let mut times = IndexMap::new();
        for (key, rows) in &a.finished.cells {
            let Some(others) = b.finished.cells.get(key) else { continue };
            let same = a.arithmetic(key).is_some_and(|own| Some(own) == b.arithmetic(key));
            let before = out.differences.len();
            out.cell(&Cell::new(key, rows), rows, others, same, &mut times);
            out.compared += 1;
            out.different += usize::from(out.differences.len() > before);
        }
        out.timings = times.into_iter().map(|(column, ratios)| Timing::new(column, ratios)).collect();
        Ok(out)
    }

    /// Whether all is as it should be; with `all` the second folder has to have every cell of the first.
    pub(crate) fn agrees(&self, all: bool) -> bool {
        self.different == 0 && (!all || self.only_a.is_empty())
    }

    fn cell(
        &mut self,
        cell: &Cell,
        a: &[Row],
        b: &[Row],
        same: bool,
        times: &mut IndexMap<String, Vec<f64>>,
    ) {
        let mut left: Vec<&Row> = b.iter().collect();
        let lacking = |row: &Row, a: &str, b: &str| Difference {
            cell: cell.clone(),
            row: described(row),
            column: "row".into(),
            a: a.into(),
            b: b.into(),
            tolerance: Rule::Exact.to_string(),
        };
        for row in a {
            match left.iter().position(|other| places(other) == places(row)) {
                Some(at) => self.row(cell, [row, left.remove(at)], same, times),
                None => self.differences.push(lacking(row, "there", "missing")),
            }
        }
        self.differences.extend(left.into_iter().map(|row| lacking(row, "missing", "there")));
    }

    fn row(&mut self, cell: &Cell, rows: [&Row; 2], same: bool, times: &mut IndexMap<String, Vec<f64>>) {
        let columns: IndexSet<&String> = rows.iter().flat_map(|row| row.keys()).collect();
        for column in columns {
            let [a, b] = rows.map(|row| row.get(column).map_or("", String::as_str));
            let rule = rule(column, rows, same);
            match role(column) {
                Role::Timing => {
                    if let (Ok(a), Ok(b)) = (a.parse::<f64>(), b.parse::<f64>())
                        && a > 0.0
                        && b > 0.0
                    {
                        times.entry(column.clone()).or_default().push(b / a);
                    }
                }
                Role::Count | Role::Metric if rule == Rule::Free => self.unjudged += usize::from(a != b),
                _ if rule.holds(a, b) => {}
                _ => self.differences.push(Difference {
                    cell: cell.clone(),
                    row: described(rows[0]),
                    column: column.clone(),
                    a: a.to_string(),
                    b: b.to_string(),
                    tolerance: rule.to_string(),
                }),
            }
        }
    }
}

impl Timing {
    fn new(column: String, mut ratios: Vec<f64>) -> Self {
        ratios.sort_by(f64::total_cmp);
        let at = |index: usize| ratios.get(index).copied().unwrap_or(f64::NAN);
        let last = ratios.len().saturating_sub(1);
        Self { column, median: at(last / 2), least: at(0), most: at(last) }
    }
}

/// What tells a row from the others of its cell, whatever the order of the columns.
fn places(row: &Row) -> BTreeSet<(&str, &str)> {
    named(row, |column| role(column) == Role::Place).collect()
}

fn named(row: &Row, wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = (&str, &str)> {
    let columns = row.iter().map(|(column, text)| (column.as_str(), text.as_str()));
    columns.filter(move |(column, text)| !text.is_empty() && wanted(column))
}

/// Swept values and places of a row, for readers.
fn described(row: &Row) -> String {
    let is_swept = |column: &str| role(column) == Role::Name && column.contains('.');
    let parts = named(row, |column| is_swept(column) || role(column) == Role::Place);
    parts.map(|(column, text)| format!("{column} {text}")).collect::<Vec<_>>().join(", ")
}
