//! What rows go by: the columns that say what a cell is, and the order of all columns.

use std::collections::{BTreeMap, HashSet};

use indexmap::IndexMap;

use super::Store;
use crate::store::{KEY, Row};

impl Store {
    /// Cells of other plans that go by the names of a finished one of this.
    pub(super) fn outnamed(&self) -> Vec<String> {
        let named: HashSet<_> = self.done.iter().filter_map(|key| Some(names(self.plan.get(key)?))).collect();
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        let given = others.filter(|(_, rows)| rows.first().is_some_and(|row| named.contains(&names(row))));
        given.map(|(key, _)| key.clone()).collect()
    }

    /// The columns in order: `key`, the plan's names, what it measures, each followed by what rows of other plans have
    /// besides.
    pub(super) fn columns(&self) -> Vec<String> {
        let mut naming: Vec<&str> = vec![KEY];
        let mut measured: Vec<&str> = Vec::new();
        for column in self.plan.values().flat_map(IndexMap::keys) {
            if !naming.contains(&column.as_str()) {
                naming.push(column);
            }
        }
        measured.extend(self.measured.iter().map(String::as_str).filter(|c| !naming.contains(c)));
        let older = self.rows.iter().filter(|(key, _)| !self.done.contains(*key));
        for (column, value) in older.flat_map(|(_, rows)| rows).flatten() {
            let columns = if is_name(column) { &mut naming } else { &mut measured };
            if !value.is_empty() && column != KEY && !columns.contains(&column.as_str()) {
                columns.push(column);
            }
        }
        naming.into_iter().chain(measured).map(str::to_string).collect()
    }
}

/// Gives rows their key and the plan's naming columns.
pub(super) fn name(rows: &mut [Row], key: &str, names: &Row) {
    for row in rows {
        row.insert(KEY.to_string(), key.to_string());
        row.extend(names.clone());
    }
}

/// Whether a column says what a cell is, not what came out.
fn is_name(column: &str) -> bool {
    ["model", "task", "variant", "cache"].contains(&column)
        || ["cache.", "model."].iter().any(|table| column.starts_with(table))
}

/// What a row goes by: an absent name and an empty one are the same.
fn names(row: &Row) -> BTreeMap<&str, &str> {
    let names = row.iter().filter(|(column, value)| is_name(column) && !value.is_empty());
    names.map(|(column, value)| (column.as_str(), value.as_str())).collect()
}
