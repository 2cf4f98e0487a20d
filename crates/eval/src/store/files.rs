//! The files of an experiment's results folder: `cells.csv`, `other-cells.jsonl` and `made.json`.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use indexmap::IndexMap;
use minicache_config::atomic;
use serde::{Deserialize, Serialize};

use super::{KEY, Made, Result, Row, StoreError, reading, writing};

/// Rows by the key of their cell, in order.
pub(super) type Cells = IndexMap<String, Vec<Row>>;

#[derive(Serialize, Deserialize)]
struct SetAside {
    key: String,
    rows: Vec<Row>,
}

fn malformed(path: &Path, message: impl Into<String>) -> StoreError {
    StoreError::Malformed { path: path.to_path_buf(), message: message.into() }
}

/// The bytes of a file; `None` where there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(reading(path)(e)),
    }
}

/// Reads `cells.csv`. A last line without its line end was torn by whatever copied the file: its cell is dropped and
/// runs again.
pub(super) fn read_cells(path: &Path) -> Result<Cells> {
    const MEND: &str = "remove the file to start that experiment anew";
    let mut cells = Cells::new();
    let Some(bytes) = read(path)? else { return Ok(cells) };
    let text = String::from_utf8_lossy(&bytes);
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let broken = |e: csv::Error| malformed(path, format!("{e}; {MEND}"));
    let headers = reader.headers().map_err(broken)?.clone();
    if whole == 0 {
        return Ok(cells);
    }
    let Some(key_column) = headers.iter().position(|h| h == KEY) else {
        return Err(malformed(path, format!("has no column `{KEY}`, so it is no results file; {MEND}")));
    };
    let mut torn = HashSet::new();
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let key = record.get(key_column).unwrap_or_default().to_string();
        let start = record.position().map_or(0, |p| p.byte() as usize);
        if record.len() != headers.len() || start >= whole {
            torn.insert(key);
            continue;
        }
        let row = headers.iter().map(str::to_string).zip(record.iter().map(str::to_string)).collect();
        cells.entry(key).or_default().push(row);
    }
    cells.retain(|key, _| !torn.contains(key));
    Ok(cells)
}

/// Writes the rows of `cells` under `columns`.
pub(super) fn write_cells<'a>(
    path: &Path,
    columns: &[String],
    cells: impl Iterator<Item = &'a Row>,
) -> Result<()> {
    let broken = |e: csv::Error| writing(path)(std::io::Error::other(e));
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(columns).map_err(broken)?;
    for row in cells {
        let cell = |c: &String| row.get(c).map(String::as_str).unwrap_or_default();
        writer.write_record(columns.iter().map(cell)).map_err(broken)?;
    }
    let bytes = writer.into_inner().map_err(|e| writing(path)(std::io::Error::other(e.to_string())))?;
    atomic::replace(path, &bytes).map_err(writing(path))
}

/// Reads cells that were set aside.
pub(super) fn read_aside(path: &Path) -> Result<Cells> {
    let Some(bytes) = read(path)? else { return Ok(Cells::new()) };
    let text = String::from_utf8_lossy(&bytes);
    let entry = |(index, line): (usize, &str)| match serde_json::from_str::<SetAside>(line) {
        Ok(entry) => Ok((entry.key, entry.rows)),
        Err(e) => Err(malformed(path, format!("line {}: {e}; remove the line", index + 1))),
    };
    text.lines().enumerate().map(entry).collect()
}

/// Writes cells that are set aside; without any there is no file.
pub(super) fn write_aside(path: &Path, cells: &Cells) -> Result<()> {
    if cells.is_empty() {
        return match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(writing(path)(e)),
            _ => Ok(()),
        };
    }
    let mut bytes = Vec::new();
    for (key, rows) in cells {
        let entry = SetAside { key: key.clone(), rows: rows.clone() };
        serde_json::to_writer(&mut bytes, &entry).map_err(|e| writing(path)(e.into()))?;
        bytes.push(b'\n');
    }
    atomic::replace(path, &bytes).map_err(writing(path))
}

/// Reads who made the rows.
pub(super) fn read_made(path: &Path) -> Result<BTreeMap<String, Made>> {
    let Some(bytes) = read(path)? else { return Ok(BTreeMap::new()) };
    let mend = "remove the file; then it is not known any more who made the rows";
    serde_json::from_slice(&bytes).map_err(|e| malformed(path, format!("{e}; {mend}")))
}

/// Writes who made the rows.
pub(super) fn write_made(path: &Path, made: &BTreeMap<String, Made>) -> Result<()> {
    if made.is_empty() && !path.exists() {
        return Ok(());
    }
    let mut bytes = serde_json::to_vec_pretty(made).map_err(|e| writing(path)(e.into()))?;
    bytes.push(b'\n');
    atomic::replace(path, &bytes).map_err(writing(path))
}

/// Writes `value` to `folder/name.json`. The folder is made; where another takes it along, empty, it is made again.
pub(super) fn put_json(folder: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let path = folder.join(format!("{name}.json"));
    let mut bytes = serde_json::to_vec(value).map_err(|e| writing(&path)(e.into()))?;
    bytes.push(b'\n');
    loop {
        fs::create_dir_all(folder).map_err(writing(folder))?;
        match atomic::replace(&path, &bytes) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            written => return written.map_err(writing(&path)),
        }
    }
}

/// The values in the `.json` files of `folder`, in the order of their names; none where there is no folder. A file that
/// goes away meanwhile is passed over.
pub(super) fn read_json_folder<T: serde::de::DeserializeOwned>(folder: &Path) -> Result<Vec<T>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(reading(folder)(e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(reading(folder))?.path();
        let shown = path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'));
        if shown && path.extension().is_some_and(|e| e == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut all = Vec::with_capacity(paths.len());
    for path in paths {
        if let Some(bytes) = read(&path)? {
            let value = serde_json::from_slice(&bytes);
            all.push(value.map_err(|e| malformed(&path, format!("{e}; remove the file")))?);
        }
    }
    Ok(all)
}
