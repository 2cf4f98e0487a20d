//! The paper's figures: CSV files below `experiments/paper/`.

use std::path::{Path, PathBuf};

use minicache_config::Paper;

use crate::error::Result;
use crate::table::Table;

/// One of the paper's tables or digitised figures.
#[derive(Debug, Clone)]
pub(crate) struct PaperTable {
    /// What the paper claims.
    pub(crate) claim: String,
    /// The model that the whole table is about; empty where a column says it, or nothing does.
    pub(crate) model: String,
    /// The numbers.
    pub(crate) table: Table,
    /// The columns that stand in the file, without derived ones.
    pub(crate) written: usize,
}

/// Models of the paper: as file names write them, for readers, decoder layers.
const MODELS: &[(&str, &str, f64)] = &[
    ("llama27bchat", "LLaMA-2-7B-Chat", 32.0),
    ("llama213bchat", "LLaMA-2-13B-Chat", 40.0),
    ("llama27b", "LLaMA-2-7B", 32.0),
    ("llama213b", "LLaMA-2-13B", 40.0),
    ("llama38b", "LLaMA-3-8B", 32.0),
    ("llama370b", "LLaMA-3-70B", 80.0),
    ("phi3mini", "Phi-3-Mini", 32.0),
    ("mixtral8x7b", "Mixtral-8x7B", 32.0),
    ("mistral7b", "Mistral-7B", 32.0),
];

/// Letters and digits of a name in lower case: `LLaMA-3-70B` and `llama3_70b` are one.
pub(crate) fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Reads the table that an experiment names; `None` where the file is not there.
pub(crate) fn load(paper: &Paper, dir: Option<&Path>) -> Result<Option<PaperTable>> {
    let Some(path) = dir.map(|d| d.join(&paper.csv)).filter(|p| p.is_file()) else { return Ok(None) };
    let mut table = Table::read(&path)?;
    let written = table.columns.len();
    let stem = plain(path.file_stem().map(|s| s.to_string_lossy()).as_deref().unwrap_or_default());
    let known = MODELS.iter().find(|(key, ..)| stem.contains(key));
    if let Some((_, _, layers)) = known {
        table.derive("merged_share", |t, row| Some((t.number(row, "merged_layers")? / layers).to_string()));
        table.derive("depth", |t, row| {
            Some(((2.0 * t.number(row, "pair_index")? + 1.0) / layers).min(1.0).to_string())
        });
    }
    let model = if table.column("model").is_some() { "" } else { known.map_or("", |(_, label, _)| label) };
    Ok(Some(PaperTable { claim: paper.claim.clone(), model: model.into(), table, written }))
}

/// `experiments/paper` beside the results folder, or below the working directory.
pub(crate) fn folder(results: &Path) -> Option<PathBuf> {
    let beside = results.parent().map(|p| p.join("experiments/paper"));
    beside.into_iter().chain([PathBuf::from("experiments/paper")]).find(|p| p.is_dir())
}
