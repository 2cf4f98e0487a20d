//! How latents are stored: exact, in quantisation groups, or with bits allocated per component from calibration.

use std::collections::BinaryHeap;
use std::ops::Range;

use crate::store::normal::UNIFORM;
use crate::store::trellis::levels;
use crate::store::{Scheme, Side, Store};

/// Bits per component: consecutive components (by descending variance) with the same number of bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// (bits, number of components); components after the last are dropped.
    pub sections: Vec<(u8, usize)>,
}

/// What codes of so many bits leave of a unit variance, by falling error.
pub type Errors = [(u8, f32)];

/// Those of uniform steps.
pub fn uniform_errors() -> Vec<(u8, f32)> {
    UNIFORM.iter().map(|u| (u.0, u.2)).collect()
}

/// Those of trellis codes, and of uniform steps for the bits that there are none of.
pub fn trellis_errors() -> Vec<(u8, f32)> {
    let uniform =
        uniform_errors().into_iter().map(|(bits, error)| (bits, levels(bits).map_or(error, |t| t.error)));
    levels(1).map(|t| (1, t.error)).into_iter().chain(uniform).collect()
}

/// Spends `budget` bits on the components of several groups, each with its `variances` (descending): each step goes
/// where it takes most squared error per bit (greedy reverse water-filling), whatever the group. Components come in
/// runs of `unit` (a multiple of the store's lane width wastes nothing) that get the same bits.
pub fn allocate(groups: &[Vec<f32>], budget: usize, unit: usize, errors: &Errors) -> Vec<Allocation> {
    let runs = || groups.iter().enumerate().flat_map(|(g, v)| v.chunks(unit).map(move |c| (g, c)));
    let energies: Vec<f32> = runs().map(|(_, c)| c.iter().sum()).collect();
    let sizes: Vec<usize> = runs().map(|(_, c)| c.len()).collect();
    let mut level = vec![0usize; sizes.len()];
    let error = |level: usize| if level == 0 { 1.0 } else { errors[level - 1].1 };
    let bits = |level: usize| if level == 0 { 0 } else { usize::from(errors[level - 1].0) };
    // The best move of a run from its level. It may skip levels: from nothing straight to 3 bits, if that is the
    // better bargain.
    let best = |i: usize, from: usize| {
        (from + 1..=errors.len())
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
pub(super) fn turn(x: &mut [f32], back: bool) {
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

/// How the latents of one span are written.
#[derive(Debug, Clone)]
pub(super) enum Coding {
    /// `rank` components in one store.
    Plain { scheme: Scheme, rank: usize },
    /// Codes of fixed steps, in units of a component's calibrated deviation and of the root mean square of its section
    /// for the token: what is unlike other tokens is often so in few components.
    Allocated { allocation: Allocation, deviations: Vec<f32>, trellis: bool },
}

impl Coding {
    /// Numbers of a latent.
    pub(super) fn rank(&self) -> usize {
        match self {
            Coding::Plain { rank, .. } => *rank,
            Coding::Allocated { deviations, .. } => deviations.len(),
        }
    }

    /// What component `i` is divided by before it is stored.
    pub(super) fn deviation(&self, i: usize) -> f32 {
        match self {
            Coding::Plain { .. } => 1.0,
            Coding::Allocated { deviations, .. } => deviations[i],
        }
    }

    /// The components that are turned together, after the division.
    pub(super) fn turned(&self) -> Vec<Range<usize>> {
        let Coding::Allocated { allocation, .. } = self else { return Vec::new() };
        let mut at = 0;
        let section = |&(_, count): &(u8, usize)| {
            at += count;
            at - count..at
        };
        allocation.sections.iter().map(section).collect()
    }

    /// Makes a row of a map from (or, if `to`, to) components one from (or to) what is stored.
    pub(super) fn turn_map(&self, row: &mut [f32], to: bool) {
        for (i, x) in row.iter_mut().enumerate() {
            *x = if to { *x / self.deviation(i) } else { *x * self.deviation(i) };
        }
        self.turned().into_iter().for_each(|section| turn(&mut row[section], false));
    }

    /// An empty store for such latents.
    pub(super) fn store(&self, side: Side) -> Store {
        match self {
            Coding::Plain { scheme, rank } => Store::new(1, *rank, *scheme, side),
            Coding::Allocated { allocation, trellis: false, .. } => {
                Store::sections(&allocation.sections, side)
            }
            Coding::Allocated { allocation, .. } => Store::trellis(&allocation.sections, side),
        }
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
        let together = allocate(&groups, budget, 16, &uniform_errors());
        let apart: Vec<Allocation> = groups
            .iter()
            .flat_map(|g| allocate(std::slice::from_ref(g), budget / 3, 16, &uniform_errors()))
            .collect();
        assert!(together.iter().map(bits).sum::<usize>() <= budget);
        assert!(bits(&together[0]) > bits(&together[1]) && bits(&together[2]) == 0);
        assert!(error(&together) < 0.5 * error(&apart), "{} {}", error(&together), error(&apart));
    }
}
