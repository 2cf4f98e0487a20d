//! Claims about the states of adjacent layers.

use super::{Part, range};
use crate::data::Data;

/// Of `rows`, those of one side in the deeper half of the model, for all tokens together or for bins of them.
fn deep<'a>(
    data: &'a Data,
    rows: &'a [usize],
    side: &'a str,
    by_position: bool,
) -> impl Iterator<Item = usize> + 'a {
    let cells = &data.cells;
    let mixed = cells.column("position").is_some_and(|c| cells.rows.iter().any(|r| r[c].is_empty()));
    rows.iter().copied().filter(move |&row| {
        let half = data.layers(row).map(|l| (l / 2.0).floor());
        let all_tokens = !mixed || cells.text(row, "position").is_empty() != by_position;
        all_tokens
            && cells.text(row, "side") == side
            && half.is_some_and(|h| cells.number(row, "pair").is_some_and(|p| p >= h))
    })
}

fn span((low, high): (f64, f64)) -> String {
    let (low, high) = (format!("{low:.2}"), format!("{high:.2}"));
    if low == high { low } else { format!("{low} to {high}") }.replace('-', "\u{2212}")
}

/// Mean cosines of the deeper half, keys and values.
pub(super) fn similar(data: &Data, rows: &[usize], least: f64) -> Vec<Part> {
    let of = |side: &str, column: &str| {
        range(&deep(data, rows, side, false).filter_map(|r| data.cells.number(r, column)).collect::<Vec<_>>())
    };
    let part = |(side, name): (&str, &str)| {
        let cosines = of(side, "token_cosine")?;
        let related = of(side, "cka").map_or(String::new(), |cka| format!(" (linear CKA {})", span(cka)));
        Some(Part::told(format!("{name} {}{related}", span(cosines)), cosines.0 >= least))
    };
    [("key", "keys"), ("value", "values")].into_iter().filter_map(part).collect()
}

/// Mean cosines of the deep pairs in the first bin of positions, and in the others.
pub(super) fn first_apart(data: &Data, rows: &[usize], least: f64) -> Vec<Part> {
    let cells = &data.cells;
    let part = |(side, name): (&str, &str)| {
        let rows: Vec<usize> =
            deep(data, rows, side, true).filter(|&r| !cells.text(r, "position").is_empty()).collect();
        let first = cells.distinct("position", &rows).into_iter().next()?;
        let mean = |start: bool| {
            let chosen = rows.iter().filter(|&&r| (cells.text(r, "position") == first) == start);
            let all: Vec<f64> = chosen.filter_map(|&r| cells.number(r, "token_cosine")).collect();
            (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
        };
        let (start, rest) = (mean(true)?, mean(false)?);
        let text =
            format!("{name} {} in the first bin and {} after it", span((start, start)), span((rest, rest)));
        Some(Part::told(text, rest >= least && start < rest))
    };
    [("key", "keys"), ("value", "values")].into_iter().filter_map(part).collect()
}
