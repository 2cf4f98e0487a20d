//! What determines a cell, and its hash.

use indexmap::IndexMap;
use minicache_config::{Bench, Cell, Experiment, Kind};
use minicache_core::CacheSpec;
use minicache_core::settings::Calibration;
use minicache_models::Description;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::input::Input;
use super::writer::LOOP_TOKENS;
use super::{Result, RunError};
use crate::data::{DataSource, calibration_texts, hex_digest};
use crate::tasks::texts;

/// Raised when the meaning of a column, or how it is computed, changes: cells of older versions then run again.
const FORMAT: u32 = 2;

/// The same for how a model writes its own text: the model and the settings determine all else.
const OWN_TEXT: u32 = 1;

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
    if calibration.is_own_text() {
        return Ok(json!({ "own_text": OWN_TEXT }));
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
            "start_layer": experiment
                .similarity
                .by_position
                .then(|| cell.cache.pairing().unwrap_or_default().start_layer.resolve(model.shape.layers)),
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

/// The order in which settings have stood in keys of cells since the first of them; newer ones follow in their own.
const ORDER: [&str; 22] = [
    "method",
    "start_layer",
    "pairs",
    "t",
    "granularity",
    "key_space",
    "merge",
    "retention",
    "dtype",
    "magnitudes",
    "quant",
    "activation_bits",
    "alpha",
    "sinks",
    "recent",
    "residual",
    "heavy",
    "k",
    "v",
    "calibration",
    "basis",
    "budget_ratio",
];

/// A cache as the settings that its method reads, with the start layer as a number.
pub fn cache_json(spec: &CacheSpec, layers: usize) -> Value {
    let canonical = spec.canonical(Some(layers));
    let mut json = serde_json::to_value(&canonical).unwrap_or_default();
    if let Value::Object(map) = &mut json {
        let all = std::mem::take(map);
        let mut kept: Vec<_> = all.into_iter().filter(|(k, v)| !v.is_null() && canonical.reads(k)).collect();
        kept.sort_by_key(|(key, _)| ORDER.iter().position(|k| k == key).unwrap_or(ORDER.len()));
        map.extend(kept);
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_method_reads_is_in_its_json() {
        let of = |text: &str| cache_json(&CacheSpec::parse(text).expect("a cache"), 30);
        assert_eq!(of("full").to_string(), r#"{"method":"full","dtype":"f16"}"#);
        let merged = of("minicache");
        assert_eq!(
            merged.to_string(),
            concat!(
                r#"{"method":"minicache","start_layer":15,"pairs":"deep","t":0.6,"granularity":"token","#,
                r#""key_space":"cached","merge":"both","#,
                r#""retention":{"rule":"most_distinct","gamma":0.05,"joint":false},"#,
                r#""dtype":"f16","magnitudes":"f16","residual":0}"#
            )
        );
        assert_eq!(of(r#"{ method = "minicache", sinks = 1 }"#)["sinks"], 1);
        assert_eq!(of(r#"{ method = "minicache", sinks = 0 }"#), merged);
        assert_eq!(of("sinks")["sinks"], 4);
        let kivi = of("kivi");
        assert_eq!(kivi["quant"]["bits"], 4);
    }
}
