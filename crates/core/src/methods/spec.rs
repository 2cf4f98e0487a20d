//! A cache: one of the methods with its settings. Everything here asks the method's own file.

use super::{CacheSpec, MethodInfo, Pairing};
use crate::settings::{Calibration, Checked, ModelShape, Pairs, Quant, SettingError, StartLayer, StoreType};

impl Default for CacheSpec {
    fn default() -> Self {
        CacheSpec::Full(Default::default())
    }
}

impl CacheSpec {
    /// A method by its name with its defaults, or `NAME-BITS` (such as `kivi-2`).
    ///
    /// # Errors
    /// Names of no method, and bits that it cannot have.
    pub fn by_name(text: &str) -> Result<Self, SettingError> {
        let unknown = || {
            let message = format!("{}, or an inline table", MethodInfo::unknown(text));
            SettingError::new("", message)
        };
        if let Some(method) = MethodInfo::find(text) {
            return Ok((method.default)());
        }
        let (name, bits) = text.rsplit_once('-').ok_or_else(unknown)?;
        let bits = bits.parse().map_err(|_| unknown())?;
        let method = MethodInfo::find(name).ok_or_else(unknown)?;
        let spec = (method.default)().with_bits(bits).ok_or_else(unknown)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// Names the key and what is allowed.
    pub fn validate(&self) -> Checked {
        self.method().validate()
    }

    /// Checks the settings against a model.
    ///
    /// # Errors
    /// As [`CacheSpec::validate`] and [`ModelShape::validate`]; a start layer beyond the model, pairs that it does not
    /// have. (A quantisation group never spans heads: it is cut at the head's end.)
    pub fn validate_for(&self, shape: &ModelShape) -> Checked {
        shape.validate()?;
        self.validate()?;
        self.pairing().map_or(Ok(()), |pairing| pairing.validate_for(shape.layers))
    }

    /// A short name for tables and legends, such as `kivi-2` or `minicache-4`.
    pub fn label(&self) -> String {
        self.method().label().unwrap_or_else(|| match self.quantisation() {
            Some(q) => format!("{}-{}", self.name(), q.bits),
            None => self.name().to_string(),
        })
    }

    /// The quantisation in force of a method that has one: the one given, the method's own default, or none.
    pub fn quantisation(&self) -> Option<Quant> {
        self.method().stored().quant
    }

    /// How keys and values of single layers, and what pairs of layers share, are stored, of a method that keeps every token.
    pub fn schemes(&self) -> [crate::Scheme; 2] {
        self.method().stored().schemes()
    }

    /// The storage type of what is not quantised.
    pub fn dtype(&self) -> StoreType {
        self.method().stored().dtype
    }

    /// The same cache with what is not quantised stored in `dtype`.
    #[must_use]
    pub fn with_dtype(mut self, dtype: StoreType) -> Self {
        *self.method_mut().dtype() = dtype;
        self
    }

    /// The same cache with every number that is not a code as f32: for parity runs.
    #[must_use]
    pub fn with_f32(self) -> Self {
        let mut spec = self.with_dtype(StoreType::F32);
        if let Some(magnitudes) = spec.method_mut().magnitudes() {
            *magnitudes = StoreType::F32;
        }
        spec
    }

    /// What a method that merges pairs of layers says of it.
    pub fn pairing(&self) -> Option<Pairing> {
        self.method().pairing()
    }

    /// The same cache with deep pairs from `start_layer` on; methods that merge nothing stay as they are.
    #[must_use]
    pub fn with_start_layer(mut self, start_layer: StartLayer) -> Self {
        self.method_mut().pairs().into_iter().for_each(|(start, _)| *start = start_layer);
        self
    }

    /// The same cache merging `pairs`; methods that merge nothing stay as they are.
    #[must_use]
    pub fn with_pairs(mut self, pairs: Pairs) -> Self {
        if let Some((_, own)) = self.method_mut().pairs() {
            *own = pairs;
        }
        self
    }

    /// The pairs (a, a + 1) of layers whose keys are merged, and those whose values are, in a model of `layers` layers.
    /// Of `pairs = "auto"`, which has to be resolved first, the deep ones.
    pub fn merged_pairs(&self, layers: usize) -> [Vec<(usize, usize)>; 2] {
        self.pairing().map_or_else(Default::default, |pairing| pairing.merged(layers))
    }

    /// The number of pairs of the side that merges more of them (see [`CacheSpec::merged_pairs`]).
    pub fn most_pairs(&self, layers: usize) -> usize {
        self.merged_pairs(layers).map(|pairs| pairs.len()).into_iter().max().unwrap_or(0)
    }

    /// The text that has to be looked at before this cache can be built, if any: for a basis without a file of its own,
    /// or for what is left to choice.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.method().calibration()
    }

    /// Whether calibration text has to say first which layers are merged or share latents.
    pub fn is_auto(&self) -> bool {
        self.method().budget_ratio().is_some()
    }

    /// The compression that an automatic choice has to reach.
    pub fn budget_ratio(&self) -> Option<f64> {
        self.method().budget_ratio()
    }

    /// The same cache with another budget for automatic choices.
    #[must_use]
    pub fn with_budget_ratio(mut self, ratio: f64) -> Self {
        self.method_mut().budget().into_iter().for_each(|budget| *budget = ratio);
        self
    }

    /// Whether the method ranks tokens by the attention that they receive, so that states alone do not fill it.
    pub fn needs_attention(&self) -> bool {
        self.method().needs_attention()
    }

    /// Bits that queries and probabilities are rounded to before they meet codes, where the settings say so.
    pub fn activation_bits(&self) -> Option<u8> {
        self.method().stored().activation_bits
    }

    /// Whether the method drops tokens for good.
    pub fn drops_tokens(&self) -> bool {
        self.method().drops_tokens()
    }

    /// Whether the dotted key makes a difference to this cache.
    #[cfg(feature = "serde")]
    pub fn reads(&self, key: &str) -> bool {
        let field = key.split('.').next().unwrap_or(key);
        field == "method" || self.keys().contains(&field) && !self.method().inert().contains(&field)
    }

    /// The keys of the method's settings.
    #[cfg(feature = "serde")]
    pub fn keys(&self) -> &'static [&'static str] {
        MethodInfo::find(self.name()).map_or(&[], |m| (m.keys)())
    }

    /// The same cache in the one form of all that mean the same: with defaults in place of what makes no difference, and
    /// the start layer as a number where `layers` is known.
    #[must_use]
    pub fn canonical(&self, layers: Option<usize>) -> Self {
        let mut out = self.clone();
        let method = out.method_mut();
        method.settle();
        if let (Some(layers), Some((start, _))) = (layers, method.pairs()) {
            *start = StartLayer::Layer(start.resolve(layers));
        }
        out
    }
}
