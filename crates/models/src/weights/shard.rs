//! One safetensors file, memory-mapped: whether it is whole, and where its tensors lie.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use minicache_config::{guard, lfs_pointer, not_text, shown};
use safetensors::tensor::{SafeTensors, TensorInfo};

use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) map: Mmap,
    /// Where tensor data starts in the file.
    pub(super) start: usize,
    pub(super) tensors: HashMap<String, TensorInfo>,
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read; a file that is cut or overwritten by someone else while it is in use may end
        // the process, which every reader of mapped weights accepts.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (start, data, tensors) = header(&map).map_err(|message| Error::file(path, message))?;
        let have = map.len() - start;
        if have != data {
            let message = format!(
                "{} {} bytes of tensors where its header announces {data}; download it again",
                if have < data { "is truncated: it holds" } else { "holds" },
                have
            );
            return Err(Error::file(path, message));
        }
        Ok(Self { path: path.to_owned(), map, start, tensors })
    }
}

/// Where data starts, how many bytes of it there are to be, and the tensors.
fn header(map: &[u8]) -> std::result::Result<(usize, usize, HashMap<String, TensorInfo>), String> {
    const PREFIX: usize = 8;
    let not = "is not a safetensors file";
    if map.is_empty() {
        return Err("is empty; download it again".into());
    }
    if let Some(what) = lfs_pointer(map) {
        return Err(what.into());
    }
    let prefix = map.first_chunk::<PREFIX>().ok_or_else(|| format!("is truncated, or {not}"))?;
    let length = u64::from_le_bytes(*prefix);
    // The library refuses larger headers too; more is a sign of another format.
    let other = || not_text(&map[..map.len().min(16)]).map(|what| format!("{not}: it {what}"));
    if length > 100_000_000 {
        return Err(other().unwrap_or_else(|| not.to_string()));
    }
    let start = PREFIX + length as usize;
    if map.len() < start {
        return Err(other().unwrap_or_else(|| "is truncated within its header; download it again".into()));
    }
    guard("the safetensors reader", || {
        // Reading the header alone lets a truncated file be told from a wrong one.
        let metadata: safetensors::tensor::Metadata = serde_json::from_slice(&map[PREFIX..start])
            .map_err(|e| format!("{not}: {}", shown(&e.to_string())))?;
        let data = metadata.data_len();
        if map.len() - start == data {
            SafeTensors::read_metadata(map).map_err(|e| format!("{not}: {}", shown(&e.to_string())))?;
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone()));
        Ok((start, data, tensors.collect()))
    })?
}
