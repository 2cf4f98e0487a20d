//! From a plot of the experiment file and the rows of `cells.csv` to a figure.

use std::collections::BTreeMap;

use minicache_config::{Kind, Plot, PlotKind};

use crate::axis;
use crate::curves;
use crate::data::Data;
use crate::figure::{Figure, Panel, Point, Series};
use crate::legend;
use crate::number;
use crate::table::number as number_of;
use minicache_config::columns::{self, lower_is_better, meaning};

/// Keys that make panels where nothing else tells their values apart.
const PANELS: [&str; 3] = ["model", "task", "side"];
/// More panels than this are too small to read.
const MOST_PANELS: usize = 12;

/// The figure that `plot` describes over the rows of `data`, or why there is none.
pub(crate) fn build(plot: &Plot, data: &Data) -> Result<Figure, String> {
    if plot.name.is_empty() || !plot.name.chars().all(|c| c.is_alphanumeric() || "_-".contains(c)) {
        return Err("its name must be letters, digits, `_` and `-`, because it names files".into());
    }
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
        captions: Vec::new(),
        notes: Vec::new(),
    };
    for (place, members) in panels {
        let title = facets.iter().zip(&place).map(|(f, v)| data.value_label(f, v)).collect::<Vec<_>>();
        let panel = panel(&mut figure, plot, data, &series, &members, &place, title.join(", "))?;
        figure.panels.extend(panel);
    }
    if figure.panels.is_empty() {
        return Err("none of its values can be drawn".into());
    }
    // with fewer spokes there is no area between them
    if figure.kind == PlotKind::Radar && figure.panels.iter().any(|p| p.x.ticks.len() < 3) {
        figure.kind = PlotKind::Bar;
    }
    legend::finish(&mut figure);
    if let [only] = &series[..] {
        let values = data.cells.distinct(only, &rows);
        if values.len() > 5 && values.iter().all(|v| number_of(v).is_some()) {
            legend::in_order(&mut figure);
        }
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
    // similarity by position has rows for bins of tokens beside those for all tokens
    let names_bins = |c: &str| c == "position";
    let by_bin = names_bins(&plot.x) || plot.series.iter().chain(plot.filter.keys()).any(|c| names_bins(c));
    let mixed = cells.column("position").is_some_and(|c| cells.rows.iter().any(|r| r[c].is_empty()));
    let right_bins = |row: usize| !mixed || by_bin != cells.text(row, "position").is_empty();
    let kept: Vec<usize> = cells.all().into_iter().filter(|&row| passes(row) && right_bins(row)).collect();
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
    let rows: Vec<usize> = panels.iter().flat_map(|(_, members)| members).copied().collect();
    // what all rows share is in the subtitle and not in every name
    let tells = |name: &&String| {
        let column = cells.column(name);
        column.is_some_and(|c| rows.iter().any(|&row| cells.rows[row][c] != cells.rows[rows[0]][c]))
    };
    let mut columns: Vec<String> = plot.series.iter().filter(tells).cloned().collect();
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
            parts.push(data.value_label(name, only));
        }
    }
    for (name, wanted) in &plot.filter {
        if !["model", "task", "side"].contains(&name.as_str()) && !said(name) {
            parts.push(data.value_label(name, &wanted.replace('|', " or ")));
        }
    }
    parts.join(" · ")
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
        let label = parts.map(|(c, v)| data.value_label(c, v)).collect::<Vec<_>>().join(", ");
        let label = match &cells.distinct("variant", &members)[..] {
            [only] if label.is_empty() => only.clone(),
            _ if label.is_empty() => meaning(&plot.y).with_unit(),
            _ => label,
        };
        let full = compares && members.iter().all(|&r| data.method(r) == "full");
        let key = legend::measured(figure, label, full);
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
        let key = legend::paper(figure, &curve);
        let high = curve.points.iter().map(|p| p.y).fold(0.0, f64::max);
        let percent = fractions && high > 1.5 && high <= 100.0;
        let factor = if percent { 0.01 } else { 1.0 };
        let points = curve.points.iter().map(|p| Point { y: p.y * factor, ..*p }).collect();
        series.push(Series { key, points, level: false });
    }
    drop_vast(figure, plot, &mut series);
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
    if front.len() > 1 {
        let named = front.iter().enumerate().map(|(i, &(s, p))| {
            let name = series[s].points[p].row.map(|row| cache_name(data, row));
            format!("{} {}", i + 1, name.unwrap_or_default())
        });
        let place = if title.is_empty() { String::new() } else { format!(", {title}") };
        let named = named.collect::<Vec<_>>().join("; ");
        figure.captions.push(format!("On the front{place}: {named}."));
    }
    Ok(Some(Panel { title, x, y, series, front }))
}

/// The cache of a row, with what it was swept over.
fn cache_name(data: &Data, row: usize) -> String {
    let cells = &data.cells;
    let swept = cells.columns.iter().filter(|c| c.starts_with("cache.") && !cells.text(row, c).is_empty());
    let values: Vec<String> = swept.map(|c| data.value_label(c, cells.text(row, c))).collect();
    let name = cells.text(row, "variant");
    if values.is_empty() { name.to_string() } else { format!("{name} ({})", values.join(", ")) }
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

/// Numbers of this size and above are drawn on no axis, and their inverses count as zero: ranges and ticks are computed
/// from differences and ratios, which have to stay numbers.
const VAST: f64 = 1e100;

/// Leaves out what no axis has place for.
fn drop_vast(figure: &mut Figure, plot: &Plot, series: &mut Vec<Series>) {
    let fits = |x: f64| x.abs() < VAST;
    let snapped = |x: f64| if x.abs() <= 1.0 / VAST { 0.0 } else { x };
    let mut dropped = 0;
    for s in series.iter_mut() {
        let before = s.points.len();
        s.points.retain(|p| fits(p.x) && fits(p.y));
        dropped += before - s.points.len();
        for p in &mut s.points {
            (p.x, p.y) = (snapped(p.x), snapped(p.y));
            let spread = p.spread.filter(|(low, high)| fits(*low) && fits(*high));
            p.spread = spread.map(|(low, high)| (snapped(low), snapped(high)));
        }
    }
    series.retain(|s| !s.points.is_empty());
    if dropped > 0 {
        let (plural, have) = if dropped == 1 { ("", "has") } else { ("s", "have") };
        let what = format!("{dropped} point{plural} of {VAST:e} or beyond {have} no place on its axes");
        figure.notes.push(format!("`{}`: {what}.", plot.name));
    }
}

/// On logarithmic axes there is no place for zero and below.
fn drop_unfit(figure: &mut Figure, plot: &Plot, series: &mut Vec<Series>) {
    let mut dropped: Vec<&str> = Vec::new();
    for s in series.iter_mut() {
        let before = s.points.len();
        let level = s.level;
        s.points.retain(|p| (!plot.log_x || level || p.x > 0.0) && (!plot.log_y || p.y > 0.0));
        let name = figure.legend[s.key].label.as_str();
        if s.points.len() < before && !dropped.contains(&name) {
            dropped.push(name);
        }
        if plot.log_y {
            for p in &mut s.points {
                // down to the end of the axis
                p.spread = p.spread.map(|(low, high)| (low.max(f64::MIN_POSITIVE), high));
            }
        }
    }
    series.retain(|s| !s.points.is_empty());
    if !dropped.is_empty() {
        figure.notes.push(format!(
            "`{}`: values at or below 0 have no place on its logarithmic axis: {}.",
            plot.name,
            dropped.join(", ")
        ));
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
    if matches!(column, "model" | "side") { data.value_label(column, value) } else { value.to_string() }
}

/// One y range for panels that show the same quantity.
fn share_y(figure: &mut Figure) {
    let low = figure.panels.iter().map(|p| p.y.low).fold(f64::INFINITY, f64::min);
    let high = figure.panels.iter().map(|p| p.y.high).fold(f64::NEG_INFINITY, f64::max);
    for panel in &mut figure.panels {
        panel.y = panel.y.widened(low, high);
    }
}
