//! Memory that Python objects show: who has views of it, and when it goes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fremap_core::error::Result;
use fremap_core::sys::span::Span;
use pyo3::prelude::*;

use crate::errors;

/// The core's object behind a Python object, and the views of its memory.
///
/// Invariants: `exports` counts the views that the interpreter has not released; `core` is there
/// while any is. After `leaving` there is no new view, and the last one takes the core along.
struct State<T> {
    core: Option<Arc<T>>,
    exports: usize,
    leaving: bool,
}

/// The same, for any number of threads.
pub struct Views<T: Send + Sync> {
    /// Held for a few instructions, never across a call of Python's or the core's: making an
    /// exception can start a garbage collection, which may release a view of this very object.
    state: Mutex<State<T>>,
}

impl<T: Send + Sync> Views<T> {
    pub fn new(core: Arc<T>) -> Self {
        Self { state: Mutex::new(State { core: Some(core), exports: 0, leaving: false }) }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The core, kept alive for one call whatever other threads do; none once it is left.
    pub fn core(&self) -> Option<Arc<T>> {
        let state = self.state();
        state.core.as_ref().filter(|_| !state.leaving).map(Arc::clone)
    }

    /// The same if it was left, and is alive by its views.
    pub fn core_anyway(&self) -> Option<Arc<T>> {
        self.state().core.as_ref().map(Arc::clone)
    }

    /// Has no call and no view be begun any more, and returns the core that the last view takes
    /// along, or the caller where there is none.
    pub fn leave(&self) -> Option<Arc<T>> {
        let mut state = self.state();
        state.leaving = true;
        if state.exports == 0 {
            state.core.take()
        } else {
            state.core.as_ref().map(Arc::clone)
        }
    }

    /// The same if there are no views; else an error that calls the memory `shown`. None where
    /// it was left already.
    pub fn begin_close(&self, py: Python<'_>, shown: &str) -> PyResult<Option<Arc<T>>> {
        let exports = {
            let mut state = self.state();
            if state.leaving || state.core.is_none() {
                return Ok(None);
            }
            if state.exports == 0 {
                state.leaving = true;
                return Ok(state.core.as_ref().map(Arc::clone));
            }
            state.exports
        };
        let message = format!(
            "close: {exports} array(s) or memoryview(s) still show {shown}; delete them first, or \
             leave a `with` block, after which the memory goes with the last of them"
        );
        Err(errors::of_kind(py, "views_alive", &message))
    }

    /// What was to be closed stays open.
    pub fn stay_open(&self) {
        self.state().leaving = false;
    }

    /// Takes the core away: it is closed, or its object goes. None while a view shows its memory.
    pub fn take(&self) -> Option<Arc<T>> {
        let mut state = self.state();
        if state.exports > 0 {
            return None;
        }
        state.core.take()
    }

    /// Counts a view, and has `fill` make it: of the memory that `shown` says, and whether it may
    /// be written, which stays mapped until [`drop_view`](Self::drop_view).
    pub fn add_view(
        &self,
        py: Python<'_>,
        closed: impl FnOnce() -> PyErr,
        shown: fn(&T) -> Result<(Span<'_>, bool)>,
        fill: impl FnOnce(Span<'_>, bool) -> PyResult<()>,
    ) -> PyResult<()> {
        let core = {
            let mut state = self.state();
            let core = state.core.as_ref().filter(|_| !state.leaving).map(Arc::clone);
            state.exports += usize::from(core.is_some());
            core
        };
        let core = core.ok_or_else(closed)?;
        let memory = shown(&core).map_err(|error| errors::python(py, &error));
        let filled = memory.and_then(|(memory, writable)| fill(memory, writable));
        if filled.is_err() {
            self.drop_view();
            release(Some(core));
        }
        filled
    }

    /// Counts a view less; the last one of what was left takes it along.
    pub fn drop_view(&self) {
        let gone = {
            let mut state = self.state();
            state.exports -= 1;
            let last = state.leaving && state.exports == 0;
            last.then(|| state.core.take()).flatten()
        };
        release(gone);
    }
}

impl<T: Send + Sync> Drop for Views<T> {
    fn drop(&mut self) {
        release(self.take());
    }
}

/// Lets go of a core object without the GIL: its last owner unmaps it.
pub fn release<T: Send + Sync>(core: Option<Arc<T>>) {
    if let Some(core) = core {
        let mut core = Some(core);
        // While the interpreter shuts down there is no GIL to let go of.
        Python::try_attach(|py| py.detach(|| drop(core.take())));
    }
}
