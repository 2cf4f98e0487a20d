//! `minicache tasks`: the tasks, their metrics, and where their data would come from.

use anyhow::Result;
use minicache_eval::tasks::{all, groups};
use serde_json::json;

use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// Options of `minicache tasks`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Lists tasks and groups.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let source = global.data_source();
    let mut rows = Vec::new();
    for task in all() {
        let place = source.whereabouts(&task.dataset()).map_err(|e| usage(e.to_string()))?;
        rows.push((task, place.unwrap_or_else(|| "not at hand".to_string())));
    }
    if args.json {
        let tasks: Vec<_> = rows
            .iter()
            .map(|(t, place)| {
                json!({"task": t.name(), "metrics": t.metrics(), "data": place, "about": t.about(), "note": t.note()})
            })
            .collect();
        let groups: serde_json::Map<_, _> =
            groups().into_iter().map(|(n, t)| (n.to_string(), json!(t))).collect();
        return output::line(json!({"tasks": tasks, "groups": groups}));
    }
    let wide = rows.iter().map(|(t, _)| t.name().len()).max().unwrap_or(0);
    let places = rows.iter().map(|(_, place)| place.len()).max().unwrap_or(0);
    for (task, place) in &rows {
        let note = task.note().map(|note| format!("; {note}")).unwrap_or_default();
        output::line(format!("{:wide$}  {place:places$}  {}{note}", task.name(), task.about()))?;
    }
    for (name, members) in groups() {
        let members = if members.len() > 7 { format!("all {}", members.len()) } else { members.join(", ") };
        output::line(format!("{name:wide$}  {:places$}  {members}", "group"))?;
    }
    Ok(())
}
