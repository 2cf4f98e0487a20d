//! Data sets from the Hugging Face hub, in the cache that all of its tools share.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use minicache_models::Hub;

use super::{Fetch, FetchError, HubFile};

/// A machine without a network should not keep a user waiting who has the bundled sample.
const PATIENCE: Duration = Duration::from_secs(4);

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

    /// Whether the hub's address takes a connection. With a proxy that is the proxy's affair.
    fn reachable(&self) -> Result<(), FetchError> {
        let proxies = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
        if proxies.iter().any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty())) {
            return Ok(());
        }
        let port = if self.hub.endpoint.starts_with("http://") { 80 } else { 443 };
        let host = self.hub.endpoint.split_once("://").map_or(self.hub.endpoint.as_str(), |(_, rest)| rest);
        let host = host.split('/').next().unwrap_or_default();
        let address = if host.contains(':') { host.to_string() } else { format!("{host}:{port}") };
        let answer = address.to_socket_addrs().and_then(|mut found| {
            let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "unknown address");
            TcpStream::connect_timeout(&found.next().ok_or_else(none)?, PATIENCE)
        });
        answer
            .map(|_| ())
            .map_err(|e| FetchError::Unreachable(format!("no connection to {}: {e}", self.hub.endpoint)))
    }
}

impl Fetch for HubData {
    fn fetch(&self, file: &HubFile) -> Result<PathBuf, FetchError> {
        let repo = Repo::with_revision(file.repo.to_string(), RepoType::Dataset, file.revision.to_string());
        let cache = Cache::new(self.hub.cache.clone());
        if let Some(path) = cache.repo(repo.clone()).get(file.path) {
            return Ok(path);
        }
        if self.hub.offline {
            let message =
                format!("HF_HUB_OFFLINE is set, and {} is not in {}", file.path, self.hub.cache.display());
            return Err(FetchError::NotFound(message));
        }
        self.reachable()?;
        let api = ApiBuilder::from_cache(cache)
            .with_endpoint(self.hub.endpoint.trim_end_matches('/').to_string())
            .with_token(self.hub.token.clone())
            .with_progress(self.hub.progress)
            .build();
        api.and_then(|api| api.repo(repo).get(file.path)).map_err(|e| explain(file, &e))
    }

    fn is_offline(&self) -> bool {
        self.hub.offline
    }
}

fn explain(file: &HubFile, error: &ApiError) -> FetchError {
    match error {
        ApiError::RequestError(e) => match &**e {
            ureq::Error::StatusCode(code @ (401 | 403)) => FetchError::NotFound(format!(
                "{} was refused (status {code}); accept its terms on the hub and set HF_TOKEN",
                file.path
            )),
            ureq::Error::StatusCode(code) => FetchError::NotFound(format!("{}: status {code}", file.path)),
            other => FetchError::Unreachable(other.to_string()),
        },
        other => FetchError::NotFound(format!("{}: {other}", file.path)),
    }
}
