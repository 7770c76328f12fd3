//! The core's errors as the exceptions of `fremap.errors`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fremap_core::error::{describe, Error, RowLoss};
use pyo3::exceptions::{PyKeyboardInterrupt, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::io::Errno;

/// The exception for `error`.
pub fn python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failure| failure)
}

/// An exception of `fremap.errors`, by the kind that its table knows.
pub fn of_kind(py: Python<'_>, kind: &str, message: &str) -> PyErr {
    simple(py, kind, message).unwrap_or_else(|failure| failure)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let message = error.to_string();
    match error {
        Error::PageRange { index, limit, .. } => {
            let made = table(py)?.call_method1("_page_range", (message, index, limit))?;
            Ok(PyErr::from_value(made))
        }
        Error::Argument(_) => simple(py, "argument", &message),
        Error::Placed { .. } => simple(py, "placed", &message),
        Error::Alias { .. } => simple(py, "duplicate", &message),
        Error::Budget { .. } => simple(py, "budget", &message),
        Error::Slots { .. } => simple(py, "slots_full", &message),
        Error::NoThread { .. } => simple(py, "memory", &message),
        Error::Memory { completed, .. } => {
            let error = simple(py, "memory", &message)?;
            error.value(py).setattr("completed", completed)?;
            Ok(error)
        }
        Error::Unsupported { .. } => simple(py, "unsupported", &message),
        Error::Closed { .. } | Error::MemberClosed { .. } => simple(py, "closed", &message),
        Error::Fork { .. } => simple(py, "fork", &message),
        Error::SharedMemory { path, .. } => system(py, "io", &message, ENOSPC, Some(path), None, 0),
        Error::MappingLimit { .. } => system(py, "mapping_limit", &message, ENOMEM, None, None, 0),
        Error::Io { path, file_page, errno, completed, .. } => {
            let number = errno.raw_os_error();
            system(py, "io", &message, number, path.as_deref(), *file_page, *completed)
        }
        Error::Truncated { path, file_page, completed, .. } => {
            let page = Some(*file_page);
            system(py, "truncated", &message, ENODATA, path.as_deref(), page, *completed)
        }
        Error::Provider { path, file_page, said, completed, .. } => {
            let number = said.errno.raw_os_error();
            let path = path.as_deref().map(|path| path_bytes(py, path));
            let said = (&said.traceback, PyBytes::new(py, &said.pickled));
            let arguments = (message, number, said, path, *file_page, *completed);
            Ok(PyErr::from_value(table(py)?.call_method1("_provider", arguments)?))
        }
        Error::Row { path, row, loss, .. } => {
            let (kind, number) = match loss {
                RowLoss::Truncated { .. } => ("truncated", ENODATA),
                RowLoss::Replaced => ("io", ESTALE),
                RowLoss::Io(errno) => ("io", errno.raw_os_error()),
            };
            let error = system(py, kind, &message, number, path.as_deref(), None, 0)?;
            error.value(py).setattr("row", row)?;
            Ok(error)
        }
        // Raised only for an interrupt whose exception was not kept; `call::run` keeps it.
        Error::Interrupted { .. } => Ok(PyKeyboardInterrupt::new_err(message)),
    }
}

const ENOMEM: i32 = 12;
const ENOSPC: i32 = 28;
const ENODATA: i32 = 61;
const ESTALE: i32 = 116;

fn table(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("fremap.errors")
}

fn simple(py: Python<'_>, kind: &str, message: &str) -> PyResult<PyErr> {
    let class = table(py)?.getattr("_BY_KIND")?.get_item(kind)?;
    Ok(PyErr::from_value(class.call1((message,))?))
}

fn system(
    py: Python<'_>,
    kind: &str,
    message: &str,
    errno: i32,
    path: Option<&Path>,
    file_page: Option<u64>,
    completed: usize,
) -> PyResult<PyErr> {
    let path = path.map(|path| path_bytes(py, path));
    let arguments = (kind, message, errno, path, file_page, completed);
    Ok(PyErr::from_value(table(py)?.call_method1("_system", arguments)?))
}

fn path_bytes<'py>(py: Python<'py>, path: &Path) -> Bound<'py, PyBytes> {
    PyBytes::new(py, path.as_os_str().as_bytes())
}

/// The answer of `remap_file_pages(2)` to a call that it refused.
pub fn remap_refused(py: Python<'_>, errno: Errno, why: &str) -> PyErr {
    let text = describe(errno);
    let message = format!("remap_file_pages: {text}: {why}");
    system(py, "remap", &message, errno.raw_os_error(), None, None, 0)
        .unwrap_or_else(|failure| failure)
}

/// The exception for an argument of a type that the stub does not allow.
pub fn wrong_type(expected: &str) -> PyErr {
    PyTypeError::new_err(format!("expected {expected}"))
}
