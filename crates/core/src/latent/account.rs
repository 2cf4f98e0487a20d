//! What a latent cache holds in a model that is not at hand: the stores of a group are real, its coefficients made up.

use minicache_config::{CacheSpec, LatentSide, ModelShape, Rank};

use super::cache::{Coded, Plan, codings, size};
use crate::store::{Scheme, Side, Store};
use crate::{Error, Footprint, Result};

/// Numbers made at a time.
const STEP: usize = 1 << 22;

/// Bytes of one sequence of `context` tokens.
///
/// # Errors
/// Settings that a calibrated basis decides: `group = "auto"` and a rank by energy.
pub(crate) fn footprint(spec: &CacheSpec, shape: &ModelShape, context: usize) -> Result<Footprint> {
    let mut total = Footprint::default();
    for (side, settings) in [(Side::Keys, &spec.k), (Side::Values, &spec.v)] {
        for (layers, groups) in groups(settings, shape)? {
            total += group(spec, shape, side, layers, context)?.times(groups);
        }
    }
    Ok(total)
}

/// Bytes of the kept bases and of the table of phases for `context` positions, held once for all sequences.
///
/// # Errors
/// As [`footprint`].
pub(crate) fn shared_bytes(spec: &CacheSpec, shape: &ModelShape, context: usize) -> Result<usize> {
    let dim = shape.head_dim;
    let float = size_of::<f32>();
    let mut total = 0;
    for (layers, groups) in groups(&spec.k, shape)? {
        let m = layers * shape.kv_heads;
        let (_, rank) = coded(spec, &spec.k, Side::Keys, layers, shape)?;
        total += groups * ((m * dim + 2 * m * rank) * float + rank / 2 * size_of::<usize>());
    }
    for (layers, groups) in groups(&spec.v, shape)? {
        let n = layers * shape.kv_dim();
        let (_, rank) = coded(spec, &spec.v, Side::Values, layers, shape)?;
        total += groups * (n + 2 * n * rank) * float;
    }
    let mut phases = Store::new(1, dim, Scheme::F32, Side::Keys);
    let row = vec![0.0; dim];
    (0..context.next_multiple_of(64)).for_each(|_| phases.push(&row));
    Ok(total + phases.bytes().total())
}

/// Sizes of the groups of a side, each with how many there are: full ones, and a last one of what is left.
fn groups(side: &LatentSide, shape: &ModelShape) -> Result<Vec<(usize, usize)>> {
    let size = size(side)?;
    let (full, rest) = (shape.layers / size, shape.layers % size);
    Ok([(size, full), (rest, 1)].into_iter().filter(|&(size, count)| size > 0 && count > 0).collect())
}

/// The coding of a group, and its components. Only where bits are allocated by variance does the spectrum matter, and
/// then the sum of the bits is given: any that falls will do.
fn coded(
    spec: &CacheSpec,
    settings: &LatentSide,
    side: Side,
    layers: usize,
    shape: &ModelShape,
) -> Result<(super::coder::Coding, usize)> {
    if let (Rank::Energy { .. }, None) = (settings.rank, settings.rate) {
        let message = "a rank by energy depends on the model's basis; give a number, a fraction or a rate";
        return Err(Error::Missing(message.to_string()));
    }
    let n = layers * shape.kv_dim();
    let (components, copies) = if side == Side::Keys { (n / 2, 2) } else { (n, 1) };
    let spectrum: Vec<f32> = (0..components).map(|i| 1.0 / (1.0 + i as f32)).collect();
    let mut coded = codings(settings, spec, &[spectrum], copies);
    Ok(coded.remove(0))
}

fn group(
    spec: &CacheSpec,
    shape: &ModelShape,
    side: Side,
    layers: usize,
    context: usize,
) -> Result<Footprint> {
    let settings = if side == Side::Keys { &spec.k } else { &spec.v };
    let (coding, rank) = coded(spec, settings, side, layers, shape)?;
    let plan = Plan { first: 0, layers, transform: (), coding };
    let mut held = Coded::new(&plan, rank, side, spec, shape);
    let step = (STEP / (shape.kv_dim() * layers)).max(1);
    for first in (0..context).step_by(step) {
        let tokens = step.min(context - first);
        let rows = vec![1.0; tokens * shape.kv_dim()];
        for layer in 0..layers {
            held.push(layer, &rows, (spec.sinks, spec.residual), |states, _| {
                vec![1.0; states[0].len() / shape.kv_dim() * rank]
            });
        }
        if let Some(window) = shape.window {
            held.drop_before((first + tokens + 1).saturating_sub(window));
        }
    }
    Ok(held.footprint())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::latent::{Basis, KeyBasis, LatentPlan, ValueBasis};
    use crate::{LayerSimilarity, Resources, Rotary, Synthetic, build};

    /// No rotation at all.
    struct Still(usize);

    impl Rotary for Still {
        fn rotate(&self, _: usize, _: &mut [f32]) {}
        fn unrotate(&self, _: usize, _: &mut [f32]) {}
        fn rotary_dim(&self) -> usize {
            self.0
        }
    }

    /// The states themselves as components.
    fn plain_basis(shape: &ModelShape, key: usize, value: usize) -> Basis {
        let groups =
            |size: usize| (0..shape.layers).step_by(size).map(move |f| (f, size.min(shape.layers - f)));
        let unit = |n: usize| (0..n * n).map(move |i| if i / n == i % n { 1.0 } else { 0.0 });
        let half = shape.head_dim / 2;
        let keys = groups(key).map(|(first, layers)| {
            let m = layers * shape.kv_heads;
            KeyBasis {
                first,
                layers,
                mean: vec![0.0; m * shape.head_dim],
                weights: vec![1.0; m * half],
                vectors: (0..half).flat_map(|_| unit(m).flat_map(|x| [x, 0.0])).collect(),
                variances: (0..half * m).map(|i| 2.0 / (1 + i % m) as f32).collect(),
            }
        });
        let keys = vec![(key, keys.collect())];
        let values = groups(value).map(|(first, layers)| {
            let n = layers * shape.kv_dim();
            let variances = (0..n).map(|i| 1.0 / (1 + i) as f32).collect();
            let weights: Vec<f32> = (0..layers * shape.kv_heads).flat_map(|_| unit(shape.head_dim)).collect();
            let (mean, inverse) = (vec![0.0; n], weights.clone());
            ValueBasis { first, layers, mean, weights, inverse, vectors: unit(n).collect(), variances }
        });
        Basis { keys, values: vec![(value, values.collect())] }
    }

    #[test]
    fn made_up_coefficients_take_the_room_of_real_ones() {
        let shape = ModelShape { layers: 7, heads: 4, kv_heads: 2, head_dim: 32, window: None, scale: 0.2 };
        for (text, window) in [
            ("{ method = \"latent\" }", None),
            ("{ method = \"latent\", k = { group = 2 }, v = { group = 3, bits = 16, rank = 40 } }", None),
            ("{ method = \"latent\", residual = 40, k = { axis = \"channel\", quant_group = 64 } }", None),
            ("{ method = \"latent\", sinks = 0, k = { rank = 0.25, bits = 2 } }", Some(200)),
            ("{ method = \"latent\", k = { rate = 2.0 }, v = { rate = 1.5 } }", None),
        ] {
            let shape = ModelShape { window, ..shape };
            let spec = CacheSpec::parse(text).unwrap();
            let (k, v) = (size(&spec.k).unwrap(), size(&spec.v).unwrap());
            let basis = plain_basis(&shape, k, v);
            let plan = Arc::new(LatentPlan::new(&spec, &shape, &basis, Arc::new(Still(32))).unwrap());
            let resources = Resources { latent: Some(plan.clone()), ..Resources::default() };
            let mut cache = build(&spec, &shape, &resources).unwrap();
            Synthetic::new(&shape, 500, LayerSimilarity::default(), 1)
                .fill(&mut *cache, 0..500, 500)
                .unwrap();
            let got = footprint(&spec, &shape, 500).unwrap();
            if spec.k.rate.is_none() {
                assert_eq!(got, cache.footprint(), "{text}");
                assert_eq!(shared_bytes(&spec, &shape, 500).unwrap(), plan.bytes(), "{text}");
            }
            // Sections of other sizes leave other gaps at their ends.
            let ratio = got.total() as f64 / cache.footprint().total() as f64;
            assert!((ratio - 1.0).abs() < 0.03, "{text}: {ratio}");
        }
        let spec = CacheSpec::parse("{ method = \"latent\", v = { rank = { energy = 0.9 } } }").unwrap();
        assert!(footprint(&spec, &shape, 10).unwrap_err().to_string().contains("energy"));
    }
}
