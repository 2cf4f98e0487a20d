//! From documents to prompts: chat templates, what is left of prompts that are too long, and what prompts share.

use indexmap::IndexMap;
use minicache_models::{Message, Model, Tokenizer};

use super::engine::{Ask, Prompt};
use super::writer::Generation;
use super::{Result, RunError};
use crate::tasks::{Chat, Choice, Document, Generate, Overflow, Request, Turns, cut_middle};

/// What LongBench leaves of a context of 4,096 tokens beside its limit of 3,500: the longest answer, 512, and the chat
/// template.
const LONGBENCH_ROOM: usize = 596;

/// Makes prompts for one model.
pub(crate) struct Prompter<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    /// Tokens of a prompt that loses its middle, at most.
    limit: Option<usize>,
}

impl<'a> Prompter<'a> {
    pub(crate) fn new(model: &'a Model, limit: Option<usize>) -> Result<Self> {
        Ok(Self { model, tokenizer: model.need_tokenizer()?, limit })
    }

    /// The prompts of all documents, in order, for `caches` caches.
    pub(crate) fn all(&self, documents: &[Document], caches: usize) -> Result<Vec<Prompt>> {
        let mut all: Vec<Prompt> = Vec::new();
        for (owner, document) in documents.iter().enumerate() {
            let prompts = self
                .of(document)
                .map_err(|e| e.in_cell(format!("{}, document {}", document.task, document.id)))?;
            for (part, (tokens, ask)) in prompts.into_iter().enumerate() {
                let caches = (0..caches).collect();
                all.push(Prompt { owner, part, tokens, beginning: 0, ask, caches });
            }
        }
        share_beginnings(&mut all, |owner| documents[owner].task);
        Ok(all)
    }

    fn of(&self, document: &Document) -> Result<Vec<(Vec<u32>, Ask)>> {
        match &document.request {
            Request::Generate(generate) => Ok(vec![self.generate(generate)?]),
            Request::Turns(turns) => self.turns(turns),
            Request::Choices(choices) => self.choices(choices),
        }
    }

    fn generate(&self, request: &Generate) -> Result<(Vec<u32>, Ask)> {
        let tokens = match request.overflow {
            Overflow::KeepEnd => {
                self.keep_end(self.encode(&request.prompt, request.chat)?, request.max_new_tokens)
            }
            Overflow::CutMiddle => self.cut_middle(request)?,
        };
        let until = match request.overflow {
            Overflow::KeepEnd => self.until(&request.until)?,
            // LongBench knows the end token by its number alone.
            Overflow::CutMiddle => request.until.clone(),
        };
        let mut stop_ids = self.model.stop_ids().to_vec();
        let mut not_first = Vec::new();
        if let Some(text) = request.stop_token {
            stop_ids.extend(self.tokenizer.encode(text, false)?.last());
            not_first.clone_from(&stop_ids);
        }
        let generation =
            Generation { until, stop_ids, not_first, ..self.room(&tokens, request.max_new_tokens) };
        Ok((tokens, Ask::Generate(generation)))
    }

    /// The stop texts of a task of lm-evaluation-harness, which adds the end token's text to them
    /// (`handle_stop_sequences`): some models write it out in other tokens.
    fn until(&self, until: &[String]) -> Result<Vec<String>> {
        let end = self.tokenizer.eos().map(|id| self.tokenizer.decode(&[id], false)).transpose()?;
        let end = end.filter(|end| !until.contains(end));
        Ok(until.iter().cloned().chain(end).collect())
    }

    /// A generation after `tokens` of `wanted` new tokens, or as many as the context has room for.
    fn room(&self, tokens: &[u32], wanted: usize) -> Generation {
        let room = self.model.config.context.saturating_sub(tokens.len());
        Generation { max_new_tokens: wanted.min(room), fills_context: room < wanted, ..Generation::default() }
    }

    /// The tokens of a prompt, inside the model's chat template where the task wants that and the model has one. A
    /// bare prompt gets the special tokens that the tokenizer puts around a text, usually a BOS or nothing, as in
    /// lm-evaluation-harness.
    fn encode(&self, prompt: &str, chat: Chat) -> Result<Vec<u32>> {
        match (&self.model.chat, chat) {
            (Some(template), Chat::Wrap) => {
                let text = template.render(&[Message::new("user", prompt)], true)?;
                Ok(self.tokenizer.encode(&text, false)?)
            }
            _ => Ok(self.tokenizer.encode(prompt, true)?),
        }
    }

    /// The last tokens, as many as leave room for the answer; half a context where all of it would not be enough, in
    /// which case the harness gives up.
    fn keep_end(&self, mut tokens: Vec<u32>, answer: usize) -> Vec<u32> {
        let context = self.model.config.context;
        let room = if answer < context { context - answer } else { (context / 2).max(1) };
        tokens.drain(..tokens.len().saturating_sub(room));
        tokens
    }

    /// LongBench: the bare prompt is cut before the chat template goes around it, decoded, and encoded again.
    fn cut_middle(&self, request: &Generate) -> Result<Vec<u32>> {
        let context = self.model.config.context;
        let room = context.saturating_sub(LONGBENCH_ROOM).max(context / 4);
        let mut limit = self.limit.map_or(room, |own| own.min(room));
        let bare = self.tokenizer.encode(&request.prompt, true)?;
        loop {
            let tokens = match cut_middle(bare.len(), limit) {
                Some((head, tail)) => {
                    let mut text = self.tokenizer.decode(&bare[head], true)?;
                    text += &self.tokenizer.decode(&bare[tail], true)?;
                    self.encode(&text, request.chat)?
                }
                None => self.encode(&request.prompt, request.chat)?,
            };
            // A long template, or text that has more tokens when it is encoded again.
            let over = (tokens.len() + request.max_new_tokens).saturating_sub(context);
            if over == 0 {
                return Ok(tokens);
            }
            limit = limit.min(bare.len()).saturating_sub(over);
            if limit < 2 {
                let message = "is too short for this task's prompts and answers";
                return Err(RunError::Asked(format!("the model's context of {context} tokens {message}")));
            }
        }
    }

    fn turns(&self, turns: &Turns) -> Result<Vec<(Vec<u32>, Ask)>> {
        let stop_ids = self.model.stop_ids().to_vec();
        let until = self.until(&turns.until)?;
        let prompt = |text: &String| {
            let tokens = self.keep_end(self.encode(text, Chat::Never)?, turns.max_new_tokens);
            let (until, stop_ids) = (until.clone(), stop_ids.clone());
            let generation = Generation { until, stop_ids, ..self.room(&tokens, turns.max_new_tokens) };
            Ok((tokens, Ask::Generate(generation)))
        };
        turns.prompts.iter().map(prompt).collect()
    }

    /// One prompt for neighbouring choices with the same context. A context that is too long is cut for each choice
    /// apart, to as many of its last tokens as fit before that choice (`_loglikelihood_tokens` of the harness).
    fn choices(&self, choices: &[Choice]) -> Result<Vec<(Vec<u32>, Ask)>> {
        let mut out: Vec<(Vec<u32>, Vec<Vec<u32>>)> = Vec::new();
        for choice in choices {
            let (context, continuation) = choice.encoded_apart();
            let whole = self.tokenizer.encode(&format!("{context}{continuation}"), true)?;
            let mut context = self.tokenizer.encode(context, true)?;
            let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
            if continuation.is_empty() {
                let message = format!("the choice {:?} has no tokens of its own", choice.continuation);
                return Err(RunError::Asked(message));
            }
            if context.is_empty() {
                // The harness puts the BOS, or else the EOS, before a text that has no context.
                let head = self.tokenizer.bos().or(self.tokenizer.eos());
                let message = "the tokenizer has no BOS to score a choice after";
                context.push(head.ok_or_else(|| RunError::Asked(message.to_string()))?);
            }
            // The last token of a continuation is predicted, not fed.
            let Some(room) = self.model.config.context.checked_sub(continuation.len() - 1).filter(|&n| n > 0)
            else {
                let (tokens, most) = (continuation.len(), self.model.config.context);
                let message = format!("a choice has {tokens} tokens and the model's context is {most}");
                return Err(RunError::Asked(message));
            };
            context.drain(..context.len().saturating_sub(room));
            match out.last_mut() {
                Some((known, continuations)) if *known == context => continuations.push(continuation),
                _ => out.push((context, vec![continuation])),
            }
        }
        Ok(out.into_iter().map(|(context, continuations)| (context, Ask::Score(continuations))).collect())
    }
}

/// Sets for every prompt how much of it the prompts of all documents of its task have in common.
fn share_beginnings(prompts: &mut [Prompt], task: impl Fn(usize) -> &'static str) {
    /// A task's first prompt, and what the prompts of other documents share with it.
    struct Common {
        first: usize,
        shared: Option<usize>,
    }
    let mut by_task: IndexMap<&str, Common> = IndexMap::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let common = by_task.entry(task(prompt.owner)).or_insert(Common { first: i, shared: None });
        let first = &prompts[common.first];
        if first.owner != prompt.owner {
            let same = first.tokens.iter().zip(&prompt.tokens).take_while(|(a, b)| a == b).count();
            common.shared = Some(common.shared.map_or(same, |shared| shared.min(same)));
        }
    }
    for prompt in prompts {
        prompt.beginning = by_task.get(task(prompt.owner)).and_then(|c| c.shared).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_are_what_all_documents_of_a_task_share() {
        let prompt = |owner, part, tokens: &[u32]| Prompt {
            owner,
            part,
            tokens: tokens.to_vec(),
            beginning: 9,
            ask: Ask::Score(vec![vec![1]]),
            caches: vec![0],
        };
        let mut prompts = [
            prompt(0, 0, &[1, 2, 3, 4]),
            prompt(0, 1, &[7]),
            prompt(1, 0, &[1, 2, 3, 5, 6]),
            prompt(2, 0, &[5, 5]),
            prompt(3, 0, &[1, 2, 9]),
        ];
        share_beginnings(&mut prompts, |owner| if owner == 2 { "b" } else { "a" });
        assert_eq!(prompts.each_ref().map(|p| p.beginning), [2, 2, 2, 0, 2]);
    }
}
