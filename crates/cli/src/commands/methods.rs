//! `minicache methods`: the cache methods and what each of them can be told.

use anyhow::Result;
use minicache_core::METHODS;
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
        let row =
            |m: &minicache_core::MethodInfo| json!({ "name": m.name, "about": m.about, "reads": (m.keys)() });
        return output::line(json!({ "methods": METHODS.iter().map(row).collect::<Vec<_>>() }));
    }
    for method in METHODS {
        output::line(format!("{:<12}{}", method.name, method.about))?;
        output::line(format!("{:12}reads {}", "", (method.keys)().join(", ")))?;
    }
    output::line(
        "\nA cache is a method's name, NAME-BITS (kivi-2, minicache-4), or an inline table with any of these",
    )?;
    output::line(
        "keys: --cache '{ method = \"minicache\", start_layer = 15, quant = { bits = 4, group = 128 } }'",
    )
}
