//! Tokenizers: from `tokenizer.json`, or built from a GGUF file's vocabulary.

mod gguf;
mod growth;
mod pre;
mod stream;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use minicache_config::{guard, python_json, shown};
use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;

pub use stream::DecodeStream;

use crate::{Error, Result};

/// Text to token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Where it came from, for messages.
    file: PathBuf,
    /// Ids run from 0 to one below this.
    size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Put before and after text that is encoded with special tokens; `None` where the pipeline of a
    /// `tokenizer.json` does it.
    prefix: Option<u32>,
    suffix: Option<u32>,
    stop: BTreeSet<u32>,
}

/// Control tokens that end a turn or a text in the models that are supported.
const END_TOKENS: [&str; 7] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"];

impl Tokenizer {
    /// The tokenizer of a model directory: `tokenizer.json`, with `tokenizer_config.json` beside it for the names of
    /// its special tokens. `None` if the directory has none.
    ///
    /// # Errors
    /// Files that cannot be read or parsed.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Ok(None);
        }
        let config_path = dir.join("tokenizer_config.json");
        let config = if config_path.is_file() { read_json(&config_path)? } else { Value::Null };
        Self::from_file(&path, &config).map(Some)
    }

    /// A tokenizer from a `tokenizer.json`; `config` is the contents of `tokenizer_config.json`, or null.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn from_file(path: &Path, config: &Value) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let text = minicache_config::utf8(&bytes).map_err(|what| Error::file(path, what))?;
        let mut inner = guard("the tokenizer's reader", || tokenizers::Tokenizer::from_bytes(text))
            .and_then(|tokenizer| tokenizer.map_err(|e| shown(&e.to_string())))
            .map_err(|e| {
                let mend = "download the model's tokenizer.json again";
                Error::file(path, format!("not a tokenizer that can be read ({e}); {mend}"))
            })?;
        growth::check(&inner).map_err(|e| Error::file(path, e))?;
        // A tokenizer.json saved after training may cut or pad; prompts are taken whole here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(path, e.to_string()))?;
        let size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let named = |key: &str| {
            let token = config.get(key)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            inner.token_to_id(text)
        };
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let stop = eos.into_iter().collect();
        Ok(Self { inner, file: path.to_path_buf(), size, bos, eos, prefix: None, suffix: None, stop })
    }

    /// Writes a `tokenizer.json`, which adds the special tokens around a text that this tokenizer adds.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut inner = self.inner.clone();
        let named = |id: Option<u32>| id.and_then(|id| Some((self.id_to_token(id)?, id)));
        let (prefix, suffix) = (named(self.prefix), named(self.suffix));
        if prefix.is_some() || suffix.is_some() {
            let around: Vec<&str> =
                [prefix.as_ref().map_or("", |p| &p.0), "$A", suffix.as_ref().map_or("", |s| &s.0)]
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .collect();
            let template = TemplateProcessing::builder()
                .try_single(around)
                .map_err(|e| Error::Tokenizer(format!("cannot write: {e}")))?
                .special_tokens(prefix.into_iter().chain(suffix).collect::<Vec<_>>())
                .build()
                .map_err(|e| Error::Tokenizer(format!("cannot write: {e}")))?;
            inner.with_post_processor(Some(template));
        }
        let text = inner.to_string(true).map_err(|e| Error::Tokenizer(format!("cannot write: {e}")))?;
        minicache_config::atomic::replace(path, text.as_bytes()).map_err(Error::write(path))
    }

    /// Token ids of `text`. Special tokens that are written out in it (`<|im_start|>`) become single ids; with
    /// `add_special` the ones that the model expects around a text (usually a BOS) are added. Chat templates write
    /// theirs out: encode a rendered chat without.
    ///
    /// # Errors
    /// A failure of the tokenizer.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.guarded("encode", || self.inner.encode_fast(text, add_special))?;
        let mut ids = Vec::with_capacity(encoding.len() + 2);
        ids.extend(self.prefix.filter(|_| add_special));
        ids.extend_from_slice(encoding.get_ids());
        ids.extend(self.suffix.filter(|_| add_special));
        Ok(ids)
    }

    /// The text of `ids`, with or without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// A failure of the tokenizer.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.guarded("decode", || self.inner.decode(ids, skip_special))
    }

    /// Calls the tokenizer, which carries out what its file asks for: expressions among others that never end.
    fn guarded<T>(&self, what: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        let done = guard("its tokenizer", work).and_then(|done| done.map_err(|e| shown(&e.to_string())));
        done.map_err(|e| Error::file(&self.file, format!("cannot {what} text: {e}")))
    }

    /// A decoder for ids that arrive one at a time.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The number of ids: one above the largest.
    pub fn vocab_size(&self) -> usize {
        self.size
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Ids that end a generation, as far as the tokenizer knows, ascending.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.stop.iter().copied().collect()
    }

    /// What is odd about this tokenizer beside a model with `rows` embedding rows, for a warning. A model may have a few
    /// more rows than its tokenizer has ids, padding to a round number (Phi-3: 32,064 for 32,011; Qwen2-72B: 152,064 for
    /// 151,646), and a tokenizer a few ids that are never used; a sequence with an id beyond the rows is refused.
    pub fn vocabulary_warning(&self, rows: usize) -> Option<String> {
        match rows.checked_sub(self.size) {
            Some(padding) if padding <= 512 && padding * 16 <= rows => None,
            Some(_) => Some(format!(
                "the tokenizer has {} tokens and the model {rows} embedding rows; do they belong together?",
                self.size
            )),
            None => Some(format!(
                "the tokenizer has {} tokens but the model only {rows} embedding rows: the ids from {rows} on cannot be used",
                self.size
            )),
        }
    }
}

/// JSON of a model folder, as Python writes it.
///
/// # Errors
/// A file that cannot be read or is not JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    python_json::from_slice(&bytes).map_err(|e| Error::file(path, e.to_string()))
}
