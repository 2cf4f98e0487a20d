//! The rows of `cells.csv` as tables for readers: one per model and task, what all rows share said once, intervals
//! with their values; and for several tasks an overview with a column for each.

use minicache_config::Kind;

use crate::curves::group;
use crate::data::Data;
use crate::number::{bytes, significant};
use crate::paper::PaperTable;
use crate::table::number;
use minicache_config::columns::{self, is_bytes, is_internal, is_key, is_metric, meaning, spread_of};

/// A table for readers.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct View {
    /// Heading; may be empty.
    pub(crate) title: String,
    /// What all rows share.
    pub(crate) caption: String,
    /// Column headings.
    pub(crate) columns: Vec<Heading>,
    /// One value per column.
    pub(crate) rows: Vec<Vec<Value>>,
}

impl View {
    /// The first `most` rows, and what to say about the others.
    pub(crate) fn head(&self, most: usize) -> (&[Vec<Value>], Option<String>) {
        let total = self.rows.len();
        let note =
            (total > most).then(|| format!("The first {most} of {total} rows; all are in `cells.csv`."));
        (&self.rows[..total.min(most)], note)
    }
}

/// A column's heading.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Heading {
    /// Name and unit.
    pub(crate) label: String,
    /// Right-aligned.
    pub(crate) numeric: bool,
}

/// One value of a table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Value {
    /// As it is read.
    pub(crate) text: String,
    /// What it is sorted by, if it is a number.
    pub(crate) sort: Option<f64>,
}

/// All tables of an experiment, the overview first.
pub(crate) fn of(data: &Data) -> Vec<View> {
    let mut out: Vec<View> = overview(data).into_iter().collect();
    let by = ["model".to_string(), "task".to_string()];
    let groups = group(&data.cells, &by, &data.cells.all());
    let alone = groups.len() == 1;
    out.extend(groups.iter().map(|rows| detail(data, rows, alone)));
    out
}

/// Scores by task, for experiments with several.
fn overview(data: &Data) -> Option<View> {
    let cells = &data.cells;
    let tasks = cells.distinct("task", &cells.all());
    if data.kind() != Some(Kind::Accuracy) || tasks.len() < 2 {
        return None;
    }
    let written = &cells.columns[..data.written.min(cells.columns.len())];
    let varied = |c: &&String| {
        is_key(c)
            && *c != "task"
            && !cells.distinct(c, &cells.all()).is_empty()
            && cells.rows.iter().any(|r| cells.column(c).is_some_and(|i| r[i] != cells.rows[0][i]))
    };
    let mut keys: Vec<String> = written.iter().filter(varied).cloned().collect();
    if !keys.iter().any(|k| k == "variant") && cells.column("variant").is_some() {
        keys.insert(0, "variant".into());
    }
    let mut columns: Vec<Heading> =
        keys.iter().map(|k| Heading { label: meaning(k).with_unit(), numeric: false }).collect();
    for task in &tasks {
        let row =
            cells.all().into_iter().find(|&r| cells.text(r, "task") == task && metric(data, r).is_some());
        let name = row.and_then(|r| metric(data, r)).map(|m| format!(", {}", meaning(m).label));
        columns.push(Heading { label: format!("{task}{}", name.unwrap_or_default()), numeric: true });
    }
    columns.push(Heading { label: "mean".into(), numeric: true });
    columns.push(Heading { label: "compression ratio".into(), numeric: true });
    let mixed = percent_tasks(data);
    let rows = group(cells, &keys, &cells.all()).into_iter().map(|members| {
        let mut row: Vec<Value> =
            keys.iter().map(|k| key_value(data, k, cells.text(members[0], k))).collect();
        let scores: Vec<Option<f64>> = tasks
            .iter()
            .map(|task| {
                let member = members.iter().find(|&&r| cells.text(r, "task") == task)?;
                cells.number(*member, metric(data, *member)?)
            })
            .collect();
        row.extend(scores.iter().map(|s| plain_value(*s)));
        let all: Option<Vec<f64>> = scores.into_iter().collect();
        // Scores on different scales have no mean.
        let all = all.filter(|_| mixed.is_empty());
        row.push(plain_value(all.map(|s| s.iter().sum::<f64>() / s.len() as f64)));
        let ratios: Vec<f64> = members.iter().filter_map(|&r| cells.number(r, "ratio")).collect();
        let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
        row.push(plain_value((!ratios.is_empty()).then_some(ratio)));
        row
    });
    let title = "Overview".to_string();
    Some(View { title, caption: "Scores by task.".into(), columns, rows: rows.collect() })
}

/// Tasks whose main result is printed as 0..100 where that of others is 0..1: BLEU beside exact match. None where all
/// tasks are alike.
pub(crate) fn percent_tasks(data: &Data) -> Vec<String> {
    let cells = &data.cells;
    let high = |task: &str| {
        let rows = cells.all().into_iter().filter(|&r| cells.text(r, "task") == task);
        rows.filter_map(|r| cells.number(r, metric(data, r)?)).fold(0.0, f64::max)
    };
    let tasks = cells.distinct("task", &cells.all());
    let (percent, plain): (Vec<String>, Vec<String>) = tasks.into_iter().partition(|t| high(t) > 1.0);
    if data.kind() == Some(Kind::Accuracy) && !plain.is_empty() { percent } else { Vec::new() }
}

/// The column with the main result of a row: what the experiment's figures show, else `score`, else the first result.
pub(crate) fn metric(data: &Data, row: usize) -> Option<&str> {
    let cells = &data.cells;
    let plotted = data.info.iter().flat_map(|i| &i.experiment.plots).map(|p| p.y.as_str());
    let listed = cells.columns.iter().map(String::as_str);
    let mut wanted = plotted.chain(["score"]).chain(listed);
    wanted.find(|c| is_metric(c) && cells.number(row, c).is_some())
}

fn plain_value(x: Option<f64>) -> Value {
    Value { text: x.map_or("–".into(), |x| significant(x, 4)), sort: x }
}

fn key_value(data: &Data, column: &str, text: &str) -> Value {
    let sort = number(text);
    let shown = match column {
        "model" | "side" => data.value_label(column, text),
        _ => text.to_string(),
    };
    Value { text: if shown.is_empty() { "–".into() } else { shown }, sort }
}

/// Every row of one model and task.
fn detail(data: &Data, rows: &[usize], alone: bool) -> View {
    let cells = &data.cells;
    let mut shared = Vec::new();
    let mut shown: Vec<&String> = Vec::new();
    for name in &cells.columns[..data.written.min(cells.columns.len())] {
        let folded = spread_of(name).is_some_and(|of| cells.column(of).is_some());
        let in_title = !alone && (name == "model" || name == "task");
        if is_internal(name) || folded || in_title {
            continue;
        }
        let values = cells.distinct(name, rows);
        let everywhere = rows.iter().all(|&r| !cells.text(r, name).is_empty());
        match &values[..] {
            [] => {}
            [only] if everywhere && (rows.len() > 1 || name == "model" || name == "task") => {
                let (meaning, value) = (meaning(name), value(data, name, rows[0]));
                let value = if value.text.is_empty() { only.clone() } else { value.text };
                let unit = if meaning.unit.is_empty() || name == "ratio" {
                    String::new()
                } else {
                    format!(" {}", meaning.unit)
                };
                shared.push(format!("{} {value}{unit}", meaning.label));
            }
            _ => shown.push(name),
        }
    }
    let columns = shown
        .iter()
        .map(|name| Heading {
            label: heading(name),
            numeric: rows.iter().all(|&r| {
                let text = cells.text(r, name);
                text.is_empty() || number(text).is_some()
            }),
        })
        .collect();
    let body = rows.iter().map(|&row| shown.iter().map(|name| value(data, name, row)).collect()).collect();
    let place = |name: &str| Some(cells.text(rows[0], name)).filter(|t| !t.is_empty());
    let parts = [place("model").map(|m| data.model_label(m)), place("task")];
    let title =
        if alone { String::new() } else { parts.into_iter().flatten().collect::<Vec<_>>().join(", ") };
    let caption = if shared.is_empty() { String::new() } else { format!("All rows: {}.", shared.join("; ")) };
    View { title, caption, columns, rows: body }
}

/// Heading of a column. What a compression ratio is the ratio of is said at the axes.
fn heading(name: &str) -> String {
    if name == "ratio" { meaning(name).label } else { meaning(name).with_unit() }
}

/// One value with its interval or spread.
fn value(data: &Data, name: &str, row: usize) -> Value {
    let cells = &data.cells;
    let text = cells.text(row, name);
    if is_key(name) {
        return key_value(data, name, text);
    }
    let Some(x) = number(text) else {
        return Value { text: if text.is_empty() { "–".into() } else { text.to_string() }, sort: None };
    };
    if is_bytes(name) {
        return Value { text: bytes(x), sort: Some(x) };
    }
    let of = |suffix: &str| cells.number(row, &format!("{name}{suffix}"));
    let digits = if columns::is_metric(name) { 4 } else { 3 };
    let shown = if x.fract() == 0.0 && x.abs() < 1e7 { format!("{x}") } else { significant(x, digits) };
    let shown = match (of("_lo").zip(of("_hi")), of("_std")) {
        (Some((low, high)), _) => format!("{shown} [{}, {}]", significant(low, 3), significant(high, 3)),
        (None, Some(std)) => format!("{shown} ± {}", significant(std, 2)),
        _ => shown,
    };
    Value { text: shown, sort: Some(x) }
}

/// A table of the paper as it stands in its file.
pub(crate) fn of_paper(paper: &PaperTable) -> View {
    let table = &paper.table;
    let columns = (0..paper.written).map(|i| Heading {
        label: table.columns[i].replace('_', " "),
        numeric: table.rows.iter().all(|r| r[i].is_empty() || number(&r[i]).is_some()),
    });
    let value = |text: &String| Value {
        text: if text.is_empty() { "–".into() } else { text.clone() },
        sort: number(text),
    };
    let caption = table.comments.iter().map(|c| capital(c)).collect::<Vec<_>>().join(" ");
    let title =
        if paper.model.is_empty() { "The paper".into() } else { format!("The paper, {}", paper.model) };
    let rows = table.rows.iter().map(|r| r[..paper.written].iter().map(value).collect()).collect();
    View { title, caption, columns: columns.collect(), rows }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let end = if text.ends_with('.') { "" } else { "." };
    chars.next().map_or(String::new(), |c| format!("{}{}{end}", c.to_uppercase(), chars.as_str()))
}
