//! `pairs = "auto"` and `group = "auto"`: which layers are merged or share latents, keys and values apart, by measured
//! loss per byte on calibration text.
//!
//! Every candidate compresses one thing only: the keys or the values of one pair of layers, or one side in groups of
//! one size at one rate. Its loss is the mean KL divergence from the full cache over the last eighth of a stretch of
//! text the rest of which it has compressed; its gain is the bytes that it holds less. Losses are taken to add
//! up, which they nearly do where they are small, that is, where the choice is.

use std::collections::BTreeSet;

use minicache_core::settings::{ChosenPairs, Group, LatentSide, MergeSides, Pairs, Rank};
use minicache_core::{CacheSpec, Latent, Sequence};
use minicache_models::Model;

use super::calibration::{CalibrationText, Corpus};
use super::predictions::{Sums, feed};
use super::prefill::Prefill;
use super::{Result, RunError};

/// Numbers of layers per latent that are tried.
pub(super) const GROUPS: [usize; 4] = [1, 2, 4, 8];
/// Mean bits per number that are tried for a side without a rate of its own.
const RATES: [f64; 5] = [1.5, 2.0, 2.5, 3.0, 4.0];
/// Stretches of text that candidates are measured on.
const WINDOWS: usize = 2;
/// Tokens of a stretch, at least.
const SHORTEST: usize = 16;
/// Bytes of full caches that are filled side by side.
const CACHES_BYTES: usize = 2 << 30;

/// What a candidate came to, over all stretches.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    /// Mean KL in nats.
    loss: f64,
    bytes: f64,
}

/// What has been measured for the choices of one model on one corpus.
#[derive(Debug, Default)]
pub struct Choices {
    /// By specification without its budget, on which no candidate depends.
    measured: Vec<(CacheSpec, Vec<Measured>)>,
}

impl Choices {
    /// `spec` with what it leaves to choice chosen for `model`, on text of `corpus`; both the same in every call.
    /// Latents must have their bases (see [`super::prepare_latents`]).
    ///
    /// # Errors
    /// Calibration text that is not there or too short; what the model and its caches meet.
    pub fn resolve(&mut self, model: &Model, spec: &CacheSpec, corpus: &Corpus<'_>) -> Result<CacheSpec> {
        let (Some(calibration), Some(ratio)) = (spec.calibration(), spec.budget_ratio()) else {
            return Ok(spec.clone());
        };
        let text = CalibrationText::read(calibration, model, corpus)?;
        let windows: Vec<&[u32]> = text.chunks().filter(|c| c.len() >= SHORTEST).take(WINDOWS).collect();
        if windows.is_empty() {
            let message =
                format!("calibration: no stretch of {SHORTEST} tokens to choose on; give a longer text");
            return Err(RunError::Asked(message));
        }
        let mut chooser = Chooser { model, spec, ratio, windows, known: self };
        match spec {
            CacheSpec::Latent(latent) => chooser.groups(latent),
            _ => chooser.pairs(spec.pairing().map_or(MergeSides::Both, |p| p.merge)),
        }
    }
}

struct Chooser<'a> {
    model: &'a Model,
    spec: &'a CacheSpec,
    /// Compression to reach.
    ratio: f64,
    windows: Vec<&'a [u32]>,
    known: &'a mut Choices,
}

impl Chooser<'_> {
    /// Bytes that the caches may come to on all stretches.
    fn budget(&self) -> f64 {
        let full: usize =
            self.windows.iter().map(|w| self.model.decoder.shape().full_bytes(w.len() - 1)).sum();
        full as f64 / self.ratio
    }

    /// Pairs of least loss per byte, until the budget is met or nothing is left to merge.
    fn pairs(&mut self, sides: MergeSides) -> Result<CacheSpec> {
        let layers = self.model.decoder.shape().layers;
        let with = |pairs: ChosenPairs| self.spec.clone().with_pairs(Pairs::Chosen(pairs));
        let merges = [sides.keys(), sides.values()];
        let mut candidates: Vec<(usize, usize)> = Vec::new();
        for (side, _) in merges.iter().enumerate().filter(|(_, merges)| **merges) {
            candidates.extend((0..layers.saturating_sub(1)).map(|first| (side, first)));
        }
        let mut specs = vec![with(ChosenPairs::default())];
        specs.extend(candidates.iter().map(|&(side, first)| {
            let mut lists = [Vec::new(), Vec::new()];
            lists[side].push(first);
            let [keys, values] = lists;
            with(ChosenPairs { keys, values })
        }));
        let measured = self.known(&specs)?;
        let (none, each) = (measured[0], &measured[1..]);
        let gain = |m: &Measured| (none.bytes - m.bytes).max(1.0);
        let price = |m: &Measured| (m.loss - none.loss).max(0.0) / gain(m);
        let mut order: Vec<usize> = (0..each.len()).collect();
        order.sort_by(|&i, &j| price(&each[i]).total_cmp(&price(&each[j])));
        let mut taken = [BTreeSet::new(), BTreeSet::new()];
        let (mut bytes, budget) = (none.bytes, self.budget());
        for i in order {
            let (side, first) = candidates[i];
            if bytes <= budget {
                break;
            }
            // A layer is in one pair at most.
            if taken[side].range(first.saturating_sub(1)..=first + 1).next().is_none() {
                taken[side].insert(first);
                bytes -= gain(&each[i]);
            }
        }
        let [keys, values] = taken.map(|side| side.into_iter().collect());
        Ok(with(ChosenPairs { keys, values }))
    }

    /// The size of groups and the rate of each side that lose least together within the budget; what holds fewest bytes
    /// where nothing is within it.
    fn groups(&mut self, latent: &Latent) -> Result<CacheSpec> {
        let sides = [&latent.k, &latent.v].map(|side| self.candidates(side));
        let exact = sides.each_ref().map(|side| LatentSide {
            group: side[0].group,
            heads: side[0].heads,
            rank: Rank::Fraction(1.0),
            rate: None,
            bits: 16,
            ..LatentSide::default()
        });
        let with = |k: &LatentSide, v: &LatentSide| {
            CacheSpec::Latent(Latent { k: k.clone(), v: v.clone(), ..latent.clone() })
        };
        let mut specs = vec![with(&exact[0], &exact[1])];
        specs.extend(sides[0].iter().map(|k| with(k, &exact[1])));
        specs.extend(sides[1].iter().map(|v| with(&exact[0], v)));
        let measured = self.known(&specs)?;
        let none = measured[0];
        let (of_keys, of_values) = measured[1..].split_at(sides[0].len());
        let budget = self.budget();
        let pairs =
            sides[0].iter().zip(of_keys).flat_map(|k| sides[1].iter().zip(of_values).map(move |v| (k, v)));
        let ranked = pairs.map(|((k, of_key), (v, of_value))| {
            let bytes = of_key.bytes + of_value.bytes - none.bytes;
            let over = (bytes - budget).max(0.0);
            (over, of_key.loss + of_value.loss, with(k, v))
        });
        let best = ranked.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        Ok(best.map_or_else(|| self.spec.clone(), |b| b.2))
    }

    /// What one side may become.
    fn candidates(&self, side: &LatentSide) -> Vec<LatentSide> {
        let layers = self.model.decoder.shape().layers;
        if side.group != Group::Auto {
            return vec![side.clone()];
        }
        let rates = side.rate.map_or_else(|| RATES.to_vec(), |rate| vec![rate]);
        let groups = GROUPS.into_iter().filter(|g| *g <= layers);
        let with = |group, rate| LatentSide { group: Group::Layers(group), rate: Some(rate), ..side.clone() };
        groups.flat_map(|group| rates.iter().map(move |&rate| with(group, rate))).collect()
    }

    /// As [`Self::measure`], once for all budgets.
    fn known(&mut self, specs: &[CacheSpec]) -> Result<Vec<Measured>> {
        let asked = self.spec.clone().with_budget_ratio(1.0);
        if let Some((_, measured)) = self.known.measured.iter().find(|(spec, _)| *spec == asked) {
            return Ok(measured.clone());
        }
        let measured = self.measure(specs)?;
        self.known.measured.push((asked, measured.clone()));
        Ok(measured)
    }

    fn measure(&self, specs: &[CacheSpec]) -> Result<Vec<Measured>> {
        let mut out = vec![Measured::default(); specs.len()];
        let mut predictions = 0;
        for tokens in &self.windows {
            let prompt = tokens.len() * 7 / 8;
            let fed = prompt..tokens.len() - 1;
            predictions += fed.len();
            let prefill = Prefill::new(self.model, &tokens[..prompt], tokens.len(), None)?;
            let full = self.model.decoder.shape().full_bytes(tokens.len());
            let batch = (CACHES_BYTES / full.max(1)).max(2) - 1;
            for (specs, out) in specs.chunks(batch).zip(out.chunks_mut(batch)) {
                let reference = CacheSpec::default();
                let specs: Vec<&CacheSpec> = std::iter::once(&reference).chain(specs).collect();
                let mut sequences: Vec<Sequence> = Vec::with_capacity(specs.len());
                for spec in &specs {
                    sequences.push(self.model.sequence(spec, tokens.len())?);
                }
                prefill.fill(&mut sequences, &specs)?;
                let mut sums = vec![Sums::default(); sequences.len()];
                let text = |_: usize| &tokens[fed.start..=fed.end];
                let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
                feed(self.model, &mut all, specs.len(), &text, &mut sums, &|_| ())?;
                for ((out, sum), sequence) in out.iter_mut().zip(&sums[1..]).zip(&sequences[1..]) {
                    out.loss += sum.kl;
                    out.bytes += sequence.footprint().total() as f64;
                }
            }
        }
        out.iter_mut().for_each(|m| m.loss /= predictions.max(1) as f64);
        Ok(out)
    }
}
