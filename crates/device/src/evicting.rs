//! Methods that drop tokens: which positions a step ranks and how many of them stay, as numbers that kernels read. What the
//! host's `Evict` says of one KV head is said here of all, so that how many each holds is known, or bounded, without asking
//! the device.

use std::ops::Range;

use minicache_core::CacheSpec;
use minicache_core::settings::{Budget, ModelShape};

/// Which tokens stay.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Evicting {
    /// The first tokens and recent ones (StreamingLLM).
    Sinks { sinks: usize, recent: Budget },
    /// Recent tokens and those that have received most attention.
    H2o { recent: Budget, heavy: Budget },
    /// Of the prompt its last tokens and those that these look at most; everything later.
    SnapKv { kept: Budget, window: usize, kernel: usize },
    /// Of the prompt the first tokens and those that queries to come are expected to look at most; everything later.
    Expected { kept: Budget, sinks: usize, future: usize },
}

/// What a step drops: of the tokens at `ranked`, all but the `most` with the highest score, which is the attention
/// received from the step's rows `counted`, with that of earlier steps where it is remembered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ranking {
    pub(crate) ranked: Range<usize>,
    pub(crate) most: usize,
    pub(crate) counted: Range<usize>,
}

impl Evicting {
    /// What `spec` drops; `None` of methods that keep every token.
    pub(crate) fn of(spec: &CacheSpec) -> Option<Self> {
        match spec {
            CacheSpec::Sinks(s) => Some(Self::Sinks { sinks: s.sinks, recent: s.recent }),
            CacheSpec::H2o(s) => Some(Self::H2o { recent: s.recent, heavy: s.heavy }),
            CacheSpec::SnapKv(s) => Some(Self::SnapKv { kept: s.kept, window: s.window, kernel: s.kernel }),
            CacheSpec::ExpectedAttention(s) => {
                Some(Self::Expected { kept: s.kept, sinks: s.sinks, future: s.future })
            }
            _ => None,
        }
    }

    /// Whether a step of `tokens` tokens after `len` is a prompt of which tokens go by what is expected of them.
    pub(crate) fn expects(&self, len: usize, tokens: usize) -> bool {
        matches!(*self, Self::Expected { kept, sinks, .. } if len == 0 && tokens > kept.resolve(tokens).max(sinks))
    }

    /// Whether the attention received is kept beside the tokens and goes on from step to step.
    pub(crate) fn remembers(&self) -> bool {
        matches!(self, Self::H2o { .. })
    }

    /// Candidates next to each other that a score is summed over.
    pub(crate) fn kernel(&self) -> usize {
        match self {
            Self::SnapKv { kernel, .. } => *kernel,
            _ => 1,
        }
    }

    /// Whether single tokens are ranked by the attention that they receive, so that their scores are worth keeping.
    pub(crate) fn ranks_single_rows(&self) -> bool {
        self.remembers()
    }

    /// What a step of `tokens` tokens after `len` drops.
    pub(crate) fn ranking(&self, len: usize, tokens: usize) -> Ranking {
        let seen = len + tokens;
        let before = |recent: Budget| seen.saturating_sub(recent.resolve(seen).max(1));
        let none = Ranking { ranked: 0..0, most: 0, counted: tokens..tokens };
        match *self {
            Self::Sinks { sinks, recent } => {
                let end = before(recent);
                Ranking { ranked: sinks.min(end)..end, ..none }
            }
            Self::H2o { recent, heavy } => {
                Ranking { ranked: 0..before(recent), most: heavy.resolve(seen), counted: 0..tokens }
            }
            Self::SnapKv { kept, window, .. } if len == 0 => Ranking {
                ranked: 0..seen.saturating_sub(window),
                most: kept.resolve(seen).saturating_sub(window),
                counted: tokens.saturating_sub(window)..tokens,
            },
            Self::Expected { kept, sinks, .. } if self.expects(len, tokens) => {
                Ranking { ranked: sinks..seen, most: kept.resolve(seen).saturating_sub(sinks), ..none }
            }
            Self::SnapKv { .. } | Self::Expected { .. } => none,
        }
    }

    /// How many tokens a KV head of `layer` holds after a step of `tokens` tokens after `len`, if it held at most `held`
    /// before: at most. It is their number but where a sliding window takes tokens that were kept for their scores.
    pub(crate) fn held(
        &self,
        shape: &ModelShape,
        layer: usize,
        (len, tokens): (usize, usize),
        held: usize,
    ) -> usize {
        let Ranking { ranked, most, .. } = self.ranking(len, tokens);
        let (start, seen) = (shape.first_seen(layer, len + tokens), len + tokens);
        let ranked = ranked.end.saturating_sub(ranked.start.max(start));
        let unranked = (seen - start.min(seen)).saturating_sub(ranked);
        (held + tokens).min(unranked + ranked.min(most))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// By definition, position by position, without scores: the oldest of the ranked stay.
    fn by_hand(spec: &Evicting, shape: &ModelShape, steps: &[usize]) -> Vec<usize> {
        let (mut held, mut len, mut counts) = (Vec::<usize>::new(), 0, Vec::new());
        for &tokens in steps {
            held.extend(len..len + tokens);
            let Ranking { ranked, most, .. } = spec.ranking(len, tokens);
            let mut left = most;
            held.retain(|p| {
                let stays = !ranked.contains(p) || left > 0;
                left -= usize::from(stays && ranked.contains(p));
                stays
            });
            len += tokens;
            held.retain(|&p| p >= shape.first_seen(0, len));
            counts.push(held.len());
        }
        counts
    }

    #[test]
    fn the_number_held_is_known_without_a_window_and_bounded_with_one() {
        let steps = [70, 1, 1, 12, 1, 1, 1, 30, 1, 1];
        let methods = [
            "{ method = \"sinks\", sinks = 3, recent = 17 }",
            "sinks",
            "{ method = \"h2o\", recent = 9, heavy = 11 }",
            "h2o",
            "{ method = \"h2o\", recent = 0.3, heavy = 0.33 }",
            "snapkv",
            "{ method = \"snapkv\", kept = 20, window = 8, kernel = 3 }",
            "expected_attention",
        ];
        for (text, window) in methods.iter().flat_map(|m| [(m, None), (m, Some(25))]) {
            let spec = Evicting::of(&CacheSpec::parse(text).unwrap()).unwrap();
            let shape = ModelShape { layers: 1, window, ..ModelShape::PLAIN };
            let (mut held, mut len) = (0, 0);
            for (&tokens, exact) in steps.iter().zip(by_hand(&spec, &shape, &steps)) {
                held = spec.held(&shape, 0, (len, tokens), held);
                len += tokens;
                let sinks = matches!(spec, Evicting::Sinks { .. });
                if window.is_none() || sinks {
                    assert_eq!(held, exact, "{text} at {len}");
                } else {
                    assert!(held >= exact && held <= 24, "{text} at {len}: {held} for {exact}");
                }
            }
        }
    }
}
