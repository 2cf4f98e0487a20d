//! Requests to the hub: whom the token is shown to, which redirections are followed, what failed.

use std::cell::Cell;
use std::io::{ErrorKind, Read as _};
use std::path::PathBuf;
use std::time::Duration;

use minicache_config::shown;
use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use ureq::{Agent, Body};
use url::Url;

use super::{Hub, env, names};

const COMMIT: &str = "x-repo-commit";
const LINKED_ETAG: &str = "x-linked-etag";
const LINKED_SIZE: &str = "x-linked-size";
/// Redirections that one request may lead through.
const REDIRECTIONS: usize = 10;
/// Longest answer to a question about a repository, in bytes.
const LONGEST_ANSWER: u64 = 32 << 20;
/// A machine without a network should not keep a user waiting who has the bundled sample.
const TO_RESOLVE: Duration = Duration::from_secs(5);
const TO_CONNECT: Duration = Duration::from_secs(6);

/// Why a request or download failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// There is no connection.
    Unreachable(String),
    /// The connection broke, or went silent.
    Broken(String),
    /// An HTTP status that is no success.
    Status(u16),
    /// An answer that is not the hub's.
    Answer(String),
    /// Contents that are not what the hub announced.
    Mismatch(String),
    /// Something of this machine: the token, the cache.
    Local(String),
}

impl Trouble {
    /// Whether the next try may do better.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Status(408 | 429 | 500..))
    }

    /// For `map_err` on file operations.
    pub(super) fn local(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Trouble {
        let path = path.into();
        move |e| Self::Local(format!("{}: {e}", path.display()))
    }
}

/// What the hub says of a file.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The commit that the revision stands for.
    pub(super) commit: Option<String>,
    /// The blob's name: for what the hub stores the hash of its contents.
    pub(super) blob: Option<String>,
    /// Bytes of the whole file.
    pub(super) size: Option<u64>,
}

impl Facts {
    /// Takes from an answer what it says. What is a name must be plain, and what the hub itself said stays.
    fn note(&mut self, answer: &Response<Body>, is_own: bool) -> Result<(), Trouble> {
        let headers = answer.headers();
        let refuse = |what: &str, value: &HeaderValue| {
            let value = shown(&String::from_utf8_lossy(value.as_bytes()));
            Trouble::Answer(format!("its {what} {value} is no plain name, and was refused"))
        };
        if let Some(value) = headers.get(COMMIT).filter(|_| is_own || self.commit.is_none()) {
            let commit = value.to_str().ok().map(str::trim).filter(|c| names::is_word(c));
            self.commit = Some(commit.ok_or_else(|| refuse("X-Repo-Commit", value))?.to_string());
        }
        let etag = headers.get(LINKED_ETAG).or_else(|| headers.get(header::ETAG));
        if let Some(value) = etag.filter(|_| is_own || self.blob.is_none()) {
            let blob = value.to_str().ok().and_then(names::blob);
            self.blob = Some(blob.ok_or_else(|| refuse("ETag", value))?.to_string());
        }
        if is_own || self.size.is_none() {
            let length = Some(header::CONTENT_LENGTH.as_str()).filter(|_| answer.status().is_success());
            self.size = number(headers, LINKED_SIZE).or_else(|| number(headers, length?)).or(self.size);
        }
        Ok(())
    }
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// A client of one hub.
pub(super) struct Client {
    agent: Agent,
    endpoint: Url,
    authorization: Option<HeaderValue>,
    /// Whether anything was ever answered: from then on a failure is a disturbance.
    answered: Cell<bool>,
}

impl Client {
    /// The client of `hub`, or why its address or token cannot be used.
    pub(super) fn new(hub: &Hub) -> Result<Self, String> {
        let endpoint = Url::parse(&hub.endpoint).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https") && url.query().is_none() && url.fragment().is_none()
        });
        let endpoint = endpoint.ok_or_else(|| {
            let mend = "write it as in https://huggingface.co";
            format!("HF_ENDPOINT {} is no address of a hub; {mend}", shown(&hub.endpoint))
        })?;
        let authorization = match hub.token.as_deref().map(str::trim).filter(|t| !t.is_empty()) {
            Some(token) => Some(bearer(token).ok_or_else(|| {
                let why = "the token has a space, a line break or another character inside that no token has";
                format!("{why}; check HF_TOKEN, or the file that `hf auth login` left")
            })?),
            None => None,
        };
        let (to_answer, to_continue) = env::patience();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("minicache/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(TO_RESOLVE))
            .timeout_connect(Some(TO_CONNECT))
            .timeout_recv_response(Some(to_answer))
            .timeout_per_read(Some(to_answer.max(to_continue)))
            .build()
            .new_agent();
        Ok(Self { agent, endpoint, authorization, answered: Cell::new(false) })
    }

    /// An address below the hub's own.
    pub(super) fn url(&self, path: &str) -> Result<Url, Trouble> {
        let text = format!("{}/{path}", self.endpoint.as_str().trim_end_matches('/'));
        Url::parse(&text).map_err(|e| Trouble::Local(format!("{}: {e}", shown(&text))))
    }

    /// What the hub says of the file at `url`. Where it keeps files elsewhere, elsewhere is not asked, unless the hub
    /// left something open, as one does that is a mirror's old name.
    pub(super) fn facts(&self, url: Url) -> Result<Facts, Trouble> {
        let mut facts = Facts::default();
        let mut url = url;
        for _ in 0..=REDIRECTIONS {
            let mut answer = self.send(&url, Ask::Head)?;
            // Some mirrors know no questions without an answer's body.
            if [StatusCode::METHOD_NOT_ALLOWED, StatusCode::NOT_IMPLEMENTED].contains(&answer.status()) {
                answer = self.send(&url, Ask::From(0))?;
            }
            let next = self.redirection(&url, &answer)?;
            facts.note(&answer, self.is_own(&url))?;
            match next {
                Some(next) if self.is_own(&next) || facts.commit.is_none() || facts.blob.is_none() => {
                    url = next
                }
                _ => return Ok(facts),
            }
        }
        Err(too_many())
    }

    /// The file at `url` from byte `start` on, wherever the hub keeps it. The answer is a success, or status 416
    /// (nothing lies beyond `start`) where `start` is not 0.
    pub(super) fn get(&self, url: Url, start: u64) -> Result<Response<Body>, Trouble> {
        let mut url = url;
        for _ in 0..=REDIRECTIONS {
            let answer = self.send(&url, Ask::From(start))?;
            match self.redirection(&url, &answer) {
                Ok(Some(next)) => url = next,
                Ok(None) => return Ok(answer),
                Err(Trouble::Status(416)) if start > 0 => return Ok(answer),
                Err(e) => return Err(e),
            }
        }
        Err(too_many())
    }

    /// The JSON at `url`.
    pub(super) fn json<T: DeserializeOwned>(&self, url: Url) -> Result<T, Trouble> {
        let body = self.get(url, 0)?.into_body();
        let mut bytes = Vec::new();
        let read = body.into_reader().take(LONGEST_ANSWER).read_to_end(&mut bytes);
        read.map_err(|e| Trouble::Broken(shown(&e.to_string())))?;
        serde_json::from_slice(&bytes).map_err(|e| Trouble::Answer(shown(&e.to_string())))
    }

    /// Whether `url` is of the hub's own scheme, host and port: the only place that sees the token.
    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    fn send(&self, url: &Url, ask: Ask) -> Result<Response<Body>, Trouble> {
        let mut request = match ask {
            Ask::Head => self.agent.head(url.as_str()),
            Ask::From(_) => self.agent.get(url.as_str()),
        };
        if let Ask::From(start @ 1..) = ask {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        if let Some(authorization) = self.authorization.as_ref().filter(|_| self.is_own(url)) {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let answer = request.call().map_err(|e| self.trouble(&e))?;
        self.answered.set(true);
        Ok(answer)
    }

    fn trouble(&self, error: &ureq::Error) -> Trouble {
        use ureq::Error;
        let message = shown(&error.to_string());
        let broken = match error {
            Error::Protocol(_) | Error::LargeResponseHeader(..) | Error::Http(_) => {
                return Trouble::Answer(message);
            }
            Error::Io(e) => matches!(
                e.kind(),
                ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::BrokenPipe
                    | ErrorKind::UnexpectedEof
            ),
            _ => false,
        };
        if broken || self.answered.get() { Trouble::Broken(message) } else { Trouble::Unreachable(message) }
    }

    /// Where `answer` sends on to, if it does. An error for any other status than success.
    fn redirection(&self, url: &Url, answer: &Response<Body>) -> Result<Option<Url>, Trouble> {
        match answer.status().as_u16() {
            200..=299 => return Ok(None),
            301 | 302 | 303 | 307 | 308 => {}
            status => return Err(Trouble::Status(status)),
        }
        let location = answer.headers().get(header::LOCATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let location = String::from_utf8_lossy(location);
        let refuse = |why: &str| Trouble::Answer(format!("it sent on to {}, {why}", shown(&location)));
        let next = url.join(&location).map_err(|_| refuse("which is no address"))?;
        match (url.scheme(), next.scheme()) {
            ("https", "http") => Err(refuse("from https to http, which is not followed")),
            (_, "http" | "https") if !location.is_empty() => Ok(Some(next)),
            _ => Err(refuse("which is no address of the web")),
        }
    }
}

/// What is asked for: what is known of a file, or its contents from a byte on.
#[derive(Clone, Copy)]
enum Ask {
    Head,
    From(u64),
}

fn bearer(token: &str) -> Option<HeaderValue> {
    let value = token
        .bytes()
        .all(|b| b.is_ascii_graphic())
        .then(|| HeaderValue::from_str(&format!("Bearer {token}")));
    let mut value = value?.ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn too_many() -> Trouble {
    Trouble::Answer(format!("it sent on more than {REDIRECTIONS} times"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn client(endpoint: &str) -> Client {
        let hub = Hub {
            endpoint: endpoint.to_string(),
            cache: PathBuf::new(),
            token: Some("hf_x".to_string()),
            offline: false,
            progress: false,
        };
        Client::new(&hub).unwrap()
    }

    #[test]
    fn the_hub_s_own_host_is_its_scheme_name_and_port() {
        let client = client("https://Hub.example/mirror/");
        assert_eq!(client.url("org/m").unwrap().as_str(), "https://hub.example/mirror/org/m");
        for (text, own) in [
            ("https://hub.example/elsewhere", true),
            ("https://hub.example:443/", true),
            ("http://hub.example/mirror/x", false),
            ("https://hub.example:8443/mirror/x", false),
            ("https://cdn.hub.example/", false),
            ("https://hub.example.evil.example/", false),
            ("https://hub.example@evil.example/", false),
            ("https:\\\\evil.example\\hub.example", false),
        ] {
            assert_eq!(client.is_own(&Url::parse(text).unwrap()), own, "{text}");
        }
    }

    #[test]
    fn redirections_never_leave_https() {
        let client = client("https://hub.example");
        let to = |location: &str| {
            let answer = Response::builder().status(302).header(header::LOCATION, location);
            let answer = answer.body(Body::builder().data("")).unwrap();
            client.redirection(&Url::parse("https://hub.example/a/b").unwrap(), &answer)
        };
        assert_eq!(to("../c").unwrap().unwrap().as_str(), "https://hub.example/c");
        assert_eq!(to("//cdn.example/c").unwrap().unwrap().as_str(), "https://cdn.example/c");
        for location in ["http://hub.example/c", "http://127.0.0.1/", "ftp://hub.example/", "data:,x", ""] {
            assert!(matches!(to(location), Err(Trouble::Answer(_))), "{location}");
        }
    }
}
