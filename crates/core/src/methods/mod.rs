//! The methods: one file each, with its formula and its source. A method says how each side of each layer is stored;
//! this list says which file serves which name.

mod full;
mod h2o;
mod kivi;
mod latent;
mod max_norm;
mod mean;
mod minicache;
mod rtn;
mod sinks;
mod smoothquant;

use std::sync::Arc;

use half::f16;
use minicache_config::{Axis, CacheSpec, KeySpace, Method, ModelShape, Pairs, Retention, StoreType};

use crate::cache::KvCache;
use crate::evicting::{Evict, Evicting};
use crate::layered::{Layered, Plan};
use crate::merge::Merge;
use crate::pair::SideSettings;
use crate::plain::Plain;
use crate::store::{Scheme, Side, Store};
use crate::{Error, Precision, Resources, Result};

/// Builds an empty cache.
///
/// # Errors
/// A specification that does not fit the shape; a resource that the method needs and `resources` lacks.
pub fn build(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    Ok(match spec.method {
        Method::H2o => evicting(spec, shape, h2o::policy(spec)),
        Method::Sinks => evicting(spec, shape, sinks::policy(spec)),
        Method::Latent => Box::new(latent::cache(resources)?),
        _ => Box::new(layered(spec, shape, resources)?),
    })
}

/// A cache that drops what `evict` says, with its states in the type that `spec` asks for.
fn evicting(spec: &CacheSpec, shape: &ModelShape, evict: impl Evict + Clone + 'static) -> Box<dyn KvCache> {
    match spec.dtype {
        StoreType::F16 => Box::new(Evicting::<_, f16>::new(shape, evict)),
        StoreType::F32 => Box::new(Evicting::<_, f32>::new(shape, evict)),
    }
}

/// The methods that keep every token.
pub(crate) fn layered(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Layered> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    let plan = match spec.method {
        Method::Full => full::plan(spec, shape),
        Method::Mean => mean::plan(spec, shape, resources)?,
        Method::MaxNorm => max_norm::plan(spec, shape, resources)?,
        Method::Minicache => minicache::plan(spec, shape, resources)?,
        Method::Rtn => rtn::plan(spec, shape),
        Method::Kivi => kivi::plan(spec, shape),
        Method::Smoothquant => smoothquant::plan(spec, shape),
        other => {
            return Err(Error::Missing(format!(
                "the method `{}` does not work on a pair of layers",
                other.name()
            )));
        }
    };
    Ok(Layered::new(shape, &plan))
}

/// How a merging method merges and stores keys and values, each where it merges them.
pub(crate) fn merged_sides(
    spec: &CacheSpec,
    shape: &ModelShape,
    resources: &Resources,
) -> Result<[Option<SideSettings>; 2]> {
    let plan = match spec.method {
        Method::Mean => mean::plan(spec, shape, resources)?,
        Method::MaxNorm => max_norm::plan(spec, shape, resources)?,
        Method::Minicache => minicache::plan(spec, shape, resources)?,
        _ => return Ok([None, None]),
    };
    let of =
        |settings: Option<SideSettings>, pairs: &[(usize, usize)]| settings.filter(|_| !pairs.is_empty());
    Ok([of(plan.keys, &plan.key_pairs), of(plan.values, &plan.value_pairs)])
}

/// A line on each method for `minicache methods`.
pub fn describe(method: Method) -> &'static str {
    match method {
        Method::Full => full::ABOUT,
        Method::Mean => mean::ABOUT,
        Method::MaxNorm => max_norm::ABOUT,
        Method::Minicache => minicache::ABOUT,
        Method::Rtn => rtn::ABOUT,
        Method::Kivi => kivi::ABOUT,
        Method::Smoothquant => smoothquant::ABOUT,
        Method::H2o => h2o::ABOUT,
        Method::Sinks => sinks::ABOUT,
        Method::Latent => latent::ABOUT,
    }
}

/// The storage of states that are not quantised.
pub(crate) fn exact(dtype: StoreType) -> Scheme {
    match dtype {
        StoreType::F16 => Scheme::F16,
        StoreType::F32 => Scheme::F32,
    }
}

/// The storage of keys and of values: quantised along the given axes, or exact.
fn schemes(spec: &CacheSpec, keys: Axis, values: Axis) -> [Scheme; 2] {
    let exact = exact(spec.dtype);
    let Some(q) = spec.quantisation() else { return [exact; 2] };
    [q.keys.unwrap_or(keys), q.values.unwrap_or(values)].map(|axis| Scheme::Quant {
        bits: q.bits,
        group: q.group,
        axis,
        residual: q.residual,
    })
}

/// An empty store for one side of one layer.
fn store(spec: &CacheSpec, shape: &ModelShape, scheme: Scheme, side: Side) -> Store {
    Store::new(shape.kv_heads, shape.head_dim, scheme, side)
        .with_precision(Precision::of(spec, spec.dtype))
        .with_waiting(spec.dtype)
}

/// A plan in which every layer stores its own states.
fn unmerged(spec: &CacheSpec, shape: &ModelShape, [keys, values]: [Scheme; 2]) -> Plan {
    let own = |scheme, side| Plain::boxed(store(spec, shape, scheme, side));
    Plan::unmerged(own(keys, Side::Keys), own(values, Side::Values))
}

/// A plan in which pairs of layers share vectors merged by `merge`, stored by KIVI's axes where quantised.
fn merged(
    spec: &CacheSpec,
    shape: &ModelShape,
    resources: &Resources,
    merge: Arc<dyn Merge>,
    retention: Option<Retention>,
) -> Result<Plan> {
    if spec.pairs == Pairs::Auto {
        let message = "pairs = \"auto\" has to be resolved on calibration text first";
        return Err(Error::Missing(message.to_string()));
    }
    let schemes = schemes(spec, Axis::Channel, Axis::Token);
    let retained = match spec.quantisation() {
        Some(q) if q.retained => {
            Scheme::Quant { bits: q.bits, group: q.group, axis: Axis::Token, residual: 0 }
        }
        _ => exact(spec.dtype),
    };
    let rotary = match (spec.key_space, &resources.rotary) {
        (KeySpace::Cached, _) => None,
        (KeySpace::PreRope, Some(rotary)) => Some(rotary.clone()),
        (KeySpace::PreRope, None) => {
            let message =
                "key_space = \"pre_rope\" needs the model's rotary embedding, and this cache has no model";
            return Err(Error::Missing(message.to_string()));
        }
    };
    let settings = |side, shared, rotary| SideSettings {
        side,
        merge: merge.clone(),
        residual: spec.residual,
        sinks: spec.first_exact(),
        exact: spec.dtype,
        shared,
        retained,
        magnitudes: spec.magnitudes,
        precision: Precision::of(spec, spec.magnitudes),
        retention: retention.clone(),
        per_head: spec.granularity == minicache_config::Granularity::Head,
        rotary,
    };
    let [key_pairs, value_pairs] = spec.merged_pairs(shape.layers);
    Ok(Plan {
        keys: Some(settings(Side::Keys, schemes[0], rotary)),
        values: Some(settings(Side::Values, schemes[1], None)),
        key_pairs,
        value_pairs,
        joint: spec.retention.joint,
        ..unmerged(spec, shape, schemes)
    })
}
