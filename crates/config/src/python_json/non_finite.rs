//! Numbers that JSON cannot write: `NaN`, the infinities and what is beyond `f64`.

use serde_json::{Map, Value};

/// The one key of an object that stands for a number which JSON cannot write.
pub(super) const NON_FINITE: &str = "$number";

/// A number, also one that JSON cannot write.
pub fn as_f64(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| match value {
        Value::Object(map) if map.len() == 1 => map.get(NON_FINITE)?.as_str().and_then(non_finite),
        _ => None,
    })
}

/// The words for numbers that JSON cannot write, as Python spells them.
pub(super) fn non_finite(word: &str) -> Option<f64> {
    match word {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

fn word(number: f64) -> &'static str {
    if number.is_nan() {
        "NaN"
    } else if number > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    }
}

/// The value that stands for `number`, also where JSON cannot write it.
pub fn from_f64(number: f64) -> Value {
    let marked = || Value::Object(Map::from_iter([(NON_FINITE.to_string(), word(number).into())]));
    serde_json::Number::from_f64(number).map_or_else(marked, Value::Number)
}

/// For `#[serde(with = "...")]` on a field of `f64`: `serde_json` would write `null` for what is not finite and not read
/// it again. It is written as a string, so that the file stays JSON for everyone (`"NaN"`, which Python's `float`
/// takes), and read as that or as the bare word.
pub mod number {
    use serde::de::{Deserializer, Error, MapAccess, Unexpected, Visitor};
    use serde::ser::Serializer;

    use super::{NON_FINITE, non_finite, word};

    /// Writes a number.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if number.is_finite() {
            serializer.serialize_f64(*number)
        } else {
            serializer.serialize_str(word(*number))
        }
    }

    /// Reads a number.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        deserializer.deserialize_any(Number)
    }

    struct Number;

    impl<'de> Visitor<'de> for Number {
        type Value = f64;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a number")
        }

        fn visit_f64<E: Error>(self, v: f64) -> Result<f64, E> {
            Ok(v)
        }

        fn visit_i64<E: Error>(self, v: i64) -> Result<f64, E> {
            Ok(v as f64)
        }

        fn visit_u64<E: Error>(self, v: u64) -> Result<f64, E> {
            Ok(v as f64)
        }

        fn visit_str<E: Error>(self, v: &str) -> Result<f64, E> {
            non_finite(v).ok_or_else(|| E::invalid_value(Unexpected::Str(v), &self))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<f64, A::Error> {
            let entry: Option<(String, String)> = map.next_entry()?;
            let number = entry.filter(|(key, _)| key == NON_FINITE).and_then(|(_, word)| non_finite(&word));
            number.ok_or_else(|| A::Error::invalid_type(Unexpected::Map, &self))
        }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct Number(#[serde(with = "number")] f64);

/// As [`number`], for a field of `Option<f64>`.
pub mod optional_number {
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, Serializer};

    use super::Number;

    /// Writes a number, or null.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        number.map(Number).serialize(serializer)
    }

    /// Reads a number, or null.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Number>::deserialize(deserializer)?.map(|Number(n)| n))
    }
}

/// As [`number`], for a field of `Vec<f64>`.
pub mod numbers {
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::Serializer;

    use super::Number;

    /// Writes numbers.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(numbers.iter().map(|&n| Number(n)))
    }

    /// Reads numbers.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        Ok(Vec::<Number>::deserialize(deserializer)?.into_iter().map(|Number(n)| n).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::python_json::from_str;

    #[test]
    fn numbers_that_are_not_finite_come_back() {
        #[derive(serde::Serialize, serde::Deserialize)]
        struct Sample {
            #[serde(with = "number")]
            one: f64,
            #[serde(with = "numbers")]
            many: Vec<f64>,
            #[serde(default, with = "optional_number")]
            perhaps: Option<f64>,
        }
        let sample = Sample {
            perhaps: Some(f64::INFINITY),
            one: f64::NAN,
            many: vec![f64::NEG_INFINITY, 0.1, f64::INFINITY],
        };
        let text = serde_json::to_string(&sample).unwrap();
        assert_eq!(text, r#"{"one":"NaN","many":["-Infinity",0.1,"Infinity"],"perhaps":"Infinity"}"#);
        for text in [text.as_str(), r#"{"one": NaN, "many": [-Infinity, 0.1, 1e999], "perhaps": 1e999}"#] {
            let back: Sample = serde_json::from_value(from_str(text).unwrap()).unwrap();
            assert!(back.one.is_nan() && back.many == sample.many && back.perhaps == sample.perhaps);
        }
        let wrong =
            [r#"{"one": "x", "many": []}"#, r#"{"one": null, "many": []}"#, r#"{"one": {}, "many": []}"#];
        for text in wrong {
            assert!(serde_json::from_value::<Sample>(from_str(text).unwrap()).is_err(), "{text}");
        }
    }
}
