//! Smoothed quantisation, the SmoothQuant row of MiniCache's Table 1 (Xiao et al. 2023, arXiv 2211.10438, applied to
//! the KV cache): each channel is divided by s_c before per-token quantisation and the query (for keys) or the output
//! (for values) is multiplied by it.
//!
//! SmoothQuant balances activations against the weights that follow; a cache knows no weights, so this variant
//! divides by s_c = (max_i |x_ic|)^alpha over the tokens of the first step (the prompt), normalised to a geometric
//! mean of 1 over the channels of a head.

use std::ops::Range;

use super::quantised::{quant_method, quant_settings};
use super::{Method, Stored};
use crate::archive::{Archive, damaged};
use crate::lane::Lane;
use crate::layered::Plan;
use crate::settings::bounds::check_unit;
use crate::settings::{Axis, Checked, ModelShape, Quant};
use crate::store::{Side, Store};
use crate::view::Segment;
use crate::{Footprint, Resources, Result};

quant_settings! {
    /// Per-token quantisation after per-channel smoothing.
    SmoothQuant {
        /// Migration strength, 0..=1.
        alpha: f64 = 0.5,
    }
}

impl SmoothQuant {
    pub(super) const ABOUT: &'static str =
        "per-token quantisation of states smoothed per channel (SmoothQuant on the cache)";

    fn own() -> Quant {
        Quant { bits: 8, residual: 0, ..Quant::default() }
    }
}

impl Method for SmoothQuant {
    quant_method!(Axis::Token, Axis::Token);

    fn validate(&self) -> Checked {
        check_unit("alpha", self.alpha)?;
        self.check()
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        let stored = self.stored();
        let lane = |scheme, side| {
            let store = stored.store(shape, scheme, side);
            let (alpha, head_dim) = (self.alpha as f32, shape.head_dim);
            Box::new(Smoothed { alpha, head_dim, factors: Vec::new(), first: 0, store })
        };
        let [keys, values] = stored.schemes();
        Ok(Plan::unmerged(lane(keys, Side::Keys), lane(values, Side::Values)))
    }
}

#[derive(Clone)]
struct Smoothed {
    alpha: f32,
    head_dim: usize,
    /// `(kv_heads, head_dim)`, set by the first step.
    factors: Vec<f32>,
    /// Tokens of that step.
    first: usize,
    store: Store,
}

/// s_c for each channel of `rows (tokens, channels)`.
fn factors(rows: &[f32], channels: usize, head_dim: usize, alpha: f32) -> Vec<f32> {
    let mut top = vec![0.0f32; channels];
    for row in rows.chunks_exact(channels) {
        top.iter_mut().zip(row).for_each(|(t, x)| *t = t.max(x.abs()));
    }
    for head in top.chunks_exact_mut(head_dim) {
        head.iter_mut().for_each(|t| *t = t.max(1e-5).powf(alpha));
        let mean = head.iter().map(|t| t.ln()).sum::<f32>() / head_dim as f32;
        head.iter_mut().for_each(|t| *t /= mean.exp());
    }
    top
}

impl Lane for Smoothed {
    fn push(&mut self, rows: &[f32]) {
        if self.factors.is_empty() {
            let channels = self.store.heads() * self.head_dim;
            self.factors = factors(rows, channels, self.head_dim, self.alpha);
            self.first = rows.len() / channels;
        }
        let divided: Vec<f32> = rows.iter().zip(self.factors.iter().cycle()).map(|(x, s)| x / s).collect();
        self.store.push(&divided);
    }
    fn len(&self) -> usize {
        self.store.len()
    }
    fn segment(&self, positions: Range<usize>) -> Segment<'_> {
        let first = positions.start;
        Segment::new(positions, &self.store, first).times_channels(&self.factors)
    }
    fn drop_before(&mut self, position: usize) {
        self.store.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        if (1..self.first).contains(&len) {
            return Err("its channels are smoothed by all of the prompt");
        }
        self.store.can_truncate(len)
    }
    fn truncate(&mut self, len: usize) {
        if len == 0 {
            self.factors = Vec::new();
        }
        self.store.truncate(len);
    }
    fn start(&self) -> usize {
        self.store.start()
    }
    fn footprint(&self) -> Footprint {
        let bytes = self.store.bytes();
        let state = self.factors.capacity() * size_of::<f32>();
        Footprint {
            states: bytes.codes,
            scales: bytes.scales,
            residual: bytes.residual,
            state,
            ..Footprint::default()
        }
    }
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.numbers(&mut self.factors)?;
        archive.count(&mut self.first)?;
        self.store.archive(archive)?;
        let channels = self.store.heads() * self.head_dim;
        damaged(self.factors.len() == if self.store.is_empty() { 0 } else { channels })
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}
