//! What is lost for what is saved: the lowest KL for the compression.

use crate::curves::{self, group};
use crate::data::Data;
use crate::figure::{Point, Series};
use crate::number::significant;

/// Points of a front that a sentence lists.
const LISTED: usize = 6;

/// The front of every model and task in a sentence; `None` for experiments that measure no KL.
pub(crate) fn sentence(data: &Data) -> Option<String> {
    let cells = &data.cells;
    let mut parts = Vec::new();
    for rows in group(cells, &["model".to_string(), "task".to_string()], &cells.all()) {
        let compressed = rows.iter().copied().filter(|&r| data.method(r) != "full");
        let point = |row: usize| {
            let (x, y) = (cells.number(row, "ratio")?, cells.number(row, "kl")?);
            Some(Point { x, y, spread: None, row: Some(row) })
        };
        let points = compressed.filter_map(point).collect();
        let series = Series { key: 0, points, level: false };
        let front = curves::front(&[(&series, true)], false, true);
        let every = front.len().div_ceil(LISTED).max(1);
        let found: Vec<String> = (0..front.len())
            .filter(|i| i % every == 0 || i + 1 == front.len())
            .map(|i| {
                let point = series.points[front[i].1];
                let name = point.row.map_or("", |row| cells.text(row, "variant"));
                format!("{} at {}x ({name})", significant(point.y, 2), significant(point.x, 3))
            })
            .collect();
        if !found.is_empty() {
            let place = [data.model_label(cells.text(rows[0], "model")), cells.text(rows[0], "task")];
            let place = place.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(", ");
            parts.push(format!("{place}: {}", found.join(", ")));
        }
    }
    (!parts.is_empty()).then(|| format!("Lowest KL in nats for the compression: {}.", parts.join("; ")))
}
