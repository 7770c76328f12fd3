//! What a provider process needs of the core.

use fremap_core::error::Error;
use fremap_core::sys::child;
use pyo3::prelude::*;

use crate::call::run_short;
use crate::raw;

/// Ends this process a second after the socket `fd` is hung up, or after the process `parent`
/// that has started it is gone, whatever this process is doing then.
#[pyfunction]
pub fn end_with(py: Python<'_>, fd: i32, parent: i32) -> PyResult<()> {
    let fail = |errno| Error::system("end_with", errno);
    run_short(py, || child::end_with(raw::duplicate(fd).map_err(fail)?, parent).map_err(fail))
}
