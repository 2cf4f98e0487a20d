//! A forward step of several sequences: begun, taken through the layers, then finished or rolled back as one.

use rayon::prelude::*;

use crate::Result;
use crate::attend::on_one_thread;
use crate::backend::shape_of_step;
use crate::cache::KvCache;
use crate::scratch::Buffer;
use crate::sequence::Sequence;
use crate::settings::ModelShape;
use crate::states::{States, check_layer, check_len};

/// Tokens of a sequence up to which a step's states wait for its end. Of more, as in a prefill, they would take more room
/// than the cache: they are stored layer by layer, and a fork from before the step is kept to go back to.
const WAITING: usize = 8;

/// A sequence's attention is divided among threads where it is more than one part in so many of what each thread has to do:
/// with the others alone they could not be kept busy alike.
const SHARE: usize = 2;

/// One step of several sequences, each with one new token or more. Attention reads what the sequences hold and the
/// step's own states; nothing is seen by the next step before [`Batch::finish`], and a batch that is dropped without
/// it (an error in some layer) leaves every sequence as it was.
pub struct Batch<'a> {
    shape: ModelShape,
    parts: Vec<Part<'a>>,
    /// Rows of all sequences that wait, layer by layer: queries, keys and values.
    waiting: Buffer,
    /// Tokens that wait.
    rows: usize,
    finished: bool,
}

/// One sequence's part.
struct Part<'a> {
    sequence: &'a mut Sequence,
    tokens: usize,
    /// What it was, where the step's states are stored at once.
    before: Option<Box<dyn KvCache>>,
    /// What attention gave to tokens, by layer, where states wait.
    received: Vec<Vec<f32>>,
}

/// A sequence's part of one layer.
struct Job<'j, 'a> {
    part: &'j mut Part<'a>,
    states: States<'j>,
    out: &'j mut [f32],
    work: usize,
}

impl<'a> Batch<'a> {
    /// Begins a step: sequences with the number of their new tokens.
    ///
    /// # Errors
    /// As of [`shape_of_step`].
    pub fn begin(sequences: impl IntoIterator<Item = (&'a mut Sequence, usize)>) -> Result<Self> {
        let sequences: Vec<_> = sequences.into_iter().collect();
        let shape = shape_of_step(&sequences)?;
        let part = |(sequence, tokens): (&'a mut Sequence, usize)| {
            let waits = tokens <= WAITING;
            let before = (!waits).then(|| sequence.cache().fork());
            let received = vec![Vec::new(); if waits { shape.layers } else { 0 }];
            Part { sequence, tokens, before, received }
        };
        let parts: Vec<Part<'a>> = sequences.into_iter().map(part).collect();
        let rows = parts.iter().filter(|p| p.before.is_none()).map(|p| p.tokens).sum();
        let width = shape.heads * shape.head_dim + 2 * shape.kv_dim();
        let waiting = Buffer::new(shape.layers * rows * width);
        Ok(Self { shape, parts, waiting, rows, finished: false })
    }

    /// Takes the step's states of `layer`, those of one sequence after the other: states in, causal attention
    /// `(tokens, heads, head_dim)` out. Layers come in order.
    ///
    /// # Errors
    /// Slices of the wrong length; states that are not finite, with layer and position.
    pub fn attend(&mut self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()> {
        let States { q, k, v, sink_scores } = states;
        let (q_dim, kv_dim) = (self.shape.heads * self.shape.head_dim, self.shape.kv_dim());
        let tokens: usize = self.parts.iter().map(|p| p.tokens).sum();
        let lengths = [
            ("queries", q.len(), q_dim),
            ("keys", k.len(), kv_dim),
            ("values", v.len(), kv_dim),
            ("output", out.len(), q_dim),
        ];
        for (what, got, width) in lengths {
            check_len(what, got, tokens, width)?;
        }
        check_layer(&self.shape, layer)?;
        let waiting = &mut self.waiting[layer * self.rows * (q_dim + 2 * kv_dim)..];
        let (wait_q, rest) = waiting.split_at_mut(self.rows * q_dim);
        let (wait_k, wait_v) = rest.split_at_mut(self.rows * kv_dim);
        let (mut at, mut waits, mut rest) = (0, 0, out);
        let mut jobs = Vec::with_capacity(self.parts.len());
        for part in &mut self.parts {
            let (first, end) = (at, at + part.tokens);
            let cut = |width: usize| first * width..end * width;
            let states = States { q: &q[cut(q_dim)], k: &k[cut(kv_dim)], v: &v[cut(kv_dim)], sink_scores };
            at = end;
            if part.before.is_none() {
                wait_q[waits * q_dim..][..states.q.len()].copy_from_slice(states.q);
                wait_k[waits * kv_dim..][..states.k.len()].copy_from_slice(states.k);
                wait_v[waits * kv_dim..][..states.v.len()].copy_from_slice(states.v);
                waits += part.tokens;
            }
            let (own, others) = rest.split_at_mut(states.q.len());
            rest = others;
            let work = part.tokens * (part.sequence.len() + part.tokens);
            jobs.push(Job { part, states, out: own, work });
        }
        if let [job] = &mut jobs[..] {
            return job.run(layer);
        }
        // The longest first. Who works on what makes no difference to the results.
        let each = jobs.iter().map(|j| j.work).sum::<usize>() / rayon::current_num_threads();
        jobs.sort_by_key(|j| std::cmp::Reverse(j.work));
        jobs.into_par_iter().with_max_len(1).try_for_each(|mut job| {
            if job.work * SHARE > each { job.run(layer) } else { on_one_thread(|| job.run(layer)) }
        })
    }

    /// Ends the step: its tokens count as cached.
    ///
    /// # Errors
    /// What a cache of somebody's own says when it stores; its sequence is not to be used any more.
    pub fn finish(mut self) -> Result<()> {
        let (shape, rows) = (self.shape, self.rows);
        let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
        let waiting: &[f32] = &self.waiting;
        let mut at = 0;
        let mut jobs = Vec::with_capacity(self.parts.len());
        for part in &mut self.parts {
            let first = at;
            if part.before.is_none() {
                at += part.tokens;
            }
            jobs.push((part, first));
        }
        let store = |(part, first): (&mut Part<'_>, usize)| -> Result<()> {
            let Part { sequence, tokens, before, received } = part;
            if before.is_none() {
                for (layer, received) in received.iter().enumerate() {
                    let (q, rest) = waiting[layer * rows * (q_dim + 2 * kv_dim)..].split_at(rows * q_dim);
                    let (k, v) = rest.split_at(rows * kv_dim);
                    let cut = |width: usize| first * width..(first + *tokens) * width;
                    let states = States::new(&q[cut(q_dim)], &k[cut(kv_dim)], &v[cut(kv_dim)]);
                    sequence.cache_mut().store(layer, states, received)?;
                }
            }
            sequence.cache_mut().finish_step()
        };
        match &mut jobs[..] {
            [_] => jobs.into_iter().try_for_each(store)?,
            _ => jobs.into_par_iter().try_for_each(store)?,
        }
        self.finished = true;
        Ok(())
    }
}

impl Job<'_, '_> {
    fn run(&mut self, layer: usize) -> Result<()> {
        let Part { sequence, before, received, .. } = &mut *self.part;
        let (shape, len) = (*sequence.shape(), sequence.len());
        self.states.check(&shape, layer, len, self.out)?;
        if before.is_none() {
            let received = &mut received[layer];
            return sequence.cache().attend_held(layer, self.states, self.out, received);
        }
        let mut received = Vec::new();
        sequence.cache().attend_held(layer, self.states, self.out, &mut received)?;
        sequence.cache_mut().store(layer, self.states, &received)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for part in &mut self.parts {
            if let Some(before) = part.before.take() {
                part.sequence.replace_cache(before);
            }
        }
    }
}
