//! `WindowBase`: a core window behind Python's methods and buffer protocol.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use fremap_core::calibrate::Calibration;
use fremap_core::error::{Error, Interrupt, Result};
use fremap_core::room::copied;
use fremap_core::sys::mm::{self, Sharing};
use fremap_core::units::{Prot, Selection};
use fremap_core::window::{
    Budget, EngineKind, FaultMode, Mapping, MappingOptions, Pin as PinnedPages, ReadAhead,
    RemapOptions, Target, Tracking, Window, WindowOptions,
};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyByteArray, PyDict, PyInt, PyString, PyTuple};
use rustix::io::Errno;

use crate::call::{run, run_short};
use crate::errors::{self, wrong_type};
use crate::raw::{self, Bytes};
use crate::selection::{answers, numbers, selection};
use crate::store::Store;
use crate::views::{release, Views};

/// The compiled part of `fremap.Window`.
#[pyclass(frozen, subclass, module = "fremap._core")]
pub struct WindowBase {
    views: Views<Window>,
    /// Where the window is mapped, if that is memory of somebody else's. Dropped after the
    /// window, which no call outlives: each refers to this object.
    _memory: Option<Bytes>,
}

impl WindowBase {
    /// The window, kept alive for one call whatever other threads do.
    fn window(&self, py: Python<'_>, operation: &'static str) -> PyResult<Arc<Window>> {
        self.views.core().ok_or_else(|| closed(py, operation))
    }

    /// What a call of the window answers for each page.
    fn answer<'py, T: Copy + Send + Sync, const BYTES: usize>(
        &self,
        py: Python<'py>,
        operation: &'static str,
        pages: &Bound<'py, PyAny>,
        call: fn(&Window, &Selection, &dyn Interrupt) -> Result<Vec<T>>,
        bytes_of: fn(T) -> [u8; BYTES],
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let window = self.window(py, operation)?;
        let pages = selection(pages)?;
        answers(py, &run(py, |interrupt| call(&window, &pages, interrupt))?, bytes_of)
    }
}

fn closed(py: Python<'_>, operation: &'static str) -> PyErr {
    errors::python(py, &Error::Closed { operation, what: "window" })
}

/// Pages of a window that stay present until this is released, or dropped.
///
/// Made by `Window.pin`.
// In one piece: a signal handler that raises finds it either made or not.
#[pyclass(frozen, module = "fremap")]
pub struct Pin {
    // Held for a few instructions.
    pinned: Mutex<Option<(Py<WindowBase>, PinnedPages)>>,
}

#[pymethods]
impl Pin {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let found =
            pinned.as_ref().map(|(window, pages)| (window.clone_ref(py), pages.page_count()));
        drop(pinned);
        match found {
            Some((window, 1)) => {
                Ok(format!("<fremap.Pin of 1 page of {}>", window.bind(py).repr()?))
            }
            Some((window, count)) => {
                Ok(format!("<fremap.Pin of {count} pages of {}>", window.bind(py).repr()?))
            }
            None => Ok("<fremap.Pin, released>".into()),
        }
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        self.release();
    }

    /// Let the pages leave again; later calls do nothing.
    fn release(&self) {
        let pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(pinned);
    }
}

/// The values of a setting by their names, as Python has them.
type Names<T> = &'static [(&'static str, T)];

const ADVICE: Names<ReadAhead> = &[
    ("normal", ReadAhead::Normal),
    ("random", ReadAhead::Random),
    ("sequential", ReadAhead::Sequential),
];
const ENGINES: Names<EngineKind> =
    &[("alias", EngineKind::Alias), ("paged", EngineKind::Paged), ("eager", EngineKind::Eager)];
const FAULTS: Names<FaultMode> = &[("thread", FaultMode::Thread), ("signal", FaultMode::Signal)];
/// The last one cannot be asked for.
const TRACKING: Names<Tracking> =
    &[("async", Tracking::Kernel), ("sync", Tracking::Faults), ("content", Tracking::Content)];

fn named<T: Copy>(names: Names<T>, name: &str) -> PyResult<T> {
    let found = names.iter().find(|&&(known, _)| known == name);
    found.map(|&(_, value)| value).ok_or_else(|| {
        let known: Vec<_> = names.iter().map(|&(known, _)| known).collect();
        wrong_type(&known.join(" or "))
    })
}

fn named_or_auto<T: Copy>(names: Names<T>, name: &str) -> PyResult<Option<T>> {
    (name != "auto").then(|| named(names, name)).transpose()
}

fn name_of<T: PartialEq>(names: Names<T>, value: &T) -> &'static str {
    let found = names.iter().find(|(_, known)| known == value);
    found.map(|&(name, _)| name).expect("each value has a name")
}

fn prot(bits: u8) -> PyResult<Prot> {
    match bits {
        0 => Ok(Prot::None),
        1 => Ok(Prot::Read),
        3 => Ok(Prot::Write),
        _ => Err(wrong_type("prot 0, 1 or 3")),
    }
}

fn budget(budget: &Bound<'_, PyAny>) -> PyResult<Budget> {
    if budget.is_none() {
        return Ok(Budget::Unlimited);
    }
    if budget.is_instance_of::<PyString>() {
        return Ok(Budget::Auto);
    }
    budget.extract().map(Budget::Bytes)
}

fn mapping(mapping: &Bound<'_, PyAny>) -> PyResult<Mapping> {
    let Ok(name) = mapping.cast::<PyString>() else {
        return numbers(mapping).map(Mapping::List);
    };
    match name.to_cow()?.as_ref() {
        "linear" => Ok(Mapping::Linear),
        "none" => Ok(Mapping::None),
        _ => Err(wrong_type("mapping linear, none or a buffer of int64")),
    }
}

fn target(at: &Bound<'_, PyAny>) -> PyResult<Target> {
    if at.is_instance_of::<PyInt>() {
        return at.extract().map(Target::From);
    }
    numbers(at).map(Target::List)
}

fn calibration(values: &Bound<'_, PyDict>) -> PyResult<Calibration> {
    let value = |name: &str| -> PyResult<u64> { values.as_any().get_item(name)?.extract() };
    Ok(Calibration {
        alias_extent_pages: value("alias_extent_pages")?,
        evict_gap_pages: value("evict_gap_pages")?,
        batch_pages: value("batch_pages")?,
    })
}

#[pymethods]
impl WindowBase {
    #[new]
    // As many as a window has settings.
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)]
    fn new(
        py: Python<'_>,
        store: &Store,
        page_count: Option<u64>,
        first_page: i64,
        mapping: &Bound<'_, PyAny>,
        prot: u8,
        coherent: Option<bool>,
        engine: &str,
        populate: bool,
        nonblock: bool,
        lock: bool,
        budget: &Bound<'_, PyAny>,
        fault: &str,
        tracking: &str,
        calibration: &Bound<'_, PyDict>,
        advice: &str,
        memory: Option<&Bound<'_, PyAny>>,
        private: bool,
    ) -> PyResult<Self> {
        let memory = memory.map(Bytes::readable).transpose()?;
        let region = memory.as_ref().map(raw::mapped_by).transpose();
        let as_mapped = MappingOptions {
            sharing: if private { Sharing::Private } else { Sharing::Shared },
            advice: named_or_auto(ADVICE, advice)?,
            region: region.map_err(|errno| errors::python(py, &Error::system("Window", errno)))?,
        };
        let options = WindowOptions {
            page_count,
            first_page,
            mapping: self::mapping(mapping)?,
            prot: self::prot(prot)?,
            coherent,
            engine: named_or_auto(ENGINES, engine)?,
            populate,
            nonblock,
            lock,
            budget: self::budget(budget)?,
            fault: named(FAULTS, fault)?,
            tracking: named_or_auto(&TRACKING[..2], tracking)?,
            calibration: self::calibration(calibration)?,
        };
        let core = store.core();
        let had_bytes = core.size_bytes();
        let window = Arc::new(run(py, |interrupt| {
            Window::with_mapping(core, &options, as_mapped, interrupt)
        })?);
        if window.writable() && !window.coherent() && !private {
            store.add_window(&window);
            // Before it was added nobody told it.
            run(py, |interrupt| window.reload_grown(had_bytes, interrupt))?;
        }
        Ok(Self { views: Views::new(window), _memory: memory })
    }

    #[getter]
    fn page_count(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.window(py, "page_count")?.page_count())
    }

    #[getter]
    fn page_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.window(py, "page_bytes")?.page_size().bytes())
    }

    #[getter]
    fn engine(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.window(py, "engine")?.engine().to_string())
    }

    #[getter]
    fn coherent(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.window(py, "coherent")?.coherent())
    }

    #[getter]
    fn writable(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.window(py, "writable")?.writable())
    }

    #[getter]
    fn locked(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.window(py, "locked")?.locked())
    }

    #[getter]
    fn fault(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(name_of(FAULTS, &self.window(py, "fault")?.fault()))
    }

    #[getter]
    fn tracking(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let tracking = self.window(py, "tracking")?.tracking();
        Ok(tracking.map(|tracking| name_of(TRACKING, &tracking)))
    }

    #[getter]
    fn advice(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let advice = self.window(py, "advice")?.read_ahead();
        Ok(advice.map(|advice| name_of(ADVICE, &advice)))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.views.core().is_none()
    }

    #[getter]
    fn vma_count(&self, py: Python<'_>) -> PyResult<u64> {
        let window = self.window(py, "vma_count")?;
        run_short(py, || window.vma_count())
    }

    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // the settings of remap
    fn _remap<'py>(
        &self,
        py: Python<'py>,
        file_pages: &Bound<'py, PyAny>,
        at: &Bound<'py, PyAny>,
        prot: Option<u8>,
        nonblock: bool,
        populate: bool,
        discard: bool,
        in_place: bool,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let window = self.window(py, "remap")?;
        let file_pages = selection(file_pages)?;
        let at = target(at)?;
        let prot = prot.map(self::prot).transpose()?;
        let options = RemapOptions { prot, nonblock, populate, discard, in_place };
        let present = run(py, |interrupt| window.remap(&file_pages, &at, options, interrupt))?;
        answers(py, &present, |here| [u8::from(here)])
    }

    /// Shows extents in slots that nobody reads.
    fn _load(
        &self,
        py: Python<'_>,
        extents: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        extent_pages: i64,
    ) -> PyResult<()> {
        let window = self.window(py, "remap")?;
        let (extents, slots) = (numbers(extents)?, numbers(slots)?);
        run(py, |interrupt| window.load_extents(&extents, &slots, extent_pages, interrupt))
    }

    fn _populate<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
        nonblock: bool,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let window = self.window(py, "populate")?;
        let pages = selection(pages)?;
        let present = run(py, |interrupt| window.populate(&pages, nonblock, interrupt))?;
        answers(py, &present, |here| [u8::from(here)])
    }

    fn _evict(&self, py: Python<'_>, pages: &Bound<'_, PyAny>, discard: bool) -> PyResult<()> {
        let window = self.window(py, "evict")?;
        let pages = selection(pages)?;
        run(py, |interrupt| window.evict(&pages, discard, interrupt))
    }

    fn _protect(&self, py: Python<'_>, pages: &Bound<'_, PyAny>, prot: u8) -> PyResult<()> {
        let window = self.window(py, "protect")?;
        let pages = selection(pages)?;
        let prot = self::prot(prot)?;
        run(py, |interrupt| window.protect(&pages, prot, interrupt))
    }

    fn _place(
        &self,
        py: Python<'_>,
        pages: &Bound<'_, PyAny>,
        data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let window = self.window(py, "place")?;
        let pages = selection(pages)?;
        let data = data.map(Bytes::readable).transpose()?;
        run(py, |interrupt| {
            // Copied before the window takes a lock: it may lie in the window itself.
            let data = data.as_ref().map(|data| copied("place", data.span())).transpose()?;
            window.place(&pages, data.as_deref(), interrupt)
        })
    }

    fn _pin(slf: &Bound<'_, Self>, pages: &Bound<'_, PyAny>) -> PyResult<Pin> {
        let py = slf.py();
        let window = slf.get().window(py, "pin")?;
        let pages = selection(pages)?;
        // What a signal handler raises meanwhile drops the pin.
        let pinned = run(py, |interrupt| window.pin(&pages, interrupt))?;
        Ok(Pin { pinned: Mutex::new(Some((slf.clone().unbind(), pinned))) })
    }

    fn _flush(&self, py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<()> {
        let window = self.window(py, "flush")?;
        let pages = selection(pages)?;
        run(py, |interrupt| window.flush(&pages, interrupt))
    }

    fn _mapping<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.answer(py, "mapping", pages, Window::mapping, i64::to_ne_bytes)
    }

    fn _present<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.answer(py, "present", pages, Window::present, |here| [u8::from(here)])
    }

    fn _dirty<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.answer(py, "dirty", pages, Window::dirty, |dirty| [u8::from(dirty)])
    }

    fn _pinned<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.answer(py, "pinned", pages, Window::pinned, |pinned| [u8::from(pinned)])
    }

    fn _protection<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.answer(py, "protection", pages, Window::protection, |prot| [bits(prot)])
    }

    fn _stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let window = self.window(py, "stats")?;
        run_short(py, || window.stats())?.fields().into_py_dict(py)
    }

    fn _whole_bytes(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let window = self.window(py, "budget")?;
        run_short(py, || Ok(window.whole_bytes()))
    }

    fn _lower_budget(&self, py: Python<'_>, by_bytes: u64) -> PyResult<()> {
        let window = self.window(py, "budget")?;
        run_short(py, || window.lower_budget(by_bytes))
    }

    /// Closes; refused while views are alive. What was stored and not flushed is
    /// written, or given up; if writing fails the window stays open.
    fn _close(&self, py: Python<'_>, discard: bool) -> PyResult<()> {
        // Nobody gets a view any more, so nothing is stored behind the last flush.
        let Some(window) = self.views.begin_close(py, "this window's memory")? else {
            return Ok(());
        };
        let keeps_changes = window.writable() && !window.coherent();
        if keeps_changes && window.is_own() {
            if discard {
                window.give_up_changes();
            } else if let Err(error) = run(py, |interrupt| window.flush(&Selection::All, interrupt))
            {
                self.views.stay_open();
                return Err(error);
            }
        }
        drop(window);
        release(self.views.take());
        Ok(())
    }

    /// Flushes at the interpreter's end, also what was left and is alive by its views.
    fn _flush_at_end(&self, py: Python<'_>) -> PyResult<()> {
        match self.views.core_anyway() {
            Some(window) if window.is_own() => {
                run(py, |interrupt| window.flush(&Selection::All, interrupt))
            }
            _ => Ok(()),
        }
    }

    /// Closes for calls at once; the memory goes with the last view.
    fn _leave(&self) {
        release(self.views.leave());
    }

    #[allow(unsafe_code, clippy::needless_pass_by_value)] // the interpreter's slot and its pointer
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let closed = || closed(slf.py(), "buffer");
        slf.get().views.add_view(slf.py(), closed, Window::view, |memory, writable| {
            // SAFETY: the pointer is the interpreter's; the view is counted, so the memory stays
            // mapped until `__releasebuffer__`.
            unsafe { raw::fill_view(view, slf.as_any(), memory, writable, flags) }
        })
    }

    #[allow(unsafe_code)] // the interpreter's slot
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.drop_view();
    }
}

fn bits(prot: Prot) -> u8 {
    match prot {
        Prot::None => 0,
        Prot::Read => 1,
        Prot::Write => 3,
    }
}

/// The kernel's own call on another shared mapping, such as an `mmap.mmap`.
#[pyfunction]
pub fn remap_file_pages(
    py: Python<'_>,
    buffer: &Bound<'_, PyAny>,
    start: usize,
    size: usize,
    prot: i32,
    pgoff: usize,
    flags: i32,
) -> PyResult<()> {
    let buffer = Bytes::readable(buffer)?;
    let memory = buffer.span();
    let aligned = memory.start().addr() % mm::system_page_bytes() == 0;
    // The kernel rounds to whole pages and would change what lies around the buffer.
    if !aligned || start > memory.len() || size > memory.len() - start {
        return Err(errors::remap_refused(py, Errno::INVAL, "the range is not within the buffer"));
    }
    let range = memory.part(start, size);
    py.detach(|| mm::remap_file_pages(range, prot, pgoff, flags))
        .map_err(|errno| errors::remap_refused(py, errno, "the kernel refused it"))
}
