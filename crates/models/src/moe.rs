//! Sparse mixture of experts: every token is sent to its top-k experts, and only those are computed.

use crate::Result;
use crate::config::Experts;

/// Which tokens go to which expert.
#[derive(Debug, PartialEq)]
pub(crate) struct Routing {
    /// For each expert that any token chose: its number, and (token, weight) of each of its tokens, ascending.
    pub(crate) chosen: Vec<(usize, Vec<(usize, f32)>)>,
}

impl Routing {
    /// Routes tokens by their router scores `(tokens, experts)`: softmax over all experts, the `used` largest
    /// probabilities, rescaled to sum to one (Mixtral). Of equal scores the lower expert wins.
    pub(crate) fn new(scores: &[f32], experts: Experts) -> Self {
        let mut by_expert: Vec<Vec<(usize, f32)>> = vec![Vec::new(); experts.count];
        let mut order: Vec<usize> = Vec::with_capacity(experts.count);
        for (token, scores) in scores.chunks_exact(experts.count).enumerate() {
            order.clear();
            order.extend(0..experts.count);
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            let top = &order[..experts.used];
            // Rescaling cancels the softmax's denominator.
            let largest = scores[top[0]];
            let total: f32 = top.iter().map(|e| (scores[*e] - largest).exp()).sum();
            for expert in top {
                by_expert[*expert].push((token, (scores[*expert] - largest).exp() / total));
            }
        }
        let chosen = by_expert.into_iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()).collect();
        Self { chosen }
    }

    /// Adds to `out` (tokens, width), for each expert's tokens, the weighted result of `expert` on their rows of `x`
    /// (tokens, width).
    ///
    /// `expert(number, rows, n, result)` reads `rows` (n, width) and overwrites `result` (n, width).
    pub(crate) fn apply(
        &self,
        x: &[f32],
        width: usize,
        out: &mut [f32],
        mut expert: impl FnMut(usize, &[f32], usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (mut rows, mut result) = (Vec::new(), Vec::new());
        for (number, tokens) in &self.chosen {
            rows.clear();
            for (token, _) in tokens {
                rows.extend_from_slice(&x[token * width..(token + 1) * width]);
            }
            result.resize(rows.len(), 0.0);
            expert(*number, &rows, tokens.len(), &mut result)?;
            for ((token, weight), row) in tokens.iter().zip(result.chunks_exact(width)) {
                crate::linear::simd::add_scaled(row, *weight, &mut out[token * width..(token + 1) * width]);
            }
        }
        Ok(())
    }
}
