//! Bases for the latent caches of a plan, from the text that their `[cache.calibration]` names.

use std::collections::BTreeSet;

use minicache_config::{CacheSpec, Calibration, Group, Method};
use minicache_models::calibrate::{self, BasisOptions};
use minicache_models::{Model, Tokenizer};

use super::{Result, RunError};
use crate::data::DataSource;
use crate::tasks::texts;

/// Calibrates what the latent caches among `specs` need and `model` does not have yet.
pub(crate) fn prepare<'a>(
    model: &Model,
    specs: impl Iterator<Item = &'a CacheSpec> + Clone,
    data: &DataSource,
) -> Result<()> {
    let latents = specs.filter(|s| s.method == Method::Latent && s.basis.is_none());
    for spec in latents.clone() {
        let calibration = &spec.calibration;
        if model.has_basis(calibration) {
            continue;
        }
        let alike = || latents.clone().filter(|s| s.calibration == *calibration);
        let sizes = |group: fn(&CacheSpec) -> Group| {
            alike().filter_map(move |s| match group(s) {
                Group::Layers(n) => Some(n),
                Group::Auto => None,
            })
        };
        let keys: Vec<usize> = sizes(|s| s.k.group).collect::<BTreeSet<_>>().into_iter().collect();
        let values: Vec<usize> = sizes(|s| s.v.group).collect::<BTreeSet<_>>().into_iter().collect();
        let chunks = chunks(calibration, model.need_tokenizer()?, data)?;
        let chunks = chunks.iter().map(Vec::as_slice);
        let moments = calibrate::collect(&model.decoder, chunks, &keys, &values, spec.sinks)?;
        model.add_basis(calibration, calibrate::basis(&moments, BasisOptions::default())?);
    }
    Ok(())
}

/// The calibration text in chunks: one of each document in turn, from the *last* document backwards, because
/// experiments measure on the first ones.
fn chunks(calibration: &Calibration, tokenizer: &Tokenizer, data: &DataSource) -> Result<Vec<Vec<u32>>> {
    let mut docs: Vec<String> = match &calibration.file {
        Some(file) => {
            let read = std::fs::read_to_string(file);
            vec![read.map_err(|e| RunError::Asked(format!("calibration.file: {file}: {e}")))?]
        }
        None => {
            let mut docs = Vec::new();
            for task in calibration.task.split(',') {
                docs.extend(texts(task.trim(), data, None)?.docs.into_iter().map(|d| d.text));
            }
            docs
        }
    };
    docs.reverse();
    let mut out: Vec<Vec<u32>> = Vec::new();
    let mut left = calibration.tokens;
    for round in 0.. {
        let before = out.len();
        for doc in &docs {
            let tokens = tokenizer.encode(doc, round == 0)?;
            if let Some(chunk) = tokens.chunks(calibration.chunk.max(1)).nth(round) {
                let chunk = &chunk[..chunk.len().min(left)];
                left -= chunk.len();
                out.push(chunk.to_vec());
            }
            if left == 0 {
                return Ok(out);
            }
        }
        if out.len() == before {
            return Ok(out);
        }
    }
    Ok(out)
}
