//! From rows to the points of a series: measured ones, the paper's, and the Pareto front.

use minicache_config::{Plot, PlotKind};

use crate::data::Data;
use crate::figure::{Point, Series};
use crate::paper::plain;
use crate::table::Table;

/// Points of one measured series.
#[derive(Debug, Clone, Default)]
pub(crate) struct Curve {
    /// Values by x.
    pub(crate) points: Vec<Point>,
    /// The value of rows without an x.
    pub(crate) level: Option<Point>,
    /// Points that are means over several rows.
    pub(crate) averaged: usize,
}

/// One curve of the paper.
#[derive(Debug, Clone)]
pub(crate) struct PaperCurve {
    /// Column of the paper's table.
    pub(crate) column: String,
    /// Model that it was measured on; may be empty.
    pub(crate) model: String,
    /// The panel's place chose this column, so its name need not be said.
    pub(crate) placed: bool,
    /// Values by x.
    pub(crate) points: Vec<Point>,
}

impl PaperCurve {
    /// `paper, LLaMA-3-70B: mean`.
    pub(crate) fn label(&self) -> String {
        let model = if self.model.is_empty() { "paper".into() } else { format!("paper, {}", self.model) };
        format!("{model}: {}", self.column.replace('_', " "))
    }
}

/// `rows` by the values of `columns`, in order of first appearance.
pub(crate) fn group(cells: &Table, columns: &[String], rows: &[usize]) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<usize>> = Vec::new();
    for &row in rows {
        let same = |g: &&mut Vec<usize>| columns.iter().all(|c| cells.text(g[0], c) == cells.text(row, c));
        match out.iter_mut().find(same) {
            Some(members) => members.push(row),
            None => out.push(vec![row]),
        }
    }
    out
}

/// The points of the series that `members` make.
pub(crate) fn of(plot: &Plot, cells: &Table, members: &[usize], categories: Option<&[String]>) -> Curve {
    let place = |row: usize| match categories {
        Some(names) => names.iter().position(|n| n == cells.text(row, &plot.x)).map(|i| i as f64),
        None => cells.number(row, &plot.x),
    };
    let mut by_x: Vec<(f64, Vec<usize>)> = Vec::new();
    let mut level = Vec::new();
    for &row in members {
        match place(row) {
            Some(x) if plot.kind == PlotKind::Scatter => by_x.push((x, vec![row])),
            Some(x) => match by_x.iter_mut().find(|(at, _)| *at == x) {
                Some((_, rows)) => rows.push(row),
                None => by_x.push((x, vec![row])),
            },
            None => level.push(row),
        }
    }
    by_x.sort_by(|a, b| a.0.total_cmp(&b.0));
    let averaged = by_x.iter().filter(|(_, rows)| rows.len() > 1).count();
    let points = by_x.iter().filter_map(|(x, rows)| mean(plot, cells, *x, rows)).collect();
    let level = if plot.kind == PlotKind::Line { mean(plot, cells, 0.0, &level) } else { None };
    Curve { points, level, averaged }
}

/// The mean of y over `rows`. Half widths of bands are averaged; confidence intervals of n independent rows shrink
/// as the root of their squares' sum over n.
fn mean(plot: &Plot, cells: &Table, x: f64, rows: &[usize]) -> Option<Point> {
    let ys: Vec<f64> = rows.iter().filter_map(|&row| cells.number(row, &plot.y)).collect();
    if ys.is_empty() {
        return None;
    }
    let n = ys.len() as f64;
    let y = ys.iter().sum::<f64>() / n;
    let spread = match &plot.band {
        Some(band) => {
            let widths: Vec<f64> = rows.iter().filter_map(|&row| cells.number(row, band)).collect();
            let half = widths.iter().sum::<f64>() / widths.len() as f64;
            (!widths.is_empty()).then_some((y - half, y + half))
        }
        None => {
            let side = |suffix: &str, sign: f64| {
                let column = format!("{}{suffix}", plot.y);
                let squares: Option<f64> = rows
                    .iter()
                    .map(|&row| {
                        let end = cells.number(row, &column)?;
                        Some((end - cells.number(row, &plot.y)?).powi(2))
                    })
                    .sum();
                squares.map(|s| y + sign * s.sqrt() / n)
            };
            side("_lo", -1.0).zip(side("_hi", 1.0))
        }
    };
    let row = if let [only] = rows { Some(*only) } else { None };
    Some(Point { x, y, spread, row })
}

/// The paper's curves for the panel at `place` (values of model, task, side). New categories are appended.
pub(crate) fn paper(
    plot: &Plot,
    data: &Data,
    place: &[String],
    rows: &[usize],
    categories: &mut Option<Vec<String>>,
) -> Vec<PaperCurve> {
    let Some(x_column) = &plot.paper_x else { return Vec::new() };
    let has = |t: &Table| t.column(x_column).is_some() && plot.paper_y.iter().any(|y| t.column(y).is_some());
    let Some(source) = data.papers.iter().find(|p| has(&p.table)) else { return Vec::new() };
    let mut here: Vec<String> = place.iter().map(|p| plain(p)).collect();
    if let [only] = &data.cells.distinct("task", rows)[..] {
        here.push(plain(only));
    }
    let chosen: Vec<&String> = plot.paper_y.iter().filter(|y| here.contains(&plain(y))).collect();
    let placed = !chosen.is_empty();
    let columns = if placed { chosen } else { plot.paper_y.iter().collect() };
    let by_model: Vec<String> = if x_column == "model" { Vec::new() } else { vec!["model".to_string()] };
    let mut out = Vec::new();
    for column in columns {
        for members in group(&source.table, &by_model, &source.table.all()) {
            let model = match source.table.text(members[0], "model") {
                own if !own.is_empty() && x_column != "model" => own,
                _ => &source.model,
            };
            let mut points: Vec<Point> = members
                .iter()
                .filter_map(|&row| {
                    let y = source.table.number(row, column)?;
                    let x = match categories {
                        None => source.table.number(row, x_column)?,
                        Some(names) => category(names, source.table.text(row, x_column)),
                    };
                    Some(Point { x, y, spread: None, row: None })
                })
                .collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            if !points.is_empty() {
                out.push(PaperCurve { column: column.clone(), model: model.to_string(), placed, points });
            }
        }
    }
    out
}

/// Index of the category `name`, appended if it is new; `GSM8K` and `gsm8k` are one.
fn category(names: &mut Vec<String>, name: &str) -> f64 {
    let found = names.iter().position(|n| plain(n) == plain(name));
    found.unwrap_or_else(|| {
        names.push(name.to_string());
        names.len() - 1
    }) as f64
}

/// Indices (series, point) of the points that no other point beats in both coordinates, by x.
pub(crate) fn front(series: &[(&Series, bool)], lower_x: bool, lower_y: bool) -> Vec<(usize, usize)> {
    let signed = |p: &Point| (if lower_x { -p.x } else { p.x }, if lower_y { -p.y } else { p.y });
    let mut all: Vec<(usize, usize, (f64, f64))> = Vec::new();
    for (s, (one, measured)) in series.iter().enumerate() {
        if *measured {
            all.extend(one.points.iter().enumerate().map(|(p, point)| (s, p, signed(point))));
        }
    }
    let beaten = |&(_, _, (x, y)): &(usize, usize, (f64, f64))| {
        all.iter().any(|&(_, _, (ox, oy))| ox >= x && oy >= y && (ox > x || oy > y))
    };
    let mut kept: Vec<_> = all.iter().filter(|p| !beaten(p)).collect();
    kept.sort_by(|a, b| a.2.0.total_cmp(&b.2.0));
    kept.into_iter().map(|&(s, p, _)| (s, p)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: &[(f64, f64)]) -> Series {
        let points = points.iter().map(|&(x, y)| Point { x, y, spread: None, row: None }).collect();
        Series { key: 0, points, level: false }
    }

    #[test]
    fn the_front_has_what_nothing_beats() {
        // ratio is better high, KL is better low
        let (a, b) = (series(&[(1.0, 0.0), (2.0, 0.5), (4.0, 0.2)]), series(&[(4.0, 0.3), (5.0, 0.9)]));
        let found = front(&[(&a, true), (&b, true)], false, true);
        assert_eq!(found, [(0, 0), (0, 2), (1, 1)]);
        let found = front(&[(&a, true), (&b, false)], false, true);
        assert_eq!(found, [(0, 0), (0, 2)]);
    }
}
