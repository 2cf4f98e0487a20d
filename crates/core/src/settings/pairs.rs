//! Which layers are merged in pairs, what of them, and which tokens are kept apart.

use super::word::as_word_or_number;

/// The first merged layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartLayer {
    /// L/2.
    #[default]
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

/// Which pairs of layers are merged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "PairsForm", into = "PairsForm"))]
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ChosenPairs {
    /// Pairs whose keys are merged.
    pub keys: Vec<usize>,
    /// Pairs whose values are merged.
    pub values: Vec<usize>,
}

/// [`Pairs`] as it is written.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"deep\", \"auto\" or { keys = [..], values = [..] } with the first layer of each pair"
)]
enum PairsForm {
    Word(String),
    Chosen(ChosenPairs),
}

#[cfg(feature = "serde")]
impl TryFrom<PairsForm> for Pairs {
    type Error = String;

    fn try_from(form: PairsForm) -> Result<Self, String> {
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

#[cfg(feature = "serde")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Granularity {
    /// One vector of kv_heads * head_dim per token (the paper).
    #[default]
    Token,
    /// One vector of head_dim per token and KV head.
    Head,
}

/// Where keys are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum KeySpace {
    /// As cached, after RoPE (the paper).
    #[default]
    Cached,
    /// Before RoPE.
    PreRope,
}

/// Which side is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
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
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
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
