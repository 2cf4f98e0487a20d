//! Colours: Okabe and Ito's palette, told apart with every common colour vision, and greys.

use plotters::style::RGBColor;

use crate::figure::{MUTED_HUE, RAMP_HUE};

/// Text and axes.
pub(crate) const INK: RGBColor = RGBColor(0x1C, 0x20, 0x26);
/// Labels of lesser weight.
pub(crate) const MUTED: RGBColor = RGBColor(0x5F, 0x68, 0x75);
/// Grid lines.
pub(crate) const GRID: RGBColor = RGBColor(0xE3, 0xE6, 0xEA);
/// Background.
pub(crate) const PAPER: RGBColor = RGBColor(0xFF, 0xFF, 0xFE);

/// Okabe and Ito 2008, without black (ink takes its part) and with the yellow darkened for white paper.
const HUES: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0xA8, 0x96, 0x00),
];

/// The colour of a series.
pub(crate) fn hue(index: usize) -> RGBColor {
    match index {
        0 => INK,
        MUTED_HUE => MUTED,
        n if n >= RAMP_HUE => ramp((n - RAMP_HUE) as f64 / 255.0),
        n => HUES[(n - 1) % HUES.len()],
    }
}

/// From blue over green to red at medium lightness, so that all of it shows on light and dark paper.
const RAMP: [RGBColor; 5] = [
    RGBColor(0x2C, 0x6F, 0xBB),
    RGBColor(0x1C, 0x9A, 0xA0),
    RGBColor(0x5B, 0xA0, 0x55),
    RGBColor(0xB8, 0x92, 0x2B),
    RGBColor(0xC8, 0x55, 0x3D),
];

fn ramp(place: f64) -> RGBColor {
    let at = place.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let first = (at as usize).min(RAMP.len() - 2);
    let share = at - first as f64;
    let (a, b) = (RAMP[first], RAMP[first + 1]);
    let mix = |x: u8, y: u8| (f64::from(x) + (f64::from(y) - f64::from(x)) * share).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// The colour of a bar: ink is too heavy for areas.
pub(crate) fn area_hue(index: usize) -> RGBColor {
    if index == 0 { MUTED } else { hue(index) }
}

/// The colours of a figure as SVG writes them, and the CSS variables that stand for them in the page, where a dark
/// theme has other values.
pub(crate) fn variables() -> Vec<(String, String)> {
    let named = [("ink", INK), ("muted", MUTED), ("grid", GRID), ("paper", PAPER)];
    let hues = HUES.iter().enumerate().map(|(i, c)| (format!("hue-{}", i + 1), *c));
    let all = named.into_iter().map(|(n, c)| (n.to_string(), c)).chain(hues);
    all.map(|(name, RGBColor(r, g, b))| (format!("#{r:02X}{g:02X}{b:02X}"), format!("var(--fig-{name})")))
        .collect()
}
