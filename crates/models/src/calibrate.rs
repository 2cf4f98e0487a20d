//! Calibration: moments of a model's states over text, and the basis that latents are stored in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use faer::{Mat, Side, c64};
use minicache_config::{guard, lfs_pointer, shown};
use minicache_core::ModelShape;
use minicache_core::latent::{
    Basis, Grouping, KeyBasis, KeyMoments, Moments, Span, ValueBasis, ValueMoments,
};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::eigen::symmetric;
use crate::families::{LayerNames, Role};
use crate::{Decoder, Error, LogitsFor, ModelConfig, Result, Step, WeightSource};

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
    /// Weigh values by the output projection and layers by the residual stream that they add to, so that the error of
    /// what attention writes is minimised rather than of values; and heads of keys by the values that they choose from.
    pub output_weights: bool,
}

impl Default for BasisOptions {
    fn default() -> Self {
        Self { centre: true, query_weights: true, output_weights: true }
    }
}

/// Runs `chunks` of tokens through the model, one sequence each, and sums the moments of its states.
///
/// # Errors
/// As [`Decoder::forward`]; no token left to count.
pub fn collect<'a>(
    decoder: &Decoder,
    chunks: impl Iterator<Item = &'a [u32]>,
    keys: &[Grouping],
    values: &[Grouping],
    sinks: usize,
) -> Result<Moments> {
    let moments = Arc::new(Mutex::new(Moments::new(decoder.shape(), keys, values, sinks)));
    let hidden = decoder.config().hidden;
    let mut stream = vec![0.0; decoder.shape().layers];
    for tokens in chunks.filter(|c| !c.is_empty()) {
        let collector = Moments::collector(&moments, decoder.rotary(tokens.len()))?;
        let mut sequence = decoder.sequence(collector, tokens.len());
        let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::None };
        decoder.forward_observed(&mut [step], &mut |layer, x| {
            let rows = x.chunks_exact(hidden).skip(sinks);
            stream[layer] += rows.flatten().map(|x| f64::from(x * x)).sum::<f64>();
        })?;
    }
    let mut moments = moments.lock().unwrap_or_else(PoisonError::into_inner).clone();
    moments.stream = stream;
    if moments.tokens == 0 {
        return Err(Error::Calibration(format!(
            "the text has no chunk of more than {sinks} tokens to calibrate on"
        )));
    }
    Ok(moments)
}

/// Bytes of the matrices that [`basis`] works on at a time.
const AT_ONCE: usize = 4 << 30;
/// Matrices of its size that a decomposition needs.
const MATRICES: usize = 6;

/// The basis of every span in `moments`: eigenvectors of the (centred, weighted) second moments. `source` holds the
/// weights of the model of `config`.
///
/// # Errors
/// An eigendecomposition that does not converge (moments that are not finite); weights that cannot be read.
pub fn basis(
    moments: &Moments,
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: BasisOptions,
) -> Result<Basis> {
    let outputs = Outputs::new(moments, config, source, options)?;
    // Several spans at a time: of keys, whose matrices are small, all, and of values as many as have room.
    let keys = |(grouping, spans): &(Grouping, Vec<KeyMoments>)| {
        let bases = spans.par_iter().map(|m| key_basis(m, moments, &outputs, options));
        Ok((*grouping, bases.collect::<Result<_>>()?))
    };
    let values = |(grouping, spans): &(Grouping, Vec<ValueMoments>)| {
        let bytes = spans.first().map_or(0, |m| m.products.len() * size_of::<f64>());
        let at_once = (AT_ONCE / (MATRICES * bytes).max(1)).max(1);
        let mut bases = Vec::with_capacity(spans.len());
        for some in spans.chunks(at_once) {
            let some = some.par_iter().map(|m| value_basis(m, moments, &outputs, options));
            bases.extend(some.collect::<Result<Vec<_>>>()?);
        }
        Ok((*grouping, bases))
    };
    Ok(Basis {
        keys: moments.keys.iter().map(keys).collect::<Result<_>>()?,
        values: moments.values.iter().map(values).collect::<Result<_>>()?,
    })
}

/// How much what attention writes depends on each (layer, KV head), relative to the residual stream.
struct Outputs {
    /// Root of W_o^T W_o over the query heads of a KV head, and its inverse.
    roots: Vec<(Mat<f64>, Mat<f64>)>,
    /// Mean squared norm of what a head's values vary by, as W_o writes them.
    energies: Vec<f64>,
}

impl Outputs {
    fn new(
        moments: &Moments,
        config: &ModelConfig,
        source: &dyn WeightSource,
        options: BasisOptions,
    ) -> Result<Self> {
        let (heads, dim) = (config.kv_heads, config.head_dim);
        if !options.output_weights {
            let one = (Mat::identity(dim, dim), Mat::identity(dim, dim));
            let count = config.layers * heads;
            return Ok(Self { roots: vec![one; count], energies: vec![1.0; count] });
        }
        let layers: Vec<Vec<_>> = (0..config.layers)
            .into_par_iter()
            .map(|layer| {
                let products = output_products(layer, config, source)?;
                let stream = (moments.stream[layer] / moments.tokens as f64).max(f64::MIN_POSITIVE);
                products
                    .into_iter()
                    .enumerate()
                    .map(|(head, product)| {
                        let product = product * faer::Scale(1.0 / stream);
                        let values = &moments.heads[layer * heads + head];
                        let energy = value_energy(values, moments.tokens, &product);
                        let (root, inverse) = roots(&product).ok_or_else(|| not_converged(layer))?;
                        Ok((root, inverse, energy))
                    })
                    .collect::<Result<_>>()
            })
            .collect::<Result<_>>()?;
        let mut out = Self { roots: Vec::new(), energies: Vec::new() };
        for (root, inverse, energy) in layers.into_iter().flatten() {
            out.roots.push((root, inverse));
            out.energies.push(energy);
        }
        Ok(out)
    }
}

/// W_o^T W_o of every KV head of a layer, summed over its query heads, `(head_dim, head_dim)`.
pub(crate) fn output_products(
    layer: usize,
    config: &ModelConfig,
    source: &dyn WeightSource,
) -> Result<Vec<Mat<f64>>> {
    let (dim, width, group) = (config.head_dim, config.q_dim(), config.heads / config.kv_heads);
    let name = LayerNames::new(config, layer).weight(Role::Output)?;
    let w: Vec<f32> = source.dense(&name, &[config.hidden, width])?.flatten_all()?.to_vec1()?;
    let product = |head: usize| {
        let mut sum = Mat::<f64>::zeros(dim, dim);
        for first in (head * group..(head + 1) * group).map(|g| g * dim) {
            let block = Mat::from_fn(config.hidden, dim, |r, c| f64::from(w[r * width + first + c]));
            sum += block.transpose() * &block;
        }
        sum
    };
    Ok((0..config.kv_heads).map(product).collect())
}

/// The symmetric root of a positive semidefinite matrix and its inverse, directions that hardly matter lifted to a
/// thousandth of the mean one.
fn roots(product: &Mat<f64>) -> Option<(Mat<f64>, Mat<f64>)> {
    let n = product.nrows();
    let (vectors, values) = symmetric(product)?;
    let mean = (values.iter().sum::<f64>() / n as f64).max(f64::MIN_POSITIVE);
    let with = |scale: &dyn Fn(f64) -> f64| {
        let scaled = Mat::from_fn(n, n, |r, c| vectors[(r, c)] * scale(values[c].max(1e-3 * mean)));
        &scaled * vectors.transpose()
    };
    Some((with(&f64::sqrt), with(&|x| 1.0 / x.sqrt())))
}

/// tr(M Cov) of the values of a head.
fn value_energy(values: &ValueMoments, tokens: usize, product: &Mat<f64>) -> f64 {
    let (dim, count) = (values.sum.len(), tokens as f64);
    let mut energy = 0.0;
    for a in 0..dim {
        for b in 0..dim {
            let mean = values.sum[a] / count * (values.sum[b] / count);
            energy += product[(a, b)] * (values.products[a * dim + b] / count - mean);
        }
    }
    energy.max(f64::MIN_POSITIVE)
}

fn not_converged(first: usize) -> Error {
    Error::Calibration(format!(
        "the moments of the group at layer {first} have no eigendecomposition; are they finite?"
    ))
}

fn value_basis(
    group: &ValueMoments,
    moments: &Moments,
    outputs: &Outputs,
    options: BasisOptions,
) -> Result<ValueBasis> {
    let n = group.sum.len();
    let (dim, heads) = (moments.shape.head_dim, moments.shape.kv_heads);
    let count = moments.tokens as f64;
    let mean: Vec<f64> = group.sum.iter().map(|s| if options.centre { s / count } else { 0.0 }).collect();
    let covariance = Mat::from_fn(n, n, |a, b| group.products[a * n + b] / count - mean[a] * mean[b]);
    let roots = || group.span.indices(heads).map(|i| &outputs.roots[i]);
    // W Cov W with W block-diagonal, one block of rows and columns at a time.
    let mut weighted = Mat::<f64>::zeros(n, n);
    for (a, (left, _)) in roots().enumerate() {
        for (b, (right, _)) in roots().enumerate() {
            let block = left * covariance.as_ref().submatrix(a * dim, b * dim, dim, dim) * right;
            weighted.as_mut().submatrix_mut(a * dim, b * dim, dim, dim).copy_from(&block);
        }
    }
    let (u, s) = symmetric(&weighted).ok_or_else(|| not_converged(group.span.first))?;
    // Ascending; components are kept by descending variance.
    let column = |c: usize| n - 1 - c;
    let vectors = (0..n * n).map(|i| u[(i / n, column(i % n))] as f32).collect();
    let variances = (0..n).map(|c| s[column(c)].max(0.0) as f32).collect();
    let mean = mean.iter().map(|&m| m as f32).collect();
    let flat = |m: &Mat<f64>| (0..dim * dim).map(|i| m[(i / dim, i % dim)] as f32).collect::<Vec<f32>>();
    let weights = roots().flat_map(|(root, _)| flat(root)).collect();
    let inverse = roots().flat_map(|(_, inverse)| flat(inverse)).collect();
    Ok(ValueBasis { span: group.span, mean, weights, inverse, vectors, variances })
}

fn key_basis(
    group: &KeyMoments,
    moments: &Moments,
    outputs: &Outputs,
    options: BasisOptions,
) -> Result<KeyBasis> {
    let shape = &moments.shape;
    let (dim, half) = (shape.head_dim, shape.head_dim / 2);
    let m = group.span.members();
    let count = moments.tokens as f64;
    let mean: Vec<f64> = group.sum.iter().map(|s| if options.centre { s / count } else { 0.0 }).collect();
    let places = || group.span.indices(shape.kv_heads);
    let queries: Vec<f64> =
        places().flat_map(|i| moments.queries[i * half..(i + 1) * half].iter().copied()).collect();
    let average = (queries.iter().sum::<f64>() / queries.len() as f64).max(f64::MIN_POSITIVE);
    let heads: Vec<f64> = places().map(|i| outputs.energies[i]).collect();
    // Half of the mean squared score that a key's error of unit size makes, times what a score moves.
    let per_query = f64::from(shape.scale).powi(2) / (2.0 * count * shape.group() as f64);
    let absolute = if options.output_weights { average * per_query } else { 1.0 };
    let weight = |i: usize| {
        let relative = if options.query_weights { (queries[i] / average).max(1e-4) } else { 1.0 };
        (relative * absolute * heads[i / half]).sqrt()
    };
    let weights: Vec<f64> = (0..m * half).map(weight).collect();
    let (mut vectors, mut variances) = (Vec::new(), Vec::new());
    for j in 0..half {
        let mean = |a: usize| c64::new(mean[a * dim + j], mean[a * dim + half + j]);
        let covariance = Mat::from_fn(m, m, |a, b| {
            let p = &group.products[((j * m + a) * m + b) * 2..][..2];
            let centred = c64::new(p[0], p[1]) / count - mean(a) * mean(b).conj();
            centred * (weights[a * half + j] * weights[b * half + j])
        });
        let eigen =
            covariance.self_adjoint_eigen(Side::Lower).map_err(|_| not_converged(group.span.first))?;
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
        span: group.span,
        mean: mean.iter().map(|&x| x as f32).collect(),
        weights: weights.iter().map(|&x| x as f32).collect(),
        vectors,
        variances,
    })
}

const FORMAT: &str = "minicache-basis-3";

/// The named tensors of one group: where they go in a file, and come from.
fn key_tensors(b: &KeyBasis) -> [(&'static str, &Vec<f32>); 4] {
    [("mean", &b.mean), ("weights", &b.weights), ("vectors", &b.vectors), ("variances", &b.variances)]
}

fn value_tensors(b: &ValueBasis) -> [(&'static str, &Vec<f32>); 5] {
    [
        ("mean", &b.mean),
        ("weights", &b.weights),
        ("inverse", &b.inverse),
        ("vectors", &b.vectors),
        ("variances", &b.variances),
    ]
}

/// What a tensor of a basis belongs to: `key` or `value`, layers and heads of the grouping, then those of the span.
fn prefix(side: &str, grouping: Grouping, span: Span) -> String {
    let (Grouping { layers, heads }, s) = (grouping, span);
    format!("{side}.{layers}x{heads}.{}+{}.{}+{}", s.first, s.layers, s.head, s.heads)
}

/// The reverse of [`prefix`]; nothing for another name.
fn parse_prefix(name: &str) -> Option<(&str, Grouping, Span)> {
    let pair = |text: &str, by: char| {
        let (a, b) = text.split_once(by)?;
        Some((a.parse::<usize>().ok()?, b.parse::<usize>().ok()?))
    };
    let parts: Vec<&str> = name.split('.').collect();
    let [side @ ("key" | "value"), grouping, layers, heads] = parts[..] else { return None };
    let (size, width) = pair(grouping, 'x')?;
    let ((first, layers), (head, heads)) = (pair(layers, '+')?, pair(heads, '+')?);
    Some((side, Grouping { layers: size, heads: width }, Span { first, layers, head, heads }))
}

/// Writes a basis to a safetensors file, atomically: tensors `key.{layers}x{heads}.{first}+{layers}.{head}+{heads}.{name}`
/// and `value...`.
///
/// # Errors
/// A file that cannot be written.
pub fn save(basis: &Basis, info: &CalibrationInfo, path: &Path) -> Result<()> {
    let mut tensors: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |prefix: String, name: &str, data: &[f32]| {
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((format!("{prefix}.{name}"), bytes));
    };
    for (g, b) in basis.keys.iter().flat_map(|(g, spans)| spans.iter().map(move |b| (*g, b))) {
        key_tensors(b).iter().for_each(|(name, data)| add(prefix("key", g, b.span), name, data));
    }
    for (g, b) in basis.values.iter().flat_map(|(g, spans)| spans.iter().map(move |b| (*g, b))) {
        value_tensors(b).iter().for_each(|(name, data)| add(prefix("value", g, b.span), name, data));
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
    crate::save_tensors(path, views, Some(metadata))
}

/// Reads a basis that was calibrated on the model with `fingerprint` and `shape`.
///
/// # Errors
/// A file that is missing, truncated, damaged or no basis, and a basis of another model.
pub fn load(path: &Path, fingerprint: &str, shape: &ModelShape) -> Result<(Basis, CalibrationInfo)> {
    let broken = |e: &str| Error::Calibration(format!("{}: {e}; calibrate it again", path.display()));
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: PathBuf::from(path), source })?;
    if let Some(what) = lfs_pointer(&bytes) {
        return Err(Error::file(path, what));
    }
    let (info, basis) = guard("the safetensors reader", || read(&bytes, fingerprint))
        .and_then(|read| read)
        .map_err(|e| broken(&e))?;
    basis.check(shape).map_err(|e| broken(&e))?;
    Ok((basis, info))
}

/// Reads the bytes of a basis file.
fn read(bytes: &[u8], fingerprint: &str) -> std::result::Result<(CalibrationInfo, Basis), String> {
    let text = |e: &dyn std::fmt::Display| shown(&e.to_string());
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|e| format!("not a basis file ({})", text(&e)))?;
    let metadata = header.metadata().as_ref().filter(|m| m.get("format").is_some_and(|f| f == FORMAT));
    let info = metadata.and_then(|m| m.get("calibration")).ok_or("not a basis file of this version")?;
    let info: CalibrationInfo = serde_json::from_str(info).map_err(|e| text(&e))?;
    if info.model != fingerprint {
        return Err(format!("calibrated on another model ({}, not {fingerprint})", shown(&info.model)));
    }
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("truncated or corrupt ({})", text(&e)))?;
    let numbers = |name: &str| -> std::result::Result<Vec<f32>, String> {
        let tensor = file.tensor(name).map_err(|_| format!("tensor {} is missing", shown(name)))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("tensor {} is of type {}, not F32", shown(name), tensor.dtype()));
        }
        Ok(tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    };
    let mut spans: Vec<(&str, Grouping, Span)> =
        file.names().into_iter().filter_map(|n| parse_prefix(n.strip_suffix(".mean")?)).collect();
    spans.sort_unstable();
    let mut basis = Basis::default();
    for (side, grouping, span) in spans {
        let prefix = prefix(side, grouping, span);
        let tensor = |name: &str| numbers(&format!("{prefix}.{name}"));
        let (mean, weights) = (tensor("mean")?, tensor("weights")?);
        let (vectors, variances) = (tensor("vectors")?, tensor("variances")?);
        if side == "value" {
            let inverse = tensor("inverse")?;
            push(
                &mut basis.values,
                grouping,
                ValueBasis { span, mean, weights, inverse, vectors, variances },
            );
        } else {
            push(&mut basis.keys, grouping, KeyBasis { span, mean, weights, vectors, variances });
        }
    }
    Ok((info, basis))
}

fn push<T>(spans: &mut Vec<(Grouping, Vec<T>)>, grouping: Grouping, span: T) {
    match spans.last_mut() {
        Some((g, list)) if *g == grouping => list.push(span),
        _ => spans.push((grouping, vec![span])),
    }
}
