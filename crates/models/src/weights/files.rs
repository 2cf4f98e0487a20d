//! Weights in safetensors files, and what else a folder may hold.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use minicache_config::{python_json, shown};
use safetensors::tensor::Dtype;

use super::shard::Shard;
use super::{WeightSource, listed};
use crate::families::{EMBEDDING, HEAD};
use crate::{Error, ModelConfig, Result};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// How names begin in files of a model without its head.
const BARE: [&str; 3] = ["embed_tokens.", "layers.", "norm."];

/// One safetensors file, or the shards of a `model.safetensors.index.json`; memory-mapped.
#[derive(Debug)]
pub struct Safetensors {
    origin: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to index of its shard and its name there.
    places: HashMap<String, (usize, String)>,
}

impl Safetensors {
    /// Opens a `.safetensors` file, an index, or a folder with either.
    ///
    /// # Errors
    /// No weights there; a file that is truncated or is not safetensors; an index that names shards or tensors that
    /// are not there.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return match path.extension().is_some_and(|e| e == "json") {
                true => Self::open_index(path),
                false => Self::open_single(path),
            };
        }
        let (index, single) = (path.join(INDEX), path.join(SINGLE));
        if index.is_file() {
            Self::open_index(&index)
        } else if single.is_file() {
            Self::open_single(&single)
        } else {
            Err(Error::file(path, format!("holds neither {SINGLE} nor {INDEX}{}", other_weights(path))))
        }
    }

    /// Lets a model with tied embeddings find its one matrix under either name; `config` is untied where a file holds
    /// both and they differ, as transformers does it.
    ///
    /// # Errors
    /// As [`WeightSource::dense`].
    pub(crate) fn tie(&mut self, config: &mut ModelConfig) -> Result<()> {
        if !config.tied {
            return Ok(());
        }
        match (self.places.get(EMBEDDING), self.places.get(HEAD)) {
            (None, Some(head)) => {
                let head = head.clone();
                self.places.insert(EMBEDDING.to_string(), head);
            }
            (Some(_), Some(_)) => {
                let shape = [config.vocab, config.hidden];
                let (embedding, head) = (self.bytes(EMBEDDING, &shape)?, self.bytes(HEAD, &shape)?);
                config.tied = embedding.1 == head.1 && embedding.0 == head.0;
            }
            _ => {}
        }
        Ok(())
    }

    fn new(origin: &Path, shards: Vec<Shard>, places: HashMap<String, usize>) -> Self {
        let known: BTreeSet<String> = places.keys().cloned().collect();
        // A decoder that was saved without its head has names without the prefix.
        let full = |name: String| match format!("model.{name}") {
            full if BARE.iter().any(|bare| name.starts_with(bare)) && !known.contains(&full) => full,
            _ => name,
        };
        let places = places.into_iter().map(|(name, shard)| (full(name.clone()), (shard, name))).collect();
        Self { origin: origin.to_owned(), shards, places }
    }

    fn open_single(path: &Path) -> Result<Self> {
        let shard = Shard::open(path)?;
        let places = shard.tensors.keys().map(|name| (name.clone(), 0)).collect();
        Ok(Self::new(path, vec![shard], places))
    }

    fn open_index(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let not = |e: &str| Error::file(path, format!("not an index of safetensors shards: {e}"));
        let index = python_json::from_slice(&bytes).map_err(|e| not(&e.to_string()))?;
        let map = index.get("weight_map").and_then(serde_json::Value::as_object);
        let map = map.ok_or_else(|| not("it has no weight_map"))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut shards: Vec<Shard> = Vec::new();
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut places = HashMap::new();
        for (tensor, file) in map {
            let file = file.as_str().ok_or_else(|| not("its weight_map holds something else than names"))?;
            let number = match numbers.get(file) {
                Some(number) => *number,
                None => {
                    if Path::new(file).file_name().is_none_or(|name| name != file) {
                        let message = format!("\"{}\" is not the name of a shard beside it", shown(file));
                        return Err(Error::file(path, message));
                    }
                    let shard = folder.join(file);
                    if !shard.is_file() {
                        let file = shown(file);
                        let message =
                            format!("names the shard {file}, which is not beside it; download it again");
                        return Err(Error::file(path, message));
                    }
                    shards.push(Shard::open(&shard)?);
                    numbers.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            if !shards[number].tensors.contains_key(tensor) {
                let (tensor, file) = (shown(tensor), shown(file));
                return Err(Error::file(path, format!("places {tensor} in {file}, which does not hold it")));
            }
            places.insert(tensor.clone(), number);
        }
        Ok(Self::new(path, shards, places))
    }

    /// Bytes, type and file of a tensor after the checks of [`WeightSource::dense`].
    fn bytes(&self, name: &str, shape: &[usize]) -> Result<(&[u8], Dtype, &Path)> {
        let missing = || Error::file(&self.origin, format!("holds no tensor {name}"));
        let (shard, stored) = self.places.get(name).ok_or_else(missing)?;
        let shard = &self.shards[*shard];
        let info = shard.tensors.get(stored).ok_or_else(missing)?;
        if info.shape != shape {
            let message = format!("{name} is {:?} where {shape:?} is needed", info.shape);
            return Err(Error::file(&shard.path, message));
        }
        let (from, to) = info.data_offsets;
        Ok((&shard.map[shard.start + from..shard.start + to], info.dtype, &shard.path))
    }

    fn read(&self, name: &str, shape: &[usize], as_f32: bool) -> Result<Tensor> {
        let (bytes, dtype, path) = self.bytes(name, shape)?;
        let finite = |broken: Option<usize>| match broken {
            None => Ok(()),
            Some(at) => Err(Error::file(
                path,
                format!(
                    "{name} holds NaN or infinity (number {at} of {}); the file is broken",
                    shape.iter().product::<usize>()
                ),
            )),
        };
        // Files are little-endian; mapped bytes need not be aligned.
        let tensor = match dtype {
            Dtype::F32 => {
                let data: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                finite(data.iter().position(|x| !x.is_finite()))?;
                Tensor::from_vec(data, shape, &Device::Cpu)?
            }
            Dtype::F16 => {
                let data: Vec<f16> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
                finite(data.iter().position(|x| !x.is_finite()))?;
                Tensor::from_vec(data, shape, &Device::Cpu)?
            }
            Dtype::BF16 => {
                let data: Vec<bf16> = bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
                finite(data.iter().position(|x| !x.is_finite()))?;
                Tensor::from_vec(data, shape, &Device::Cpu)?
            }
            other => {
                let message = format!("{name} has the type {other}; F32, F16 and BF16 are read");
                return Err(Error::file(path, message));
            }
        };
        if as_f32 { Ok(tensor.to_dtype(DType::F32)?) } else { Ok(tensor) }
    }
}

impl WeightSource for Safetensors {
    fn origin(&self) -> String {
        self.origin.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        let (shard, stored) = self.places.get(name)?;
        Some(self.shards[*shard].tensors.get(stored)?.shape.clone())
    }

    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.read(name, shape, true)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.read(name, shape, false)
    }
}

/// Says which other weights a folder holds, for a message.
pub(crate) fn other_weights(folder: &Path) -> String {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut files: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    files.sort_unstable();
    let with = |ending: &str| files.iter().filter(|f| f.ends_with(ending)).cloned().collect::<Vec<_>>();
    let ggufs = with(".gguf");
    if let [one] = &ggufs[..] {
        return format!("; it holds a GGUF file: give {}", folder.join(one).display());
    }
    if !ggufs.is_empty() {
        return format!("; it holds GGUF files, give one of them: {}", listed(&ggufs));
    }
    if files.iter().any(|f| f.starts_with("pytorch_model") && f.contains(".bin")) {
        return "; the pickled weights in it (pytorch_model.bin) are not read: convert them to safetensors"
            .into();
    }
    let others = with(".safetensors");
    if others.is_empty() { String::new() } else { format!("; {} has another name", listed(&others)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn write(path: &Path, tensors: &[(&str, Tensor)]) {
        let map: HashMap<_, _> = tensors.iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
        candle_core::safetensors::save(&map, path).unwrap();
    }

    fn message<T>(result: Result<T>) -> String {
        match result {
            Ok(_) => panic!("expected an error"),
            Err(e) => {
                let text = e.to_string();
                assert!(!text.contains('\n'), "one line: {text}");
                text
            }
        }
    }

    #[test]
    fn types_shapes_and_nan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SINGLE);
        let x = Tensor::new(&[[1f32, -2.5], [0.25, 3.0]], &Device::Cpu).unwrap();
        write(
            &path,
            &[
                ("f32", x.clone()),
                ("f16", x.to_dtype(DType::F16).unwrap()),
                ("bf16", x.to_dtype(DType::BF16).unwrap()),
                ("u8", x.to_dtype(DType::U8).unwrap()),
                ("nan", Tensor::new(&[0f32, f32::NAN], &Device::Cpu).unwrap()),
            ],
        );
        let source = Safetensors::open(dir.path()).unwrap();
        for (name, dtype) in [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)] {
            let dense = source.dense(name, &[2, 2]).unwrap();
            assert_eq!(dense.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
            assert_eq!(source.stored(name, &[2, 2]).unwrap().dtype(), dtype);
        }
        let path = path.display();
        assert_eq!(
            message(source.dense("u8", &[2, 2])),
            format!("{path}: u8 has the type U8; F32, F16 and BF16 are read")
        );
        assert_eq!(message(source.dense("f32", &[4])), format!("{path}: f32 is [2, 2] where [4] is needed"));
        assert_eq!(message(source.dense("w", &[4])), format!("{path}: holds no tensor w"));
        let nan = message(source.dense("nan", &[2]));
        assert_eq!(nan, format!("{path}: nan holds NaN or infinity (number 1 of 2); the file is broken"));
    }

    #[test]
    fn broken_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        assert!(message(Safetensors::open(dir.path())).contains("holds neither model.safetensors nor"));
        assert!(message(Safetensors::open(&path)).contains("w.safetensors: No such file"));
        write(&path, &[("x", Tensor::zeros((8, 8), DType::F32, &Device::Cpu).unwrap())]);
        let whole = std::fs::read(&path).unwrap();
        for (bytes, wanted) in [
            (
                &whole[..whole.len() - 10],
                "is truncated: it holds 246 bytes of tensors where its header announces 256",
            ),
            (&whole[..20], "is truncated within its header"),
            (&whole[..5], "is truncated, or is not a safetensors file"),
            (&b"GGUF\x03\0\0\0\0\0\0\0"[..], "is not a safetensors file"),
            (&b"<html><body>Not found</body></html>"[..], "is not a safetensors file"),
            (&[whole.clone(), vec![0; 8]].concat()[..], "holds 264 bytes of tensors where"),
            (&b"\x02\0\0\0\0\0\0\0[]"[..], "is not a safetensors file"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let got = message(Safetensors::open(&path));
            assert!(got.contains(wanted), "{got}");
        }
    }

    #[test]
    fn shards() {
        let dir = tempfile::tempdir().unwrap();
        let one = |v: f32| Tensor::new(&[v], &Device::Cpu).unwrap();
        write(&dir.path().join("a.safetensors"), &[("x", one(1.0))]);
        write(&dir.path().join("b.safetensors"), &[("y", one(2.0))]);
        let index = |text: &str| {
            std::fs::write(dir.path().join(INDEX), text).unwrap();
            Safetensors::open(dir.path())
        };
        let source = index(r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#).unwrap();
        assert_eq!(source.dense("y", &[1]).unwrap().to_vec1::<f32>().unwrap(), [2.0]);
        for (text, wanted) in [
            (
                r#"{"weight_map": {"x": "b.safetensors"}}"#,
                "places x in b.safetensors, which does not hold it",
            ),
            (
                r#"{"weight_map": {"x": "c.safetensors"}}"#,
                "names the shard c.safetensors, which is not beside it",
            ),
            (r#"{"weight_map": {"x": "../c.safetensors"}}"#, "is not the name of a shard beside it"),
            (r#"{"weights": 3}"#, "not an index of safetensors shards: it has no weight_map"),
        ] {
            let got = message(index(text));
            assert!(got.contains(wanted) && got.contains(INDEX), "{got}");
        }
    }
}
