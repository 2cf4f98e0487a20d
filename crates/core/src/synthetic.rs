//! Made-up states of a model's shape, for accounting and timing without weights.
//!
//! What a cache costs depends on its states only through the similarity of adjacent layers (which tokens are too
//! distinct to merge), so that is what is under control here; the numbers themselves are Gaussian noise.

use std::ops::Range;

use crate::settings::ModelShape;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::{KvCache, Result};

/// How alike the states of adjacent layers are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSimilarity {
    /// Mean over tokens of the cosine between the states of a layer and the next, -1..=1.
    pub mean: f32,
    /// Its standard deviation over tokens.
    pub spread: f32,
}

impl Default for LayerSimilarity {
    /// Near what MiniCache shows for the deep half of its models (Figures 1a and 2b): a mean cosine of 0.85, most
    /// tokens close to it and few far below.
    fn default() -> Self {
        Self { mean: 0.85, spread: 0.05 }
    }
}

/// Directions that states are made of. Combined at random they repeat rarely enough for any statistic over tokens.
const DIRECTIONS: usize = 251;
const KEYS: usize = 0;
const VALUES: usize = 1;

/// States of one sequence in every layer. The same seed gives the same states, however they are cut into steps.
#[derive(Debug, Clone)]
pub struct Synthetic {
    shape: ModelShape,
    seed: u64,
    /// Unit vectors of `kv_dim` numbers.
    directions: Vec<Vec<f32>>,
    /// Cosine with the layer before: by side, layer (the first has none) and token.
    cosines: [Vec<Vec<f32>>; 2],
}

impl Synthetic {
    /// States of `tokens` tokens. The most and the least similar token of each pair of layers come first, as those of
    /// a real text do (its first token is the outlier): a cache whose retention follows running extremes, with token
    /// granularity, then retains the same tokens whether it is filled in one step or in many.
    pub fn new(shape: &ModelShape, tokens: usize, similarity: LayerSimilarity, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
        let mut directions: Vec<Vec<f32>> =
            (0..DIRECTIONS).map(|_| (0..shape.kv_dim()).map(|_| normal()).collect()).collect();
        directions.iter_mut().for_each(|d| normalise(d));
        let cosines = [KEYS, VALUES].map(|side| {
            (0..shape.layers).map(|layer| cosines(tokens, similarity, seed, 2 * layer + side)).collect()
        });
        Self { shape: *shape, seed, directions, cosines }
    }

    /// Tokens that there are states for.
    pub fn tokens(&self) -> usize {
        self.cosines[KEYS].first().map_or(0, Vec::len)
    }

    /// Hands the states of the tokens `range` to `take`, layer by layer: the layer, its keys and its values, each
    /// `(tokens, kv_heads, head_dim)`.
    ///
    /// # Errors
    /// Those of `take`.
    ///
    /// # Panics
    /// A range beyond [`Synthetic::tokens`].
    pub fn states(
        &self,
        range: Range<usize>,
        mut take: impl FnMut(usize, &[f32], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let numbers = range.len() * self.shape.kv_dim();
        let mut directions = [vec![0.0; numbers], vec![0.0; numbers]];
        let mut states = [vec![0.0; numbers], vec![0.0; numbers]];
        for layer in 0..self.shape.layers {
            for side in [KEYS, VALUES] {
                self.side(side, layer, range.clone(), &mut directions[side], &mut states[side]);
            }
            take(layer, &states[KEYS], &states[VALUES])?;
        }
        Ok(())
    }

    /// Appends the tokens `range` to `cache` in steps of at most `step` tokens, without attention.
    ///
    /// # Errors
    /// Those of the cache.
    ///
    /// # Panics
    /// A range beyond [`Synthetic::tokens`]; a step of 0.
    pub fn fill(&self, cache: &mut dyn KvCache, range: Range<usize>, step: usize) -> Result<()> {
        for first in range.clone().step_by(step) {
            let tokens = first..(first + step).min(range.end);
            self.states(tokens, |layer, k, v| cache.append(layer, k, v))?;
            cache.finish_step()?;
        }
        Ok(())
    }

    /// Queries of `tokens` tokens, `(tokens, heads, head_dim)`: noise of unit variance.
    pub fn queries(&self, layer: usize, position: usize, tokens: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ 0x9e37_79b9_7f4a_7c15);
        rng.set_stream(layer as u64);
        rng.set_word_pos(position as u128 * 1024);
        let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
        (0..tokens * self.shape.heads * self.shape.head_dim).map(|_| normal()).collect()
    }

    /// Turns the unit directions of the layer before into those of `layer`, and writes its states.
    fn side(&self, side: usize, layer: usize, range: Range<usize>, directions: &mut [f32], out: &mut [f32]) {
        let width = self.shape.kv_dim();
        let cosines = &self.cosines[side][layer][range.clone()];
        let rows = directions.chunks_exact_mut(width).zip(out.chunks_exact_mut(width));
        for (((direction, out), &cosine), token) in rows.zip(cosines).zip(range) {
            let hash = mix(self.seed ^ mix(((2 * layer + side) as u64) << 40 | token as u64));
            if layer == 0 {
                direction.copy_from_slice(&self.directions[hash as usize % DIRECTIONS]);
            } else {
                self.turn(direction, cosine, hash as usize);
            }
            // Magnitudes within a factor of two; numbers of about unit variance.
            let magnitude =
                (width as f32).sqrt() * (0.5f32).mul_add((hash >> 40) as f32 / (1 << 24) as f32, 0.75);
            out.iter_mut().zip(&*direction).for_each(|(o, d)| *o = magnitude * d);
        }
    }

    /// Turns the unit vector `x` so that its cosine with what it was is `cosine`.
    fn turn(&self, x: &mut [f32], cosine: f32, pick: usize) {
        // One of the directions may be `x` itself, and in one dimension there is no other: then only the sign can turn.
        for attempt in 0..2 {
            let other = &self.directions[(pick + attempt) % DIRECTIONS];
            let along = dot(x, other);
            let apart = 1.0 - along * along;
            if apart > 0.01 {
                let sine = (1.0 - cosine * cosine).max(0.0).sqrt() / apart.sqrt();
                let kept = cosine - sine * along;
                x.iter_mut().zip(other).for_each(|(x, o)| *x = kept * *x + sine * o);
                // Rounding would add up over the layers of a deep model.
                return normalise(x);
            }
        }
        x.iter_mut().for_each(|x| *x *= cosine.signum());
    }
}

/// Cosines of `tokens` tokens, the least and the greatest first.
fn cosines(tokens: usize, similarity: LayerSimilarity, seed: u64, stream: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(1 + stream as u64);
    let mut cosines: Vec<f32> = (0..tokens)
        .map(|_| {
            let z: f32 = StandardNormal.sample(&mut rng);
            (similarity.mean + similarity.spread * z).clamp(-1.0, 1.0)
        })
        .collect();
    let least = (0..tokens).min_by(|&i, &j| cosines[i].total_cmp(&cosines[j]));
    least.into_iter().for_each(|i| cosines.swap(0, i));
    let most = (1..tokens).max_by(|&i, &j| cosines[i].total_cmp(&cosines[j]));
    most.into_iter().for_each(|i| cosines.swap(1, i));
    cosines
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a16.zip(b16) {
        sums.iter_mut().zip(a).zip(b).for_each(|((s, x), y)| *s += x * y);
    }
    tail + sums.iter().sum::<f32>()
}

fn normalise(x: &mut [f32]) {
    let factor = dot(x, x).sqrt().recip();
    x.iter_mut().for_each(|x| *x *= factor);
}

/// A hash of one number (the finaliser of SplitMix64, Steele et al. 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ModelShape =
        ModelShape { layers: 5, heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, ..ModelShape::PLAIN };

    fn all(states: &Synthetic, step: usize) -> Vec<[Vec<f32>; 2]> {
        let mut layers = vec![[Vec::new(), Vec::new()]; SHAPE.layers];
        for first in (0..states.tokens()).step_by(step) {
            let range = first..(first + step).min(states.tokens());
            let take = |layer: usize, k: &[f32], v: &[f32]| {
                layers[layer][0].extend_from_slice(k);
                layers[layer][1].extend_from_slice(v);
                Ok(())
            };
            states.states(range, take).expect("nothing fails");
        }
        layers
    }

    #[test]
    fn adjacent_layers_are_as_alike_as_asked() {
        for (mean, spread) in [(0.85, 0.05), (0.0, 0.1), (-0.5, 0.02)] {
            let similarity = LayerSimilarity { mean, spread };
            let layers = all(&Synthetic::new(&SHAPE, 2000, similarity, 7), 2000);
            for side in [KEYS, VALUES] {
                for pair in layers.windows(2) {
                    let rows = pair[0][side].chunks_exact(64).zip(pair[1][side].chunks_exact(64));
                    let cosines: Vec<f32> =
                        rows.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).collect();
                    let n = cosines.len() as f32;
                    let got = cosines.iter().sum::<f32>() / n;
                    let deviation = (cosines.iter().map(|c| (c - got).powi(2)).sum::<f32>() / n).sqrt();
                    assert!((got - mean).abs() < 0.01, "{got} for {mean}");
                    assert!((deviation - spread).abs() < 0.2 * spread, "{deviation} for {spread}");
                    assert!(cosines.iter().all(|&c| c >= cosines[0] - 1e-4 && c <= cosines[1] + 1e-4));
                }
            }
        }
    }

    #[test]
    fn states_depend_on_the_seed_and_not_on_the_steps() {
        let make = |seed| Synthetic::new(&SHAPE, 50, LayerSimilarity::default(), seed);
        let states = make(1);
        assert_eq!(all(&states, 50), all(&states, 7));
        assert_ne!(all(&states, 50), all(&make(2), 50));
        assert_eq!(states.queries(1, 3, 2).len(), 2 * 4 * 32);
        assert_ne!(states.queries(1, 3, 1), states.queries(2, 3, 1));
    }
}
