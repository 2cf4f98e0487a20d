//! Floats of eight bits, as the field's runtimes keep their caches (`kv_cache_dtype = fp8_e4m3`): each KV head's vector
//! of a token is divided by a scale of its own, so that its largest number becomes the format's largest, and rounded.
//!
//! x ~ scale * e4m3(x / scale), scale = max |x| / 448, kept as f16; the format is that of Micikevicius et al. 2022
//! (arXiv 2209.05433). Runtimes take one scale for a whole layer; one per token and head costs 2 bytes and saves
//! whoever comes after an outlier. <q, x> = scale <q, e>, and sum_i p_i x_i = sum_i (p_i scale_i) e_i.

use std::ops::Range;

use super::{Method, Stored};
use crate::Footprint;
use crate::archive::{Archive, damaged};
use crate::kernels::f8::LARGEST;
use crate::lane::Lane;
use crate::layered::Plan;
use crate::magnitudes::Magnitudes;
use crate::scratch::with_buffer;
use crate::settings::{Checked, ModelShape, StoreType};
use crate::store::{Scheme, Side, Store};
use crate::view::Segment;
use crate::{Resources, Result};

/// Floats of eight bits with a scale per token and KV head.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Fp8 {
    /// Storage type of the scales.
    pub dtype: StoreType,
}

impl Fp8 {
    pub(super) const ABOUT: &'static str = "floats of eight bits (e4m3) with a scale per token and KV head";
}

impl Method for Fp8 {
    fn validate(&self) -> Checked {
        Ok(())
    }

    fn stored(&self) -> Stored {
        Stored::exact(self.dtype)
    }

    fn dtype(&mut self) -> &mut StoreType {
        &mut self.dtype
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        let lane = |side| {
            let states = Store::new(shape.kv_heads, shape.head_dim, Scheme::F8, side);
            Box::new(Scaled { states, scales: Magnitudes::new(shape.kv_heads, self.dtype) })
        };
        Ok(Plan::unmerged(lane(Side::Keys), lane(Side::Values)))
    }

    fn nominal(&self, shape: &ModelShape, _: usize) -> Option<crate::Nominal> {
        let scale = 8 * self.dtype.bytes();
        let bits = 8.0 + scale as f64 / shape.head_dim as f64;
        let lines = vec![
            format!("8 bits, and {scale} for the scale of {} numbers: {bits:.3} bits a number", shape.head_dim),
            format!("16 / {bits:.3} = {:.2}x", 16.0 / bits),
        ];
        Some(crate::Nominal { ratio: 16.0 / bits, lines })
    }
}

/// One side of one layer.
#[derive(Clone)]
struct Scaled {
    states: Store,
    /// By KV head.
    scales: Magnitudes,
}

impl Lane for Scaled {
    fn push(&mut self, rows: &[f32]) {
        let (heads, dim) = (self.states.heads(), self.states.dim());
        with_buffer(heads * (dim + 1), |buffer| {
            let (row, scales) = buffer.split_at_mut(heads * dim);
            for token in rows.chunks_exact(heads * dim) {
                for (scale, x) in scales.iter_mut().zip(token.chunks_exact(dim)) {
                    *scale = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / LARGEST;
                }
                self.scales.push(scales);
                let position = self.states.len();
                let vectors = row.chunks_exact_mut(dim).zip(token.chunks_exact(dim));
                for (head, (to, from)) in vectors.enumerate() {
                    // By the scale as it is stored. Where that is zero, nothing of the vector is left to store.
                    let scale = self.scales.of_head(head, position);
                    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
                }
                self.states.push(row);
            }
        });
    }
    fn segment(&self, positions: Range<usize>) -> Segment<'_> {
        let first = positions.start;
        Segment::new(positions, &self.states, first).times(&self.scales)
    }
    fn drop_before(&mut self, position: usize) {
        self.states.drop_before(position);
        self.scales.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        self.states.can_truncate(len)
    }
    fn truncate(&mut self, len: usize) {
        self.states.truncate(len);
        self.scales.truncate(len);
    }
    fn start(&self) -> usize {
        self.states.start()
    }
    fn footprint(&self) -> Footprint {
        let states = self.states.bytes().total();
        Footprint { states, scales: self.scales.bytes(), ..Footprint::default() }
    }
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        self.states.archive(archive)?;
        self.scales.archive(archive)?;
        damaged(self.scales.len() == self.states.len())
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_bits_of_mantissa_beside_the_largest_of_their_head() {
        let shape = ModelShape { layers: 1, heads: 2, kv_heads: 2, head_dim: 16, window: None, scale: 1.0, ..ModelShape::PLAIN };
        for dtype in [StoreType::F16, StoreType::F32] {
            let mut cache = Fp8 { dtype }.build(&shape, &Resources::default()).unwrap();
            let states: Vec<f32> = (0..32 * 40).map(|i| (i as f32 * 0.37).sin() * 10f32.powi(i / 320)).collect();
            cache.append(0, &states, &states).unwrap();
            cache.finish_step().unwrap();
            let restored = cache.restored(0).unwrap();
            let vectors = states.chunks_exact(16).zip(restored.keys.chunks_exact(16));
            for (want, got) in vectors {
                let top = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (want, got) in want.iter().zip(got) {
                    // Half a step of the mantissa, or of the numbers near zero.
                    let step = (want.abs() / 16.0).max(top / LARGEST / 1024.0);
                    assert!((want - got).abs() <= 1.001 * step, "{want} {got} beside {top}");
                }
            }
            assert_eq!(restored.keys, restored.values);
        }
    }
}
