//! Readers: JSON lines, a JSON list, CSV, Parquet and a member of a ZIP archive, all into [`Record`]s.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::error::{DataError, Result};
use super::record::Record;

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

impl Source {
    pub(crate) fn bytes(&self) -> Result<std::borrow::Cow<'static, [u8]>> {
        match &self.blob {
            Blob::Embedded(bytes) => Ok((*bytes).into()),
            Blob::Disk(path) => std::fs::read(path)
                .map(Into::into)
                .map_err(|source| DataError::Io { path: path.clone(), source }),
        }
    }

    fn text(&self) -> Result<String> {
        utf8(&self.name, self.bytes()?.into_owned())
    }

    /// All records, the format by the ending of the name; `member` is the file wanted inside a `.zip`.
    pub(crate) fn records(&self, member: &str) -> Result<Vec<Record>> {
        let ending = Path::new(&self.name).extension().and_then(|e| e.to_str()).unwrap_or_default();
        match (ending, &self.blob) {
            ("jsonl", _) => jsonl(&self.name, &self.text()?),
            ("json", _) => json_list(&self.name, &self.text()?),
            ("csv", _) => csv_rows(&self.name, &self.text()?),
            ("parquet", Blob::Disk(path)) => parquet_rows(&self.name, path),
            ("zip", Blob::Disk(path)) => {
                let text = zip_member(path, member)?.ok_or_else(|| DataError::Format {
                    place: self.name.clone(),
                    message: format!("holds no file {member}"),
                })?;
                jsonl(&format!("{}/{member}", self.name), &utf8(&self.name, text)?)
            }
            _ => Err(DataError::Format {
                place: self.name.clone(),
                message: "expected a .jsonl, .json, .csv, .parquet or .zip file".to_string(),
            }),
        }
    }
}

pub(crate) fn utf8(name: &str, bytes: Vec<u8>) -> Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        DataError::Format { place: format!("{name}, line {line}"), message: "not UTF-8 text".to_string() }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// One JSON object per line; empty lines are passed over.
pub(crate) fn jsonl(name: &str, text: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (number, line) in text.split('\n').enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{name}, line {}", number + 1);
        let value = serde_json::from_str(line)
            .map_err(|e| DataError::Format { place: place.clone(), message: not_json(&e, false) })?;
        records.push(Record::new(value, place, records.len())?);
    }
    Ok(records)
}

/// A JSON list of objects, or an object whose `data` is one (as in CoQA's file).
fn json_list(name: &str, text: &str) -> Result<Vec<Record>> {
    let value: Value = serde_json::from_str(text)
        .map_err(|e| DataError::Format { place: name.to_string(), message: not_json(&e, true) })?;
    let list = match value {
        Value::Array(list) => Some(list),
        Value::Object(mut map) => match map.remove("data") {
            Some(Value::Array(list)) => Some(list),
            _ => None,
        },
        _ => None,
    };
    let list = list.ok_or_else(|| DataError::Format {
        place: name.to_string(),
        message: "expected a list of records, or an object with a list `data`".to_string(),
    })?;
    let place = |i| format!("{name}, entry {}", i + 1);
    list.into_iter().enumerate().map(|(i, value)| Record::new(value, place(i), i)).collect()
}

/// Rows under a header line, every field a string.
fn csv_rows(name: &str, text: &str) -> Result<Vec<Record>> {
    let bad = |e: csv::Error| {
        let line = e.position().map(|p| format!(", line {}", p.line())).unwrap_or_default();
        DataError::Format {
            place: format!("{name}{line}"),
            message: format!("not valid CSV: {}", csv_reason(&e)),
        }
    };
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(bad)?.clone();
    let mut records = Vec::new();
    for row in reader.records() {
        let row = row.map_err(bad)?;
        let line = row.position().map_or(0, csv::Position::line);
        let fields: Map<String, Value> =
            header.iter().zip(&row).map(|(k, v)| (k.trim().to_string(), Value::from(v))).collect();
        records.push(Record { fields, place: format!("{name}, line {line}"), index: records.len() });
    }
    Ok(records)
}

fn csv_reason(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("{len} fields where the header has {expected_len}")
        }
        _ => error.to_string(),
    }
}

/// Rows of a Parquet file, nested columns as lists and objects.
fn parquet_rows(name: &str, path: &Path) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(|source| DataError::Io { path: path.to_path_buf(), source })?;
    let bad = |place: String, e: parquet::errors::ParquetError| DataError::Format {
        place,
        message: format!("not a readable Parquet file: {e}"),
    };
    let reader = SerializedFileReader::new(file).map_err(|e| bad(name.to_string(), e))?;
    let rows = reader.get_row_iter(None).map_err(|e| bad(name.to_string(), e))?;
    rows.enumerate()
        .map(|(i, row)| {
            let place = format!("{name}, row {}", i + 1);
            let row = row.map_err(|e| bad(place.clone(), e))?;
            Record::new(row_value(&row), place, i)
        })
        .collect()
}

fn row_value(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), field_value(field))).collect())
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
        Field::Float(v) => (*v).into(),
        Field::Double(v) => (*v).into(),
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

/// The bytes of `member` in the archive at `path`; `None` when it has no such file.
pub(crate) fn zip_member(path: &Path, member: &str) -> Result<Option<Vec<u8>>> {
    let io = |source| DataError::Io { path: path.to_path_buf(), source };
    let bad = |e: zip::result::ZipError| DataError::Format {
        place: path.display().to_string(),
        message: format!("not a readable ZIP archive: {e}"),
    };
    let mut archive = zip::ZipArchive::new(File::open(path).map_err(io)?).map_err(bad)?;
    let mut bytes = Vec::new();
    match archive.by_name(member) {
        Ok(mut file) => file.read_to_end(&mut bytes).map_err(io)?,
        Err(zip::result::ZipError::FileNotFound) => return Ok(None),
        Err(e) => return Err(bad(e)),
    };
    Ok(Some(bytes))
}

/// `serde_json`'s reason without its own "at line 1", which would contradict the line of the file.
fn not_json(error: &serde_json::Error, with_line: bool) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or_default();
    let line = if with_line { format!("line {}, ", error.line()) } else { String::new() };
    format!("not valid JSON: {reason} ({line}column {})", error.column())
}
