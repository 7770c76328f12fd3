//! `Rows`: rows of fixed size in many files, behind Python's methods.

use std::ffi::OsStr;
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fremap_core::error::Result;
use fremap_core::memory::Ask;
use fremap_core::rows::{
    self, Front, Memory, Pending as CorePending, Rows as CoreRows, RowsOrRuns, Runs, ShardFile,
    ShardPlace,
};
use fremap_core::sys::span::Span;
use fremap_core::units::Selection;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList, PyString};

use crate::call::{run, run_short};
use crate::errors::{self, wrong_type};
use crate::raw::Bytes;
use crate::selection::{numbers, selection};
use crate::store::Store;

/// Rows of fixed size, numbered through all files.
#[pyclass(frozen, module = "fremap._core")]
pub struct Rows {
    core: Arc<CoreRows>,
}

/// A shard as Python has it: its path or store, (device, inode, birth) and size of that file,
/// where its rows begin, and how many they are.
fn shard(shard: &Bound<'_, PyAny>) -> PyResult<ShardPlace> {
    type Shard<'py> = (Bound<'py, PyAny>, (u64, u64, u64), u64, u64, u64);
    let (file, (device, inode, born_ns), size_bytes, data_offset, row_count): Shard<'_> =
        shard.extract()?;
    let file = if let Some(path) = path(&file)? {
        ShardFile::Path { path, identity: (device, inode), born_ns, size_bytes }
    } else {
        let store = file.getattr("_core")?.cast_into::<Store>()?;
        ShardFile::Store(store.get().core())
    };
    Ok(ShardPlace { file, data_offset, row_count })
}

/// A path of text or bytes; none for any other object.
fn path(path: &Bound<'_, PyAny>) -> PyResult<Option<PathBuf>> {
    if let Ok(bytes) = path.cast::<PyBytes>() {
        return Ok(Some(OsStr::from_bytes(bytes.as_bytes()).into()));
    }
    path.cast::<PyString>().ok().map(|text| text.extract()).transpose()
}

/// What files are: of each its mode, device, inode, birth, size, and first bytes; or the number
/// of an error.
#[pyfunction]
pub fn look<'py>(
    py: Python<'py>,
    paths: &Bound<'py, PyList>,
    front_bytes: usize,
) -> PyResult<Bound<'py, PyList>> {
    let path = |file: Bound<'py, PyAny>| path(&file)?.ok_or_else(|| wrong_type("a path"));
    let paths = paths.iter().map(path).collect::<PyResult<Vec<_>>>()?;
    let fronts = py.detach(|| rows::look(&paths, front_bytes));
    let found = PyList::empty(py);
    for front in fronts {
        match front {
            Ok(Front { facts, born_ns, bytes }) => found.append((
                facts.file_type.as_raw_mode(),
                facts.identity.0,
                facts.identity.1,
                born_ns,
                facts.size_bytes,
                PyBytes::new(py, &bytes),
            ))?,
            Err(errno) => found.append(errno.raw_os_error())?,
        }
    }
    Ok(found)
}

/// What `budget` asks for; none is no limit.
fn ask(budget: &Bound<'_, PyAny>) -> PyResult<Option<Ask>> {
    if budget.is_none() {
        return Ok(None);
    }
    if budget.is_instance_of::<PyString>() {
        return Ok(Some(Ask::Auto { need: u64::MAX }));
    }
    budget.extract().map(Ask::Bytes).map(Some)
}

/// What to take, as Python passes it.
enum Wish {
    Rows(Selection),
    /// Names, first rows and numbers of rows.
    Runs([Vec<i64>; 3]),
}

impl Wish {
    /// A selection, or a list of three buffers.
    fn of(rows: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Ok(runs) = rows.cast::<PyList>() else { return selection(rows).map(Self::Rows) };
        let (names, starts, counts) = (runs.get_item(0)?, runs.get_item(1)?, runs.get_item(2)?);
        Ok(Self::Runs([numbers(&names)?, numbers(&starts)?, numbers(&counts)?]))
    }

    fn resolved(self, core: &CoreRows) -> Result<RowsOrRuns> {
        match self {
            Self::Rows(selection) => core.resolve("take", selection).map(RowsOrRuns::Rows),
            Self::Runs([names, starts, counts]) => {
                Runs::new(names, &starts, &counts, core.row_count()).map(RowsOrRuns::Runs)
            }
        }
    }
}

#[pymethods]
impl Rows {
    #[new]
    #[pyo3(signature = (shards, row_bytes, budget, direct=false, cache_bytes=0))]
    fn new(
        py: Python<'_>,
        shards: &Bound<'_, PyAny>,
        row_bytes: usize,
        budget: &Bound<'_, PyAny>,
        direct: bool,
        cache_bytes: u64,
    ) -> PyResult<Self> {
        let places = shards.try_iter()?.map(|place| shard(&place?)).collect::<PyResult<_>>()?;
        let budget = ask(budget)?;
        let core = run_short(py, || CoreRows::new(places, row_bytes, budget, direct, cache_bytes))?;
        Ok(Self { core: Arc::new(core) })
    }

    #[getter]
    fn row_count(&self) -> u64 {
        self.core.row_count()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    fn take(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let wish = Wish::of(rows)?;
        let out = Bytes::writable(out)?;
        run(py, |interrupt| -> Result<()> {
            self.core.check_open("take")?;
            self.core.take(&wish.resolved(&self.core)?, out.span(), interrupt)
        })
    }

    /// Begins a take and returns at once. One that `abandons` ends early once nobody has the
    /// object that is returned.
    fn submit(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        abandons: bool,
    ) -> PyResult<Pending> {
        let wish = Wish::of(rows)?;
        let out = Bytes::writable(out)?;
        let core = run_short(py, || {
            self.core.check_open("take")?;
            self.core.submit(wish.resolved(&self.core)?, Box::new(out))
        })?;
        Ok(Pending { core, abandons })
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.core.stats().into_py_dict(py)
    }

    fn refresh(&self, py: Python<'_>) {
        py.detach(|| self.core.refresh());
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }
}

impl Memory for Bytes {
    fn span(&self) -> Span<'_> {
        Self::span(self)
    }
}

/// A take that was submitted.
#[pyclass(frozen, module = "fremap._core")]
pub struct Pending {
    core: Arc<CorePending>,
    /// Its rows are not needed once this is dropped.
    abandons: bool,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // The memory is kept until what is in flight has ended, by whoever does the take.
        if self.abandons {
            self.core.cancel();
        }
    }
}

#[pymethods]
impl Pending {
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        self.core.check_owner().map_err(|error| errors::python(py, &error))?;
        Ok(self.core.outcome().is_some())
    }

    fn cancel(&self) {
        self.core.cancel();
    }

    fn cancelled(&self) -> bool {
        self.core.is_cancelled()
    }

    /// Waits for `seconds`, or without a limit; whether it is done.
    fn wait(&self, py: Python<'_>, seconds: Option<f64>) -> PyResult<bool> {
        let timeout = seconds
            .map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX));
        run(py, |interrupt| self.core.wait(timeout, interrupt))
    }

    /// Raises what went wrong with a take that is done.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        match self.core.outcome() {
            Some(Err(error)) => Err(errors::python(py, error)),
            _ => Ok(()),
        }
    }

    /// A descriptor that can be read once it is done; the caller closes it.
    fn event(&self, py: Python<'_>) -> PyResult<RawFd> {
        run_short(py, || self.core.event()).map(IntoRawFd::into_raw_fd)
    }
}
