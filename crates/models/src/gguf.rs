//! GGUF files: memory-mapped weights, metadata, and their translation to Hugging Face terms.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The header is parsed by candle; this module
//! checks that every tensor lies inside the file before anything is read, joins split files, and gives tensors by
//! their Hugging Face names (`names`) in the row order that transformers uses.

mod config;
mod names;
mod weights;

use std::collections::HashMap;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use memmap2::Mmap;

use crate::{Error, Result};
use names::Place;

const DOWNLOAD_AGAIN: &str = "download it again (the default model: scripts/fetch-model smollm2-135m)";
const TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

/// One file of a (possibly split) model.
struct Part {
    path: PathBuf,
    map: Mmap,
    content: Content,
}

/// Where one tensor's bytes lie.
struct Stored {
    part: usize,
    start: usize,
    dtype: GgmlDType,
    /// Outermost first, as in Hugging Face files.
    dims: Vec<usize>,
}

/// An open GGUF model.
pub struct Gguf {
    parts: Vec<Part>,
    architecture: String,
    /// By GGUF name.
    tensors: HashMap<String, Stored>,
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
        let first = Part::open(path)?;
        let mut parts = vec![first];
        let count = parts[0].content.metadata.get("split.count").and_then(as_u64).unwrap_or(1);
        for other in split_siblings(path, count)? {
            parts.push(Part::open(&other)?);
        }
        let mut tensors = HashMap::new();
        for (index, part) in parts.iter().enumerate() {
            part.collect(index, &mut tensors)?;
        }
        let mut gguf = Self { parts, architecture: String::new(), tensors, places: HashMap::new() };
        gguf.architecture = gguf
            .text("general.architecture")
            .ok_or_else(|| gguf.error(format!("no general.architecture in its metadata; {DOWNLOAD_AGAIN}")))?
            .to_string();
        config::check_architecture(&gguf)?;
        gguf.places = names::places(&gguf);
        Ok(gguf)
    }

    /// The (first) file.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// `general.architecture`: `llama`, `phi3` or `qwen2`.
    pub fn architecture(&self) -> &str {
        &self.architecture
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
        self.parts[0].content.metadata.get(key)
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::file(self.path(), message)
    }

    fn bytes(&self, stored: &Stored) -> &[u8] {
        let size =
            stored.dims.iter().product::<usize>() / stored.dtype.block_size() * stored.dtype.type_size();
        &self.parts[stored.part].map[stored.start..stored.start + size]
    }
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let fail = |message: String| Error::file(path, message);
        let file = File::open(path).map_err(|e| fail(format!("cannot be opened: {e}")))?;
        // SAFETY: the map is read-only and private to this process. A file that another process shortens while it is
        // mapped would fault; model files are written once and then only read.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(format!("cannot be mapped: {e}")))?;
        check_start(&map).map_err(fail)?;
        let content = Content::read(&mut Cursor::new(&map[..])).map_err(|e| {
            let reason = e.to_string().lines().next().unwrap_or_default().to_string();
            if reason.contains("unknown dtype") {
                fail(format!("a weight type that is not supported ({reason}); supported are {TYPES}"))
            } else {
                fail(format!("truncated or damaged ({reason}); {DOWNLOAD_AGAIN}"))
            }
        })?;
        Ok(Self { path: path.to_path_buf(), map, content })
    }

    fn collect(&self, part: usize, tensors: &mut HashMap<String, Stored>) -> Result<()> {
        for (name, info) in &self.content.tensor_infos {
            let dims = info.shape.dims().to_vec();
            let fail = |message: String| Error::file(&self.path, format!("tensor {name}: {message}"));
            if matches!(info.ggml_dtype, GgmlDType::Q8_1 | GgmlDType::Q8K) {
                let message =
                    format!("weight type {:?} is not supported; supported are {TYPES}", info.ggml_dtype);
                return Err(fail(message));
            }
            let block = info.ggml_dtype.block_size();
            if dims.last().is_some_and(|row| row % block != 0) {
                return Err(fail(format!(
                    "rows of {dims:?} are not whole blocks of {block}; {DOWNLOAD_AGAIN}"
                )));
            }
            let elements = dims.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
            let bytes = elements.and_then(|e| (e / block).checked_mul(info.ggml_dtype.type_size()));
            let start = self
                .content
                .tensor_data_offset
                .checked_add(info.offset)
                .and_then(|s| usize::try_from(s).ok());
            let end = start.zip(bytes).and_then(|(s, b)| s.checked_add(b));
            let Some(start) = start.filter(|_| end.is_some_and(|end| end <= self.map.len())) else {
                let have = self.map.len();
                let need = end.map_or_else(|| "more".to_string(), |e| e.to_string());
                return Err(fail(format!(
                    "truncated: needs {need} bytes, the file has {have}; {DOWNLOAD_AGAIN}"
                )));
            };
            tensors.insert(name.clone(), Stored { part, start, dtype: info.ggml_dtype, dims });
        }
        Ok(())
    }
}

/// What candle's parser takes for granted: magic, version, and an alignment that is not zero.
fn check_start(map: &[u8]) -> std::result::Result<(), String> {
    if map.len() < 24 {
        return Err(format!("too short to be a GGUF file ({} bytes); {DOWNLOAD_AGAIN}", map.len()));
    }
    if &map[..4] != b"GGUF" {
        return Err(
            "not a GGUF file (it does not start with GGUF); give a .gguf file or a directory".to_string()
        );
    }
    let version = u32::from_le_bytes([map[4], map[5], map[6], map[7]]);
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version}; versions 2 and 3 are read: convert the model again"));
    }
    const KEY: &[u8] = b"general.alignment";
    // Writers put it among the first keys, long before the tokenizer's arrays.
    let head = &map[..map.len().min(1 << 20)];
    if let Some(at) = head.windows(KEY.len()).position(|w| w == KEY)
        && let Some(bytes) = head.get(at + KEY.len() + 4..at + KEY.len() + 8)
        && bytes == [0; 4]
    {
        return Err(format!("general.alignment is 0; {DOWNLOAD_AGAIN}"));
    }
    Ok(())
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
