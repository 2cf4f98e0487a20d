//! Rotary position embeddings: frequencies of every scaling scheme, and the rotation itself.
//!
//! Formulas follow the reference implementation in transformers (`modeling_rope_utils.py`), in f32 as there, so that
//! long positions agree. Angles are `position * inv_freq`; a head vector is rotated in half-split order: pair j is
//! `(x[j], x[j + rotary_dim/2])`.

use std::sync::{Arc, OnceLock};

use minicache_core::Rotary;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// How frequencies are stretched beyond the pretrained context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As pretrained: inv_freq_j = theta^(-2j/d).
    None,
    /// Position interpolation: all frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware base that grows with the sequence's length.
    Dynamic {
        /// Stretch.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): low frequencies interpolated, high ones kept, a ramp between.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Pretrained context.
        original: usize,
        /// Rotations over the pretrained context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Factor on cosines and sines.
        attention: f64,
    },
    /// Llama 3.1: like YaRN by wavelength, without a factor on attention.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Wavelengths above `original / low` are stretched.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Pretrained context.
        original: usize,
    },
    /// LongRoPE (arXiv 2402.13753), `su` in the first Phi-3 files: searched factors per frequency, one list for
    /// sequences within the pretrained context and one for longer ones.
    LongRope {
        /// Divisors up to `original` tokens, one per frequency.
        short: Vec<f64>,
        /// Divisors beyond.
        long: Vec<f64>,
        /// Pretrained context.
        original: usize,
        /// Factor on cosines and sines, for both lists.
        attention: f64,
    },
}

impl RopeScaling {
    /// LongRoPE's default factor on attention: sqrt(1 + ln(ratio)/ln(original)) for a context `ratio` times longer.
    pub fn longrope_attention(ratio: f64, original: usize) -> f64 {
        if ratio <= 1.0 { 1.0 } else { (1.0 + ratio.ln() / (original as f64).ln()).sqrt() }
    }

    /// YaRN's factor on attention; `mscale` and `mscale_all_dim` are 0 where a file does not give them.
    pub fn yarn_attention(factor: f64, mscale: f64, mscale_all_dim: f64) -> f64 {
        let get = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        if mscale != 0.0 && mscale_all_dim != 0.0 { get(mscale) / get(mscale_all_dim) } else { get(1.0) }
    }
}

/// A model's rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Numbers of a head that are rotated, the first ones; the rest pass through. Even.
    pub rotary_dim: usize,
    /// `max_position_embeddings`.
    pub max_position: usize,
    /// Stretching.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Longest sequence. Linear and dynamic files give the pretrained context, the others the stretched one (YaRN
    /// files either).
    pub fn context(&self) -> usize {
        // A factor may be any number; no sequence is longer than what positions are counted in.
        let stretched =
            |n: usize, factor: f64| (n as f64 * factor.max(1.0)).min(f64::from(u32::MAX)) as usize;
        match self.scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                stretched(self.max_position, factor)
            }
            RopeScaling::Yarn { factor, original, .. } => self.max_position.max(stretched(original, factor)),
            _ => self.max_position,
        }
    }

    /// Whether frequencies depend on the sequence's final length.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    pub(crate) fn validate(&self, head_dim: usize) -> Result<()> {
        let bad = |message: String| Err(Error::Config(message));
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) {
            return bad(format!("rotary dimension {} must be even and at least 2", self.rotary_dim));
        }
        if self.rotary_dim > head_dim {
            return bad(format!("rotary dimension {} exceeds head_dim {head_dim}", self.rotary_dim));
        }
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return bad(format!("rope_theta {} must be above 1", self.theta));
        }
        let positive = |name: &str, x: f64| {
            if x.is_finite() && x > 0.0 { Ok(()) } else { bad(format!("{name} {x} must be above 0")) }
        };
        let original = |n: usize| {
            if n > 0 { Ok(()) } else { bad("original_max_position_embeddings must be at least 1".into()) }
        };
        let half = self.rotary_dim / 2;
        let list = |name: &str, factors: &[f64]| {
            if factors.len() != half {
                return bad(format!("{half} factors are needed, {name} has {}", factors.len()));
            }
            factors.iter().try_for_each(|f| positive(name, *f))
        };
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope factor", *factor),
            RopeScaling::Dynamic { factor } => {
                if self.rotary_dim == 2 {
                    return bad("dynamic RoPE needs a rotary dimension above 2".into());
                }
                positive("rope factor", *factor)
            }
            RopeScaling::Yarn { factor, attention, beta_fast, beta_slow, original: n, .. } => {
                original(*n)?;
                positive("rope factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", *attention)
            }
            RopeScaling::Llama3 { factor, low, high, original: n } => {
                original(*n)?;
                positive("rope factor", *factor)?;
                positive("low_freq_factor", *low)?;
                if high > low { Ok(()) } else { bad("high_freq_factor must exceed low_freq_factor".into()) }
            }
            RopeScaling::LongRope { short, long, attention, original: n } => {
                original(*n)?;
                list("short_factor", short)?;
                list("long_factor", long)?;
                positive("attention_factor", *attention)
            }
        }
    }

    /// The rotation for a sequence that is going to have `length` tokens.
    pub fn frequencies(&self, length: usize) -> Frequencies {
        let dim = self.rotary_dim as f64;
        let exponents = (0..self.rotary_dim / 2).map(|j| ((2 * j) as f64 / dim) as f32);
        // Rounded to f32 where the reference rounds.
        let powers = |theta: f64| -> Vec<f32> {
            exponents.clone().map(|e| (theta as f32 as f64).powf(f64::from(e)) as f32).collect()
        };
        let inverse = |theta: f64| -> Vec<f32> { powers(theta).into_iter().map(|p| 1.0 / p).collect() };
        let divided = |by: &[f64]| -> Vec<f32> {
            powers(self.theta).into_iter().zip(by).map(|(p, by)| 1.0 / (*by as f32 * p)).collect()
        };
        let (inv_freq, attention) = match &self.scaling {
            RopeScaling::None => (inverse(self.theta), 1.0),
            RopeScaling::Linear { factor } => {
                (inverse(self.theta).into_iter().map(|f| f / *factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor } => {
                let max = self.max_position as f64;
                let length = (length as f64).max(max);
                let stretch = (factor * length / max - (factor - 1.0)).powf(dim / (dim - 2.0));
                (inverse(self.theta * stretch), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention } => {
                // The dimension whose frequency makes this many rotations over the pretrained context.
                let dimension = |rotations: f64| {
                    dim * (*original as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(j, p): (usize, f32)| {
                    let ramp = (((j as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
                    let (kept, stretched) = (1.0 / p, 1.0 / (*factor as f32 * p));
                    stretched * ramp + kept * (1.0 - ramp)
                };
                (powers(self.theta).into_iter().enumerate().map(blend).collect(), *attention)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let original = *original as f64;
                let stretch = |f: f32| {
                    let wavelength = 2.0 * std::f64::consts::PI / f64::from(f);
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / *factor as f32
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        ((1.0 - smooth) * f64::from(f) / factor + smooth * f64::from(f)) as f32
                    }
                };
                (inverse(self.theta).into_iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::LongRope { short, long, original, attention } => {
                (divided(if length > *original { long } else { short }), *attention)
            }
        };
        Frequencies { inv_freq, attention: attention as f32 }
    }
}

/// Frequencies of one sequence: the rotation by position.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Angle per position, one for each pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cosines and sines (1 but for YaRN and LongRoPE).
    pub attention: f32,
}

impl Frequencies {
    /// Tells these frequencies from others.
    pub(crate) fn digest(&self) -> String {
        let numbers = self.inv_freq.iter().chain([&self.attention]);
        let hash = numbers.fold(Sha256::new(), |hash, x| hash.chain_update(x.to_le_bytes()));
        hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }

    /// The cosines, then the sines of `position`.
    fn angles(&self, position: usize) -> Vec<f32> {
        let mut angles = vec![0.0; self.rotary_dim()];
        self.angles_into(position, &mut angles);
        angles
    }
}

impl Rotary for Frequencies {
    /// Both times the attention factor.
    fn angles_into(&self, position: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.inv_freq.len());
        for ((f, cos), sin) in self.inv_freq.iter().zip(cos).zip(sin) {
            // The angle is rounded to f32 as in the reference; its cosine is exact.
            let (s, c) = f64::from(position as f32 * f).sin_cos();
            *cos = c as f32 * self.attention;
            *sin = s as f32 * self.attention;
        }
    }

    fn rotate(&self, position: usize, x: &mut [f32]) {
        rotate(&self.angles(position), x);
    }

    fn unrotate(&self, position: usize, x: &mut [f32]) {
        let mut angles = self.angles(position);
        // Rotation by the negative angle; the attention factor, squared in cos^2 + sin^2, is divided out.
        let square = self.attention * self.attention;
        let half = self.inv_freq.len();
        for (i, a) in angles.iter_mut().enumerate() {
            *a /= if i < half { square } else { -square };
        }
        rotate(&angles, x);
    }

    fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }
}

/// Rotates one head vector in place; `angles` are its cosines, then its sines.
#[inline]
pub(crate) fn rotate(angles: &[f32], x: &mut [f32]) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    let (first, rest) = x.split_at_mut(half);
    for (((a, b), c), s) in first.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// [`rotate`] from one slice to another.
#[inline]
pub(crate) fn rotate_into(angles: &[f32], x: &[f32], out: &mut [f32]) {
    let (half, dim) = (angles.len() / 2, angles.len());
    let (cos, sin) = angles.split_at(half);
    let (first, second) = (&x[..half], &x[half..dim]);
    let (out_first, out_rest) = out.split_at_mut(half);
    let (out_second, out_pass) = out_rest.split_at_mut(half);
    for i in 0..half {
        out_first[i] = first[i] * cos[i] - second[i] * sin[i];
        out_second[i] = second[i] * cos[i] + first[i] * sin[i];
    }
    out_pass.copy_from_slice(&x[dim..]);
}

/// A model's rotary embedding with the frequencies that do not change kept ready.
#[derive(Debug)]
pub(crate) struct Rope {
    config: RopeConfig,
    /// Frequencies within the pretrained context, or of every length where they do not depend on it.
    short: OnceLock<Arc<Frequencies>>,
    /// LongRoPE's frequencies beyond.
    long: OnceLock<Arc<Frequencies>>,
}

impl Rope {
    pub(crate) fn new(config: RopeConfig) -> Self {
        Self { config, short: OnceLock::new(), long: OnceLock::new() }
    }

    /// The rotation of a sequence that is going to have `length` tokens.
    pub(crate) fn for_length(&self, length: usize) -> Arc<Frequencies> {
        let make = || Arc::new(self.config.frequencies(length));
        let slot = match self.config.scaling {
            RopeScaling::Dynamic { .. } if length > self.config.max_position => return make(),
            RopeScaling::LongRope { original, .. } if length > original => &self.long,
            _ => &self.short,
        };
        slot.get_or_init(make).clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 1e4, rotary_dim: 16, max_position: 64, scaling }
    }

    #[test]
    fn plain_frequencies() {
        let f = config(RopeScaling::None).frequencies(10);
        for (j, got) in f.inv_freq.iter().enumerate() {
            let want = 1e4f64.powf(-(j as f64) / 8.0);
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn unrotate_is_the_inverse_with_an_attention_factor_too() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original: 16,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention: RopeScaling::yarn_attention(4.0, 0.0, 0.0),
        };
        let f = config(scaling).frequencies(50);
        assert!(f.attention > 1.1);
        // 20 numbers: the last four pass through.
        let x: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut y = x.clone();
        f.rotate(37, &mut y);
        assert_eq!(y[16..], x[16..]);
        let norm = |v: &[f32]| v[..16].iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm(&y) / norm(&x) - f.attention).abs() < 1e-5);
        let mut out = vec![0.0; 20];
        rotate_into(&f.angles(37), &x, &mut out);
        assert_eq!(out, y);
        f.unrotate(37, &mut y);
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn length_chooses_factors() {
        let scaling = RopeScaling::LongRope {
            short: vec![1.0; 8],
            long: vec![2.0; 8],
            original: 32,
            attention: RopeScaling::longrope_attention(2.0, 32),
        };
        let rope = Rope::new(config(scaling));
        assert_eq!(rope.for_length(32).inv_freq[0], 1.0);
        assert_eq!(rope.for_length(33).inv_freq[0], 0.5);
        assert_eq!(rope.for_length(1).inv_freq[0], 1.0);

        let rope = Rope::new(config(RopeScaling::Dynamic { factor: 2.0 }));
        let plain = config(RopeScaling::None).frequencies(0);
        assert_eq!(*rope.for_length(64), plain);
        let longer = rope.for_length(128);
        // theta * 3^(16/14) at twice the context.
        let want = (1e4 * 3f64.powf(16.0 / 14.0)).powf(-14.0 / 16.0);
        assert!((f64::from(longer.inv_freq[7]) / want - 1.0).abs() < 1e-6);
        assert_eq!(rope.for_length(64).inv_freq, plain.inv_freq);
    }
}
