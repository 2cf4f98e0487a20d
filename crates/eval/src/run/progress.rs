//! Progress on stderr: which experiment of how many, what is being done, and for how long still. A bar on a terminal, a
//! line now and then elsewhere.

use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Progress over all experiments of a call.
pub struct Overall {
    start: Instant,
    /// Seconds that the steps were estimated to take: an experiment each.
    steps: Vec<f64>,
    /// The step at hand.
    at: Cell<usize>,
}

impl Overall {
    /// Progress over experiments that are estimated to take so many seconds each.
    pub fn new(steps: Vec<f64>) -> Self {
        Self { start: Instant::now(), steps, at: Cell::new(0) }
    }

    /// The next message is of step `index`.
    pub fn begin(&self, index: usize) {
        self.at.set(index);
    }

    /// `[3/22]`; nothing where there is only one.
    fn place(&self) -> String {
        match self.steps.len() {
            0 | 1 => String::new(),
            n => format!("[{}/{n}] ", self.at.get() + 1),
        }
    }

    /// What is left after the step at hand, once there is anything to go by: the estimates, corrected by how the steps
    /// so far kept to theirs.
    fn after(&self) -> Option<Duration> {
        let (before, rest) = self.steps.split_at(self.at.get().min(self.steps.len()));
        let rest: f64 = rest.iter().skip(1).sum();
        let known: f64 = before.iter().sum();
        let factor = if known > 1.0 { self.start.elapsed().as_secs_f64() / known } else { 1.0 };
        (self.steps.len() > 1 && rest > 0.0).then(|| duration(rest * factor))
    }

    /// Says what is being done now: to whoever watches, and in the log of a longer call.
    pub(crate) fn say(&self, what: impl std::fmt::Display) {
        if self.steps.len() > 1 || std::io::stderr().is_terminal() {
            eprintln!("{}{what}", self.place());
        }
    }

    /// Says what a user has to know of the results.
    pub(crate) fn warn(&self, what: impl std::fmt::Display) {
        eprintln!("{}{what}", self.place());
    }

    /// Progress of work of `total` tokens, called `title`.
    pub(crate) fn progress(&self, title: impl std::fmt::Display, total: usize) -> Progress<'_> {
        Progress::new(self, format!("{}{title}", self.place()), total)
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 1e7))
}

/// Progress of one piece of work, in tokens. Dropping it removes the bar.
pub(crate) struct Progress<'a> {
    overall: &'a Overall,
    bar: Option<ProgressBar>,
    title: String,
    total: u64,
    /// Tokens done, of which those before the start took no time, and when that was last said.
    done: RefCell<(u64, Instant)>,
    start: Cell<(u64, Instant)>,
}

impl<'a> Progress<'a> {
    fn new(overall: &'a Overall, title: String, total: usize) -> Self {
        let (total, now) = (total as u64, Instant::now());
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let template =
                "{prefix} [{bar:30}] {percent:>3} % · {human_pos}/{human_len} tokens · {eta} left{msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(title.clone());
            bar
        });
        Self { overall, bar, title, total, done: RefCell::new((0, now)), start: Cell::new((0, now)) }
    }

    /// `tokens` are there from an earlier run.
    pub(crate) fn resume(&self, tokens: usize) {
        self.done.borrow_mut().0 += tokens as u64;
        self.start.set((tokens as u64, Instant::now()));
        if let Some(bar) = &self.bar {
            bar.set_position(tokens as u64);
            bar.reset_eta();
        }
    }

    /// `tokens` more are done.
    pub(crate) fn add(&self, tokens: usize) {
        let mut done = self.done.borrow_mut();
        done.0 += tokens as u64;
        let due = done.1.elapsed() >= LINE_EVERY;
        if due {
            done.1 = Instant::now();
        }
        let then = || match self.overall.after() {
            Some(after) => format!(", then {} for the rest", HumanDuration(after)),
            None => String::new(),
        };
        match &self.bar {
            Some(bar) => {
                bar.set_position(done.0);
                if due {
                    bar.set_message(then());
                }
            }
            None if due => {
                let (before, start) = self.start.get();
                let share = (done.0 - before) as f64 / self.total.saturating_sub(before).max(1) as f64;
                let left = duration(start.elapsed().as_secs_f64() * (1.0 / share.clamp(1e-9, 1.0) - 1.0));
                let percent = 100.0 * done.0 as f64 / self.total.max(1) as f64;
                let (title, left) = (&self.title, HumanDuration(left));
                eprintln!("{title}: {percent:.0} % of {} tokens, {left} left{}", self.total, then());
            }
            None => {}
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
