//! GGUF files: memory-mapped weights, metadata, and their translation to Hugging Face terms.
//!
//! The header (`header`) is read strictly and says for every tensor where it lies inside the file; this module joins
//! split files, and gives tensors by their Hugging Face names (`names`) in the row order that transformers uses, and
//! metadata as a configuration (`config`).

mod config;
mod header;
mod keys;
mod names;
mod types;
mod weights;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use memmap2::Mmap;
use minicache_config::shown;

use crate::{Error, Family, Result};
use header::{Entry, Header};
use names::Place;
use types::WeightType;

const DOWNLOAD_AGAIN: &str = "download it again (the default model: scripts/fetch-model smollm2-135m)";
/// Files of a split model, at most.
const MOST_PARTS: u64 = 10_000;

/// One file of a (possibly split) model.
struct Part {
    path: PathBuf,
    map: Mmap,
    metadata: HashMap<String, Value>,
}

/// Where one tensor's bytes lie.
struct Stored {
    part: usize,
    bytes: Range<usize>,
    kind: WeightType,
    /// Outermost first, as in Hugging Face files.
    dims: Vec<usize>,
}

/// An open GGUF model.
pub struct Gguf {
    parts: Vec<Part>,
    architecture: String,
    /// By GGUF name, in order: of several mistakes the same one is named every time.
    tensors: BTreeMap<String, Stored>,
    /// By Hugging Face name.
    places: HashMap<String, Place>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path())
            .field("architecture", &self.architecture)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl Gguf {
    /// Opens a GGUF file (version 2 or 3), or all files of a split one (`NAME-00001-of-0000N.gguf`), given its first.
    ///
    /// # Errors
    /// A file that is missing, not GGUF, truncated, or of an unknown architecture or weight type.
    pub fn open(path: &Path) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        let mut parts = vec![Part::open(path, 0, &mut tensors)?];
        let count = match parts[0].metadata.get("split.count") {
            None => 1,
            Some(count) => as_u64(count).filter(|n| *n <= MOST_PARTS).ok_or_else(|| {
                Error::file(path, format!("metadata split.count is not 1 to {MOST_PARTS}; {DOWNLOAD_AGAIN}"))
            })?,
        };
        for other in split_siblings(path, count)? {
            parts.push(Part::open(&other, parts.len(), &mut tensors)?);
        }
        let mut gguf = Self { parts, architecture: String::new(), tensors, places: HashMap::new() };
        gguf.architecture = gguf
            .text("general.architecture")
            .ok_or_else(|| gguf.error(format!("no general.architecture in its metadata; {DOWNLOAD_AGAIN}")))?
            .to_string();
        config::check_architecture(&gguf)?;
        gguf.places = names::places(&gguf)?;
        Ok(gguf)
    }

    /// The (first) file.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// `general.architecture`, one of those of [`Family::ALL`].
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The families in files of this architecture.
    pub(crate) fn families(&self) -> impl Iterator<Item = &'static Family> {
        Family::in_gguf(&self.architecture)
    }

    /// Whether rows of queries and keys lie with their rotary pairs side by side.
    fn interleaved(&self) -> bool {
        self.families().any(|family| family.gguf.interleaved)
    }

    /// A metadata value as text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A metadata value as an unsigned integer.
    pub fn integer(&self, key: &str) -> Option<u64> {
        as_u64(self.value(key)?)
    }

    /// A metadata value as a real number.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.value(key)? {
            Value::F32(x) => Some(f64::from(*x)),
            Value::F64(x) => Some(*x),
            other => as_u64(other).map(|x| x as f64),
        }
    }

    /// A metadata value as a truth value.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A metadata array.
    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.value(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }

    /// The file, or all files of a split model.
    pub fn files(&self) -> Vec<PathBuf> {
        self.parts.iter().map(|part| part.path.clone()).collect()
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.parts[0].metadata.get(key)
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::file(self.path(), message)
    }

    fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.parts[stored.part].map[stored.bytes.clone()]
    }
}

impl Part {
    /// Opens file number `part` of a model and adds its tensors.
    fn open(path: &Path, part: usize, tensors: &mut BTreeMap<String, Stored>) -> Result<Self> {
        let fail = |message: String| Error::file(path, message);
        let file = File::open(path).map_err(|e| fail(format!("cannot be opened: {e}")))?;
        // SAFETY: the map is read-only and private to this process. A file that another process shortens while it is
        // mapped would fault; model files are written once and then only read.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(format!("cannot be mapped: {e}")))?;
        let Header { metadata, tensors: entries } = header::read(&map).map_err(fail)?;
        for Entry { name, dims, kind, bytes } in entries {
            let shown = shown(&name);
            if tensors.insert(name, Stored { part, bytes, kind, dims }).is_some() {
                return Err(fail(format!(
                    "tensor {shown} is in another part of the model too; {DOWNLOAD_AGAIN}"
                )));
            }
        }
        Ok(Self { path: path.to_path_buf(), map, metadata })
    }
}

/// The other files of a split model of `count` parts, given its first.
fn split_siblings(path: &Path, count: u64) -> Result<Vec<PathBuf>> {
    if count <= 1 {
        return Ok(Vec::new());
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let first = format!("-00001-of-{count:05}.gguf");
    let Some(stem) = name.strip_suffix(&first) else {
        let message =
            format!("is one of {count} parts of a split model; give the one whose name ends in {first}");
        return Err(Error::file(path, message));
    };
    (2..=count)
        .map(|i| {
            let other = path.with_file_name(format!("{stem}-{i:05}-of-{count:05}.gguf"));
            if other.is_file() {
                Ok(other)
            } else {
                Err(Error::file(
                    &other,
                    format!("missing: the model is split into {count} files, all are needed"),
                ))
            }
        })
        .collect()
}

pub(crate) fn as_u64(value: &Value) -> Option<u64> {
    match value {
        Value::U8(x) => Some(u64::from(*x)),
        Value::U16(x) => Some(u64::from(*x)),
        Value::U32(x) => Some(u64::from(*x)),
        Value::U64(x) => Some(*x),
        Value::I8(x) => u64::try_from(*x).ok(),
        Value::I16(x) => u64::try_from(*x).ok(),
        Value::I32(x) => u64::try_from(*x).ok(),
        Value::I64(x) => u64::try_from(*x).ok(),
        _ => None,
    }
}
