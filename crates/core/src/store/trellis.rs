//! Trellis-coded quantisation of normal variables (Marcellin and Fischer 1990; with a table of levels over a window of
//! bits as in QTIP, Tseng et al. 2024, arXiv 2406.11235): what a code stands for depends on the codes before it, see
//! [`crate::kernels::Trellis`], and the codes of a section are the ones that together come nearest (Viterbi 1967).
//!
//! The levels of each number of bits were found on a normal source: codes for the levels, levels for the codes in turn
//! (Lloyd 1982), from many random beginnings, then rounded to bytes. `make_levels` below does it again. The best uniform steps leave
//! 0.363, 0.119 and 0.0374 of the variance where these leave 0.292, 0.083 and 0.023 (bounds: 0.25, 0.0625, 0.0156).

use half::f16;

use super::normal::rounded_scale;
pub(super) use super::viterbi::Room;
use super::viterbi::nearest;
use crate::kernels::STATES;

/// The level that is zero.
pub(super) const MIDDLE: u8 = 128;

/// A table of levels.
#[derive(Clone)]
pub(crate) struct Levels {
    pub(crate) bits: u8,
    /// By window; a level l is `unit * (l - 128)` of a unit normal variable.
    pub(crate) levels: [u8; STATES],
    pub(crate) unit: f32,
    /// Mean squared error of a unit normal variable in long sections.
    pub(crate) error: f32,
}

/// The table for so many bits, where there is one.
pub(crate) fn levels(bits: u8) -> Option<&'static Levels> {
    TABLES.iter().find(|t| t.bits == bits)
}

/// By bits.
pub(super) static TABLES: [Levels; 3] = [
    Levels {
        bits: 1,
        levels: [
            84, 187, 49, 157, 130, 241, 88, 177, 163, 76, 93, 168, 44, 151, 88, 210, 9, 142, 123, 255, 70,
            161, 233, 108, 76, 169, 57, 157, 234, 102, 88, 173, 183, 82, 156, 75, 43, 136, 172, 87, 109, 198,
            214, 103, 153, 38, 165, 88, 146, 3, 20, 131, 172, 72, 103, 189, 181, 85, 153, 38, 109, 229, 194,
            85,
        ],
        unit: 0.0146305,
        error: 0.2918,
    },
    Levels {
        bits: 2,
        levels: [
            119, 155, 209, 79, 76, 114, 151, 249, 96, 53, 161, 125, 162, 93, 129, 216, 75, 143, 118, 187,
            181, 56, 106, 142, 182, 110, 71, 144, 108, 70, 142, 183, 136, 94, 164, 40, 103, 141, 181, 1, 131,
            178, 29, 87, 60, 150, 213, 108, 235, 189, 82, 128, 141, 180, 52, 98, 36, 139, 110, 174, 119, 201,
            87, 153,
        ],
        unit: 0.0205540,
        error: 0.0826,
    },
    Levels {
        bits: 3,
        levels: [
            85, 182, 139, 229, 122, 106, 55, 157, 63, 125, 106, 143, 185, 159, 86, 250, 35, 148, 129, 97, 77,
            168, 198, 113, 117, 76, 208, 169, 52, 97, 144, 129, 97, 204, 157, 116, 1, 137, 175, 64, 187, 166,
            44, 81, 152, 122, 108, 138, 218, 140, 65, 126, 107, 181, 159, 90, 152, 112, 79, 27, 133, 199, 96,
            175,
        ],
        unit: 0.0229795,
        error: 0.0232,
    },
];

/// Codes of numbers that are near normal with mean zero, relative to their root mean square; returns the scale, to be
/// stored by its byte: level l stands for `scale * (l - 128)`. Codes follow each other up to number `end`, and from it on.
pub(super) fn quantise(x: &[f32], end: usize, table: &Levels, room: &mut Room, codes: &mut [u8]) -> f16 {
    let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = rounded_scale(square.sqrt() * table.unit);
    let inverse = 1.0 / scale.to_f32();
    let levels = table.levels.map(|l| f32::from(l) - f32::from(MIDDLE));
    let (first, second) = codes.split_at_mut(end);
    for (x, codes) in [(&x[..end], first), (&x[end..], second)] {
        room.x.clear();
        room.x.extend(x.iter().map(|x| x * inverse));
        nearest(table.bits, &levels, room, codes);
    }
    scale
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
    use rand_distr::{Distribution, StandardNormal};

    use super::*;
    use crate::kernels::{Isa, with_isa};

    fn normal(rng: &mut StdRng, n: usize) -> Vec<f32> {
        (0..n).map(|_| StandardNormal.sample(rng)).collect()
    }

    /// The windows of codes.
    fn windows(bits: u8, codes: &[u8]) -> Vec<usize> {
        let roll = |w: &mut usize, &code: &u8| {
            *w = (*w << bits | usize::from(code)) & (STATES - 1);
            Some(*w)
        };
        codes.iter().scan(0, roll).collect()
    }

    /// Mean squared error of sections of 256 normal numbers.
    fn error(table: &Levels, seed: u64) -> f64 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut room = Room::default();
        let mut codes = [0; 256];
        let mut sum = 0.0;
        for _ in 0..400 {
            let x = normal(&mut rng, 256);
            let scale = quantise(&x, 256, table, &mut room, &mut codes).to_f32();
            for (x, w) in x.iter().zip(windows(table.bits, &codes)) {
                sum += f64::from(x - scale * (f32::from(table.levels[w]) - 128.0)).powi(2);
            }
        }
        sum / (400.0 * 256.0)
    }

    #[test]
    fn errors_are_far_below_those_of_uniform_steps() {
        for (bits, most) in [(1, 0.30), (2, 0.0850), (3, 0.0248)] {
            let table = levels(bits).expect("a table");
            let got = error(table, u64::from(bits));
            assert!(got <= most && (got / f64::from(table.error) - 1.0).abs() < 0.02, "{bits} bits: {got}");
        }
    }

    #[test]
    fn no_codes_come_nearer_and_every_instruction_set_finds_as_near_ones() {
        let mut rng = StdRng::seed_from_u64(5);
        for table in &TABLES {
            let level = |w: usize| f32::from(table.levels[w]) - 128.0;
            let length = 8 / usize::from(table.bits) + 2;
            for _ in 0..20 {
                let mut room = Room::default();
                room.x = normal(&mut rng, length);
                room.x.iter_mut().for_each(|x| *x /= table.unit);
                let x = room.x.clone();
                let distance = |codes: &[u8]| -> f32 {
                    let levels = windows(table.bits, codes).into_iter().map(level);
                    x.iter().zip(levels).map(|(x, l)| (x - l) * (x - l)).sum()
                };
                // All there are.
                let mut least = f32::INFINITY;
                for all in 0..1_u64 << (usize::from(table.bits) * length) {
                    let code =
                        |i: usize| (all >> (usize::from(table.bits) * i)) as u8 & ((1 << table.bits) - 1);
                    least = least.min(distance(&(0..length).map(code).collect::<Vec<_>>()));
                }
                for isa in Isa::available() {
                    let mut codes = vec![0; length];
                    let centred = table.levels.map(|l| f32::from(l) - 128.0);
                    with_isa(isa, || nearest(table.bits, &centred, &mut room, &mut codes));
                    assert!((distance(&codes) - least).abs() <= 1e-4 * least.max(1.0), "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_codes() {
        let mut rng = StdRng::seed_from_u64(6);
        for table in &TABLES {
            for length in [0, 1, 15, 16, 17, 100, 256] {
                let x = normal(&mut rng, length);
                let of = |isa| {
                    let (mut room, mut codes) = (Room::default(), vec![0; length]);
                    room.x.extend(x.iter().map(|x| x / table.unit));
                    let centred = table.levels.map(|l| f32::from(l) - 128.0);
                    with_isa(isa, || nearest(table.bits, &centred, &mut room, &mut codes));
                    codes
                };
                let scalar = of(Isa::SCALAR);
                for isa in Isa::available() {
                    assert_eq!(of(isa), scalar, "{isa:?}, {} bits, {length} numbers", table.bits);
                }
            }
        }
    }

    /// Makes tables as those above: `cargo test -p minicache-core make_levels -- --ignored --nocapture`.
    #[test]
    #[ignore = "minutes: searches for tables of levels and prints them"]
    fn make_levels() {
        for bits in [1_u8, 2, 3] {
            let (codes, histories) = (1_usize << bits, STATES >> bits);
            // A beginning: each history has the quantiles of the normal distribution at an offset of its own, its codes in
            // any order.
            let mut rng = StdRng::seed_from_u64(u64::from(bits));
            let mut sorted = normal(&mut rng, 64_000);
            sorted.sort_by(f32::total_cmp);
            let mut found = Vec::new();
            for _ in 0..1500 {
                let mut table = [0.0; STATES];
                let mut offsets: Vec<usize> = (0..histories).collect();
                offsets.shuffle(&mut rng);
                for (history, offset) in offsets.into_iter().enumerate() {
                    let mut order: Vec<usize> = (0..codes).collect();
                    order.shuffle(&mut rng);
                    for (code, place) in order.into_iter().enumerate() {
                        table[history << bits | code] =
                            1.05 * sorted[(place * histories + offset) * 1000 + 500];
                    }
                }
                found.push(lloyd(bits, table, 60, 12, rng.random()));
            }
            // The most promising go on with more numbers.
            found.sort_by(|a, b| a.0.total_cmp(&b.0));
            let further = found[..12].iter().map(|(_, table)| lloyd(bits, *table, 600, 40, 99));
            let best = further.min_by(|a, b| a.0.total_cmp(&b.0));
            let (error, table) = best.expect("some were found");
            let unit = table.iter().fold(0.0_f32, |m, l| m.max(l.abs())) / 127.0;
            let bytes = table.map(|l| (l / unit).round() as i32 + 128);
            println!("{bits} bits: unit {unit}, error {error}\n{bytes:?}");
        }
    }

    /// Codes for the levels, levels for the codes, in turn, on `sections` of 256 numbers; the error and the levels.
    fn lloyd(
        bits: u8,
        mut table: [f32; STATES],
        sections: usize,
        turns: usize,
        seed: u64,
    ) -> (f64, [f32; STATES]) {
        let mut rng = StdRng::seed_from_u64(seed);
        let data: Vec<Vec<f32>> = (0..sections).map(|_| normal(&mut rng, 256)).collect();
        let mut room = Room::default();
        let mut codes = [0; 256];
        let mut error = 0.0;
        for turn in 0..=turns {
            let (mut sums, mut counts) = ([0.0_f64; STATES], [0_u32; STATES]);
            error = 0.0;
            for x in &data {
                room.x.clone_from(x);
                nearest(bits, &table, &mut room, &mut codes);
                for (x, w) in x.iter().zip(windows(bits, &codes)) {
                    error += f64::from(x - table[w]).powi(2);
                    sums[w] += f64::from(*x);
                    counts[w] += 1;
                }
            }
            for w in (0..STATES).filter(|&w| turn < turns && counts[w] > 0) {
                table[w] = (sums[w] / f64::from(counts[w])) as f32;
            }
        }
        (error / (sections * 256) as f64, table)
    }
}
