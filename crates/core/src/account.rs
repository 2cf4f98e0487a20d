//! What a cache of any model holds at any context, without the model: measured, not computed from a formula.
//!
//! The layers of a model are alike, and so are its pairs. One unmerged layer and one pair are therefore built as real
//! caches of full width, filled with synthetic states ([`crate::Synthetic`]), and their measured allocations taken
//! times the number of such layers and pairs.

use crate::methods::{Alike, Pairing, Stored};
use crate::settings::{
    Axis, LatentSide, ModelShape, Pairs, Quant, Rank, SettingError, StartLayer, StoreType,
};
use crate::{CacheSpec, Error, Footprint, LayerSimilarity, Resources, Result, Synthetic, build};

/// Numbers of a side's states that are made at a time; bounds the memory that a long context takes.
const STEP: usize = 1 << 22;
const SEED: u64 = 0;
/// Bytes of full f16 caches up to which something is measured.
const MOST_MEASURED: usize = 16 << 30;

/// Bytes that the cache of `spec` holds for one sequence of `context` tokens, prefilled at once, in a model of `shape`
/// whose adjacent layers are `similarity` alike (that decides how many tokens a merge retains).
///
/// What a latent cache holds once for all sequences is [`shared_bytes`].
///
/// `h2o` counts every token as having received the same attention. Without a sliding window that makes no difference.
///
/// # Errors
/// A specification that does not fit the shape, a context of 0, a method that needs what `resources` lacks.
pub fn footprint(
    spec: &CacheSpec,
    shape: &ModelShape,
    resources: &Resources,
    context: usize,
    similarity: LayerSimilarity,
) -> Result<Footprint> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    let method = spec.method();
    check_context(shape, context, method.measured_layers(shape, resources))?;
    if resources.latent.is_none()
        && let Some(made_up) = method.footprint(shape, context)
    {
        return made_up;
    }
    let measure = |part: &ModelShape, step: usize| {
        let spec = spec.clone().with_start_layer(StartLayer::Layer(0));
        let mut cache = build(&spec, part, resources)?;
        Synthetic::new(part, context, similarity, SEED).fill(&mut *cache, 0..context, step)?;
        Ok::<_, Error>(cache.footprint())
    };
    let step = (STEP / shape.kv_dim()).max(1);
    match if shape.full_layers.is_empty() { method.alike() } else { Alike::Nothing } {
        Alike::Nothing => measure(shape, step),
        Alike::Heads => {
            let part = ModelShape { layers: 1, heads: shape.group(), kv_heads: 1, ..*shape };
            Ok(measure(&part, context)?.times(shape.layers * shape.kv_heads))
        }
        Alike::Layers => {
            let pairs = spec.most_pairs(shape.layers);
            let layers = shape.layers - 2 * pairs;
            let measure = |layers, times| -> Result<Footprint> {
                if times == 0 {
                    return Ok(Footprint::default());
                }
                Ok(measure(&ModelShape { layers, ..*shape }, step)?.times(times))
            };
            let (own, merged) = rayon::join(|| measure(1, layers), || measure(2, pairs));
            let mut total = own?;
            total += merged?;
            Ok(total)
        }
    }
}

/// Refuses a context of no tokens, and one of which the states of `layers` layers take more memory than a measurement is
/// worth. A sliding window bounds what is held, not the states that are made.
pub(crate) fn check_context(shape: &ModelShape, context: usize, layers: usize) -> Result<()> {
    let bytes = |tokens: usize| {
        let whole = ModelShape { layers, window: None, ..*shape };
        whole.full_bytes(tokens)
    };
    let most = MOST_MEASURED / bytes(1).max(1);
    if (1..=most).contains(&context) {
        return Ok(());
    }
    let message = if context == 0 {
        "must be at least 1 token".to_string()
    } else {
        format!(
            "must be at most {most} tokens: caches are measured, and more would take over {} GiB",
            MOST_MEASURED >> 30
        )
    };
    Err(SettingError::new("context", message).into())
}

/// Bytes that a cache holds once for all sequences of a model: the kept bases of latents and their table of phases for
/// `context` positions, or such a table for keys that are rotated when they are read (`xkv`); none for other methods.
///
/// # Errors
/// Settings of latents that only a calibrated basis decides.
pub fn shared_bytes(spec: &CacheSpec, shape: &ModelShape, context: usize) -> Result<usize> {
    spec.method().shared_bytes(shape, context)
}

/// The ratio that a specification promises on paper, with its arithmetic: bits of a number and layers stored, or
/// tokens kept. Magnitudes, retained tokens, residual windows and bookkeeping are what [`footprint`] finds beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Nominal {
    /// Full FP16 bytes over the bytes of this arithmetic.
    pub ratio: f64,
    /// A line on each term, the last one with the result.
    pub lines: Vec<String>,
}

/// The arithmetic of `spec`; `None` where a calibrated basis decides it (latents with a rank by energy).
pub fn nominal(spec: &CacheSpec, shape: &ModelShape, context: usize) -> Option<Nominal> {
    spec.method().nominal(shape, context)
}

/// Of latents with these sides.
pub(crate) fn nominal_latents(keys: &LatentSide, values: &LatentSide) -> Option<Nominal> {
    let mut lines = Vec::new();
    let keys = latent_bits(keys, "keys", &mut lines)?;
    let values = latent_bits(values, "values", &mut lines)?;
    let ratio = 32.0 / (keys + values);
    lines.push(format!("2 x 16 / ({keys} + {values}) = {ratio:.2}x"));
    Some(Nominal { ratio, lines })
}

/// Of two kinds of tokens that are kept: so many, and what they are called.
pub(crate) fn nominal_kept(
    dtype: StoreType,
    [(some, what), (others, of_them)]: [(usize, &str); 2],
    shape: &ModelShape,
    context: usize,
) -> Nominal {
    let held = shape.window.filter(|_| shape.full_layers.is_empty()).map_or(context, |w| context.min(w));
    let kept = (some + others).min(held).max(1);
    let ratio = held as f64 / kept as f64 * StoreType::F16.bytes() as f64 / dtype.bytes() as f64;
    let width = if dtype == StoreType::F16 { "" } else { " x 16/32" };
    let lines = vec![
        format!("{some} {what} and {others} {of_them}: {kept} of {held} are kept"),
        format!("{held} / {kept}{width} = {ratio:.2}x"),
    ];
    Nominal { ratio, lines }
}

/// Of every layer's states, and of pairs that share them.
pub(crate) fn nominal_layers(stored: &Stored, pairing: Option<&Pairing>, shape: &ModelShape) -> Nominal {
    let mut lines = Vec::new();
    let keys = bits(stored, shape, "keys", &mut lines);
    let values = bits(stored, shape, "values", &mut lines);
    let layers = shape.layers;
    let merged = pairing.map_or_else(Default::default, |p| p.merged(layers));
    let [key_pairs, value_pairs] = merged.map(|pairs| pairs.len());
    let (of_keys, of_values) = (layers - key_pairs, layers - value_pairs);
    let pairing = pairing.filter(|_| key_pairs + value_pairs > 0);
    match pairing {
        Some(Pairing { pairs: Pairs::Chosen(_), .. }) => lines.push(format!(
            "{key_pairs} pairs share one vector of keys and {value_pairs} one of values: {of_keys} and \
             {of_values} of {layers} layers are stored"
        )),
        Some(pairing) => {
            let pairs = key_pairs.max(value_pairs);
            let first = pairing.start_layer.resolve(layers);
            let what = match (of_keys == layers, of_values == layers) {
                (false, false) => "",
                (false, true) => " of keys",
                _ => " of values",
            };
            lines.push(format!(
                "{pairs} pairs from layer {first} share one vector{what}: {} of {layers} layers are stored",
                of_keys.min(of_values)
            ));
        }
        None => {}
    }
    let share = |bits: f64, of: usize| bits * of as f64 / (16 * layers) as f64;
    let ratio = 2.0 / (share(keys, of_keys) + share(values, of_values));
    if keys == values && of_keys == of_values {
        let layers = if pairing.is_some() { format!(" x {layers}/{of_keys}") } else { String::new() };
        lines.push(format!("16 / {keys}{layers} = {ratio:.2}x"));
    } else {
        let term = |bits: f64, of: usize| {
            if of == layers { format!("{bits}") } else { format!("{bits} x {of}/{layers}") }
        };
        lines.push(format!("2 x 16 / ({} + {}) = {ratio:.2}x", term(keys, of_keys), term(values, of_values)));
    }
    Nominal { ratio, lines }
}

/// Bits of a latent for each number of the states that it stands for.
fn latent_bits(side: &LatentSide, name: &str, lines: &mut Vec<String>) -> Option<f64> {
    let rounded = |x: f64| (x * 1000.0).round() / 1000.0;
    if let Some(rate) = side.rate {
        lines.push(format!("{name}: {rate} bits a number, allocated to components by their variance"));
        return Some(rounded(rate));
    }
    let Rank::Fraction(share) = side.rank else { return None };
    let (bits, what) = match side.bits {
        16 => (16.0, "f16".to_string()),
        bits => {
            let group = side.quant_group;
            (f64::from(bits) + 32.0 / group as f64, format!("{bits} bits in groups of {group}"))
        }
    };
    let all = rounded(share * bits);
    lines.push(format!("{name}: {share} of the components, {what}: {share} x {bits} = {all} bits a number"));
    Some(all)
}

/// Bits of one number with its share of scale and zero.
fn bits(stored: &Stored, shape: &ModelShape, side: &str, lines: &mut Vec<String>) -> f64 {
    let Some(quant) = &stored.quant else {
        let bits = 8.0 * stored.dtype.bytes() as f64;
        if stored.dtype != StoreType::F16 {
            lines.push(format!("{side}: f32, {bits} bits a number"));
        }
        return bits;
    };
    let Quant { bits, group, .. } = *quant;
    let (group, of) = match stored.axes()[usize::from(side == "values")] {
        Axis::Channel => (group as f64, "tokens"),
        // A group ends with its head.
        Axis::Token => (shape.head_dim as f64 / shape.head_dim.div_ceil(group) as f64, "channels"),
    };
    let all = f64::from(bits) + 32.0 / group;
    let all = (all * 1000.0).round() / 1000.0;
    let group = (group * 10.0).round() / 10.0;
    lines.push(format!(
        "{side}: {bits} bits in groups of {group} {of}, each with an f16 scale and zero: {all} bits a number"
    ));
    all
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shape(layers: usize, group: usize, kv_heads: usize, head_dim: usize) -> ModelShape {
        ModelShape { layers, heads: group * kv_heads, kv_heads, head_dim, scale: 0.1, ..ModelShape::PLAIN }
    }

    /// The whole model's cache, prefilled in one step.
    fn whole(spec: &CacheSpec, shape: &ModelShape, context: usize) -> Footprint {
        let mut cache = build(spec, shape, &Resources::default()).unwrap();
        let states = Synthetic::new(shape, context, LayerSimilarity::default(), SEED);
        states.fill(&mut *cache, 0..context, context).unwrap();
        cache.footprint()
    }

    const SPECS: [&str; 13] = [
        "full",
        "{ method = \"full\", dtype = \"f32\" }",
        "mean",
        "{ method = \"max_norm\", merge = \"values\" }",
        "minicache",
        "{ method = \"minicache\", start_layer = 0, granularity = \"head\" }",
        "{ method = \"minicache\", retention = { rule = \"top_fraction\", gamma = 0.1 }, quant = { bits = 4, retained = true } }",
        "{ method = \"minicache\", start_layer = 2, quant = { bits = 3, group = 64 } }",
        "kivi-2",
        "rtn-4",
        "h2o",
        "{ method = \"sinks\", recent = 200 }",
        "{ method = \"xkv\", group = 3, rank_k = 9, rank_v = 1.0 }",
    ];

    #[test]
    fn a_few_layers_scaled_are_the_whole_cache() {
        for (shape, context) in [
            (shape(7, 3, 3, 64), 700),
            (shape(6, 1, 8, 96), 1000),
            (shape(4, 4, 2, 128), 333),
            (ModelShape { window: Some(300), ..shape(6, 2, 2, 80) }, 900),
        ] {
            for text in SPECS {
                let spec = CacheSpec::parse(text).unwrap();
                let got =
                    footprint(&spec, &shape, &Resources::default(), context, LayerSimilarity::default());
                let (got, want) = (got.unwrap(), whole(&spec, &shape, context));
                // Pairs differ in how many of their tokens are outliers; all else is equal to the byte.
                let random = matches!(spec, CacheSpec::MiniCache(_));
                for ((part, got), (_, want)) in got.parts().into_iter().zip(want.parts()) {
                    if !random || shape.window.is_none() && !["retained", "scales"].contains(&part) {
                        assert_eq!(got, want, "{part} of {text} in {shape:?}");
                    }
                }
                let (got, want) = (got.total() as f64, want.total() as f64);
                assert!((got / want - 1.0).abs() < 0.01, "{text} in {shape:?}: {got} {want}");
            }
        }
    }

    #[test]
    fn steps_do_not_change_what_is_held() {
        let shape = shape(4, 1, 2, 64);
        for text in SPECS {
            let spec = CacheSpec::parse(text).unwrap();
            // Slots have room by the largest step; heads have their extremes anywhere.
            // The first step is what xKV factors.
            let by_step = spec.drops_tokens() || matches!(spec, CacheSpec::Xkv(_));
            if by_step || spec.pairing().is_some_and(|p| p.granularity == crate::settings::Granularity::Head)
            {
                continue;
            }
            let bytes = |step| {
                let mut cache = build(&spec, &shape, &Resources::default()).unwrap();
                let states = Synthetic::new(&shape, 1200, LayerSimilarity::default(), 3);
                states.fill(&mut *cache, 0..1200, step).unwrap();
                cache.footprint()
            };
            assert_eq!(bytes(1200), bytes(400), "{text}");
        }
    }

    #[test]
    fn arithmetic_is_the_papers_headline() {
        let llama = shape(32, 1, 32, 128);
        let of =
            |text: &str, shape: &ModelShape| nominal(&CacheSpec::parse(text).unwrap(), shape, 1000).unwrap();
        let headline = of("{ method = \"minicache\", quant = { bits = 4, group = 128 } }", &llama);
        assert_eq!(headline.lines.last().unwrap(), "16 / 4.25 x 32/24 = 5.02x");
        assert!((headline.ratio - 16.0 / 4.25 * 4.0 / 3.0).abs() < 1e-9);
        assert!((of("minicache", &llama).ratio - 4.0 / 3.0).abs() < 1e-9);
        assert!((of("full", &llama).ratio - 1.0).abs() < 1e-9);
        // Heads of 64 end groups of 128 along channels.
        let small = shape(30, 3, 3, 64);
        let got = of("{ method = \"kivi\", quant = { bits = 2, group = 128 } }", &small).ratio;
        assert!((got - 32.0 / (2.25 + 2.5)).abs() < 1e-9, "{got}");
        let got = of("{ method = \"mean\", merge = \"values\", start_layer = 0 }", &small).ratio;
        assert!((got - 4.0 / 3.0).abs() < 1e-9, "{got}");
        assert!((of("h2o", &small).ratio - 5.0).abs() < 1e-9);
        assert!((of("{ method = \"sinks\", recent = 196 }", &small).ratio - 5.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_measured_stays_below_the_arithmetic_and_near_it() {
        let shape = shape(4, 1, 4, 128);
        for text in
            ["kivi-4", "rtn-2", "{ method = \"minicache\", quant = { group = 128 } }", "mean", "h2o", "xkv"]
        {
            let spec = CacheSpec::parse(text).unwrap();
            let promised = nominal(&spec, &shape, 8192).unwrap().ratio;
            let none = Resources::default();
            let held = footprint(&spec, &shape, &none, 8192, LayerSimilarity::default()).unwrap();
            let measured = shape.full_bytes(8192) as f64 / held.total() as f64;
            assert!(measured < promised && measured > 0.9 * promised, "{text}: {measured} of {promised}");
        }
    }

    #[test]
    fn nothing_to_measure_is_an_error() {
        let none = Resources::default();
        let similarity = LayerSimilarity::default();
        let spec = CacheSpec::parse("{ method = \"mean\", start_layer = 9 }").unwrap();
        let message = footprint(&spec, &shape(4, 1, 1, 32), &none, 10, similarity).unwrap_err().to_string();
        assert!(message.contains("cache.start_layer"), "{message}");
        let spec = CacheSpec::parse("full").unwrap();
        let message = footprint(&spec, &shape(4, 1, 1, 32), &none, 0, similarity).unwrap_err().to_string();
        assert!(message.contains("context"), "{message}");
    }
}
