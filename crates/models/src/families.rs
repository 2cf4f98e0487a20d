//! The model families: one file each, with what its files call things and what they leave out. A new one is its file
//! and its line in the table below; whatever reads, checks, names or writes weights and configurations goes by that
//! table.

mod names;
mod role;

use minicache_config::shown;

pub(crate) use names::{
    EMBEDDING, FINAL_NORM, HEAD, LayerNames, WHOLE, expert_module, in_layer, layer_module,
};
pub(crate) use role::{Bias, Role};

use crate::{Error, Result};

/// The table of families, in the order in which messages list them: the name in `model_type`, and the file and the
/// constant that say the rest.
macro_rules! families {
    ($($name:literal => $family:ident in $file:ident,)*) => {
        $(mod $file;)*

        impl Family {
            /// All families.
            pub const ALL: &[&Family] = &[$(&Family { name: $name, ..$file::$family },)*];
        }
    };
}

families! {
    "llama" => LLAMA in llama,
    "mistral" => MISTRAL in mistral,
    "mixtral" => MIXTRAL in mixtral,
    "phi3" => PHI3 in phi3,
    "qwen2" => QWEN2 in qwen2,
    "qwen3" => QWEN3 in qwen3,
}

/// A model family: what its files call the parts of a model, and what is meant where they do not say. What is computed
/// goes by the other fields of [`ModelConfig`](crate::ModelConfig), whatever the family.
#[derive(Debug, PartialEq)]
pub struct Family {
    name: &'static str,
    /// The class in transformers, which `architectures` of a `config.json` names.
    pub(crate) class: &'static str,
    /// Its GGUF files.
    pub(crate) gguf: GgufForm,
    /// What a file without `num_key_value_heads` means.
    pub(crate) kv_heads: KvHeads,
    /// Size of a head where a file does not give it; `None`: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// Base of rotary frequencies where a file does not give it.
    pub(crate) theta: f64,
    /// Whether the output projection is the embedding where a file does not say so.
    pub(crate) tied: bool,
    /// Which layers have a sliding window.
    pub(crate) window: Sliding,
    /// Biases on queries, keys and values.
    pub(crate) qkv_bias: Switch,
    /// Bias on the attention's output projection.
    pub(crate) out_bias: Switch,
    /// Biases in the feed-forward block.
    pub(crate) mlp_bias: Switch,
    /// Where a configuration counts experts; `None`: the feed-forward block is dense.
    pub(crate) experts: Option<ExpertKeys>,
    /// The tensors of a layer, in the order in which they are written.
    pub(crate) layer: &'static [Row],
}

/// A tensor of a layer: what it is; its Hugging Face name after `model.layers.N.`, `{}` standing for the number of an
/// expert; its GGUF name after `blk.N.`, of experts without `_exps` (all in one tensor) or the number (one each). Both
/// without `.weight` and `.bias`.
pub(crate) type Row = (Role, &'static str, &'static str);

/// How GGUF files hold a family.
#[derive(Debug, PartialEq)]
pub(crate) struct GgufForm {
    /// `general.architecture`.
    pub(crate) architecture: &'static str,
    /// Which files of that architecture are of this family.
    pub(crate) when: When,
    /// Whether rows of queries and keys lie with their rotary pairs side by side, as the converter leaves them whose RoPE
    /// turns neighbouring numbers.
    pub(crate) interleaved: bool,
    /// Whether special tokens of SentencePiece vocabularies take the white space behind them along, which the files do
    /// not say.
    pub(crate) tokens_strip: bool,
}

impl GgufForm {
    /// An architecture of one family, as most are.
    const fn of(architecture: &'static str) -> Self {
        Self { architecture, when: When::Otherwise, interleaved: false, tokens_strip: false }
    }
}

/// Which files of a GGUF architecture are of a family; of several that hold, the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum When {
    /// Those that are of no other.
    Otherwise,
    /// Those with a sliding window.
    Windowed,
    /// Those with experts.
    Experts,
}

/// What a file without `num_key_value_heads` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KvHeads {
    /// Multi-head attention: as many as query heads. Older files leave the key out.
    AsHeads,
    /// Nothing: what transformers takes then is the number of one published model.
    Given,
}

/// Which layers have a sliding window where `layer_types` does not say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sliding {
    /// None, whatever the file says.
    Never,
    /// All, where the file gives a window.
    All,
    /// All, and the file has to say so, or `null`: what transformers takes otherwise is one published model's.
    Given,
    /// With `use_sliding_window` those from `max_window_layers` on.
    Upper,
}

/// Whether a family's layers have some biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Switch {
    /// All models.
    On,
    /// No model.
    Off,
    /// Those whose configuration says so under this key.
    Key(&'static str),
}

/// The keys of a configuration that count experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExpertKeys {
    /// Experts of each layer.
    pub(crate) count: &'static str,
    /// Experts that each token is sent to.
    pub(crate) used: &'static str,
}

impl Family {
    /// Files that say everything and have neither biases nor experts: families say what differs.
    const PLAIN: Family = Family {
        name: "",
        class: "",
        gguf: GgufForm::of(""),
        kv_heads: KvHeads::Given,
        head_dim: None,
        theta: 1e4,
        tied: false,
        window: Sliding::Never,
        qkv_bias: Switch::Off,
        out_bias: Switch::Off,
        mlp_bias: Switch::Off,
        experts: None,
        layer: &[],
    };

    /// The name in `model_type`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The family of a `model_type`.
    ///
    /// # Errors
    /// A type that is not supported; the message lists those that are.
    pub fn by_name(name: &str) -> Result<&'static Self> {
        Self::ALL.iter().copied().find(|f| f.name == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|f| f.name).collect();
            let (name, known) = (shown(name), known.join(", "));
            Error::Config(format!("model_type \"{name}\" is not supported; supported are {known}"))
        })
    }

    /// Whether layers have a tensor of this kind.
    pub(crate) fn has(&self, role: Role) -> bool {
        self.layer.iter().any(|(own, ..)| *own == role)
    }

    /// The families in GGUF files of `architecture`.
    pub(crate) fn in_gguf(architecture: &str) -> impl Iterator<Item = &'static Self> {
        Self::ALL.iter().copied().filter(move |family| family.gguf.architecture == architecture)
    }

    /// The family of a GGUF file.
    pub(crate) fn of_gguf(architecture: &str, experts: bool, window: bool) -> Option<&'static Self> {
        let holds = |family: &&Self| match family.gguf.when {
            When::Otherwise => true,
            When::Windowed => window,
            When::Experts => experts,
        };
        Self::in_gguf(architecture).filter(holds).max_by_key(|family| family.gguf.when)
    }

    /// The GGUF architectures for a message, each with its families where they have other names.
    pub(crate) fn gguf_architectures() -> String {
        let mut known: Vec<(&str, Vec<&str>)> = Vec::new();
        for family in Self::ALL {
            let architecture = family.gguf.architecture;
            if known.last().is_none_or(|(last, _)| *last != architecture) {
                known.push((architecture, Vec::new()));
            }
            if let Some((_, others)) = known.last_mut().filter(|_| family.name != architecture) {
                others.push(family.name);
            }
        }
        let words = known.into_iter().map(|(architecture, others)| match others.is_empty() {
            true => architecture.to_string(),
            false => format!("{architecture} ({} too)", others.join(" and ")),
        });
        words.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_table_names_a_whole_layer_once() {
        for family in Family::ALL {
            let has = |roles: &[Role]| roles.iter().all(|role| family.has(*role));
            let what = family.name;
            assert!(has(&[Role::InputNorm, Role::Output, Role::MlpNorm]), "{what}");
            assert_ne!(has(&[Role::Qkv]), has(&[Role::Queries, Role::Keys, Role::Values]), "{what}");
            assert_eq!(has(&[Role::QueryNorm]), has(&[Role::KeyNorm]), "{what}");
            let experts = has(&[Role::Router, Role::ExpertGate, Role::ExpertUp, Role::ExpertDown]);
            let dense = has(&[Role::Down]) && (has(&[Role::GateUp]) != has(&[Role::Gate, Role::Up]));
            assert_ne!(experts, dense, "{what}");
            assert_eq!(experts, family.experts.is_some(), "{what}");
            for (i, (role, hf, gguf)) in family.layer.iter().enumerate() {
                let others = &family.layer[..i];
                assert!(others.iter().all(|other| role != &other.0 && hf != &other.1), "{what} {hf}");
                assert!(others.iter().all(|other| gguf != &other.2), "{what} {gguf}");
                assert_eq!(hf.contains("{}"), role.of_expert(), "{what} {hf}");
            }
        }
    }

    #[test]
    fn one_name_is_one_thing_in_an_architecture() {
        // Tensors of a GGUF file are named before its family is known.
        for family in Family::ALL {
            for other in Family::in_gguf(family.gguf.architecture) {
                assert_eq!(family.gguf.interleaved, other.gguf.interleaved);
                for (role, hf, gguf) in family.layer {
                    let same = |row: &&Row| row.2 == *gguf && row.0.of_expert() == role.of_expert();
                    assert!(other.layer.iter().find(same).is_none_or(|row| row.1 == *hf), "{gguf}");
                }
            }
        }
    }

    #[test]
    fn families_of_gguf_files() {
        let of = |arch, experts, window| Family::of_gguf(arch, experts, window).map(Family::name);
        assert_eq!(of("llama", false, false), Some("llama"));
        assert_eq!(of("llama", false, true), Some("mistral"));
        assert_eq!(of("llama", true, true), Some("mixtral"));
        assert_eq!(of("qwen3", false, false), Some("qwen3"));
        assert_eq!(of("bloom", false, false), None);
        assert_eq!(Family::gguf_architectures(), "llama (mistral and mixtral too), phi3, qwen2, qwen3");
    }
}
