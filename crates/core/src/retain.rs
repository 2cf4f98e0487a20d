//! Token retention: which tokens of a pair are too distinct to merge (MiniCache, section 4.2 and Figure 2b).

use crate::Result;
use crate::archive::Archive;
use crate::settings::{Retention, RetentionRule};

/// The rule with its running extremes, for one side of one pair (and one head, with head granularity).
#[derive(Debug, Clone)]
pub(crate) struct Retainer {
    rule: RetentionRule,
    gamma: f32,
    min: f32,
    max: f32,
    /// `top_fraction`: the least distance retained so far.
    least: f32,
    /// Tokens that have taken part.
    seen: u32,
    /// Tokens after which its state was last another one, or a step of several ended: it can go back so far.
    settled: u32,
}

/// The least and the largest distance, and the least retained, of no tokens.
const NONE: [f32; 3] = [f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY];

impl Retainer {
    pub(crate) fn new(retention: &Retention) -> Self {
        let [min, max, least] = NONE;
        let (rule, gamma) = (retention.rule, retention.gamma as f32);
        Self { rule, gamma, min, max, least, seen: 0, settled: 0 }
    }

    /// Whether it can go back to its first `tokens` tokens: where those after them, one by one, have changed nothing.
    pub(crate) fn can_truncate(&self, tokens: usize) -> bool {
        tokens == 0 || tokens >= self.settled as usize
    }

    /// Forgets the tokens after the first `tokens`.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.seen = self.seen.min(tokens as u32);
        if tokens == 0 {
            [self.min, self.max, self.least] = NONE;
            self.settled = 0;
        }
    }

    pub(crate) fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        for number in [&mut self.min, &mut self.max, &mut self.least] {
            archive.number(number)?;
        }
        archive.number(&mut self.seen)?;
        archive.number(&mut self.settled)
    }

    fn note(&mut self, tokens: usize, before: [f32; 3]) {
        self.seen += tokens as u32;
        if tokens > 1 || before != [self.min, self.max, self.least] {
            self.settled = self.seen;
        }
    }

    /// Which tokens of one step, with distances d in 0..=1, are retained. Extremes run over everything seen so far,
    /// this step included. `top_fraction` ranks within a step of several tokens; a single new token is retained if
    /// it is more distinct than the least distinct retained one.
    pub(crate) fn step(&mut self, distances: &[f32], out: &mut [bool]) {
        let before = [self.min, self.max, self.least];
        self.mark(distances, out);
        self.note(distances.len(), before);
    }

    fn mark(&mut self, distances: &[f32], out: &mut [bool]) {
        for &d in distances {
            self.min = self.min.min(d);
            self.max = self.max.max(d);
        }
        // Compared as differences, so that gamma = 1 keeps all but the extreme itself whatever the rounding.
        let span = self.gamma * (self.max - self.min);
        match self.rule {
            RetentionRule::MostDistinct => mark(distances, out, |d| self.max - d < span),
            RetentionRule::AsPrinted => mark(distances, out, |d| d - self.min < span),
            RetentionRule::TopFraction if distances.len() == 1 => {
                out[0] = self.gamma > 0.0 && distances[0] > self.least;
            }
            RetentionRule::TopFraction => {
                let keep = (f64::from(self.gamma) * distances.len() as f64 + 1e-9).floor() as usize;
                let mut order: Vec<usize> = (0..distances.len()).collect();
                order.sort_by(|&i, &j| distances[j].total_cmp(&distances[i]).then(i.cmp(&j)));
                out.fill(false);
                for &i in &order[..keep.min(order.len())] {
                    out[i] = true;
                    self.least = self.least.min(distances[i]);
                }
            }
        }
    }
}

fn mark(distances: &[f32], out: &mut [bool], keep: impl Fn(f32) -> bool) {
    for (o, &d) in out.iter_mut().zip(distances) {
        *o = keep(d);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rule: RetentionRule, gamma: f64, d: &[f32]) -> Vec<usize> {
        let mut r = Retainer::new(&Retention { rule, gamma, joint: false });
        let mut out = vec![false; d.len()];
        r.step(d, &mut out);
        out.iter().enumerate().filter(|(_, k)| **k).map(|(i, _)| i).collect()
    }

    const D: [f32; 6] = [0.1, 0.5, 0.48, 0.2, 0.3, 0.12];

    #[test]
    fn rules_keep_what_they_say() {
        assert_eq!(run(RetentionRule::MostDistinct, 0.1, &D), [1, 2]);
        assert_eq!(run(RetentionRule::MostDistinct, 0.0, &D), [0usize; 0]);
        assert_eq!(run(RetentionRule::AsPrinted, 0.1, &D), [0, 5]);
        assert_eq!(run(RetentionRule::TopFraction, 0.5, &D), [1, 2, 4]);
        assert_eq!(run(RetentionRule::TopFraction, 1.0, &D).len(), 6);
        // The printed inequality is strict: gamma = 1 keeps all but the very extreme.
        assert_eq!(run(RetentionRule::MostDistinct, 1.0, &D).len(), 5);
    }

    #[test]
    fn decode_uses_running_extremes() {
        let mut r = Retainer::new(&Retention { gamma: 0.1, ..Retention::default() });
        let mut out = vec![false; 6];
        r.step(&D, &mut out);
        let mut one = [false];
        r.step(&[0.47], &mut one);
        assert!(one[0]);
        r.step(&[0.9], &mut one);
        assert!(one[0]);
        r.step(&[0.5], &mut one);
        assert!(!one[0], "the maximum has moved to 0.9");
    }
}
