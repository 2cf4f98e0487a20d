//! Storage of latents: exact, in quantisation groups, or with bits allocated per component from calibration.

use std::ops::Range;

use minicache_config::StoreType;

use crate::magnitudes::Magnitudes;
use crate::scratch::with_buffer;
use crate::store::{Scheme, Side, Store};
use crate::{Footprint, Precision};

/// Step of the best uniform quantiser of a unit normal variable with 2^bits levels, and its mean squared error
/// (Max 1960; Jayant and Noll 1984, table 4.2).
const UNIFORM: [(u8, f32, f32); 4] =
    [(2, 0.9957, 0.118_85), (3, 0.5860, 0.037_44), (4, 0.3352, 0.011_543), (8, 0.0308, 0.000_116)];

/// Bits per component: consecutive components (by descending variance) with the same number of bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// (bits, number of components); components after the last are dropped.
    pub sections: Vec<(u8, usize)>,
}

/// Spends `budget` bits on components with `variances` (descending): each step goes where it takes most squared error
/// per bit (greedy reverse water-filling). Components come in runs of `unit` (a multiple of the store's lane width
/// wastes nothing) that get the same bits.
pub fn allocate(variances: &[f32], budget: usize, unit: usize) -> Allocation {
    let runs: Vec<f32> = variances.chunks(unit).map(|c| c.iter().sum()).collect();
    let mut level = vec![0usize; runs.len()];
    let error = |level: usize| if level == 0 { 1.0 } else { UNIFORM[level - 1].2 };
    let bits = |level: usize| if level == 0 { 0 } else { usize::from(UNIFORM[level - 1].0) };
    let mut left = budget;
    loop {
        // A move may skip levels: from nothing straight to 3 bits, if that is the better bargain.
        let mut best: Option<(f32, usize, usize)> = None;
        for (i, &energy) in runs.iter().enumerate() {
            let size = unit.min(variances.len() - i * unit);
            for to in level[i] + 1..=UNIFORM.len() {
                let cost = (bits(to) - bits(level[i])) * size;
                let gain = energy * (error(level[i]) - error(to)) / cost as f32;
                if cost <= left && gain > 0.0 && best.is_none_or(|b| gain > b.0) {
                    best = Some((gain, i, to));
                }
            }
        }
        let Some((_, i, to)) = best else { break };
        let size = unit.min(variances.len() - i * unit);
        left -= (bits(to) - bits(level[i])) * size;
        level[i] = to;
    }
    let mut sections: Vec<(u8, usize)> = Vec::new();
    for (i, &l) in level.iter().enumerate().filter(|(_, l)| **l > 0) {
        let size = unit.min(variances.len() - i * unit);
        match sections.last_mut() {
            Some((b, n)) if usize::from(*b) == bits(l) => *n += size,
            _ => sections.push((bits(l) as u8, size)),
        }
    }
    Allocation { sections }
}

/// How the latents of one group are written.
#[derive(Debug, Clone)]
pub(super) enum Coding {
    /// All components in one store.
    Plain(Scheme),
    /// Codes of fixed steps, in units of a component's calibrated deviation and of the token's magnitude.
    Allocated { allocation: Allocation, deviations: Vec<f32> },
}

/// Stored latents of one group.
#[derive(Clone)]
pub(super) struct Latents {
    rank: usize,
    sections: Vec<Section>,
    /// The tokens' magnitudes, where codes are relative to them.
    scale: Option<Magnitudes>,
    len: usize,
}

#[derive(Clone)]
struct Section {
    range: Range<usize>,
    store: Store,
    /// Value of one step of the code of each component; empty where the store holds numbers.
    steps: Vec<f32>,
    /// The step in units of a component's deviation.
    unit: f32,
    /// The code of zero.
    middle: f32,
}

impl Latents {
    pub(super) fn new(rank: usize, coding: &Coding, side: Side, magnitudes: StoreType) -> Self {
        let precision = Precision::beside(magnitudes);
        match coding {
            Coding::Plain(scheme) => {
                let store = Store::new(1, rank, *scheme, side).with_precision(precision);
                let sections =
                    vec![Section { range: 0..rank, store, steps: Vec::new(), unit: 1.0, middle: 0.0 }];
                Self { rank, sections, scale: None, len: 0 }
            }
            Coding::Allocated { allocation, deviations } => {
                let mut at = 0;
                let sections = allocation.sections.iter().map(|&(bits, count)| {
                    let range = at..at + count;
                    at += count;
                    let unit = UNIFORM.iter().find(|u| u.0 == bits).map_or(1.0, |u| u.1);
                    let steps = deviations[range.clone()].iter().map(|d| d * unit).collect();
                    let store = Store::new(1, count, Scheme::Codes { bits }, side);
                    let store = store.with_precision(precision);
                    let middle = f32::from((1u16 << bits) - 1) / 2.0;
                    Section { range, store, steps, unit, middle }
                });
                let sections = sections.collect();
                Self { rank, sections, scale: Some(Magnitudes::new(1, magnitudes)), len: 0 }
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn start(&self) -> usize {
        self.sections.iter().map(|s| s.store.start()).max().unwrap_or(0)
    }

    /// Appends latents `(tokens, rank)`.
    pub(super) fn push(&mut self, z: &[f32]) {
        self.len += z.len() / self.rank;
        for z in z.chunks_exact(self.rank) {
            let magnitude = self.scale.as_mut().map(|scale| {
                // Mean square in units of the calibrated deviations: about 1 for an ordinary token.
                let ratios = |s: &Section| {
                    z[s.range.clone()]
                        .iter()
                        .zip(&s.steps)
                        .map(|(z, step)| (z * s.unit / step).powi(2))
                        .sum::<f32>()
                };
                let sum: f32 = self.sections.iter().map(ratios).sum();
                let count: usize = self.sections.iter().map(|s| s.range.len()).sum();
                let magnitude = (sum / count.max(1) as f32).sqrt().max(1e-6);
                scale.push(&[magnitude]);
                scale.get(0, scale.len() - 1)
            });
            for section in &mut self.sections {
                let part = &z[section.range.clone()];
                match magnitude {
                    None => section.store.push(part),
                    Some(m) => with_buffer(part.len(), |codes| {
                        for ((c, x), step) in codes.iter_mut().zip(part).zip(&section.steps) {
                            *c = (x / (m * step) + section.middle)
                                .round_ties_even()
                                .clamp(0.0, 2.0 * section.middle);
                        }
                        section.store.push(codes);
                    }),
                }
            }
        }
    }

    /// Scores of mapped queries `(rows, rank)`, added to `out (rows, range.len())`.
    pub(super) fn add_scores(
        &self,
        range: Range<usize>,
        q: &[f32],
        stride: usize,
        rows: usize,
        out: &mut [f32],
    ) {
        let width = range.len();
        with_buffer(rows * (self.rank + 2 * width), |buffer| {
            let (folded, rest) = buffer.split_at_mut(rows * self.rank);
            let (total, part) = rest.split_at_mut(rows * width);
            total.fill(0.0);
            for section in &self.sections {
                let count = section.range.len();
                let folded = &mut folded[..rows * count];
                for (row, to) in folded.chunks_exact_mut(count).enumerate() {
                    to.copy_from_slice(&q[row * stride + section.range.start..][..count]);
                    to.iter_mut().zip(&section.steps).for_each(|(q, s)| *q *= s);
                }
                section.store.scores(0, range.clone(), folded, rows, part);
                for ((row, from), q) in part.chunks_exact(width).enumerate().zip(folded.chunks_exact(count)) {
                    let zero = section.middle * q.iter().sum::<f32>();
                    total[row * width..(row + 1) * width]
                        .iter_mut()
                        .zip(from)
                        .for_each(|(t, f)| *t += f - zero);
                }
            }
            if let Some(scale) = &self.scale {
                scale.scale(0, range, total);
            }
            out.iter_mut().zip(&*total).for_each(|(o, t)| *o += t);
        });
    }

    /// Adds the weighted sum of latents to the first `rank` numbers of each row of `out`, rows `stride` apart.
    pub(super) fn accumulate(
        &self,
        range: Range<usize>,
        p: &[f32],
        rows: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let width = range.len();
        with_buffer(rows * (self.rank + width), |buffer| {
            let (sums, weights) = buffer.split_at_mut(rows * self.rank);
            weights.copy_from_slice(&p[..rows * width]);
            if let Some(scale) = &self.scale {
                scale.scale(0, range.clone(), weights);
            }
            for section in &self.sections {
                let count = section.range.len();
                let sums = &mut sums[..rows * count];
                sums.fill(0.0);
                section.store.accumulate(0, range.clone(), weights, rows, sums);
                for ((row, sum), weights) in
                    sums.chunks_exact(count).enumerate().zip(weights.chunks_exact(width))
                {
                    let out = &mut out[row * stride + section.range.start..][..count];
                    if section.steps.is_empty() {
                        out.iter_mut().zip(sum).for_each(|(o, s)| *o += s);
                    } else {
                        let zero = section.middle * weights.iter().sum::<f32>();
                        out.iter_mut()
                            .zip(sum)
                            .zip(&section.steps)
                            .for_each(|((o, s), d)| *o += (s - zero) * d);
                    }
                }
            }
        });
    }

    /// The latent at `index` as attention sees it.
    pub(super) fn read(&self, index: usize, out: &mut [f32]) {
        let magnitude = self.scale.as_ref().map_or(1.0, |s| s.get(0, index));
        for section in &self.sections {
            let out = &mut out[section.range.clone()];
            section.store.read(0, index, out);
            out.iter_mut()
                .zip(&section.steps)
                .for_each(|(x, step)| *x = (*x - section.middle) * step * magnitude);
        }
    }

    pub(super) fn drop_before(&mut self, index: usize) {
        self.sections.iter_mut().for_each(|s| s.store.drop_before(index));
        let start = self.start();
        if let Some(scale) = &mut self.scale {
            scale.drop_before(start);
        }
    }

    pub(super) fn footprint(&self) -> Footprint {
        let mut out = Footprint::default();
        for section in &self.sections {
            let bytes = section.store.bytes();
            out.latents += bytes.codes;
            out.scales += bytes.scales;
            out.residual += bytes.residual;
        }
        out.magnitudes += self.scale.as_ref().map_or(0, Magnitudes::bytes);
        out
    }
}
