//! How codes of single tokens lie, for a backend that has such codes elsewhere.

use std::ops::Range;

use super::layout::Scaling;
use super::normal::{UNIFORM, middle};
use super::trellis::MIDDLE;
use super::{Block, Store};

/// How a head's codes lie in a block whose tokens each have scales of their own: the strips of all sections, then for each
/// section the scales of all tokens, and where there are some their zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct CodeLayout {
    /// By channel.
    pub sections: Vec<SectionLayout>,
    /// The first byte of the scales.
    pub scales_at: usize,
    /// Scales are bytes, the upper ones of an f16 shifted by one bit, and zero is in the middle of the codes; else a scale
    /// is an f16 and has a zero.
    pub centred: bool,
}

/// Consecutive channels with the same number of bits, and a scale of their own for each token.
#[derive(Debug, Clone, PartialEq)]
pub struct SectionLayout {
    /// The channels.
    pub channels: Range<usize>,
    /// Bits of a code.
    pub bits: u8,
    /// The first byte of the codes.
    pub codes: usize,
    /// Of centred codes: what the scale is of a root mean square of 1.
    pub unit: f32,
    /// Of centred codes: the code, or the level, that is zero.
    pub middle: f32,
    /// What the windows of a trellis stand for, see [`crate::store`].
    pub levels: Option<[u8; 64]>,
}

impl Store {
    /// How its codes lie; `None` of floats, of codes that share scales along tokens, and of levels with scales that are no
    /// bytes.
    pub fn code_layout(&self) -> Option<CodeLayout> {
        let Block::Codes(block) = &self.block else { return None };
        if matches!(block.scaling, Scaling::Channels | Scaling::Levels) {
            return None;
        }
        let sections = block.sections.iter().map(|section| {
            let table = block.levels(section.bits);
            let uniform = UNIFORM.iter().find(|u| u.0 == section.bits).map_or(1.0, |u| u.1);
            SectionLayout {
                channels: section.channels.clone(),
                bits: section.bits,
                codes: section.codes,
                unit: table.map_or(uniform, |table| table.unit),
                middle: if table.is_some() { f32::from(MIDDLE) } else { middle(section.bits) },
                levels: table.map(|table| table.levels),
            }
        });
        Some(CodeLayout {
            sections: sections.collect(),
            scales_at: block.head_bytes().0,
            centred: block.scaling.is_centred(),
        })
    }
}
