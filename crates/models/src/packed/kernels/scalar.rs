//! Portable Rust: the reference that the vector kernels are tested against.

use super::{Kernel, Panel, Tile};
use crate::packed::activations::ActivationBlock;
use crate::packed::layout::{Layout, PANEL, get_codes};

pub(in crate::packed) struct Scalar;

impl Kernel for Scalar {
    const PANELS: usize = 1;

    unsafe fn tile<L: Layout, const R: usize, const P: usize>(
        panels: [Panel<'_>; P],
        x: [&[ActivationBlock]; R],
        blocks: usize,
    ) -> Tile<R, P> {
        let mut out = [[[0.0; PANEL]; P]; R];
        for (p, panel) in panels.iter().enumerate() {
            for b in 0..blocks {
                let lines = &panel.lines[b * L::LINES..(b + 1) * L::LINES];
                let scales = &panel.scales[b * L::SCALES..(b + 1) * L::SCALES];
                for lane in 0..PANEL {
                    let codes = get_codes(lines, lane);
                    let d = scales[0].0[lane].to_f32();
                    let m = if L::MINIMUM { scales[1].0[lane].to_f32() } else { 0.0 };
                    for (out, x) in out.iter_mut().zip(&x) {
                        let x = &x[b];
                        let dot: i32 =
                            codes.iter().zip(x.quants()).map(|(&w, x)| i32::from(w) * i32::from(x)).sum();
                        let dot = dot + L::ZERO * x.negative_sum;
                        out[p][lane] += dot as f32 * x.scale * d + m * x.weighted_sum;
                    }
                }
            }
        }
        out
    }
}
