//! Selections of pages as the Python package passes them, and masks as it receives them.

use fremap_core::sys::reserve;
use fremap_core::units::Selection;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyTuple};

use crate::call::run;
use crate::raw::Bytes;

/// Bytes of an answer that are filled between two looks at signals.
const PIECE_BYTES: usize = 1 << 14;

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

/// What a call answers for each page, slot or key, `BYTES` bytes each. Where they are very many,
/// the memory is not cleared first, and the caller can be interrupted while it is filled.
pub fn answers<'py, T: Copy + Sync, const BYTES: usize>(
    py: Python<'py>,
    values: &[T],
    bytes_of: fn(T) -> [u8; BYTES],
) -> PyResult<Bound<'py, PyByteArray>> {
    if values.len() * BYTES <= PIECE_BYTES {
        return PyByteArray::new_with(py, values.len() * BYTES, |bytes| {
            for (to, &value) in bytes.chunks_exact_mut(BYTES).zip(values) {
                to.copy_from_slice(&bytes_of(value));
            }
            Ok(())
        });
    }
    let array = PyByteArray::new(py, &[]);
    array.resize(values.len() * BYTES)?;
    let memory = Bytes::writable(&array)?;
    run(py, |interrupt| {
        let mut buffer = [0; PIECE_BYTES];
        for (piece, number) in values.chunks(PIECE_BYTES / BYTES).zip(0..) {
            interrupt.check()?;
            let bytes = &mut buffer[..piece.len() * BYTES];
            for (to, &value) in bytes.chunks_exact_mut(BYTES).zip(piece) {
                to.copy_from_slice(&bytes_of(value));
            }
            memory.span().part(number * PIECE_BYTES, bytes.len()).copy_from(bytes);
        }
        Ok(())
    })?;
    Ok(array)
}
