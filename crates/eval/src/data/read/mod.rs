//! Readers: JSON lines, a JSON list, CSV, Parquet and a member of a ZIP archive, all into [`Record`]s.
//!
//! Every reader stops after the records that are asked for, and none holds more than a file of its size warrants:
//! lines, records and inflated bytes are bounded, whatever a file says of itself.

mod csv;
mod json;
mod lines;
mod parquet;
mod thrift;
mod zip;

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use minicache_config::{lfs_pointer, not_text};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::error::{DataError, Result};
use super::record::Record;
pub(crate) use lines::Lines;

/// Records that are read of one part of a data set when all are asked for, at most.
const MOST_RECORDS: usize = 1_000_000;
/// Bytes of one line, of an inflated member of an archive and of a file that is read as a whole, at most.
const LONGEST_LINE: u64 = 64 << 20;
const LARGEST_TEXT: u64 = 512 << 20;
/// Memory of the records of one file, at most.
const HEAVIEST: usize = 512 << 20;

/// Where the bytes of a data file are.
#[derive(Debug, Clone)]
pub(crate) enum Blob {
    /// On disk.
    Disk(PathBuf),
    /// Part of this program.
    Embedded(&'static [u8]),
}

/// A data file: its bytes and the name used in errors.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) blob: Blob,
}

/// What the ending of a file's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line.
    JsonLines,
    /// A list of objects, or an object with a list `data`.
    Json,
    /// Rows under a header line.
    Csv,
    /// Rows of a Parquet file.
    Parquet,
    /// JSON lines inside of a ZIP archive.
    Zip,
}

impl Format {
    fn of(name: &str) -> Option<Self> {
        match Path::new(name).extension().and_then(|e| e.to_str())? {
            "jsonl" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "parquet" => Some(Self::Parquet),
            "zip" => Some(Self::Zip),
            _ => None,
        }
    }
}

/// Bytes that can be read from any place: a file, or memory.
pub(crate) trait Bytes: Read + std::io::Seek + Send {}
impl<T: Read + std::io::Seek + Send> Bytes for T {}

impl Source {
    fn open(&self) -> Result<Box<dyn Bytes>> {
        match &self.blob {
            Blob::Embedded(bytes) => Ok(Box::new(Cursor::new(*bytes))),
            Blob::Disk(path) => Ok(Box::new(File::open(path).map_err(|e| self.io(e))?)),
        }
    }

    fn io(&self, source: std::io::Error) -> DataError {
        DataError::Io { path: PathBuf::from(&self.name), source }
    }

    /// Adds what is read of this file to `hash`: all of its bytes, but of an archive only those of `member`, because
    /// what else it holds does not matter.
    pub(crate) fn hash(&self, member: &str, hash: &mut Sha256) -> Result<()> {
        let mut file = self.open()?;
        if Format::of(&self.name) == Some(Format::Zip) {
            return zip::with_member(&self.name, file, member, |reader| update(hash, reader));
        }
        update(hash, &mut file).map_err(|e| self.io(e))
    }

    /// Whether this archive holds `member`.
    pub(crate) fn has_member(&self, member: &str) -> Result<bool> {
        zip::has_member(&self.name, self.open()?, member)
    }

    /// The first `limit` records, or all of them; `member` is the file wanted inside a `.zip`.
    pub(crate) fn records(&self, member: &str, limit: Option<usize>) -> Result<Vec<Record>> {
        let format = Format::of(&self.name).ok_or_else(|| DataError::Format {
            place: self.name.clone(),
            message: "expected a .jsonl, .json, .csv, .parquet or .zip file".to_string(),
        })?;
        records(format, &self.name, self.open()?, member, limit)
    }
}

fn update(hash: &mut Sha256, reader: &mut dyn Read) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The first `limit` records, or all of them, of `file`, which is called `name`; `member` is the file wanted inside of an
/// archive.
pub(crate) fn records(
    format: Format,
    name: &str,
    mut file: Box<dyn Bytes>,
    member: &str,
    limit: Option<usize>,
) -> Result<Vec<Record>> {
    let mut kept = Kept::new(name, limit);
    match format {
        Format::Parquet => parquet::rows(name, file, &mut kept)?,
        Format::Zip => {
            let inside = format!("{name}/{member}");
            zip::with_member(name, file, member, |reader| Ok(json_lines(&inside, reader, &mut kept)))??;
        }
        Format::JsonLines => json_lines(name, &mut file, &mut kept)?,
        Format::Json => json::list(name, text_of(name, &mut file)?, &mut kept)?,
        Format::Csv => csv::rows(name, text_of(name, &mut file)?, &mut kept)?,
    }
    Ok(kept.records)
}

fn json_lines(name: &str, reader: &mut dyn Read, kept: &mut Kept<'_>) -> Result<()> {
    for record in Lines::new(name, reader)? {
        if !kept.wants_more()? {
            break;
        }
        kept.add(record?)?;
    }
    Ok(())
}

/// Records as they are kept, within bounds.
struct Kept<'a> {
    name: &'a str,
    limit: Option<usize>,
    records: Vec<Record>,
    weight: usize,
}

impl<'a> Kept<'a> {
    fn new(name: &'a str, limit: Option<usize>) -> Self {
        Self { name, limit, records: Vec::new(), weight: 0 }
    }

    /// Whether another record is wanted, which there may be.
    fn wants_more(&self) -> Result<bool> {
        if self.limit.is_none() && self.records.len() >= MOST_RECORDS {
            return Err(self.too_much(&format!("{MOST_RECORDS} records")));
        }
        Ok(self.limit.is_none_or(|limit| self.records.len() < limit))
    }

    /// How many records may still come.
    fn left(&self) -> usize {
        self.limit.unwrap_or(MOST_RECORDS + 1) - self.records.len()
    }

    fn add(&mut self, record: Record) -> Result<()> {
        self.weight += record.fields.iter().map(|(key, value)| key.len() + weight(value)).sum::<usize>();
        if self.weight > HEAVIEST {
            return Err(self.too_much(&format!("{} MiB of records", HEAVIEST >> 20)));
        }
        self.records.push(record);
        Ok(())
    }

    fn too_much(&self, what: &str) -> DataError {
        let message = format!("holds more than {what}; set a `limit`, or take a part of it");
        DataError::Format { place: self.name.to_string(), message }
    }
}

/// Bytes that a value takes in memory, about.
fn weight(value: &Value) -> usize {
    size_of::<Value>()
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(weight).sum(),
            Value::Object(map) => map.iter().map(|(k, v)| size_of::<String>() + k.len() + weight(v)).sum(),
            _ => 0,
        }
}

/// A text file after its byte order mark.
///
/// # Errors
/// A file that is none, by its first bytes.
fn text_of<'a>(name: &str, reader: &'a mut dyn Read) -> Result<Box<dyn BufRead + 'a>> {
    let mut head = Vec::new();
    (&mut *reader)
        .take(64)
        .read_to_end(&mut head)
        .map_err(|source| DataError::Io { path: PathBuf::from(name), source })?;
    if let Some(what) = not_text(&head) {
        return Err(DataError::Format { place: name.to_string(), message: what.to_string() });
    }
    if head.starts_with("\u{feff}".as_bytes()) {
        head.drain(.."\u{feff}".len());
    }
    Ok(Box::new(Cursor::new(head).chain(BufReader::with_capacity(1 << 16, reader))))
}

/// Refuses a Git LFS pointer in place of a binary file, which is rewound.
fn no_pointer(name: &str, file: &mut dyn Bytes) -> Result<()> {
    let mut head = Vec::new();
    let read = file.take(64).read_to_end(&mut head).and_then(|_| file.rewind());
    read.map_err(|source| DataError::Io { path: PathBuf::from(name), source })?;
    match lfs_pointer(&head) {
        Some(what) => Err(DataError::Format { place: name.to_string(), message: what.to_string() }),
        None => Ok(()),
    }
}

/// The records of bytes in memory, for programs that try inputs: as of a file of that format, read with all bounds;
/// `member` is the file wanted inside of an archive.
///
/// # Errors
/// As for a file.
#[doc(hidden)]
pub fn records_from_bytes(
    format: Format,
    bytes: Vec<u8>,
    member: &str,
    limit: Option<usize>,
) -> Result<Vec<Record>> {
    records(format, "input", Box::new(Cursor::new(bytes)), member, limit)
}
