//! What a latent cache of a model is made of: transforms, and the bits of their components.

use std::ops::Range;
use std::sync::Arc;

use crate::methods::Latent;
use crate::settings::{Axis, Group, LatentSide, ModelShape, Rank};

use super::basis::{Basis, Grouping, KeyBasis, Phases, Span, ValueBasis};
use super::coder::{Allocation, Coding, allocate, trellis_errors, uniform_errors};
use super::transform::{KeyTransform, ValueTransform};
use crate::store::Scheme;
use crate::{Error, Precision, Result, Rotary};

/// Components that get the same bits: the width of the store's lanes.
const UNIT: usize = 16;

/// Deviation that a component is taken to have at least, as a share of the largest one's.
const LEAST_DEVIATION: f32 = 1e-3;

/// The transforms and codings of a latent cache on a model: made once, shared by all its caches.
pub struct LatentPlan {
    pub(super) shape: ModelShape,
    pub(super) spec: Latent,
    pub(super) keys: Vec<Plan<KeyTransform>>,
    pub(super) values: Vec<Plan<ValueTransform>>,
    pub(super) phases: Arc<Phases>,
}

impl LatentPlan {
    /// Takes from `basis` what `spec` keeps.
    ///
    /// # Errors
    /// Group sizes that were not calibrated; a rotary embedding over part of the head only.
    pub fn new(spec: &Latent, shape: &ModelShape, basis: &Basis, rotary: Arc<dyn Rotary>) -> Result<Self> {
        let missing = |what: &str| Error::Missing(format!("method = \"latent\" needs {what}"));
        if rotary.rotary_dim() != shape.head_dim {
            return Err(missing("a rotary embedding over the whole head"));
        }
        let phases = Phases::new(rotary, shape.head_dim, spec.sinks, phase_scheme(spec));
        let phases = Arc::new(phases);
        let none = |side: &str, g: Grouping| {
            let Grouping { layers, heads } = g;
            let plural = if heads == 1 { "" } else { "s" };
            missing(&format!(
                "a basis for {side} of {layers} layers and {heads} KV head{plural}; calibrate one"
            ))
        };
        let (key, value) = (grouping(&spec.k, shape)?, grouping(&spec.v, shape)?);
        let keys = basis.key_spans(key).ok_or_else(|| none("keys", key))?;
        let values = basis.value_spans(value).ok_or_else(|| none("values", value))?;
        Ok(Self {
            shape: *shape,
            spec: spec.clone(),
            keys: key_plans(keys, spec, shape, &phases),
            values: value_plans(values, spec, shape),
            phases,
        })
    }

    /// Bytes held for the model, whatever the number of sequences: the kept bases and the table of phases.
    pub fn bytes(&self) -> usize {
        let keys = self.keys.iter().flat_map(|p| &p.sets).map(|s| s.transform.bytes()).sum::<usize>();
        let values = self.values.iter().flat_map(|p| &p.sets).map(|s| s.transform.bytes()).sum::<usize>();
        keys + values + self.phases.read(|t| t.bytes().total())
    }
}

impl LatentPlan {
    /// A check sum of the transforms: caches of plans with another one have other latents.
    pub fn digest(&self) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        let mut add = |numbers: Vec<f32>| numbers.iter().for_each(|x| sum.update(&x.to_le_bytes()));
        self.keys.iter().flat_map(|p| &p.sets).for_each(|s| s.transform.numbers().for_each(&mut add));
        self.values.iter().flat_map(|p| &p.sets).for_each(|s| s.transform.numbers().for_each(&mut add));
        sum.finalize()
    }
}

/// One group of layers.
pub(super) struct Plan<T> {
    pub(super) first: usize,
    pub(super) layers: usize,
    /// By KV head.
    pub(super) sets: Vec<Set<T>>,
}

/// The KV heads of a group that share latents.
pub(super) struct Set<T> {
    pub(super) heads: Range<usize>,
    pub(super) transform: T,
    pub(super) coding: Coding,
}

impl<T> Plan<T> {
    /// Index of the set that a KV head belongs to.
    pub(super) fn set_of(&self, head: usize) -> usize {
        head / self.sets[0].heads.len()
    }
}

/// Groups the sets of consecutive spans.
fn plans<T>(sets: impl Iterator<Item = (Span, Set<T>)>) -> Vec<Plan<T>> {
    let mut plans: Vec<Plan<T>> = Vec::new();
    for (span, set) in sets {
        match plans.last_mut() {
            Some(plan) if plan.first == span.first => plan.sets.push(set),
            _ => plans.push(Plan { first: span.first, layers: span.layers, sets: vec![set] }),
        }
    }
    plans
}

pub(super) fn group_of<T>(plans: &[Plan<T>], layer: usize) -> usize {
    plans.partition_point(|p| p.first + p.layers <= layer)
}

/// How the table of phases is kept: as exact states are, or, where queries are rounded to 8 bits, in as many.
pub(super) fn phase_scheme(spec: &Latent) -> (Scheme, Precision) {
    let precision = Precision::of(spec.activation_bits, spec.dtype);
    let scheme = match precision {
        Precision::Coarse => Scheme::Quant { bits: 8, group: 64, axis: Axis::Token, residual: 0 },
        _ => crate::methods::exact(spec.dtype),
    };
    (scheme, precision)
}

/// The grouping that a side's settings ask for.
pub(super) fn grouping(side: &LatentSide, shape: &ModelShape) -> Result<Grouping> {
    match side.group {
        Group::Layers(layers) => Ok(Grouping { layers, heads: side.heads.of(shape.kv_heads) }),
        Group::Auto => {
            Err(Error::Missing("group = \"auto\" has to be resolved on calibration text first".to_string()))
        }
    }
}

/// The coding of each span of a side from the spans' `variances` (descending). `copies` numbers of the latent belong to
/// each variance. A rate counts the bits of all spans together.
pub(super) fn codings(
    side: &LatentSide,
    spec: &Latent,
    variances: &[Vec<f32>],
    copies: usize,
) -> Vec<Coding> {
    let Some(rate) = side.rate else {
        let scheme = match side.bits {
            16 => crate::methods::exact(spec.dtype),
            bits => {
                let residual = if side.axis == Axis::Channel { side.quant_group } else { 0 };
                Scheme::Quant { bits, group: side.quant_group, axis: side.axis, residual }
            }
        };
        return variances.iter().map(|v| Coding::Plain { scheme, rank: rank_of(side, v) * copies }).collect();
    };
    let each: Vec<Vec<f32>> = variances
        .iter()
        .map(|group| group.iter().flat_map(|v| vec![v / copies as f32; copies]).collect())
        .collect();
    let total: usize = each.iter().map(Vec::len).sum();
    let unit = each.iter().map(Vec::len).min().unwrap_or(1).min(UNIT);
    let errors = if side.trellis { trellis_errors() } else { uniform_errors() };
    let allocations = allocate(&each, (rate * total as f64).round() as usize, unit, &errors);
    let coded = each.iter().zip(allocations).map(|(each, Allocation { sections })| {
        // Tiny budgets may buy nothing; one component at the least keeps the store well-formed.
        let sections = if sections.is_empty() { vec![(2, copies)] } else { sections };
        let rank: usize = sections.iter().map(|s| s.1).sum();
        // A component that calibration saw nothing of must not make a token that has it look like an outlier of all.
        let least = LEAST_DEVIATION * each[0].sqrt().max(f32::MIN_POSITIVE);
        let deviations = each[..rank].iter().map(|v| v.sqrt().max(least)).collect();
        Coding::Allocated { allocation: Allocation { sections }, deviations, trellis: side.trellis }
    });
    coded.collect()
}

/// Components kept of `variances` (descending).
fn rank_of(side: &LatentSide, variances: &[f32]) -> usize {
    let energy = match side.rank {
        Rank::Energy { energy } => energy,
        rank => return rank.of(variances.len()).unwrap_or(1),
    };
    let total: f64 = variances.iter().map(|&v| f64::from(v)).sum();
    let mut sum = 0.0;
    let needed = variances.iter().take_while(|&&v| {
        let more = sum < energy * total;
        sum += f64::from(v);
        more
    });
    needed.count().clamp(1, variances.len())
}

fn value_plans(bases: &[ValueBasis], spec: &Latent, shape: &ModelShape) -> Vec<Plan<ValueTransform>> {
    let variances: Vec<Vec<f32>> = bases.iter().map(|b| b.variances.clone()).collect();
    let sets = bases.iter().zip(codings(&spec.v, spec, &variances, 1)).map(|(basis, coding)| {
        let transform = ValueTransform::new(basis, &coding, shape.head_dim);
        (basis.span, Set { heads: basis.span.head_range(), transform, coding })
    });
    plans(sets)
}

fn key_plans(
    bases: &[KeyBasis],
    spec: &Latent,
    shape: &ModelShape,
    phases: &Arc<Phases>,
) -> Vec<Plan<KeyTransform>> {
    // Components of all frequencies together, by variance.
    let order = |basis: &KeyBasis| {
        let mut order: Vec<usize> = (0..basis.variances.len()).collect();
        order.sort_by(|&a, &b| basis.variances[b].total_cmp(&basis.variances[a]).then(a.cmp(&b)));
        order
    };
    let orders: Vec<Vec<usize>> = bases.iter().map(order).collect();
    let variances: Vec<Vec<f32>> =
        bases.iter().zip(&orders).map(|(b, o)| o.iter().map(|&i| b.variances[i]).collect()).collect();
    let codings = codings(&spec.k, spec, &variances, 2);
    let sets = bases.iter().zip(&orders).zip(codings).map(|((basis, order), coding)| {
        let m = basis.span.members();
        let kept: Vec<(usize, usize)> =
            order[..coding.rank().div_ceil(2)].iter().map(|&i| (i / m, i % m)).collect();
        let transform = KeyTransform::new(basis, &kept, &coding, shape.head_dim, phases.clone());
        (basis.span, Set { heads: basis.span.head_range(), transform, coding })
    });
    plans(sets)
}
