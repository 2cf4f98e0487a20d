//! `report.md`: one experiment for readers of the repository.

use std::fmt::Write;

use minicache_config::RunInfo;

use crate::claims::Verdict;
use crate::data::Data;
use crate::report::Report;
use crate::views::{View, of_paper};

/// Tables with more rows than this are folded.
const OPEN_ROWS: usize = 40;

/// Longer tables are for programs.
const MOST_ROWS: usize = 250;

/// The report as Markdown.
pub(crate) fn render(report: &Report) -> String {
    let data = &report.data;
    let mut out = format!("# {}\n", data.title());
    let mut paragraph = |text: &str| {
        if !text.trim().is_empty() {
            let _ = write!(out, "\n{}\n", text.trim());
        }
    };
    if let Some(reason) = data.incomplete() {
        paragraph(&format!("**Incomplete.** {reason}"));
    }
    if let Some(info) = &data.info {
        paragraph(&info.experiment.notes);
    }
    for note in data.notes.iter().chain(&data.samples).chain(&report.notes) {
        paragraph(&format!("Note: {note}"));
    }
    for paper in &data.papers {
        if !paper.claim.is_empty() {
            paragraph(&format!("**The paper's claim.** {}", paper.claim));
        }
    }
    if !report.verdicts.is_empty() {
        let lines: Vec<String> = report.verdicts.iter().map(judged).collect();
        paragraph(&format!("**Measured here.**\n\n{}", lines.join("\n")));
    }
    report.front.iter().for_each(|front| paragraph(front));
    for (figure, alt) in &report.figures {
        paragraph(&format!("![{}]({}.png)", alt.replace(['[', ']'], ""), figure.name));
        paragraph(&figure.captions.join("\n\n"));
        paragraph(&figure.notes.iter().map(|n| format!("Note: {n}")).collect::<Vec<_>>().join("\n"));
    }
    for view in &report.views {
        table(&mut out, view);
    }
    for paper in &data.papers {
        table(&mut out, &of_paper(paper));
    }
    out += "\n## What was run\n\n";
    out += &facts(data).iter().map(|(name, value)| format!("* {name}: {value}\n")).collect::<String>();
    if let Some(info) = &data.info
        && !info.command.is_empty()
    {
        let _ = write!(out, "\n```sh\n{}\n```\n", info.command.trim());
    }
    out
}

/// A claim with what was found, as a list item.
fn judged(verdict: &Verdict) -> String {
    format!("* {} **{}**.", verdict.sentences(), capital(verdict.outcome().label()))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}

/// Model, data, samples, machine: name and value.
pub(crate) fn facts(data: &Data) -> Vec<(String, String)> {
    let cells = &data.cells;
    let mut out = Vec::new();
    for model in cells.distinct("model", &cells.all()) {
        let mut parts = vec![data.model_label(&model).to_string()];
        if let Some(m) = data.info.as_ref().and_then(|i| i.models.get(&model)) {
            if !m.weights.is_empty() {
                parts.push(format!("weights {}", m.weights));
            }
            parts.extend(m.layers.map(|n| format!("{n} layers")));
            parts.extend(m.kv_heads.zip(m.head_dim).map(|(h, d)| format!("{h} KV heads of {d}")));
        }
        out.push(("Model".to_string(), parts.join(", ")));
    }
    for task in cells.distinct("task", &cells.all()) {
        let rows: Vec<usize> = cells.all().into_iter().filter(|&r| cells.text(r, "task") == task).collect();
        let mut parts: Vec<String> =
            Some(data.origin(&task).to_string()).filter(|o| !o.is_empty()).into_iter().collect();
        match &cells.distinct("samples", &rows)[..] {
            [] => {}
            [one] => parts.push(format!("{one} samples")),
            many => parts.push(format!("{} samples by cell", many.join(", "))),
        }
        let parts = if parts.is_empty() { "origin not recorded".into() } else { parts.join(", ") };
        out.push((format!("Data, {task}"), parts));
    }
    if let Some(most) = data.info.as_ref().and_then(|i| i.experiment.accuracy.prompt_tokens) {
        let cut = format!("at most {most} tokens of LongBench's, the middle of longer ones cut out");
        out.push(("Prompts".to_string(), cut));
    }
    if let Some(info) = &data.info {
        // Where the text is what was asked for there is nothing to say.
        let short = info.calibrations.iter().filter(|(_, origin)| origin.contains("bundled"));
        out.extend(short.map(|(asked, origin)| (format!("Calibration, {asked}"), origin.clone())));
        out.extend(
            info.chosen.iter().map(|(variant, cache)| (format!("Chosen for {variant}"), cache.clone())),
        );
        out.extend(machines(data, info));
        out.push(("Seed".to_string(), info.experiment.seed.to_string()));
    }
    out
}

/// What computed the rows, and when: of each model where they differ by it.
fn machines(data: &Data, info: &RunInfo) -> Vec<(String, String)> {
    let cells = &data.cells;
    let by_model = cells.distinct("model", &cells.all()).into_iter().map(|model| {
        let rows = cells.all().into_iter().filter(|&row| cells.text(row, "model") == model);
        let mut of: Vec<&str> =
            rows.filter_map(|row| data.made.get(cells.text(row, "key"))).map(String::as_str).collect();
        of.sort_unstable();
        of.dedup();
        (model, of.join("; "))
    });
    let by_model: Vec<(String, String)> = by_model.collect();
    if by_model.iter().any(|(_, made)| *made != by_model[0].1) {
        let name = |model: &str| format!("Machine, {}", data.model_label(model));
        let known = |made: String| if made.is_empty() { "not recorded".into() } else { made };
        return by_model.into_iter().map(|(model, made)| (name(&model), known(made))).collect();
    }
    let all = [("Machine", &info.machine), ("GPU", &info.device), ("Date", &info.date)];
    let known = all.into_iter().filter(|(_, value)| !value.is_empty());
    known.map(|(name, value)| (name.to_string(), value.clone())).collect()
}

pub(crate) fn table(out: &mut String, view: &View) {
    if view.rows.is_empty() {
        return;
    }
    if !view.title.is_empty() {
        let _ = write!(out, "\n### {}\n", view.title);
    }
    if !view.caption.is_empty() {
        let _ = write!(out, "\n{}\n", view.caption);
    }
    let folded = view.rows.len() > OPEN_ROWS;
    if folded {
        let _ = write!(out, "\n<details><summary>{} rows</summary>\n", view.rows.len());
    }
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    out.push('\n');
    *out += &line(view.columns.iter().map(|c| escaped(&c.label)).collect());
    *out += &line(view.columns.iter().map(|c| if c.numeric { "--:" } else { "---" }.to_string()).collect());
    let (rows, more) = view.head(MOST_ROWS);
    for row in rows {
        *out += &line(row.iter().map(|v| escaped(&v.text)).collect());
    }
    if let Some(more) = more {
        let _ = write!(out, "\n{more}\n");
    }
    if folded {
        *out += "\n</details>\n";
    }
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
