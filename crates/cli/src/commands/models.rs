//! `minicache models`: the models that have a name.

use anyhow::Result;
use minicache_models::{Entry, Registry};
use serde_json::json;

use crate::global::Global;
use crate::output;

/// Options of `minicache models`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

const HEADINGS: [&str; 11] = [
    "model", "hub", "layers", "heads", "KV heads", "head_dim", "context", "window", "dtype", "gated", "here",
];
/// The columns of numbers are set to the right.
const NUMBERS: std::ops::Range<usize> = 2..8;

/// Lists the registry.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let registry = Registry::load()?;
    if args.json {
        return output::line(json!({ "models": registry.entries() }));
    }
    let mut rows = vec![HEADINGS.map(String::from)];
    rows.extend(registry.entries().iter().map(row));
    let widths: Vec<usize> =
        (0..HEADINGS.len()).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, &width))| {
            if NUMBERS.contains(&c) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        output::line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

fn row(e: &Entry) -> [String; 11] {
    let none = || "-".to_string();
    let yes = |b: bool| if b { "yes" } else { "" }.to_string();
    [
        e.name.clone(),
        e.hub.clone().unwrap_or_else(none),
        e.layers.to_string(),
        e.heads.to_string(),
        e.kv_heads.to_string(),
        e.head_dim.to_string(),
        e.context.to_string(),
        e.window.map_or_else(none, |w| w.to_string()),
        e.dtype.clone(),
        yes(e.gated),
        yes(e.local().is_some()),
    ]
}
