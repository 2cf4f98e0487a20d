//! How long each step of a method takes: the rows of MiniCache's overhead table, for any cache on states of a model's
//! shape.
//!
//! The layers of a model are alike, and so are its pairs (see [`crate::footprint`]): one unmerged layer and one pair
//! are timed, and taken times their number. Every time is the median of several runs.

use std::time::{Duration, Instant};

use crate::account::check_context;
use crate::merge::{Slerp, distance, norms};
use crate::pair::{PairSide, Proposal, SideSettings};
use crate::retain::Retainer;
use crate::settings::{ModelShape, Pairs, StartLayer};
use crate::{CacheSpec, Error, KvCache, LayerSimilarity, Resources, Result, Synthetic, build};

/// Runs of a step: at least `RUNS.0`, then up to `RUNS.1` while they take less than `ENOUGH` together.
const RUNS: (usize, usize) = (3, 25);
const ENOUGH: Duration = Duration::from_millis(200);
const SEED: u64 = 0;

/// The time of one step for a whole model and one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// What is done:
    ///
    /// * `attention`: causal attention of the prompt to itself, all layers; with `h2o` and `sinks`, which rank and drop
    ///   tokens as they attend, that too;
    /// * `storage`: everything else that the prompt costs the cache, all layers: merging, quantising, packing;
    /// * `magnitude`, `distance`, `direction`, `retention`, `packing`: what `storage` does for all merged pairs, each
    ///   step by itself (the cache takes the first three in fewer passes);
    /// * `prompt`: `attention` and `storage`;
    /// * `token`: one new token after the prompt, attention and storage of all layers.
    pub step: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// Times the steps of `spec` on a prompt of `context` tokens in a model of `shape`.
///
/// # Errors
/// A specification that does not fit the shape, a context of 0, a method that needs what `resources` lacks; latents
/// and `xkv`, whose layers are not alike.
pub fn time_steps(
    spec: &CacheSpec,
    shape: &ModelShape,
    resources: &Resources,
    context: usize,
    similarity: LayerSimilarity,
) -> Result<Vec<StepTime>> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    // A layer and a pair, each with its states as f32 beside the cache: those and the queries take the most.
    let queries = 1 + shape.group().div_ceil(2);
    check_context(shape, context, 3 * 2 * queries)?;
    if matches!(spec, CacheSpec::Latent(_) | CacheSpec::Xkv(_)) {
        let message = format!(
            "the steps of `{}` caches are not timed apart: their groups of layers differ",
            spec.name()
        );
        return Err(Error::Missing(message));
    }
    let pairing = spec.pairing();
    if matches!(pairing.as_ref().map(|p| &p.pairs), Some(Pairs::Chosen(_))) {
        let message =
            "the steps of chosen pairs are not timed apart: keys and values are merged in different layers";
        return Err(Error::Missing(message.to_string()));
    }
    let pairs = spec.most_pairs(shape.layers);
    let own = Part::new(spec, shape, resources, context, similarity, 1)?;
    let pair = Part::new(spec, shape, resources, context, similarity, 2)?;
    // By the number of layers of the model: pairs, and layers that stand alone.
    let whole = |own: f64, pair: f64| own * (shape.layers - 2 * pairs) as f64 + pair * pairs as f64;
    let drops = spec.drops_tokens();
    let stored = |part: &Part<'_>| if drops { Ok(0.0) } else { part.storage() };
    let own_storage = stored(&own)?;
    let storage = whole(own_storage, if pairs > 0 { stored(&pair)? } else { 0.0 });
    // Attention within a prompt reads exact states, whatever its layer is stored as.
    let attention = shape.layers as f64 * (own.prompt()? - own_storage).max(0.0);
    let token = whole(own.token()?, if pairs > 0 { pair.token()? } else { 0.0 });
    let mut out = vec![("attention", attention)];
    if !drops {
        out.push(("storage", storage));
    }
    if pairs > 0 {
        let times = merge_times(spec, &pair, resources)?;
        out.extend(times.into_iter().map(|(step, seconds)| (step, seconds * pairs as f64)));
    }
    out.extend([("prompt", attention + storage), ("token", token)]);
    Ok(out.into_iter().map(|(step, seconds)| StepTime { step, seconds }).collect())
}

/// A layer or a pair with its states.
struct Part<'a> {
    spec: CacheSpec,
    shape: ModelShape,
    resources: &'a Resources,
    /// Queries, keys and values by layer; the prompt's, then one more token's.
    prompt: Vec<[Vec<f32>; 3]>,
    next: Vec<[Vec<f32>; 3]>,
}

impl<'a> Part<'a> {
    fn new(
        spec: &CacheSpec,
        shape: &ModelShape,
        resources: &'a Resources,
        context: usize,
        similarity: LayerSimilarity,
        layers: usize,
    ) -> Result<Self> {
        // Of a single layer nothing is merged, and the start layer must be one of the model's.
        let spec = spec.clone().with_start_layer(StartLayer::Layer(0));
        let shape = ModelShape { layers, ..*shape };
        let states = Synthetic::new(&shape, context + 1, similarity, SEED);
        let of = |from: usize, to: usize| -> Result<Vec<[Vec<f32>; 3]>> {
            let mut out = Vec::new();
            states.states(from..to, |layer, k, v| {
                out.push([states.queries(layer, from, to - from), k.to_vec(), v.to_vec()]);
                Ok(())
            })?;
            Ok(out)
        };
        let (prompt, next) = (of(0, context)?, of(context, context + 1)?);
        Ok(Self { spec, shape, resources, prompt, next })
    }

    fn cache(&self) -> Result<Box<dyn KvCache>> {
        build(&self.spec, &self.shape, self.resources)
    }

    /// The prompt, attention and all.
    fn prompt(&self) -> Result<f64> {
        let mut out = vec![0.0; self.prompt[0][0].len()];
        median(|| {
            let mut cache = self.cache()?;
            let start = Instant::now();
            attend(&mut *cache, &self.prompt, &mut out)?;
            Ok(start.elapsed())
        })
    }

    /// The prompt's states alone.
    fn storage(&self) -> Result<f64> {
        median(|| {
            let mut cache = self.cache()?;
            let start = Instant::now();
            self.store(&mut *cache)?;
            Ok(start.elapsed())
        })
    }

    fn store(&self, cache: &mut dyn KvCache) -> Result<()> {
        for (layer, [_, k, v]) in self.prompt.iter().enumerate() {
            cache.append(layer, k, v)?;
        }
        cache.finish_step()
    }

    /// One token after the prompt.
    fn token(&self) -> Result<f64> {
        let mut cache = self.cache()?;
        self.store(&mut *cache)?;
        let mut out = vec![0.0; self.next[0][0].len()];
        // Working memory is warm from the second token on.
        attend(&mut *cache, &self.next, &mut out)?;
        median(|| {
            let start = Instant::now();
            attend(&mut *cache, &self.next, &mut out)?;
            Ok(start.elapsed())
        })
    }
}

fn attend(cache: &mut dyn KvCache, states: &[[Vec<f32>; 3]], out: &mut [f32]) -> Result<()> {
    // Inside the pool, as a decoder calls it: work is handed on without waking a sleeping pool each time.
    rayon::scope(|_| {
        for (layer, [q, k, v]) in states.iter().enumerate() {
            cache.attend_into(layer, q, k, v, out)?;
        }
        cache.finish_step()
    })
}

/// The steps of merging a pair, keys and values together.
fn merge_times(spec: &CacheSpec, pair: &Part<'_>, resources: &Resources) -> Result<Vec<(&'static str, f64)>> {
    let plan = pair.spec.method().plan(&pair.shape, resources)?;
    let of =
        |settings: Option<SideSettings>, pairs: &[(usize, usize)]| settings.filter(|_| !pairs.is_empty());
    let sides = [of(plan.keys, &plan.key_pairs), of(plan.values, &plan.value_pairs)];
    let mut totals =
        [("magnitude", 0.0), ("distance", 0.0), ("direction", 0.0), ("retention", 0.0), ("packing", 0.0)];
    for (side, settings) in sides.into_iter().enumerate().filter_map(|(i, s)| Some((i + 1, s?))) {
        let (a, b) = (&pair.prompt[0][side], &pair.prompt[1][side]);
        let lanes = if settings.per_head { pair.shape.kv_heads } else { 1 };
        let width = pair.shape.kv_dim() / lanes;
        let rows = || a.chunks_exact(width).zip(b.chunks_exact(width));
        let count = a.len() / width;
        let mut lengths = vec![(0.0, 0.0); count];
        let mut angles = vec![0.0; count];
        let mut shared = vec![0.0; a.len()];
        // A mean has neither magnitudes nor directions, and another merge no SLERP: then these are not its steps.
        let slerp = match spec {
            CacheSpec::MiniCache(settings) => Some(Slerp { t: settings.t }),
            _ => None,
        };
        let magnitude = timed(|| {
            rows().zip(&mut lengths).for_each(|((a, b), l)| *l = norms(a, b));
        })?;
        let distance = timed(|| {
            let each = rows().zip(&lengths).zip(&mut angles);
            each.for_each(|(((a, b), &(na, nb)), angle)| *angle = distance(a, b, na, nb));
        })?;
        let direction = timed(|| {
            let each = rows().zip(lengths.iter().zip(&angles)).zip(shared.chunks_exact_mut(width));
            let slerp = slerp.as_ref();
            each.for_each(|(((a, b), (&(na, nb), &angle)), e)| {
                slerp.into_iter().for_each(|s| s.direction(a, b, (na, nb), angle, e));
            });
        })?;
        let distances: Vec<f32> = angles.iter().map(|&x| (x / std::f64::consts::PI) as f32).collect();
        let mut marks = vec![false; count];
        let retention = match &settings.retention {
            None => 0.0,
            Some(rule) => timed(|| {
                let tokens = count / lanes;
                let per_lane = distances.chunks_exact(tokens).zip(marks.chunks_exact_mut(tokens));
                per_lane.for_each(|(d, m)| Retainer::new(rule).step(d, m));
            })?,
        };
        let mut proposal = Proposal::default();
        let packing = median(|| {
            let mut store = PairSide::new(settings.clone(), &pair.shape);
            let (mut a, mut b) = (a.clone(), b.clone());
            store.slide(&mut a, &mut b);
            store.propose(&mut a, &mut b, &mut proposal);
            let start = Instant::now();
            store.commit(&mut proposal, &a, &b);
            Ok(start.elapsed())
        })?;
        let times = [magnitude, distance, direction, retention, packing];
        for ((step, total), time) in totals.iter_mut().zip(times) {
            if slerp.is_some() || *step == "packing" {
                *total += time;
            }
        }
    }
    Ok(totals.into_iter().filter(|(_, time)| *time > 0.0).collect())
}

fn timed(mut work: impl FnMut()) -> Result<f64> {
    median(|| {
        let start = Instant::now();
        work();
        Ok(start.elapsed())
    })
}

/// The median of what `run` gives, in seconds.
fn median(mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < RUNS.0 || (times.len() < RUNS.1 && start.elapsed() < ENOUGH) {
        times.push(run()?);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2].as_secs_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_steps() {
        let shape =
            ModelShape { layers: 8, heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, ..ModelShape::PLAIN };
        let steps = |text: &str, context| {
            let spec = CacheSpec::parse(text).unwrap();
            time_steps(&spec, &shape, &Resources::default(), context, LayerSimilarity::default()).unwrap()
        };
        let names = |text: &str| steps(text, 64).iter().map(|s| s.step).collect::<Vec<_>>();
        assert_eq!(names("full"), ["attention", "storage", "prompt", "token"]);
        assert_eq!(names("h2o"), ["attention", "prompt", "token"]);
        assert_eq!(names("mean"), ["attention", "storage", "packing", "prompt", "token"]);
        for text in ["minicache", "{ method = \"minicache\", granularity = \"head\", quant = { bits = 4 } }"]
        {
            let merging = ["magnitude", "distance", "direction", "retention", "packing"];
            let all: Vec<_> =
                ["attention", "storage"].into_iter().chain(merging).chain(["prompt", "token"]).collect();
            assert_eq!(names(text), all, "{text}");
        }
        // A long prompt takes longer than a short one, by any clock.
        let time = |context| steps("minicache", context).iter().find(|s| s.step == "prompt").unwrap().seconds;
        assert!(time(1024) > time(32));
    }

    #[test]
    fn what_cannot_be_timed_is_said() {
        let shape =
            ModelShape { layers: 2, heads: 1, kv_heads: 1, head_dim: 32, scale: 0.2, ..ModelShape::PLAIN };
        let error = |text: &str, context| {
            let spec = CacheSpec::parse(text).unwrap();
            let none = Resources::default();
            time_steps(&spec, &shape, &none, context, LayerSimilarity::default()).unwrap_err().to_string()
        };
        assert!(error("full", 0).contains("context"));
        assert!(error("latent", 10).contains("latent"));
        assert!(error("xkv", 10).contains("xkv"));
        assert!(error("{ method = \"mean\", start_layer = 7 }", 10).contains("cache.start_layer"));
    }
}
