//! Calibration text: bases for the latent caches of a plan, and the alignment of a model.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use minicache_config::{CacheSpec, Calibration, Group, LatentSide, Method};
use minicache_core::latent::Grouping;
use minicache_models::calibrate::BasisOptions;
use minicache_models::{Model, Tokenizer};

use super::{Result, RunError, choose};
use crate::data::DataSource;
use crate::tasks::texts;

/// Calibrates what the latent caches among `specs` need and `model` does not have yet. Gives the documents used.
///
/// # Errors
/// Text or a tokenizer that is not there, or what [`Model::calibrate`] meets.
pub fn prepare<'a>(
    model: &Model,
    specs: impl Iterator<Item = &'a CacheSpec> + Clone,
    data: &DataSource,
) -> Result<BTreeSet<String>> {
    let mut used = BTreeSet::new();
    let latents = specs.filter(|s| s.method == Method::Latent && s.basis.is_none());
    for spec in latents.clone() {
        let calibration = &spec.calibration;
        if model.has_basis(calibration) {
            continue;
        }
        let alike = || latents.clone().filter(|s| s.calibration == *calibration);
        let kv_heads = model.config.kv_heads;
        let groupings = |side: fn(&CacheSpec) -> &LatentSide| -> Vec<Grouping> {
            let all = alike().map(side).flat_map(|side| {
                let layers = match side.group {
                    Group::Layers(n) => vec![n],
                    Group::Auto => choose::GROUPS.to_vec(),
                };
                let heads = side.heads.of(kv_heads);
                layers.into_iter().map(move |layers| Grouping { layers, heads })
            });
            all.collect::<BTreeSet<_>>().into_iter().collect()
        };
        let (keys, values) = (groupings(|s| &s.k), groupings(|s| &s.v));
        let text = CalibrationText::read(calibration, model.need_tokenizer()?, data)?;
        let (basis, _) =
            model.calibrate(text.chunks(), &keys, &values, spec.sinks, BasisOptions::default())?;
        model.add_basis(calibration, basis);
        used.extend(text.documents);
    }
    Ok(used)
}

/// Text that something is calibrated on, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibrationText {
    chunks: Vec<Vec<u32>>,
    /// Documents that it was taken from; empty for a file.
    pub documents: BTreeSet<String>,
}

impl CalibrationText {
    /// The text that `calibration` names, in chunks: one of each document in turn, from the *last* document of every
    /// task backwards, because experiments measure on the first ones. Documents of a task that has none as long as a chunk are joined.
    ///
    /// # Errors
    /// An unknown task, data or a file that is not there.
    pub fn read(calibration: &Calibration, tokenizer: &Tokenizer, data: &DataSource) -> Result<Self> {
        let docs: Vec<(String, String)> = match &calibration.file {
            Some(file) => {
                let read = std::fs::read_to_string(file);
                let text = read.map_err(|e| RunError::Asked(format!("calibration.file: {file}: {e}")))?;
                vec![(String::new(), text)]
            }
            None => {
                let mut docs = Vec::new();
                for task in calibration.task.split(',') {
                    docs.extend(texts(task.trim(), data, None)?.docs.into_iter().map(|d| (d.id, d.text)));
                }
                from_the_end(docs)
            }
        };
        let length = calibration.chunk.max(1);
        let mut encoded = docs
            .iter()
            .map(|(id, text)| Ok((vec![id.as_str()], tokenizer.encode(text, true)?)))
            .collect::<Result<Vec<_>>>()?;
        if encoded.iter().all(|(_, tokens)| tokens.len() < length) {
            encoded = joined(encoded, length, &tokenizer.encode("\n\n", false)?);
        }
        let mut out = Self { chunks: Vec::new(), documents: BTreeSet::new() };
        let mut left = calibration.tokens;
        let rounds = encoded.iter().map(|(_, tokens)| tokens.len().div_ceil(length)).max().unwrap_or(0);
        for round in 0..rounds {
            for (ids, tokens) in &encoded {
                if let Some(chunk) = tokens.chunks(length).nth(round).filter(|_| left > 0) {
                    let chunk = &chunk[..chunk.len().min(left)];
                    left -= chunk.len();
                    out.chunks.push(chunk.to_vec());
                    out.documents.extend(ids.iter().filter(|id| !id.is_empty()).map(|id| (*id).to_string()));
                }
            }
        }
        Ok(out)
    }

    /// The chunks, each a sequence of its own.
    pub fn chunks(&self) -> impl Iterator<Item = &[u32]> {
        self.chunks.iter().map(Vec::as_slice)
    }
}

/// Documents (id `TASK/NUMBER`, text) from the last one of every task backwards, the tasks in turn: those of a group
/// have unequal numbers of documents, and the last ones of the whole list would be of one task only.
fn from_the_end(docs: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut tasks: IndexMap<String, Vec<(String, String)>> = IndexMap::new();
    for (id, text) in docs {
        let task = id.rsplit_once('/').map_or("", |(task, _)| task).to_string();
        tasks.entry(task).or_default().push((id, text));
    }
    let mut out = Vec::new();
    while !tasks.values().all(Vec::is_empty) {
        out.extend(tasks.values_mut().filter_map(Vec::pop));
    }
    out
}

/// The documents that a stretch of text is of, and its tokens.
type Stretch<D> = (Vec<D>, Vec<u32>);

/// Joins consecutive documents with `between` until each stretch has at least `length` tokens; what is left at the end
/// stays short.
pub(crate) fn joined<D>(docs: Vec<Stretch<D>>, length: usize, between: &[u32]) -> Vec<Stretch<D>> {
    let mut out: Vec<Stretch<D>> = Vec::new();
    for (ids, tokens) in docs {
        match out.last_mut() {
            Some((of, stretch)) if stretch.len() < length => {
                of.extend(ids);
                stretch.extend_from_slice(between);
                stretch.extend(tokens);
            }
            _ => out.push((ids, tokens)),
        }
    }
    out
}
