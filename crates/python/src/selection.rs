//! Selections of pages as the Python package passes them, and masks as it takes them.

use fremap_core::sys::reserve;
use fremap_core::units::Selection;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyTuple};

/// None (all), a tuple (start, stop), or a contiguous buffer of int64.
pub fn selection(pages: &Bound<'_, PyAny>) -> PyResult<Selection> {
    if pages.is_none() {
        return Ok(Selection::All);
    }
    if let Ok(run) = pages.cast::<PyTuple>() {
        let (start, stop) = run.extract()?;
        return Ok(Selection::Range(start, stop));
    }
    numbers(pages).map(Selection::List)
}

/// The int64 values of a buffer, copied: it may lie in a window, or change.
pub fn numbers(buffer: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let memory = PyBuffer::<i64>::get(buffer)?;
    let mut copied: Vec<i64> = Vec::new();
    // Not as the buffer itself would: its failing allocation ends the process.
    copied.try_reserve_exact(memory.item_count()).map_err(|_| no_room(memory.item_count()))?;
    // The reserve is not for what may be refused.
    if reserve::has(copied.as_ptr().cast()) {
        return Err(no_room(memory.item_count()));
    }
    copied.resize(memory.item_count(), 0);
    memory.copy_to_slice(buffer.py(), &mut copied)?;
    Ok(copied)
}

fn no_room(count: usize) -> PyErr {
    let bytes = count.saturating_mul(size_of::<i64>());
    PyMemoryError::new_err(format!(
        "a copy of {count} numbers needs {bytes} bytes, which this process cannot have; select \
         fewer at a time"
    ))
}

/// One byte (0 or 1) a page.
pub fn mask(
    py: Python<'_>,
    pages: impl ExactSizeIterator<Item = bool>,
) -> PyResult<Bound<'_, PyByteArray>> {
    PyByteArray::new_with(py, pages.len(), |bytes| {
        for (byte, page) in bytes.iter_mut().zip(pages) {
            *byte = u8::from(page);
        }
        Ok(())
    })
}

/// int64 values, in the machine's byte order.
pub fn int64s(
    py: Python<'_>,
    values: impl ExactSizeIterator<Item = i64>,
) -> PyResult<Bound<'_, PyByteArray>> {
    PyByteArray::new_with(py, values.len() * size_of::<i64>(), |bytes| {
        for (word, value) in bytes.chunks_exact_mut(size_of::<i64>()).zip(values) {
            word.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(())
    })
}
