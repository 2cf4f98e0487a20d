//! One experiment's results folder in memory: rows, what made them, the paper's figures.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use minicache_config::{Kind, RunInfo};

use crate::error::Result;
use crate::paper::{self, PaperTable};
use crate::table::Table;
use minicache_config::columns::is_name;

/// Everything that a report is made from.
#[derive(Debug, Clone)]
pub(crate) struct Data {
    /// Name of the results folder.
    pub(crate) id: String,
    /// What made the rows; absent where `run.json` is.
    pub(crate) info: Option<RunInfo>,
    /// On what each cell was computed, by its key, as far as `made.json` says so.
    pub(crate) made: BTreeMap<String, String>,
    /// Cells of the plan that have rows, where the plan is known.
    pub(crate) finished: Option<usize>,
    /// The rows of `cells.csv`, with derived columns.
    pub(crate) cells: Table,
    /// The columns that stand in the file, without derived ones.
    pub(crate) written: usize,
    /// The paper's figures.
    pub(crate) papers: Vec<PaperTable>,
    /// What a reader has to know about missing parts.
    pub(crate) notes: Vec<String>,
    /// Which tasks were run on the bundled sample: one sentence each, for readers of the report.
    pub(crate) samples: Vec<String>,
}

/// Whether `dir` is an experiment's results folder.
pub(crate) fn is_experiment(dir: &Path) -> bool {
    dir.join("cells.csv").is_file() || dir.join(RunInfo::FILE).is_file()
}

/// On what each cell was computed, and when. What is not there, or damaged, is not known: rows stand without it.
fn made(dir: &Path) -> BTreeMap<String, String> {
    let read = std::fs::read_to_string(dir.join("made.json")).unwrap_or_default();
    let all: BTreeMap<String, serde_json::Value> = serde_json::from_str(&read).unwrap_or_default();
    let words = |made: &serde_json::Value| {
        let parts = ["device", "machine", "date"].map(|key| made[key].as_str().unwrap_or_default());
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
    };
    all.iter().map(|(key, made)| (key.clone(), words(made))).collect()
}

impl Data {
    /// Reads the results folder `dir`.
    pub(crate) fn load(dir: &Path, paper_dir: Option<&Path>) -> Result<Self> {
        let (mut notes, mut samples) = (Vec::new(), Vec::new());
        let info = if dir.join(RunInfo::FILE).is_file() { Some(RunInfo::read(dir)?) } else { None };
        if info.is_none() {
            notes.push("`run.json` is missing, so command, settings and figures are not known.".to_string());
        }
        let mut cells = Table::read_growing(&dir.join("cells.csv"))?;
        let planned = info.iter().flat_map(|i| i.keys.iter().map(String::as_str)).collect();
        let finished = keys(&cells, &planned);
        let rows = cells.rows.len();
        leave_out(&mut cells, &planned);
        if cells.rows.len() < rows {
            let count = rows - cells.rows.len();
            let which = "of other settings that have the names of those shown";
            notes.push(format!("`cells.csv` has {count} more rows, {which}; they are left out here."));
        }
        let written = cells.columns.len();
        derive(&mut cells, info.as_ref());
        let mut papers = Vec::new();
        for wanted in info.iter().flat_map(|i| &i.experiment.paper) {
            match paper::load(wanted, paper_dir)? {
                Some(table) => papers.push(table),
                None => notes.push(format!("The paper's figures `{}` were not found.", wanted.csv)),
            }
        }
        for task in cells.distinct("task", &cells.all()) {
            let origin = info.as_ref().and_then(|i| i.origins.get(&task)).map_or("", String::as_str);
            if origin.contains("bundled sample") {
                samples.push(format!("`{task}` is the bundled sample, not the original data set."));
            }
        }
        let id = match &info {
            Some(i) => i.experiment.id.clone(),
            None => dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        };
        Ok(Self { id, info, made: made(dir), finished, cells, written, papers, notes, samples })
    }

    /// Title for readers.
    pub(crate) fn title(&self) -> &str {
        self.info.as_ref().map(|i| i.experiment.title.as_str()).filter(|t| !t.is_empty()).unwrap_or(&self.id)
    }

    /// Kind of the experiment.
    pub(crate) fn kind(&self) -> Option<Kind> {
        self.info.as_ref().map(|i| i.experiment.kind)
    }

    /// Why the results are not complete; `None` if they are.
    pub(crate) fn incomplete(&self) -> Option<String> {
        let rows = self.cells.rows.len();
        if rows == 0 {
            return Some("No cell has finished yet.".into());
        }
        let torn = if self.cells.torn { " The last row was cut off and is left out." } else { "" };
        let Some(info) = &self.info else {
            return self.cells.torn.then(|| format!("The run was stopped.{torn}"));
        };
        match (info.finished, self.kind()) {
            (true, _) if !self.cells.torn => None,
            _ if self.finished.is_some() => {
                let finished = self.finished.unwrap_or_default();
                Some(format!("The run has not finished: {finished} of {} cells so far.{torn}", info.planned))
            }
            // these write several rows per cell
            (_, Some(Kind::Similarity | Kind::Memory | Kind::Throughput | Kind::Overhead)) => {
                Some(format!("The run has not finished: {rows} rows so far.{torn}"))
            }
            _ if info.planned > 0 => {
                Some(format!("The run has not finished: {rows} of {} cells so far.{torn}", info.planned))
            }
            _ => Some(format!("The run has not finished: {rows} cells so far.{torn}")),
        }
    }

    /// Name of a model for readers.
    pub(crate) fn model_label<'a>(&'a self, name: &'a str) -> &'a str {
        let label = self.info.as_ref().and_then(|i| i.models.get(name)).map(|m| m.label.as_str());
        label.filter(|l| !l.is_empty()).unwrap_or(name)
    }

    /// A value of a key column for readers.
    pub(crate) fn value_label(&self, column: &str, value: &str) -> String {
        match column {
            "model" => self.model_label(value).to_string(),
            "side" => match value {
                "key" => "keys".into(),
                "value" => "values".into(),
                "hidden" => "hidden states".into(),
                other => other.into(),
            },
            "variant" | "task" | "method" => value.to_string(),
            _ => {
                let short = column.rsplit('.').next().unwrap_or(column);
                let name = if short == "gamma" { "γ" } else { short };
                // Latents have the same settings for both sides.
                let side = match column.rsplit('.').nth(1) {
                    Some("k") => " of keys",
                    Some("v") => " of values",
                    _ => "",
                };
                format!("{}{side} = {value}", name.replace('_', " "))
            }
        }
    }

    /// Where a task's data came from; empty if not known.
    pub(crate) fn origin(&self, task: &str) -> &str {
        self.info.as_ref().and_then(|i| i.origins.get(task)).map_or("", String::as_str)
    }

    /// Decoder layers of the model of a row.
    pub(crate) fn layers(&self, row: usize) -> Option<f64> {
        layers(&self.cells, row, self.info.as_ref())
    }

    /// The method of a row's cache, such as `minicache`; empty if not known.
    pub(crate) fn method(&self, row: usize) -> &str {
        self.cells.text(row, "method")
    }
}

/// The keys of `planned` that have rows; `None` where no plan is known.
fn keys(cells: &Table, planned: &HashSet<&str>) -> Option<usize> {
    let there = cells.all().into_iter().map(|row| cells.text(row, "key"));
    (!planned.is_empty()).then(|| there.filter(|key| planned.contains(key)).collect::<HashSet<_>>().len())
}

/// Leaves out rows of other plans that a reader could not tell from the plan's: of the same model, task, variant and
/// swept values, with other settings.
fn leave_out(cells: &mut Table, planned: &HashSet<&str>) {
    let telling: Vec<usize> =
        cells.columns.iter().enumerate().filter(|(_, name)| is_name(name)).map(|(c, _)| c).collect();
    let (Some(key), false) = (cells.column("key"), planned.is_empty()) else { return };
    let is_planned = |row: &Vec<String>| planned.contains(row[key].as_str());
    let label = |row: &Vec<String>| -> Vec<String> { telling.iter().map(|&c| row[c].clone()).collect() };
    let taken: HashSet<Vec<String>> = cells.rows.iter().filter(|row| is_planned(row)).map(label).collect();
    cells.rows.retain(|row| is_planned(row) || !taken.contains(&label(row)));
}

fn layers(cells: &Table, row: usize, info: Option<&RunInfo>) -> Option<f64> {
    let known = || info?.models.get(cells.text(row, "model"))?.layers.map(|n| n as f64);
    cells.number(row, "layers").or_else(known)
}

/// Adds what plots may name although the runner does not write it: `method` and `bits` of the cache,
/// `merged_layers` (the paper's x axis: L - S), `merged_share` = (L - S)/L, and for layer pairs `pair_index` (the
/// paper's x axis: half the first layer) and `depth`, the border between the two layers over L.
fn derive(cells: &mut Table, info: Option<&RunInfo>) {
    let cache = |t: &Table, row| serde_json::from_str::<serde_json::Value>(t.text(row, "cache")).ok();
    cells.derive("method", |t, row| Some(cache(t, row)?.get("method")?.as_str()?.to_string()));
    cells.derive("bits", |t, row| Some(cache(t, row)?.get("quant")?.get("bits")?.to_string()));
    let start = |t: &Table, row| {
        // A method that merges no layers has no such key.
        let start = cache(t, row).and_then(|spec| Some(spec.get("start_layer")?.to_string()));
        let total = layers(t, row, info)?;
        let text = match t.text(row, "cache.start_layer") {
            "" => start?,
            swept => swept.to_string(),
        };
        let start =
            if text.trim_matches('"') == "half" { (total / 2.0).floor() } else { text.parse().ok()? };
        Some((total - start, total))
    };
    cells.derive("merged_layers", |t, row| start(t, row).map(|(merged, _)| merged.to_string()));
    cells.derive("merged_share", |t, row| start(t, row).map(|(merged, total)| (merged / total).to_string()));
    cells.derive("pair_index", |t, row| t.number(row, "pair").map(|p| (p / 2.0).to_string()));
    cells.derive("depth", |t, row| {
        let total = layers(t, row, info)?;
        t.number(row, "pair").map(|p| ((p + 1.0) / total).to_string())
    });
}
