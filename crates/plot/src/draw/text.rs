//! Text: the fonts that ship with this crate, and how wide a line is in them.

use std::sync::LazyLock;

use ab_glyph::{Font, FontRef};
use plotters_backend::text_anchor::{HPos, VPos};

/// Subsets of Inter (SIL Open Font License, `assets/Inter-OFL.txt`), so that figures look the same on a machine
/// without fonts.
static REGULAR: &[u8] = include_bytes!("../../assets/Inter-Regular.otf");
static SEMI_BOLD: &[u8] = include_bytes!("../../assets/Inter-SemiBold.otf");

/// Font family of SVG text: a reader without Inter sees the system's own.
pub(crate) const FAMILY: &str = "Inter, system-ui, -apple-system, Segoe UI, sans-serif";

/// plotters' font size over the size of the em square, as its SVG backend has it.
pub(crate) const EM: f64 = 1.24;

#[allow(clippy::expect_used)] // the bytes are part of the program and tested
static FONTS: LazyLock<[FontRef<'static>; 2]> = LazyLock::new(|| {
    [REGULAR, SEMI_BOLD].map(|b| FontRef::try_from_slice(b).expect("the embedded font is whole"))
});

/// The embedded font.
pub(crate) fn font(bold: bool) -> FontRef<'static> {
    FONTS[usize::from(bold)].clone()
}

/// The height in pixels that makes the em square `em` pixels.
pub(crate) fn pixels(font: &FontRef<'static>, em: f64) -> f32 {
    let per_em = font.units_per_em().unwrap_or(1000.0);
    em as f32 * font.height_unscaled() / per_em
}

/// Width of `line` in pixels with an em square of `em` pixels.
pub(crate) fn width(line: &str, em: f64, bold: bool) -> f64 {
    let font = &FONTS[usize::from(bold)];
    let per_em = f64::from(font.units_per_em().unwrap_or(1000.0));
    line.chars().map(|c| advance(font, c)).sum::<f64>() * em / per_em
}

/// Width of a character in units of its font.
fn advance(font: &FontRef<'static>, c: char) -> f64 {
    f64::from(font.h_advance_unscaled(font.glyph_id(c)))
}

/// `line`, cut with an ellipsis where it is wider than `room`.
pub(crate) fn fitted(line: &str, em: f64, room: f64) -> String {
    if width(line, em, false) <= room {
        return line.to_string();
    }
    let font = &FONTS[0];
    let per_em = f64::from(font.units_per_em().unwrap_or(1000.0));
    // In the font's whole units, so that sums are exact.
    let mut units = advance(font, '…');
    let kept = line.char_indices().find(|&(_, c)| {
        units += advance(font, c);
        units * em / per_em > room
    });
    let kept = &line[..kept.map_or(line.len(), |(at, _)| at)];
    format!("{}…", kept.trim_end())
}

/// The share of its width that a line lies left of its anchor.
pub(crate) fn horizontal(anchor: HPos) -> f64 {
    match anchor {
        HPos::Left => 0.0,
        HPos::Center => 0.5,
        HPos::Right => 1.0,
    }
}

/// Ems from the anchor down to the baseline, as plotters' SVG backend places text.
pub(crate) fn baseline(anchor: VPos) -> f64 {
    match anchor {
        VPos::Top => 0.76,
        VPos::Center => 0.273,
        VPos::Bottom => -0.273,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fonts_have_what_figures_write() {
        for c in "AZaz09γµ−×·…⁻⁰¹²³⁹≤≥≈äé()".chars() {
            assert_ne!(font(false).glyph_id(c).0, 0, "{c}");
            assert_ne!(font(true).glyph_id(c).0, 0, "{c}");
        }
    }

    #[test]
    fn long_lines_are_cut() {
        assert_eq!(fitted("short", 12.0, 100.0), "short");
        let cut = fitted("a name that is far too long for its place", 12.0, 100.0);
        assert!(cut.ends_with('…') && width(&cut, 12.0, false) <= 100.0, "{cut}");
        assert_eq!(fitted("short", 12.0, 1.0), "…");
        // A name may be as long as a file.
        assert_eq!(fitted(&"a".repeat(5_000_000), 12.0, 100.0), fitted(&"a".repeat(100), 12.0, 100.0));
    }
}
