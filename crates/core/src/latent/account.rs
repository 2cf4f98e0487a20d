//! What a latent cache holds in a model that is not at hand: the stores of a group are real, its coefficients made up.

use crate::methods::Latent;
use crate::settings::{LatentSide, ModelShape, Rank};

use std::sync::Arc;

use super::basis::{Grouping, Phases, Span};
use super::coded::Coded;
use super::coder::Coding;
use super::plan::{Plan, Set, codings, grouping, phase_scheme};
use super::transform::{KeyTransform, ValueTransform};
use crate::store::Side;
use crate::{Error, Footprint, Result, Rotary};

/// Numbers made at a time.
const STEP: usize = 1 << 22;

/// Bytes of one sequence of `context` tokens.
///
/// # Errors
/// Settings that a calibrated basis decides: `group = "auto"` and a rank by energy.
pub(crate) fn footprint(spec: &Latent, shape: &ModelShape, context: usize) -> Result<Footprint> {
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
pub(crate) fn shared_bytes(spec: &Latent, shape: &ModelShape, context: usize) -> Result<usize> {
    let mut total = 0;
    for (side, settings) in [(Side::Keys, &spec.k), (Side::Values, &spec.v)] {
        for (grouping, count) in groups(settings, shape)? {
            for (span, coding) in coded(spec, settings, side, grouping, shape)? {
                let (members, dim, rank) = (span.members(), shape.head_dim, coding.rank());
                total += count
                    * match side {
                        Side::Keys => KeyTransform::bytes_of(members, dim, rank),
                        Side::Values => ValueTransform::bytes_of(members, dim, rank),
                    };
            }
        }
    }
    let phases = Phases::new(Arc::new(Still(shape.head_dim)), shape.head_dim, spec.sinks, phase_scheme(spec));
    phases.extend(context);
    Ok(total + phases.read(|table| table.bytes().total()))
}

/// No rotation: what is stored of phases takes the same room.
struct Still(usize);

impl Rotary for Still {
    fn angles_into(&self, _: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.0 / 2);
        cos.fill(1.0);
        sin.fill(0.0);
    }
    fn rotate(&self, _: usize, _: &mut [f32]) {}
    fn unrotate(&self, _: usize, _: &mut [f32]) {}
    fn rotary_dim(&self) -> usize {
        self.0
    }
}

/// Groups of layers of a side, each with how many there are: full ones, and a last one of what is left.
fn groups(side: &LatentSide, shape: &ModelShape) -> Result<Vec<(Grouping, usize)>> {
    let Grouping { layers, heads } = grouping(side, shape)?;
    let counts = [(layers, shape.layers / layers), (shape.layers % layers, 1)];
    let some = counts.into_iter().filter(|&(layers, count)| layers > 0 && count > 0);
    Ok(some.map(|(layers, count)| (Grouping { layers, heads }, count)).collect())
}

/// The spans of one group of layers, with their codings. Only where bits are allocated by variance does the spectrum
/// matter, and then the sum of the bits is given: any that falls will do.
fn coded(
    spec: &Latent,
    settings: &LatentSide,
    side: Side,
    grouping: Grouping,
    shape: &ModelShape,
) -> Result<Vec<(Span, Coding)>> {
    if let (Rank::Energy { .. }, None) = (settings.rank, settings.rate) {
        let message = "a rank by energy depends on the model's basis; give a number, a fraction or a rate";
        return Err(Error::Missing(message.to_string()));
    }
    let copies = if side == Side::Keys { 2 } else { 1 };
    let spans: Vec<Span> = grouping.spans(grouping.layers, shape.kv_heads).collect();
    let spectrum =
        |span: &Span| (0..span.members() * shape.head_dim / copies).map(|i| 1.0 / (1.0 + i as f32)).collect();
    let variances: Vec<Vec<f32>> = spans.iter().map(spectrum).collect();
    let codings = codings(settings, spec, &variances, copies);
    Ok(spans.into_iter().zip(codings).collect())
}

fn group(
    spec: &Latent,
    shape: &ModelShape,
    side: Side,
    grouping: Grouping,
    context: usize,
) -> Result<Footprint> {
    let settings = spec.side(side);
    let sets = coded(spec, settings, side, grouping, shape)?.into_iter().map(|(span, coding)| Set {
        heads: span.head..span.head + span.heads,
        transform: (),
        coding,
    });
    let layers = grouping.layers;
    let plan = Plan { first: 0, layers, sets: sets.collect() };
    let mut held = Coded::new(&plan, side, spec, shape);
    let step = (STEP / (shape.kv_dim() * layers)).max(1);
    for first in (0..context).step_by(step) {
        let tokens = step.min(context - first);
        let rows = vec![1.0; tokens * shape.kv_dim()];
        for layer in 0..layers {
            if held.wait(layer, &rows) {
                held.take((spec.sinks, spec.residual), |_, _, _, z| z.fill(1.0));
            }
        }
        // Groups in which some layer sees all tokens keep them; where layers differ, all groups are taken to be such.
        if let Some(window) = shape.window.filter(|_| shape.full_layers.is_empty()) {
            held.drop_before((first + tokens + 1).saturating_sub(window));
        }
    }
    Ok(held.footprint())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::latent::{Basis, KeyBasis, LatentPlan, ValueBasis};
    use crate::{CacheSpec, LayerSimilarity, Resources, Synthetic, build};

    /// The states themselves as components.
    fn plain_basis(shape: &ModelShape, key: Grouping, value: Grouping) -> Basis {
        let spans = |grouping: Grouping| grouping.spans(shape.layers, shape.kv_heads);
        let unit = |n: usize| (0..n * n).map(move |i| if i / n == i % n { 1.0 } else { 0.0 });
        let half = shape.head_dim / 2;
        let keys = spans(key).map(|span| {
            let m = span.members();
            KeyBasis {
                span,
                mean: vec![0.0; m * shape.head_dim],
                weights: vec![1.0; m * half],
                vectors: (0..half).flat_map(|_| unit(m).flat_map(|x| [x, 0.0])).collect(),
                variances: (0..half * m).map(|i| 2.0 / (1 + i % m) as f32).collect(),
            }
        });
        let keys = vec![(key, keys.collect())];
        let values = spans(value).map(|span| {
            let n = span.members() * shape.head_dim;
            let variances = (0..n).map(|i| 1.0 / (1 + i) as f32).collect();
            let weights: Vec<f32> = (0..span.members()).flat_map(|_| unit(shape.head_dim)).collect();
            let (mean, inverse) = (vec![0.0; n], weights.clone());
            ValueBasis { span, mean, weights, inverse, vectors: unit(n).collect(), variances }
        });
        Basis { keys, values: vec![(value, values.collect())] }
    }

    #[test]
    fn made_up_coefficients_take_the_room_of_real_ones() {
        let shape =
            ModelShape { layers: 7, heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, ..ModelShape::PLAIN };
        for (text, window) in [
            ("{ method = \"latent\" }", None),
            ("{ method = \"latent\", k = { group = 2 }, v = { group = 3, bits = 16, rank = 40 } }", None),
            ("{ method = \"latent\", residual = 40, k = { axis = \"channel\", quant_group = 64 } }", None),
            ("{ method = \"latent\", sinks = 0, k = { rank = 0.25, bits = 2 } }", Some(200)),
            ("{ method = \"latent\", k = { rate = 2.0 }, v = { rate = 1.5 } }", None),
            ("{ method = \"latent\", k = { group = 1, heads = 1 }, v = { heads = 1, rank = 40 } }", None),
            ("{ method = \"latent\", k = { rate = 2.0, heads = 1 }, v = { rate = 1.5 } }", None),
        ] {
            let shape = ModelShape { window, ..shape };
            let whole = CacheSpec::parse(text).unwrap();
            let CacheSpec::Latent(spec) = whole.clone() else { panic!("{text}") };
            let (k, v) = (grouping(&spec.k, &shape).unwrap(), grouping(&spec.v, &shape).unwrap());
            let basis = plain_basis(&shape, k, v);
            let plan = Arc::new(LatentPlan::new(&spec, &shape, &basis, Arc::new(Still(32))).unwrap());
            let resources = Resources { latent: Some(plan.clone()), ..Resources::default() };
            let mut cache = build(&whole, &shape, &resources).unwrap();
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
            assert!((ratio - 1.0).abs() < 0.05, "{text}: {ratio}");
        }
        let spec = Latent {
            v: LatentSide { rank: Rank::Energy { energy: 0.9 }, ..LatentSide::default() },
            ..Latent::default()
        };
        assert!(footprint(&spec, &shape, 10).unwrap_err().to_string().contains("energy"));
    }
}
