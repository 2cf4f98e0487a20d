//! What a cache is: the method and all its settings.

use serde::{Deserialize, Serialize};

use crate::bounds::{MOST_RATIO, MOST_TOKENS, check_number};
use crate::{Calibration, ConfigError, LatentSide, Result};

/// An enumeration of a word and a number, read and written as the word or as a non-negative integer.
macro_rules! as_word_or_number {
    ($name:ident, $word:ident = $text:literal, $number:ident, $expected:literal) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
                match self {
                    $name::$word => s.serialize_str($text),
                    $name::$number(n) => s.serialize_u64(*n as u64),
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
                $crate::cache::word_or_number(d, $text, $expected)
                    .map(|n| n.map_or($name::$word, $name::$number))
            }
        }
    };
}
pub(crate) use as_word_or_number;

/// The numbers of a model that a cache depends on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Key/value heads per layer; divides `heads`.
    pub kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
    /// Sliding window in tokens: a query at position p sees positions p-window+1 ..= p.
    pub window: Option<usize>,
    /// Factor on the scores q.k before the softmax, usually 1/sqrt(head_dim).
    pub scale: f32,
}

impl ModelShape {
    /// Numbers per token and layer on one side (keys or values): `kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Bytes of the full FP16 cache of one sequence of `tokens`, the yardstick of every compression ratio.
    /// A sliding window bounds it: `min(tokens, window)` are held.
    pub fn full_bytes(&self, tokens: usize) -> usize {
        let held = self.window.map_or(tokens, |w| tokens.min(w));
        // Settings are bounded so that this does not come near the largest number in any model.
        [2, 2, self.layers, self.kv_heads, self.head_dim].into_iter().fold(held, usize::saturating_mul)
    }
}

/// The cache methods. One name, one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Every state, exact in the storage type.
    Full,
    /// Pairs of layers share their mean.
    Mean,
    /// Pairs share the direction of the longer state, each with its own magnitude.
    MaxNorm,
    /// Pairs share the SLERP of their directions (MiniCache).
    Minicache,
    /// Round-to-nearest quantisation per token.
    Rtn,
    /// Keys per channel, values per token, with a residual window (KIVI).
    Kivi,
    /// Per-token quantisation after per-channel smoothing.
    Smoothquant,
    /// Heavy hitters and recent tokens only.
    H2o,
    /// First and recent tokens only (StreamingLLM).
    Sinks,
    /// Cross-layer latents in a calibrated basis.
    Latent,
}

impl Method {
    /// All methods, in the order in which tables list them.
    pub const ALL: [Method; 10] = [
        Method::Full,
        Method::Mean,
        Method::MaxNorm,
        Method::Minicache,
        Method::Rtn,
        Method::Kivi,
        Method::Smoothquant,
        Method::H2o,
        Method::Sinks,
        Method::Latent,
    ];

    /// The name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Method::Full => "full",
            Method::Mean => "mean",
            Method::MaxNorm => "max_norm",
            Method::Minicache => "minicache",
            Method::Rtn => "rtn",
            Method::Kivi => "kivi",
            Method::Smoothquant => "smoothquant",
            Method::H2o => "h2o",
            Method::Sinks => "sinks",
            Method::Latent => "latent",
        }
    }

    /// Whether pairs of layers are merged.
    pub fn merges(self) -> bool {
        matches!(self, Method::Mean | Method::MaxNorm | Method::Minicache)
    }

    fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }
}

/// The first merged layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartLayer {
    /// L/2.
    Half,
    /// This layer.
    Layer(usize),
}

impl StartLayer {
    /// The layer number for a model of `layers` layers.
    pub fn resolve(self, layers: usize) -> usize {
        match self {
            StartLayer::Half => layers / 2,
            StartLayer::Layer(n) => n,
        }
    }
}

as_word_or_number!(StartLayer, Half = "half", Layer, "\"half\" or a layer number");

/// Reads `word` (as `None`) or a non-negative integer.
pub(crate) fn word_or_number<'de, D: serde::Deserializer<'de>>(
    d: D,
    word: &'static str,
    expected: &'static str,
) -> std::result::Result<Option<usize>, D::Error> {
    struct Visitor(&'static str, &'static str);
    impl serde::de::Visitor<'_> for Visitor {
        type Value = Option<usize>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.1)
        }
        fn visit_str<E: serde::de::Error>(self, v: &str) -> std::result::Result<Self::Value, E> {
            if v == self.0 { Ok(None) } else { Err(E::invalid_value(serde::de::Unexpected::Str(v), &self)) }
        }
        fn visit_i64<E: serde::de::Error>(self, v: i64) -> std::result::Result<Self::Value, E> {
            let number = usize::try_from(v);
            number.map(Some).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(v), &self))
        }
        fn visit_u64<E: serde::de::Error>(self, v: u64) -> std::result::Result<Self::Value, E> {
            Ok(Some(v as usize))
        }
    }
    d.deserialize_any(Visitor(word, expected))
}

/// Which pairs of layers are merged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "PairsForm", into = "PairsForm")]
pub enum Pairs {
    /// (S, S+1), (S+2, S+3), ... from the start layer.
    #[default]
    Deep,
    /// Keys and values apart, by measured loss per byte on calibration text, up to `budget_ratio`.
    Auto,
    /// These: what `auto` came to, or what somebody else has chosen.
    Chosen(ChosenPairs),
}

/// The shallower layers of the pairs that are merged, ascending, keys and values apart.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChosenPairs {
    /// Pairs whose keys are merged.
    pub keys: Vec<usize>,
    /// Pairs whose values are merged.
    pub values: Vec<usize>,
}

/// [`Pairs`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"deep\", \"auto\" or { keys = [..], values = [..] } with the first layer of each pair"
)]
enum PairsForm {
    Word(String),
    Chosen(ChosenPairs),
}

impl TryFrom<PairsForm> for Pairs {
    type Error = String;

    fn try_from(form: PairsForm) -> std::result::Result<Self, String> {
        match form {
            PairsForm::Chosen(chosen) => Ok(Pairs::Chosen(chosen)),
            PairsForm::Word(word) => match word.as_str() {
                "deep" => Ok(Pairs::Deep),
                "auto" => Ok(Pairs::Auto),
                _ => Err(format!("unknown pairs `{word}`; expected \"deep\", \"auto\" or a table of layers")),
            },
        }
    }
}

impl From<Pairs> for PairsForm {
    fn from(pairs: Pairs) -> Self {
        match pairs {
            Pairs::Deep => PairsForm::Word("deep".to_string()),
            Pairs::Auto => PairsForm::Word("auto".to_string()),
            Pairs::Chosen(chosen) => PairsForm::Chosen(chosen),
        }
    }
}

/// Whether a state vector is taken over all KV heads together or per head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One vector of kv_heads * head_dim per token (the paper).
    #[default]
    Token,
    /// One vector of head_dim per token and KV head.
    Head,
}

/// Where keys are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySpace {
    /// As cached, after RoPE (the paper).
    #[default]
    Cached,
    /// Before RoPE.
    PreRope,
}

/// Which side is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeSides {
    /// Keys and values.
    #[default]
    Both,
    /// Keys only; values stay per layer.
    Keys,
    /// Values only; keys stay per layer.
    Values,
}

impl MergeSides {
    /// Whether keys are merged.
    pub fn keys(self) -> bool {
        self != MergeSides::Values
    }
    /// Whether values are merged.
    pub fn values(self) -> bool {
        self != MergeSides::Keys
    }
}

/// Which tokens are kept apart, with d_i = angle_i / pi.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetentionRule {
    /// d_i > d_max - gamma (d_max - d_min): the most distinct tokens (the paper's intent).
    #[default]
    MostDistinct,
    /// d_i < d_min + gamma (d_max - d_min): the formula as printed, which keeps the most similar tokens.
    AsPrinted,
    /// The fraction gamma of the tokens, the most distinct ones.
    TopFraction,
}

/// Token retention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// The rule.
    pub rule: RetentionRule,
    /// Threshold or fraction, 0..=1.
    pub gamma: f64,
    /// Keys and values retain the union of what each of them would.
    pub joint: bool,
}

impl Default for Retention {
    fn default() -> Self {
        Self { rule: RetentionRule::MostDistinct, gamma: 0.05, joint: false }
    }
}

/// Along which axis a quantisation group runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// One channel over `group` tokens shares scale and zero.
    Channel,
    /// `group` channels of one token share scale and zero.
    Token,
}

/// Asymmetric round-to-nearest quantisation in groups, f16 scale and zero per group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quant {
    /// Bits per number: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale and a zero: 32, 64 or 128. Along channels a group ends with its head, so the
    /// last group of a head may be shorter (head_dim 80 in groups of 32: 32 + 32 + 16).
    pub group: usize,
    /// Newest tokens kept in full precision.
    pub residual: usize,
    /// Axis of keys; by default the method's (KIVI: channel, RTN: token).
    pub keys: Option<Axis>,
    /// Axis of values; by default token.
    pub values: Option<Axis>,
    /// Whether retained tokens are quantised too.
    pub retained: bool,
}

impl Default for Quant {
    fn default() -> Self {
        Self { bits: 4, group: 32, residual: 32, keys: None, values: None, retained: false }
    }
}

/// Storage type of what is not quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreType {
    /// IEEE half precision.
    #[default]
    F16,
    /// IEEE single precision, for parity runs.
    F32,
}

impl StoreType {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            StoreType::F16 => 2,
            StoreType::F32 => 4,
        }
    }
}

/// A number of tokens, or a share of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Budget {
    /// This many tokens.
    Tokens(usize),
    /// This share of the prompt's tokens, below 1.
    Fraction(f64),
}

impl Budget {
    /// Tokens for a prompt of `prompt` tokens.
    pub fn resolve(self, prompt: usize) -> usize {
        match self {
            Budget::Tokens(n) => n,
            Budget::Fraction(f) => (f * prompt as f64).round() as usize,
        }
    }
}

/// A cache: the method and every setting that it reads. Settings that a method does not read are ignored by it
/// and dropped by [`CacheSpec::canonical`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheSpec {
    /// The method.
    pub method: Method,
    /// First merged layer.
    pub start_layer: StartLayer,
    /// Which pairs are merged.
    pub pairs: Pairs,
    /// SLERP parameter, 0..=1: 0 is the shallower layer, 1 the deeper.
    pub t: f64,
    /// Vectors over all heads, or per head.
    pub granularity: Granularity,
    /// Merge keys after or before RoPE.
    pub key_space: KeySpace,
    /// Keys, values or both.
    pub merge: MergeSides,
    /// Token retention.
    pub retention: Retention,
    /// Storage type of what is not quantised: whole states, and of quantised caches the newest tokens.
    pub dtype: StoreType,
    /// Storage type of magnitudes.
    pub magnitudes: StoreType,
    /// Quantisation; absent: none (`rtn`, `kivi` and `smoothquant` then use their own defaults).
    pub quant: Option<Quant>,
    /// Bits to which queries and probabilities are rounded before they meet packed codes: 8, 16 or 24. Absent: 16 beside
    /// f16 numbers, 24 beside f32 ones.
    pub activation_bits: Option<u8>,
    /// SmoothQuant's migration strength, 0..=1.
    pub alpha: f64,
    /// First tokens kept exact (`sinks`, `latent`, merging methods); see [`CacheSpec::first_exact`].
    pub sinks: Option<usize>,
    /// Newest tokens kept (`h2o`, `sinks`).
    pub recent: Budget,
    /// Newest tokens kept exact (`latent`), or not merged yet (merging methods; not in the paper, which merges at once).
    pub residual: usize,
    /// Heavy hitters kept (`h2o`).
    pub heavy: Budget,
    /// Keys of a latent cache.
    pub k: LatentSide,
    /// Values of a latent cache.
    pub v: LatentSide,
    /// Calibration text of a latent cache or of automatic choices.
    pub calibration: Calibration,
    /// A calibrated basis file, instead of calibrating.
    pub basis: Option<String>,
    /// Compression that `pairs = "auto"` and `group = "auto"` have to reach.
    pub budget_ratio: f64,
}

impl Default for CacheSpec {
    fn default() -> Self {
        Self {
            method: Method::Full,
            start_layer: StartLayer::Half,
            pairs: Pairs::Deep,
            t: 0.6,
            granularity: Granularity::Token,
            key_space: KeySpace::Cached,
            merge: MergeSides::Both,
            retention: Retention::default(),
            dtype: StoreType::F16,
            magnitudes: StoreType::F16,
            quant: None,
            activation_bits: None,
            alpha: 0.5,
            sinks: None,
            recent: Budget::Fraction(0.1),
            residual: 0,
            heavy: Budget::Fraction(0.1),
            k: LatentSide::default(),
            v: LatentSide::default(),
            calibration: Calibration::default(),
            basis: None,
            budget_ratio: 6.0,
        }
    }
}

impl CacheSpec {
    /// The defaults of `method`.
    pub fn of(method: Method) -> Self {
        Self { method, ..Self::default() }
    }

    /// Reads SPEC as the command line takes it: a method name, `NAME-BITS` (such as `kivi-2`), or an inline table.
    ///
    /// # Errors
    /// Unknown methods and keys, wrong types and values out of range.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        let spec = if text.starts_with('{') {
            #[derive(Deserialize)]
            struct Wrapper {
                cache: CacheSpec,
            }
            let toml = format!("cache = {text}");
            let wrapper: Wrapper = crate::toml_from_str(&toml)
                .map_err(|e| ConfigError { line: None, ..crate::error::from_toml(&e, &toml) })?;
            wrapper.cache
        } else {
            Self::by_name(text)?
        };
        spec.validate().map_err(|e| e.under("cache"))?;
        Ok(spec)
    }

    fn by_name(text: &str) -> Result<Self> {
        let unknown = || {
            let names: Vec<_> = Method::ALL.iter().map(|m| m.name()).collect();
            let names = names.join(", ");
            ConfigError::new("cache", format!("unknown method `{text}`; one of {names}, or an inline table"))
        };
        if let Some(method) = Method::by_name(text) {
            return Ok(Self::of(method));
        }
        let (name, bits) = text.rsplit_once('-').ok_or_else(unknown)?;
        let mut spec = Self::of(Method::by_name(name).ok_or_else(unknown)?);
        let bits = bits.parse().map_err(|_| unknown())?;
        match spec.method {
            Method::Latent => (spec.k.bits, spec.v.bits) = (bits, bits),
            Method::H2o | Method::Sinks | Method::Full => return Err(unknown()),
            _ => spec.quant = Some(Quant { bits, ..spec.default_quant() }),
        }
        Ok(spec)
    }

    fn default_quant(&self) -> Quant {
        match self.method {
            Method::Rtn => Quant { residual: 0, ..Quant::default() },
            Method::Smoothquant => Quant { bits: 8, residual: 0, ..Quant::default() },
            _ => Quant::default(),
        }
    }

    /// The quantisation in force: the one given, the method's own default, or none.
    pub fn quantisation(&self) -> Option<Quant> {
        match self.method {
            Method::Rtn | Method::Kivi | Method::Smoothquant => {
                Some(self.quant.clone().unwrap_or_else(|| self.default_quant()))
            }
            Method::Mean | Method::MaxNorm | Method::Minicache => self.quant.clone(),
            Method::Full | Method::H2o | Method::Sinks | Method::Latent => None,
        }
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// Names the key below `cache` and what is allowed.
    pub fn validate(&self) -> Result<()> {
        check_unit("t", self.t)?;
        check_unit("retention.gamma", self.retention.gamma)?;
        check_unit("alpha", self.alpha)?;
        for (key, budget) in [("recent", self.recent), ("heavy", self.heavy)] {
            if let Budget::Fraction(f) = budget
                && !(0.0..1.0).contains(&f)
            {
                let message = format!(
                    "a fraction must be at least 0 and below 1, not {f}; give whole tokens as an integer"
                );
                return Err(ConfigError::new(key, message));
            }
            if let Budget::Tokens(n) = budget {
                check_number(key, n, 0..=MOST_TOKENS)?;
            }
        }
        for (key, tokens) in [("sinks", self.first_exact()), ("residual", self.residual)] {
            check_number(key, tokens, 0..=MOST_TOKENS)?;
        }
        if let Some(q) = &self.quant {
            if ![2, 3, 4, 8].contains(&q.bits) {
                return Err(ConfigError::new("quant.bits", format!("must be 2, 3, 4 or 8, not {}", q.bits)));
            }
            check_group("quant.group", q.group)?;
            check_number("quant.residual", q.residual, 0..=MOST_TOKENS)?;
        }
        if let Some(bits) = self.activation_bits
            && ![8, 16, 24].contains(&bits)
        {
            return Err(ConfigError::new("activation_bits", format!("must be 8, 16 or 24, not {bits}")));
        }
        check_number("budget_ratio", self.budget_ratio, 1.0..=MOST_RATIO)?;
        self.calibration.validate().map_err(|e| e.under("calibration"))?;
        self.k.validate().map_err(|e| e.under("k"))?;
        self.v.validate().map_err(|e| e.under("v"))
    }

    /// Checks the settings against a model.
    ///
    /// # Errors
    /// A start layer beyond the model. (A quantisation group never spans heads: it is cut at the head's end.)
    pub fn validate_for(&self, shape: &ModelShape) -> Result<()> {
        self.validate()?;
        if self.method.merges() && self.start_layer.resolve(shape.layers) >= shape.layers {
            let message = format!(
                "must be below the model's {} layers, not {}",
                shape.layers,
                self.start_layer.resolve(shape.layers)
            );
            return Err(ConfigError::new("start_layer", message));
        }
        if let Pairs::Chosen(chosen) = &self.pairs {
            for (side, first) in [("keys", &chosen.keys), ("values", &chosen.values)] {
                let apart = first.windows(2).all(|w| w[0] < w[1] && w[1] - w[0] > 1);
                if !apart || first.last().is_some_and(|a| shape.layers.saturating_sub(1) <= *a) {
                    let message = format!(
                        "must be the first layers of pairs that do not overlap, ascending, below {}",
                        shape.layers.saturating_sub(1)
                    );
                    return Err(ConfigError::new(format!("pairs.{side}"), message));
                }
            }
        }
        Ok(())
    }

    /// The pairs (a, a + 1) of layers whose keys are merged, and those whose values are, in a model of `layers` layers.
    /// Of `pairs = "auto"`, which has to be resolved first, the deep ones.
    pub fn merged_pairs(&self, layers: usize) -> [Vec<(usize, usize)>; 2] {
        if !self.method.merges() {
            return [Vec::new(), Vec::new()];
        }
        let pair = |a: usize| (a, a + 1);
        let [keys, values]: [Vec<_>; 2] = match &self.pairs {
            Pairs::Chosen(chosen) => {
                [&chosen.keys, &chosen.values].map(|s| s.iter().copied().map(pair).collect())
            }
            Pairs::Deep | Pairs::Auto => {
                let first = self.start_layer.resolve(layers)..layers.saturating_sub(1);
                let deep: Vec<_> = first.step_by(2).map(pair).collect();
                [deep.clone(), deep]
            }
        };
        [
            if self.merge.keys() { keys } else { Vec::new() },
            if self.merge.values() { values } else { Vec::new() },
        ]
    }

    /// The number of pairs of the side that merges more of them (see [`CacheSpec::merged_pairs`]).
    pub fn most_pairs(&self, layers: usize) -> usize {
        self.merged_pairs(layers).map(|pairs| pairs.len()).into_iter().max().unwrap_or(0)
    }

    /// How many first tokens are kept exact. Unless `sinks` says so, those that the field keeps as attention sinks
    /// (StreamingLLM's 4) by `sinks` and `latent`, and none by merging methods, as in the paper.
    pub fn first_exact(&self) -> usize {
        self.sinks.unwrap_or(match self.method {
            Method::Sinks | Method::Latent => 4,
            _ => 0,
        })
    }

    /// Whether text of [`CacheSpec::calibration`] is needed: for a basis of latents without a file of their own, or for
    /// what is left to choice.
    pub fn is_calibrated(&self) -> bool {
        self.method == Method::Latent && self.basis.is_none() || self.is_auto()
    }

    /// Whether calibration text has to say first which layers are merged or share latents.
    pub fn is_auto(&self) -> bool {
        let groups = [self.k.group, self.v.group];
        match self.method {
            Method::Latent => groups.contains(&crate::Group::Auto),
            method => method.merges() && self.pairs == Pairs::Auto,
        }
    }

    /// Whether the dotted key below `cache` makes a difference to this cache.
    pub fn reads(&self, key: &str) -> bool {
        const MERGE: [&str; 8] =
            ["start_layer", "pairs", "granularity", "key_space", "merge", "magnitudes", "residual", "sinks"];
        const QUANT: [&str; 2] = ["quant", "activation_bits"];
        const CHOICE: [&str; 2] = ["calibration", "budget_ratio"];
        let field = key.split('.').next().unwrap_or(key);
        let auto = [self.k.group, self.v.group].contains(&crate::Group::Auto);
        let chosen = self.pairs == Pairs::Auto && CHOICE.contains(&field);
        matches!(field, "method" | "dtype")
            || match self.method {
                Method::Full => false,
                Method::Mean | Method::MaxNorm => MERGE.contains(&field) || chosen || QUANT.contains(&field),
                Method::Minicache => {
                    MERGE.contains(&field)
                        || chosen
                        || QUANT.contains(&field)
                        || ["t", "retention"].contains(&field)
                }
                Method::Rtn | Method::Kivi => QUANT.contains(&field),
                Method::Smoothquant => QUANT.contains(&field) || field == "alpha",
                Method::H2o => ["recent", "heavy"].contains(&field),
                Method::Sinks => ["recent", "sinks"].contains(&field),
                Method::Latent => {
                    ["k", "v", "sinks", "residual", "calibration", "basis", "magnitudes", "activation_bits"]
                        .contains(&field)
                        || (field == "budget_ratio" && auto)
                }
            }
    }

    /// The same cache with every setting that the method does not read at its default, and the start layer as a
    /// number where `layers` is known: two specs that mean the same cache are equal in this form.
    #[must_use]
    pub fn canonical(&self, layers: Option<usize>) -> Self {
        let mut out = Self { method: self.method, ..Self::default() };
        macro_rules! keep {
            ($($field:ident),*) => {$(
                if self.reads(stringify!($field)) {
                    out.$field.clone_from(&self.$field);
                }
            )*};
        }
        keep!(start_layer, pairs, t, granularity, key_space, merge, retention, dtype, magnitudes, alpha);
        keep!(recent, residual, heavy, k, v, calibration, basis, budget_ratio, activation_bits);
        // What has no first tokens says nothing of them, as before merging methods could have some.
        out.sinks =
            out.reads("sinks").then(|| self.first_exact()).filter(|n| *n > 0 || !self.method.merges());
        out.quant = self.quantisation();
        if let (Some(layers), true) = (layers, self.reads("start_layer")) {
            out.start_layer = StartLayer::Layer(self.start_layer.resolve(layers));
        }
        out
    }

    /// A short name for tables and legends, such as `kivi-2` or `minicache-4`.
    pub fn label(&self) -> String {
        match (self.method, self.quantisation()) {
            (Method::Latent, _) if self.k.rate.is_some() || self.v.rate.is_some() => {
                let rate = |s: &LatentSide| s.rate.map_or_else(|| s.bits.to_string(), |r| format!("{r}b"));
                let (k, v) = (rate(&self.k), rate(&self.v));
                if k == v { format!("latent-{k}") } else { format!("latent-k{k}v{v}") }
            }
            (Method::Latent, _) if self.k.bits == self.v.bits => format!("latent-{}", self.k.bits),
            (Method::Latent, _) => format!("latent-k{}v{}", self.k.bits, self.v.bits),
            (m, Some(q)) => format!("{}-{}", m.name(), q.bits),
            (m, None) => m.name().to_string(),
        }
    }
}

fn check_unit(key: &str, x: f64) -> Result<()> {
    if (0.0..=1.0).contains(&x) {
        Ok(())
    } else {
        Err(ConfigError::new(key, format!("must be within 0 to 1, not {x}")))
    }
}

pub(crate) fn check_group(key: &str, group: usize) -> Result<()> {
    if [32, 64, 128].contains(&group) {
        Ok(())
    } else {
        Err(ConfigError::new(key, format!("must be 32, 64 or 128, not {group}")))
    }
}
