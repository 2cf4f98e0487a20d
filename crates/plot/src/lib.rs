//! From CSV to reports: PNG and SVG figures, `report.md` per experiment, and one page over all of them.
//!
//! [`report`] reads `results/<id>/cells.csv` and `results/<id>/run.json` (a [`minicache_config::RunInfo`]) and
//! writes the figures that the experiment's `[[plots]]` describe, `report.md` beside them, and `index.html` in the
//! results folder. The same rows give the same bytes. Every number in a report is computed from the rows or read from
//! the paper's tables below `experiments/paper/`.
//!
//! Columns are taken as they come. Beside those that the runner writes, plots may name derived ones: `method` and
//! `bits` of the cache, `merged_layers` and `merged_share` (of all layers, also for the paper's curves), `pair_index`
//! and `depth` (relative depth of a layer pair, also for the paper's curves). Columns `<metric>_lo` and `<metric>_hi`
//! are 95 % intervals, `<metric>_std` a spread. In a plot's filter `a|b` passes either value. Rows without a value on
//! the x axis, such as the full cache in a sweep of the start layer, are drawn as a level over all of it; models,
//! tasks and sides that neither axis, series nor filter tells apart get panels of their own.
//!
//! ```no_run
//! # fn main() -> Result<(), minicache_plot::PlotError> {
//! let summary = minicache_plot::report("results".as_ref(), None)?;
//! for experiment in &summary.experiments {
//!     println!("{}: {} figures", experiment.id, experiment.figures);
//! }
//! # Ok(())
//! # }
//! ```

mod alt;
mod axis;
mod build;
mod claims;
mod curves;
mod data;
mod draw;
mod error;
mod figure;
mod front;
mod html;
mod legend;
mod markdown;
mod number;
mod paper;
mod report;
mod table;
mod verdict;
mod views;

use std::path::{Path, PathBuf};

pub use error::{PlotError, Result};
use minicache_config::{RunInfo, atomic};
use report::Report;

/// What [`report`] made.
#[derive(Debug, Default)]
pub struct Summary {
    /// One per experiment that was reported, in the page's order.
    pub experiments: Vec<Reported>,
    /// The page over all experiments.
    pub index: PathBuf,
    /// Experiments that could not be reported, and why; the page says so too.
    pub problems: Vec<PlotError>,
}

/// One experiment's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    /// Identifier of the experiment.
    pub id: String,
    /// Its `report.md`.
    pub path: PathBuf,
    /// Figures drawn.
    pub figures: usize,
    /// Whether every planned cell is in it.
    pub complete: bool,
    /// Figures left out, missing files: one sentence each.
    pub notes: Vec<String>,
}

/// Rebuilds figures, reports and the page from the CSV in `results`: the folder of one experiment, or the folder of
/// all of them. For one experiment the page in the folder above it is rebuilt too.
///
/// The paper's tables are read from `paper_dir`; without it from `experiments/paper` beside the results folder or
/// below the working directory. Where a table is missing, the report says so.
///
/// A run that was stopped is reported as far as it went. In the folder of all experiments, one that cannot be
/// reported does not keep the others from it: see [`Summary::problems`].
///
/// # Errors
/// No results in the folder; for one experiment, a malformed CSV (with file and line) or `run.json`; a folder that
/// cannot be written to.
pub fn report(results: &Path, paper_dir: Option<&Path>) -> Result<Summary> {
    let one = data::is_experiment(results);
    let whole = std::path::absolute(results).map_err(error::io(results, "read"))?;
    let root = &root(results)?;
    let found = paper_dir.map(Path::to_path_buf).or_else(|| paper::folder(root));
    let found = found.as_deref();
    if one {
        // its own errors are the caller's, those of its neighbours only the page's
        Report::of(&whole, found)?;
    }
    let mut summary = Summary { index: root.join("index.html"), ..Summary::default() };
    let mut reports = Vec::new();
    for dir in experiments(root)? {
        let chosen = !one || dir == whole;
        let made =
            Report::of(&dir, found).and_then(|r| if chosen { r.write(&dir).map(|()| r) } else { Ok(r) });
        match made {
            Ok(report) => {
                if chosen {
                    summary.experiments.push(reported(&report, &dir));
                }
                reports.push(report);
            }
            Err(error) if one && chosen => return Err(error),
            Err(error) => summary.problems.push(error),
        }
    }
    if reports.is_empty() && summary.problems.is_empty() {
        return Err(PlotError::NoResults(results.to_path_buf()));
    }
    if let Some(verdict) = verdict::markdown(&reports) {
        let path = root.join("verdict.md");
        atomic::replace(&path, verdict.as_bytes()).map_err(error::io(&path, "write"))?;
    }
    let problems: Vec<String> = summary.problems.iter().map(|p| relative(&p.to_string(), root)).collect();
    let page = html::render(&reports, &problems)?;
    atomic::replace(&summary.index, page.as_bytes()).map_err(error::io(&summary.index, "write"))?;
    Ok(summary)
}

/// Whether `dir` is the folder of an experiment.
pub fn is_experiment(dir: &Path) -> bool {
    data::is_experiment(dir)
}

/// Whether `results` is the folder of an experiment, or has one in it.
pub fn has_results(results: &Path) -> bool {
    data::is_experiment(results) || experiments(results).is_ok_and(|found| !found.is_empty())
}

/// The folder of all experiments, of which `results` is one or which it is.
///
/// # Errors
/// A working directory that is not there any more.
pub fn root(results: &Path) -> Result<PathBuf> {
    let whole = std::path::absolute(results).map_err(error::io(results, "read"))?;
    let parent = whole.parent().filter(|_| data::is_experiment(results));
    Ok(parent.unwrap_or(&whole).to_path_buf())
}

fn reported(report: &Report, dir: &Path) -> Reported {
    let figure_notes = report.figures.iter().flat_map(|(f, _)| &f.notes);
    Reported {
        id: report.data.id.clone(),
        path: dir.join("report.md"),
        figures: report.figures.len(),
        complete: report.data.incomplete().is_none(),
        notes: report.data.notes.iter().chain(&report.notes).chain(figure_notes).cloned().collect(),
    }
}

/// Paths in the page are those below the results folder.
fn relative(message: &str, root: &Path) -> String {
    message.replace(&format!("{}{}", root.display(), std::path::MAIN_SEPARATOR), "")
}

/// The experiments' folders below `root`, in the page's order.
///
/// # Errors
/// A folder that cannot be listed.
pub fn experiments(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(error::io(root, "list"))? {
        let path = entry.map_err(error::io(root, "list"))?.path();
        if path.is_dir() && data::is_experiment(&path) {
            found.push(path);
        }
    }
    found.sort_by_cached_key(|path| {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let place = RunInfo::read(path).ok().and_then(|info| info.experiment.place);
        (place.unwrap_or(u32::MAX), name)
    });
    Ok(found)
}
