//! Levels of Lloyd and Max (Max 1960; Lloyd 1982) for the coordinates of a random point on a sphere, as TurboQuant has
//! them (Zandieh et al. 2025, arXiv 2504.19874, section 3.1).
//!
//! One coordinate t of a point on the unit sphere of d dimensions has the density `(1 - t^2)^((d - 3) / 2)` up to a
//! constant. Its best levels are the means of the cells that they are nearest to: cells for the levels, levels for the
//! cells in turn. Here the coordinate is `sqrt(d) t`, of unit variance, as numbers are relative to their root mean square.

use half::f16;

use super::trellis::{Levels, MIDDLE};
use crate::kernels::{STATES, half};

/// Steps in which densities are summed up on the positive side.
const STEPS: usize = 1 << 13;
/// Where the summing ends: beyond eight deviations there is nothing.
const END: f64 = 8.0;
/// Turns of the iteration; of 16 levels the last ones change nothing in ten digits.
const TURNS: usize = 4000;

/// The best `2^bits` levels of a coordinate in `dim` dimensions (below three: those of three, a uniform one), rounded to
/// 127ths of the largest.
pub(crate) fn levels(bits: u8, dim: usize) -> Levels {
    let cells = Cells::new(dim);
    // Levels come in pairs around zero: half of them are looked for, and the lowest cell begins at zero.
    let count = 1 << (bits - 1);
    let top = cells.end;
    let mut level: Vec<f64> = (0..count).map(|i| top.min(3.0) * (i as f64 + 0.5) / count as f64).collect();
    let bounds = |level: &[f64]| -> Vec<f64> {
        let between = level.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        std::iter::once(0.0).chain(between).chain([top]).collect()
    };
    for _ in 0..TURNS {
        let bounds = bounds(&level);
        level.iter_mut().zip(bounds.windows(2)).for_each(|(l, cell)| *l = cells.mean(cell[0], cell[1], *l));
    }
    let kept: f64 =
        level.iter().zip(bounds(&level).windows(2)).map(|(l, c)| l * l * cells.mass(c[0], c[1])).sum();
    let unit = level[count - 1] / 127.0;
    let byte = |code: usize| {
        let steps = |i: usize| (level[i] / unit).round() as u8;
        if code < count { MIDDLE - steps(count - 1 - code) } else { MIDDLE + steps(code - count) }
    };
    Levels {
        bits,
        levels: std::array::from_fn(|window: usize| byte(window & (2 * count - 1))),
        unit: unit as f32,
        error: (1.0 - 2.0 * kept) as f32,
    }
}

/// The density of the positive side, summed up.
struct Cells {
    end: f64,
    /// Mass and first moment up to each step.
    sums: Vec<(f64, f64)>,
}

impl Cells {
    fn new(dim: usize) -> Self {
        let d = dim.max(3) as f64;
        let end = END.min(d.sqrt());
        let mut sums = vec![(0.0, 0.0)];
        let (mut mass, mut moment) = (0.0, 0.0);
        for i in 0..STEPS {
            let x = (i as f64 + 0.5) * end / STEPS as f64;
            let density = ((d - 3.0) / 2.0 * (-x * x / d).ln_1p()).exp();
            mass += density;
            moment += density * x;
            sums.push((mass, moment));
        }
        // The two sides are alike.
        sums.iter_mut().for_each(|(m, x)| (*m, *x) = (*m / (2.0 * mass), *x / (2.0 * mass)));
        Self { end, sums }
    }

    /// Mass and first moment up to `x`.
    fn up_to(&self, x: f64) -> (f64, f64) {
        let at = (x / self.end * STEPS as f64).clamp(0.0, STEPS as f64);
        let step = (at as usize).min(STEPS - 1);
        let (part, (a, b)) = (at - step as f64, (self.sums[step], self.sums[step + 1]));
        (a.0 + part * (b.0 - a.0), a.1 + part * (b.1 - a.1))
    }

    fn mass(&self, from: f64, to: f64) -> f64 {
        self.up_to(to).0 - self.up_to(from).0
    }

    /// The mean of a cell; of one without mass, `or`.
    fn mean(&self, from: f64, to: f64, or: f64) -> f64 {
        let (a, b) = (self.up_to(from), self.up_to(to));
        if b.0 - a.0 > 1e-12 { (b.1 - a.1) / (b.0 - a.0) } else { or }
    }
}

/// Codes of `x` relative to its root mean square, that is to its norm over the root of its length: the nearest levels;
/// returns the scale, level l standing for `scale * (l - 128)`.
pub(super) fn quantise(x: &[f32], table: &Levels, codes: &mut [u8]) -> f16 {
    let (scale, inverse) = scale(x, table);
    let (bounds, count) = bounds(table);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = place(x * inverse, &bounds[..count]);
    }
    scale
}

/// What `x` comes back as.
pub(crate) fn rounded(x: &[f32], table: &Levels, out: &mut [f32]) {
    let (scale, inverse) = scale(x, table);
    let (bounds, count) = bounds(table);
    for (out, x) in out.iter_mut().zip(x) {
        let level = table.levels[usize::from(place(x * inverse, &bounds[..count]))];
        *out = scale.to_f32() * (f32::from(level) - f32::from(MIDDLE));
    }
}

/// The scale as it is stored, and its inverse, or zero.
fn scale(x: &[f32], table: &Levels) -> (f16, f32) {
    let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = half(square.sqrt() * table.unit);
    (scale, if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 })
}

/// Where the cell of one level ends and that of the next begins, in units of levels; and how many ends there are.
fn bounds(table: &Levels) -> ([f32; STATES], usize) {
    let count = (1 << table.bits) - 1;
    let level = |code: usize| f32::from(table.levels[code]) - f32::from(MIDDLE);
    let mut bounds = [0.0; STATES];
    (0..count).for_each(|code| bounds[code] = (level(code) + level(code + 1)) / 2.0);
    (bounds, count)
}

/// The cell that `x` is in.
fn place(x: f32, bounds: &[f32]) -> u8 {
    bounds.iter().map(|&bound| u8::from(x > bound)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positive levels in units of the root mean square.
    fn positive(table: &Levels) -> Vec<f32> {
        let half = 1 << (table.bits - 1);
        (half..2 * half).map(|c| (f32::from(table.levels[c]) - 128.0) * table.unit).collect()
    }

    #[test]
    fn in_many_dimensions_they_are_those_of_a_normal_variable() {
        // Max 1960, table I.
        let tabled: [(&[f32], f32); 4] = [
            (&[0.7980], 0.3634),
            (&[0.4528, 1.510], 0.1175),
            (&[0.2451, 0.7560, 1.344, 2.152], 0.034_54),
            (&[0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009_497),
        ];
        for (bits, (want, error)) in (1..).zip(tabled) {
            let table = levels(bits, 1 << 20);
            for (got, want) in positive(&table).iter().zip(want) {
                // Levels are rounded to 127ths of the largest.
                assert!((got - want).abs() < 0.0002 + 0.5 * table.unit, "{bits} bits: {got}, not {want}");
            }
            assert!((table.error / error - 1.0).abs() < 2e-3, "{bits} bits: {}", table.error);
        }
    }

    /// Of an iteration in numpy over 400,000 steps.
    #[test]
    fn in_the_dimensions_of_heads_they_leave_a_little_less() {
        for (dim, want) in
            [(64, [0.35839, 0.11453, 0.03339, 0.00913]), (128, [0.36089, 0.116, 0.03397, 0.00931])]
        {
            for (bits, want) in (1..).zip(want) {
                let got = levels(bits, dim).error;
                assert!(
                    (got / want - 1.0).abs() < 2e-3,
                    "{bits} bits in {dim} dimensions: {got}, not {want}"
                );
            }
        }
    }

    #[test]
    fn in_three_dimensions_coordinates_and_so_levels_are_uniform() {
        for bits in 1..=4 {
            let (table, count) = (levels(bits, 3), f32::from(1_u8 << bits));
            for (i, got) in positive(&table).iter().enumerate() {
                let want = 3.0_f32.sqrt() * (2.0 * i as f32 + 1.0) / count;
                assert!((got - want).abs() < 1e-3 + 0.5 * table.unit, "{bits} bits: {got}, not {want}");
            }
            assert!((table.error * count * count - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn numbers_come_back_as_the_nearest_levels_and_nothing_as_nothing() {
        let x: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        for bits in 1..=4 {
            let table = levels(bits, 64);
            let (mut codes, mut out) = (vec![0; 64], vec![0.0; 64]);
            let scale = quantise(&x, &table, &mut codes).to_f32();
            rounded(&x, &table, &mut out);
            let all: Vec<f32> =
                (0..1 << bits).map(|c| scale * (f32::from(table.levels[c]) - 128.0)).collect();
            for ((x, &code), out) in x.iter().zip(&codes).zip(&out) {
                let nearest = all.iter().fold(f32::INFINITY, |least, l| least.min((l - x).abs()));
                assert_eq!(*out, all[usize::from(code)]);
                assert!((out - x).abs() <= nearest + 1e-6, "{bits} bits: {x} as {out}");
            }
            rounded(&[0.0; 64], &table, &mut out);
            assert!(out.iter().all(|&x| x == 0.0));
        }
    }
}
