//! How much longer a tokenizer may make a text. A few replacements one after the other multiply.

use serde_json::Value;

/// Every byte may become this many. The longest expansion of Unicode's normal forms is 18.
const MAX_GROWTH: usize = 10_000;

/// Refuses a tokenizer whose normalisers, pre-tokenizers or decoders would fill the memory with a short text.
///
/// # Errors
/// Says which of them.
pub(super) fn check(tokenizer: &tokenizers::Tokenizer) -> Result<(), String> {
    let parts = [
        ("normaliser", serde_json::to_value(tokenizer.get_normalizer())),
        ("pre-tokenizer", serde_json::to_value(tokenizer.get_pre_tokenizer())),
        ("decoder", serde_json::to_value(tokenizer.get_decoder())),
    ];
    for (name, part) in parts {
        let part = part.map_err(|e| e.to_string())?;
        if growth(&part) > MAX_GROWTH {
            return Err(format!(
                "its {name} makes texts more than {MAX_GROWTH} times as long; it is damaged"
            ));
        }
    }
    Ok(())
}

/// An upper bound of the bytes that become of one: the product over all steps.
fn growth(step: &Value) -> usize {
    let length = |key: &str| step[key].as_str().map_or(0, str::len);
    match step {
        Value::Array(steps) => steps.iter().map(growth).fold(1, usize::saturating_mul),
        Value::Object(fields) => {
            let own = match step["type"].as_str().unwrap_or_default() {
                // What an expression matches may be empty, once for every byte.
                "Replace" => match step["pattern"]["String"].as_str() {
                    Some(pattern) => {
                        length("content").div_ceil(pattern.len().max(1)).max(1)
                            + usize::from(pattern.is_empty())
                    }
                    None => length("content") + 1,
                },
                "Prepend" => length("prepend") + 1,
                _ => 1,
            };
            fields.values().map(growth).fold(own, usize::saturating_mul)
        }
        _ => 1,
    }
}
