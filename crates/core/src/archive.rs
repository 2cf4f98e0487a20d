//! Caches in files: a prompt's states, saved once and loaded whenever the same prompt comes again.
//!
//! A file holds what cannot be made again from the cache's description: a header (magic, version, shape, length, and
//! what the caller says that it is of), the bytes of the stores as they lie in memory, and a check sum. Whoever loads
//! builds an empty cache of the same description first. Each type says once, in one function, what is written and read.

use std::io::{self, Read, Write};
use std::sync::Arc;

use crate::cache::KvCache;
use crate::kernels::{Line, view, view_mut};
use crate::settings::ModelShape;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"MINIKV\r\n";
const VERSION: u64 = 1;

/// Numbers that room is made for at a time: a damaged length then ends at the file's end and not at that of memory.
const AT_ONCE: usize = 1 << 16;

/// Writes what `cache` holds to `out`, with the ids of its `tokens` (or none). `about` says what it is of, the model and
/// the method: only who says the same may load it.
///
/// # Errors
/// A cache that cannot be saved; errors of `out`.
pub fn save(cache: &dyn KvCache, about: &str, tokens: &[u32], out: &mut dyn Write) -> Result<()> {
    // A fork, because the same function reads and writes; it shares what it does not change.
    let mut cache = cache.fork();
    let mut archive = Archive { way: Way::Out(out), sum: crc32fast::Hasher::new() };
    let (shape, mut len) = (*cache.shape(), cache.len());
    archive.header(&shape, about, &mut len)?;
    archive.numbers(&mut tokens.to_vec())?;
    cache.archive(&mut archive)?;
    archive.end()?;
    Ok(out.flush()?)
}

/// Reads into the empty `cache` what [`save`] wrote of one of the same description, and gives the ids of its tokens.
///
/// # Errors
/// A file of something else, or a damaged one; the cache is then not to be used.
pub fn load(cache: &mut dyn KvCache, about: &str, input: &mut dyn Read) -> Result<Vec<u32>> {
    if !cache.is_empty() {
        return Err(Error::Archive("is loaded into a cache that is not empty".into()));
    }
    let mut archive = Archive { way: Way::In(input), sum: crc32fast::Hasher::new() };
    let (shape, mut len) = (*cache.shape(), 0);
    archive.header(&shape, about, &mut len)?;
    let mut tokens = Vec::new();
    archive.numbers(&mut tokens)?;
    cache.archive(&mut archive)?;
    archive.end()?;
    damaged(cache.len() == len && (tokens.is_empty() || tokens.len() == len))?;
    Ok(tokens)
}

/// A file that a cache is written to or read from: every number goes the way of the file.
pub struct Archive<'a> {
    way: Way<'a>,
    sum: crc32fast::Hasher,
}

enum Way<'a> {
    Out(&'a mut dyn Write),
    In(&'a mut dyn Read),
}

/// Numbers that are the same in every file: little-endian bytes.
pub trait Number: Copy + Default {
    /// Bytes of one.
    const BYTES: usize;
    /// To bytes.
    fn put(self, bytes: &mut [u8]);
    /// From bytes.
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Number for $number {
            const BYTES: usize = size_of::<$number>();
            fn put(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
            fn get(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$number>()];
                own.copy_from_slice(bytes);
                Self::from_le_bytes(own)
            }
        }
    )*};
}

numbers!(u8, u32, u64, f32, half::f16);

impl Archive<'_> {
    /// Whether numbers are read.
    pub fn reads(&self) -> bool {
        matches!(self.way, Way::In(_))
    }

    /// Bytes.
    ///
    /// # Errors
    /// Of the file; one that ends too early.
    pub fn bytes(&mut self, bytes: &mut [u8]) -> Result<()> {
        match &mut self.way {
            Way::Out(out) => out.write_all(bytes),
            Way::In(input) => input.read_exact(bytes),
        }
        .map_err(failed)?;
        self.sum.update(bytes);
        Ok(())
    }

    /// One number.
    ///
    /// # Errors
    /// As [`Archive::bytes`].
    pub fn number<T: Number>(&mut self, number: &mut T) -> Result<()> {
        let mut bytes = [0; 8];
        number.put(&mut bytes[..T::BYTES]);
        self.bytes(&mut bytes[..T::BYTES])?;
        *number = T::get(&bytes[..T::BYTES]);
        Ok(())
    }

    /// A count.
    ///
    /// # Errors
    /// As [`Archive::bytes`].
    pub fn count(&mut self, count: &mut usize) -> Result<()> {
        let mut number = *count as u64;
        self.number(&mut number)?;
        *count = usize::try_from(number).map_err(|_| Error::Archive(format!("counts {number}")))?;
        Ok(())
    }

    /// Numbers, however many.
    ///
    /// # Errors
    /// As [`Archive::bytes`].
    pub fn numbers<T: Number>(&mut self, list: &mut Vec<T>) -> Result<()> {
        let mut len = list.len();
        self.count(&mut len)?;
        let mut bytes = vec![0; T::BYTES * len.min(AT_ONCE)];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(AT_ONCE);
            let bytes = &mut bytes[..n * T::BYTES];
            if self.reads() {
                self.bytes(bytes)?;
                list.truncate(at);
                list.extend(bytes.chunks_exact(T::BYTES).map(T::get));
            } else {
                list[at..at + n].iter().zip(bytes.chunks_exact_mut(T::BYTES)).for_each(|(x, b)| x.put(b));
                self.bytes(bytes)?;
            }
            at += n;
        }
        list.truncate(len);
        Ok(())
    }

    /// A page of `lines` lines.
    pub(crate) fn page(&mut self, page: &mut Arc<[Line]>, lines: usize) -> Result<()> {
        match &mut self.way {
            Way::Out(out) => {
                let bytes: &[u8] = view(page);
                self.sum.update(bytes);
                out.write_all(bytes).map_err(failed)
            }
            Way::In(_) => {
                let mut own = vec![Line::ZERO; lines];
                self.bytes(view_mut(&mut own))?;
                *page = own.into();
                Ok(())
            }
        }
    }

    /// Something that has to be the same.
    fn same(&mut self, what: &str, own: &[u8]) -> Result<()> {
        let mut read = own.to_vec();
        self.numbers(&mut read)?;
        if read == own {
            return Ok(());
        }
        let (read, own) = (String::from_utf8_lossy(&read), String::from_utf8_lossy(own));
        Err(Error::Archive(format!("is of {what}{read}, not {own}")))
    }

    fn header(&mut self, shape: &ModelShape, about: &str, len: &mut usize) -> Result<()> {
        let (mut magic, mut version) = (MAGIC, VERSION);
        self.bytes(&mut magic)?;
        if magic != MAGIC {
            return Err(Error::Archive("is no saved cache".into()));
        }
        self.number(&mut version)?;
        if version != VERSION {
            return Err(Error::Archive(format!("has version {version}; this program reads {VERSION}")));
        }
        if cfg!(target_endian = "big") {
            return Err(Error::Archive("has its bytes in another order than this machine".into()));
        }
        self.same("a model of ", format!("{shape:?}").as_bytes())?;
        self.same("", about.as_bytes())?;
        self.count(len)
    }

    /// The check sum.
    fn end(mut self) -> Result<()> {
        let sum = self.sum.clone().finalize();
        let mut read = sum;
        self.number(&mut read)?;
        if read == sum { Ok(()) } else { Err(Error::Archive("is damaged: its check sum is another".into())) }
    }
}

/// What is wrong, where numbers do not belong together.
pub(crate) fn damaged(fine: bool) -> Result<()> {
    if fine { Ok(()) } else { Err(Error::Archive("is damaged: its counts do not belong together".into())) }
}

fn failed(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::Archive("ends too early".into()),
        _ => e.into(),
    }
}
