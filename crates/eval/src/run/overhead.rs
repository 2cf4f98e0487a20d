//! What each step of a cache costs: merging, retaining, packing, attending, on synthetic states of a model's shape (see
//! [`minicache_core::time_steps`]).

use minicache_core::{LayerSimilarity, Resources, time_steps};

use super::Result;
use super::numbers::number;
use super::plan::Planned;
use super::work::ShapeWork;
use crate::store::{Row, Store};

/// What is measured.
pub(crate) const COLUMNS: &[&str] = &["context", "step", "ms"];

/// Runs the open cells of one model: a row for each context and step.
pub(crate) fn run(work: &ShapeWork<'_>, store: &mut Store) -> Result<()> {
    let bench = &work.experiment.bench;
    let similarity = LayerSimilarity { mean: bench.similarity as f32, spread: bench.spread as f32 };
    let per_cell: usize = bench.context.iter().sum();
    let progress = work.overall.progress(&work.experiment.id, per_cell * work.cells.len());
    for Planned { cell, key, .. } in work.cells {
        let mut rows = Vec::new();
        for &context in &bench.context {
            work.stop.check()?;
            let none = Resources::default();
            let times = time_steps(&cell.cache, work.shape, &none, context, similarity)?;
            rows.extend(times.iter().map(|t| {
                let columns = [
                    ("context", context.to_string()),
                    ("step", t.step.to_string()),
                    ("ms", number(1e3 * t.seconds)),
                ];
                columns.into_iter().map(|(c, text)| (c.to_string(), text)).collect::<Row>()
            }));
            progress.add(context);
        }
        store.finish([(key.clone(), rows)])?;
    }
    Ok(())
}
