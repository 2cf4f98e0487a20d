//! Which text is calibrated on: options of `minicache align` and `minicache calibrate`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use minicache_core::settings::Calibration;
use minicache_eval::run::{CalibrationText, Corpus};
use minicache_models::Model;

use crate::failure::{OrUsage, usage};
use crate::global::Global;
use crate::shape::at_least_one;

/// Text to calibrate on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CalibrationArgs {
    /// `self` for text that the model writes, a task whose documents are taken, from the last one backwards, or a list of
    /// tasks, or a text file.
    #[arg(long, default_value = "self", value_name = "self|TASK|FILE")]
    calibration: String,
    /// Token ids separated by white space, for a model without a tokenizer.
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    calibration_tokens: Option<PathBuf>,
    /// Tokens looked at; by default 8192, or all of --calibration-tokens.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens of each sequence that the text is cut into.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    chunk: usize,
}

/// Tokens to calibrate on, in sequences.
pub(crate) struct Chunks {
    chunks: Vec<Vec<u32>>,
    /// What the text is, for the record.
    pub(crate) text: String,
}

impl Chunks {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.chunks.iter().map(Vec::as_slice)
    }
}

impl CalibrationArgs {
    /// Looks at what can be looked at before the model is loaded.
    pub(crate) fn check(&self) -> Result<()> {
        at_least_one("--chunk", self.chunk)?;
        at_least_one("--tokens", self.tokens.unwrap_or(1))?;
        match &self.calibration_tokens {
            Some(path) => read_ids(path).map(|_| ()),
            None => Ok(()),
        }
    }

    /// The text as tokens of `model`.
    pub(crate) fn read(&self, model: &Model, global: &Global) -> Result<Chunks> {
        if let Some(path) = &self.calibration_tokens {
            let ids = read_ids(path)?;
            let ids = &ids[..self.tokens.unwrap_or(ids.len()).min(ids.len())];
            let vocab = model.config.vocab;
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                let message = format!("token {id} is outside of the model's vocabulary of {vocab}");
                return Err(usage(format!("--calibration-tokens: {}: {message}", path.display())));
            }
            let chunk = self.chunk.min(model.config.context);
            let chunks = ids.chunks(chunk).map(<[u32]>::to_vec).collect();
            return Ok(Chunks { chunks, text: format!("token ids of {}", file_name(path)) });
        }
        let file = Path::new(&self.calibration).is_file().then(|| self.calibration.clone());
        let calibration = Calibration {
            task: self.calibration.clone(),
            file,
            tokens: self.tokens.unwrap_or(Calibration::default().tokens),
            chunk: self.chunk.min(model.config.context),
        };
        calibration.validate().map_err(|e| usage(format!("--calibration: {}", e.message)))?;
        let text = match &calibration.file {
            Some(file) => file_name(Path::new(file)),
            None => calibration.source().to_string(),
        };
        let data = global.data_source();
        let read = CalibrationText::read(&calibration, model, &Corpus::all(&data))?;
        Ok(Chunks { chunks: read.chunks().map(<[u32]>::to_vec).collect(), text })
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let place = || format!("--calibration-tokens: {}", path.display());
    let text = std::fs::read_to_string(path).or_usage(place())?;
    let ids: Vec<u32> = text
        .split_whitespace()
        .map(|t| t.parse().map_err(|_| usage(format!("{}: `{t}` is no token id", place()))))
        .collect::<Result<_>>()?;
    if ids.is_empty() { Err(usage(format!("{}: no token ids", place()))) } else { Ok(ids) }
}
