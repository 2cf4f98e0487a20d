//! Settings that are a word or a number.

/// An enumeration of a word and a number, read and written as the word or as a non-negative integer.
macro_rules! as_word_or_number {
    ($name:ident, $word:ident = $text:literal, $number:ident, $expected:literal) => {
        #[cfg(feature = "serde")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                match self {
                    $name::$word => s.serialize_str($text),
                    $name::$number(n) => s.serialize_u64(*n as u64),
                }
            }
        }

        #[cfg(feature = "serde")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                $crate::settings::word::read(d, $text, $expected)
                    .map(|n| n.map_or($name::$word, $name::$number))
            }
        }
    };
}
pub(crate) use as_word_or_number;

/// Reads `word` (as `None`) or a non-negative integer.
#[cfg(feature = "serde")]
pub(crate) fn read<'de, D: serde::Deserializer<'de>>(
    d: D,
    word: &'static str,
    expected: &'static str,
) -> Result<Option<usize>, D::Error> {
    use serde::de::{Error, Unexpected};

    struct Visitor(&'static str, &'static str);
    impl serde::de::Visitor<'_> for Visitor {
        type Value = Option<usize>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.1)
        }
        fn visit_str<E: Error>(self, v: &str) -> Result<Self::Value, E> {
            if v == self.0 { Ok(None) } else { Err(E::invalid_value(Unexpected::Str(v), &self)) }
        }
        fn visit_i64<E: Error>(self, v: i64) -> Result<Self::Value, E> {
            let number = usize::try_from(v);
            number.map(Some).map_err(|_| E::invalid_value(Unexpected::Signed(v), &self))
        }
        fn visit_u64<E: Error>(self, v: u64) -> Result<Self::Value, E> {
            Ok(Some(v as usize))
        }
    }
    d.deserialize_any(Visitor(word, expected))
}
