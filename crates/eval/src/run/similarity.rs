//! How alike the states of adjacent layers are (the paper's Figures 1a and 2b).
//!
//! For each sample, one prefill with an exact f32 cache; then for every pair of layers (l, l+1), for keys as cached
//! (after RoPE) and values:
//! * `token_cosine`: cosine of the states over all KV heads together, mean over tokens (the paper's measure);
//! * `head_cosine`: the same per KV head, mean over heads and tokens;
//! * `cka`: linear centred kernel alignment over tokens (Kornblith et al. 2019), which does not change when either
//!   layer's states are rotated: whether the layers share a subspace rather than a direction;
//! * `hidden_cosine`: cosine of the hidden states that enter the two layers, mean over tokens.
//!
//! Rows give mean and standard deviation over samples. By position the cosines are means over bins of tokens, for the
//! pairs that a merge from the start layer would take.

use std::time::Instant;

use candle_core::Tensor;
use minicache_config::python_json;
use minicache_core::CacheSpec;
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::numbers::{cosine, mean_std, number, seconds};
use super::work::Work;
use super::{Result, RunError};
use crate::store::{Row, Store, digest};
use crate::tasks::TextDoc;

/// Takes one measure.
type Read = fn(&Measure) -> Option<f64>;

/// What is measured.
pub(crate) const COLUMNS: &[&str] = &[
    "pair",
    "side",
    "position",
    "token_cosine",
    "token_cosine_std",
    "head_cosine",
    "head_cosine_std",
    "cka",
    "cka_std",
    "hidden_cosine",
    "hidden_cosine_std",
    "samples",
    "tokens",
    "seconds",
];

/// Bins of token positions.
const BINS: usize = 16;

const SIDES: [&str; 2] = ["key", "value"];

/// Measures of one pair of layers on one side, for one sample or one bin of its tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measure {
    pair: usize,
    side: usize,
    /// First position of the bin; absent for all tokens together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    position: Option<usize>,
    #[serde(with = "python_json::number")]
    token: f64,
    #[serde(with = "python_json::number")]
    head: f64,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "python_json::optional_number")]
    cka: Option<f64>,
    #[serde(with = "python_json::number")]
    hidden: f64,
}

/// One sample's measures.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sample {
    id: String,
    tokens: usize,
    seconds: f64,
    measures: Vec<Measure>,
}

/// Runs the cells of one task: by construction one, since a cache makes no difference here.
pub(crate) fn run(work: &Work<'_>, docs: &[TextDoc], store: &mut Store) -> Result<()> {
    for planned in work.cells {
        let settings = &work.experiment.similarity;
        let of = docs.iter().map(|d| digest(&(&d.id, &d.text))).collect();
        let mut samples = store.samples::<Sample>(&planned.key, of)?;
        let missing: Vec<usize> = (0..docs.len()).filter(|&at| !samples.has(at)).collect();
        let progress = work.progress(docs.len() * settings.tokens);
        progress.resume((docs.len() - missing.len()) * settings.tokens);
        for at in missing {
            work.stop.check()?;
            let doc = &docs[at];
            let start = Instant::now();
            let mut tokens = work.tokenizer()?.encode(&doc.text, true)?;
            tokens.truncate(settings.tokens);
            let mut sample =
                Sample { id: doc.id.clone(), tokens: tokens.len(), seconds: 0.0, measures: vec![] };
            if tokens.len() > 1 {
                let bins = settings.by_position.then(|| bin_width(settings.tokens));
                let states = States::of(work.model, &tokens)?;
                let pairing = planned.cell.cache.pairing().unwrap_or_default();
                let [pairs, _] = pairing.merged(states.layers.len());
                let binned: Vec<usize> = pairs.into_iter().map(|(a, _)| a).collect();
                sample.measures = states.measures(bins, &binned)?;
            }
            sample.seconds = start.elapsed().as_secs_f64();
            samples.put([(at, sample)])?;
            progress.add(settings.tokens);
        }
        samples.settle()?;
        let samples: Vec<Sample> = samples.iter().cloned().collect();
        if samples.iter().all(|s| s.measures.is_empty()) {
            return Err(RunError::Asked("no document has two tokens or more; choose another task".into()));
        }
        store.finish([(planned.key.clone(), rows(&samples))])?;
    }
    Ok(())
}

fn bin_width(tokens: usize) -> usize {
    tokens.div_ceil(BINS).max(1)
}

/// One row per pair, side and bin, over the samples that have it.
fn rows(samples: &[Sample]) -> Vec<Row> {
    let mut groups = std::collections::BTreeMap::<_, Vec<(&Sample, &Measure)>>::new();
    for sample in samples {
        for m in &sample.measures {
            groups.entry((m.position.is_some(), m.side, m.pair, m.position)).or_default().push((sample, m));
        }
    }
    // The rows of a cell were computed together, so each has the time of all.
    let all: f64 = samples.iter().map(|s| s.seconds).sum();
    groups
        .into_iter()
        .map(|((_, side, pair, position), group)| {
            let mut row = Row::new();
            let mut put = |column: &str, text: String| {
                row.insert(column.to_string(), text);
            };
            put("pair", pair.to_string());
            put("side", SIDES[side].to_string());
            put("position", position.map(|p| p.to_string()).unwrap_or_default());
            let measures: [(&str, Read); 4] = [
                ("token_cosine", |m| Some(m.token)),
                ("head_cosine", |m| Some(m.head)),
                ("cka", |m| m.cka),
                ("hidden_cosine", |m| Some(m.hidden)),
            ];
            for (column, of) in measures {
                let (mean, std) = mean_std(group.iter().filter_map(|(_, m)| of(m)));
                put(column, number(mean));
                put(&format!("{column}_std"), if mean.is_nan() { String::new() } else { number(std) });
            }
            put("samples", group.len().to_string());
            put("tokens", group.iter().map(|(s, _)| s.tokens).sum::<usize>().to_string());
            put("seconds", seconds(all));
            row
        })
        .collect()
}

/// States of one prefill.
struct States {
    /// Per layer: keys and values, each `(tokens, kv_heads * head_dim)`.
    layers: Vec<[Vec<f32>; 2]>,
    /// Per layer: the hidden states that enter it, `(tokens, hidden)`.
    hidden: Vec<Vec<f32>>,
    tokens: usize,
    head_dim: usize,
}

impl States {
    fn of(model: &Model, tokens: &[u32]) -> Result<Self> {
        let mut sequence = model.sequence(&CacheSpec::default().with_f32(), tokens.len())?;
        let shape = *sequence.shape();
        let mut hidden = vec![Vec::new(); shape.layers];
        let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::None };
        model.decoder.forward_observed(&mut [step], &mut |layer, x| hidden[layer] = x.to_vec())?;
        let layers = (0..shape.layers)
            .map(|layer| sequence.restored(layer).map(|r| [r.keys, r.values]))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self { layers, hidden, tokens: tokens.len(), head_dim: shape.head_dim })
    }

    /// All pairs over all tokens, then the pairs `binned` over bins of `width` tokens.
    fn measures(&self, width: Option<usize>, binned: &[usize]) -> Result<Vec<Measure>> {
        let cosines: Vec<Cosines> = (0..self.layers.len() - 1)
            .into_par_iter()
            .flat_map_iter(|pair| (0..2).map(move |side| self.cosines(pair, side)))
            .collect();
        let mut out = Vec::new();
        for side in 0..2 {
            let mut previous: Option<Gram> = None;
            for (layer, states) in self.layers.iter().enumerate() {
                let gram = Gram::new(&states[side], self.tokens)?;
                if let Some(previous) = &previous {
                    let c = &cosines[(layer - 1) * 2 + side];
                    out.push(c.measure(0..self.tokens, None, Some(previous.alignment(&gram))));
                }
                previous = Some(gram);
            }
        }
        if let Some(width) = width {
            for c in cosines.iter().filter(|c| binned.contains(&c.pair)) {
                for start in (0..self.tokens).step_by(width) {
                    out.push(c.measure(start..(start + width).min(self.tokens), Some(start), None));
                }
            }
        }
        Ok(out)
    }

    fn cosines(&self, pair: usize, side: usize) -> Cosines {
        let (a, b) = (&self.layers[pair][side], &self.layers[pair + 1][side]);
        let width = a.len() / self.tokens;
        let rows = |x: &'_ [f32], y: &'_ [f32], width: usize| -> Vec<f64> {
            x.chunks_exact(width).zip(y.chunks_exact(width)).map(|(x, y)| cosine(x, y)).collect()
        };
        let per_head = rows(a, b, self.head_dim);
        let heads = width / self.head_dim;
        let (h, k) = (&self.hidden[pair], &self.hidden[pair + 1]);
        Cosines {
            pair,
            side,
            token: rows(a, b, width),
            head: per_head.chunks_exact(heads).map(|c| c.iter().sum::<f64>() / heads as f64).collect(),
            hidden: rows(h, k, h.len() / self.tokens),
        }
    }
}

/// Cosines of one pair on one side, one of each per token.
struct Cosines {
    pair: usize,
    side: usize,
    token: Vec<f64>,
    head: Vec<f64>,
    hidden: Vec<f64>,
}

impl Cosines {
    fn measure(&self, tokens: std::ops::Range<usize>, position: Option<usize>, cka: Option<f64>) -> Measure {
        let mean = |x: &[f64]| x[tokens.clone()].iter().sum::<f64>() / tokens.len() as f64;
        let (token, head, hidden) = (mean(&self.token), mean(&self.head), mean(&self.hidden));
        Measure { pair: self.pair, side: self.side, position, token, head, cka, hidden }
    }
}

/// Inner products of all pairs of tokens' states, centred: with X of columns of mean zero, `X X^T`.
struct Gram {
    products: Vec<f32>,
    norm: f64,
}

impl Gram {
    fn new(states: &[f32], tokens: usize) -> Result<Self> {
        let x = Tensor::from_slice(states, (tokens, states.len() / tokens), &candle_core::Device::Cpu)?;
        let x = x.broadcast_sub(&x.mean_keepdim(0)?)?;
        let products: Vec<f32> = x.matmul(&x.t()?.contiguous()?)?.flatten_all()?.to_vec1()?;
        let norm = dot(&products, &products).sqrt();
        Ok(Self { products, norm })
    }

    /// Linear CKA: `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`, with Gram matrices `<XX^T, YY^T> / (|XX^T| |YY^T|)`. 0 where
    /// all tokens of a layer are alike.
    fn alignment(&self, other: &Gram) -> f64 {
        let norm = self.norm * other.norm;
        if norm > 0.0 { dot(&self.products, &other.products) / norm } else { 0.0 }
    }
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Two layers of 2 heads of 2 with known geometry, hidden size 1.
    fn states() -> States {
        let a = vec![1.0, 0.0, 0.0, 1.0, 2.0, 1.0, -1.0, 0.5, 0.3, 0.2, 0.1, -2.0];
        // Every head turned by 90 degrees: orthogonal, yet the same up to a rotation.
        let b = a.chunks_exact(2).flat_map(|p| [-3.0 * p[1], 3.0 * p[0]]).collect();
        let c = vec![1.0f32; 12];
        let flat = |x: &Vec<f32>| [x.clone(), x.clone()];
        States {
            layers: vec![flat(&a), flat(&b), flat(&c)],
            hidden: vec![vec![1.0, 2.0, 3.0], vec![1.0, -2.0, 3.0], vec![1.0, 1.0, 1.0]],
            tokens: 3,
            head_dim: 2,
        }
    }

    #[test]
    fn cka_sees_through_a_rotation_that_cosine_does_not() {
        let all = states().measures(None, &[]).unwrap();
        assert_eq!(all.len(), 4);
        let first = &all[0];
        assert!(first.token.abs() < 1e-6 && first.head.abs() < 1e-6);
        assert!((first.cka.unwrap() - 1.0).abs() < 1e-6);
        assert!((first.hidden - 1.0 / 3.0).abs() < 1e-9, "{}", first.hidden);
        assert_eq!(all[1].cka, Some(0.0), "all tokens of the third layer are alike");
    }

    #[test]
    fn bins_cover_every_token_once() {
        let s = states();
        let all = s.measures(Some(2), &[1]).unwrap();
        let bins: Vec<&Measure> = all.iter().filter(|m| m.position.is_some() && m.side == 0).collect();
        assert_eq!(
            bins.iter().map(|m| (m.pair, m.position)).collect::<Vec<_>>(),
            [(1, Some(0)), (1, Some(2))]
        );
        let whole = all.iter().find(|m| m.pair == 1 && m.position.is_none()).unwrap();
        assert!(((2.0 * bins[0].token + bins[1].token) / 3.0 - whole.token).abs() < 1e-12);
        assert_eq!(bin_width(512), 32);
        assert_eq!(bin_width(5), 1);
    }

    #[test]
    fn rows_have_mean_and_spread_over_samples() {
        let measure =
            |token| Measure { pair: 3, side: 1, position: None, token, head: 0.5, cka: None, hidden: 1.0 };
        let sample =
            |token| Sample { id: "d".into(), tokens: 7, seconds: 1.0, measures: vec![measure(token)] };
        let rows = rows(&[sample(0.1), sample(0.3)]);
        assert_eq!(rows.len(), 1);
        let get = |c: &str| rows[0][c].clone();
        assert_eq!(
            (get("pair"), get("side"), get("token_cosine")),
            ("3".into(), "value".into(), "0.2".into())
        );
        assert_eq!(
            (get("token_cosine_std"), get("cka"), get("samples")),
            ("0.141421".into(), "".into(), "2".into())
        );
        assert_eq!((get("tokens"), get("seconds")), ("14".into(), "2.000".into()));
    }
}
