//! Decoding ids one at a time.

use super::Tokenizer;
use crate::Result;

/// Turns ids that arrive one at a time into text, holding back what is not complete UTF-8 yet. The pieces joined are
/// the text that [`Tokenizer::decode`] gives for all ids together.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Ids from here on are decoded together: what a token looks like may depend on the one before it.
    window: usize,
    /// The text of ids before this one has been given out.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), window: 0, given: 0 }
    }

    /// Takes the next id and gives the text that is now complete, often a word, sometimes nothing.
    ///
    /// # Errors
    /// A failure of the tokenizer.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let (fresh, complete) = self.fresh()?;
        if !complete || fresh.is_empty() {
            return Ok(String::new());
        }
        self.window = self.given;
        self.given = self.ids.len();
        Ok(fresh)
    }

    /// Ends the stream and gives what was held back; bytes that never became UTF-8 are U+FFFD.
    ///
    /// # Errors
    /// A failure of the tokenizer.
    pub fn finish(self) -> Result<String> {
        Ok(self.fresh()?.0)
    }

    /// Text not given out yet, and whether it ends in a whole character.
    fn fresh(&self) -> Result<(String, bool)> {
        let known = self.tokenizer.decode(&self.ids[self.window..self.given], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids[self.window..], self.skip_special)?;
        let complete = !all.ends_with(char::REPLACEMENT_CHARACTER);
        let shared = known.char_indices().zip(all.chars()).take_while(|((_, a), b)| a == b);
        let start = shared.last().map_or(0, |((at, c), _)| at + c.len_utf8());
        Ok((all[start..].to_string(), complete))
    }
}
