//! Safetensors files of f32 tensors, as the commands read and write them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::failure::{OrUsage, usage};

/// An f32 tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    /// Its name in the file.
    pub(crate) name: String,
    /// Its shape.
    pub(crate) shape: Vec<usize>,
    /// Its numbers, row-major.
    pub(crate) data: Vec<f32>,
}

impl Tensor {
    /// States `(tokens, heads, dim)` as the files hold them, `(heads, tokens, dim)`.
    pub(crate) fn of_states(name: impl Into<String>, states: &[f32], heads: usize, dim: usize) -> Self {
        let tokens = states.len() / (heads * dim);
        Self { name: name.into(), shape: vec![heads, tokens, dim], data: swapped(states, tokens, heads, dim) }
    }

    /// States as the caches take them, `(tokens, heads, dim)`.
    ///
    /// # Panics
    /// A tensor that has not three dimensions.
    pub(crate) fn states(&self) -> Vec<f32> {
        swapped(&self.data, self.shape[0], self.shape[1], self.shape[2])
    }
}

/// `(a, b, dim)` to `(b, a, dim)`.
fn swapped(x: &[f32], a: usize, b: usize, dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for j in 0..b {
        for i in 0..a {
            let at = (i * b + j) * dim;
            out.extend_from_slice(&x[at..at + dim]);
        }
    }
    out
}

/// Reads the tensors `names`, all of them f32, of three dimensions and of one shape, without NaN or infinity.
pub(crate) fn read_states(path: &Path, names: &[&str]) -> Result<Vec<Tensor>> {
    let file = path.display();
    let bytes = std::fs::read(path).or_usage(&file)?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| usage(format!("{file}: no whole safetensors file ({e}); write it again")))?;
    let mut out: Vec<Tensor> = Vec::with_capacity(names.len());
    for &name in names {
        let view = tensors.tensor(name).map_err(|_| {
            let held = tensors.names().into_iter().map(String::from).collect::<Vec<_>>();
            usage(format!("{file}: no tensor `{name}`, only: {}", listed(held)))
        })?;
        let tensor = read(&view, name).map_err(|message| usage(format!("{file}: {name}: {message}")))?;
        if let Some(first) = out.first()
            && first.shape != tensor.shape
        {
            let (first, shape) = (&first.name, &first.shape);
            let message = format!("has shape {:?}, but {first} has {shape:?}", tensor.shape);
            return Err(usage(format!("{file}: {name}: {message}; all must have the same")));
        }
        out.push(tensor);
    }
    Ok(out)
}

fn read(view: &TensorView<'_>, name: &str) -> std::result::Result<Tensor, String> {
    if view.dtype() != Dtype::F32 {
        return Err(format!("is {}; convert it to F32", view.dtype()));
    }
    let shape = view.shape().to_vec();
    if shape.len() != 3 || shape.contains(&0) {
        return Err(format!("has shape {shape:?}; expected (kv_heads, tokens, head_dim), none of them 0"));
    }
    let data: Vec<f32> =
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if let Some(at) = data.iter().position(|x| !x.is_finite()) {
        let (head, token) = (at / (shape[1] * shape[2]), at / shape[2] % shape[1]);
        return Err(format!(
            "holds {} at KV head {head}, token {token}, channel {}; states must be finite",
            data[at],
            at % shape[2]
        ));
    }
    Ok(Tensor { name: name.to_string(), shape, data })
}

fn listed(mut names: Vec<String>) -> String {
    names.sort();
    match names.len() {
        0 => "nothing".to_string(),
        n if n > 8 => format!("{}, and {} more", names[..8].join(", "), n - 8),
        _ => names.join(", "),
    }
}

/// Writes the tensors to `path`; a file that is there is replaced only once the new one is whole.
pub(crate) fn write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|t| t.data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, bytes)| Ok((t.name.as_str(), TensorView::new(Dtype::F32, t.shape.clone(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()?;
    // A link that the user names stands for the file behind it.
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    Ok(minicache_models::save_tensors(path, views, None)?)
}

/// Checks before any work is done that a file could be written there.
pub(crate) fn check_out(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(usage(format!("--out: {} is a folder; name a file in it", path.display())));
    }
    folder_of(path).map(|_| ())
}

fn folder_of(path: &Path) -> Result<PathBuf> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if folder.is_dir() {
        return Ok(folder);
    }
    Err(usage(format!("--out: {}: no such folder; create it first", folder.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let states: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let tensor = Tensor::of_states("x", &states, 2, 4);
        assert_eq!((&tensor.shape[..], &tensor.data[4..8]), (&[2, 3, 4][..], &[8.0, 9.0, 10.0, 11.0][..]));
        write(&path, std::slice::from_ref(&tensor)).unwrap();
        let read = read_states(&path, &["x"]).unwrap();
        assert_eq!(read, [tensor]);
        assert_eq!(read[0].states(), states);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let tensor = |name: &str, shape: &[usize], value: f32| Tensor {
            name: name.to_string(),
            shape: shape.to_vec(),
            data: vec![value; shape.iter().product()],
        };
        let fails = |tensors: &[Tensor], words: &[&str]| {
            write(&path, tensors).unwrap();
            let message = read_states(&path, &["a", "b"]).unwrap_err().to_string();
            for word in words {
                assert!(message.contains(word), "no `{word}` in {message}");
            }
        };
        fails(&[tensor("a", &[1, 2, 4], 0.0)], &["no tensor `b`", "only: a"]);
        fails(
            &[tensor("a", &[1, 2, 4], 0.0), tensor("b", &[1, 3, 4], 0.0)],
            &["b:", "[1, 3, 4]", "[1, 2, 4]"],
        );
        fails(&[tensor("a", &[2, 4], 0.0)], &["(kv_heads, tokens, head_dim)"]);
        fails(&[tensor("a", &[1, 2, 4], 0.0), tensor("b", &[1, 2, 4], f32::NAN)], &["b: holds NaN"]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let message = read_states(&path, &["a"]).unwrap_err().to_string();
        assert!(message.contains("safetensors"), "{message}");
    }
}
