//! `Rows`: rows of fixed size in many files, behind Python's methods.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fremap_core::error::Result;
use fremap_core::memory::Ask;
use fremap_core::rows::{Rows as CoreRows, ShardFile, ShardPlace};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::call::{run, run_short};
use crate::raw::Bytes;
use crate::selection::selection;
use crate::store::Store;

/// Rows of fixed size, numbered through all files.
#[pyclass(frozen, module = "fremap._core")]
pub struct Rows {
    core: CoreRows,
}

/// A file as Python tells it: an open store, or (path, device, inode, size).
fn file(place: &Bound<'_, PyAny>) -> PyResult<ShardFile> {
    if let Ok(store) = place.cast::<Store>() {
        return Ok(ShardFile::Store(store.get().core()));
    }
    let (path, device, inode, size_bytes): (Vec<u8>, u64, u64, u64) = place.extract()?;
    let path = Path::new(OsStr::from_bytes(&path)).to_path_buf();
    Ok(ShardFile::Path { path, identity: (device, inode), size_bytes })
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

#[pymethods]
impl Rows {
    #[new]
    fn new(
        py: Python<'_>,
        shards: &Bound<'_, PyAny>,
        row_bytes: usize,
        budget: &Bound<'_, PyAny>,
        direct: bool,
    ) -> PyResult<Self> {
        let mut places = Vec::new();
        for shard in shards.try_iter()? {
            let shard = shard?.cast_into::<PyTuple>()?;
            let (place, data_offset, row_count): (Bound<'_, PyAny>, u64, u64) = shard.extract()?;
            places.push(ShardPlace { file: file(&place)?, data_offset, row_count });
        }
        let budget = ask(budget)?;
        let core = run_short(py, || CoreRows::new(places, row_bytes, budget, direct))?;
        Ok(Self { core })
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
        let rows = selection(rows)?;
        let out = Bytes::writable(out)?;
        run(py, |interrupt| -> Result<()> {
            self.core.check_open("take")?;
            let rows = self.core.resolve("take", rows)?;
            self.core.take(&rows, out.span(), interrupt)
        })
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.core.stats();
        let dict = PyDict::new(py);
        for (name, value) in stats.fields() {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }
}
