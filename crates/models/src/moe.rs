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
                minicache_core::kernels::loops::add_scaled(
                    row,
                    *weight,
                    &mut out[token * width..(token + 1) * width],
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_scores_win_and_weights_sum_to_one() {
        let experts = Experts { count: 4, used: 2 };
        let scores = [0.0, 3.0, 1.0, 2.0, /**/ 5.0, -1.0, -2.0, 5.0];
        let routing = Routing::new(&scores, experts);
        let numbers: Vec<usize> = routing.chosen.iter().map(|(e, _)| *e).collect();
        assert_eq!(numbers, [0, 1, 3]);
        let of = |e: usize, token: usize| {
            let (_, tokens) = routing.chosen.iter().find(|(n, _)| *n == e).unwrap();
            tokens.iter().find(|(t, _)| *t == token).unwrap().1
        };
        // Softmax over all, restricted to the two and rescaled, is the softmax of the two.
        assert!((of(1, 0) - 1.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
        assert!((of(1, 0) + of(3, 0) - 1.0).abs() < 1e-6);
        assert_eq!((of(0, 1), of(3, 1)), (0.5, 0.5));
    }

    #[test]
    fn only_chosen_experts_are_computed_and_only_on_their_tokens() {
        let routing = Routing::new(&[9.0, 0.0, 8.0, 0.0, 9.0, 1.0], Experts { count: 3, used: 1 });
        let x = [1.0, 2.0, 10.0, 20.0];
        let mut out = [0.5; 4];
        let mut calls = Vec::new();
        let expert = |e: usize, rows: &[f32], n: usize, result: &mut [f32]| {
            calls.push((e, n, rows.to_vec()));
            result.iter_mut().zip(rows).for_each(|(r, x)| *r = x * (e + 1) as f32);
            Ok(())
        };
        routing.apply(&x, 2, &mut out, expert).unwrap();
        assert_eq!(calls, [(0, 1, vec![1.0, 2.0]), (1, 1, vec![10.0, 20.0])]);
        assert_eq!(out, [1.5, 2.5, 20.5, 40.5]);
    }
}
