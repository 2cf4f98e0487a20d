//! What a data set is made of: its files, under the names people have them, and on the hub.

use super::error::Result;
use super::record::Record;

/// A file of a data set repository on the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubFile {
    /// `owner/name`.
    pub repo: &'static str,
    /// Branch; `refs/convert/parquet` is the hub's own conversion of script data sets.
    pub revision: &'static str,
    /// Path in the repository.
    pub path: &'static str,
}

impl HubFile {
    /// A file of the main branch.
    pub(crate) const fn main(repo: &'static str, path: &'static str) -> Self {
        Self { repo, revision: "main", path }
    }

    /// A file of the hub's Parquet conversion.
    pub(crate) const fn converted(repo: &'static str, path: &'static str) -> Self {
        Self { repo, revision: "refs/convert/parquet", path }
    }
}

/// One file of a data set, such as a split.
#[derive(Debug)]
pub struct Part {
    /// Name in messages.
    pub name: &'static str,
    /// Paths below the data folder, in the order of trying. `{}` stands for the data set's own name and one `*` for
    /// anything: several matches are read in order, as the shards of one file.
    pub local: &'static [&'static str],
    /// Places on the hub, in the order of trying.
    pub hub: &'static [HubFile],
    /// The data set can be used without this part.
    pub optional: bool,
    /// Brings the records of any of these files into the hub's field layout, which is all that tasks know.
    pub normalise: fn(Vec<Record>) -> Result<Vec<Record>>,
}

/// A data set: the first part holds the documents.
#[derive(Debug, Clone, Copy)]
pub struct Dataset {
    /// Name, also the member of a ZIP archive (`data/NAME.jsonl`).
    pub name: &'static str,
    /// Its files.
    pub parts: &'static [Part],
}

/// For files that are in the hub's layout already.
pub(crate) fn as_is(records: Vec<Record>) -> Result<Vec<Record>> {
    Ok(records)
}
