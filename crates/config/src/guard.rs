//! Calls into parsers of others, which may panic on a file that nobody has tried before.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minicache_core::settings::shown;

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Counts a guarded call in, and out again however it ends.
struct Active;

impl Active {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Runs `f`, and gives a panic in it as an error that begins with `what`, the parser's name. The caller adds the file.
///
/// What `f` was changing when it panicked is not to be used any more. Neither a stack overflow nor memory that runs
/// out is a panic: depths and sizes have to be bounded before the call.
///
/// ```
/// let damaged: Result<u8, String> = minicache_config::guard("the header's reader", || [1u8, 2][std::hint::black_box(2)]);
/// assert!(damaged.unwrap_err().starts_with("the header's reader gave up"));
/// ```
///
/// # Errors
/// `f` panicked.
pub fn guard<T>(what: &str, f: impl FnOnce() -> T) -> Result<T, String> {
    let active = Active::enter();
    let result = catch_unwind(AssertUnwindSafe(f));
    drop(active);
    result.map_err(|payload| format!("{what} gave up ({}); the file is damaged", message(&*payload)))
}

/// Whether this thread runs inside of [`guard`]: a panic hook then has nothing to say.
pub fn is_active() -> bool {
    DEPTH.get() > 0
}

/// What a panic said, its first line.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    shown(text.and_then(|t| t.lines().next()).unwrap_or("panic"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_leaves_nothing_behind() {
        assert_eq!(guard("a parser", || 7), Ok(7));
        let nested = guard("outer", || {
            assert!(
                guard("inner", || panic!("bad \u{1b}[31mbyte\nbacktrace"))
                    .is_err_and(|e: String| e == "inner gave up (bad \\u{1b}[31mbyte); the file is damaged")
            );
            is_active()
        });
        assert_eq!(nested, Ok(true));
        assert!(!is_active());
    }
}
