//! From a plot of the experiment file and the rows of `cells.csv` to what is drawn: panels, axes, series.

use std::collections::BTreeMap;

use minicache_config::{Kind, Plot, PlotKind};

use crate::axis::{self, Axis};
use crate::columns::{self, meaning};
use crate::curves;
use crate::data::Data;
use crate::number;
use crate::paper::plain;

/// A figure, ready to be drawn.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    /// File name without extension.
    pub(crate) name: String,
    /// Title above the panels.
    pub(crate) title: String,
    /// What all panels have in common, such as the model.
    pub(crate) subtitle: String,
    /// How it is drawn.
    pub(crate) kind: PlotKind,
    /// Side by side, one per model, task or side that the plot does not tell apart otherwise.
    pub(crate) panels: Vec<Panel>,
    /// Every series once, in order of appearance.
    pub(crate) legend: Vec<Key>,
    /// What a reader has to know: averaged rows, points left out.
    pub(crate) notes: Vec<String>,
}

/// One set of axes.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    /// What tells it from its neighbours.
    pub(crate) title: String,
    /// Horizontal axis.
    pub(crate) x: Axis,
    /// Vertical axis.
    pub(crate) y: Axis,
    /// What is drawn.
    pub(crate) series: Vec<Series>,
    /// Indices (series, point) of the Pareto front, by x.
    pub(crate) front: Vec<(usize, usize)>,
}

/// One line, set of points or bars.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// Index into the legend.
    pub(crate) key: usize,
    /// Values by x.
    pub(crate) points: Vec<Point>,
    /// One value for every x: a row without the column on the x axis, such as the full cache.
    pub(crate) level: bool,
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Point {
    /// Position on the x axis; the index of a category.
    pub(crate) x: f64,
    /// Value.
    pub(crate) y: f64,
    /// Ends of the band or interval.
    pub(crate) spread: Option<(f64, f64)>,
}

/// How a series looks, and its name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    /// Name.
    pub(crate) label: String,
    /// Colour: 0 is ink, for the full cache; from 1 on those of the palette.
    pub(crate) hue: usize,
    /// Marker shape.
    pub(crate) marker: usize,
    /// From the paper, not measured.
    pub(crate) paper: bool,
    /// Left out of the legend, because one entry stands for all curves of the paper.
    pub(crate) hidden: bool,
}

/// Keys that make panels where nothing else tells their values apart.
const PANELS: [&str; 3] = ["model", "task", "side"];
/// More panels than this are too small to read.
const MOST_PANELS: usize = 12;

/// The figure that `plot` describes over the rows of `data`, or why there is none.
pub(crate) fn build(plot: &Plot, data: &Data) -> Result<Figure, String> {
    let rows = selected(plot, data)?;
    let facets = facets(plot, data, &rows);
    let mut panels: Vec<(Vec<String>, Vec<usize>)> = Vec::new();
    for &row in &rows {
        let place: Vec<String> = facets.iter().map(|f| data.cells.text(row, f).to_string()).collect();
        match panels.iter_mut().find(|(p, _)| *p == place) {
            Some((_, members)) => members.push(row),
            None => panels.push((place, vec![row])),
        }
    }
    let series = series_columns(plot, data, &panels);
    let mut figure = Figure {
        name: plot.name.clone(),
        title: if plot.title.is_empty() { data.title().to_string() } else { plot.title.clone() },
        subtitle: subtitle(plot, data, &rows, &facets, &series),
        kind: plot.kind,
        panels: Vec::new(),
        legend: Vec::new(),
        notes: Vec::new(),
    };
    for (place, members) in panels {
        let title = facets.iter().zip(&place).map(|(f, v)| value_label(data, f, v)).collect::<Vec<_>>();
        let panel = panel(&mut figure, plot, data, &series, &members, &place, title.join(", "))?;
        figure.panels.extend(panel);
    }
    if figure.panels.is_empty() {
        return Err("none of its values can be drawn".into());
    }
    merge_paper_keys(&mut figure);
    for (i, key) in figure.legend.iter_mut().enumerate() {
        let stands_for_others = key.paper && !key.hidden;
        let drawn = figure.panels.iter().flat_map(|p| &p.series).any(|s| s.key == i);
        key.hidden |= !drawn && !stands_for_others;
    }
    figure.notes.dedup();
    if facets == ["side"] {
        share_y(&mut figure);
    }
    Ok(figure)
}

/// The rows that pass the filter and have a value.
fn selected(plot: &Plot, data: &Data) -> Result<Vec<usize>, String> {
    let cells = &data.cells;
    if cells.rows.is_empty() {
        return Err("no cell has finished yet".into());
    }
    for name in [&plot.x, &plot.y].into_iter().chain(plot.filter.keys()) {
        if cells.column(name).is_none() {
            return Err(format!("`cells.csv` has no column `{name}`"));
        }
    }
    let passes = |row: usize| {
        plot.filter.iter().all(|(name, wanted)| {
            let has = cells.text(row, name);
            let same = |w: &str| {
                w == has || matches!((w.parse::<f64>(), has.parse::<f64>()), (Ok(a), Ok(b)) if a == b)
            };
            wanted.split('|').map(str::trim).any(same)
        })
    };
    let kept: Vec<usize> = cells.all().into_iter().filter(|&row| passes(row)).collect();
    if kept.is_empty() {
        return Err("no row passes its filter".into());
    }
    let kept: Vec<usize> = kept.into_iter().filter(|&row| cells.number(row, &plot.y).is_some()).collect();
    if kept.is_empty() { Err(format!("column `{}` has no values", plot.y)) } else { Ok(kept) }
}

/// Columns whose values get panels of their own.
fn facets(plot: &Plot, data: &Data, rows: &[usize]) -> Vec<&'static str> {
    let mut out = Vec::new();
    let mut count = 1;
    for name in PANELS {
        let values = data.cells.distinct(name, rows).len();
        let used = name == plot.x || plot.series.iter().any(|s| s == name);
        if values > 1 && !used && count * values <= MOST_PANELS {
            out.push(name);
            count *= values;
        }
    }
    out
}

/// The plot's series columns, and every key beyond them without which one x would have several values.
fn series_columns(plot: &Plot, data: &Data, panels: &[(Vec<String>, Vec<usize>)]) -> Vec<String> {
    let cells = &data.cells;
    let mut columns: Vec<String> =
        plot.series.iter().filter(|s| cells.column(s).is_some()).cloned().collect();
    if plot.kind == PlotKind::Scatter {
        if columns.is_empty() {
            columns.push("variant".into());
        }
        return columns;
    }
    let written = &cells.columns[..data.written.min(cells.columns.len())];
    let mut free: Vec<&String> = written
        .iter()
        .filter(|c| columns::is_key(c) && **c != plot.x && !columns.contains(c) && !columns::is_internal(c))
        .collect();
    free.sort_by_key(|c| (*c != "variant", !PANELS.contains(&c.as_str())));
    for name in free {
        let ambiguous = panels.iter().any(|(_, members)| {
            let mut seen: BTreeMap<Vec<&str>, &str> = BTreeMap::new();
            members.iter().any(|&row| {
                let mut place: Vec<&str> = columns.iter().map(|c| cells.text(row, c)).collect();
                place.push(cells.text(row, &plot.x));
                let value = cells.text(row, name);
                *seen.entry(place).or_insert(value) != value
            })
        });
        if ambiguous {
            columns.push(name.clone());
        }
    }
    columns
}

/// Models and tasks that all rows share and that no panel says.
fn subtitle(plot: &Plot, data: &Data, rows: &[usize], facets: &[&str], series: &[String]) -> String {
    let said = |name: &str| facets.contains(&name) || plot.x == name || series.iter().any(|s| s == name);
    let mut parts = Vec::new();
    for name in ["model", "task", "side"] {
        if let ([only], false) = (&data.cells.distinct(name, rows)[..], said(name)) {
            parts.push(value_label(data, name, only));
        }
    }
    for (name, wanted) in &plot.filter {
        if !["model", "task", "side"].contains(&name.as_str()) && !said(name) {
            parts.push(value_label(data, name, &wanted.replace('|', " or ")));
        }
    }
    parts.join(" · ")
}

/// A value of a key column for readers.
pub(crate) fn value_label(data: &Data, column: &str, value: &str) -> String {
    match column {
        "model" => data.model_label(value).to_string(),
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
            format!("{} = {value}", name.replace('_', " "))
        }
    }
}

fn panel(
    figure: &mut Figure,
    plot: &Plot,
    data: &Data,
    columns: &[String],
    rows: &[usize],
    place: &[String],
    title: String,
) -> Result<Option<Panel>, String> {
    let cells = &data.cells;
    let mut categories = axis::categories(plot, data, rows);
    let compares = rows.iter().any(|&r| data.method(r) != "full");
    let mut series: Vec<Series> = Vec::new();
    for members in curves::group(cells, columns, rows) {
        let parts = columns.iter().map(|c| (c, cells.text(members[0], c))).filter(|(_, v)| !v.is_empty());
        let label = parts.map(|(c, v)| value_label(data, c, v)).collect::<Vec<_>>().join(", ");
        let label = match &cells.distinct("variant", &members)[..] {
            [only] if label.is_empty() => only.clone(),
            _ if label.is_empty() => meaning(&plot.y).label,
            _ => label,
        };
        let full = compares && members.iter().all(|&r| data.method(r) == "full");
        let key = measured_key(figure, label, full);
        let curve = curves::of(plot, cells, &members, categories.as_deref());
        if curve.averaged > 0 {
            figure.notes.push(format!(
                "`{}`: where several rows share one value of `{}`, their mean is drawn.",
                plot.name, plot.x
            ));
        }
        if !curve.points.is_empty() {
            series.push(Series { key, points: curve.points, level: false });
        }
        if let Some(level) = curve.level {
            series.push(Series { key, points: vec![level], level: true });
        }
    }
    let fractions = data.kind() == Some(Kind::Accuracy)
        && series.iter().flat_map(|s| &s.points).all(|p| (0.0..=1.0).contains(&p.y));
    for curve in curves::paper(plot, data, place, rows, &mut categories) {
        let key = paper_key(figure, &curve);
        let high = curve.points.iter().map(|p| p.y).fold(0.0, f64::max);
        let percent = fractions && high > 1.5 && high <= 100.0;
        let factor = if percent { 0.01 } else { 1.0 };
        let points = curve.points.iter().map(|p| Point { y: p.y * factor, ..*p }).collect();
        series.push(Series { key, points, level: false });
    }
    let unit = if columns::is_bytes(&plot.y) { scale_bytes(&mut series) } else { "" };
    let zero = if plot.log_x { place_zero(&mut series) } else { None };
    drop_unfit(figure, plot, &mut series);
    if series.is_empty() {
        return Ok(None);
    }
    let (mut x, mut y) = axis::of(plot, &series, categories)?;
    if !unit.is_empty() {
        y.label = format!("{} ({unit})", meaning(&plot.y).label);
    }
    if let Some(zero) = zero {
        x.ticks.retain(|(at, _)| *at > zero);
        x.ticks.insert(0, (zero, "0".into()));
    }
    if x.categories {
        let family = common_family(&x.ticks);
        for (_, name) in &mut x.ticks {
            *name = category_label(data, &plot.x, &name[family..]);
        }
        if ["model", "task", "variant", "side"].contains(&plot.x.as_str()) {
            x.label.clear();
        }
    }
    let front = if plot.kind == PlotKind::Scatter {
        let all: Vec<_> = series.iter().map(|s| (s, !figure.legend[s.key].paper)).collect();
        curves::front(&all, lower_is_better(&plot.x), lower_is_better(&plot.y))
    } else {
        Vec::new()
    };
    Ok(Some(Panel { title, x, y, series, front }))
}

/// A sweep that starts at 0 keeps it on a logarithmic axis: left of the smallest other value, marked as 0.
fn place_zero(series: &mut [Series]) -> Option<f64> {
    let points = || series.iter().filter(|s| !s.level).flat_map(|s| &s.points);
    let smallest = points().map(|p| p.x).filter(|x| *x > 0.0).fold(f64::INFINITY, f64::min);
    if !smallest.is_finite() || points().all(|p| p.x != 0.0) {
        return None;
    }
    let place = smallest / 3.0;
    for p in series.iter_mut().filter(|s| !s.level).flat_map(|s| &mut s.points).filter(|p| p.x == 0.0) {
        p.x = place;
    }
    Some(place)
}

/// On logarithmic axes there is no place for zero and below.
fn drop_unfit(figure: &mut Figure, plot: &Plot, series: &mut Vec<Series>) {
    let mut dropped = 0;
    for s in series.iter_mut() {
        let before = s.points.len();
        let level = s.level;
        s.points.retain(|p| (!plot.log_x || level || p.x > 0.0) && (!plot.log_y || p.y > 0.0));
        dropped += before - s.points.len();
        if plot.log_y {
            for p in &mut s.points {
                p.spread = p.spread.map(|(low, high)| (if low > 0.0 { low } else { p.y / 4.0 }, high));
            }
        }
    }
    series.retain(|s| !s.points.is_empty());
    if dropped > 0 {
        let plural = if dropped == 1 { "point at or below 0 has" } else { "points at or below 0 have" };
        figure.notes.push(format!("`{}`: {dropped} {plural} no place on its logarithmic axis.", plot.name));
    }
}

/// Bytes in the binary unit in which the largest reads best.
fn scale_bytes(series: &mut [Series]) -> &'static str {
    let high = series.iter().flat_map(|s| &s.points).map(|p| p.y).fold(0.0, f64::max);
    let (size, unit) = number::byte_unit(high);
    for p in series.iter_mut().flat_map(|s| &mut s.points) {
        p.y /= size;
        p.spread = p.spread.map(|(low, high)| (low / size, high / size));
    }
    unit
}

/// Length of the family that all names begin with, such as `longbench/`.
fn common_family(names: &[number::Tick]) -> usize {
    let family = |name: &str| name.split_once('/').map_or(0, |(f, _)| f.len() + 1);
    let Some((_, first)) = names.first() else { return 0 };
    let length = family(first);
    if names.iter().all(|(_, n)| n.starts_with(&first[..length])) { length } else { 0 }
}

/// A category for readers.
fn category_label(data: &Data, column: &str, value: &str) -> String {
    if matches!(column, "model" | "side") { value_label(data, column, value) } else { value.to_string() }
}

/// Whether less is more in this column.
pub(crate) fn lower_is_better(name: &str) -> bool {
    ["kl", "perplexity", "seconds", "bytes", "loss"].contains(&name)
        || ["_bytes", "_ms", "_us", "_seconds"].iter().any(|s| name.ends_with(s))
}

fn measured_key(figure: &mut Figure, label: String, full: bool) -> usize {
    if let Some(i) = figure.legend.iter().position(|k| !k.paper && k.label == label) {
        return i;
    }
    let hue = if full { 0 } else { next_hue(figure) };
    figure.legend.push(Key { label, hue, marker: marker(hue), paper: false, hidden: false });
    figure.legend.len() - 1
}

/// When the palette begins again, every colour gets another shape.
fn marker(hue: usize) -> usize {
    hue + 3 * (hue.saturating_sub(1) / 7)
}

fn next_hue(figure: &Figure) -> usize {
    figure.legend.iter().map(|k| k.hue).max().unwrap_or(0) + 1
}

/// A curve of the paper takes the colour of the measured series of its name.
fn paper_key(figure: &mut Figure, curve: &curves::PaperCurve) -> usize {
    let label = curve.label();
    if let Some(i) = figure.legend.iter().position(|k| k.paper && k.label == label) {
        return i;
    }
    let name = plain(&curve.column);
    let same = |k: &&Key| {
        let measured = plain(&k.label);
        !k.paper && (measured == name || name == format!("{measured}cache"))
    };
    let alone = figure.legend.iter().filter(|k| !k.paper).count() == 1 && curve.placed;
    let twin = figure.legend.iter().find(same).or_else(|| figure.legend.first().filter(|_| alone));
    let (hue, hidden) = match twin {
        Some(key) => (key.hue, true),
        None => (next_hue(figure), false),
    };
    figure.legend.push(Key { label, hue, marker: marker(hue), paper: true, hidden });
    figure.legend.len() - 1
}

/// Where curves of the paper share the colours of measured ones, one grey dashed entry of the legend says whose
/// they are.
fn merge_paper_keys(figure: &mut Figure) {
    let twins: Vec<&Key> = figure.legend.iter().filter(|k| k.hidden).collect();
    let Some(first) = twins.first() else { return };
    let label = match first.label.split_once(": ") {
        Some((model, _)) => model.to_string(),
        None => first.label.clone(),
    };
    let hue = if twins.len() == 1 { first.hue } else { MUTED_HUE };
    figure.legend.push(Key { label, hue, marker: 0, paper: true, hidden: false });
}

/// The hue of what stands for several series.
pub(crate) const MUTED_HUE: usize = usize::MAX;

/// One y range for panels that show the same quantity.
fn share_y(figure: &mut Figure) {
    let low = figure.panels.iter().map(|p| p.y.low).fold(f64::INFINITY, f64::min);
    let high = figure.panels.iter().map(|p| p.y.high).fold(f64::NEG_INFINITY, f64::max);
    for panel in &mut figure.panels {
        panel.y = panel.y.widened(low, high);
    }
}
