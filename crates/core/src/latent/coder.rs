//! Storage of latents: exact, in quantisation groups, or with bits allocated per component from calibration.

use std::collections::BinaryHeap;
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

/// Spends `budget` bits on the components of several groups, each with its `variances` (descending): each step goes
/// where it takes most squared error per bit (greedy reverse water-filling), whatever the group. Components come in
/// runs of `unit` (a multiple of the store's lane width wastes nothing) that get the same bits.
pub fn allocate(groups: &[Vec<f32>], budget: usize, unit: usize) -> Vec<Allocation> {
    let runs = || groups.iter().enumerate().flat_map(|(g, v)| v.chunks(unit).map(move |c| (g, c)));
    let energies: Vec<f32> = runs().map(|(_, c)| c.iter().sum()).collect();
    let sizes: Vec<usize> = runs().map(|(_, c)| c.len()).collect();
    let mut level = vec![0usize; sizes.len()];
    let error = |level: usize| if level == 0 { 1.0 } else { UNIFORM[level - 1].2 };
    let bits = |level: usize| if level == 0 { 0 } else { usize::from(UNIFORM[level - 1].0) };
    // The best move of a run from its level. It may skip levels: from nothing straight to 3 bits, if that is the
    // better bargain.
    let best = |i: usize, from: usize| {
        (from + 1..=UNIFORM.len())
            .map(|to| {
                let cost = (bits(to) - bits(from)) * sizes[i];
                Move { gain: energies[i] * (error(from) - error(to)) / cost as f32, cost, run: i, to }
            })
            .filter(|m| m.gain > 0.0)
            .max_by(|a, b| a.gain.total_cmp(&b.gain))
    };
    let mut moves: BinaryHeap<Move> = (0..sizes.len()).filter_map(|i| best(i, 0)).collect();
    let mut left = budget;
    // A move that no longer fits ends its run; smaller runs may still take theirs.
    while let Some(Move { cost, run, to, .. }) = moves.pop() {
        if cost <= left {
            left -= cost;
            level[run] = to;
            moves.extend(best(run, to));
        }
    }
    let mut out = vec![Allocation { sections: Vec::new() }; groups.len()];
    for ((group, chunk), level) in runs().zip(level).filter(|(_, l)| *l > 0) {
        match out[group].sections.last_mut() {
            Some((b, n)) if usize::from(*b) == bits(level) => *n += chunk.len(),
            _ => out[group].sections.push((bits(level) as u8, chunk.len())),
        }
    }
    out
}

/// A step of [`allocate`]: run `run` goes to level `to` for `cost` bits.
#[derive(PartialEq)]
struct Move {
    gain: f32,
    cost: usize,
    run: usize,
    to: usize,
}

impl Eq for Move {}

impl Ord for Move {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.gain.total_cmp(&other.gain).then(other.run.cmp(&self.run))
    }
}

impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Turns components of unit deviation so that every one of them is a sum of many: whatever their distribution, the
/// turned ones are near normal, which is what the quantisers are made for. Blocks of a power of two, the largest first.
fn turn(x: &mut [f32], back: bool) {
    let flip = |x: &mut [f32]| {
        // Fixed signs, so that a common offset of the components does not add up in one of them.
        x.iter_mut()
            .enumerate()
            .filter(|(i, _)| (i.wrapping_mul(2_654_435_761) >> 16) & 1 == 1)
            .for_each(|(_, x)| *x = -*x);
    };
    let mut rest = x;
    while rest.len() > 1 {
        let size = (1usize << rest.len().ilog2()).min(BLOCK);
        let (block, others) = rest.split_at_mut(size);
        if !back {
            flip(block);
        }
        hadamard(block);
        if back {
            flip(block);
        }
        rest = others;
    }
}

/// Components that are turned together, at most.
const BLOCK: usize = 1024;

/// The orthonormal Walsh-Hadamard transform, its own inverse; a power of two.
fn hadamard(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (x.len() as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= scale);
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
    /// The tokens' magnitudes by section, where codes are relative to them.
    scale: Option<Magnitudes>,
    len: usize,
}

#[derive(Clone)]
struct Section {
    range: Range<usize>,
    store: Store,
    /// Deviation of each component; empty where the store holds numbers.
    deviations: Vec<f32>,
    /// The step of the codes in units of a component's deviation.
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
                    vec![Section { range: 0..rank, store, deviations: Vec::new(), unit: 1.0, middle: 0.0 }];
                Self { rank, sections, scale: None, len: 0 }
            }
            Coding::Allocated { allocation, deviations } => {
                let mut at = 0;
                let sections = allocation.sections.iter().map(|&(bits, count)| {
                    let range = at..at + count;
                    at += count;
                    let unit = UNIFORM.iter().find(|u| u.0 == bits).map_or(1.0, |u| u.1);
                    let deviations = deviations[range.clone()].to_vec();
                    let store = Store::new(1, count, Scheme::Codes { bits }, side);
                    let store = store.with_precision(precision);
                    let middle = f32::from((1u16 << bits) - 1) / 2.0;
                    Section { range, store, deviations, unit, middle }
                });
                let sections: Vec<Section> = sections.collect();
                let scale = Some(Magnitudes::new(sections.len(), magnitudes));
                Self { rank, sections, scale, len: 0 }
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
            let Some(scale) = &mut self.scale else {
                self.sections.iter_mut().for_each(|s| s.store.push(&z[s.range.clone()]));
                continue;
            };
            with_buffer(self.rank, |ratios| {
                for s in &self.sections {
                    let parts =
                        ratios[s.range.clone()].iter_mut().zip(&z[s.range.clone()]).zip(&s.deviations);
                    parts.for_each(|((r, z), d)| *r = z / d);
                }
                // Root mean square in units of the calibrated deviations: about 1 for an ordinary token. A section of
                // its own each, because what is unlike other tokens is often so in few components.
                let magnitudes: Vec<f32> = self
                    .sections
                    .iter()
                    .map(|s| {
                        let part = &ratios[s.range.clone()];
                        (part.iter().map(|r| r * r).sum::<f32>() / part.len() as f32).sqrt().max(1e-6)
                    })
                    .collect();
                scale.push(&magnitudes);
                for (lane, s) in self.sections.iter_mut().enumerate() {
                    let magnitude = scale.get(lane, scale.len() - 1);
                    let codes = &mut ratios[s.range.clone()];
                    turn(codes, false);
                    for c in codes.iter_mut() {
                        *c = (*c / (magnitude * s.unit) + s.middle)
                            .round_ties_even()
                            .clamp(0.0, 2.0 * s.middle);
                    }
                    s.store.push(codes);
                }
            });
        }
    }

    /// Turns a mapped query into what [`Latents::add_scores`] takes, once per step.
    pub(super) fn fold_query(&self, q: &mut [f32]) {
        for s in self.sections.iter().filter(|s| !s.deviations.is_empty()) {
            let q = &mut q[s.range.clone()];
            q.iter_mut().zip(&s.deviations).for_each(|(q, d)| *q *= d * s.unit);
            turn(q, false);
        }
    }

    /// Turns a sum of [`Latents::accumulate`] into one of latents, once per step.
    pub(super) fn unfold_sum(&self, sum: &mut [f32]) {
        for s in self.sections.iter().filter(|s| !s.deviations.is_empty()) {
            let sum = &mut sum[s.range.clone()];
            turn(sum, true);
            sum.iter_mut().zip(&s.deviations).for_each(|(x, d)| *x *= d * s.unit);
        }
    }

    /// Scores of folded queries `(rows, rank)`, added to `out (rows, range.len())`.
    pub(super) fn add_scores(
        &self,
        range: Range<usize>,
        q: &[f32],
        stride: usize,
        rows: usize,
        out: &mut [f32],
    ) {
        let width = range.len();
        with_buffer(rows * (self.rank + width), |buffer| {
            let (gathered, part) = buffer.split_at_mut(rows * self.rank);
            for (lane, section) in self.sections.iter().enumerate() {
                let count = section.range.len();
                let gathered = &mut gathered[..rows * count];
                for (row, to) in gathered.chunks_exact_mut(count).enumerate() {
                    to.copy_from_slice(&q[row * stride + section.range.start..][..count]);
                }
                section.store.scores(0, range.clone(), gathered, rows, part);
                for (from, q) in part.chunks_exact_mut(width).zip(gathered.chunks_exact(count)) {
                    let zero = section.middle * q.iter().sum::<f32>();
                    from.iter_mut().for_each(|f| *f -= zero);
                }
                if let Some(scale) = &self.scale {
                    scale.scale(lane, range.clone(), part);
                }
                out.iter_mut().zip(&*part).for_each(|(o, s)| *o += s);
            }
        });
    }

    /// Adds the weighted sum of what is stored to the first `rank` numbers of each row of `out`, rows `stride` apart;
    /// [`Latents::unfold_sum`] makes latents of it.
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
            for (lane, section) in self.sections.iter().enumerate() {
                weights.copy_from_slice(&p[..rows * width]);
                if let Some(scale) = &self.scale {
                    scale.scale(lane, range.clone(), weights);
                }
                let count = section.range.len();
                let sums = &mut sums[..rows * count];
                sums.fill(0.0);
                section.store.accumulate(0, range.clone(), weights, rows, sums);
                for ((row, sum), weights) in
                    sums.chunks_exact(count).enumerate().zip(weights.chunks_exact(width))
                {
                    let out = &mut out[row * stride + section.range.start..][..count];
                    let zero = section.middle * weights.iter().sum::<f32>();
                    out.iter_mut().zip(sum).for_each(|(o, s)| *o += s - zero);
                }
            }
        });
    }

    /// The latent at `index` as attention sees it.
    pub(super) fn read(&self, index: usize, out: &mut [f32]) {
        for (lane, section) in self.sections.iter().enumerate() {
            let magnitude = self.scale.as_ref().map_or(1.0, |s| s.get(lane, index));
            let out = &mut out[section.range.clone()];
            section.store.read(0, index, out);
            out.iter_mut().for_each(|x| *x = (*x - section.middle) * magnitude);
        }
        self.unfold_sum(out);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_keeps_lengths_and_turns_back() {
        for n in [1, 2, 16, 48, 208] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 101) as f32 / 50.0 - 1.0).collect();
            let mut y = x.clone();
            turn(&mut y, false);
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((norm(&x) - norm(&y)).abs() < 1e-4 * norm(&x), "{n}");
            // An outlier is spread over its whole block.
            let mut outlier = vec![0.0; n];
            outlier[n / 2] = 1.0;
            turn(&mut outlier, false);
            if n >= 16 {
                assert!(outlier.iter().all(|x| x.abs() <= 0.2501), "{n}");
            }
            turn(&mut y, true);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5), "{n}");
        }
    }

    #[test]
    fn bits_go_where_the_error_is_whatever_the_group() {
        let groups = [vec![4.0; 64], vec![1.0; 64], vec![1e-6; 64]];
        let bits = |a: &Allocation| a.sections.iter().map(|(b, n)| usize::from(*b) * n).sum::<usize>();
        let error = |allocations: &[Allocation]| -> f32 {
            let group = |(v, a): (&Vec<f32>, &Allocation)| {
                let mut left: f32 = v.iter().sum();
                let mut at = 0;
                for &(bits, n) in &a.sections {
                    let d = UNIFORM.iter().find(|u| u.0 == bits).map_or(0.0, |u| u.2);
                    left -= (1.0 - d) * v[at..at + n].iter().sum::<f32>();
                    at += n;
                }
                left
            };
            groups.iter().zip(allocations).map(group).sum()
        };
        let budget = 3 * 64 * 2;
        let together = allocate(&groups, budget, 16);
        let apart: Vec<Allocation> =
            groups.iter().flat_map(|g| allocate(std::slice::from_ref(g), budget / 3, 16)).collect();
        assert!(together.iter().map(bits).sum::<usize>() <= budget);
        assert!(bits(&together[0]) > bits(&together[1]) && bits(&together[2]) == 0);
        assert!(error(&together) < 0.5 * error(&apart), "{} {}", error(&together), error(&apart));
    }
}
