//! What caches hold for a model of any size: bytes by part, beside the arithmetic of the specification.
//!
//! Nothing of the model but its shape is needed. Bytes are those of real caches filled with synthetic states (see
//! [`minicache_core::footprint`]); the nominal ratio counts bits of a number and layers stored, and neither
//! magnitudes, retained tokens, residual windows nor lists.

use std::collections::HashMap;

use minicache_core::{Footprint, LayerSimilarity, ModelShape, Nominal, Resources, footprint, nominal};

use super::Result;
use super::key::cache_json;
use super::numbers::{number, seconds};
use super::plan::Planned;
use super::work::ShapeWork;
use crate::store::{Row, Store};

/// What is measured.
pub(crate) const COLUMNS: &[&str] = &[
    "context",
    "batch",
    "full_bytes",
    "bytes",
    "ratio",
    "nominal_ratio",
    "arithmetic",
    "states_bytes",
    "directions_bytes",
    "magnitudes_bytes",
    "retained_bytes",
    "residual_bytes",
    "scales_bytes",
    "latents_bytes",
    "state_bytes",
    "seconds",
];

/// What was measured already, by shape, cache and context: models of one shape hold the same.
pub(crate) type Known = HashMap<(String, String, usize), Footprint>;

/// Runs the open cells of one model: a row for each context and batch.
pub(crate) fn run(work: &ShapeWork<'_>, known: &mut Known, store: &mut Store) -> Result<()> {
    let bench = &work.experiment.bench;
    let similarity = LayerSimilarity { mean: bench.similarity as f32, spread: bench.spread as f32 };
    let per_cell: usize = bench.context.iter().sum();
    let progress = work.overall.progress(&work.experiment.id, per_cell * work.cells.len());
    for Planned { cell, key, .. } in work.cells {
        let mut rows = Vec::new();
        for &context in &bench.context {
            work.stop.check()?;
            let start = std::time::Instant::now();
            let name = (
                format!("{:?}", work.shape),
                cache_json(&cell.cache, work.shape.layers).to_string(),
                context,
            );
            let held = match known.get(&name) {
                Some(held) => *held,
                None => footprint(&cell.cache, work.shape, &Resources::default(), context, similarity)?,
            };
            known.insert(name, held);
            let time = start.elapsed().as_secs_f64();
            let arithmetic = nominal(&cell.cache, work.shape, context);
            let of_batch = |&batch: &usize| row(work.shape, context, batch, &held, arithmetic.as_ref(), time);
            rows.extend(bench.batch.iter().map(of_batch));
            progress.add(context);
        }
        store.finish([(key.clone(), rows)])?;
    }
    Ok(())
}

fn row(
    shape: &ModelShape,
    context: usize,
    batch: usize,
    one: &Footprint,
    arithmetic: Option<&Nominal>,
    time: f64,
) -> Row {
    let held = one.times(batch);
    let full = shape.full_bytes(context) * batch;
    let mut row = Row::new();
    let mut put = |column: &str, text: String| row.insert(column.to_string(), text);
    put("context", context.to_string());
    put("batch", batch.to_string());
    put("full_bytes", full.to_string());
    put("bytes", held.total().to_string());
    put("ratio", number(full as f64 / held.total() as f64));
    put("nominal_ratio", arithmetic.map_or_else(String::new, |p| number(p.ratio)));
    put("arithmetic", arithmetic.and_then(|p| p.lines.last().cloned()).unwrap_or_default());
    for (part, bytes) in held.parts() {
        put(&format!("{part}_bytes"), if bytes > 0 { bytes.to_string() } else { String::new() });
    }
    put("seconds", seconds(time));
    row
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use minicache_core::CacheSpec;

    #[test]
    fn a_row_says_what_is_held_and_what_arithmetic_promises() {
        let shape =
            ModelShape { layers: 32, heads: 32, kv_heads: 4, head_dim: 128, scale: 0.1, ..ModelShape::PLAIN };
        let spec = CacheSpec::parse("{ method = \"minicache\", quant = { bits = 4, group = 128 } }").unwrap();
        let similarity = LayerSimilarity::default();
        let held = footprint(&spec, &shape, &Resources::default(), 600, similarity).unwrap();
        let row = row(&shape, 600, 3, &held, nominal(&spec, &shape, 600).as_ref(), 0.5);
        let columns: Vec<&str> = row.keys().map(String::as_str).collect();
        assert_eq!(columns, COLUMNS);
        let get = |column: &str| row[column].parse::<f64>().unwrap_or(0.0);
        assert_eq!(get("full_bytes"), (3 * 600 * 2 * 2 * 32 * 512) as f64);
        assert_eq!(row["arithmetic"], "16 / 4.25 x 32/24 = 5.02x");
        assert_eq!(row["nominal_ratio"], "5.01961");
        // A short context: the window and the group of keys that waits for its last tokens weigh much.
        assert!(get("ratio") < 4.0 && get("ratio") > 3.0, "{}", row["ratio"]);
        let parts: f64 = COLUMNS[7..15].iter().map(|c| get(c)).sum();
        assert_eq!(parts, get("bytes"));
        assert!(row["latents_bytes"].is_empty() && get("magnitudes_bytes") > 0.0);
    }
}
