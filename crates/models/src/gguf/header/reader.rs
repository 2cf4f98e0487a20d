//! What stands in a header one behind the other: numbers, strings, values and tensors, never beyond the file.

use candle_core::quantized::gguf_file::Value;
use minicache_config::shown;

use super::Result;
use crate::gguf::DOWNLOAD_AGAIN;
use crate::gguf::types::WeightType;

/// Dimensions of a tensor, as in llama.cpp.
const MOST_DIMS: u32 = 4;
/// Arrays inside of each other; llama.cpp reads none.
const DEEPEST: usize = 4;

/// A tensor as the header lists it.
pub(super) struct Info {
    pub(super) name: String,
    pub(super) dims: Vec<usize>,
    pub(super) kind: WeightType,
    /// Behind the header.
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// Little-endian values one behind the other.
pub(super) struct Reader<'a> {
    pub(super) file: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let taken = self.file[self.at..].get(..n).ok_or_else(truncated)?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, _) = self.file[self.at..].split_first_chunk::<N>().ok_or_else(truncated)?;
        self.at += N;
        Ok(*taken)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things of which each takes at least `size` bytes.
    pub(super) fn count(&self, count: u64, size: usize, what: &str) -> Result<usize> {
        match usize::try_from(count) {
            Ok(count) if count <= self.left() / size => Ok(count),
            _ => Err(format!(
                "truncated or damaged: it announces {count} {what}, more than fit into its {} bytes; {DOWNLOAD_AGAIN}",
                self.file.len()
            )),
        }
    }

    /// What is not UTF-8 is replaced: some writers put raw bytes into vocabularies.
    pub(super) fn string(&mut self) -> Result<String> {
        let length = usize::try_from(self.u64()?).map_err(|_| truncated())?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    pub(super) fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()?[0] {
                byte @ (0 | 1) => Value::Bool(byte == 1),
                byte => return Err(format!("a truth value is {byte}; the file is damaged")),
            },
            8 => Value::String(self.string()?),
            9 if depth < DEEPEST => {
                let kind = self.u32()?;
                let length = self.u64()?;
                let count = self.count(length, smallest(kind)?, "array elements")?;
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::Array(values)
            }
            9 => return Err("arrays are nested too deeply; the file is damaged".to_string()),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("{other} is no type of metadata; the file is damaged")),
        })
    }

    pub(super) fn tensor(&mut self) -> Result<Info> {
        let name = self.string()?;
        let fail = |message: String| Err(format!("tensor {}: {message}", shown(&name)));
        let count = self.u32()?;
        if !(1..=MOST_DIMS).contains(&count) {
            return fail(format!("has {count} dimensions; 1 to {MOST_DIMS} are possible"));
        }
        let mut dims = Vec::new();
        for _ in 0..count {
            dims.push(self.u64()?);
        }
        // Innermost first in the file.
        dims.reverse();
        let (number, offset) = (self.u32()?, self.u64()?);
        let kind = match WeightType::by_number(number) {
            Ok(kind) => kind,
            Err(message) => return fail(message),
        };
        if dims.contains(&0) {
            return fail(format!("is empty, of shape {dims:?}; the file is damaged"));
        }
        let row = dims[dims.len() - 1];
        let block = kind.block() as u64;
        if !row.is_multiple_of(block) {
            return fail(format!(
                "rows of {row} numbers are not whole blocks of {block}; the file is damaged"
            ));
        }
        let elements = dims.iter().try_fold(1u64, |a, &b| a.checked_mul(b));
        let size = elements.and_then(|n| (n / block).checked_mul(kind.bytes() as u64));
        let whole = |n: u64| usize::try_from(n).ok();
        match (size, dims.iter().map(|&n| whole(n)).collect()) {
            (Some(size), Some(dims)) => Ok(Info { name, dims, kind, offset, size }),
            _ => fail(format!("is too large, of shape {dims:?}; the file is damaged")),
        }
    }
}

fn truncated() -> String {
    format!("truncated or damaged: its header goes on behind its end; {DOWNLOAD_AGAIN}")
}

/// Bytes that a value of this type takes at least.
fn smallest(kind: u32) -> Result<usize> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        8 | 10..=12 => Ok(8),
        9 => Ok(12),
        other => Err(format!("{other} is no type of metadata; the file is damaged")),
    }
}
