//! `minicache tokens`: a prompt as a model reads it.

use anyhow::Result;
use minicache_models::PromptFormat;
use serde_json::json;

use crate::global::Global;
use crate::output;
use crate::prompt::{PromptArgs, Rendered, need_chat};

/// Options of `minicache tokens`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model, as for the other commands; its weights are not read.
    #[arg(long, value_name = "M")]
    model: String,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Put the prompt into the model's chat template.
    #[arg(long)]
    chat: bool,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// One JSON object: text, ids and the token of each.
    #[arg(long)]
    json: bool,
}

/// Prints the text that is tokenised, and its ids on the last line.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let prompt = args.prompt.read()?;
    let format = PromptFormat::load(&args.model)?;
    let tokenizer = &format.tokenizer;
    let rendered = if args.chat {
        let template = need_chat(format.chat.as_ref(), &format.name)?;
        Rendered::chat(tokenizer, template, &prompt, args.system.as_deref())?
    } else {
        Rendered::plain(tokenizer, &prompt)?
    };
    let Rendered { text, tokens } = rendered;
    if args.json {
        let pieces: Vec<_> = tokens.iter().map(|&id| tokenizer.id_to_token(id)).collect();
        return output::line(json!({ "text": text, "ids": tokens, "tokens": pieces }));
    }
    let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
    output::line(text)?;
    output::line(ids.join(" "))
}
