//! The methods: one file each, with its formula and its source, its settings with their defaults and checks, and what
//! it stores. A new one is its file and its line in the table below; whatever lists, reads, builds or counts methods
//! goes by that table.

mod pairing;
mod quantised;
mod spec;

use std::fmt::Debug;

pub use self::pairing::Pairing;
use crate::account::{Nominal, nominal_layers};
use crate::cache::KvCache;
use crate::layered::{Layered, Plan};
use crate::plain::Plain;
use crate::settings::{Axis, Calibration, Checked, ModelShape, Pairs, Quant, StartLayer, StoreType};
use crate::store::{Scheme, Side, Store};
use crate::{Error, Footprint, Precision, Resources, Result};

/// The table of methods: the name in configuration files, the settings, and the file that they are in.
macro_rules! methods {
    ($($name:literal => $settings:ident in $file:ident,)*) => {
        $(
            mod $file;
            pub use self::$file::$settings;
        )*

        /// A cache: the method and every setting that it reads.
        #[derive(Debug, Clone, PartialEq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(tag = "method"))]
        #[non_exhaustive]
        pub enum CacheSpec {
            $(
                #[doc = concat!("`", $name, "`, see [`", stringify!($settings), "`].")]
                #[cfg_attr(feature = "serde", serde(rename = $name))]
                $settings($settings),
            )*
        }

        /// All methods, in the order in which tables list them.
        pub const METHODS: &[MethodInfo] = &[$(
            MethodInfo {
                name: $name,
                about: $settings::ABOUT,
                default: || CacheSpec::$settings($settings::default()),
                #[cfg(feature = "serde")]
                keys: crate::settings::fields::fields::<$settings>,
                #[cfg(feature = "toml")]
                read: |table| serde_path_to_error::deserialize(table).map(CacheSpec::$settings),
            },
        )*];

        impl CacheSpec {
            /// The method's name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(CacheSpec::$settings(_) => $name,)*
                }
            }

            /// What the method says.
            pub(crate) fn method(&self) -> &dyn Method {
                match self {
                    $(CacheSpec::$settings(settings) => settings,)*
                }
            }

            pub(crate) fn method_mut(&mut self) -> &mut dyn Method {
                match self {
                    $(CacheSpec::$settings(settings) => settings,)*
                }
            }

            /// The same method with codes of so many bits, where it has codes.
            pub(crate) fn with_bits(&self, bits: u8) -> Option<Self> {
                match self {
                    $(CacheSpec::$settings(_) => $settings::of_bits(bits).map(CacheSpec::$settings),)*
                }
            }
        }
    };
}

methods! {
    "full" => Full in full,
    "mean" => Mean in mean,
    "max_norm" => MaxNorm in max_norm,
    "minicache" => MiniCache in minicache,
    "rank_one" => RankOne in rank_one,
    "rtn" => Rtn in rtn,
    "kivi" => Kivi in kivi,
    "smoothquant" => SmoothQuant in smoothquant,
    "fp8" => Fp8 in fp8,
    "rotated" => Rotated in rotated,
    "turboquant" => TurboQuant in turboquant,
    "h2o" => H2o in h2o,
    "sinks" => Sinks in sinks,
    "snapkv" => SnapKv in snapkv,
    "expected_attention" => ExpectedAttention in expected_attention,
    "xkv" => Xkv in xkv,
    "latent" => Latent in latent,
}

/// A line of the table of methods.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct MethodInfo {
    /// The name in configuration files.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The method with its defaults.
    pub default: fn() -> CacheSpec,
    /// The keys of its settings.
    #[cfg(feature = "serde")]
    pub keys: fn() -> &'static [&'static str],
    /// Reads the settings.
    #[cfg(feature = "toml")]
    pub(crate) read: fn(toml::Table) -> std::result::Result<CacheSpec, ReadError>,
}

/// What is wrong with a table of settings, and where.
#[cfg(feature = "toml")]
pub(crate) type ReadError = serde_path_to_error::Error<toml::de::Error>;

impl MethodInfo {
    /// The method of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        METHODS.iter().find(|m| m.name == name)
    }

    /// What to say of a name that no method has.
    pub(crate) fn unknown(name: &str) -> String {
        let names: Vec<_> = METHODS.iter().map(|m| m.name).collect();
        format!("unknown method `{name}`; one of {}", names.join(", "))
    }
}

/// How states that a method does not merge are stored, and the shared vectors of those that it does.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stored {
    /// The type of what is not quantised.
    pub(crate) dtype: StoreType,
    pub(crate) quant: Option<Quant>,
    /// Axis of quantised keys and of quantised values, unless `quant` says otherwise.
    pub(crate) axes: Option<[Axis; 2]>,
    /// Bits of what meets codes, where set.
    pub(crate) activation_bits: Option<u8>,
}

impl Stored {
    /// Codes, or what is left exact beside them.
    fn quantised(
        dtype: StoreType,
        quant: Option<Quant>,
        axes: [Axis; 2],
        activation_bits: Option<u8>,
    ) -> Self {
        Self { dtype, quant, axes: Some(axes), activation_bits }
    }

    /// Whole states.
    fn exact(dtype: StoreType) -> Self {
        Self { dtype, ..Self::default() }
    }

    /// Axes of quantised keys and values.
    pub(crate) fn axes(&self) -> [Axis; 2] {
        let given = self.quant.as_ref().map_or([None; 2], |q| [q.keys, q.values]);
        let own = self.axes.unwrap_or([Axis::Token; 2]);
        [given[0].unwrap_or(own[0]), given[1].unwrap_or(own[1])]
    }

    /// The storage of keys and of values.
    pub(crate) fn schemes(&self) -> [Scheme; 2] {
        let Some(q) = &self.quant else { return [exact(self.dtype); 2] };
        self.axes().map(|axis| Scheme::Quant { bits: q.bits, group: q.group, axis, residual: q.residual })
    }

    /// An empty store for one side of one layer.
    fn store(&self, shape: &ModelShape, scheme: Scheme, side: Side) -> Store {
        Store::new(shape.kv_heads, shape.head_dim, scheme, side)
            .with_precision(Precision::of(self.activation_bits, self.dtype))
            .with_waiting(self.dtype)
    }

    /// A plan in which every layer stores its own states.
    fn unmerged(&self, shape: &ModelShape) -> Plan {
        let own = |scheme, side| Plain::boxed(self.store(shape, scheme, side));
        let [keys, values] = self.schemes();
        Plan::unmerged(own(keys, Side::Keys), own(values, Side::Values))
    }
}

/// What [`crate::footprint`] has to build to know what a whole cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alike {
    /// One unmerged layer and one pair, times their numbers.
    Layers,
    /// One KV head of one layer, filled in one step: what heads hold after a prefill depends on it having been one.
    Heads,
    /// All of it: its layers differ.
    Nothing,
}

/// What a method says of itself.
pub(crate) trait Method: Debug {
    /// The method with codes of so many bits; `None` where it has no codes.
    fn of_bits(bits: u8) -> Option<Self>
    where
        Self: Sized,
    {
        let _ = bits;
        None
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// Names the key and what is allowed.
    fn validate(&self) -> Checked;

    /// How states are stored.
    fn stored(&self) -> Stored;

    /// The setting of the type in which exact states are stored.
    fn dtype(&mut self) -> &mut StoreType;

    /// That of magnitudes, where there are some.
    fn magnitudes(&mut self) -> Option<&mut StoreType> {
        None
    }

    /// What layers and pairs of them store, of a method that keeps every token in its own or in its pair's store.
    ///
    /// # Errors
    /// What `resources` lacks.
    fn plan(&self, shape: &ModelShape, resources: &Resources) -> Result<Plan>;

    /// An empty cache.
    ///
    /// # Errors
    /// As [`Method::plan`].
    fn build(&self, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(Layered::new(shape, &self.plan(shape, resources)?)))
    }

    /// The name in tables, where it is not the method's with the bits of its codes.
    fn label(&self) -> Option<String> {
        None
    }

    /// How pairs are merged, where they are.
    fn pairing(&self) -> Option<Pairing> {
        None
    }

    /// The settings of which layers are merged.
    fn pairs(&mut self) -> Option<(&mut StartLayer, &mut Pairs)> {
        None
    }

    /// See [`CacheSpec::calibration`].
    fn calibration(&self) -> Option<&Calibration> {
        None
    }

    /// See [`CacheSpec::budget_ratio`].
    fn budget_ratio(&self) -> Option<f64> {
        None
    }

    /// The setting behind it.
    fn budget(&mut self) -> Option<&mut f64> {
        None
    }

    /// Keys of the settings that make no difference beside the others as they are.
    #[cfg_attr(not(feature = "serde"), allow(dead_code))]
    fn inert(&self) -> &'static [&'static str] {
        &[]
    }

    /// Puts defaults in place of what makes no difference, and what is in force in place of what is left open.
    fn settle(&mut self) {}

    /// See [`CacheSpec::needs_attention`].
    fn needs_attention(&self) -> bool {
        false
    }

    /// See [`CacheSpec::drops_tokens`].
    fn drops_tokens(&self) -> bool {
        false
    }

    /// What parts of the cache are alike.
    fn alike(&self) -> Alike {
        match self.pairing() {
            // Keys and values are merged in different layers.
            Some(pairing) if matches!(pairing.pairs, Pairs::Chosen(_)) => Alike::Nothing,
            _ => Alike::Layers,
        }
    }

    /// What a cache holds that cannot be built without the model's weights: of `context` tokens.
    ///
    /// # Errors
    /// Settings that only the weights decide.
    fn footprint(&self, shape: &ModelShape, context: usize) -> Option<Result<Footprint>> {
        let _ = (shape, context);
        None
    }

    /// Layers of full width that a measurement of the footprint fills.
    fn measured_layers(&self, shape: &ModelShape, resources: &Resources) -> usize {
        let _ = resources;
        match self.alike() {
            Alike::Layers => 3,
            Alike::Heads => 1,
            Alike::Nothing => shape.layers,
        }
    }

    /// Bytes held once for all sequences.
    ///
    /// # Errors
    /// Settings that only the model's weights decide.
    fn shared_bytes(&self, shape: &ModelShape, context: usize) -> Result<usize> {
        let _ = (shape, context);
        Ok(0)
    }

    /// The ratio on paper; `None` where only the model's weights decide it.
    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let _ = context;
        Some(nominal_layers(&self.stored(), self.pairing().as_ref(), shape))
    }
}

/// Builds an empty cache.
///
/// # Errors
/// A specification that does not fit the shape; a resource that the method needs and `resources` lacks.
pub fn build(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    spec.method().build(shape, resources)
}

/// The methods that keep every token.
pub(crate) fn layered(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Layered> {
    spec.validate_for(shape).map_err(|e| e.under("cache"))?;
    Ok(Layered::new(shape, &spec.method().plan(shape, resources)?))
}

/// The error of a method that has no [`Method::plan`].
fn no_plan<T>(name: &str) -> Result<T> {
    Err(Error::Missing(format!("the method `{name}` does not work on a pair of layers")))
}

/// What every method that drops tokens, head by head, says alike: the body of its [`Method`], but for what it checks, builds
/// and comes to. Those named `by_attention` rank tokens by the attention that they receive.
macro_rules! evicting_method {
    ($name:literal, by_attention) => {
        evicting_method!($name);

        fn needs_attention(&self) -> bool {
            true
        }
    };
    ($name:literal) => {
        fn stored(&self) -> super::Stored {
            super::Stored::exact(self.dtype)
        }

        fn dtype(&mut self) -> &mut crate::settings::StoreType {
            &mut self.dtype
        }

        fn plan(
            &self,
            _: &crate::settings::ModelShape,
            _: &crate::Resources,
        ) -> crate::Result<crate::layered::Plan> {
            super::no_plan($name)
        }

        fn drops_tokens(&self) -> bool {
            true
        }

        fn alike(&self) -> super::Alike {
            super::Alike::Heads
        }
    };
}

pub(crate) use evicting_method;

/// The storage of states that are not quantised.
pub(crate) fn exact(dtype: StoreType) -> Scheme {
    match dtype {
        StoreType::F16 => Scheme::F16,
        StoreType::F32 => Scheme::F32,
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_in_the_table_with_its_own_keys() {
        for method in METHODS {
            let spec = (method.default)();
            assert_eq!(spec.name(), method.name);
            assert!(spec.validate().is_ok() && !method.about.is_empty());
            assert!((method.keys)().contains(&"dtype"), "{}", method.name);
        }
        let keys = |name| CacheSpec::by_name(name).expect("a method").keys().join(" ");
        assert!(keys("minicache").contains("start_layer") && keys("minicache").contains("retention"));
        assert!(keys("kivi").contains("quant") && !keys("kivi").contains("start_layer"));
        assert!(keys("h2o").contains("heavy"));
        assert!(keys("latent").contains("basis") && keys("latent").contains("activation_bits"));
    }
}
