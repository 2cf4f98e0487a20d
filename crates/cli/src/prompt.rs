//! A prompt in words: where it comes from, and how a model wants it.

use std::path::PathBuf;

use anyhow::Result;
use minicache_models::{ChatTemplate, Message, Tokenizer};

use crate::failure::usage;
use crate::source::read_text;

/// Where a prompt comes from.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// The prompt.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the prompt; - is stdin.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt's text.
    pub(crate) fn read(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone()),
            (_, Some(path)) => read_text(path),
            _ => Ok(String::new()),
        }
    }
}

/// A prompt as a model reads it.
pub(crate) struct Rendered {
    /// With the chat template's text around it, where there is one; without what the tokenizer adds.
    pub(crate) text: String,
    /// At least one.
    pub(crate) tokens: Vec<u32>,
}

impl Rendered {
    /// The prompt as a user's message, after `system` where given, in the words of `template`.
    pub(crate) fn chat(
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        prompt: &str,
        system: Option<&str>,
    ) -> Result<Self> {
        let system = system.map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        let text = template.render(&messages, true)?;
        Self::checked(tokenizer.encode(&text, false)?, text)
    }

    /// The prompt as it stands.
    pub(crate) fn plain(tokenizer: &Tokenizer, prompt: &str) -> Result<Self> {
        Self::checked(tokenizer.encode(prompt, true)?, prompt.to_string())
    }

    fn checked(tokens: Vec<u32>, text: String) -> Result<Self> {
        if tokens.is_empty() { Err(usage("the prompt is empty")) } else { Ok(Self { text, tokens }) }
    }
}

/// The template of the model `name`, which an option insists on.
pub(crate) fn need_chat<'a>(template: Option<&'a ChatTemplate>, name: &str) -> Result<&'a ChatTemplate> {
    let message = "has no chat template, which --chat and --system need; leave them out";
    template.ok_or_else(|| usage(format!("{name}: {message}")))
}
