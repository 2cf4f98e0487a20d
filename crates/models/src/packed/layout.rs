//! How quantised weights lie in memory.
//!
//! Rows (output features) are gathered into *panels* of [`PANEL`], inputs into *blocks* of [`BLOCK`]. Within a
//! block a 64-byte [`Line`] holds four consecutive inputs of all sixteen rows, row by row, so that one 512-bit
//! multiply-add instruction advances sixteen outputs and no horizontal sum is ever needed:
//!
//! ```text
//! byte 4 r + i of line g  =  code of row r, input 4 g + i                      (8-bit codes, 8 lines per block)
//! low / high nibble       =  code of row r, input 4 g + i / 16 + 4 g + i       (4-bit codes, 4 lines per block)
//! ```
//!
//! Codes are unsigned. The scales of the sixteen rows of a block are one [`Scales`] (two with a minimum).

use half::f16;

/// Inputs that share one scale.
pub const BLOCK: usize = 32;
/// Output rows that are stored side by side.
pub const PANEL: usize = 16;

/// One 512-bit register of codes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

impl Line {
    pub(super) const ZERO: Self = Self([0; 64]);
}

/// One f16 number for each row of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Scales(pub(super) [f16; PANEL]);

impl Scales {
    pub(super) const ZERO: Self = Self([f16::ZERO; PANEL]);
}

/// The number format of the weights; every one has blocks of 32 inputs, as the GGML formats of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4-bit codes q, weight d (q - 8).
    Q4_0,
    /// 4-bit codes q, weight d q + m.
    Q4_1,
    /// 8-bit codes q, weight d (q - 128): the signed bytes of Q8_0 shifted to be unsigned.
    Q8_0,
}

/// [`Format`] at compile time: what the kernels are specialised on.
pub(super) trait Layout {
    /// Two 4-bit codes to a byte, instead of one of 8 bits.
    const NIBBLES: bool;
    /// The code that stands for a weight of zero, where it is fixed.
    const ZERO: i32;
    /// A second scale per block and row is added to every weight.
    const MINIMUM: bool;
    /// [`Line`]s per block and panel.
    const LINES: usize = if Self::NIBBLES { 4 } else { 8 };
    /// [`Scales`] per block and panel.
    const SCALES: usize = if Self::MINIMUM { 2 } else { 1 };
}

pub(super) struct Q4Symmetric;
impl Layout for Q4Symmetric {
    const NIBBLES: bool = true;
    const ZERO: i32 = 8;
    const MINIMUM: bool = false;
}

pub(super) struct Q4Minimum;
impl Layout for Q4Minimum {
    const NIBBLES: bool = true;
    const ZERO: i32 = 0;
    const MINIMUM: bool = true;
}

pub(super) struct Q8Symmetric;
impl Layout for Q8Symmetric {
    const NIBBLES: bool = false;
    const ZERO: i32 = 128;
    const MINIMUM: bool = false;
}

/// Runs an expression with `$layout` bound to the [`Layout`] of a [`Format`].
macro_rules! with_layout {
    ($format:expr, $layout:ident => $body:expr) => {
        match $format {
            $crate::packed::layout::Format::Q4_0 => {
                type $layout = $crate::packed::layout::Q4Symmetric;
                $body
            }
            $crate::packed::layout::Format::Q4_1 => {
                type $layout = $crate::packed::layout::Q4Minimum;
                $body
            }
            $crate::packed::layout::Format::Q8_0 => {
                type $layout = $crate::packed::layout::Q8Symmetric;
                $body
            }
        }
    };
}
pub(super) use with_layout;

impl Format {
    /// Lines per block and panel.
    pub(super) fn lines(self) -> usize {
        with_layout!(self, L => L::LINES)
    }

    /// Scales per block and panel.
    pub(super) fn scales(self) -> usize {
        with_layout!(self, L => L::SCALES)
    }

    /// The code of a weight of zero (0 where the minimum decides).
    pub(super) fn zero(self) -> i32 {
        with_layout!(self, L => L::ZERO)
    }

    /// Bits stored per weight, scales included.
    pub fn bits_per_weight(self) -> f64 {
        (self.lines() * 64 + self.scales() * PANEL * 2) as f64 * 8.0 / (PANEL * BLOCK) as f64
    }
}

/// Writes the codes of one row of one block into the lines of its panel (four of nibbles or eight of bytes).
pub(super) fn put_codes(lines: &mut [Line], row: usize, codes: &[u8; BLOCK]) {
    let nibbles = lines.len() == Q4Minimum::LINES;
    for (g, line) in lines.iter_mut().enumerate() {
        for i in 0..4 {
            let (place, input) = (4 * row + i, 4 * g + i);
            line.0[place] =
                if nibbles { (codes[input] & 0xf) | (codes[16 + input] << 4) } else { codes[input] };
        }
    }
}

/// Reads back what [`put_codes`] wrote.
pub(super) fn get_codes(lines: &[Line], row: usize) -> [u8; BLOCK] {
    let nibbles = lines.len() == Q4Minimum::LINES;
    let mut codes = [0; BLOCK];
    for (g, line) in lines.iter().enumerate() {
        for i in 0..4 {
            let (byte, input) = (line.0[4 * row + i], 4 * g + i);
            if nibbles {
                codes[input] = byte & 0xf;
                codes[16 + input] = byte >> 4;
            } else {
                codes[input] = byte;
            }
        }
    }
    codes
}
