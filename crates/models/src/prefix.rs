//! Prompts in files: a sequence's cache with its tokens, computed once and loaded whenever the same text comes first.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use minicache_config::atomic;
use minicache_core::archive;
use minicache_core::{CacheSpec, Error as CacheError, Sequence};

use crate::{Error, Model, Result};

impl Model {
    /// Writes `sequence`, whose cache is of `spec` and holds `tokens`, to the file `path`, which appears when it is whole.
    ///
    /// # Errors
    /// A cache that does not save; a file that cannot be written.
    pub fn save_sequence(
        &self,
        sequence: &Sequence,
        spec: &CacheSpec,
        tokens: &[u32],
        path: &Path,
    ) -> Result<()> {
        let about = self.about(spec, sequence.planned_len())?;
        let mut writer = atomic::Writer::new(path).map_err(Error::write(path))?;
        let mut out = BufWriter::with_capacity(1 << 20, &mut writer);
        archive::save(sequence.cache(), &about, tokens, &mut out).map_err(in_file(path, true))?;
        drop(out);
        writer.commit().map_err(Error::write(path))
    }

    /// Loads what [`Model::save_sequence`] wrote of this model and `spec`, for a sequence that is going to have
    /// `planned_len` tokens, and gives it with its tokens.
    ///
    /// # Errors
    /// A file of another model or cache, or a damaged one.
    pub fn load_sequence(
        &self,
        spec: &CacheSpec,
        planned_len: usize,
        path: &Path,
    ) -> Result<(Sequence, Vec<u32>)> {
        let mut sequence = self.sequence(spec, planned_len)?;
        let about = self.about(spec, planned_len)?;
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::io(path))?);
        let tokens = archive::load(sequence.cache_mut(), &about, &mut file).map_err(in_file(path, false))?;
        Ok((sequence, tokens))
    }

    /// What has to be the same for a saved cache to go on: the model, the method, the frequencies, and, of latents, the
    /// basis.
    fn about(&self, spec: &CacheSpec, planned_len: usize) -> Result<String> {
        let rotation = self.decoder.rotary(planned_len).digest();
        let basis = self.latent_digest(spec, planned_len)?;
        let spec = spec.canonical(Some(self.config.layers));
        let spec = serde_json::to_string(&spec).map_err(|e| Error::Input(e.to_string()))?;
        Ok(format!("model {}, cache {spec}, rotation {rotation}{basis}", self.fingerprint))
    }
}

/// Names the file.
fn in_file(path: &Path, writes: bool) -> impl FnOnce(CacheError) -> Error {
    move |error| match error {
        CacheError::Io(source) if writes => Error::write(path)(source),
        CacheError::Io(source) => Error::io(path)(source),
        other => Error::file(path, other.to_string()),
    }
}
