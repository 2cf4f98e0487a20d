//! What a template may cost: it comes with a model, and anyone may have written it.
//!
//! Fuel bounds the steps that a template takes and the data that it makes; sizes of the source bound how deep its parts
//! nest; what variables hold is bounded here in depth and size, since whoever walks nested values does so on the stack.
//! Parsing and rendering run on a thread with a stack that is large enough for all of that, and for as long as
//! [`PATIENCE`], which nothing but a hostile template comes near.

use std::sync::mpsc;
use std::time::Duration;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Steps, and 64 bytes each of data that is made or read. A long conversation takes some 20,000.
pub(super) const FUEL: u64 = 2_000_000;
const PATIENCE: Duration = Duration::from_secs(2);
/// Holds an expression of [`super::source`]'s most tokens several times over.
const STACK: usize = 256 << 20;
/// How deep the values of variables nest.
const MAX_DEPTH: usize = 100;
/// The most values that a variable holds, one that is held twice counted twice.
const MAX_VALUES: usize = 200_000;

/// Runs `work` on a thread of its own. Work that is given up goes on until the process ends.
///
/// # Errors
/// Of the work; a panic in it; work that takes too long.
pub(super) fn bounded<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        let result = minicache_config::guard("its reader", work).and_then(|result| result);
        // Nobody listens any more if it took too long.
        let _ = sender.send(result);
    };
    std::thread::Builder::new()
        .name("chat template".to_string())
        .stack_size(STACK)
        .spawn(work)
        .map_err(|e| format!("no thread can be started: {e}"))?;
    receiver
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| Err(format!("takes longer than {} s", PATIENCE.as_secs())))
}

/// What a variable is set to, checked. Lists that are put together lazily become plain ones.
pub(super) fn keep(state: &State, value: Value) -> Result<Value, Error> {
    let mut walk = Walk { state, seen: 0, namespaces: true };
    walk.visit(&value, 0)?;
    Ok(plain(value))
}

/// What an attribute of a namespace is set to: no namespace, which could come to hold itself.
pub(super) fn keep_in_namespace(state: &State, value: Value) -> Result<Value, Error> {
    let mut walk = Walk { state, seen: 0, namespaces: false };
    walk.visit(&value, 0)?;
    Ok(plain(value))
}

fn plain(value: Value) -> Value {
    let lazy = value.kind() == ValueKind::Seq
        && !value.is_tuple()
        && value.downcast_object_ref::<Vec<Value>>().is_none();
    if lazy { value.try_iter().map(|items| items.collect()).unwrap_or(value) } else { value }
}

struct Walk<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    seen: usize,
    /// Whether there may be namespaces.
    namespaces: bool,
}

impl Walk<'_, '_, '_> {
    fn visit(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.seen += 1;
        if self.seen.is_multiple_of(64) {
            self.state.consume_fuel(1)?;
        }
        let refused = |what: String| Error::new(ErrorKind::InvalidOperation, what);
        if self.seen > MAX_VALUES {
            return Err(refused(format!("a variable holds more than {MAX_VALUES} values")));
        }
        if depth > MAX_DEPTH {
            return Err(refused(format!("a variable's values nest more than {MAX_DEPTH} deep")));
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if !self.namespaces && object.type_name().ends_with("::Namespace") {
            return Err(refused("a namespace cannot hold a namespace".to_string()));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                value.try_iter()?.try_for_each(|item| self.visit(&item, depth + 1))
            }
            ValueKind::Map => object.try_iter_pairs().into_iter().flatten().try_for_each(|(key, item)| {
                self.visit(&key, depth + 1)?;
                self.visit(&item, depth + 1)
            }),
            _ => Ok(()),
        }
    }
}
