//! The process that tries the inputs of one format, and the one that watches it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{Make, alloc, mutate};

pub(crate) const COUNT: &str = "MINICACHE_FUZZ";
pub(crate) const SEED: &str = "MINICACHE_FUZZ_SEED";
pub(crate) const FORMAT: &str = "MINICACHE_FUZZ_FORMAT";
/// The folder that a watched process works in.
const FOLDER: &str = "MINICACHE_FUZZ_FOLDER";

/// How long one input may take, and what it may hold.
const PATIENCE: Duration = Duration::from_secs(10);
const MEMORY: usize = 1 << 30;
/// Findings per format after which it is given up.
const ENOUGH: usize = 20;
/// Characters of an error, at most.
const LONGEST: usize = 2000;

/// What came of a format's inputs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    /// What went wrong, with the input's number.
    pub(crate) findings: Vec<(u64, String)>,
    /// Seconds, and the input's number.
    pub(crate) slowest: (f64, u64),
    /// Bytes, and the input's number.
    pub(crate) largest: (usize, u64),
    pub(crate) seconds: f64,
}

impl Tally {
    /// A line per finding that says how to repeat it.
    pub(crate) fn described(&self, format: &str) -> Vec<String> {
        let one =
            |(index, what): &(u64, String)| format!("{FORMAT}='{format}' {SEED}={index} {COUNT}=1: {what}");
        self.findings.iter().map(one).collect()
    }

    fn add(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.refused += other.refused;
        self.findings.extend(other.findings);
        self.seconds += other.seconds;
        if other.slowest.0 > self.slowest.0 {
            self.slowest = other.slowest;
        }
        if other.largest.0 > self.largest.0 {
            self.largest = other.largest;
        }
    }
}

/// The work of a watched process.
pub(crate) struct Job(PathBuf);

/// What a process notes: the input at hand, and what came of those before.
fn at_hand(folder: &Path) -> PathBuf {
    folder.join("at-hand")
}

fn tally(folder: &Path) -> PathBuf {
    folder.join("tally.json")
}

impl Job {
    /// The job of this process, if it is a watched one.
    pub(crate) fn given() -> Option<Self> {
        std::env::var_os(FOLDER).map(|folder| Self(folder.into()))
    }

    /// Tries `count` inputs from number `first` on.
    pub(crate) fn work(&self, name: &str, make: &Make, first: u64, count: u64) {
        let folder = self.0.join("files");
        fs::create_dir_all(&folder).unwrap();
        let format = make(&folder);
        let at_hand = File::create(at_hand(&self.0)).unwrap();
        let mut sum = Tally::default();
        let begin = Instant::now();
        let panics = watch_panics();
        for index in first..first.saturating_add(count) {
            at_hand.write_all_at(&index.to_le_bytes(), 0).unwrap();
            let (seed, bytes) = mutate::input(name, &format.seeds, index);
            if count == 1 {
                let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-{index}"));
                fs::write(path, &bytes).unwrap();
            }
            let start = Instant::now();
            let mut outcome = None;
            let peak = alloc::peak_of(|| {
                outcome = catch_unwind(AssertUnwindSafe(|| (format.read)(seed, &bytes))).ok();
            });
            let seconds = start.elapsed().as_secs_f64();
            if seconds > sum.slowest.0 {
                sum.slowest = (seconds, index);
            }
            if peak > sum.largest.0 {
                sum.largest = (peak, index);
            }
            match &outcome {
                Some(Ok(())) => sum.accepted += 1,
                _ => sum.refused += 1,
            }
            if count == 1 {
                eprintln!("{outcome:?}");
            }
            // A guarded panic is an error like any other; one of a thread of ours shows only here.
            let panic = std::mem::take(&mut *panics.lock().unwrap());
            let wrong = match outcome {
                _ if panic.is_some() => panic,
                None => Some("panics where nobody sees it".to_string()),
                Some(Err(e)) if e.contains(['\n', '\r']) => Some(format!("an error of several lines! {e:?}")),
                Some(Err(e)) if e.chars().count() > LONGEST => {
                    Some(format!("an error without end! {e:.200}"))
                }
                Some(Err(e)) if e.trim().is_empty() => Some("an empty error".to_string()),
                _ if peak > MEMORY => Some(format!("holds {} MiB", peak >> 20)),
                _ => None,
            };
            if let Some(wrong) = wrong {
                // A few of a kind, which is what stands before the `!`.
                let kind = |what: &str| what.split_once('!').map(|(kind, _)| kind.to_string());
                let known = sum.findings.iter().filter(|(_, w)| kind(w) == kind(&wrong)).count();
                if known < 3 {
                    sum.findings.push((index, wrong));
                }
            }
            sum.seconds = begin.elapsed().as_secs_f64();
            if index % 256 == 0 {
                self.note(&sum);
            }
            if sum.findings.len() >= ENOUGH {
                break;
            }
        }
        self.note(&sum);
    }

    fn note(&self, sum: &Tally) {
        let new = self.0.join("tally.new");
        fs::write(&new, serde_json::to_vec(sum).unwrap()).unwrap();
        fs::rename(new, tally(&self.0)).unwrap();
    }
}

/// Keeps what the first unguarded panic says, and where.
fn watch_panics() -> &'static Mutex<Option<String>> {
    static FIRST: Mutex<Option<String>> = Mutex::new(None);
    std::panic::set_hook(Box::new(|info| {
        if minicache_config::guard::is_active() {
            return;
        }
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        let payload = info.payload();
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or_default();
        let said = said.lines().next().unwrap_or_default();
        let mut first = FIRST.lock().unwrap();
        first.get_or_insert_with(|| format!("panics at {place}! {said}"));
    }));
    &FIRST
}

/// Tries `count` inputs of a format from number `first` on in processes of their own: where one ends before it should,
/// another goes on behind the input that ended it.
pub(crate) fn supervise(name: &str, first: u64, count: u64) -> Tally {
    let mut sum = Tally::default();
    let end = first.saturating_add(count);
    let mut next = first;
    while next < end && sum.findings.len() < ENOUGH {
        let place = tempfile::tempdir().unwrap();
        let stderr = File::create(place.path().join("stderr")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["damaged_files_do_no_harm", "--exact", "--nocapture", "--test-threads=1"])
            .env(FOLDER, place.path())
            .env(FORMAT, name)
            .env(SEED, next.to_string())
            .env(COUNT, (end - next).to_string())
            .env("TMPDIR", place.path())
            // One core each, and the same order of everything in every run.
            .env("RAYON_NUM_THREADS", "1")
            .env("HF_HUB_OFFLINE", "1")
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let ended = watch(child, place.path());
        let noted = fs::read(tally(place.path())).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        sum.add(noted.unwrap_or_default());
        if count == 1 {
            eprint!("{}", fs::read_to_string(place.path().join("stderr")).unwrap_or_default());
        }
        let Err(what) = ended else { break };
        let said = fs::read(place.path().join("stderr")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let said = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
        let at = read_at_hand(place.path());
        sum.findings.push((at.unwrap_or(next), format!("{what}: {said:.300}")));
        let Some(at) = at else { break };
        next = at + 1;
    }
    sum
}

fn read_at_hand(folder: &Path) -> Option<u64> {
    fs::read(at_hand(folder)).ok()?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Waits for the end of a process, and brings it about where one input takes too long.
fn watch(mut child: Child, folder: &Path) -> Result<(), String> {
    let mut since = (None, Instant::now());
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return if status.success() { Ok(()) } else { Err(status.to_string()) };
        }
        let at = read_at_hand(folder);
        if at != since.0 {
            since = (at, Instant::now());
        }
        if at.is_some() && since.1.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("takes longer than {} s", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
