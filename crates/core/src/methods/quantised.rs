//! What the methods that quantise the states of every layer have in common.

/// The settings of such a method: those that all of them have, and its own in braces, with their defaults.
macro_rules! quant_settings {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty = $default:expr,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
        pub struct $name {
            /// Storage type of what is not quantised: the newest tokens.
            pub dtype: crate::settings::StoreType,
            /// Quantisation; absent: the method's own.
            pub quant: Option<crate::settings::Quant>,
            /// Bits to which queries and probabilities are rounded before they meet packed codes: 8, 16 or 24. Absent:
            /// 16 beside f16 numbers, 24 beside f32 ones.
            pub activation_bits: Option<u8>,
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    dtype: Default::default(),
                    quant: None,
                    activation_bits: None,
                    $($field: $default,)*
                }
            }
        }

        impl $name {
            /// The quantisation in force.
            fn quant(&self) -> crate::settings::Quant {
                self.quant.clone().unwrap_or_else(Self::own)
            }

            fn check(&self) -> crate::settings::Checked {
                self.quant().validate().map_err(|e| e.under("quant"))?;
                crate::settings::bounds::check_activation_bits(self.activation_bits)
            }
        }
    };
}

/// What they say alike: the body of a [`super::Method`] with codes along these axes of keys and of values, but for
/// `validate` and `plan`.
macro_rules! quant_method {
    ($keys:expr, $values:expr) => {
        fn of_bits(bits: u8) -> Option<Self> {
            Some(Self { quant: Some(crate::settings::Quant { bits, ..Self::own() }), ..Self::default() })
        }

        fn stored(&self) -> Stored {
            Stored::quantised(self.dtype, Some(self.quant()), [$keys, $values], self.activation_bits)
        }

        fn dtype(&mut self) -> &mut crate::settings::StoreType {
            &mut self.dtype
        }

        fn settle(&mut self) {
            self.quant = Some(self.quant());
        }
    };
}

pub(super) use {quant_method, quant_settings};
