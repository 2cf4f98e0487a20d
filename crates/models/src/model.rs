//! A model with everything that belongs to it, from whatever names it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use minicache_core::latent::{Basis, Grouping};
use minicache_core::{CacheSpec, Latent, ModelShape, Resources, Sequence};
use sha2::{Digest, Sha256};

use crate::align::{AlignOptions, Aligned, Alignment};
use crate::calibrate::BasisOptions;
use crate::latents::Latents;
use crate::own_text::OwnTexts;
use crate::tokenizer::read_json;
use crate::{
    ChatTemplate, Decoder, Error, Gguf, Hub, HubId, LoadOptions, ModelConfig, Registry, Result, Safetensors,
    Tokenizer, WeightSource, align, calibrate,
};

/// A loaded model.
#[derive(Debug)]
pub struct Model {
    /// Its name in reports: of the registry, or of its file or folder.
    pub name: String,
    /// Where its weights lie.
    pub path: PathBuf,
    /// The configuration that came with the weights.
    pub config: ModelConfig,
    /// The decoder.
    pub decoder: Decoder,
    /// The tokenizer; `None` for a directory without one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template; `None` for a base model.
    pub chat: Option<ChatTemplate>,
    /// A hash of what the model is, the same wherever its files lie: their sizes, headers and samples of their
    /// contents, 32 hexadecimal digits. It does not read whole files.
    pub fingerprint: String,
    stop: Vec<u32>,
    latents: Latents,
    alignment: Option<Alignment>,
    pub(crate) own_texts: OwnTexts,
}

/// A model's weights where they lie.
pub(crate) enum Source {
    Folder(Safetensors),
    Gguf(Gguf),
}

impl Source {
    pub(crate) fn weights(&self) -> &dyn WeightSource {
        match self {
            Source::Folder(files) => files,
            Source::Gguf(gguf) => gguf,
        }
    }

    /// See [`Safetensors::tie`]; what a GGUF file holds says whether it is tied.
    pub(crate) fn tie(&mut self, config: &mut ModelConfig) -> Result<()> {
        match self {
            Source::Folder(files) => files.tie(config),
            Source::Gguf(_) => Ok(()),
        }
    }
}

/// Opens a directory with safetensors or a `.gguf` file.
pub(crate) fn source(path: &Path) -> Result<Source> {
    if !path.is_dir() {
        return Ok(Source::Gguf(Gguf::open(path)?));
    }
    Ok(Source::Folder(Safetensors::open(path)?))
}

/// The parts of a model that are not its weights.
struct Parts {
    config: ModelConfig,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatTemplate>,
    /// Ids that end a generation, by the generation defaults.
    stop: Vec<u32>,
}

impl Model {
    /// Loads a model that is named by `what`: a name in the [`Registry`], a directory with `config.json` and
    /// safetensors, a `.gguf` file, or a hub id, `org/name[@revision]` or `org/name/file.gguf[@revision]`.
    ///
    /// # Errors
    /// A name that is none of these; files that are missing, damaged or do not fit each other; a download that fails.
    pub fn load(what: &str, options: &LoadOptions) -> Result<Self> {
        let (path, name) = locate(what)?;
        Self::from_path(&path, name, options)
    }

    /// Loads a directory with `config.json` and safetensors, or a `.gguf` file, and calls it `name`.
    ///
    /// # Errors
    /// Files that are missing, damaged or do not fit each other.
    pub fn from_path(path: &Path, name: impl Into<String>, options: &LoadOptions) -> Result<Self> {
        Self::from_source(path, name.into(), options, None)
    }

    /// Chooses maps that align adjacent layers, on `chunks` of tokens (see [`crate::align`]).
    ///
    /// # Errors
    /// As [`align::align`].
    pub fn alignment<'a>(
        &self,
        chunks: impl Iterator<Item = &'a [u32]>,
        options: AlignOptions,
    ) -> Result<Alignment> {
        self.with_weights(|weights| align::align(&self.decoder, weights, chunks, options))
    }

    /// The basis of latent caches for the groupings `keys` and `values`, calibrated on `chunks` of tokens without the first `sinks` of each, and the number of tokens counted (see [`calibrate`]).
    ///
    /// # Errors
    /// As [`calibrate::collect`] and [`calibrate::basis`].
    pub fn calibrate<'a>(
        &self,
        chunks: impl Iterator<Item = &'a [u32]>,
        keys: &[Grouping],
        values: &[Grouping],
        sinks: usize,
        options: BasisOptions,
    ) -> Result<(Basis, usize)> {
        let moments = calibrate::collect(&self.decoder, chunks, keys, values, sinks)?;
        let basis = self.with_weights(|w| calibrate::basis(&moments, &self.config, w, options))?;
        Ok((basis, moments.tokens))
    }

    /// The weights as the decoder has them.
    fn with_weights<T>(&self, work: impl FnOnce(&dyn WeightSource) -> Result<T>) -> Result<T> {
        let mut source = source(&self.path)?;
        source.tie(&mut self.config.clone())?;
        match &self.alignment {
            None => work(source.weights()),
            Some(alignment) => work(&Aligned::new(source.weights(), &self.config, alignment)),
        }
    }

    /// The same model loaded again with `alignment`, which was chosen for it, folded into its weights.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_aligned(what: &str, options: &LoadOptions, alignment: &Alignment) -> Result<Self> {
        let (path, name) = locate(what)?;
        Self::from_source(&path, name, options, Some(alignment))
    }

    fn from_source(
        path: &Path,
        name: String,
        options: &LoadOptions,
        alignment: Option<&Alignment>,
    ) -> Result<Self> {
        let mut source = source(path)?;
        let (parts, mut fingerprint) = match &source {
            Source::Folder(_) => (Parts::of_dir(path)?, fingerprint_of(&files_of(path)?)?),
            Source::Gguf(gguf) => (Parts::of_gguf(gguf)?, fingerprint_of(&gguf.files())?),
        };
        let Parts { mut config, tokenizer, chat, stop } = parts;
        source.tie(&mut config)?;
        let decoder = match alignment {
            None => Decoder::load(&config, source.weights(), options)?,
            Some(alignment) => {
                let both = Sha256::new().chain_update(&fingerprint).chain_update(alignment.digest());
                fingerprint = both.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
                Decoder::load(&config, &Aligned::new(source.weights(), &config, alignment), options)?
            }
        };
        let mut all: BTreeSet<u32> = stop.into_iter().collect();
        all.extend(&config.eos);
        all.extend(tokenizer.iter().flat_map(Tokenizer::stop_ids));
        let stop = all.into_iter().collect();
        Ok(Self {
            name,
            path: path.to_path_buf(),
            config,
            decoder,
            tokenizer,
            chat,
            fingerprint,
            stop,
            latents: Latents::default(),
            alignment: alignment.cloned(),
            own_texts: OwnTexts::default(),
        })
    }

    /// An empty sequence with a cache of `spec`, which is going to have `planned_len` tokens in the end; 0 where that is
    /// not known (see [`Decoder::sequence`]).
    ///
    /// # Errors
    /// A specification that does not fit the model.
    pub fn sequence(&self, spec: &CacheSpec, planned_len: usize) -> Result<Sequence> {
        let rotary = self.decoder.rotary(planned_len);
        let shape = self.decoder.shape();
        let latent = match spec {
            CacheSpec::Latent(settings) => {
                Some(self.latents.plan(settings, shape, &rotary, &self.fingerprint)?)
            }
            _ => None,
        };
        let resources = Resources { rotary: Some(rotary.clone()), latent };
        let cache = self.decoder.cache(spec, &resources)?;
        Ok(Sequence::rotated(cache, rotary, planned_len))
    }

    /// The digest of the transforms that latent caches of `spec` have, in words; nothing for other methods.
    pub(crate) fn latent_digest(&self, spec: &CacheSpec, planned_len: usize) -> Result<String> {
        let CacheSpec::Latent(settings) = spec else { return Ok(String::new()) };
        let rotary = self.decoder.rotary(planned_len);
        let plan = self.latents.plan(settings, self.decoder.shape(), &rotary, &self.fingerprint)?;
        Ok(format!(", basis {:08x}", plan.digest()))
    }

    /// Whether latent caches that are calibrated as `spec` have their basis.
    pub fn has_basis(&self, spec: &Latent) -> bool {
        self.latents.basis(spec).is_some()
    }

    /// Gives latent caches that are calibrated as `spec`, on the same text without as many first tokens, their basis (see
    /// [`crate::calibrate`]).
    pub fn add_basis(&self, spec: &Latent, basis: Basis) {
        self.latents.add(spec, basis);
    }

    /// Ids that end a generation, ascending: of the configuration, the generation defaults and the tokenizer.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// The tokenizer, for what cannot do without.
    ///
    /// # Errors
    /// The model has none.
    pub fn need_tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| no_tokenizer(&self.path))
    }
}

/// What turns words into a model's tokens, without its weights.
#[derive(Debug)]
pub struct PromptFormat {
    /// As [`Model::name`].
    pub name: String,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template; `None` for a base model.
    pub chat: Option<ChatTemplate>,
}

impl PromptFormat {
    /// Reads that of the model that `what` names, as [`Model::load`] takes it.
    ///
    /// # Errors
    /// As [`Model::load`], as far as it shows there; a model without a tokenizer.
    pub fn load(what: &str) -> Result<Self> {
        let (path, name) = locate(what)?;
        let parts = if path.is_dir() { Parts::of_dir(&path)? } else { Parts::of_gguf(&Gguf::open(&path)?)? };
        let tokenizer = parts.tokenizer.ok_or_else(|| no_tokenizer(&path))?;
        Ok(Self { name, tokenizer, chat: parts.chat })
    }
}

fn no_tokenizer(path: &Path) -> Error {
    Error::file(path, "has no tokenizer; put the model's tokenizer.json there, or give token ids")
}

/// What a model is, without its weights in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// As [`Model::fingerprint`].
    pub fingerprint: String,
    /// What a cache has to know.
    pub shape: ModelShape,
}

/// Describes the model that `what` names, as [`Model::load`] takes it, from its configuration.
///
/// # Errors
/// As [`Model::load`], as far as it shows there.
pub fn describe(what: &str) -> Result<Description> {
    let (path, _) = locate(what)?;
    if path.is_dir() {
        let shape = ModelConfig::from_dir(&path)?.shape();
        return Ok(Description { fingerprint: fingerprint_of(&files_of(&path)?)?, shape });
    }
    let gguf = Gguf::open(&path)?;
    Ok(Description { fingerprint: fingerprint_of(&gguf.files())?, shape: gguf.config()?.shape() })
}

impl Parts {
    fn of_dir(dir: &Path) -> Result<Self> {
        let config = ModelConfig::from_file(dir)?;
        let defaults = dir.join("generation_config.json");
        let stop = if defaults.is_file() { ids(&read_json(&defaults)?["eos_token_id"]) } else { Vec::new() };
        let tokenizer = Tokenizer::from_dir(dir)?;
        if let Some(tokenizer) = &tokenizer {
            warn(&dir.join("tokenizer.json"), tokenizer.vocabulary_warning(config.vocab));
        }
        let chat = ChatTemplate::from_dir(dir).map_err(in_file(dir))?;
        Ok(Self { config, tokenizer, chat, stop })
    }

    fn of_gguf(gguf: &Gguf) -> Result<Self> {
        let config = gguf.config()?;
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        if let Some(tokenizer) = &tokenizer {
            warn(gguf.path(), tokenizer.vocabulary_warning(config.vocab));
        }
        let chat = ChatTemplate::from_gguf(gguf, tokenizer.as_ref()).map_err(in_file(gguf.path()))?;
        Ok(Self { config, tokenizer, chat, stop: Vec::new() })
    }
}

/// The path and the name of the model that `what` names, downloaded if need be.
fn locate(what: &str) -> Result<(PathBuf, String)> {
    let registry = Registry::load()?;
    if let Some(entry) = registry.find(what) {
        if let Some(path) = entry.local() {
            return Ok((path, entry.name.clone()));
        }
        let Some(hub) = &entry.hub else {
            let file = entry.file.as_deref().unwrap_or(Path::new(""));
            let mend = entry.mend.as_deref().unwrap_or("put it there");
            return Err(Error::file(file, format!("the weights of {} are not there; {mend}", entry.title())));
        };
        let id = HubId::parse(&format!("{hub}@{}", entry.revision)).ok_or_else(|| {
            Error::Registry(format!("{}: {hub}@{} is no hub id", entry.name, entry.revision))
        })?;
        let path = Hub::from_env().fetch(&id).map_err(|e| match e {
            Error::Hub(message) if entry.gated => {
                Error::Hub(format!("{message}; its licence: {}", entry.license))
            }
            other => other,
        })?;
        return Ok((path, entry.name.clone()));
    }
    let path = Path::new(what);
    if path.exists() {
        if path.is_file() && path.extension().is_some_and(|e| e == "safetensors" || e == "json") {
            let message = "is one file of a model; give the directory with config.json and the weights";
            return Err(Error::file(path, message));
        }
        let full = path.canonicalize().map_err(Error::io(path))?;
        let last = if full.is_dir() { full.file_name() } else { full.file_stem() };
        let name = last.map_or_else(|| what.to_string(), |n| n.to_string_lossy().into_owned());
        return Ok((path.to_path_buf(), name));
    }
    let looks_local = path.is_absolute() || what.starts_with('.') || what.starts_with('~');
    match HubId::parse(what) {
        Some(id) if !looks_local => {
            let name = id.repo.rsplit('/').next().unwrap_or(&id.repo).to_string();
            Ok((Hub::from_env().fetch(&id)?, name))
        }
        _ if looks_local || path.extension().is_some_and(|e| e == "gguf") => {
            Err(Error::file(path, "no such file or directory"))
        }
        _ => Err(registry.get(what).err().unwrap_or_else(|| Error::Registry(what.to_string()))),
    }
}

/// Says on stderr what is odd about a file.
fn warn(path: &Path, warning: Option<String>) {
    if let Some(warning) = warning {
        eprintln!("{}: warning: {warning}", path.display());
    }
}

/// Names the file in errors about its contents.
fn in_file(path: &Path) -> impl FnOnce(Error) -> Error {
    let path = path.to_path_buf();
    move |error| match error {
        Error::Config(_) | Error::Tokenizer(_) | Error::Chat(_) => Error::file(path, error.to_string()),
        other => other,
    }
}

/// A token id or a list of them.
fn ids(value: &serde_json::Value) -> Vec<u32> {
    let one = |v: &serde_json::Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_array() {
        Some(list) => list.iter().filter_map(one).collect(),
        None => one(value).into_iter().collect(),
    }
}

/// The files of a model directory that decide what it computes, sorted by name.
fn files_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let counts = ["config.json", "tokenizer.json", "tokenizer_config.json"].contains(&name.as_str())
            || (name.starts_with("model") && name.ends_with(".safetensors"));
        if counts && path.is_file() {
            files.push(path);
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Hashes each file's name, size, first megabyte and 64 pages spread over the rest, so that fine-tunes of one size
/// differ while a file of many gigabytes costs a few reads.
fn fingerprint_of(files: &[PathBuf]) -> Result<String> {
    const HEAD: u64 = 1 << 20;
    const PAGES: u64 = 64;
    const PAGE: u64 = 4096;
    let mut hash = Sha256::new();
    for path in files {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        // A single file may be called anything.
        if files.len() > 1 {
            hash.update(name.as_bytes());
        }
        hash.update(size.to_le_bytes());
        let mut take = |from: u64, length: u64| -> Result<()> {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(from)).map_err(Error::io(path))?;
            file.by_ref().take(length).read_to_end(&mut bytes).map_err(Error::io(path))?;
            hash.update(&bytes);
            Ok(())
        };
        take(0, HEAD)?;
        let rest = size.saturating_sub(HEAD);
        if rest > 0 {
            let step = (rest / PAGES).max(PAGE);
            for at in (HEAD..size).step_by(step as usize) {
                take(at, PAGE)?;
            }
        }
    }
    Ok(hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_tell_files_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut bytes = vec![7u8; 3 << 20];
        std::fs::write(path("a.gguf"), &bytes).unwrap();
        std::fs::write(path("b.gguf"), &bytes).unwrap();
        // Weights that were trained on differ everywhere.
        bytes[2 << 20..].fill(9);
        std::fs::write(path("c.gguf"), &bytes).unwrap();
        let of = |name: &str| fingerprint_of(&[path(name)]).unwrap();
        assert_eq!(of("a.gguf").len(), 32);
        assert_eq!(of("a.gguf"), of("b.gguf"));
        assert_ne!(of("a.gguf"), of("c.gguf"));
    }

    #[test]
    fn names_that_name_nothing() {
        let message = |what: &str| locate(what).unwrap_err().to_string();
        assert_eq!(message("/no/such/model"), "/no/such/model: no such file or directory");
        assert_eq!(message("missing.gguf"), "missing.gguf: no such file or directory");
        assert!(message("smolm2-135m").contains("did you mean smollm2-135m"), "{}", message("smolm2-135m"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, b"x").unwrap();
        assert!(message(&file.display().to_string()).contains("give the directory"));
    }
}
