//! What is lost for what is saved: the lowest KL at several compressions.

use crate::curves::group;
use crate::data::Data;
use crate::number::significant;

/// Compressions that a sentence looks at.
const LEAST: [f64; 6] = [2.0, 3.0, 5.0, 8.0, 12.0, 16.0];

/// What loses least of every model and task, at each compression or a higher one, in a sentence; `None` for experiments
/// that measure no KL.
pub(crate) fn sentence(data: &Data) -> Option<String> {
    let cells = &data.cells;
    let mut parts = Vec::new();
    for rows in group(cells, &["model".to_string(), "task".to_string()], &cells.all()) {
        let compressed = rows.iter().copied().filter(|&r| data.method(r) != "full");
        let points: Vec<(f64, f64, usize)> = compressed
            .filter_map(|row| Some((cells.number(row, "ratio")?, cells.number(row, "kl")?, row)))
            .collect();
        let best = |least: f64| {
            let enough = points.iter().filter(|(ratio, ..)| *ratio >= least);
            enough.min_by(|(_, a, _), (_, b, _)| a.total_cmp(b))
        };
        let mut found: Vec<(f64, f64, usize)> = LEAST.into_iter().filter_map(best).copied().collect();
        // What is best at one compression and at the next is named once.
        found.dedup_by_key(|(_, _, row)| *row);
        let found: Vec<String> = found
            .into_iter()
            .map(|(ratio, kl, row)| {
                let name = cells.text(row, "variant");
                format!("{} at {}x ({name})", significant(kl, 2), significant(ratio, 3))
            })
            .collect();
        if !found.is_empty() {
            let place = [data.model_label(cells.text(rows[0], "model")), cells.text(rows[0], "task")];
            let place = place.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(", ");
            parts.push(format!("{place}: {}", found.join(", ")));
        }
    }
    let of = LEAST.map(|least| format!("{least}")).join(", ");
    (!parts.is_empty()).then(|| {
        format!(
            "Lowest KL in nats at compressions of {of} and more, as far as there are any: {}.",
            parts.join("; ")
        )
    })
}
