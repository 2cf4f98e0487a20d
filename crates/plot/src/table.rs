//! CSV files as tables of text: any columns, numbers read where they are asked for.

use std::path::Path;

use indexmap::IndexSet;

use crate::error::{PlotError, Result, io};

/// Rows of text under named columns.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Table {
    /// Column names, unique.
    pub(crate) columns: Vec<String>,
    /// One text per column; empty where there is no value.
    pub(crate) rows: Vec<Vec<String>>,
    /// The last line was cut off in the middle and left out.
    pub(crate) torn: bool,
    /// Lines that start with `#`, without it.
    pub(crate) comments: Vec<String>,
}

impl Table {
    /// Reads a file that is being appended to: a last line without its line end was cut off by a killed run and is
    /// left out. A missing or empty file is an empty table.
    pub(crate) fn read_growing(path: &Path) -> Result<Self> {
        let text = match std::fs::read(path) {
            Ok(bytes) => utf8(bytes, path)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(path, "read")(e)),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut table = Self::parse(&text[..whole], path)?;
        table.torn = whole < text.len();
        Ok(table)
    }

    /// Reads a file that is complete.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(io(path, "read"))?;
        Self::parse(&utf8(bytes, path)?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let fail = |line: u64, message: String| PlotError::Csv { path: path.to_path_buf(), line, message };
        let comment = |l: &str| l.strip_prefix('#').map(|c| c.trim().to_string());
        let comments = text.lines().filter_map(comment).collect();
        let mut table = Self { comments, ..Self::default() };
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .comment(Some(b'#'))
            .from_reader(text.as_bytes());
        for record in reader.records() {
            let record = record.map_err(|e| {
                let line = e.position().map_or(0, csv::Position::line);
                fail(line, format!("not readable as CSV: {e}"))
            })?;
            let line = record.position().map_or(0, csv::Position::line);
            let fields: Vec<String> = record.iter().map(|f| f.trim().to_string()).collect();
            if table.columns.is_empty() {
                for (i, name) in fields.iter().enumerate() {
                    if fields[..i].contains(name) {
                        return Err(fail(line, format!("column `{name}` appears twice in the header")));
                    }
                }
                table.columns = fields;
            } else if fields.len() == table.columns.len() {
                table.rows.push(fields);
            } else {
                let (has, wants) = (fields.len(), table.columns.len());
                let message = format!(
                    "{has} fields where the header has {wants}; remove the line, or the file to run again"
                );
                return Err(fail(line, message));
            }
        }
        Ok(table)
    }

    /// Index of the column `name`.
    pub(crate) fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c == name)
    }

    /// The text of `row` under the column `name`; empty where either is missing.
    pub(crate) fn text(&self, row: usize, name: &str) -> &str {
        match (self.column(name), self.rows.get(row)) {
            (Some(c), Some(r)) => &r[c],
            _ => "",
        }
    }

    /// The finite number of `row` under the column `name`.
    pub(crate) fn number(&self, row: usize, name: &str) -> Option<f64> {
        number(self.text(row, name))
    }

    /// Appends a column computed from each row; an existing one of that name stays as it is.
    pub(crate) fn derive(&mut self, name: &str, value: impl Fn(&Self, usize) -> Option<String>) {
        if self.column(name).is_some() {
            return;
        }
        let values: Vec<_> = (0..self.rows.len()).map(|row| value(self, row)).collect();
        if values.iter().all(Option::is_none) {
            return;
        }
        self.columns.push(name.to_string());
        for (row, value) in self.rows.iter_mut().zip(values) {
            row.push(value.unwrap_or_default());
        }
    }

    /// The different non-empty values of a column over `rows`, in order of first appearance.
    pub(crate) fn distinct(&self, name: &str, rows: &[usize]) -> Vec<String> {
        let Some(column) = self.column(name) else { return Vec::new() };
        let values = rows.iter().map(|&row| self.rows[row][column].as_str()).filter(|v| !v.is_empty());
        values.collect::<IndexSet<_>>().into_iter().map(str::to_string).collect()
    }

    /// All row indices.
    pub(crate) fn all(&self) -> Vec<usize> {
        (0..self.rows.len()).collect()
    }
}

/// A finite number, or nothing.
pub(crate) fn number(text: &str) -> Option<f64> {
    text.parse::<f64>().ok().filter(|x| x.is_finite())
}

fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        PlotError::Csv { path: path.to_path_buf(), line: line as u64, message: "not UTF-8 text".into() }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Table> {
        Table::parse(text, Path::new("cells.csv"))
    }

    #[test]
    fn quoted_json_and_comments() {
        let t = parse("# by eye; +-0.5\nmodel,cache,kl\nm,\"{\"\"method\"\":\"\"full\"\"}\",0.25\n").unwrap();
        assert_eq!(t.comments, ["by eye; +-0.5"]);
        assert_eq!(t.text(0, "cache"), r#"{"method":"full"}"#);
        assert_eq!(t.number(0, "kl"), Some(0.25));
        assert_eq!(t.number(0, "absent"), None);
    }

    #[test]
    fn a_bad_row_is_named() {
        let error = parse("a,b\n1,2\n3\n4,5\n").unwrap_err().to_string();
        assert!(error.starts_with("cells.csv: line 3: 1 fields where the header has 2"), "{error}");
        let error = parse("a,a\n").unwrap_err().to_string();
        assert!(error.contains("line 1: column `a` appears twice"), "{error}");
    }

    #[test]
    fn a_cut_off_last_line_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cells.csv");
        std::fs::write(&path, "a,b\n1,2\n3,\"{ha").unwrap();
        let t = Table::read_growing(&path).unwrap();
        assert!(t.torn);
        assert_eq!(t.rows, [["1", "2"]]);
        std::fs::write(&path, "").unwrap();
        assert_eq!(Table::read_growing(&path).unwrap(), Table::default());
        assert_eq!(Table::read_growing(&dir.path().join("none.csv")).unwrap(), Table::default());
    }

    #[test]
    fn not_a_number_is_no_value() {
        let t = parse("x\nNaN\ninf\n1e3\nhalf\n").unwrap();
        let values: Vec<_> = t.all().iter().map(|&r| t.number(r, "x")).collect();
        assert_eq!(values, [None, None, Some(1000.0), None]);
    }
}
