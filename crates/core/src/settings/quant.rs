//! How numbers are kept: types, quantisation, and how many tokens.

use super::bounds::{MOST_TOKENS, check_group, check_number};
use super::{Checked, SettingError};

/// Along which axis a quantisation group runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Axis {
    /// One channel over `group` tokens shares scale and zero.
    Channel,
    /// `group` channels of one token share scale and zero.
    Token,
}

/// Asymmetric round-to-nearest quantisation in groups, f16 scale and zero per group.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Quant {
    /// Bits per number: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale and a zero: 32, 64 or 128. Along channels a group ends with its head, so the
    /// last group of a head may be shorter (head_dim 80 in groups of 32: 32 + 32 + 16).
    pub group: usize,
    /// Newest tokens kept in full precision.
    pub residual: usize,
    /// Axis of keys; by default the method's (KIVI: channel, RTN: token).
    pub keys: Option<Axis>,
    /// Axis of values; by default token.
    pub values: Option<Axis>,
    /// Whether retained tokens are quantised too.
    pub retained: bool,
}

impl Default for Quant {
    fn default() -> Self {
        Self { bits: 4, group: 32, residual: 32, keys: None, values: None, retained: false }
    }
}

impl Quant {
    pub(crate) fn validate(&self) -> Checked {
        if ![2, 3, 4, 8].contains(&self.bits) {
            return Err(SettingError::new("bits", format!("must be 2, 3, 4 or 8, not {}", self.bits)));
        }
        check_group("group", self.group)?;
        check_number("residual", self.residual, 0..=MOST_TOKENS)
    }
}

/// Storage type of what is not quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum StoreType {
    /// IEEE half precision.
    #[default]
    F16,
    /// IEEE single precision, for parity runs.
    F32,
}

impl StoreType {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            StoreType::F16 => 2,
            StoreType::F32 => 4,
        }
    }
}

/// A number of tokens, or a share of the prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(untagged))]
pub enum Budget {
    /// This many tokens.
    Tokens(usize),
    /// This share of the prompt's tokens, below 1.
    Fraction(f64),
}

impl Budget {
    pub(crate) fn validate(self, key: &str) -> Checked {
        match self {
            Budget::Fraction(f) if !(0.0..1.0).contains(&f) => {
                let message = format!(
                    "a fraction must be at least 0 and below 1, not {f}; give whole tokens as an integer"
                );
                Err(SettingError::new(key, message))
            }
            Budget::Fraction(_) => Ok(()),
            Budget::Tokens(n) => check_number(key, n, 0..=MOST_TOKENS),
        }
    }

    /// Tokens for a prompt of `prompt` tokens.
    pub fn resolve(self, prompt: usize) -> usize {
        match self {
            Budget::Tokens(n) => n,
            Budget::Fraction(f) => (f * prompt as f64).round() as usize,
        }
    }
}
