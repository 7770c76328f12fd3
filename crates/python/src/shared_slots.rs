//! `SharedSlots`: slots that all processes of a user share.

use std::ffi::c_int;
use std::sync::Arc;

use fremap_core::error::{Error, Result};
use fremap_core::shared_slots::{self, Found, Geometry, SharedCall, SharedSlots as Core, Wanted};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict, PyList};

use crate::call::run;
use crate::errors::python;
use crate::raw::{self, Bytes};
use crate::selection::{answers, numbers};
use crate::slot_table::{
    key_shown, numbers_of_slots, occupants, operation, stats_by_name, KeysAndPins, Taken,
};
use crate::store::Store;
use crate::views::{release, Views};

/// Slots that all processes of a user share, and the table of what they show.
#[pyclass(frozen, module = "fremap._core")]
pub struct SharedSlots {
    views: Views<Core>,
}

/// Shared slots that a call has for the extents it names.
#[pyclass(frozen, extends = Taken, module = "fremap._core")]
pub struct SharedTaken {
    call: Arc<SharedCall>,
}

impl SharedSlots {
    fn core(&self, py: Python<'_>, operation: &'static str) -> PyResult<Arc<Core>> {
        self.views.core_anyway().ok_or_else(|| closed(py, operation))
    }
}

fn closed(py: Python<'_>, operation: &'static str) -> PyErr {
    python(py, &Error::Closed { operation, what: "slot table" })
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
        Ok(Self { views: Views::new(Arc::new(core)) })
    }

    #[getter]
    fn closed(&self) -> bool {
        self.views.core().is_none()
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
        numbers_of_slots(py, &slots).map(Some)
    }

    /// Slots for the keys, once there is room.
    fn reserve(
        &self,
        py: Python<'_>,
        asked: &str,
        keys: &Bound<'_, PyAny>,
    ) -> PyResult<Py<SharedTaken>> {
        let operation = operation(asked)?;
        let core = self.core(py, operation)?;
        let keys = numbers(keys)?;
        let call = run(py, |interrupt| {
            let keys = core.keys(operation, &keys)?;
            core.reserve(operation, &keys, asked == "write", interrupt)
        })?;
        let call = Arc::new(call);
        let taken = PyClassInitializer::from(Taken::of(call.clone()));
        Py::new(py, taken.add_subclass(SharedTaken { call }))
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
        answers(py, &keys, key_shown)
    }

    /// The key of each of these slots, -1 for none, and whether it is pinned.
    fn at<'py>(&self, py: Python<'py>, slots: &Bound<'py, PyAny>) -> PyResult<KeysAndPins<'py>> {
        let core = self.core(py, "slots")?;
        let slots = numbers(slots)?;
        occupants(py, run(py, |interrupt| core.at(&slots, interrupt))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core(py, "stats")?;
        stats_by_name(py, run(py, |interrupt| core.stats(interrupt))?)
    }

    /// Closes; refused while views are alive.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(core) = self.views.begin_close(py, "the memory of these slots")? else {
            return Ok(());
        };
        py.detach(|| end(Some(core)));
        release(self.views.take());
        Ok(())
    }

    /// Closes for calls at once; the memory goes with the last view.
    fn leave(&self, py: Python<'_>) {
        let core = self.views.leave();
        py.detach(|| end(core));
    }

    /// Lets go of all that this process has, at its end; a later call begins again.
    fn let_go(&self, py: Python<'_>) {
        let core = self.views.core_anyway();
        py.detach(|| core.iter().for_each(|core| core.leave()));
    }

    #[allow(unsafe_code, clippy::needless_pass_by_value)] // the interpreter's slot and its pointer
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let closed = || closed(slf.py(), "buffer");
        slf.get().views.add_view(
            slf.py(),
            closed,
            |core| Ok((core.memory(), false)),
            |memory, writable| {
                // SAFETY: the pointer is the interpreter's; the view is counted, so the memory stays
                // mapped until `__releasebuffer__`.
                unsafe { raw::fill_view(view, slf.as_any(), memory, writable, flags) }
            },
        )
    }

    #[allow(unsafe_code)] // the interpreter's slot
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.drop_view();
    }
}

fn end(core: Option<Arc<Core>>) {
    if let Some(core) = core {
        core.close();
        core.leave();
    }
}

#[pymethods]
impl SharedTaken {
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
