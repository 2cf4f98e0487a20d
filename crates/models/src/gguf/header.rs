//! The header of a GGUF file: metadata and where tensors lie, read strictly and never beyond the file.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Every count and length is held against the bytes
//! that are left before anything is allocated, so that memory is bounded by the file's size, whatever it says.

use std::collections::{HashMap, HashSet};

use candle_core::quantized::gguf_file::Value;
use minicache_config::{lfs_pointer, not_text, shown};

use super::types::WeightType;

/// Dimensions of a tensor, as in llama.cpp.
const MOST_DIMS: u32 = 4;
/// Arrays inside of each other; llama.cpp reads none.
const DEEPEST: usize = 4;
/// Where tensors begin, if the file does not say.
const ALIGNMENT: u32 = 32;

/// What a file says about itself.
#[derive(Debug)]
pub(super) struct Header {
    /// By key.
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: Vec<Entry>,
}

/// One tensor, inside of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Outermost first, as in Hugging Face files; none is 0.
    pub(super) dims: Vec<usize>,
    pub(super) kind: WeightType,
    /// Its first byte in the file, and the one behind its last.
    pub(super) bytes: std::ops::Range<usize>,
}

type Result<T> = std::result::Result<T, String>;

/// Reads the header of `file`, all of its bytes.
///
/// # Errors
/// What is wrong, without the file's name.
pub(super) fn read(file: &[u8]) -> Result<Header> {
    check_start(file)?;
    let mut reader = Reader { file, at: 8 };
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    // A key of no letters and a byte; a tensor of no name and one dimension.
    let pairs = reader.count(pairs, 13, "metadata keys")?;
    let mut metadata = HashMap::new();
    for _ in 0..pairs {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).map_err(|e| format!("metadata {}: {e}", shown(&key)))?;
        if let Some(key) = duplicate(&mut metadata, key, value) {
            return Err(format!("metadata {} comes twice", shown(&key)));
        }
    }
    let alignment = alignment(&metadata)?;
    let tensors = reader.count(tensors, 32, "tensors")?;
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(reader.tensor()?);
    }
    let data = (reader.at as u64).next_multiple_of(u64::from(alignment));
    let tensors = place(infos, data, alignment, file.len())?;
    Ok(Header { metadata, tensors })
}

/// Adds a pair; gives the key back where it is there already.
fn duplicate(metadata: &mut HashMap<String, Value>, key: String, value: Value) -> Option<String> {
    if metadata.contains_key(&key) {
        return Some(key);
    }
    metadata.insert(key, value);
    None
}

/// Magic and version, and what a file is instead.
fn check_start(file: &[u8]) -> Result<()> {
    if file.is_empty() {
        return Err("is empty; download it again".to_string());
    }
    if let Some(what) = lfs_pointer(file) {
        return Err(what.to_string());
    }
    let Some(head) = file.first_chunk::<8>() else {
        return Err(too_short(file.len()));
    };
    let (magic, version) = head.split_at(4);
    let version = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
    match magic {
        b"GGUF" => {}
        b"FUGG" => return Err(BIG_ENDIAN.to_string()),
        b"lmgg" | b"tjgg" | b"fmgg" | b"algg" => {
            return Err("is of a GGML format from before GGUF; convert the model again".to_string());
        }
        _ => {
            let what = not_text(&file[..file.len().min(16)]).map(|what| format!(" ({what})"));
            let what = what.unwrap_or_default();
            return Err(format!(
                "not a GGUF file: it does not start with GGUF{what}; give a .gguf file or a directory"
            ));
        }
    }
    match version {
        2 | 3 => {}
        // 3 with its bytes the other way round; no version is that high.
        version if version.swap_bytes() <= 0xffff && version > 0xffff => return Err(BIG_ENDIAN.to_string()),
        version => {
            return Err(format!(
                "is of GGUF version {version}; versions 2 and 3 are read: convert the model again"
            ));
        }
    }
    if file.len() < 24 { Err(too_short(file.len())) } else { Ok(()) }
}

const BIG_ENDIAN: &str =
    "is a big-endian GGUF file, which is not read; convert the model again for little-endian machines";

fn too_short(length: usize) -> String {
    format!("too short to be a GGUF file ({length} bytes); download it again")
}

/// `general.alignment`.
fn alignment(metadata: &HashMap<String, Value>) -> Result<u32> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() => Ok(*n),
        Some(Value::U32(n)) => {
            Err(format!("metadata general.alignment is {n}, which is no power of two; the file is damaged"))
        }
        Some(_) => Err("metadata general.alignment is not of type u32; the file is damaged".to_string()),
    }
}

/// A tensor as the header lists it.
struct Info {
    name: String,
    dims: Vec<usize>,
    kind: WeightType,
    /// Behind the header.
    offset: u64,
    size: u64,
}

/// Where tensors lie, once it is known where the data begin.
fn place(infos: Vec<Info>, data: u64, alignment: u32, length: usize) -> Result<Vec<Entry>> {
    let mut names = HashSet::new();
    let mut entries: Vec<Entry> = Vec::with_capacity(infos.len());
    for Info { name, dims, kind, offset, size } in infos {
        let shown = shown(&name);
        if !offset.is_multiple_of(u64::from(alignment)) {
            return Err(format!(
                "tensor {shown} begins at {offset}, not at a multiple of {alignment}; the file is damaged"
            ));
        }
        let start = data.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= length as u64)) else {
            let need = end.map_or_else(|| "more".to_string(), |end| end.to_string());
            return Err(format!(
                "truncated: tensor {shown} needs {need} bytes, the file has {length}; {}",
                super::DOWNLOAD_AGAIN
            ));
        };
        if !names.insert(name.clone()) {
            return Err(format!("tensor {shown} comes twice; the file is damaged"));
        }
        // Both fit into the file, whose length is a usize.
        entries.push(Entry { name, dims, kind, bytes: start as usize..end as usize });
    }
    // Tensors that share bytes could name more weights than the file is large.
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_unstable_by_key(|e| e.bytes.start);
    if let Some([a, b]) = order.windows(2).find(|pair| pair[1].bytes.start < pair[0].bytes.end) {
        let (a, b) = (shown(&a.name), shown(&b.name));
        return Err(format!("tensors {a} and {b} overlap; the file is damaged"));
    }
    Ok(entries)
}

/// Little-endian values one behind the other.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
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

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things of which each takes at least `size` bytes.
    fn count(&self, count: u64, size: usize, what: &str) -> Result<usize> {
        match usize::try_from(count) {
            Ok(count) if count <= self.left() / size => Ok(count),
            _ => Err(format!(
                "truncated or damaged: it announces {count} {what}, more than fit into its {} bytes; {}",
                self.file.len(),
                super::DOWNLOAD_AGAIN
            )),
        }
    }

    /// What is not UTF-8 is replaced: some writers put raw bytes into vocabularies.
    fn string(&mut self) -> Result<String> {
        let length = usize::try_from(self.u64()?).map_err(|_| truncated())?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
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

    fn tensor(&mut self) -> Result<Info> {
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
    format!("truncated or damaged: its header goes on behind its end; {}", super::DOWNLOAD_AGAIN)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// A header of `pairs` (key, type, bytes) and `tensors` (name, dimensions, type, offset), and `data` bytes.
    fn file(pairs: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in pairs {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for (name, dims, kind, offset) in tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + data, 0);
        out
    }

    fn array(kind: u32, count: u64, rest: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat()
    }

    fn message(bytes: &[u8]) -> String {
        read(bytes).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let mut words = Vec::new();
        text(&mut words, "a");
        text(&mut words, "");
        let pairs = [
            ("x", 7, vec![1]),
            ("y", 9, array(8, 2, &words)),
            ("z", 9, array(9, 1, &array(0, 2, &[3, 4]))),
            ("general.alignment", 4, 64u32.to_le_bytes().to_vec()),
        ];
        let header = read(&file(&pairs, &[("w", &[4, 2], 0, 64), ("v", &[4], 1, 0)], 128)).unwrap();
        assert!(matches!(header.metadata["x"], Value::Bool(true)));
        assert!(matches!(&header.metadata["y"], Value::Array(v) if v.len() == 2));
        assert!(
            matches!(&header.metadata["z"], Value::Array(v) if matches!(&v[0], Value::Array(v) if v.len() == 2))
        );
        let w = &header.tensors[0];
        assert_eq!(
            (w.name.as_str(), &w.dims[..], w.bytes.len(), w.bytes.start % 64),
            ("w", &[2, 4][..], 32, 0)
        );
    }

    #[test]
    fn alignment_is_the_keys() {
        let align = |kind: u32, value: Vec<u8>| file(&[("general.alignment", kind, value)], &[], 0);
        assert!(message(&align(0, vec![0])).contains("not of type u32"));
        assert!(message(&align(4, vec![0; 4])).contains("is 0, which is no power of two"));
        assert!(message(&align(4, vec![24, 0, 0, 0])).contains("is 24"));
        // The words inside of a value are not the key.
        let mut value = Vec::new();
        text(&mut value, "general.alignment\0\0\0\0\0\0\0\0");
        assert!(read(&file(&[("general.name", 8, value)], &[("w", &[4], 0, 0)], 16)).is_ok());
    }

    #[test]
    fn numbers_beyond_the_file_are_refused() {
        let huge = (u64::MAX / 2).to_le_bytes();
        let mut many = file(&[], &[], 0);
        many[8..16].copy_from_slice(&huge);
        assert!(message(&many).contains("tensors, more than fit"));
        let mut many = file(&[], &[], 0);
        many[16..24].copy_from_slice(&huge);
        assert!(message(&many).contains("metadata keys, more than fit"));
        let long = file(&[("x", 8, huge.to_vec())], &[], 0);
        assert!(message(&long).contains("goes on behind its end"));
        let long = file(&[("x", 9, array(0, u64::MAX, &[]))], &[], 0);
        assert!(message(&long).contains("array elements, more than fit"));
        let mut nested = array(0, 0, &[]);
        for _ in 0..1000 {
            nested = array(9, 1, &nested);
        }
        assert!(message(&file(&[("x", 9, nested)], &[], 0)).contains("nested too deeply"));
        assert!(message(&file(&[("x", 9, array(77, 1, &[0]))], &[], 0)).contains("77 is no type"));
        assert!(message(&file(&[("x", 7, vec![2])], &[], 0)).contains("a truth value is 2"));
        let twice = [("x", 0, vec![2]), ("x", 0, vec![2])];
        assert!(message(&file(&twice, &[], 0)).contains("metadata x comes twice"));
    }

    #[test]
    fn tensors_lie_inside_apart_and_aligned() {
        let tensors = |t: &[(&str, &[u64], u32, u64)]| message(&file(&[], t, 64));
        assert!(tensors(&[("w", &[], 0, 0)]).contains("has 0 dimensions"));
        assert!(tensors(&[("w", &[1, 1, 1, 1, 1], 0, 0)]).contains("has 5 dimensions"));
        assert!(tensors(&[("w", &[4, 0], 0, 0)]).contains("is empty"));
        assert!(tensors(&[("w", &[u64::MAX, u64::MAX], 0, 0)]).contains("is too large"));
        assert!(tensors(&[("w", &[1 << 62], 0, 0)]).contains("is too large"));
        assert!(tensors(&[("w", &[17], 0, 0)]).contains("truncated: tensor w needs"));
        assert!(tensors(&[("w", &[4], 0, u64::MAX - 31)]).contains("needs more bytes"));
        assert!(tensors(&[("w", &[4], 0, 8)]).contains("not at a multiple of 32"));
        assert!(tensors(&[("w", &[31], 8, 0)]).contains("not whole blocks of 32"));
        assert!(tensors(&[("v", &[16], 0, 0), ("w", &[4], 0, 32)]).contains("tensors v and w overlap"));
        assert!(tensors(&[("w", &[4], 0, 0), ("w", &[4], 0, 32)]).contains("w comes twice"));
        assert!(tensors(&[("w\u{1b}[2J", &[256], 16, 0)]).contains("w\\u{1b}[2J: has the type IQ2_XXS"));
    }

    #[test]
    fn what_a_file_is_instead_is_said() {
        for (bytes, wanted) in [
            (&b""[..], "is empty"),
            (b"GGUF", "too short"),
            (b"GGUF\x03\0\0\0\0", "too short"),
            (b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "big-endian"),
            (b"GGUF\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "GGUF version 1"),
            (b"tjgg\x03\0\0\0", "before GGUF"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
            (b"\xff\xfeG\0G\0U\0F\0", "UTF-16"),
            (b"<html>this is not the file you asked for</html>", "not a GGUF file"),
        ] {
            assert!(message(bytes).contains(wanted), "{wanted}: {}", message(bytes));
        }
    }

    /// Cut anywhere, and with any byte changed, a file is read or refused.
    #[test]
    fn damage_is_no_panic() {
        let mut words = Vec::new();
        text(&mut words, "ab");
        let whole = file(
            &[("general.alignment", 4, 32u32.to_le_bytes().to_vec()), ("y", 9, array(8, 1, &words))],
            &[("w", &[4, 2], 0, 64), ("v", &[32], 8, 0)],
            96,
        );
        read(&whole).unwrap();
        for at in 0..whole.len() {
            let _ = read(&whole[..at]);
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] = byte;
                let _ = read(&changed);
            }
        }
    }
}
