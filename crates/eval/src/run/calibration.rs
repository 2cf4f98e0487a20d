//! Calibration text: bases for the latent caches of a plan, and the alignment of a model.

use std::collections::{BTreeSet, HashSet};

use indexmap::IndexMap;
use minicache_core::latent::Grouping;
use minicache_core::settings::{Calibration, Group, LatentSide};
use minicache_core::{CacheSpec, Latent};
use minicache_models::calibrate::BasisOptions;
use minicache_models::{Model, Tokenizer};

use super::{Result, RunError, Stop, choose};
use crate::data::{DataSource, calibration_texts};
use crate::tasks::{Suite, TextDoc, texts};

/// What the ids of bundled calibration texts begin with.
const BUNDLED: &str = "calibration/";

/// Where calibration text may come from.
pub struct Corpus<'a> {
    data: &'a DataSource,
    /// What an experiment measures on; `None` outside of experiments, where all of a data set may be used and nothing
    /// else.
    measured: Option<Measured>,
    /// Ends the writing of text.
    stop: Stop,
}

/// What an experiment measures on. None of it may be calibrated on: see [`Corpus::beside`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    /// Names of tasks and of their data sets.
    tasks: BTreeSet<(&'static str, &'static str)>,
    ids: HashSet<String>,
    texts: HashSet<String>,
}

impl Measured {
    /// Adds documents of `suite`.
    pub(crate) fn add<'d>(&mut self, suite: &Suite, docs: impl IntoIterator<Item = &'d TextDoc>) {
        self.tasks.extend(suite.tasks.iter().map(|t| (t.name(), t.dataset().name)));
        for doc in docs {
            self.ids.insert(doc.id.clone());
            self.texts.insert(doc.text.trim().to_string());
        }
    }

    /// Whether `doc` may not be calibrated on. The same record has another number where two tasks read a data set from
    /// files of their own (TruthfulQA's generation and choices), so that none of one is used beside the other.
    fn has(&self, doc: &TextDoc) -> bool {
        let task = doc.task();
        let sibling = || {
            let dataset = Suite::find(task).ok().and_then(|s| s.tasks.first().map(|t| t.dataset().name));
            self.tasks.iter().any(|(name, set)| *name != task && Some(*set) == dataset)
        };
        self.ids.contains(&doc.id) || self.texts.contains(doc.text.trim()) || sibling()
    }
}

impl<'a> Corpus<'a> {
    /// All of the data sets that a calibration names.
    pub fn all(data: &'a DataSource) -> Self {
        Self { data, measured: None, stop: Stop::default() }
    }

    /// The data sets that a calibration names without what is `measured`, by number and by text. Where that is less
    /// than was asked for, calibration text that ships with the program and is in no task makes up for it, so that
    /// measured and calibration text never overlap and no experiment lacks any. `stop` ends the writing of text.
    pub(crate) fn beside(data: &'a DataSource, measured: Measured, stop: &Stop) -> Self {
        Self { data, measured: Some(measured), stop: stop.clone() }
    }

    /// The documents that `calibration` names: from the last one of every task backwards, because experiments measure on
    /// the first ones.
    fn documents(&self, calibration: &Calibration) -> Result<Vec<TextDoc>> {
        if let Some(file) = &calibration.file {
            let read = std::fs::read_to_string(file);
            let text = read.map_err(|e| RunError::Asked(format!("calibration.file: {file}: {e}")))?;
            return Ok(vec![TextDoc { id: String::new(), text }]);
        }
        let mut docs = Vec::new();
        for task in calibration.tasks() {
            docs.extend(texts(task, self.data, None)?.docs);
        }
        docs.retain(|doc| !self.measured.as_ref().is_some_and(|m| m.has(doc)));
        Ok(from_the_end(docs))
    }

    /// What makes up for data sets that are too short.
    fn substitutes(&self, calibration: &Calibration) -> Vec<TextDoc> {
        if self.measured.is_none() || calibration.file.is_some() {
            return Vec::new();
        }
        calibration_texts().map(|(id, text)| TextDoc { id: id.to_string(), text: text.to_string() }).collect()
    }
}

/// Calibrates what the latent caches among `specs` need and `model` does not have yet. Gives what the text of each
/// calibration came to.
///
/// # Errors
/// Text or a tokenizer that is not there, what [`Model::calibrate`] meets, or `stop` before a calibration.
pub fn prepare<'a>(
    model: &Model,
    specs: impl Iterator<Item = &'a CacheSpec> + Clone,
    corpus: &Corpus<'_>,
    stop: &Stop,
) -> Result<Vec<String>> {
    let mut used = Vec::new();
    let latents = specs.filter_map(|spec| match spec {
        CacheSpec::Latent(latent) => Some((latent, spec.calibration()?)),
        _ => None,
    });
    for (spec, calibration) in latents.clone() {
        if model.has_basis(spec) {
            continue;
        }
        stop.check()?;
        let alike = || latents.clone().map(|(latent, _)| latent).filter(|latent| latent.shares_basis(spec));
        let kv_heads = model.config.kv_heads;
        let groupings = |side: fn(&Latent) -> &LatentSide| -> Vec<Grouping> {
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
        let text = CalibrationText::read(calibration, model, corpus)?;
        let (basis, _) =
            model.calibrate(text.chunks(), &keys, &values, spec.sinks, BasisOptions::default())?;
        model.add_basis(spec, basis);
        used.push(text.origin());
    }
    Ok(used)
}

/// What was asked for, such as `8192 tokens of longbench`.
pub(crate) fn describe(calibration: &Calibration) -> String {
    format!("{} tokens of {}", calibration.tokens, calibration.source())
}

/// Text that something is calibrated on, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibrationText {
    chunks: Vec<Vec<u32>>,
    /// How many of the chunks are bundled calibration text, the last ones.
    substitutes: usize,
    /// Whether the model has written it.
    own: bool,
    /// Documents that chunks were taken from; empty for a file.
    documents: BTreeSet<String>,
}

impl CalibrationText {
    /// The text that `calibration` names, in chunks: what `model` writes itself, or one of each document in turn.
    /// Documents of a task that has none as long as a chunk are joined.
    ///
    /// # Errors
    /// An unknown task, data or a file that is not there; a model without a tokenizer, unless it writes the text.
    pub fn read(calibration: &Calibration, model: &Model, corpus: &Corpus<'_>) -> Result<Self> {
        if calibration.is_own_text() {
            let go_on = || corpus.stop.signal().is_none();
            let texts = model.own_text(calibration.tokens, calibration.chunk, &go_on)?;
            corpus.stop.check()?;
            let chunks = texts.map_or_else(Vec::new, |texts| texts.to_vec());
            return Ok(Self { chunks, substitutes: 0, own: true, documents: BTreeSet::new() });
        }
        Self::of_documents(calibration, model.need_tokenizer()?, corpus)
    }

    /// [`CalibrationText::read`] where the model does not write it.
    pub(crate) fn of_documents(
        calibration: &Calibration,
        tokenizer: &Tokenizer,
        corpus: &Corpus<'_>,
    ) -> Result<Self> {
        let mut out = Self { chunks: Vec::new(), substitutes: 0, own: false, documents: BTreeSet::new() };
        out.take(&corpus.documents(calibration)?, calibration, tokenizer)?;
        let own = out.chunks.len();
        if out.tokens() < calibration.tokens {
            out.take(&corpus.substitutes(calibration), calibration, tokenizer)?;
            out.substitutes = out.chunks.len() - own;
        }
        Ok(out)
    }

    /// Takes chunks of `docs` until there are as many tokens as `calibration` asks for.
    fn take(&mut self, docs: &[TextDoc], calibration: &Calibration, tokenizer: &Tokenizer) -> Result<()> {
        let length = calibration.chunk.max(1);
        let mut encoded = docs
            .iter()
            .map(|doc| Ok((vec![doc.id.as_str()], tokenizer.encode(&doc.text, true)?)))
            .collect::<Result<Vec<_>>>()?;
        if encoded.iter().all(|(_, tokens)| tokens.len() < length) {
            encoded = joined(encoded, length, &tokenizer.encode("\n\n", false)?);
        }
        let mut left = calibration.tokens.saturating_sub(self.tokens());
        let rounds = encoded.iter().map(|(_, tokens)| tokens.len().div_ceil(length)).max().unwrap_or(0);
        for round in 0..rounds {
            for (ids, tokens) in &encoded {
                if let Some(chunk) = tokens.chunks(length).nth(round).filter(|_| left > 0) {
                    let chunk = &chunk[..chunk.len().min(left)];
                    left -= chunk.len();
                    self.chunks.push(chunk.to_vec());
                    self.documents.extend(ids.iter().filter(|id| !id.is_empty()).map(|id| (*id).to_string()));
                }
            }
        }
        Ok(())
    }

    /// The chunks, each a sequence of its own.
    pub fn chunks(&self) -> impl Iterator<Item = &[u32]> {
        self.chunks.iter().map(Vec::as_slice)
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }

    /// What the text came to, such as `3012 tokens of 9 documents, 5180 of bundled calibration text`.
    pub(crate) fn origin(&self) -> String {
        let (own, added) = self.chunks.split_at(self.chunks.len() - self.substitutes);
        let tokens = |chunks: &[Vec<u32>]| chunks.iter().map(Vec::len).sum::<usize>();
        let documents = self.documents.iter().filter(|id| !id.starts_with(BUNDLED)).count();
        let mut text = match documents {
            0 if self.own => format!("{} tokens of the model's own", tokens(own)),
            0 => format!("{} tokens", tokens(own)),
            1 => format!("{} tokens of 1 document", tokens(own)),
            n => format!("{} tokens of {n} documents", tokens(own)),
        };
        if !added.is_empty() {
            text.push_str(&format!(", {} of bundled calibration text", tokens(added)));
        }
        text
    }
}

/// Documents from the last one of every task backwards, the tasks in turn: those of a group have unequal numbers of
/// documents, and the last ones of the whole list would be of one task only.
fn from_the_end(docs: Vec<TextDoc>) -> Vec<TextDoc> {
    let mut tasks: IndexMap<String, Vec<TextDoc>> = IndexMap::new();
    for doc in docs {
        tasks.entry(doc.task().to_string()).or_default().push(doc);
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
