//! Calibration: moments of a model's states over text, and the basis that latents are stored in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use faer::{Mat, Side, c64};
use minicache_core::latent::{Basis, KeyBasis, KeyMoments, Moments, ValueBasis, ValueMoments};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::{Decoder, Error, LogitsFor, Result, Step};

/// What a basis was made from; stored in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationInfo {
    /// Fingerprint of the model; a basis is refused for another one.
    pub model: String,
    /// Name of the text: tasks, files, and where they came from.
    pub text: String,
    /// Tokens counted.
    pub tokens: usize,
    /// First positions of each chunk that were not counted.
    pub sinks: usize,
    /// How the basis was computed.
    pub options: BasisOptions,
}

/// Choices in computing a basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BasisOptions {
    /// Subtract the means (of values, and of un-rotated keys), which then cost no bytes per token.
    pub centre: bool,
    /// Weigh keys by the queries they meet, so that the error of scores is minimised rather than of keys.
    pub query_weights: bool,
}

impl Default for BasisOptions {
    fn default() -> Self {
        Self { centre: true, query_weights: true }
    }
}

/// Runs `chunks` of tokens through the model, one sequence each, and sums the moments of its states.
///
/// # Errors
/// As [`Decoder::forward`]; no token left to count.
pub fn collect<'a>(
    decoder: &Decoder,
    chunks: impl Iterator<Item = &'a [u32]>,
    key_groups: &[usize],
    value_groups: &[usize],
    sinks: usize,
) -> Result<Moments> {
    let moments = Arc::new(Mutex::new(Moments::new(decoder.shape(), key_groups, value_groups, sinks)));
    for tokens in chunks.filter(|c| !c.is_empty()) {
        let mut cache = Moments::collector(&moments, decoder.rotary(tokens.len()))?;
        let planned_len = tokens.len();
        decoder.forward(&mut [Step { tokens, cache: &mut *cache, planned_len, logits: LogitsFor::None }])?;
    }
    let moments = moments.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if moments.tokens == 0 {
        return Err(Error::Calibration(format!(
            "the text has no chunk of more than {sinks} tokens to calibrate on"
        )));
    }
    Ok(moments)
}

/// The basis of every group in `moments`: eigenvectors of the (centred, weighted) second moments.
///
/// # Errors
/// An eigendecomposition that does not converge (moments that are not finite).
pub fn basis(moments: &Moments, options: BasisOptions) -> Result<Basis> {
    let keys = |(size, groups): &(usize, Vec<KeyMoments>)| {
        Ok((*size, groups.iter().map(|g| key_basis(g, moments, options)).collect::<Result<_>>()?))
    };
    let values = |(size, groups): &(usize, Vec<ValueMoments>)| {
        Ok((*size, groups.iter().map(|g| value_basis(g, moments.tokens, options)).collect::<Result<_>>()?))
    };
    Ok(Basis {
        keys: moments.keys.iter().map(keys).collect::<Result<_>>()?,
        values: moments.values.iter().map(values).collect::<Result<_>>()?,
    })
}

fn not_converged(first: usize) -> Error {
    Error::Calibration(format!(
        "the moments of the group at layer {first} have no eigendecomposition; are they finite?"
    ))
}

fn value_basis(group: &ValueMoments, tokens: usize, options: BasisOptions) -> Result<ValueBasis> {
    let n = group.sum.len();
    let count = tokens as f64;
    let mean: Vec<f64> = group.sum.iter().map(|s| if options.centre { s / count } else { 0.0 }).collect();
    let covariance = Mat::from_fn(n, n, |a, b| group.products[a * n + b] / count - mean[a] * mean[b]);
    let eigen = covariance.self_adjoint_eigen(Side::Lower).map_err(|_| not_converged(group.first))?;
    // faer sorts ascending; components are kept by descending variance.
    let column = |c: usize| n - 1 - c;
    let vectors = (0..n * n).map(|i| eigen.U()[(i / n, column(i % n))] as f32).collect();
    let variances = (0..n).map(|c| eigen.S()[column(c)].max(0.0) as f32).collect();
    let mean = mean.iter().map(|&m| m as f32).collect();
    Ok(ValueBasis { first: group.first, layers: group.layers, mean, vectors, variances })
}

fn key_basis(group: &KeyMoments, moments: &Moments, options: BasisOptions) -> Result<KeyBasis> {
    let shape = &moments.shape;
    let (dim, half) = (shape.head_dim, shape.head_dim / 2);
    let m = group.layers * shape.kv_heads;
    let count = moments.tokens as f64;
    let mean: Vec<f64> = group.sum.iter().map(|s| if options.centre { s / count } else { 0.0 }).collect();
    let queries = &moments.queries[group.first * shape.kv_heads * half..][..m * half];
    let average = (queries.iter().sum::<f64>() / queries.len() as f64).max(f64::MIN_POSITIVE);
    let weight = |q: f64| if options.query_weights { (q / average).max(1e-4).sqrt() } else { 1.0 };
    let weights: Vec<f64> = queries.iter().map(|&q| weight(q)).collect();
    let (mut vectors, mut variances) = (Vec::new(), Vec::new());
    for j in 0..half {
        let mean = |a: usize| c64::new(mean[a * dim + j], mean[a * dim + half + j]);
        let covariance = Mat::from_fn(m, m, |a, b| {
            let p = &group.products[((j * m + a) * m + b) * 2..][..2];
            let centred = c64::new(p[0], p[1]) / count - mean(a) * mean(b).conj();
            centred * (weights[a * half + j] * weights[b * half + j])
        });
        let eigen = covariance.self_adjoint_eigen(Side::Lower).map_err(|_| not_converged(group.first))?;
        let column = |c: usize| m - 1 - c;
        for a in 0..m {
            for c in 0..m {
                let u = eigen.U()[(a, column(c))];
                vectors.extend([u.re as f32, u.im as f32]);
            }
        }
        variances.extend((0..m).map(|c| eigen.S()[column(c)].re.max(0.0) as f32));
    }
    Ok(KeyBasis {
        first: group.first,
        layers: group.layers,
        mean: mean.iter().map(|&x| x as f32).collect(),
        weights: weights.iter().map(|&x| x as f32).collect(),
        vectors,
        variances,
    })
}

const FORMAT: &str = "minicache-basis-1";

/// The named tensors of one group: where they go in a file, and come from.
fn key_tensors(b: &KeyBasis) -> [(&'static str, &Vec<f32>); 4] {
    [("mean", &b.mean), ("weights", &b.weights), ("vectors", &b.vectors), ("variances", &b.variances)]
}

fn value_tensors(b: &ValueBasis) -> [(&'static str, &Vec<f32>); 3] {
    [("mean", &b.mean), ("vectors", &b.vectors), ("variances", &b.variances)]
}

/// Writes a basis to a safetensors file, atomically: tensors `key.{group}.{first}.{layers}.{name}` and `value...`.
///
/// # Errors
/// A file that cannot be written.
pub fn save(basis: &Basis, info: &CalibrationInfo, path: &Path) -> Result<()> {
    let mut tensors: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |side: &str, size: usize, first: usize, layers: usize, name: &str, data: &[f32]| {
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((format!("{side}.{size}.{first}.{layers}.{name}"), bytes));
    };
    for (size, b) in basis.keys.iter().flat_map(|(size, groups)| groups.iter().map(move |b| (*size, b))) {
        key_tensors(b).iter().for_each(|(name, data)| add("key", size, b.first, b.layers, name, data));
    }
    for (size, b) in basis.values.iter().flat_map(|(size, groups)| groups.iter().map(move |b| (*size, b))) {
        value_tensors(b).iter().for_each(|(name, data)| add("value", size, b.first, b.layers, name, data));
    }
    let broken = |e: String| Error::Calibration(format!("{}: {e}", path.display()));
    let views: Vec<(String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            view.map(|v| (name.clone(), v)).map_err(|e| broken(e.to_string()))
        })
        .collect::<Result<_>>()?;
    let text = serde_json::to_string(info).map_err(|e| broken(e.to_string()))?;
    let metadata =
        HashMap::from([("format".to_string(), FORMAT.to_string()), ("calibration".to_string(), text)]);
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(views, Some(metadata), &partial).map_err(|e| broken(e.to_string()))?;
    std::fs::rename(&partial, path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

/// Reads a basis that was calibrated on the model with `fingerprint`.
///
/// # Errors
/// A file that is missing, truncated or no basis, and a basis of another model.
pub fn load(path: &Path, fingerprint: &str) -> Result<(Basis, CalibrationInfo)> {
    let broken = |e: &str| Error::Calibration(format!("{}: {e}; calibrate it again", path.display()));
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: PathBuf::from(path), source })?;
    let (_, header) =
        SafeTensors::read_metadata(&bytes).map_err(|e| broken(&format!("not a basis file ({e})")))?;
    let metadata = header.metadata().as_ref().filter(|m| m.get("format").is_some_and(|f| f == FORMAT));
    let info = metadata
        .and_then(|m| m.get("calibration"))
        .ok_or_else(|| broken("not a basis file of this version"))?;
    let info: CalibrationInfo = serde_json::from_str(info).map_err(|e| broken(&e.to_string()))?;
    if info.model != fingerprint {
        return Err(broken(&format!("calibrated on another model ({}, not {fingerprint})", info.model)));
    }
    let file =
        SafeTensors::deserialize(&bytes).map_err(|e| broken(&format!("truncated or corrupt ({e})")))?;
    let numbers = |name: &str| -> Result<Vec<f32>> {
        let tensor = file.tensor(name).map_err(|_| broken(&format!("tensor {name} is missing")))?;
        Ok(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let mut groups: Vec<(bool, usize, usize, usize)> = Vec::new();
    for name in file.names() {
        let parts: Vec<&str> = name.split('.').collect();
        if let [side, size, first, layers, "mean"] = parts[..]
            && let (Ok(size), Ok(first), Ok(layers)) = (size.parse(), first.parse(), layers.parse())
        {
            groups.push((side == "value", size, first, layers));
        }
    }
    groups.sort_unstable();
    let mut basis = Basis::default();
    for (value, size, first, layers) in groups {
        let side = if value { "value" } else { "key" };
        let tensor = |name: &str| numbers(&format!("{side}.{size}.{first}.{layers}.{name}"));
        let (mean, vectors, variances) = (tensor("mean")?, tensor("vectors")?, tensor("variances")?);
        if value {
            let group = ValueBasis { first, layers, mean, vectors, variances };
            push(&mut basis.values, size, group);
        } else {
            let group = KeyBasis { first, layers, mean, weights: tensor("weights")?, vectors, variances };
            push(&mut basis.keys, size, group);
        }
    }
    Ok((basis, info))
}

fn push<T>(groups: &mut Vec<(usize, Vec<T>)>, size: usize, group: T) {
    match groups.last_mut() {
        Some((s, list)) if *s == size => list.push(group),
        _ => groups.push((size, vec![group])),
    }
}
