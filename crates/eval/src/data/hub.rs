//! Data sets from the Hugging Face hub, in the cache that all of its tools share.

use std::path::PathBuf;

use minicache_models::Hub;

use super::{Fetch, FetchError, HubFile};

/// The data sets of a hub.
#[derive(Debug, Clone)]
pub struct HubData {
    hub: Hub,
}

impl HubData {
    /// The data sets of `hub`.
    pub fn new(hub: Hub) -> Self {
        Self { hub }
    }
}

impl Fetch for HubData {
    fn fetch(&self, file: &HubFile) -> Result<PathBuf, FetchError> {
        self.hub.fetch_data(file.repo, file.revision, file.path).map_err(|e| {
            if e.is_unreachable {
                FetchError::Unreachable(e.message)
            } else {
                FetchError::NotFound(e.message)
            }
        })
    }

    fn is_offline(&self) -> bool {
        self.hub.offline
    }
}
