//! What the methods that merge pairs of layers have in common: which layers, which sides, and how both are stored.

use std::sync::Arc;

use super::Stored;
use crate::layered::Plan;
use crate::merge::Merge;
use crate::pair::SideSettings;
use crate::settings::{
    Axis, Checked, Granularity, KeySpace, MergeSides, ModelShape, Pairs, Retention, SettingError, StartLayer,
    StoreType,
};
use crate::store::{Scheme, Side};
use crate::{Error, Precision, Resources, Result};

/// How pairs of layers are merged.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pairing {
    /// First merged layer.
    pub start_layer: StartLayer,
    /// Which pairs are merged.
    pub pairs: Pairs,
    /// Vectors over all heads, or per head.
    pub granularity: Granularity,
    /// Merge keys after or before RoPE.
    pub key_space: KeySpace,
    /// Keys, values or both.
    pub merge: MergeSides,
    /// Storage type of magnitudes.
    pub magnitudes: StoreType,
    /// First tokens kept exact.
    pub sinks: usize,
    /// Newest tokens that are not merged yet.
    pub residual: usize,
}

impl Pairing {
    /// The pairs (a, a + 1) of layers whose keys are merged, and those whose values are, in a model of `layers` layers.
    pub fn merged(&self, layers: usize) -> [Vec<(usize, usize)>; 2] {
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

    /// Checks the layers against a model's number of them.
    pub(crate) fn validate_for(&self, layers: usize) -> Checked {
        let start = self.start_layer.resolve(layers);
        if start >= layers {
            let message = format!("must be below the model's {layers} layers, not {start}");
            return Err(SettingError::new("start_layer", message));
        }
        let Pairs::Chosen(chosen) = &self.pairs else { return Ok(()) };
        for (side, first) in [("keys", &chosen.keys), ("values", &chosen.values)] {
            let apart = first.windows(2).all(|w| w[0] < w[1] && w[1] - w[0] > 1);
            if !apart || first.last().is_some_and(|a| layers.saturating_sub(1) <= *a) {
                let message = format!(
                    "must be the first layers of pairs that do not overlap, ascending, below {}",
                    layers.saturating_sub(1)
                );
                return Err(SettingError::new(format!("pairs.{side}"), message));
            }
        }
        Ok(())
    }

    /// A plan in which pairs of layers share vectors merged by `merge`, stored by KIVI's axes where quantised.
    pub(super) fn plan(
        &self,
        stored: &Stored,
        shape: &ModelShape,
        resources: &Resources,
        merge: &Arc<dyn Merge>,
        retention: Option<&Retention>,
    ) -> Result<Plan> {
        if self.pairs == Pairs::Auto {
            let message = "pairs = \"auto\" has to be resolved on calibration text first";
            return Err(Error::Missing(message.to_string()));
        }
        let retained = match &stored.quant {
            Some(q) if q.retained => {
                Scheme::Quant { bits: q.bits, group: q.group, axis: Axis::Token, residual: 0 }
            }
            _ => super::exact(stored.dtype),
        };
        let rotary = match (self.key_space, &resources.rotary) {
            (KeySpace::Cached, _) => None,
            (KeySpace::PreRope, Some(rotary)) => Some(rotary.clone()),
            (KeySpace::PreRope, None) => {
                let message = "key_space = \"pre_rope\" needs the model's rotary embedding, and this cache has no model";
                return Err(Error::Missing(message.to_string()));
            }
        };
        let settings = |side, shared, rotary| SideSettings {
            side,
            merge: merge.clone(),
            residual: self.residual,
            sinks: self.sinks,
            exact: stored.dtype,
            shared,
            retained,
            magnitudes: self.magnitudes,
            precision: Precision::of(stored.activation_bits, self.magnitudes),
            retention: retention.cloned(),
            per_head: self.granularity == Granularity::Head,
            rotary,
        };
        let schemes = stored.schemes();
        let [key_pairs, value_pairs] = self.merged(shape.layers);
        Ok(Plan {
            keys: Some(settings(Side::Keys, schemes[0], rotary)),
            values: Some(settings(Side::Values, schemes[1], None)),
            key_pairs,
            value_pairs,
            joint: retention.is_some_and(|r| r.joint),
            ..stored.unmerged(shape)
        })
    }
}

/// The settings of a method that merges pairs of layers: those that all of them have, and its own in braces, with their
/// defaults.
macro_rules! pair_settings {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty = $default:expr,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
        pub struct $name {
            /// First merged layer.
            pub start_layer: crate::settings::StartLayer,
            /// Which pairs are merged.
            pub pairs: crate::settings::Pairs,
            $($(#[$field_doc])* pub $field: $type,)*
            /// Vectors over all heads, or per head.
            pub granularity: crate::settings::Granularity,
            /// Merge keys after or before RoPE.
            pub key_space: crate::settings::KeySpace,
            /// Keys, values or both.
            pub merge: crate::settings::MergeSides,
            /// Storage type of what is not quantised: whole states, and the newest tokens of quantised ones.
            pub dtype: crate::settings::StoreType,
            /// Storage type of magnitudes.
            pub magnitudes: crate::settings::StoreType,
            /// Quantisation of the shared vectors and of the layers that are not merged; absent: none.
            pub quant: Option<crate::settings::Quant>,
            /// Bits to which queries and probabilities are rounded before they meet packed codes: 8, 16 or 24. Absent:
            /// 16 beside f16 numbers, 24 beside f32 ones.
            pub activation_bits: Option<u8>,
            /// First tokens kept exact; the paper keeps none.
            #[cfg_attr(feature = "serde", serde(skip_serializing_if = "super::pairing::is_none"))]
            pub sinks: usize,
            /// Newest tokens that are not merged yet; the paper merges at once.
            pub residual: usize,
            /// Text that automatic choices are made on.
            pub calibration: crate::settings::Calibration,
            /// Compression that `pairs = "auto"` has to reach.
            pub budget_ratio: f64,
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    start_layer: crate::settings::StartLayer::Half,
                    pairs: Default::default(),
                    $($field: $default,)*
                    granularity: Default::default(),
                    key_space: Default::default(),
                    merge: Default::default(),
                    dtype: Default::default(),
                    magnitudes: Default::default(),
                    quant: None,
                    activation_bits: None,
                    sinks: 0,
                    residual: 0,
                    calibration: Default::default(),
                    budget_ratio: super::pairing::BUDGET_RATIO,
                }
            }
        }

        impl $name {
            fn is_auto(&self) -> bool {
                self.pairs == crate::settings::Pairs::Auto
            }

            fn paired(&self) -> super::Pairing {
                super::Pairing {
                    start_layer: self.start_layer,
                    pairs: self.pairs.clone(),
                    granularity: self.granularity,
                    key_space: self.key_space,
                    merge: self.merge,
                    magnitudes: self.magnitudes,
                    sinks: self.sinks,
                    residual: self.residual,
                }
            }
        }
    };
}

/// What every one of those methods says alike: the body of its [`super::Method`], but for `validate` and `plan`.
macro_rules! pair_method {
    () => {
        fn of_bits(bits: u8) -> Option<Self> {
            Some(Self {
                quant: Some(crate::settings::Quant { bits, ..Default::default() }),
                ..Self::default()
            })
        }

        fn stored(&self) -> super::Stored {
            use crate::settings::Axis;
            let axes = [Axis::Channel, Axis::Token];
            super::Stored::quantised(self.dtype, self.quant.clone(), axes, self.activation_bits)
        }

        fn dtype(&mut self) -> &mut crate::settings::StoreType {
            &mut self.dtype
        }

        fn magnitudes(&mut self) -> Option<&mut crate::settings::StoreType> {
            Some(&mut self.magnitudes)
        }

        fn pairing(&self) -> Option<super::Pairing> {
            Some(self.paired())
        }

        fn pairs(&mut self) -> Option<(&mut crate::settings::StartLayer, &mut crate::settings::Pairs)> {
            Some((&mut self.start_layer, &mut self.pairs))
        }

        fn calibration(&self) -> Option<&crate::settings::Calibration> {
            self.is_auto().then_some(&self.calibration)
        }

        fn budget_ratio(&self) -> Option<f64> {
            self.is_auto().then_some(self.budget_ratio)
        }

        fn budget(&mut self) -> Option<&mut f64> {
            Some(&mut self.budget_ratio)
        }

        fn inert(&self) -> &'static [&'static str] {
            if self.is_auto() { &[] } else { &["calibration", "budget_ratio"] }
        }

        fn settle(&mut self) {
            if !self.is_auto() {
                self.calibration = Default::default();
                self.budget_ratio = super::pairing::BUDGET_RATIO;
            }
        }
    };
}

/// The checks that they have in common.
macro_rules! check_pair_settings {
    ($settings:expr) => {{
        use crate::settings::bounds::{MOST_RATIO, MOST_TOKENS, check_activation_bits, check_number};
        let settings = $settings;
        for (key, tokens) in [("sinks", settings.sinks), ("residual", settings.residual)] {
            check_number(key, tokens, 0..=MOST_TOKENS)?;
        }
        settings.quant.as_ref().map_or(Ok(()), |q| q.validate().map_err(|e| e.under("quant")))?;
        check_activation_bits(settings.activation_bits)?;
        check_number("budget_ratio", settings.budget_ratio, 1.0..=MOST_RATIO)?;
        settings.calibration.validate().map_err(|e| e.under("calibration"))
    }};
}

pub(crate) use {check_pair_settings, pair_method, pair_settings};

/// Compression that an automatic choice has to reach, where nothing else is said.
pub(super) const BUDGET_RATIO: f64 = 6.0;

/// A cache that keeps no first tokens says nothing of them, as before merging methods could keep some.
#[cfg(feature = "serde")]
pub(super) fn is_none(tokens: &usize) -> bool {
    *tokens == 0
}
