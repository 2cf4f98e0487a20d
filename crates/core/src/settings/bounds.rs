//! How large numbers in settings may be: far above anything that is run, and far below what overflows when sizes are
//! multiplied or what could never be allocated. Beyond them a setting is a mistake, and said to be one.

use std::ops::RangeInclusive;

use super::{Checked, SettingError};

/// Tokens of a sequence, of a window or of a text.
pub const MOST_TOKENS: usize = 1 << 24;
/// Compression that can be asked for.
pub const MOST_RATIO: f64 = 1000.0;

/// Checks a number against what is allowed.
///
/// # Errors
/// Names the key and the bounds.
pub fn check_number<T: PartialOrd + std::fmt::Display>(
    key: &str,
    number: T,
    allowed: RangeInclusive<T>,
) -> Checked {
    if allowed.contains(&number) {
        return Ok(());
    }
    let (low, high) = (allowed.start(), allowed.end());
    let message = if number < *low {
        format!("must be at least {low}, not {number}")
    } else {
        format!("must be at most {high}, not {number}")
    };
    Err(SettingError::new(key, message))
}

/// Checks a share.
pub fn check_unit(key: &str, x: f64) -> Checked {
    if (0.0..=1.0).contains(&x) {
        Ok(())
    } else {
        Err(SettingError::new(key, format!("must be within 0 to 1, not {x}")))
    }
}

/// Checks a size of quantisation groups.
pub(crate) fn check_group(key: &str, group: usize) -> Checked {
    if [32, 64, 128].contains(&group) {
        Ok(())
    } else {
        Err(SettingError::new(key, format!("must be 32, 64 or 128, not {group}")))
    }
}

/// Checks the bits to which queries and probabilities are rounded before they meet packed codes.
pub(crate) fn check_activation_bits(bits: Option<u8>) -> Checked {
    match bits {
        Some(bits) if ![8, 16, 24].contains(&bits) => {
            Err(SettingError::new("activation_bits", format!("must be 8, 16 or 24, not {bits}")))
        }
        _ => Ok(()),
    }
}
