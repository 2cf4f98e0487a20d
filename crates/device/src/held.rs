//! What a side of a cache holds, counted as the host counts it: which blocks there are, how far it can go back, and what it
//! weighs.

use std::ops::Range;

use minicache_core::latent::LatentGroup;
use minicache_core::{Footprint, StoreCount};

/// A side of a sequence's cache.
#[derive(Debug, Clone)]
pub(crate) enum Held {
    /// Stores of layers and pairs, which are all alike.
    Stores(StoreCount),
    /// Groups of layers with latents, which are as long as each other.
    Latents(Latents),
}

/// Exact tokens and latents of all groups.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Latents {
    groups: Vec<Group>,
    /// First and newest tokens that are exact.
    sinks: usize,
    residual: usize,
    len: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Group {
    layers: usize,
    sets: Vec<StoreCount>,
    sinks: StoreCount,
    recent: StoreCount,
}

impl Latents {
    pub(crate) fn new(groups: &[LatentGroup], sinks: usize, residual: usize) -> Self {
        let group = |g: &LatentGroup| Group {
            layers: g.layers.len(),
            sets: g.sets.iter().map(|set| set.store.count()).collect(),
            sinks: g.sinks.clone(),
            recent: g.recent.clone(),
        };
        Self { groups: groups.iter().map(group).collect(), sinks, residual, len: 0 }
    }

    /// Tokens of so many that are latents.
    fn encoded(&self, len: usize) -> usize {
        len.saturating_sub(self.sinks + self.residual)
    }

    fn push(&mut self, tokens: usize) {
        let (before, end) = (self.len, self.len + tokens);
        let to_sinks = end.min(self.sinks) - before.min(self.sinks);
        let latents = self.encoded(end);
        let new = latents - self.encoded(before);
        for group in &mut self.groups {
            group.sinks.push(to_sinks);
            group.sets.iter_mut().for_each(|set| set.push(new));
            if self.residual > 0 {
                group.recent.push(tokens - to_sinks);
                if new > 0 {
                    group.recent.drop_before(latents);
                }
            }
        }
        self.len = end;
    }

    fn drop_before(&mut self, position: usize) {
        let first = self.len.min(self.sinks);
        let latent = position.saturating_sub(first).min(self.encoded(self.len));
        for group in &mut self.groups {
            group.sinks.drop_before(position.min(first));
            group.sets.iter_mut().for_each(|set| set.drop_before(latent));
        }
    }

    fn start(&self) -> usize {
        let of = |group: &Group| match group.sets.iter().map(StoreCount::start).max() {
            Some(dropped) if dropped > 0 => group.sinks.len() + dropped,
            _ => group.sinks.start(),
        };
        self.groups.iter().map(of).max().unwrap_or(0)
    }

    /// Blocks of which any group needs one.
    fn hull<'a>(&'a self, of: impl Fn(&'a Group) -> Vec<Range<usize>>) -> Range<usize> {
        let all = || self.groups.iter().flat_map(&of);
        all().map(|r| r.start).min().unwrap_or(0)..all().map(|r| r.end).max().unwrap_or(0)
    }

    /// Blocks of sinks that are held.
    fn sinks(&self) -> Range<usize> {
        self.hull(|g| vec![g.sinks.blocks()[0].clone()])
    }

    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        let (latents, now) = (self.encoded(len), self.encoded(self.len));
        if self.residual > 0 && now > latents {
            return Err("newer tokens have become latents already");
        }
        let mut sets = self.groups.iter().flat_map(|g| &g.sets);
        sets.try_for_each(|set| set.can_truncate(latents.min(now)))
    }

    fn truncate(&mut self, len: usize) {
        let after = len.saturating_sub(self.len.min(self.sinks));
        for group in &mut self.groups {
            group.sinks.truncate(len);
            group.sets.iter_mut().for_each(|set| set.truncate(after));
            group.recent.truncate(after);
        }
        self.len = self.len.min(len);
    }

    /// Adds its bytes; `waiting`: those of a row of each layer, in which the states of a step wait for those of the group's
    /// last layer.
    pub(crate) fn count(&self, waiting: usize, total: &mut Footprint) {
        for group in &self.groups {
            for set in group.sets.iter().map(StoreCount::bytes) {
                total.latents += set.codes;
                total.scales += set.scales;
                total.residual += set.residual;
            }
            total.retained += group.layers * group.sinks.bytes().total();
            total.residual += group.layers * (group.recent.bytes().total() + waiting);
        }
    }
}

impl Held {
    pub(crate) fn push(&mut self, tokens: usize) {
        match self {
            Held::Stores(count) => count.push(tokens),
            Held::Latents(latents) => latents.push(tokens),
        }
    }

    /// Gives back what can be given back of the tokens before a position.
    pub(crate) fn drop_before(&mut self, position: usize) {
        match self {
            Held::Stores(count) => count.drop_before(position),
            Held::Latents(latents) => latents.drop_before(position),
        }
    }

    /// The first position that is held.
    pub(crate) fn start(&self) -> usize {
        match self {
            Held::Stores(count) => count.start(),
            Held::Latents(latents) => latents.start(),
        }
    }

    /// The blocks of packed tokens, of those that wait or are newest, and of sinks.
    pub(crate) fn blocks(&self) -> [Range<usize>; 3] {
        match self {
            Held::Stores(count) => {
                let [packed, recent] = count.blocks();
                [packed, recent, 0..0]
            }
            Held::Latents(latents) => [
                latents.hull(|g| g.sets.iter().map(|set| set.blocks()[0].clone()).collect()),
                latents.hull(|g| vec![g.recent.blocks()[0].clone()]),
                latents.sinks(),
            ],
        }
    }

    /// As [`minicache_core::Store::can_truncate`].
    pub(crate) fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        match self {
            Held::Stores(count) => count.can_truncate(len),
            Held::Latents(latents) => latents.can_truncate(len),
        }
    }

    /// As [`minicache_core::Store::truncate`].
    pub(crate) fn truncate(&mut self, len: usize) {
        match self {
            Held::Stores(count) => count.truncate(len),
            Held::Latents(latents) => latents.truncate(len),
        }
    }
}
