//! `Store`: a core store behind Python's methods.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use fremap_core::error::{Error, Result};
use fremap_core::store::{OpenMode, ProviderOptions, Store as CoreStore, StoreKind};
use fremap_core::sys::fork_lock::ForkLock;
use fremap_core::units::{FilePage, Pages};
use fremap_core::window::Window;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyByteArray, PyDict};

use crate::call::{run, run_short};
use crate::raw::{self, Bytes};
use crate::selection::{answers, selection};

/// A numbered run of file pages.
#[pyclass(frozen, module = "fremap._core")]
pub struct Store {
    core: Arc<CoreStore>,
    /// Windows on it that are written. A child of fork may lose them: those of its parent
    /// refuse every call there.
    windows: ForkLock<Vec<Weak<Window>>>,
}

impl Store {
    /// The core's store, for a window on it.
    pub fn core(&self) -> Arc<CoreStore> {
        Arc::clone(&self.core)
    }

    fn made(py: Python<'_>, make: impl FnOnce() -> Result<CoreStore> + Send) -> PyResult<Self> {
        Ok(Self { core: Arc::new(run_short(py, make)?), windows: ForkLock::default() })
    }

    /// Has `refresh` tell a window that the file has grown.
    pub fn add_window(&self, window: &Arc<Window>) {
        let mut windows = self.windows.lock();
        windows.retain(|window| window.strong_count() > 0);
        windows.push(Arc::downgrade(window));
    }

    /// A selection for an operation, which a closed store refuses.
    fn pages(
        &self,
        operation: &'static str,
        pages: &Bound<'_, PyAny>,
    ) -> PyResult<Pages<FilePage>> {
        let selection = selection(pages)?;
        self.core
            .check_open(operation)
            .and_then(|()| selection.resolve(operation, self.core.page_count()))
            .map_err(|error| crate::errors::python(pages.py(), &error))
    }
}

#[pymethods]
impl Store {
    #[staticmethod]
    fn open(
        py: Python<'_>,
        path: &[u8],
        mode: &str,
        size: Option<u64>,
        page_bytes: Option<u64>,
        direct: bool,
    ) -> PyResult<Self> {
        let path = Path::new(OsStr::from_bytes(path));
        let mode = match (mode, size) {
            ("r", None) => OpenMode::Read,
            ("r+", None) => OpenMode::ReadWrite,
            ("w+", Some(size_bytes)) => OpenMode::Create { size_bytes },
            _ => return Err(crate::errors::wrong_type("mode r, r+, or w+ with a size")),
        };
        Self::made(py, || CoreStore::open(path, mode, page_bytes, direct))
    }

    #[staticmethod]
    fn from_fd(
        py: Python<'_>,
        fd: i32,
        writable: bool,
        page_bytes: Option<u64>,
        direct: bool,
    ) -> PyResult<Self> {
        Self::made(py, || CoreStore::from_fd(own("open", fd)?, writable, page_bytes, direct))
    }

    #[staticmethod]
    fn memory(py: Python<'_>, size: u64, page_bytes: Option<u64>) -> PyResult<Self> {
        Self::made(py, || CoreStore::memory(size, page_bytes))
    }

    #[staticmethod]
    fn memory_from_fd(py: Python<'_>, fd: i32, page_bytes: Option<u64>) -> PyResult<Self> {
        Self::made(py, || CoreStore::memory_from_fd(own("MemoryStore", fd)?, page_bytes))
    }

    #[staticmethod]
    fn shared_memory(
        py: Python<'_>,
        name: &str,
        size: Option<u64>,
        page_bytes: Option<u64>,
    ) -> PyResult<Self> {
        Self::made(py, || CoreStore::shared_memory(name, size, page_bytes))
    }

    #[staticmethod]
    fn concat(py: Python<'_>, stores: Vec<Bound<'_, Self>>) -> PyResult<Self> {
        let members = stores.into_iter().map(|store| store.get().core()).collect();
        Self::made(py, || CoreStore::concat(members))
    }

    #[staticmethod]
    #[allow(clippy::too_many_arguments)] // as the stub has them
    fn provided(
        py: Python<'_>,
        size: u64,
        page_bytes: Option<u64>,
        name: Option<&str>,
        program: Vec<Vec<u8>>,
        payload: &[u8],
        workers: usize,
        timeout: Option<f64>,
        batch_bytes: usize,
        content_id: Option<&[u8]>,
    ) -> PyResult<Self> {
        let options = ProviderOptions {
            program: program.into_iter().map(OsString::from_vec).collect(),
            payload: payload.to_vec(),
            workers,
            timeout: timeout
                .map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)),
            batch_bytes,
            content_id: content_id.map(<[u8]>::to_vec),
        };
        let name = name.map(PathBuf::from);
        Self::made(py, || CoreStore::provided(size, page_bytes, name, options))
    }

    #[staticmethod]
    fn unlink_shared_memory(py: Python<'_>, name: &str) -> PyResult<()> {
        run_short(py, || CoreStore::unlink_shared_memory(name))
    }

    #[getter]
    fn page_count(&self) -> u64 {
        self.core.page_count()
    }

    #[getter]
    fn page_bytes(&self) -> usize {
        self.core.page_size().bytes()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.core.size_bytes()
    }

    #[getter]
    fn writable(&self) -> bool {
        self.core.writable()
    }

    #[getter]
    fn direct(&self) -> bool {
        self.core.direct()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    /// Whether other processes provide the pages, so that there is no file.
    #[getter]
    fn is_provided(&self) -> bool {
        self.core.kind() == StoreKind::Provided
    }

    /// Provider processes that run and are not at work.
    fn processes(&self, py: Python<'_>) -> Vec<i32> {
        py.detach(|| self.core.provider_processes())
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        run_short(py, || {
            self.core.check_open("fileno")?;
            self.core.fd().map(|fd| fd.as_raw_fd()).ok_or_else(|| Error::Unsupported {
                operation: "fileno",
                reason: match self.core.kind() {
                    StoreKind::Provided => "no file has the pages of this store",
                    _ => {
                        "the store is a row of files, each with a descriptor of its own; ask \
                         the stores that it was made of"
                    }
                }
                .into(),
            })
        })
    }

    fn resident<'py>(
        &self,
        py: Python<'py>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let pages = self.pages("resident", pages)?;
        let resident = run(py, |interrupt| self.core.resident_until(&pages, interrupt))?;
        answers(py, &resident, |here| [u8::from(here)])
    }

    fn prefetch(&self, py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<()> {
        let pages = self.pages("prefetch", pages)?;
        run(py, |interrupt| self.core.prefetch_until(&pages, interrupt))
    }

    fn read(
        &self,
        py: Python<'_>,
        pages: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let pages = self.pages("read", pages)?;
        let out = Bytes::writable(out)?;
        run(py, |interrupt| self.core.read(&pages, out.span(), interrupt))
    }

    fn write(
        &self,
        py: Python<'_>,
        pages: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let pages = self.pages("write", pages)?;
        let data = Bytes::readable(data)?;
        run(py, |interrupt| self.core.write(&pages, data.span(), interrupt))
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        run_short(py, || self.core.check_open("sync").and_then(|()| self.core.sync()))
    }

    fn refresh(&self, py: Python<'_>) -> PyResult<()> {
        let had_bytes = self.core.size_bytes();
        run_short(py, || self.core.check_open("refresh").and_then(|()| self.core.refresh()))?;
        let windows = self.windows.lock().clone();
        run(py, |interrupt| {
            let windows = windows.iter().filter_map(Weak::upgrade);
            windows
                .map(|window| window.reload_grown(had_bytes, interrupt))
                .fold(Ok(()), Result::and)
        })
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            self.core.close();
            self.core.rest();
        });
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.core.counters();
        let fields = [
            ("bytes_copied", counters.bytes_copied),
            ("bytes_read", counters.bytes_read),
            ("reads", counters.reads),
            ("bytes_written", counters.bytes_written),
        ];
        fields.into_py_dict(py)
    }
}

fn own(operation: &'static str, fd: i32) -> Result<std::os::fd::OwnedFd> {
    raw::duplicate(fd).map_err(|errno| Error::system(operation, errno))
}
