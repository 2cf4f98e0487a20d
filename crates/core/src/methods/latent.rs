//! Cross-layer latents in a calibrated basis: see [`crate::latent`].

use super::{Alike, Method, Stored};
use crate::account::{Nominal, nominal_latents};
use crate::cache::KvCache;
use crate::latent::{LatentCache, account};
use crate::layered::Plan;
use crate::settings::bounds::{MOST_RATIO, MOST_TOKENS, check_activation_bits, check_number};
use crate::settings::{Calibration, Checked, Group, LatentSide, ModelShape, StoreType};
use crate::store::Side;
use crate::{Footprint, Resources, Result};

/// Cross-layer latents in a calibrated basis.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Latent {
    /// Storage type of exact states: the first tokens and the newest.
    pub dtype: StoreType,
    /// Storage type of numbers beside codes.
    pub magnitudes: StoreType,
    /// Bits to which queries and probabilities are rounded before they meet packed codes: 8, 16 or 24. Absent: 16
    /// beside f16 numbers, 24 beside f32 ones.
    pub activation_bits: Option<u8>,
    /// First tokens kept exact.
    pub sinks: usize,
    /// Newest tokens kept exact.
    pub residual: usize,
    /// Keys.
    pub k: LatentSide,
    /// Values.
    pub v: LatentSide,
    /// Text that the basis is calibrated on.
    pub calibration: Calibration,
    /// A calibrated basis file, instead of calibrating.
    pub basis: Option<String>,
    /// Compression that `group = "auto"` has to reach.
    pub budget_ratio: f64,
}

impl Latent {
    /// Whether both are calibrated alike, on the same text without as many first tokens: they can share a basis.
    pub fn shares_basis(&self, other: &Self) -> bool {
        self.calibration == other.calibration && self.sinks == other.sinks
    }
}

impl Default for Latent {
    fn default() -> Self {
        Self {
            dtype: StoreType::F16,
            magnitudes: StoreType::F16,
            activation_bits: None,
            sinks: 4,
            residual: 0,
            k: LatentSide::default(),
            v: LatentSide::default(),
            calibration: Calibration::default(),
            basis: None,
            budget_ratio: super::pairing::BUDGET_RATIO,
        }
    }
}

impl Latent {
    pub(super) const ABOUT: &'static str =
        "cross-layer latents in a calibrated basis; attention works on the coefficients";

    /// The settings of one side.
    pub(crate) fn side(&self, side: Side) -> &LatentSide {
        if side == Side::Keys { &self.k } else { &self.v }
    }

    fn is_auto(&self) -> bool {
        [self.k.group, self.v.group].contains(&Group::Auto)
    }
}

impl Method for Latent {
    fn of_bits(bits: u8) -> Option<Self> {
        let side = LatentSide { bits, ..LatentSide::default() };
        Some(Self { k: side.clone(), v: side, ..Self::default() })
    }

    fn validate(&self) -> Checked {
        for (key, tokens) in [("sinks", self.sinks), ("residual", self.residual)] {
            check_number(key, tokens, 0..=MOST_TOKENS)?;
        }
        check_activation_bits(self.activation_bits)?;
        check_number("budget_ratio", self.budget_ratio, 1.0..=MOST_RATIO)?;
        self.calibration.validate().map_err(|e| e.under("calibration"))?;
        self.k.validate().map_err(|e| e.under("k"))?;
        self.v.validate().map_err(|e| e.under("v"))
    }

    fn stored(&self) -> Stored {
        Stored { activation_bits: self.activation_bits, ..Stored::exact(self.dtype) }
    }

    fn dtype(&mut self) -> &mut StoreType {
        &mut self.dtype
    }

    fn magnitudes(&mut self) -> Option<&mut StoreType> {
        Some(&mut self.magnitudes)
    }

    fn plan(&self, _: &ModelShape, _: &Resources) -> Result<Plan> {
        super::no_plan("latent")
    }

    fn build(&self, _: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(LatentCache::new(resources.latent_plan()?.clone())))
    }

    fn label(&self) -> Option<String> {
        let (k, v) = (&self.k, &self.v);
        if k.rate.is_none() && v.rate.is_none() {
            return Some(match k.bits == v.bits {
                true => format!("latent-{}", k.bits),
                false => format!("latent-k{}v{}", k.bits, v.bits),
            });
        }
        let rate = |s: &LatentSide| s.rate.map_or_else(|| s.bits.to_string(), |r| format!("{r}b"));
        let (k, v) = (rate(k), rate(v));
        Some(if k == v { format!("latent-{k}") } else { format!("latent-k{k}v{v}") })
    }

    fn calibration(&self) -> Option<&Calibration> {
        (self.basis.is_none() || self.is_auto()).then_some(&self.calibration)
    }

    fn budget_ratio(&self) -> Option<f64> {
        self.is_auto().then_some(self.budget_ratio)
    }

    fn budget(&mut self) -> Option<&mut f64> {
        Some(&mut self.budget_ratio)
    }

    fn inert(&self) -> &'static [&'static str] {
        if self.is_auto() { &[] } else { &["budget_ratio"] }
    }

    fn settle(&mut self) {
        if !self.is_auto() {
            self.budget_ratio = super::pairing::BUDGET_RATIO;
        }
    }

    /// Its transforms are of all layers, and groups of them differ in what they keep.
    fn alike(&self) -> Alike {
        Alike::Nothing
    }

    fn footprint(&self, shape: &ModelShape, context: usize) -> Option<Result<Footprint>> {
        Some(account::footprint(self, shape, context))
    }

    fn measured_layers(&self, shape: &ModelShape, resources: &Resources) -> usize {
        if resources.latent.is_some() {
            return shape.layers;
        }
        let groups = [&self.k, &self.v].map(|side| side.group.layers(shape.layers));
        2 * groups.into_iter().max().unwrap_or(1)
    }

    fn shared_bytes(&self, shape: &ModelShape, context: usize) -> Result<usize> {
        account::shared_bytes(self, shape, context)
    }

    fn nominal(&self, _: &ModelShape, _: usize) -> Option<Nominal> {
        nominal_latents(&self.k, &self.v)
    }
}
