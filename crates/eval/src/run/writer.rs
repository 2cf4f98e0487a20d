//! A text as it is generated, token by token, and when it is over.

use minicache_models::{DecodeStream, Tokenizer};

use super::Result;
use super::numbers::argmax;

/// Tokens at the end of a text that have to be repetitions of a few before it counts as a loop. Greedy decoding hardly
/// comes out of one that long.
pub(crate) const LOOP_TOKENS: usize = 96;

/// Tokens of the longest loop that is looked for.
const LONGEST_LOOP: usize = 24;

/// Greedy generation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Generation {
    /// Ends before the first of these texts.
    pub(crate) until: Vec<String>,
    /// Tokens that end it.
    pub(crate) stop_ids: Vec<u32>,
    /// Tokens that may not come first.
    pub(crate) not_first: Vec<u32>,
    /// New tokens, at most.
    pub(crate) max_new_tokens: usize,
    /// The context has no room for more than these, though more are asked for.
    pub(crate) fills_context: bool,
}

/// Collects a generated text and knows when it is over.
pub(super) struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    stream: DecodeStream<'a>,
    pub(super) settings: Generation,
    pub(super) tokens: Vec<u32>,
    /// The text so far, as far as its characters are complete.
    text: String,
    /// It came to a stop text or a stop token.
    stopped: bool,
    /// It came to say the same over and over.
    pub(super) loops: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, settings: Generation) -> Self {
        let stream = tokenizer.stream(true);
        let (tokens, text) = (Vec::new(), String::new());
        Self { tokenizer, stream, settings, tokens, text, stopped: false, loops: false }
    }

    /// The most likely token that may come first; later ones are not held to anything.
    pub(super) fn first(&self, logits: &[f32]) -> u32 {
        let mut allowed = logits.to_vec();
        for &id in &self.settings.not_first {
            if let Some(x) = allowed.get_mut(id as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
        argmax(&allowed) as u32
    }

    /// Takes a token; the whole text where it is the last one.
    pub(super) fn push(&mut self, token: u32) -> Result<Option<String>> {
        if self.settings.stop_ids.contains(&token) {
            self.stopped = true;
            return self.answer().map(Some);
        }
        self.tokens.push(token);
        let from = self.text.len();
        self.text.push_str(&self.stream.push(token)?);
        // A stop text may have begun in earlier tokens.
        let longest = self.settings.until.iter().map(String::len).max().unwrap_or(0);
        let start = floor_boundary(&self.text, from.saturating_sub(longest));
        self.stopped =
            self.settings.until.iter().any(|stop| !stop.is_empty() && self.text[start..].contains(stop));
        let long = self.tokens.len() >= self.settings.max_new_tokens;
        self.loops = !self.stopped && !long && period(&self.tokens).is_some();
        if self.stopped || long || self.loops { self.answer().map(Some) } else { Ok(None) }
    }

    /// Whether it is as long as the context allows, and not at its end.
    pub(super) fn ran_out(&self) -> bool {
        self.settings.fills_context && !self.stopped && !self.loops
    }

    /// The whole text. A loop is scored as what it would have become: itself, up to the most tokens that were asked for.
    fn answer(&self) -> Result<String> {
        let mut tokens = self.tokens.clone();
        if let Some(period) = period(&tokens).filter(|_| self.loops) {
            (tokens.len()..self.settings.max_new_tokens).for_each(|at| tokens.push(tokens[at - period]));
        }
        let text = self.tokenizer.decode(&tokens, true)?;
        Ok(cut_at(&text, &self.settings.until).to_string())
    }
}

/// The number of tokens over and over again at the end of `tokens`, where the last [`LOOP_TOKENS`] are nothing else.
fn period(tokens: &[u32]) -> Option<usize> {
    let tail = &tokens[tokens.len().checked_sub(LOOP_TOKENS)?..];
    (1..=LONGEST_LOOP).find(|&period| tail[period..] == tail[..LOOP_TOKENS - period])
}

/// `text` up to the first of `stops`, each in turn looked for in what the one before it left, as in the harness.
fn cut_at<'t>(text: &'t str, stops: &[String]) -> &'t str {
    let cut = |text: &'t str, stop: &String| text.split_once(stop.as_str()).map_or(text, |(head, _)| head);
    stops.iter().filter(|stop| !stop.is_empty()).fold(text, cut)
}

/// The last character boundary of `text` at or before byte `at`.
fn floor_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_long_repetitions() {
        let of = |period: usize, length: usize| -> Vec<u32> {
            [5, 6, 7].into_iter().chain((0..length).map(|i| (i % period) as u32)).collect()
        };
        assert_eq!(period(&of(1, LOOP_TOKENS)), Some(1));
        assert_eq!(period(&of(LONGEST_LOOP, LOOP_TOKENS)), Some(LONGEST_LOOP));
        assert_eq!(period(&of(7, LOOP_TOKENS - 1)), None);
        assert_eq!(period(&of(LONGEST_LOOP + 1, 2 * LOOP_TOKENS)), None);
        assert_eq!(period(&[]), None);
        let mut broken = of(3, 2 * LOOP_TOKENS);
        let last = broken.len() - 40;
        broken[last] = 9;
        assert_eq!(period(&broken), None);
    }

    #[test]
    fn text_ends_before_the_first_stop() {
        let stops = ["\n\n".to_string(), "Q:".to_string(), String::new()];
        assert_eq!(cut_at("a b Q: c\n\n", &stops), "a b ");
        assert_eq!(cut_at("a b", &stops), "a b");
        assert_eq!(floor_boundary("a\u{e9}b", 2), 1);
    }
}
