//! Calling the core: without the GIL, and stoppable by Ctrl-C.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use fremap_core::error::{Error, Interrupt, Result, LONGEST_WAIT};
use fremap_core::sys::clock::{coarse_time, COARSE_TICK};
use pyo3::prelude::*;

use crate::errors;

/// How often a long call asks Python whether a signal came; Ctrl-C is to be honoured within 100 ms.
/// After the longest wait it always asks, also where the coarse clock has not seen all of it.
const SIGNAL_PERIOD: Duration = Duration::from_millis(40);
const _: () =
    assert!(SIGNAL_PERIOD.as_millis() + COARSE_TICK.as_millis() <= LONGEST_WAIT.as_millis());

/// Asks Python for signals now and then, and keeps what a handler raised.
struct Signals {
    asked: Cell<Duration>,
    raised: RefCell<Option<PyErr>>,
}

impl Signals {
    fn new() -> Self {
        Self { asked: Cell::new(coarse_time()), raised: RefCell::new(None) }
    }
}

impl Interrupt for Signals {
    fn check(&self) -> Result<()> {
        if self.raised.borrow().is_some() {
            return Err(Error::Interrupted { completed: 0 });
        }
        if coarse_time().saturating_sub(self.asked.get()) < SIGNAL_PERIOD {
            return Ok(());
        }
        // None while the interpreter shuts down: nobody is left to interrupt.
        let process = fremap_core::sys::process::id();
        #[allow(clippy::redundant_closure_for_method_calls)] // a method is too narrow in lifetime
        let answer = Python::try_attach(|py| py.check_signals());
        self.asked.set(coarse_time());
        if fremap_core::sys::process::id() != process {
            // A handler has forked, and this is the child: the call is its parent's.
            return Err(Error::Fork { operation: "fork", what: "call", owner: process });
        }
        if let Some(Err(raised)) = answer {
            *self.raised.borrow_mut() = Some(raised);
            return Err(Error::Interrupted { completed: 0 });
        }
        Ok(())
    }
}

/// Runs `work` with the GIL released.
///
/// What a signal handler raised meanwhile is raised here, whatever `work`
/// returned; an error of the core's own becomes its context.
pub fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&dyn Interrupt) -> Result<T> + Send,
) -> PyResult<T> {
    let (outcome, raised) = py.detach(|| {
        let signals = Signals::new();
        let outcome = work(&signals);
        (outcome, signals.raised.into_inner())
    });
    match (outcome, raised) {
        (Ok(value), None) => Ok(value),
        (Err(error), None) => Err(errors::python(py, &error)),
        (Ok(_) | Err(Error::Interrupted { .. }), Some(raised)) => Err(raised),
        (Err(error), Some(raised)) => {
            raised.set_context(py, Some(errors::python(py, &error)));
            Err(raised)
        }
    }
}

/// Runs `work`, which is short or cannot be interrupted, with the GIL released.
pub fn run_short<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(|error| errors::python(py, &error))
}
