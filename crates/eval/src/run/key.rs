//! What determines a cell, and its hash.

use indexmap::IndexMap;
use minicache_config::{Bench, CacheSpec, Calibration, Cell, Experiment, Kind};
use minicache_models::Description;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::engine::LOOP_TOKENS;
use super::input::Input;
use super::{Result, RunError};
use crate::data::{DataSource, calibration_texts, hex_digest};
use crate::tasks::texts;

/// Raised when the meaning of a column, or how it is computed, changes: cells of older versions then run again.
const FORMAT: u32 = 2;

/// What text that an experiment calibrates on depends on beside its own settings: the data that it is taken from, the
/// documents that it leaves to measuring, and what makes up for them.
///
/// # Errors
/// Calibration text that is not there.
pub(crate) fn text(
    experiment: &Experiment,
    calibration: &Calibration,
    inputs: &IndexMap<String, Input>,
    data: &DataSource,
) -> Result<Value> {
    if let Some(file) = &calibration.file {
        let read = std::fs::read(file);
        let bytes = read.map_err(|e| RunError::Asked(format!("calibration.file: {file}: {e}")))?;
        return Ok(json!(hex_digest(&bytes)));
    }
    let sources = calibration.tasks().map(|task| Ok(texts(task, data, Some(1))?.fingerprint));
    let measured = inputs.iter().map(|(task, i)| (task, i.fingerprint(), experiment.limit_of(task)));
    let bundled: String = calibration_texts().map(|(_, text)| text).collect();
    Ok(json!({
        "sources": sources.collect::<Result<Vec<_>>>()?,
        "measured": measured.collect::<Vec<_>>(),
        "bundled": hex_digest(bundled.as_bytes()),
    }))
}

/// The key of a cell: the first 16 hexadecimal digits of the SHA-256 of everything that determines its rows. `data` is
/// the fingerprint of the task's data, `calibrated` what [`text()`] gives for what the cell is calibrated on.
pub(crate) fn of(
    experiment: &Experiment,
    cell: &Cell,
    model: &Description,
    data: Option<&str>,
    calibrated: &[Value],
) -> String {
    let kind = match experiment.kind {
        Kind::Similarity => json!({
            "tokens": experiment.similarity.tokens,
            "by_position": experiment.similarity.by_position,
            // Rows by position are of the pairs that a merge would take.
            "start_layer": experiment.similarity.by_position.then(|| cell.cache.start_layer.resolve(model.shape.layers)),
        }),
        Kind::Fidelity => json!({ "fidelity": experiment.fidelity }),
        Kind::Memory => {
            let Bench { context, batch, similarity, spread, .. } = &experiment.bench;
            json!({ "context": context, "batch": batch, "similarity": similarity, "spread": spread })
        }
        Kind::Throughput => {
            let Bench { input, output, batch, steps, memory_budget, .. } = &experiment.bench;
            json!({ "lengths": [input, output], "batch": batch, "steps": steps, "budget": memory_budget })
        }
        Kind::Overhead => {
            let Bench { context, similarity, spread, .. } = &experiment.bench;
            json!({ "context": context, "similarity": similarity, "spread": spread })
        }
        Kind::Accuracy => json!({ "accuracy": experiment.accuracy, "loop": LOOP_TOKENS }),
    };
    let cache = match experiment.kind {
        Kind::Similarity => Value::Null,
        _ => cache_json(&cell.cache, model.shape.layers),
    };
    let mut all = json!({
        "format": FORMAT,
        "kind": experiment.kind,
        "settings": kind,
        "model": model.fingerprint,
        "load": cell.settings,
        "task": cell.task,
        "data": data,
        "limit": experiment.limit_of(&cell.task),
        "seed": experiment.seed,
        "cache": cache,
    });
    if !calibrated.is_empty() {
        all["calibrated"] = json!(calibrated);
    }
    let digest = Sha256::digest(all.to_string());
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// A cache as the settings that its method reads, with the start layer as a number.
pub fn cache_json(spec: &CacheSpec, layers: usize) -> Value {
    let canonical = spec.canonical(Some(layers));
    let mut json = serde_json::to_value(&canonical).unwrap_or_default();
    if let Value::Object(map) = &mut json {
        map.retain(|key, value| !value.is_null() && (canonical.reads(key) || key == "quant"));
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use minicache_config::Method;

    #[test]
    fn only_what_a_method_reads_is_in_its_json() {
        let full = CacheSpec { t: 0.1, sinks: Some(9), ..CacheSpec::default() };
        assert_eq!(cache_json(&full, 30).to_string(), r#"{"method":"full","dtype":"f16"}"#);
        let merged = cache_json(&CacheSpec::of(Method::Minicache), 30);
        assert_eq!(merged["start_layer"], 15);
        assert!(merged.get("sinks").is_none() && merged.get("quant").is_none());
        let with = CacheSpec { sinks: Some(1), ..CacheSpec::of(Method::Minicache) };
        assert_eq!(cache_json(&with, 30)["sinks"], 1);
        assert_eq!(cache_json(&CacheSpec { sinks: Some(0), ..with }, 30), merged);
        assert_eq!(cache_json(&CacheSpec::of(Method::Sinks), 30)["sinks"], 4);
        let kivi = cache_json(&CacheSpec::of(Method::Kivi), 30);
        assert_eq!(kivi["quant"]["bits"], 4);
    }
}
