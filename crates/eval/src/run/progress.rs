//! Progress on stderr: a bar on a terminal, a line now and then elsewhere.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Progress of one piece of work, in tokens. Dropping it removes the bar.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    title: String,
    total: u64,
    done: RefCell<(u64, Instant)>,
    start: Instant,
}

impl Progress {
    /// Work of `total` tokens, called `title`.
    pub(crate) fn new(title: impl Into<String>, total: usize) -> Self {
        let (title, total, start) = (title.into(), total as u64, Instant::now());
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let template = "{prefix} [{bar:30}] {percent:>3} % · {human_pos}/{human_len} tokens · {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(title.clone());
            bar
        });
        Self { bar, title, total, done: RefCell::new((0, start)), start }
    }

    /// `tokens` more are done.
    pub(crate) fn add(&self, tokens: usize) {
        let mut done = self.done.borrow_mut();
        done.0 += tokens as u64;
        match &self.bar {
            Some(bar) => bar.set_position(done.0),
            None if done.1.elapsed() >= LINE_EVERY => {
                done.1 = Instant::now();
                let share = done.0 as f64 / self.total.max(1) as f64;
                let left = self.start.elapsed().as_secs_f64() * (1.0 / share.max(1e-9) - 1.0);
                let left = indicatif::HumanDuration(Duration::from_secs_f64(left.clamp(0.0, 1e7)));
                eprintln!("{}: {:.0} % of {} tokens, {left} left", self.title, share * 100.0, self.total);
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
