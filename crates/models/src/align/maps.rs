//! From moments to maps.

use faer::Mat;
use pathfinding::kuhn_munkres::kuhn_munkres;
use pathfinding::matrix::Matrix;
use rayon::prelude::*;

use super::moments::{Layer, Moments};
use super::{AlignOptions, LayerMaps};
use crate::calibrate::output_products;
use crate::eigen::symmetric;
use crate::{Error, ModelConfig, Result, WeightSource};

/// How far values are measured by what W_o makes of them: 0 by their own norm, 1 by that of the output. The directions
/// that W_o weighs most agree no better than others, so the middle merges best.
const OUTPUT_METRIC: f64 = 0.5;

/// How far the energies of a frequency of keys are brought together over all layers. A merge mixes both layers' parts,
/// which costs least in the middle.
const KEY_LEVEL: f64 = 0.5;

/// Weights below this share of the mean one are lifted to it: the maps have to be undone in f32.
const FLOOR: f64 = 1e-3;

/// What is known of a layer before it is aligned, by the model's own heads.
struct Metric {
    /// Root of W_o^T W_o of every KV head, `(head_dim, head_dim)`, and its inverse.
    values: Vec<Mat<f64>>,
    inverse: Vec<Mat<f64>>,
    /// Factor on each frequency of keys `(kv_heads, half)`.
    keys: Vec<f64>,
}

/// Chooses the maps of all layers, each to bring its states close to those of the aligned layer below.
pub(super) fn choose(
    moments: &Moments,
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: AlignOptions,
) -> Result<Vec<LayerMaps>> {
    let (heads, dim, half) = (config.kv_heads, config.head_dim, moments.half);
    let metrics: Vec<Metric> = (0..config.layers)
        .into_par_iter()
        .map(|l| metric(l, &moments.layers[l], config, source))
        .collect::<Result<_>>()?;
    let mut out: Vec<LayerMaps> = Vec::new();
    for (l, metric) in metrics.iter().enumerate() {
        let maps = match out.last() {
            None => maps_of(
                metric,
                (0..heads).collect(),
                |_| (Mat::identity(dim, dim), Mat::identity(dim, dim)),
                |_, _| [1.0, 0.0],
                half,
            ),
            Some(below) => above(l, below, metric, moments, options)?,
        };
        out.push(if config.qk_norm { maps.with_shared_factors() } else { maps });
    }
    level(&mut out, moments, config.qk_norm);
    Ok(out)
}

impl LayerMaps {
    /// The same with factors of keys that can stand behind a norm whose weights all heads share: real ones, for each
    /// frequency one, of the mean modulus and of the sign that most of the heads are nearer to.
    fn with_shared_factors(mut self) -> Self {
        let heads = self.order.len();
        let half = self.keys.len() / heads;
        for j in 0..half {
            let own = || self.keys.iter().skip(j).step_by(half);
            let modulus = own().map(|[re, im]| re.hypot(*im)).sum::<f64>() / heads as f64;
            let sign = own().map(|[re, _]| re).sum::<f64>().signum();
            (0..heads).for_each(|head| self.keys[head * half + j] = [sign * modulus, 0.0]);
        }
        self
    }
}

/// Maps of a layer: the metric of each head, then a rotation; for keys a factor of modulus 1.
fn maps_of(
    metric: &Metric,
    order: Vec<usize>,
    rotation: impl Fn(usize) -> (Mat<f64>, Mat<f64>),
    phase: impl Fn(usize, usize) -> [f64; 2],
    half: usize,
) -> LayerMaps {
    let (mut keys, mut values, mut inverse) = (Vec::new(), Vec::new(), Vec::new());
    for (to, &from) in order.iter().enumerate() {
        for j in 0..half {
            let scale = metric.keys[from * half + j];
            keys.push(phase(to, j).map(|x| x * scale));
        }
        let (rotation, back) = rotation(to);
        flat(&(rotation * &metric.values[from]), &mut values);
        flat(&(&metric.inverse[from] * back), &mut inverse);
    }
    LayerMaps { order, keys, values, inverse }
}

fn flat(m: &Mat<f64>, out: &mut Vec<f64>) {
    out.extend((0..m.nrows()).flat_map(|r| (0..m.ncols()).map(move |c| m[(r, c)])));
}

fn metric(layer: usize, moments: &Layer, config: &ModelConfig, source: &dyn WeightSource) -> Result<Metric> {
    let (heads, dim) = (config.kv_heads, config.head_dim);
    let products: Vec<_> = output_products(layer, config, source)?
        .iter()
        .map(|product| symmetric(product).ok_or_else(|| broken(layer)))
        .collect::<Result<_>>()?;
    let trace: f64 = products.iter().map(|(_, energies)| energies.iter().sum::<f64>()).sum();
    let mean = (trace / (heads * dim) as f64).max(f64::MIN_POSITIVE);
    let (mut values, mut inverse) = (Vec::new(), Vec::new());
    for (vectors, energies) in &products {
        let scale = |c: usize| (energies[c] / mean).max(FLOOR).powf(OUTPUT_METRIC / 2.0);
        let with = |scale: &dyn Fn(usize) -> f64| {
            let scaled = Mat::from_fn(dim, dim, |r, c| vectors[(r, c)] * scale(c));
            &scaled * vectors.transpose()
        };
        values.push(with(&scale));
        inverse.push(with(&|c| 1.0 / scale(c)));
    }
    let queries = moments.queries.iter().sum::<f64>() / moments.queries.len() as f64;
    let queries = queries.max(f64::MIN_POSITIVE);
    let keys = moments.queries.iter().map(|q| (q / queries).max(FLOOR).sqrt()).collect();
    Ok(Metric { values, inverse, keys })
}

fn broken(layer: usize) -> Error {
    Error::Calibration(format!("layer {layer} cannot be aligned: its moments are not finite"))
}

/// One head of a layer on one head of the layer below.
struct Match {
    /// How well values and keys can be brought together.
    nuclear: f64,
    coherent: f64,
    /// The map of values in the metric of the layer, and its inverse.
    maps: (Mat<f64>, Mat<f64>),
}

/// The maps of layer `l` on top of those of the layer below.
fn above(
    l: usize,
    below: &LayerMaps,
    metric: &Metric,
    moments: &Moments,
    options: AlignOptions,
) -> Result<LayerMaps> {
    let (heads, dim, half) = (below.order.len(), moments.shape.head_dim, moments.half);
    let kv_dim = heads * dim;
    let (pair, a, b) = (&moments.pairs[l - 1], &moments.layers[l - 1], &moments.layers[l]);
    let count = moments.tokens as f64;
    // Cross moment of the aligned layer below with head `from` of this one, in its metric.
    let cross = |to: usize, from: usize| -> Mat<f64> {
        let source = below.order[to];
        let raw = Mat::from_fn(dim, dim, |r, c| pair.values[(source * dim + r) * kv_dim + from * dim + c]);
        let map = Mat::from_fn(dim, dim, |r, c| below.values[(to * dim + r) * dim + c]);
        &map * raw * &metric.values[from]
    };
    let key_cross = |to: usize, from: usize, j: usize| -> [f64; 2] {
        let source = below.order[to];
        let [cr, ci] = below.keys[to * half + j];
        let at = ((source * heads + from) * half + j) * 2;
        let (re, im) = (pair.keys[at], pair.keys[at + 1]);
        let scale = metric.keys[from * half + j];
        [(cr * re - ci * im) * scale, (cr * im + ci * re) * scale]
    };
    let second =
        |of: &[f64], head: usize| Mat::from_fn(dim, dim, |r, c| of[(head * dim + r) * dim + c] / count);
    let solved: Vec<Match> = (0..heads * heads)
        .into_par_iter()
        .map(|i| {
            let (to, from) = (i / heads, i % heads);
            let svd = cross(to, from).svd().map_err(|_| broken(l))?;
            let nuclear: f64 = (0..dim).map(|c| svd.S()[c]).sum();
            let coherent: f64 = (0..half).map(|j| key_cross(to, from, j)).map(|[x, y]| x.hypot(y)).sum();
            let map = Mat::from_fn(dim, dim, |r, c| below.values[(to * dim + r) * dim + c]);
            let sa = &map * second(&a.values, below.order[to]) * map.transpose();
            let n = &metric.values[from];
            let sb = n * second(&b.values, from) * n;
            let ua = svd.U().transpose() * sa * svd.U();
            let vb = svd.V().transpose() * sb * svd.V();
            let scale = |c: usize| {
                (ua[(c, c)].max(1e-12) / vb[(c, c)].max(1e-12)).powf(options.level / 2.0).clamp(0.1, 10.0)
            };
            let us = Mat::from_fn(dim, dim, |r, c| svd.U()[(r, c)] * scale(c));
            let vs = Mat::from_fn(dim, dim, |r, c| svd.V()[(r, c)] / scale(c));
            let maps = (us * svd.V().transpose(), vs * svd.U().transpose());
            Ok(Match { nuclear, coherent, maps })
        })
        .collect::<Result<_>>()?;
    let most = |of: fn(&Match) -> f64| solved.iter().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let (top_v, top_k) = (most(|s| s.nuclear), most(|s| s.coherent));
    let profit: Vec<i64> =
        solved.iter().map(|s| ((s.nuclear / top_v + s.coherent / top_k) * 1e9).round() as i64).collect();
    let profit = Matrix::from_vec(heads, heads, profit).map_err(|_| broken(l))?;
    let order = kuhn_munkres(&profit).1;
    let chosen = order.clone();
    Ok(maps_of(
        metric,
        order,
        |to| solved[to * heads + chosen[to]].maps.clone(),
        |to, j| {
            let [re, im] = key_cross(to, chosen[to], j);
            let norm = re.hypot(im);
            if norm > 0.0 { [re / norm, im / norm] } else { [1.0, 0.0] }
        },
        half,
    ))
}

/// Brings the energy of every frequency of keys closer to its geometric mean over the layers. Until here keys are
/// scaled by the queries that they meet, so energies are what they contribute to scores. With `shared` a frequency's
/// factor is that of all heads, and its energy their geometric mean.
fn level(layers: &mut [LayerMaps], moments: &Moments, shared: bool) {
    let (half, all) = (moments.half, layers[0].keys.len());
    let (sets, step) = if shared { (half, half) } else { (all, all) };
    for first in 0..sets {
        let set = || (first..all).step_by(step);
        let log = |(maps, layer): (&LayerMaps, &Layer)| {
            let one = |i: usize| {
                let [re, im] = maps.keys[i];
                let energy = layer.keys[maps.order[i / half] * half + i % half] / moments.tokens as f64;
                ((re * re + im * im) * energy).max(f64::MIN_POSITIVE).ln()
            };
            set().map(one).sum::<f64>() / set().count() as f64
        };
        let logs: Vec<f64> = layers.iter().zip(&moments.layers).map(log).collect();
        let mean = logs.iter().sum::<f64>() / logs.len() as f64;
        for (maps, log) in layers.iter_mut().zip(logs) {
            // Bounded, as keys that are nearly zero have no scale to bring together.
            let scale = ((mean - log) * KEY_LEVEL / 2.0).clamp(-5.0, 5.0).exp();
            set().for_each(|i| maps.keys[i] = maps.keys[i].map(|x| x * scale));
        }
    }
}
