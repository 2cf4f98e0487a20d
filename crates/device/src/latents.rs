//! Latents on a device: the maps of a plan, and how its blocks lie there.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use half::f16;
use minicache_core::latent::{LatentGroup, LatentPlan, LatentSet};
use minicache_core::settings::StoreType;
use minicache_core::{Scheme, Side};

use crate::device::Device;
use crate::driver::{Address, Driver, Memory, bytes_of};
use crate::method::LINE;
use crate::params::{SectionEntry, SetEntry, StripEntry};
use crate::{Error, Result};

/// Components of a strip of values.
const LANES: usize = 16;

/// Static shared memory that a kernel may have.
const SHARED: usize = 47 << 10;

/// Positions that phases are made for at a time.
const ROWS: usize = 256;

/// Bits that codes of a trellis have at most, and windows of a table.
const TABLES: (usize, usize) = (3, 64);
/// What forms of a trellis have more than its bits.
const TRELLIS: i32 = 8;

/// A plan's latents on one device, shared by all caches of it.
pub(crate) struct LatentMethod {
    plan: Arc<LatentPlan>,
    layers: Range<usize>,
    /// Of keys and of values: those of the layers on the device, without their matrices.
    pub(crate) groups: [Vec<LatentGroup>; 2],
    /// The sets of a side as kernels have them, one after the other, and where each group's begin.
    sets: [Memory; 2],
    firsts: [Vec<usize>; 2],
    /// A table for each number of bits.
    levels: Memory,
    _maps: Vec<Memory>,
    phases: Mutex<(Memory, usize)>,
    driver: Arc<dyn Driver>,
    pub(crate) sinks: usize,
    pub(crate) residual: usize,
    pub(crate) exact: StoreType,
    pub(crate) block_bytes: [usize; 2],
    /// The most components, and sections, of any set.
    pub(crate) ranks: [usize; 2],
    sections: [usize; 2],
    kinds: [Scheme; 2],
    centred: [bool; 2],
    /// Which ways to read codes kernels need, see `latent.h`.
    forms: [i64; 2],
    pub(crate) passes: usize,
}

impl fmt::Debug for LatentMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatentMethod").field("layers", &self.layers).finish_non_exhaustive()
    }
}

/// Those of a device that are in use.
#[derive(Default)]
pub(crate) struct Known(Mutex<Vec<Weak<LatentMethod>>>);

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Known")
    }
}

impl Device {
    /// The latents of a plan's `layers` on this device, which are uploaded if they are not there.
    pub(crate) fn latents(&self, plan: &Arc<LatentPlan>, layers: &Range<usize>) -> Result<Arc<LatentMethod>> {
        let mut known = self.latents.0.lock().unwrap_or_else(|e| e.into_inner());
        known.retain(|latents| latents.strong_count() > 0);
        let same = |l: &Arc<LatentMethod>| Arc::ptr_eq(&l.plan, plan) && l.layers == *layers;
        if let Some(found) = known.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(found);
        }
        let new = Arc::new(LatentMethod::new(&self.driver, plan, layers.clone())?);
        known.push(Arc::downgrade(&new));
        Ok(new)
    }
}

fn refuse<T>(what: String) -> Result<T> {
    Err(Error::Unsupported(format!("{what} has no kernels for a device")))
}

impl LatentMethod {
    fn new(driver: &Arc<dyn Driver>, plan: &Arc<LatentPlan>, layers: Range<usize>) -> Result<Self> {
        let (spec, shape) = (plan.spec(), plan.shape());
        let memory = |numbers: &[f32]| Memory::of(driver, bytes_of(numbers));
        let (mut maps, mut levels) = (Vec::new(), vec![0u8; TABLES.0 * TABLES.1]);
        let mut sets: [Vec<SetEntry>; 2] = Default::default();
        let mut firsts: [Vec<usize>; 2] = Default::default();
        let (mut ranks, mut sections, mut block_bytes) = ([0; 2], [0; 2], [0; 2]);
        let (mut kinds, mut centred, mut forms) = ([Scheme::F16; 2], [false; 2], [0; 2]);
        let mut groups = [plan.groups(Side::Keys), plan.groups(Side::Values)];
        for (side, groups) in groups.iter_mut().enumerate() {
            groups.retain(|g| layers.contains(&g.layers.start) || layers.contains(&(g.layers.end - 1)));
            for group in groups {
                let (first, last) = (group.layers.start, group.layers.end - 1);
                if !(layers.contains(&first) && layers.contains(&last)) {
                    return Err(Error::Unsupported(format!(
                        "layers {first} to {last} share latents and lie on two devices; another group of layers helps"
                    )));
                }
                firsts[side].push(sets[side].len());
                let span = group.layers.len();
                for set in &mut group.sets {
                    let parts = Parts::new(set, side == 0, &mut levels)?;
                    (kinds[side], centred[side]) = (set.store.scheme(), parts.centred);
                    forms[side] |= parts.forms();
                    ranks[side] = ranks[side].max(set.rank.next_multiple_of(LANES));
                    sections[side] = sections[side].max(parts.sections.len());
                    let of = [memory(&set.mean)?, memory(&set.encode)?, memory(&set.restore)?];
                    let tables = [
                        Memory::of(driver, bytes_of(&parts.sections))?,
                        Memory::of(driver, bytes_of(&parts.strips))?,
                    ];
                    sets[side].push(SetEntry {
                        mean: of[0].address(),
                        encode: of[1].address(),
                        restore: of[2].address(),
                        sections: tables[0].address(),
                        strips: tables[1].address(),
                        rank: set.rank as i32,
                        section_count: parts.sections.len() as i32,
                        strip_count: parts.strips.len() as i32,
                        at: block_bytes[side] as i32,
                        scales_at: parts.scales_at as i32,
                        layers: span as i32,
                        head: set.heads.start as i32,
                        heads: set.heads.len() as i32,
                    });
                    maps.extend(of.into_iter().chain(tables));
                    block_bytes[side] += set.store.block_layout().head_bytes.next_multiple_of(LINE);
                    [&mut set.mean, &mut set.encode, &mut set.restore]
                        .into_iter()
                        .for_each(|m| *m = Vec::new());
                }
            }
        }
        let passes = passes(shape.group(), shape.head_dim, ranks, sections)?;
        Ok(Self {
            plan: plan.clone(),
            layers,
            groups,
            sets: [Memory::of(driver, bytes_of(&sets[0]))?, Memory::of(driver, bytes_of(&sets[1]))?],
            firsts,
            levels: Memory::of(driver, &levels)?,
            _maps: maps,
            phases: Mutex::new((Memory::new(driver, 1)?, 0)),
            driver: driver.clone(),
            sinks: spec.sinks,
            residual: spec.residual,
            exact: spec.dtype,
            block_bytes,
            ranks,
            sections,
            kinds,
            centred,
            forms,
            passes,
        })
    }

    /// What the kernels are specialised to.
    pub(crate) fn macros(&self) -> Vec<(&'static str, i64)> {
        let names = [
            ["K_KIND", "K_CENTRED", "K_SLOTS", "K_RANK", "K_SECTIONS", "K_FORMS"],
            ["V_KIND", "V_CENTRED", "V_SLOTS", "V_RANK", "V_SECTIONS", "V_FORMS"],
        ];
        let mut macros = vec![
            ("SINKS", self.sinks as i64),
            ("RESIDUAL", self.residual as i64),
            ("EXACT", i64::from(self.exact == StoreType::F32)),
            ("SINK_SLOTS", self.groups[0][0].sink_tokens as i64),
        ];
        for (side, names) in names.into_iter().enumerate() {
            let kind = match self.kinds[side] {
                Scheme::F16 => 0,
                Scheme::F32 => 1,
                _ => 2,
            };
            let slots = self.groups[side][0].sets[0].store.block_layout().tokens;
            let (rank, sections) = (self.ranks[side], self.sections[side].max(1));
            let values = [kind, usize::from(self.centred[side]), slots, rank, sections];
            let values = values.map(|v| v as i64).into_iter().chain([self.forms[side]]);
            macros.extend(names.into_iter().zip(values));
        }
        macros
    }

    /// The group of a layer on one side, and how many there are before the layer in it.
    pub(crate) fn group(&self, side: usize, layer: usize) -> (usize, usize) {
        let index = self.groups[side].partition_point(|g| g.layers.end <= layer);
        (index, layer - self.groups[side][index].layers.start)
    }

    /// The sets of a group.
    pub(crate) fn sets(&self, side: usize, group: usize) -> Address {
        self.sets[side].address() + (self.firsts[side][group] * size_of::<SetEntry>()) as Address
    }

    /// Tables of levels.
    pub(crate) fn levels(&self) -> Address {
        self.levels.address()
    }

    /// Phases, of the positions that [`LatentMethod::reach`] was asked for.
    pub(crate) fn phases(&self) -> Address {
        self.phases.lock().unwrap_or_else(|e| e.into_inner()).0.address()
    }

    /// Makes the phases of all latents of sequences of `len` tokens available.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn reach(&self, len: usize) -> Result<()> {
        let rows = len.saturating_sub(self.sinks);
        let mut phases = self.phases.lock().unwrap_or_else(|e| e.into_inner());
        if rows <= phases.1 {
            return Ok(());
        }
        // As keys lie: strips of 16 positions with a step for each channel.
        let (dim, rows) = (self.plan.shape().head_dim, rows.max(2 * phases.1).next_multiple_of(ROWS));
        let table = self.plan.phases(0..rows);
        let mut strips = vec![0.0; table.len()];
        for (i, row) in table.chunks_exact(dim).enumerate() {
            for (c, x) in row.iter().enumerate() {
                strips[(i / LANES * dim + c) * LANES + i % LANES] = *x;
            }
        }
        let memory = match self.exact {
            StoreType::F32 => Memory::of(&self.driver, bytes_of(&strips))?,
            StoreType::F16 => {
                let halves: Vec<u16> = strips.iter().map(|x| f16::from_f32(*x).to_bits()).collect();
                Memory::of(&self.driver, bytes_of(&halves))?
            }
        };
        *phases = (memory, rows);
        Ok(())
    }
}

/// Blocks of attention that share a KV head, so that a block's queries and sums have room in shared memory.
fn passes(group: usize, dim: usize, ranks: [usize; 2], sections: [usize; 2]) -> Result<usize> {
    let [k, v] = ranks;
    // As the kernels declare it.
    let attend =
        |g: usize| g * (4 * (2 * dim + k) + 2 * k + 8 * sections[0] + 4 * (256 + dim + v) + 8 * 8 * 64);
    let join = 4 * (1025 + dim + 1 + v + 8 * dim);
    let write = 5 * (k + v) + 8 * (sections[0] + sections[1]);
    let fits = |passes: &usize| {
        let heads = group / passes;
        group.is_multiple_of(*passes) && heads <= 2 && attend(heads) + 1024 <= SHARED
    };
    match (1..=group).find(fits) {
        Some(passes) if join.max(write) + 1024 <= SHARED => Ok(passes),
        _ => refuse(format!("latents of {k} and {v} numbers")),
    }
}

/// The sections of a set and the strips of its values.
struct Parts {
    sections: Vec<SectionEntry>,
    strips: Vec<StripEntry>,
    scales_at: usize,
    centred: bool,
}

impl Parts {
    /// A bit for each number of bits, those of a trellis [`TRELLIS`] above; the lowest for what is read lane by lane.
    fn forms(&self) -> i64 {
        let of = |section: &SectionEntry| section.bits + if section.trellis != 0 { TRELLIS } else { 0 };
        let odd = self.strips.iter().any(|strip| {
            let trellis = self.sections[strip.section as usize].trellis != 0;
            strip.width % 4 != 0 || trellis && strip.width != LANES as i32
        });
        self.sections.iter().map(of).fold(i64::from(odd), |all, form| all | 1 << form)
    }

    fn new(set: &LatentSet, keys: bool, levels: &mut [u8]) -> Result<Self> {
        let tokens = set.store.block_layout().tokens;
        let layout = match set.store.scheme() {
            Scheme::F16 | Scheme::F32 => None,
            _ => match set.store.code_layout() {
                Some(layout) => Some(layout),
                None => return refuse("latents quantised along tokens (axis = \"channel\")".into()),
            },
        };
        let whole = SectionEntry { size: set.rank as i32, alike: 1, ..SectionEntry::default() };
        let Some(layout) = layout else {
            let strips = (0..set.rank).step_by(LANES).map(|first| StripEntry {
                section: 0,
                first: first as i32,
                width: LANES.min(set.rank - first) as i32,
                codes: 0,
            });
            return Ok(Self {
                sections: vec![whole],
                strips: strips.collect(),
                scales_at: 0,
                centred: false,
            });
        };
        let (mut sections, mut strips) = (Vec::new(), Vec::new());
        for (number, section) in layout.sections.iter().enumerate() {
            if let Some(table) = section.levels {
                let at = (usize::from(section.bits) - 1) * TABLES.1;
                levels[at..at + TABLES.1].copy_from_slice(&table);
            }
            sections.push(SectionEntry {
                first: section.channels.start as i32,
                size: section.channels.len() as i32,
                bits: i32::from(section.bits),
                codes: section.codes as i32,
                alike: 1,
                trellis: i32::from(section.levels.is_some()),
                unit: section.unit,
                middle: section.middle,
            });
            if keys {
                continue;
            }
            let bytes = strip_bytes(section.bits, tokens);
            for (i, first) in section.channels.clone().step_by(LANES).enumerate() {
                strips.push(StripEntry {
                    section: number as i32,
                    first: first as i32,
                    width: LANES.min(section.channels.end - first) as i32,
                    codes: (section.codes + i * bytes) as i32,
                });
            }
        }
        // From the last one on: what follows each is known.
        for i in (0..sections.len().saturating_sub(1)).rev() {
            let next: SectionEntry = sections[i + 1];
            let section = &mut sections[i];
            if (section.size, section.bits) == (next.size, next.bits) {
                section.alike = next.alike + 1;
            }
        }
        Ok(Self { sections, strips, scales_at: layout.scales_at, centred: layout.centred })
    }
}

/// Bytes of a full strip of values.
fn strip_bytes(bits: u8, tokens: usize) -> usize {
    let plane = |bits: usize| tokens.div_ceil(4).div_ceil(8 / bits) * 4 * LANES;
    if bits == 3 { plane(2) + plane(1) } else { plane(usize::from(bits)) }
}
