//! What an experiment's report shows besides its rows: the paper's figures, and figures of its own.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// The paper's figures beside the measured ones: a CSV below `experiments/paper/`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paper {
    /// File name below `experiments/paper/`.
    pub csv: String,
    /// What the paper claims, in a sentence.
    #[serde(default)]
    pub claim: String,
}

/// How a figure is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlotKind {
    /// One line per series, with a band where `band` names a column.
    #[default]
    Line,
    /// Points, Pareto front marked.
    Scatter,
    /// Grouped bars.
    Bar,
    /// Radar chart.
    Radar,
}

/// One figure over the columns of `cells.csv`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plot {
    /// File name without extension.
    pub name: String,
    /// Title above the figure.
    #[serde(default)]
    pub title: String,
    /// How it is drawn.
    #[serde(default)]
    pub kind: PlotKind,
    /// Column on the x axis.
    pub x: String,
    /// Column on the y axis.
    pub y: String,
    /// Columns whose values together name a series.
    #[serde(default)]
    pub series: Vec<String>,
    /// Column with the half width of the band around y.
    #[serde(default)]
    pub band: Option<String>,
    /// Only rows with these column values.
    #[serde(default)]
    pub filter: IndexMap<String, String>,
    /// Logarithmic x axis.
    #[serde(default)]
    pub log_x: bool,
    /// Logarithmic y axis.
    #[serde(default)]
    pub log_y: bool,
    /// The paper's curves on the same axes: columns of the paper's CSV.
    #[serde(default)]
    pub paper_x: Option<String>,
    /// Columns of the paper's CSV, one curve each.
    #[serde(default)]
    pub paper_y: Vec<String>,
}
