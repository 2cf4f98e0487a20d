//! Claims about bytes and speed.

use super::{Outcome, Part};
use crate::data::Data;
use crate::number::significant;

/// Close enough to a figure that is printed with three digits.
const PRINTED: f64 = 0.995;

/// The most that `variant` is compressed, of bytes held. Arithmetic alone reaches a claim in part.
pub(super) fn ratio(data: &Data, rows: &[usize], variant: &str, least: f64, models: &[String]) -> Vec<Part> {
    let cells = &data.cells;
    let meant = |r: &usize| {
        let model = cells.text(*r, "model");
        cells.text(*r, "variant") == variant && (models.is_empty() || models.iter().any(|m| m == model))
    };
    let found = rows.iter().copied().filter(meant).filter_map(|r| Some((r, cells.number(r, "ratio")?)));
    let Some((row, ratio)) = found.max_by(|a, b| a.1.total_cmp(&b.1)) else { return Vec::new() };
    let nominal = cells.number(row, "nominal_ratio");
    let mut part = Part::told(format!("{}x of bytes held", significant(ratio, 3)), ratio >= PRINTED * least);
    if let Some(nominal) = nominal {
        part.text += &format!(", {}x by arithmetic", significant(nominal, 3));
        if part.outcome == Outcome::NotReproduced && nominal >= PRINTED * least {
            part.outcome = Outcome::Partly;
        }
    }
    vec![part]
}

fn is_full(data: &Data, row: usize) -> bool {
    data.method(row) == "full"
}

/// `row`'s cache, with the batch where there is one.
fn place(data: &Data, row: usize) -> String {
    let name = data.cells.text(row, "variant");
    match data.cells.number(row, "batch") {
        Some(batch) => format!("{name} at batch {batch}"),
        None => name.to_string(),
    }
}

/// Whether `row` is of the full cache, or else of `variant`, of any other where that is empty.
fn is_of(data: &Data, row: usize, full: bool, variant: &str) -> bool {
    match full || variant.is_empty() {
        true => is_full(data, row) == full,
        false => data.cells.text(row, "variant") == variant,
    }
}

/// The most in `column` of `variant`, against the most of the full cache.
pub(super) fn times(data: &Data, rows: &[usize], variant: &str, column: &str, least: f64) -> Vec<Part> {
    let best = |full: bool| {
        let rows = rows.iter().copied().filter(|&r| is_of(data, r, full, variant));
        let numbers = rows.filter_map(|r| Some((r, data.cells.number(r, column)?)));
        numbers.max_by(|a, b| a.1.total_cmp(&b.1))
    };
    let (Some((full, most)), Some((ours, more))) = (best(true), best(false)) else { return Vec::new() };
    let gain = more / most;
    let text = format!(
        "{} times: {} ({}) against {} ({})",
        significant(gain, 3),
        significant(more, 3),
        place(data, ours),
        significant(most, 3),
        place(data, full)
    );
    let outcome = match gain {
        g if g >= 0.8 * least => Outcome::Reproduced,
        g if g > 1.05 => Outcome::Partly,
        _ => Outcome::NotReproduced,
    };
    vec![Part { text, outcome, wanted: None }]
}

/// What `variant` saves of the number in `column` at the full cache's largest batch.
pub(super) fn less(data: &Data, rows: &[usize], variant: &str, column: &str, share: f64) -> Vec<Part> {
    let cells = &data.cells;
    let of = |full: bool| {
        let rows = rows.iter().copied().filter(move |&r| is_of(data, r, full, variant));
        rows.filter_map(|r| Some((r, cells.number(r, column)?)))
    };
    let Some((full, most)) = of(true).max_by(|a, b| a.1.total_cmp(&b.1)) else { return Vec::new() };
    let here = of(false).filter(|&(r, _)| cells.text(r, "batch") == cells.text(full, "batch"));
    let Some((ours, least)) = here.min_by(|a, b| a.1.total_cmp(&b.1)) else { return Vec::new() };
    let saved = 1.0 - least / most;
    let text = format!("{} % less ({})", significant(100.0 * saved, 2), place(data, ours));
    let outcome = match saved {
        s if s >= PRINTED * share => Outcome::Reproduced,
        s if s >= 0.5 * share => Outcome::Partly,
        _ => Outcome::NotReproduced,
    };
    vec![Part { text, outcome, wanted: None }]
}
