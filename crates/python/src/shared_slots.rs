//! `SharedSlots`: slots that all processes of a user share.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fremap_core::error::{Error, Result};
use fremap_core::shared_slots::{self, Found, Geometry, SharedCall, SharedSlots as Core, Wanted};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict, PyList};

use crate::call::run;
use crate::errors::{self, python, wrong_type};
use crate::raw::{self, Bytes};
use crate::selection::{int64s, mask, numbers};
use crate::slot_table::{number_of_key, number_of_slot, operation};
use crate::store::Store;

/// The slots, and the views of their memory.
///
/// Invariants: `exports` counts the views that the interpreter has not released; `core` is there
/// while any is.
struct State {
    core: Option<Arc<Core>>,
    exports: usize,
    leaving: bool,
}

/// Slots that all processes of a user share, and the table of what they show.
#[pyclass(frozen, module = "fremap._core")]
pub struct SharedSlots {
    /// Held for a few instructions, never across a call of Python's or the core's.
    views: Mutex<State>,
}

/// Shared slots that a call has for the extents it names.
#[pyclass(frozen, module = "fremap._core")]
pub struct SharedTaken {
    call: SharedCall,
}

impl SharedSlots {
    fn state(&self) -> MutexGuard<'_, State> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn core(&self, py: Python<'_>, operation: &'static str) -> PyResult<Arc<Core>> {
        let core = self.state().core.as_ref().map(Arc::clone);
        core.ok_or_else(|| python(py, &Error::Closed { operation, what: "slot table" }))
    }

    fn drop_view(&self) {
        let core = {
            let mut state = self.state();
            state.exports -= 1;
            if state.leaving && state.exports == 0 {
                state.core.take()
            } else {
                None
            }
        };
        drop(core);
    }
}

fn wanted<'n>(
    name: &'n str,
    store: &fremap_core::store::Store,
    (extent_pages, slot_count): (u64, u32),
    most_bytes: Option<u64>,
) -> Result<Wanted<'n>> {
    let identity = store.identity("Slots")?;
    let geometry = Geometry {
        page_bytes: store.page_size().bytes() as u64,
        extent_pages,
        slot_count: slot_count.into(),
        store_bytes: store.size_bytes(),
        store: identity.files,
    };
    // A store that may be written changes by its own writes.
    let changed = (!store.writable()).then_some(identity.changed);
    Ok(Wanted { name, geometry, changed, most_bytes })
}

#[pymethods]
impl SharedSlots {
    #[new]
    fn new(
        py: Python<'_>,
        name: &str,
        store: &Bound<'_, Store>,
        extent_pages: u64,
        slot_count: u32,
        most_bytes: Option<u64>,
    ) -> PyResult<Self> {
        let store = store.get().core();
        let core = run(py, |interrupt| {
            let wanted = wanted(name, &store, (extent_pages, slot_count), most_bytes)?;
            Core::attach(&wanted, interrupt)
        })?;
        let state = State { core: Some(Arc::new(core)), exports: 0, leaving: false };
        Ok(Self { views: Mutex::new(state) })
    }

    #[getter]
    fn closed(&self) -> bool {
        let state = self.state();
        state.core.is_none() || state.leaving
    }

    /// The slots of the keys, if all are there.
    fn find<'py>(
        &self,
        py: Python<'py>,
        asked: &str,
        keys: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyByteArray>>> {
        let operation = operation(asked)?;
        let core = self.core(py, operation)?;
        let keys = core.keys(operation, &numbers(keys)?).map_err(|error| python(py, &error))?;
        // Mostly nobody has the lock, and to let go of the GIL would take longer.
        let found = match core.try_find(operation, &keys).map_err(|error| python(py, &error))? {
            Found::All(slots) => Some(slots),
            Found::NotAll => None,
            Found::Busy => run(py, |interrupt| core.find(operation, &keys, interrupt))?,
        };
        let Some(slots) = found else { return Ok(None) };
        int64s(py, slots.into_iter().map(number_of_slot)).map(Some)
    }

    /// Slots for the keys, once there is room.
    fn reserve(
        &self,
        py: Python<'_>,
        asked: &str,
        keys: &Bound<'_, PyAny>,
    ) -> PyResult<SharedTaken> {
        let operation = operation(asked)?;
        let core = self.core(py, operation)?;
        let keys = numbers(keys)?;
        let call = run(py, |interrupt| {
            let keys = core.keys(operation, &keys)?;
            core.reserve(operation, &keys, asked == "write", interrupt)
        })?;
        Ok(SharedTaken { call })
    }

    /// Forgets the extents of keys; says how many were there.
    fn evict(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<usize> {
        let core = self.core(py, "evict")?;
        let keys = numbers(keys)?;
        run(py, |interrupt| {
            let keys = core.keys("evict", &keys)?;
            core.evict("evict", &keys, interrupt)
        })
    }

    /// The key of each slot, -1 for none.
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        let core = self.core(py, "keys")?;
        let keys = run(py, |interrupt| core.shown(interrupt))?;
        int64s(py, keys.into_iter().map(|key| key.map_or(-1, number_of_key)))
    }

    /// The key of each of these slots, -1 for none, and whether it is pinned.
    fn at<'py>(
        &self,
        py: Python<'py>,
        slots: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let core = self.core(py, "slots")?;
        let slots = numbers(slots)?;
        let found = run(py, |interrupt| core.at(&slots, interrupt))?;
        let Some(found) = found else { return Err(wrong_type("numbers of slots")) };
        let keys = found.iter().map(|(key, _)| key.map_or(-1, number_of_key));
        Ok((int64s(py, keys)?, mask(py, found.iter().map(|&(_, pinned)| pinned))?))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core(py, "stats")?;
        let stats = run(py, |interrupt| core.stats(interrupt))?;
        let dict = PyDict::new(py);
        dict.set_item("hits", stats.hits)?;
        dict.set_item("misses", stats.misses)?;
        dict.set_item("evictions", stats.evictions)?;
        dict.set_item("arrivals", stats.arrivals)?;
        dict.set_item("filled_slots", stats.filled)?;
        dict.set_item("pinned_slots", stats.pinned)?;
        Ok(dict)
    }

    /// Closes; refused while views are alive.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let core = {
            let mut state = self.state();
            if state.leaving || state.core.is_none() {
                return Ok(());
            }
            if state.exports > 0 {
                let exports = state.exports;
                drop(state);
                return Err(views_alive(py, exports));
            }
            state.core.take()
        };
        py.detach(|| end(core.as_ref()));
        Ok(())
    }

    /// Closes for calls at once; the memory goes with the last view.
    fn leave(&self, py: Python<'_>) {
        let core = {
            let mut state = self.state();
            state.leaving = true;
            if state.exports == 0 {
                state.core.take()
            } else {
                state.core.as_ref().map(Arc::clone)
            }
        };
        py.detach(|| end(core.as_ref()));
    }

    /// Lets go of all that this process has, at its end; a later call begins again.
    fn let_go(&self, py: Python<'_>) {
        let core = self.state().core.as_ref().map(Arc::clone);
        py.detach(|| core.iter().for_each(|core| core.leave()));
    }

    #[allow(unsafe_code, clippy::needless_pass_by_value)] // the interpreter's slot and its pointer
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let core = {
            let mut state = slf.get().state();
            let core = state.core.as_ref().filter(|_| !state.leaving).map(Arc::clone);
            state.exports += usize::from(core.is_some());
            core
        };
        let Some(core) = core else {
            let closed = Error::Closed { operation: "buffer", what: "slot table" };
            return Err(python(slf.py(), &closed));
        };
        // SAFETY: the pointer is the interpreter's; the view was counted above, so the state
        // keeps the memory mapped until `__releasebuffer__`.
        let filled = unsafe { raw::fill_view(view, slf.as_any(), core.memory(), false, flags) };
        if filled.is_err() {
            slf.get().drop_view();
        }
        filled
    }

    #[allow(unsafe_code)] // the interpreter's slot
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.drop_view();
    }
}

fn end(core: Option<&Arc<Core>>) {
    if let Some(core) = core {
        core.close();
        core.leave();
    }
}

fn views_alive(py: Python<'_>, exports: usize) -> PyErr {
    let message = format!(
        "close: {exports} array(s) or memoryview(s) still show the memory of these slots; delete \
         them first, or leave a `with` block, after which the memory goes with the last of them"
    );
    errors::of_kind(py, "views_alive", &message)
}

#[pymethods]
impl SharedTaken {
    /// The slot of each key that was named.
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        int64s(py, self.call.slots().iter().copied().map(number_of_slot))
    }

    /// Keys and slots of the extents to load, in ascending order of keys.
    fn missing<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let missing = self.call.missing();
        let keys = int64s(py, missing.iter().map(|(key, _)| number_of_key(*key)))?;
        Ok((keys, int64s(py, missing.iter().map(|(_, slot)| number_of_slot(*slot)))?))
    }

    /// Loads the missing extents, and returns which have arrived.
    fn load(&self, py: Python<'_>, store: &Bound<'_, Store>) -> PyResult<()> {
        let store = store.get().core();
        run(py, |interrupt| self.call.load(&store, interrupt))
    }

    /// Puts what is missing into its slots: extents one after another, in ascending order of keys.
    fn fill(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let data = Bytes::readable(data)?;
        run(py, |_| self.call.fill(data.span()))
    }

    /// The first `done` of what was missing are there, and the rest will not be.
    fn settle(&self, py: Python<'_>, done: usize) {
        py.detach(|| self.call.settle(done));
    }

    /// Waits for what others bring; false if one of them could not.
    fn wait(&self, py: Python<'_>) -> PyResult<bool> {
        run(py, |interrupt| self.call.wait(interrupt))
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.call.release());
    }

    fn pin(&self, py: Python<'_>) {
        py.detach(|| self.call.pin());
    }

    fn unpin(&self, py: Python<'_>) {
        py.detach(|| self.call.unpin());
    }
}

/// The shared slots of this user that have a name.
#[pyfunction]
pub fn list_shared_slots(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let found = run(py, |_| shared_slots::list())?;
    let list = PyList::empty(py);
    for one in found {
        let dict = PyDict::new(py);
        dict.set_item("name", one.name)?;
        dict.set_item("path", one.path)?;
        dict.set_item("bytes", one.bytes)?;
        dict.set_item("slot_count", one.slot_count)?;
        dict.set_item("extent_bytes", one.extent_bytes)?;
        dict.set_item("filled_slots", one.filled)?;
        dict.set_item("processes", one.processes)?;
        list.append(dict)?;
    }
    Ok(list)
}

/// Takes the name of shared slots away.
#[pyfunction]
pub fn remove_shared_slots(py: Python<'_>, name: &str, forced: bool) -> PyResult<()> {
    run(py, |interrupt| shared_slots::remove(name, forced, interrupt))
}
