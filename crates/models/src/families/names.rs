//! Names of tensors, from the table of the family.

use super::{Family, Role};
use crate::{Error, ModelConfig, Result};

/// The token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Weight of the norm after the last layer.
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
/// The output projection, where it is not the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// What no layer holds, by its Hugging Face and its GGUF name; the same in all families.
pub(crate) const WHOLE: [(&str, &str); 3] =
    [(EMBEDDING, "token_embd.weight"), (FINAL_NORM, "output_norm.weight"), (HEAD, "output.weight")];

/// What begins the names of a layer's tensors.
const LAYERS: &str = "model.layers.";

/// The layer that a Hugging Face name belongs to, and the name within it.
pub(crate) fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix(LAYERS)?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// The module of an expert in a table's `pattern`.
pub(crate) fn expert_module(layer: usize, pattern: &str, expert: usize) -> String {
    layer_module(layer, &pattern.replace("{}", &expert.to_string()))
}

/// The module of a layer that its table calls `name`.
pub(crate) fn layer_module(layer: usize, name: &str) -> String {
    format!("{LAYERS}{layer}.{name}")
}

/// Names of one layer's tensors.
pub(crate) struct LayerNames<'a> {
    config: &'a ModelConfig,
    layer: usize,
}

impl<'a> LayerNames<'a> {
    pub(crate) fn new(config: &'a ModelConfig, layer: usize) -> Self {
        Self { config, layer }
    }

    /// Those of `roles` that the layer has, each with its number of outputs; without `.weight`.
    pub(crate) fn modules(&self, roles: &[Role]) -> Vec<(String, usize)> {
        self.named(roles, |pattern| layer_module(self.layer, pattern))
    }

    /// [`LayerNames::modules`] of one expert.
    pub(crate) fn expert(&self, expert: usize, roles: &[Role]) -> Vec<(String, usize)> {
        self.named(roles, |pattern| expert_module(self.layer, pattern, expert))
    }

    /// The weight of a kind that the layer has.
    ///
    /// # Errors
    /// It has none of that kind.
    pub(crate) fn weight(&self, role: Role) -> Result<String> {
        let name = self.modules(&[role]).pop().map(|(module, _)| format!("{module}.weight"));
        name.ok_or_else(|| {
            Error::Config(format!("models of the family {} have no {role:?}", self.config.family.name()))
        })
    }

    fn named(&self, roles: &[Role], name: impl Fn(&str) -> String) -> Vec<(String, usize)> {
        let row = |role: &Role| self.config.family.layer.iter().find(|(own, ..)| own == role);
        let rows = roles.iter().filter_map(row);
        rows.map(|(role, pattern, _)| (name(pattern), role.shape(self.config)[0])).collect()
    }

    /// Every tensor with its shape, in the order of the table; experts one after the other, behind the rest.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let config = self.config;
        let (of_experts, shared): (Vec<_>, Vec<_>) = config
            .family
            .layer
            .iter()
            .filter(|(role, ..)| config.has(*role))
            .partition(|row| row.0.of_expert());
        let mut all = Vec::new();
        for (role, name, _) in shared {
            let (name, shape) = (layer_module(self.layer, name), role.shape(config));
            let bias = role.bias().is_some_and(|bias| bias.on(config)).then(|| shape[..1].to_vec());
            all.push((format!("{name}.weight"), shape));
            all.extend(bias.map(|shape| (format!("{name}.bias"), shape)));
        }
        for expert in 0..config.experts.map_or(0, |experts| experts.count) {
            for (role, pattern, _) in &of_experts {
                let name = expert_module(self.layer, pattern, expert);
                all.push((format!("{name}.weight"), role.shape(config)));
            }
        }
        all
    }
}

impl Family {
    /// What a Hugging Face name means: the layer, the tensor, and whether it is the bias. Not for tensors of experts.
    pub(crate) fn meaning(&self, name: &str) -> Option<(usize, Role, bool)> {
        let (layer, rest) = in_layer(name)?;
        let (module, kind) = rest.rsplit_once('.')?;
        let (role, ..) = self.layer.iter().find(|(_, own, _)| *own == module)?;
        matches!(kind, "weight" | "bias").then_some((layer, *role, kind == "bias"))
    }
}
