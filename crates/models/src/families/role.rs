//! What a tensor of a layer is to the decoder: its shape, its bias, and which models have it.

use crate::ModelConfig;

/// A tensor of a layer, by what is computed with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Weight of the norm before attention.
    InputNorm,
    /// Queries, keys and values, one below the other.
    Qkv,
    Queries,
    Keys,
    Values,
    /// Weight of the norm of each query head, before its rotation.
    QueryNorm,
    /// The same of each key head.
    KeyNorm,
    /// The attention's output projection.
    Output,
    /// Weight of the norm before the feed-forward block.
    MlpNorm,
    /// Gate and up, one below the other.
    GateUp,
    Gate,
    Up,
    Down,
    /// Scores of the experts.
    Router,
    ExpertGate,
    ExpertUp,
    ExpertDown,
}

/// Biases that layers have together or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bias {
    Qkv,
    Output,
    Mlp,
}

impl Role {
    /// What becomes the layer of queries, keys and values.
    pub(crate) const ATTENTION_INPUTS: [Role; 4] = [Role::Queries, Role::Keys, Role::Values, Role::Qkv];
    /// What becomes the first layer of the feed-forward block.
    pub(crate) const MLP_INPUTS: [Role; 3] = [Role::Gate, Role::Up, Role::GateUp];
    /// What becomes the first layer of an expert.
    pub(crate) const EXPERT_INPUTS: [Role; 2] = [Role::ExpertGate, Role::ExpertUp];

    /// The weight's shape, outputs first.
    pub(crate) fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let (q, kv) = (config.q_dim(), config.kv_dim());
        match self {
            Role::InputNorm | Role::MlpNorm => vec![hidden],
            Role::QueryNorm | Role::KeyNorm => vec![config.head_dim],
            Role::Qkv => vec![q + 2 * kv, hidden],
            Role::Queries => vec![q, hidden],
            Role::Keys | Role::Values => vec![kv, hidden],
            Role::Output => vec![hidden, q],
            Role::GateUp => vec![2 * inner, hidden],
            Role::Gate | Role::Up | Role::ExpertGate | Role::ExpertUp => vec![inner, hidden],
            Role::Down | Role::ExpertDown => vec![hidden, inner],
            Role::Router => vec![config.experts.map_or(0, |experts| experts.count), hidden],
        }
    }

    /// Whether there is one for each expert.
    pub(crate) fn of_expert(self) -> bool {
        matches!(self, Role::ExpertGate | Role::ExpertUp | Role::ExpertDown)
    }

    /// The group of biases that its own belongs to; `None`: it never has one.
    pub(crate) fn bias(self) -> Option<Bias> {
        match self {
            Role::Qkv | Role::Queries | Role::Keys | Role::Values => Some(Bias::Qkv),
            Role::Output => Some(Bias::Output),
            Role::GateUp | Role::Gate | Role::Up | Role::Down => Some(Bias::Mlp),
            _ => None,
        }
    }
}

impl Bias {
    /// All groups.
    pub(crate) const ALL: [Bias; 3] = [Bias::Qkv, Bias::Output, Bias::Mlp];

    /// Whether a model's layers have them.
    pub(crate) fn on(self, config: &ModelConfig) -> bool {
        match self {
            Bias::Qkv => config.qkv_bias,
            Bias::Output => config.out_bias,
            Bias::Mlp => config.mlp_bias,
        }
    }
}
