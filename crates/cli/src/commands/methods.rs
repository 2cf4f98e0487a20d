//! `minicache methods`: the cache methods and what each of them can be told.

use anyhow::Result;
use minicache_config::Method;
use minicache_core::{CacheSpec, describe};
use serde_json::json;

use crate::global::Global;
use crate::output;

/// Options of `minicache methods`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Lists the methods.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    if args.json {
        let rows: Vec<_> = Method::ALL
            .into_iter()
            .map(|m| Ok(json!({ "name": m.name(), "about": describe(m), "reads": reads(m)? })))
            .collect::<Result<_>>()?;
        return output::line(json!({ "methods": rows }));
    }
    for method in Method::ALL {
        output::line(format!("{:<12}{}", method.name(), describe(method)))?;
        output::line(format!("{:12}reads {}", "", reads(method)?.join(", ")))?;
    }
    output::line(
        "\nA cache is a method's name, NAME-BITS (kivi-2, minicache-4), or an inline table with any of these",
    )?;
    output::line(
        "keys: --cache '{ method = \"minicache\", start_layer = 15, quant = { bits = 4, group = 128 } }'",
    )
}

/// The keys of a cache specification that make a difference to `method`, besides `method` itself.
fn reads(method: Method) -> Result<Vec<String>> {
    let spec = CacheSpec::of(method);
    // What is absent by default has to be there to be listed.
    let whole = CacheSpec {
        quant: Some(Default::default()),
        activation_bits: Some(8),
        sinks: Some(0),
        basis: Some(String::new()),
        ..spec.clone()
    };
    let keys = toml::Table::try_from(whole)?;
    Ok(keys.keys().filter(|k| *k != "method" && spec.reads(k)).cloned().collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_described_with_its_own_keys() {
        for method in Method::ALL {
            assert!(reads(method).unwrap().contains(&"dtype".to_string()));
        }
        let of = |m| reads(m).unwrap().join(" ");
        assert!(of(Method::Minicache).contains("start_layer") && of(Method::Minicache).contains("retention"));
        assert!(of(Method::Kivi).contains("quant") && !of(Method::Kivi).contains("start_layer"));
        assert!(of(Method::H2o).contains("heavy"));
        assert!(of(Method::Latent).contains("basis") && of(Method::Latent).contains("activation_bits"));
    }
}
