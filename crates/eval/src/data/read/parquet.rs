//! Rows of a Parquet file, nested columns as lists and objects.
//!
//! The reader believes what a file says of its sizes: nesting becomes recursion, and a page's size an allocation. So
//! the footer and every page are looked at before they reach it (see [`Checked`]), and what it panics on all the same
//! is an error.

use std::io::{self, BufReader, Read, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};

use ::bytes::Bytes as Slice;
use ::parquet::errors::{ParquetError, Result as ParquetResult};
use ::parquet::file::reader::{ChunkReader, FileReader as _, Length, SerializedFileReader};
use ::parquet::record::{Field, Row};
use minicache_config::{guard, python_json, shown};
use serde_json::Value;

use super::thrift::{Kind, Reader};
use super::{Bytes, Kept, Record, no_pointer};
use crate::data::error::{DataError, Result};

/// Columns inside of each other, at most.
const MAX_DEPTH: usize = 32;
/// Columns, at most.
const MOST_COLUMNS: usize = 256;
/// Values of a column of lists in a group of rows, at most: one row may hold them all.
const MOST_LISTED: i64 = 8 << 20;
/// Bytes of a page when unpacked, at most; and of a page of every column together.
const LARGEST_PAGE: usize = 32 << 20;
const LARGEST_PAGES: usize = 256 << 20;
/// Bytes at the end of a file: the length of its footer, and `PAR1`.
const TAIL: usize = 8;

pub(super) fn rows(name: &str, mut file: Box<dyn Bytes>, kept: &mut Kept<'_>) -> Result<()> {
    no_pointer(name, &mut file)?;
    let wrong = |place: String, message: String| DataError::Format { place, message };
    let bad = |place: String, e: &ParquetError| {
        wrong(place, format!("not a readable Parquet file: {}", shown(&e.to_string())))
    };
    guard("the Parquet reader", || {
        let checked = Checked::new(file).map_err(|e| bad(name.to_string(), &e))?;
        let reader = SerializedFileReader::new(checked).map_err(|e| bad(name.to_string(), &e))?;
        lists_fit(&reader).map_err(|e| bad(name.to_string(), &e))?;
        let rows = reader.get_row_iter(None).map_err(|e| bad(name.to_string(), &e))?;
        for (index, row) in rows.take(kept.left()).enumerate() {
            let place = format!("{name}, row {}", index + 1);
            let row = row.map_err(|e| bad(place.clone(), &e))?;
            kept.wants_more()?;
            kept.add(Record::new(row_value(&row), place, index)?)?;
        }
        Ok(())
    })
    .map_err(|message| wrong(name.to_string(), message))?
}

/// Refuses lists that could fill the memory in one row.
fn lists_fit(reader: &SerializedFileReader<Checked>) -> ParquetResult<()> {
    let columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let mut lists = columns.filter(|c| c.column_descr().max_rep_level() > 0);
    match lists.find(|c| c.num_values() > MOST_LISTED) {
        Some(c) => Err(refused(format!("{} values in the lists of `{}`", c.num_values(), c.column_path()))),
        None => Ok(()),
    }
}

fn refused(what: impl Into<String>) -> ParquetError {
    ParquetError::General(what.into())
}

/// The fields of a row; null is how Parquet writes that there is none.
fn row_value(row: &Row) -> Value {
    let fields = row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null));
    Value::Object(fields.map(|(name, field)| (name.clone(), field_value(field))).collect())
}

fn field_value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) => (*v).into(),
        Field::Long(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float(v) => python_json::from_f64(f64::from(*v)),
        Field::Double(v) => python_json::from_f64(*v),
        Field::Str(v) => v.as_str().into(),
        Field::Bytes(v) => String::from_utf8_lossy(v.data()).into(),
        Field::Group(row) => row_value(row),
        Field::ListInternal(list) => list.elements().iter().map(field_value).collect(),
        Field::MapInternal(map) => Value::Object(
            map.entries()
                .iter()
                .map(|(k, v)| {
                    let key = field_value(k);
                    (key.as_str().map_or_else(|| key.to_string(), str::to_string), field_value(v))
                })
                .collect(),
        ),
        // Dates and decimals: no field of any task's data set is one.
        other => other.to_string().into(),
    }
}

/// A file whose footer and pages are looked at before the Parquet reader gets them.
struct Checked {
    file: Arc<Mutex<Box<dyn Bytes>>>,
    length: u64,
    /// Bytes of an unpacked page, at most.
    largest_page: usize,
}

impl Checked {
    fn new(mut file: Box<dyn Bytes>) -> ParquetResult<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        let mut checked = Self { file: Arc::new(Mutex::new(file)), length, largest_page: LARGEST_PAGE };
        let tail = length.checked_sub(TAIL as u64).ok_or_else(|| refused("it is too short"))?;
        let tail = checked.read(tail, TAIL)?;
        let footer = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
        let start = length.checked_sub(TAIL as u64 + u64::from(footer));
        let start = start.ok_or_else(|| refused("its footer is longer than the file"))?;
        let columns = columns(&checked.read(start, footer as usize)?)?;
        checked.largest_page = (LARGEST_PAGES / columns.max(1)).min(LARGEST_PAGE);
        Ok(checked)
    }

    fn read(&self, start: u64, length: usize) -> ParquetResult<Vec<u8>> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(refused("it points beyond its end"));
        }
        let mut bytes = vec![0; length];
        self.at(start).read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn at(&self, position: u64) -> At {
        At { file: Arc::clone(&self.file), position }
    }

    fn fits(&self, size: u64) -> ParquetResult<()> {
        if size <= self.largest_page as u64 {
            return Ok(());
        }
        Err(refused(format!("a page of it unpacks to more than {} MiB", self.largest_page >> 20)))
    }

    /// Unpacks what is packed without a size, as the reader does, to see that it fits.
    fn unpacks_within(&self, bytes: &[u8]) -> ParquetResult<()> {
        let most = self.largest_page as u64 + 1;
        let count = |reader: &mut dyn Read| {
            // What cannot be unpacked is for the reader to say.
            io::copy(&mut reader.take(most), &mut io::sink()).unwrap_or(0)
        };
        match bytes {
            [0x1f, 0x8b, ..] => self.fits(count(&mut flate2::read::MultiGzDecoder::new(bytes))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => self.fits(count(&mut zstd::Decoder::new(bytes)?)),
            _ => Ok(()),
        }
    }
}

/// A place in a file.
struct At {
    file: Arc<Mutex<Box<dyn Bytes>>>,
    position: u64,
}

impl Read for At {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.position))?;
        let n = file.read(out)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Length for Checked {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Checked {
    type T = BufReader<At>;

    /// The reader asks this way for page headers and for the last bytes.
    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        /// The fields that are looked at come first.
        const HEAD: u64 = 64;
        let left = self.length.checked_sub(start).ok_or_else(|| refused("it points beyond its end"))?;
        let head = self.read(start, left.min(HEAD) as usize)?;
        self.fits(unpacked_size(&head).unwrap_or(0))?;
        Ok(BufReader::new(self.at(start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Slice> {
        let bytes = self.read(start, length)?;
        self.unpacks_within(&bytes)?;
        Ok(bytes.into())
    }
}

/// `uncompressed_page_size` of a `PageHeader`, its second field.
fn unpacked_size(header: &[u8]) -> Option<u64> {
    let mut reader = Reader::new(header);
    let mut last = 0;
    while let Some((id, kind)) = reader.field(last)? {
        if (id, kind) == (2, Kind::Integer) {
            return u64::try_from(reader.integer()?).ok();
        }
        reader.skip(kind, false)?;
        last = id;
    }
    None
}

/// The number of columns of a `FileMetaData`, after a look at what the reader will recurse and allocate by: its
/// `schema`, the second field, is a tree in depth-first order, in which `num_children` is the fifth field.
fn columns(footer: &[u8]) -> ParquetResult<usize> {
    let damaged = || refused("its footer is damaged");
    Reader::new(footer).skip(Kind::Struct, false).ok_or_else(damaged)?;
    let children = children(footer).ok_or_else(damaged)?;
    // How many children are still to come, of every group that is open.
    let mut open: Vec<i64> = Vec::new();
    let mut columns = 0;
    for count in children {
        if let Some(left) = open.last_mut() {
            *left -= 1;
        }
        if count > 0 {
            open.push(count);
        } else {
            columns += 1;
        }
        while open.last().is_some_and(|&left| left <= 0) {
            open.pop();
        }
        if open.len() > MAX_DEPTH || columns > MOST_COLUMNS {
            let message = format!("more than {MOST_COLUMNS} columns, or nested more than {MAX_DEPTH} deep");
            return Err(refused(message));
        }
    }
    Ok(columns)
}

/// `num_children` of every element of the schema, 0 where absent.
fn children(footer: &[u8]) -> Option<Vec<i64>> {
    let mut reader = Reader::new(footer);
    let mut last = 0;
    while let Some((id, kind)) = reader.field(last)? {
        last = id;
        if (id, kind) != (2, Kind::List) {
            reader.skip(kind, false)?;
            continue;
        }
        let (_, count) = reader.list()?;
        let element = |_| {
            let (mut last, mut children) = (0, 0);
            while let Some((id, kind)) = reader.field(last)? {
                last = id;
                if (id, kind) == (5, Kind::Integer) {
                    children = reader.integer()?;
                } else {
                    reader.skip(kind, false)?;
                }
            }
            Some(children)
        };
        return (0..count).map(element).collect();
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A footer whose schema is a chain of `depth` groups with one column at its end, in compact Thrift: a structure
    /// with a version and the list of elements, each with a name and a number of children.
    fn footer(depth: u32) -> Vec<u8> {
        let mut bytes = vec![0x15, 2, 0x19, 0xfc];
        let mut count = depth + 1;
        while count >= 0x80 {
            bytes.push(count as u8 | 0x80);
            count >>= 7;
        }
        bytes.push(count as u8);
        bytes.extend((0..depth).flat_map(|_| [0x48, 1, b'a', 0x15, 2, 0]));
        bytes.extend([0x48, 1, b'a', 0, 0]);
        bytes
    }

    #[test]
    fn nesting_and_lists_of_a_footer_are_bounded() {
        assert_eq!(columns(&footer(3)).unwrap(), 1);
        assert!(columns(&footer(200_000)).unwrap_err().to_string().contains("nested more than 32"));
        // A list of more elements than there are bytes.
        assert!(columns(&[0x15, 2, 0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 7, 0]).is_err());
        let fixture = include_bytes!("../../../tests/fixtures/coqa.parquet");
        let checked = Checked::new(Box::new(std::io::Cursor::new(fixture.as_slice()))).unwrap();
        assert!(checked.largest_page >= 16 << 20, "{}", checked.largest_page);
    }

    #[test]
    fn pages_are_bounded_by_what_they_say_and_by_what_they_are() {
        // A data page of 2^31 - 1 bytes that lie in 3.
        let header = [0x15, 0, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0x15, 6, 0x2c];
        assert_eq!(unpacked_size(&header), Some((1 << 31) - 1));
        assert_eq!(unpacked_size(&header[..4]), None);
        let file = Box::new(std::io::Cursor::new(Vec::new()));
        let checked = Checked { file: Arc::new(Mutex::new(file)), length: 0, largest_page: 1 << 20 };
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&vec![0; (1 << 20) + 1]).unwrap();
        assert!(checked.unpacks_within(&gzip.finish().unwrap()).is_err());
        let zstd = |size: usize| zstd::encode_all(vec![0; size].as_slice(), 1).unwrap();
        assert!(checked.unpacks_within(&zstd((1 << 20) + 1)).is_err());
        assert!(checked.unpacks_within(&zstd(1 << 20)).is_ok());
        assert!(checked.unpacks_within(b"\x1f\x8bno gzip").is_ok());
    }
}
